"""Files and folders that are whole or not there: the one atomic writer, the one folder claim, the one JSON reader.

Everything that diffrep keeps goes through here. A file is written under a hidden name beside its place,
``.NAME.PID.partial.ENDING``, and renamed when it is whole; a killed run leaves at most such a file, which
`sweep_partials` removes on the next one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import sys
import unicodedata
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

SETTINGS = "settings.json"
# stand near the beginning of pictures that diffrep writes, which so are not taken for photographs
MARK = "diffrep"
DRAWING = f"{MARK} drawing"  # of pictures about images: matches, contact sheets, heat maps
# one of these lies in every folder that `replace_folder` replaces
_REPLACEABLE = (
    "head.json",
    "model_index.json",
    "config.json",
    "synthesis.json",
    "probe.json",
    "index.json",
    ".zattrs",
    "zarr.json",
)
LARGEST_SETTINGS, DEEPEST_KEY, MOST_ALIASES = 2**18, 32, 16  # bytes, parts, of files of settings
UNFETCHED, _POINTER = "is a Git LFS pointer: run `git lfs pull`", b"version https://git-lfs"
_OF_FILES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".npy", ".csv", ".json", ".ply"})
_PARTIAL = re.compile(r"\.(?P<stem>.+)\.(?P<process>\d+)\.partial(?P<ending>\.(?!old$)[^.]+)?(?P<old>\.old)?")


def printable(name: str | os.PathLike[str]) -> str:
    """A name as one line of text that can be printed and drawn: control characters and bytes that are no UTF-8 escaped.

    >>> print(printable("two\\nlines"))
    two\\nlines
    """
    return "".join(
        c if c.isprintable() or unicodedata.category(c) == "Zs" else c.encode("unicode_escape").decode()
        for c in os.fspath(name)
    )


def number_of(number: int, what: str, several: str = "") -> str:
    """A number of things.

    >>> number_of(1, "file"), number_of(1200, "patch", "patches")
    ('1 file', '1,200 patches')
    """
    return f"{number:,} {what if number == 1 else several or f'{what}s'}"


def partial_path(path: Path) -> Path:
    """Where `path` is written before it is whole: hidden, beside it, with its ending, so that writers know the format;
    a name that would get too long gives way to its digest.

    >>> partial_path(Path("maps/a.png")).name.replace(str(os.getpid()), "PID")
    '.a.PID.partial.png'
    """
    long = len(os.fsencode(path.name)) > 220
    stem = hashlib.sha256(os.fsencode(path.stem)).hexdigest() if long else path.stem
    return path.with_name(f".{stem}.{os.getpid()}.partial{path.suffix}")


def write_whole(
    path: str | os.PathLike[str], content: bytes | str | Callable[[Path], object], *, sync: bool = False
) -> None:
    """Write a file or none: what was there is replaced only by a whole one. Its folder is made where it is missing.

    Args:
        content: bytes, text (written as UTF-8), or a function that writes a file at the path that it is given, such
            as `PIL.Image.Image.save`.
        sync: wait until the bytes are on the disk, for what a resumed run must be able to trust.

    Raises:
        OSError: as the system has it, with the file's name; nothing is left behind.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(path)
    partial.unlink(missing_ok=True)  # a link under this name would be followed
    try:
        with _named(path, partial):
            if isinstance(content, (bytes, str)):
                partial.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
            else:
                partial.touch()
                mode = partial.stat().st_mode
                content(partial)
                partial.chmod(mode)  # safetensors 0.8 takes it from everybody but the owner
            if sync:
                with partial.open("rb+") as opened:
                    os.fsync(opened.fileno())
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def _named(path: Path, partial: Path) -> Iterator[None]:
    """Errors of the system, whichever library met them, with the name of what was to be written.

    Of a full disk the system names no file, otherwise the hidden one; safetensors has errors of its own.
    """
    try:
        yield
    except Exception as error:
        rust = re.search(r"\(os error (\d+)\)$", str(error))
        number = error.errno if isinstance(error, OSError) else rust and int(rust[1])
        names = [str(name) for key in ("filename", "filename2") if (name := getattr(error, key, None)) is not None]
        if not number or (names and not any(name.startswith(str(partial)) for name in names)):  # of another file
            raise
        raise OSError(number, os.strerror(number), os.fspath(path)) from error


