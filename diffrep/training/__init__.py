"""Training: one loop for every network, and the recipe of the embedded models."""

from diffrep.training.loop import Batch, FitSettings, fit
from diffrep.training.tiny.pipeline import TinyTraining, train_tiny

__all__ = ["Batch", "FitSettings", "TinyTraining", "fit", "train_tiny"]
