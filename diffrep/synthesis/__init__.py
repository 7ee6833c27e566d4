"""Large images from self-supervised embeddings."""

from diffrep.synthesis.embedder import ConditionEmbedder
from diffrep.synthesis.model import About, SynthesisModel, load_synthesis

__all__ = ["About", "ConditionEmbedder", "SynthesisModel", "load_synthesis"]
