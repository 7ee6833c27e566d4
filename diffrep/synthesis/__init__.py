"""Large images from self-supervised embeddings."""

from diffrep.synthesis.grids import EmbeddingGrid, GridError, slerp
from diffrep.synthesis.large import synthesize, synthesize_file
from diffrep.synthesis.model import About, ConditionEmbedder, SynthesisModel, load_synthesis
from diffrep.synthesis.sampler import OFFICIAL, SynthesisSettings, denoise_canvas, sample_patches
from diffrep.synthesis.schedulers import build_scheduler

__all__ = [
    "OFFICIAL",
    "About",
    "ConditionEmbedder",
    "EmbeddingGrid",
    "GridError",
    "SynthesisModel",
    "SynthesisSettings",
    "build_scheduler",
    "denoise_canvas",
    "load_synthesis",
    "sample_patches",
    "slerp",
    "synthesize",
    "synthesize_file",
]
