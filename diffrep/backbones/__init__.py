"""Networks that give features: latent diffusion in diffusers' folder layout, vision transformers."""

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
from diffrep.backbones.latent_diffusion import LatentDiffusion, draw_noise
from diffrep.backbones.loading import load_backbone
from diffrep.backbones.text import PromptEmbedding
from diffrep.backbones.vit import PositionRule, VisionTransformer

__all__ = [
    "Backbone",
    "BackboneError",
    "Conditions",
    "Grid",
    "LatentDiffusion",
    "PositionRule",
    "PromptEmbedding",
    "Recommended",
    "TapError",
    "TapInfo",
    "VisionTransformer",
    "check_weights",
    "draw_noise",
    "load_backbone",
]
