"""Training: one loop for every network, and the recipe of the embedded models.

The names are imported when they are first used: the loop does not bring the renderer of scenes with it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffrep.training.loop import Batch, FitSettings, fit
    from diffrep.training.tiny.pipeline import TinyTraining, train_tiny

__all__ = ["Batch", "FitSettings", "TinyTraining", "fit", "train_tiny"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "tiny.pipeline" if name in ("TinyTraining", "train_tiny") else "loop"
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)
