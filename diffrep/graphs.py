"""CUDA graphs: a call of a network as one launch.

At batch 1 a GPU waits for Python: one Stable Diffusion U-Net is about 800 kernels, launched one by one. A `Graphs`
records the kernels of a function of tensors once per shape and replays them. The numbers are those of the plain call.
"""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from itertools import chain
from operator import methodcaller
from threading import RLock
from typing import Any, ClassVar, Literal
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

LIMIT = 16  # graphs that a model holds; each holds the memory of its inputs and results, all share that of their runs
_log = logging.getLogger(__name__)
_enabled: ContextVar[bool] = ContextVar("graphs", default=os.environ.get("DIFFREP_CUDA_GRAPHS", "1") != "0")
_turn = RLock()  # of threads: recordings are made and replayed one after the other, for they share memory


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
    folder of photographs that all differ in size is not recorded at all. Calls that need gradients, run under autocast
    or a hook, are counted, or have a forward that somebody else set, or lie on another device than CUDA, are plain
    calls. So are those that come when all recordings are in use: to record costs several runs.

    Args:
        modules: whose hooks, parts and weights are looked at; they are not moved or changed.
        limit: recordings that are held.
        record: makes a replayable call of a function and its inputs; for tests.
    """

    def __init__(
        self, *modules: nn.Module, limit: int = LIMIT, record: Callable[..., Callable[..., Any]] | None = None
    ) -> None:
        self._modules, self._limit = modules, limit
        self._record = record or _Recorded
        # signature -> when it came last, and its recording; None before there is one, False where there can be none
        self._calls: OrderedDict[Hashable, tuple[int, Callable[..., Any] | Literal[False] | None]] = OrderedDict()
        self._parts: _Parts | None = None
        self._time = 0

    def clear(self) -> None:
        """Forget everything, when what the calls read has moved or changed: constants of a prompt."""
        with _turn:
            self._calls.clear()

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
            As the function; from a recording contiguous and free to be changed.
        """
        if not self._usable(inputs) or (state := self._state()) is None:
            return function(*inputs)
        layout = tuple((tuple(i.shape), i.stride(), i.dtype, i.device) for i in inputs)
        call = self._recorded((key, state, _rounding(), layout), function, inputs)
        return call(*inputs) if call else function(*inputs)

    def _recorded(
        self, signature: tuple[Hashable, ...], function: Callable[..., Any], inputs: tuple[Tensor, ...]
    ) -> Callable[..., Any] | Literal[False] | None:
        with _turn:
            self._time += 1
            again = signature in self._calls
            _, call = self._calls.pop(signature, (0, None))
            if again and call is None and self._has_room():
                try:
                    call = self._record(function, inputs)
                except RuntimeError as error:  # the function does what cannot be recorded, or the memory is short
                    _log.warning("a call of %s cannot be recorded, it runs kernel by kernel: %s", signature[0], error)
                    call = False  # not the function, which may hold this call's tensors
            self._calls[signature] = self._time, call
            if len(self._calls) > 4 * self._limit:
                self._calls.popitem(last=False)
            return call

    def _has_room(self) -> bool:
        """Whether one more can be recorded, perhaps in place of the oldest, if that has not come for a while."""
        held = [(time, signature) for signature, (time, call) in self._calls.items() if call]
        if len(held) < self._limit:
            return True
        time, oldest = held[0]
        if self._time - time > 4 * self._limit:
            del self._calls[oldest]
            return True
        return False

    def _state(self) -> Hashable:
        if self._parts is None or self._parts.changed():
            self._parts = _Parts(self._modules)
        return self._parts.state()

    def _usable(self, inputs: tuple[Tensor, ...]) -> bool:
        if not _enabled.get() or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        if not self._on_device(inputs):
            return False
        # autocast forgets its rounded weights behind its body, and a counter of operations would see none
        return not torch.is_autocast_enabled(inputs[0].device.type) and _get_current_dispatch_mode() is None

    def _on_device(self, inputs: tuple[Tensor, ...]) -> bool:
        if not all(each.is_cuda for each in inputs) or torch.cuda.is_current_stream_capturing():
            return False
        # recordings share memory: what runs on another stream could run at the same time
        device = inputs[0].device
        return torch.cuda.current_stream(device) == torch.cuda.default_stream(device)


