"""Dictionaries of numbers and numpy arrays out of pickle files, without running anything that is in them.

The format is a program for a stack machine. This reader knows the few instructions that plain values need and the
few names by which numpy writes an array; anything else is refused.
"""

from __future__ import annotations

import pickletools
from typing import Any

import numpy as np

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
