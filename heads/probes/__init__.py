"""Probes: heads that are trained on the features of a frozen backbone."""

from diffrep.heads.probes.attention import AttentionFusion, TokenReadout, TransformerBlock, readout_string
from diffrep.heads.probes.dense import DepthProbe, NormalsProbe
from diffrep.heads.probes.feedback import DifFeed, feedback_layer, numbered_taps
from diffrep.heads.probes.neighbours import NearestNeighbours, top_accuracy
from diffrep.heads.probes.pixels import PixelClassifier, PixelEnsemble, PixelSettings, fit_pixels, pixel_features
from diffrep.heads.probes.pooled import CnnHead, PooledHead
from diffrep.heads.probes.recipe import Recipe, train_recipe

__all__ = [
    "AttentionFusion",
    "CnnHead",
    "DepthProbe",
    "DifFeed",
    "NearestNeighbours",
    "NormalsProbe",
    "PixelClassifier",
    "PixelEnsemble",
    "PixelSettings",
    "PooledHead",
    "Recipe",
    "TokenReadout",
    "TransformerBlock",
    "feedback_layer",
    "fit_pixels",
    "numbered_taps",
    "pixel_features",
    "readout_string",
    "top_accuracy",
    "train_recipe",
]
