"""Files of a data set, from its folder or from the tar archive it was released as; arrays, pictures and pickles."""

from __future__ import annotations

import io
import pickletools
import tarfile
import tempfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffrep.eval.cache import digest
from diffrep.eval.datasets.pairs import DatasetError, inside
from diffrep.files import optional_import
from diffrep.store.sources import refuse_damaged


class Archive:
    """A folder, or an uncompressed tar file, by paths inside it.

    Raises:
        DatasetError: there is neither.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        if not self.root.is_dir() and not self.root.is_file():
            raise DatasetError(f"{self.root}: no such folder or tar archive")
        if self.root.is_file():
            _ = self._members

    @cached_property
    def _members(self) -> dict[str, tuple[int, int]]:
        """Path -> where a file's bytes start in the archive, and their number."""
        try:
            with tarfile.open(self.root, "r:") as tar:
                files = [member for member in tar.getmembers() if member.isfile()]
                refuse_damaged(tar)
        except (tarfile.TarError, OSError, ValueError, EOFError) as error:
            raise DatasetError(f"{self.root}: is no uncompressed tar archive ({error})") from None
        return {file.name.removeprefix("./"): (file.offset_data, file.size) for file in files}

    def names(self) -> list[str]:
        """Paths of all files, sorted."""
        if self.root.is_dir():
            return sorted(p.relative_to(self.root).as_posix() for p in self.root.rglob("*") if p.is_file())
        return sorted(self._members)

    def read(self, name: str) -> bytes:
        """A file's bytes; a folder of the archive's own name around everything is looked through.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the name leads out of the data set's folder.
        """
        if self.root.is_dir():
            path = self.root / inside(name)
            if not path.is_file():
                raise FileNotFoundError(2, "no such file", str(path))
            return path.read_bytes()
        member = self._members.get(name) or self._members.get(f"{self.root.stem}/{name}")
        if member is None:
            raise FileNotFoundError(2, "no such file in the archive", f"{self.root}:{name}")
        start, size = member
        with self.root.open("rb") as file:
            file.seek(start)
            return file.read(size)

    def digest(self, names: Sequence[str]) -> str:
        """What tells these files' contents from others.

        Raises:
            FileNotFoundError, ValueError: as `read`.
        """
        return digest(*(self.read(name) for name in names))

    def image(self, name: str) -> Image.Image:
        """A picture, decoded.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it cannot be decoded.
        """
        data = self.read(name)
        try:
            opened = Image.open(io.BytesIO(data))
            opened.load()
        except Exception as error:  # decoders raise almost anything for damaged files
            raise ValueError(f"{name}: cannot be decoded ({error})") from None
        return opened


def read_array(data: bytes, name: str) -> np.ndarray:
    """The array of an ``.npy`` file, of numbers.

    Raises:
        ValueError: it is damaged, or holds something else.
    """
    try:
        values: np.ndarray = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    except Exception as error:  # a damaged header raises SyntaxError, MemoryError and others too
        raise ValueError(f"{name}: is no .npy file of numbers ({error})") from None
    if values.dtype.kind not in "biuf":
        raise ValueError(f"{name}: holds {values.dtype}, not numbers")
    return values


def read_exr(data: bytes, name: str) -> np.ndarray:
    """Channels R, G, B of an OpenEXR picture: (H, W, 3) float32.

    Raises:
        ImportError: the package OpenEXR is not installed.
        ValueError: it is no such picture.
    """
    with optional_import(f'{name}: reading .exr needs OpenEXR: pip install "diffrep[dense]"'):
        import OpenEXR
    with tempfile.TemporaryDirectory() as folder:  # OpenEXR reads files by name only
        picture = Path(folder, "picture.exr")
        picture.write_bytes(data)
        try:
            with OpenEXR.File(str(picture), separate_channels=True) as file:
                channels = file.channels()
                return np.stack([np.array(channels[c].pixels, dtype=np.float32) for c in "RGB"], axis=-1)
        except Exception as error:  # whatever the library raises for a damaged file
            raise ValueError(f"{name}: is no OpenEXR picture with R, G and B ({error})") from None


# -- pickle files -----------------------------------------------------------------------------------------------------
# The format is a program for a stack machine. This reader runs nothing: it knows the few instructions that plain values
# need and the few names by which numpy writes an array; anything else is refused.