class _Parts:
    """The modules of networks. All are looked at before every call, so what they hold is collected beforehand."""

    def __init__(self, roots: Iterable[nn.Module]) -> None:
        modules: Any = dict.fromkeys(module for root in roots for module in root.modules())
        self._inside = [vars(module) for module in modules]
        self._which = tuple(map(id, modules))
        self._hooks = [inside[kind] for inside in self._inside for kind in ("_forward_hooks", "_forward_pre_hooks")]
        self._children = [inside["_modules"] for inside in self._inside]
        self._tensors = [inside[kind] for inside in self._inside for kind in ("_parameters", "_buffers")]
        self._attending = [inside for inside in self._inside if "processor" in inside]  # diffusers' attention
        self._known = list(_values(self._children))

    def changed(self) -> bool:
        """Whether a part was put in, taken out or put in place of another."""
        return list(_values(self._children)) != self._known

    def state(self) -> Hashable:
        """Which modules these are and where their weights lie; None: they run otherwise than their classes say."""
        every = nn.modules.module
        if any(self._hooks) or every._global_forward_hooks or every._global_forward_pre_hooks:
            return None
        forwards = [inside["forward"] for inside in self._inside if "forward" in inside]
        if any(not hasattr(forward, "_torchdynamo_orig_callable") for forward in forwards):  # `torch.compile`'s has
            return None
        places = [tensor.data_ptr() for tensor in _values(self._tensors) if tensor is not None]
        modes = [inside["training"] for inside in self._inside]
        processors = [id(inside["processor"]) for inside in self._attending]
        return hash((self._which, tuple(places), tuple(modes), tuple(processors)))


def _values(dictionaries: Iterable[dict[str, Any]]) -> Iterator[Any]:
    return chain.from_iterable(map(methodcaller("values"), dictionaries))


def _rounding() -> Hashable:
    """The settings of PyTorch that choose how kernels round."""
    products: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    named = hasattr(products, "fp32_precision")  # since PyTorch 2.9, where the older names can refuse to be read
    convolutions = cudnn.conv.fp32_precision if named else cudnn.allow_tf32
    of_products = products.fp32_precision if named else products.allow_tf32
    return convolutions, of_products, torch.are_deterministic_algorithms_enabled()


@lru_cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Where calls of a device are recorded. PyTorch's own stream lies on the device that recorded first, and would
    record nothing of another."""
    return torch.cuda.Stream(device)


class _Recorded:
    """One recorded call with its inputs and results."""

    _alive: ClassVar[WeakSet[_Recorded]] = WeakSet()  # they run one after the other and share the memory of their runs

    _graph: torch.cuda.CUDAGraph

    def __init__(self, function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> None:
        # inference tensors could not be written outside inference mode, where a later call may come from
        with torch.inference_mode(False), torch.no_grad():
            self._inputs = [torch.empty_like(i) for i in inputs]  # dense: what is expanded cannot be written
            self._fill(inputs)
            self._results = self._capture(function, inputs[0].device)
        self._alive.add(self)

    def _capture(self, function: Callable[..., Any], device: torch.device) -> Any:
        pools = (each._graph.pool() for each in self._alive if each._inputs[0].device == device)
        pool = next(pools, None) or torch.cuda.graph_pool_handle()
        side, current = _side_stream(device), torch.cuda.current_stream(device)
        # a recording that fails leaves its stream the current one: `stream(current)` takes that back
        with torch.cuda.device(device), torch.cuda.stream(current):
            side.wait_stream(current)
            with torch.cuda.stream(side):
                function(*self._inputs)
            current.wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, pool=pool, stream=side, capture_error_mode="thread_local"):
                return function(*self._inputs)

    def _fill(self, inputs: tuple[Tensor, ...]) -> None:
        for static, value in zip(self._inputs, inputs, strict=True):
            static.copy_(value)

    def _replay(self) -> None:
        self._graph.replay()

    @torch.no_grad()
    def __call__(self, *inputs: Tensor) -> Any:
        with _turn:
            self._fill(inputs)
            self._replay()
            return _copied(self._results)


def _copied(results: Any) -> Any:
    """The results in memory of their own: the next replay writes over the recorded ones."""
    if isinstance(results, Tensor):
        return results.clone(memory_format=torch.contiguous_format)
    if isinstance(results, dict):
        return {name: _copied(value) for name, value in results.items()}
    return tuple(_copied(value) for value in results)
