"""Help at once: while a command explains itself, stand-ins take the place of the libraries that it computes with.

The options of a command are dataclasses that lie beside what they set, in modules that import torch. To list them
nothing is computed, so ``--help`` imports these modules with classes that can be called, subclassed and subscripted in
the place of everything in those libraries, and drops the modules again. What a page says is the same as with the
libraries (`tests/test_cli.py` compares all of them).
"""

from __future__ import annotations

import sys
from abc import ABCMeta
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import FunctionType, ModuleType
from typing import Any

LIBRARIES = frozenset(
    ("PIL", "av", "diffusers", "faiss", "huggingface_hub", "numpy", "open_clip", "pandas", "peft", "safetensors")
    + ("scipy", "sklearn", "timm", "torch", "torchvision", "tqdm", "transformers", "yaml")
)
COMPUTED = frozenset(  # ours that compute while they are imported: the shapes of what can be rendered
    f"diffrep.scenes.{name}" for name in ("build", "creatures", "furniture", "look", "shapes", "vehicles")
)


class _StandIn(ABCMeta):
    """The class of stand-ins: each is a class, and whatever is done with it gives another or itself."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        member = _StandIn(name, (), {})
        setattr(cls, name, member)
        return member

    def __call__(cls, *arguments: Any, **named: Any) -> Any:
        if cls.__bases__ != (object,):  # a class of ours that a library's is the base of
            return super().__call__(*arguments, **named)
        # a decorator gives back what it decorates
        return arguments[0] if len(arguments) == 1 and isinstance(arguments[0], (FunctionType, type)) else cls

    def _same(cls, *_: Any) -> Any:
        return cls

    __getitem__ = __neg__ = __or__ = __ror__ = __matmul__ = _same
    __add__ = __sub__ = __mul__ = __truediv__ = __floordiv__ = __mod__ = __pow__ = _same
    __radd__ = __rsub__ = __rmul__ = __rtruediv__ = __rfloordiv__ = __rmod__ = __rpow__ = _same

    def __float__(cls) -> float:
        return 0.0

    def __iter__(cls) -> Iterator[Any]:
        return iter(())


class _Finder:
    """Finds a stand-in for every module of `LIBRARIES`."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name.partition(".")[0] in LIBRARIES or name in COMPUTED:
            return ModuleSpec(name, _Finder, is_package=True)  # type: ignore[arg-type]
        return None

    @staticmethod
    def create_module(spec: ModuleSpec) -> ModuleType:
        module = ModuleType(spec.name)
        module.__getattr__ = _StandIn(spec.name, (), {}).__getattr__  # type: ignore[method-assign]
        return module

    @staticmethod
    def exec_module(module: ModuleType) -> None:
        """There is nothing in it."""


@contextmanager
def without_libraries() -> Iterator[None]:
    """Import diffrep's modules without `LIBRARIES`; what was imported so is forgotten at the end.

    Does nothing where torch is loaded already.
    """
    if "torch" in sys.modules:
        yield
        return
    before = set(sys.modules)
    sys.meta_path.insert(0, _Finder)  # type: ignore[arg-type]
    try:
        yield
    finally:
        sys.meta_path.remove(_Finder)  # type: ignore[arg-type]
        for name in set(sys.modules) - before:
            if name.partition(".")[0] in {*LIBRARIES, "diffrep"}:
                del sys.modules[name]
