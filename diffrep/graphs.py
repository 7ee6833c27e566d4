"""CUDA graphs: a call of a network as one launch.

At batch 1 a GPU waits for Python: one Stable Diffusion U-Net is about 800 kernels, launched one by one. A `Graphs`
records the kernels of a function of tensors once per shape and replays them. The numbers are those of the plain call.
"""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from threading import RLock
from typing import Any, ClassVar
from weakref import WeakSet

import torch
from torch import Tensor, nn

LIMIT = 16  # graphs that a model holds; each holds the memory of its inputs and results, all share that of their runs
_log = logging.getLogger(__name__)
_enabled: ContextVar[bool] = ContextVar("graphs", default=os.environ.get("DIFFREP_CUDA_GRAPHS", "1") != "0")


@contextmanager
def without_graphs() -> Iterator[None]:
    """Call networks kernel by kernel in the body; the environment variable DIFFREP_CUDA_GRAPHS=0 does so everywhere."""
    token = _enabled.set(False)
    try:
        yield
    finally:
        _enabled.reset(token)


class Graphs:
    """The recorded calls of a model's networks.

    A call is recorded when its key and shapes come for the second time: the first run warms the libraries up, and a
    folder of photographs that all differ in size is not recorded at all. Calls that need gradients, run under a hook or
    with a forward that somebody else set, or on another device than CUDA, are plain calls.

    Args:
        modules: whose forward hooks are looked at; they are not moved or changed.
        record: makes a replayable call of a function and its inputs; for tests.
    """

    def __init__(self, *modules: nn.Module, record: Callable[..., Callable[..., Any]] | None = None) -> None:
        self._modules = modules
        self._record = record or _Recorded
        self._calls: OrderedDict[Hashable, Callable[..., Any] | None] = OrderedDict()
        self._watched: list[nn.Module] = []

    def clear(self) -> None:
        """Forget everything, when what the calls read has moved or changed: weights, constants of a prompt."""
        self._calls.clear()
        self._watched.clear()

    def __reduce__(self) -> Any:
        """A copy of a model, in this process or another, records its own calls: it begins with none."""
        return Graphs, self._modules

    def __call__(self, key: Hashable, function: Callable[..., Any], *inputs: Tensor) -> Any:
        """`function(*inputs)`, recorded.

        Args:
            key: everything that the result depends on beside the values of the inputs and the weights.
            function: of tensors on one device; returns a tensor, or a tuple or dict of tensors. It must not read values
                of tensors on the host or move tensors between devices.
            inputs: on that device.

        Returns:
            As the function, contiguous and free to be changed.
        """
        if not self._usable(inputs):
            return function(*inputs)
        weights = tuple(next(module.parameters()).data_ptr() for module in self._modules)
        signature = (key, weights, tuple((tuple(i.shape), i.stride(), i.dtype, i.device) for i in inputs))
        if signature not in self._calls:
            self._calls[signature] = None
            while len(self._calls) > 4 * LIMIT:
                self._calls.popitem(last=False)
            return function(*inputs)
        call = self._calls[signature]
        if call is None:
            try:
                call = self._record(function, inputs)
            except RuntimeError as error:  # the function does what cannot be recorded, or the memory is short
                _log.warning("a call of %s cannot be recorded, it runs kernel by kernel: %s", key, error)
                call = function
            self._calls[signature] = call
            recorded = [each for each, value in self._calls.items() if value is not None]
            if len(recorded) > LIMIT:
                del self._calls[recorded[0]]
        self._calls.move_to_end(signature)
        return call(*inputs)

    def _usable(self, inputs: tuple[Tensor, ...]) -> bool:
        if not _enabled.get() or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        if not self._on_device(inputs):
            return False
        if not self._watched:
            self._watched = [module for root in self._modules for module in root.modules()]
        return not any(
            module._forward_hooks or module._forward_pre_hooks or _runs_otherwise(module) for module in self._watched
        )

    def _on_device(self, inputs: tuple[Tensor, ...]) -> bool:
        if not all(each.is_cuda for each in inputs) or torch.cuda.is_current_stream_capturing():
            return False
        # recordings share memory: what runs on another stream could run at the same time
        return torch.cuda.current_stream() == torch.cuda.default_stream()


def _runs_otherwise(module: nn.Module) -> bool:
    """Whether somebody put another forward in place of that of the class, other than `torch.compile`."""
    forward = module.__dict__.get("forward")
    return forward is not None and not hasattr(forward, "_torchdynamo_orig_callable")


class _Recorded:
    """One recorded call with its inputs and results."""

    _alive: ClassVar[WeakSet[_Recorded]] = WeakSet()  # they run one after the other and share the memory of their runs

    _turn: ClassVar[Any] = RLock()
    _inputs: list[Tensor]
    _graph: torch.cuda.CUDAGraph

    def __init__(self, function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> None:
        with self._turn:
            self._capture(function, inputs)

    def _capture(self, function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> None:
        device = inputs[0].device
        pools = (each._graph.pool() for each in self._alive if each._inputs[0].device == device)
        pool = next(pools, None) or torch.cuda.graph_pool_handle()
        # inference tensors could not be written outside inference mode, where a later call may come from
        with torch.cuda.device(device), torch.inference_mode(False), torch.no_grad():
            self._inputs = [torch.empty_strided(i.shape, i.stride(), dtype=i.dtype, device=i.device) for i in inputs]
            self._fill(inputs)
            side = torch.cuda.Stream(device)
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):
                function(*self._inputs)
            torch.cuda.current_stream(device).wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
                self._results = function(*self._inputs)
        self._alive.add(self)

    def _fill(self, inputs: tuple[Tensor, ...]) -> None:
        for static, value in zip(self._inputs, inputs, strict=True):
            static.copy_(value)

    @torch.no_grad()
    def __call__(self, *inputs: Tensor) -> Any:
        with self._turn:  # of threads
            self._fill(inputs)
            self._graph.replay()
            return _copied(self._results)


def _copied(results: Any) -> Any:
    """The results in memory of their own: the next replay writes over the recorded ones."""
    if isinstance(results, Tensor):
        return results.clone(memory_format=torch.contiguous_format)
    if isinstance(results, dict):
        return {name: _copied(value) for name, value in results.items()}
    return tuple(_copied(value) for value in results)
