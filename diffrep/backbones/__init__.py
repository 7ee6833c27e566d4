"""Networks that give features: latent diffusion, pixel diffusion, diffusion transformers, vision transformers."""

from diffrep.backbones.adm import AdmArchitecture, load_adm
from diffrep.backbones.aggregation import AggregationNetwork
from diffrep.backbones.base import (
    Backbone,
    BackboneError,
    Conditions,
    Grid,
    Recommended,
    TapError,
    TapInfo,
    check_weights,
)
from diffrep.backbones.freeu import FreeU
from diffrep.backbones.gdf import gdf_tap
from diffrep.backbones.hyperfeatures import Hyperfeatures, Trajectory
from diffrep.backbones.latent_diffusion import LatentDiffusion
from diffrep.backbones.loading import load_backbone, load_cleandift
from diffrep.backbones.noise import draw_noise
from diffrep.backbones.pixel_diffusion import PixelDiffusion
from diffrep.backbones.text import PromptEmbedding
from diffrep.backbones.transformers import DiffusionTransformer
from diffrep.backbones.vit import PositionRule, VisionTransformer

__all__ = [
    "AdmArchitecture",
    "AggregationNetwork",
    "Backbone",
    "BackboneError",
    "Conditions",
    "DiffusionTransformer",
    "FreeU",
    "Grid",
    "Hyperfeatures",
    "LatentDiffusion",
    "PixelDiffusion",
    "PositionRule",
    "PromptEmbedding",
    "Recommended",
    "TapError",
    "TapInfo",
    "Trajectory",
    "VisionTransformer",
    "check_weights",
    "draw_noise",
    "gdf_tap",
    "load_adm",
    "load_backbone",
    "load_cleandift",
]