_ARRAY_NAMES = frozenset(
    f"{module} {name}"
    for package in ("numpy.core", "numpy._core")
    for module, name in (
        (f"{package}.multiarray", "_reconstruct"),
        (f"{package}.multiarray", "scalar"),
        (f"{package}.numeric", "_frombuffer"),
    )
) | {"numpy ndarray", "numpy dtype", "_codecs encode"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY: dict[str, type] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_LITERALS = frozenset(
    {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "INT", "LONG", "FLOAT", "BINUNICODE", "SHORT_BINUNICODE",
     "UNICODE", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8", "BINSTRING", "SHORT_BINSTRING", "STRING"}
)  # fmt: skip


class _Name(str):
    """A name that the file refers to."""


class _Array:
    """An array (or its type) while its state is still to come."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.value: Any = None


def read_plain(data: bytes, name: str) -> dict[str, Any]:
    """Read a dictionary of plain values and numpy arrays.

    Raises:
        ValueError: the file is damaged, or holds anything else.
    """
    try:
        value = _final(_run(data))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    except Exception as error:  # a damaged file can ask for anything
        raise ValueError(f"{name}: is damaged ({type(error).__name__}: {error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{name}: holds a {type(value).__name__}, not a dictionary")
    return value


def _run(data: bytes) -> Any:
    stack: list[Any] = []
    outer: list[list[Any]] = []  # the stacks below each mark
    memo: dict[int, Any] = {}
    argument: Any
    for operation, argument, _ in pickletools.genops(data):
        code = operation.name
        if code in _LITERALS:
            stack.append(argument)
        elif code in _CONSTANTS:
            stack.append(_CONSTANTS[code])
        elif code in _EMPTY:
            stack.append(_EMPTY[code]())
        elif code in ("MEMOIZE", "BINPUT", "LONG_BINPUT", "PUT"):
            memo[len(memo) if code == "MEMOIZE" else int(argument)] = stack[-1]
        elif code in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo[int(argument)])
        elif code == "MARK":
            outer.append(stack)
            stack = []
        elif code in ("TUPLE", "DICT", "SETITEMS", "APPENDS"):
            items, stack = stack, outer.pop()
            if code == "TUPLE":
                stack.append(tuple(items))
            elif code == "APPENDS":
                stack[-1].extend(items)
            else:
                stack += [{}] if code == "DICT" else []
                stack[-1].update(zip(items[::2], items[1::2], strict=True))
        elif code in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(code[-1])
            stack[-count:] = [tuple(stack[-count:])]
        elif code == "SETITEM":
            value, key = stack.pop(), stack.pop()
            stack[-1][key] = value
        elif code == "APPEND":
            value = stack.pop()
            stack[-1].append(value)
        elif code in ("GLOBAL", "STACK_GLOBAL"):
            if code == "STACK_GLOBAL":
                argument, stack = " ".join(stack[-2:]), stack[:-2]
            if argument not in _ARRAY_NAMES:
                raise ValueError(f"refers to {argument.replace(' ', '.')}; only plain values and arrays are read")
            stack.append(_Name(argument))
        elif code == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            stack.append(_reduce(function, arguments))
        elif code == "BUILD":
            state = stack.pop()
            _build(stack[-1], state)
        elif code == "STOP":
            return stack.pop()
        elif code not in ("PROTO", "FRAME"):
            raise ValueError(f"has the instruction {code}; only plain values and arrays are read")
    raise ValueError("ends too early")


def _reduce(function: Any, arguments: tuple[Any, ...]) -> Any:
    """The few calls that numpy's arrays are written as."""
    if not isinstance(function, _Name):
        raise ValueError("calls something that is no name")
    kind = function.split()[1]
    if kind == "encode":  # how protocol 2 writes bytes
        return arguments[0].encode(arguments[1])
    result = _Array(kind)
    if kind == "dtype":
        result.value = np.dtype(str(arguments[0]))
        if result.value.hasobject:
            raise ValueError(f"holds an array of {arguments[0]}; only numbers are read")
    elif kind == "_frombuffer":  # how protocol 5 writes arrays
        content, dtype, shape, order = arguments
        result.value = np.frombuffer(content, dtype=_final(dtype)).reshape(shape, order=order)
    elif kind == "scalar":
        result.value = np.frombuffer(arguments[1], dtype=_final(arguments[0]))[0]
    return result


def _build(target: Any, state: Any) -> None:
    if not isinstance(target, _Array) or not isinstance(state, tuple):
        raise ValueError("holds an object; only plain values and arrays are read")
    if target.kind == "dtype":
        if state[1] in ("<", ">"):
            target.value = target.value.newbyteorder(state[1])
        return
    _, shape, dtype, column_first, content = state
    array = np.frombuffer(content, dtype=_final(dtype))
    target.value = array.reshape(shape, order="F" if column_first else "C")


def _final(value: Any) -> Any:
    """Finished arrays instead of their placeholders."""
    if isinstance(value, _Array):
        return value.value
    if isinstance(value, dict):
        return {_final(key): _final(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_final(item) for item in value)
    return value