def write_image(path: Path, image: Image.Image, *, mark: str = MARK) -> None:
    """Write a picture as `write_whole` does. Its EXIF tags say that diffrep wrote it: `MARK` or `DRAWING`."""
    write_whole(path, lambda partial: image.save(partial, exif=marked_exif(mark=mark)))


def marked_exif(tags: bytes = b"", *, mark: str = MARK) -> bytes:
    """EXIF tags with one that says which program made the picture; the camera's Software stays."""
    from PIL import ExifTags, Image

    exif = Image.Exif()
    exif.load(tags)
    exif[ExifTags.Base.ProcessingSoftware] = mark
    return exif.tobytes()


def is_written_by_diffrep(path: Path, mark: str = MARK) -> bool:
    """Whether a picture carries `MARK` (or a narrower one): near its beginning, or its end as in WebP."""
    try:
        with path.open("rb") as file:
            start = file.read(4096)
            file.seek(-min(4096, file.seek(0, os.SEEK_END)), os.SEEK_END)
            return mark.encode() in start + file.read()
    except OSError:
        return False


def check_writable(path: Path, suffixes: tuple[str, ...] = (".png", ".jpg", ".jpeg", ".webp")) -> None:
    """Refuse an output path before any work is done for it.

    Raises:
        ValueError: the ending is none that can be written, or the path is a folder.
        OSError: its folder cannot be written to.
    """
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"{path}: the output must end in {', '.join(suffixes)}")
    if path.is_dir():
        raise ValueError(f"{path}: is a folder, give a file name")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise OSError(f"{path}: the folder {folder} cannot be written to")


def check_folder(folder: Path) -> None:
    """Refuse an output folder before any work is done for it.

    Raises:
        ValueError: it is a file, or is called as one.
        OSError: it cannot be written to.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: is a file; a folder goes there")
    if folder.suffix.lower() in _OF_FILES and not folder.is_dir():
        raise ValueError(f"{folder}: is called as a file; a folder goes there, for example {folder.with_suffix('')}")
    place = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise OSError(f"{folder}: the folder {place} cannot be written to")


def check_replaceable(folder: Path) -> None:
    """Refuse a folder that `replace_folder` must not replace, before any work is done for it.

    Raises:
        ValueError: it is a file, or holds something and nothing that a model, an index or an OME-Zarr has.
        OSError: it cannot be written to.
    """
    check_folder(folder)
    if folder.is_dir() and any(folder.iterdir()) and not any((folder / name).is_file() for name in _REPLACEABLE):
        raise ValueError(f"{folder}: holds other files, which would be removed: give another folder")


def write_document(path: str | os.PathLike[str], document: Mapping[str, Any], *, sync: bool = False) -> None:
    """Write a JSON file, indented, as `write_whole` does; values that JSON does not know become text."""
    write_whole(path, json.dumps(document, indent=2, default=str) + "\n", sync=sync)


def read_document(path: str | os.PathLike[str], *, error: type[Exception] = ValueError) -> dict[str, Any]:
    """Read a JSON file that holds one object, whoever made it.

    Args:
        error: the kind of error that the caller's readers raise.

    Raises:
        error: the file is missing, no UTF-8, no JSON, nested too deeply, or no object; the message begins with its
            path.
    """
    try:
        document = json.loads(Path(path).read_bytes().decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as problem:
        raise error(f"{path}: cannot be read as JSON ({one_line(problem)})") from None
    if not isinstance(document, dict):
        raise error(f"{path}: must hold a JSON object, found {type(document).__name__}")
    return document


def read_settings(path: str | os.PathLike[str], *, error: type[Exception] = ValueError) -> dict[str, Any]:
    """What a TOML (``.toml``) or YAML file (any other ending) of settings holds, whoever made it.

    Args:
        error: the kind of error that the caller's readers raise.

    Raises:
        error: the file is missing, no UTF-8, no TOML or YAML, no table, nested too deeply, or larger than settings
            are: the parsers need time that grows with the square of a dotted key, and YAML's aliases multiply; the
            message begins with its path.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_SETTINGS + 1)
        if len(content) > LARGEST_SETTINGS:
            raise ValueError(f"more than {LARGEST_SETTINGS:,} bytes are no settings")
        values = (_toml if path.suffix.lower() == ".toml" else _yaml)(content.decode("utf-8-sig"))
        if not isinstance(values, dict):
            raise ValueError(f"the file must be a table of settings, found {type(values).__name__}")
        return values
    except OSError as problem:
        raise error(f"{path}: cannot be read ({problem.strerror})") from None
    # TOML's own errors are ValueErrors; PyYAML lets IndexError, KeyError, TypeError and AttributeError of odd tags out
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as problem:
        raise error(f"{path}: {one_line(problem)}") from None


