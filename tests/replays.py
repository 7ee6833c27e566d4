"""Recorded calls on a CPU: what a CUDA graph does, operation by operation.

A graph replays kernels on the addresses that they were recorded with and nothing else: no Python runs, nothing is read
on the host or brought to the device. So here the operations of one call are written down with their tensors and run
again on the same memory. Between two replays that memory is another recording's: it is overwritten.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffrep.graphs import _Recorded

# they read a value on the host, need a number that depends on values, bring one to the device, or draw on the CPU
REFUSED = (
    "_local_scalar_dense", "equal", "is_nonzero", "item", "lift_fresh", "masked_select", "nonzero", "normal_", "rand",
    "randn", "randperm", "uniform_", "unique_dim", "_unique2",
)  # fmt: skip


class Operations(TorchDispatchMode):
    """Writes down what runs in its body."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[Callable[..., Any], Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        if name in REFUSED or any(i is not None and i.dtype == torch.bool for i in indices):
            raise RuntimeError(f"{name}: operation not permitted when stream is capturing")
        output = func(*args, **(kwargs or {}))
        places = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        results = [t for t in tree_leaves(output) if isinstance(t, Tensor)]
        fresh = [t for t in results if t.untyped_storage().data_ptr() not in places]
        if fresh or func._schema.is_mutable:  # a view needs no kernel
            self.steps.append((func, args, dict(kwargs or {}), fresh))
        return output


class Replayed(_Recorded):
    """A recorded call without CUDA."""

    recordings = 0

    def _capture(self, function: Callable[..., Any], device: torch.device) -> Any:
        function(*self._inputs)
        with Operations() as self.operations:
            results = function(*self._inputs)
        self._overwrite()
        Replayed.recordings += 1
        return results

    def _overwrite(self) -> None:
        for *_, fresh in self.operations.steps:
            for tensor in fresh:
                tensor.fill_(torch.nan if tensor.is_floating_point() else 1)

    def _replay(self) -> None:
        with torch.inference_mode(False):
            for func, args, kwargs, fresh in self.operations.steps:
                again = [t for t in tree_leaves(func(*args, **kwargs)) if isinstance(t, Tensor)]
                for tensor, value in zip(fresh, again, strict=bool(fresh)):
                    tensor.copy_(value)

    def __call__(self, *inputs: Tensor) -> Any:
        results = super().__call__(*inputs)
        with torch.inference_mode(False), torch.no_grad():
            self._overwrite()
        return results
