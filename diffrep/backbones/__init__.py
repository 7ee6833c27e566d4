"""Networks that give features: latent diffusion, pixel diffusion, diffusion transformers, vision transformers."""

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
from diffrep.backbones.diffusion import draw_noise
from diffrep.backbones.hyperfeatures import AggregationNetwork, Hyperfeatures, Trajectory
from diffrep.backbones.latent_diffusion import LatentDiffusion
from diffrep.backbones.loading import load_backbone, load_cleandift
from diffrep.backbones.pixel_diffusion import AdmArchitecture, PixelDiffusion, load_adm
from diffrep.backbones.text import PromptEmbedding
from diffrep.backbones.transformers import DiffusionTransformer
from diffrep.backbones.unet import gdf_tap
from diffrep.backbones.vit import PositionRule, VisionTransformer
from diffrep.settings import FreeU

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