def _toml(text: str) -> Any:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    bare = re.sub(r'"(?:[^"\\\n]|\\.)*"|\'[^\'\n]*\'', "", text)
    if any(part.count(".") > DEEPEST_KEY for part in re.split(r"[=,{}\[\]\n#]", bare)):
        raise ValueError(f"a key has more than {DEEPEST_KEY} dotted parts")
    return tomllib.loads(text)


def _yaml(text: str) -> Any:
    import yaml  # here: no start of a command should pay for it

    if len(re.findall(r"(?:^|[\s,\[{])\*[\w-]", text)) > MOST_ALIASES:
        raise ValueError(f"more than {MOST_ALIASES} aliases")
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as problem:
        raise ValueError(str(problem)) from None


def save_weights(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], **metadata: str) -> None:
    """Write tensors as one safetensors file, whole or not at all."""
    from safetensors.torch import save_file

    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_whole(path, lambda partial: save_file(contiguous, partial, metadata=metadata or None))


def read_weights(
    path: str | os.PathLike[str], *, only: Collection[str] | None = None, error: type[Exception] = ValueError
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file, whoever made it.

    Args:
        only: names of the tensors that are read; None: all of them.
        error: the kind of error that the caller's readers raise.

    Returns:
        Its tensors by their names, on the CPU, and its metadata.

    Raises:
        error: the file is missing, cut off, a Git LFS pointer, or no safetensors file; the message begins with its
            path.
    """
    with _opened(path, error) as file:
        names = file.keys() if only is None else only
        return {name: file.get_tensor(name) for name in names}, dict(file.metadata() or {})


def weight_names(path: str | os.PathLike[str], *, error: type[Exception] = ValueError) -> set[str]:
    """The names of the tensors of a safetensors file, whose values are not read; errors as of `read_weights`."""
    with _opened(path, error) as file:
        return set(file.keys())


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str], error: type[Exception]) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, ValueError, KeyError, RecursionError) as problem:
        why = UNFETCHED if is_lfs_pointer(path) else f"cannot be read as safetensors ({one_line(problem)})"
        raise error(f"{path}: {why}") from None


def is_lfs_pointer(path: str | os.PathLike[str]) -> bool:
    """Whether a file is the note that Git leaves of a large one that it has not fetched."""
    try:
        with Path(path).open("rb") as file:
            return file.read(len(_POINTER)) == _POINTER
    except OSError:
        return False


def claim_folder(folder: str | os.PathLike[str], settings: Mapping[str, object], *, name: str = SETTINGS) -> None:
    """Write the settings of a run into its folder, or check that those that are there are the same.

    Args:
        settings: JSON-ready; all that the contents of the folder depend on.
        name: of the file that holds them.

    Raises:
        ValueError: other settings are there, or the file cannot be read; the message names the first difference.
    """
    wanted = json.loads(json.dumps(settings, default=str))
    file = Path(folder) / name
    if not file.exists():
        write_document(file, wanted)
        return
    existing = read_document(file)
    for key in {**wanted, **existing}:
        if wanted.get(key) != existing.get(key):
            raise ValueError(
                f"{folder} was made with {key} = {existing.get(key)!r}, this run has {wanted.get(key)!r}:"
                " use another folder, or the same settings"
            )


def replace_folder(folder: str | os.PathLike[str], write: Callable[[Path], object]) -> None:
    """Write a folder through `write(partial folder)`; what was there is replaced only by a whole one.

    Raises:
        ValueError, OSError: as `check_replaceable`.
    """
    check_replaceable(Path(folder))
    folder = Path(os.path.realpath(folder))  # of a link, the folder where it leads
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(folder)
    previous = partial.with_name(f"{partial.name}.old")
    sweep_partials(folder.parent)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with _named(folder, partial):
            partial.mkdir()
            write(partial)
            for file in partial.rglob("*.safetensors"):  # of diffusers too; as in `write_whole`
                file.chmod(partial.stat().st_mode & 0o666)
            if folder.exists():
                folder.replace(previous)
            partial.replace(folder)
    finally:
        if previous.exists() and not folder.exists():  # it was stopped in between
            previous.replace(folder)
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(previous, ignore_errors=True)


def sweep_partials(folder: str | os.PathLike[str]) -> None:
    """Remove what killed runs left half written directly in a folder. Links and files of running processes stay."""
    if not Path(folder).is_dir():
        return
    for path in Path(folder).iterdir():
        match = _PARTIAL.fullmatch(path.name)
        if match is None or path.is_symlink() or _is_running(int(match["process"])):
            continue
        whole = path.with_name(f"{match['stem']}{match['ending'] or ''}")
        if match["old"] and not whole.exists():
            path.replace(whole)  # the run was killed between the renames of `replace_folder`
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


class JsonLines:
    """A log of JSON objects, one a line, that a killed run goes on from.

    A last line that was cut off is dropped, and removed from the file when the next object is added.

    Args:
        path: None keeps nothing on the disk.

    Raises:
        ValueError: a whole line is no JSON object; the message names file and line.
    """

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        self.path = None if path is None else Path(path)
        self.rows: list[dict[str, Any]] = list(self._read())

    def _read(self) -> Iterator[dict[str, Any]]:
        if self.path is None or not self.path.is_file():
            return
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            write_whole(self.path, whole)
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                row = json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError) as problem:
                raise ValueError(f"{self.path}: line {number} is damaged ({one_line(problem)})") from None
            if not isinstance(row, dict):
                raise ValueError(f"{self.path}: line {number} must hold a JSON object")
            yield row

    def add(self, row: Mapping[str, Any]) -> None:
        """Append one object; it is on the disk when this returns."""
        self.rows.append(dict(row))
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())


def forget_origin(folder: Path) -> None:
    """Take out of the configurations in a model's folder where its parts were read from, which diffusers writes."""
    for path in sorted(folder.glob("*/config.json")):
        config = read_document(path)
        if config.pop("_name_or_path", None) is not None:
            write_whole(path, json.dumps(config, indent=2, sort_keys=True) + "\n")


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except OSError as error:  # of another user, or of none
        return not isinstance(error, ProcessLookupError)
    return True


@contextlib.contextmanager
def optional_import(message: str) -> Iterator[None]:
    """What is said where a library that is imported in here is not installed."""
    try:
        yield
    except ImportError:
        raise ImportError(message) from None


def shortened(value: object, most: int = 80) -> str:
    """A value as a message quotes it: its beginning, where it is long.

    >>> print(shortened("a" * 200, 20))
    'aaaaaaaaa'... (200 characters)
    """
    text = str(value)
    return repr(text) if len(text) <= most else f"{text[: most // 2 - 1]!r}... ({len(text)} characters)"


def words_of(problem: BaseException) -> str:
    """What an error says, in one line; PyTorch's frames of C++ are left out."""
    return " ".join(str(problem).partition("\nException raised from ")[0].split())


def one_line(problem: BaseException) -> str:
    """What an error says of a file's content, in one short line."""
    if isinstance(problem, RecursionError):
        return "nested too deeply"
    text = words_of(problem)[:200]
    return f"it lacks {text}" if isinstance(problem, KeyError) else text or type(problem).__name__
