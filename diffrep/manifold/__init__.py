"""Heat-geodesic embeddings: maps of feature sets in which distance is distance along the data."""

from diffrep.manifold.distances import heat_geodesic_distances
from diffrep.manifold.embedding import HeatGeodesicEmbedding
from diffrep.manifold.files import EmbedConfig, EmbeddedFile, embed_anndata, embed_file
from diffrep.manifold.graphs import alpha_decay_graph, laplacian
from diffrep.manifold.mds import stress
from diffrep.manifold.settings import PRESETS

__all__ = [
    "PRESETS",
    "EmbedConfig",
    "EmbeddedFile",
    "HeatGeodesicEmbedding",
    "alpha_decay_graph",
    "embed_anndata",
    "embed_file",
    "heat_geodesic_distances",
    "laplacian",
    "stress",
]
