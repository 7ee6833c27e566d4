"""Where networks run: one reading of ``--device`` and ``--precision`` everywhere; and the weights they begin with."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import Any, Literal, TypeAlias, get_args

import torch

from diffrep.files import shortened

Precision: TypeAlias = Literal["auto", "float32", "bfloat16", "float16"]


class DeviceError(ValueError):
    """A device or a precision that cannot be used here; the message says what was given and what is there."""


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
    name, known = str(device), _available()
    if name == "auto":
        return torch.device("cuda" if "cuda:0" in known else "mps" if "mps:0" in known else "cpu")
    try:
        wanted = torch.device(name)
    except (RuntimeError, ValueError):
        wanted = torch.device("meta")
    shown = ", ".join(each if each.startswith("cuda") else each.removesuffix(":0") for each in known)
    if wanted.type not in ("cpu", "cuda", "mps"):
        raise DeviceError(f"device must be auto, cpu, cuda, cuda:N or mps, got {shortened(name)}; there is {shown}")
    if f"{wanted.type}:{wanted.index or 0}" not in known:
        lacking = f"PyTorch finds no {wanted.type.upper()} device here; " if wanted.index in (None, 0) else ""
        raise DeviceError(f"device {name}: {lacking}there is {shown}")
    return wanted


def _available() -> list[str]:
    """The devices of this machine, each with its number."""
    cuda = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return ["cpu:0", *cuda, *(["mps:0"] if torch.backends.mps.is_available() else [])]


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


@contextmanager
def initial_weights(seed: int) -> Iterator[None]:
    """What is built in here, on the CPU, has the weights of a seed; libraries draw them from torch's own generator."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def library_versions(libraries: Iterable[str]) -> dict[str, str]:
    """The versions of diffrep, Python and those of the libraries that are installed."""
    import diffrep

    versions = {"diffrep": diffrep.__version__, "python": platform.python_version()}
    for library in libraries:
        try:
            versions[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return versions


def describe_system(libraries: Iterable[str]) -> dict[str, Any]:
    """What this machine has, for reports of faults: system, processors, devices with their memory, versions."""
    devices = {}
    for name in _available():
        if name.startswith("cuda"):
            facts = torch.cuda.get_device_properties(name)
            devices[name] = f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
        else:
            devices[name.removesuffix(":0")] = platform.processor() or platform.machine()
    return {
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "devices": devices,
        "versions": library_versions(libraries),
    }
