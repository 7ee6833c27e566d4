"""Where networks run: one reading of ``--device`` and ``--precision`` for every command and every loader."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, get_args

import torch

Precision: TypeAlias = Literal["auto", "float32", "bfloat16", "float16"]

_ANSWERS = "auto, cpu, cuda, cuda:N or mps"


class DeviceError(ValueError):
    """A device or a precision that cannot be used here; the message names the option, what was given, what is there."""


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """The device that a name stands for.

    Args:
        device: ``auto`` (CUDA where there is one, else Apple's MPS, else the CPU), ``cpu``, ``cuda``, ``cuda:N`` or
            ``mps``.

    Raises:
        DeviceError: it is no such name, or this machine has no such device.

    >>> resolve_device("cpu")
    device(type='cpu')
    """
    name = str(device)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if _has_mps() else "cpu")
    try:
        wanted = torch.device(name)
    except (RuntimeError, ValueError):
        raise DeviceError(f"--device must be {_ANSWERS}, got {name!r}") from None
    if wanted.type not in ("cpu", "cuda", "mps"):
        raise DeviceError(f"--device must be {_ANSWERS}, got {name!r}")
    if wanted.type == "cuda" and not torch.cuda.is_available():
        raise DeviceError(f"--device {name}: PyTorch finds no CUDA device here; there is {_available()}")
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        raise DeviceError(f"--device {name}: there is {_available()}")
    if wanted.type == "mps" and not _has_mps():
        raise DeviceError(f"--device {name}: PyTorch finds no MPS device here; there is {_available()}")
    if wanted.type != "cuda" and wanted.index:
        raise DeviceError(f"--device {name}: there is {_available()}")
    return wanted


def resolve_dtype(
    precision: Precision | str | torch.dtype | None, device: torch.device, *, option: str = "--precision"
) -> torch.dtype:
    """The floating point type that a precision stands for on a device.

    Args:
        precision: ``auto`` or None: bfloat16 on CUDA, float32 elsewhere.
        option: what the error calls it.

    Raises:
        DeviceError: it is none of ``auto``, ``float32``, ``bfloat16`` and ``float16``.
    """
    if isinstance(precision, torch.dtype):
        return precision
    if precision in (None, "auto"):
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if precision not in get_args(Precision):
        raise DeviceError(f"{option} must be {', '.join(get_args(Precision))}, got {precision!r}")
    dtype: Any = getattr(torch, str(precision))
    assert isinstance(dtype, torch.dtype)
    return dtype


def _has_mps() -> bool:
    return bool(torch.backends.mps.is_available())


def _available() -> str:
    names = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count())), *(["mps"] if _has_mps() else [])]
    return ", ".join(names)
