"""Heat-geodesic embeddings: maps of feature sets in which distance is distance along the data."""

from diffrep.manifold.embedding import PRESETS, HeatGeodesicEmbedding
from diffrep.manifold.files import EmbedConfig, EmbeddedFile, embed_anndata, embed_file
from diffrep.manifold.graphs import alpha_decay_graph, laplacian
from diffrep.manifold.heat import heat_geodesic_distances
from diffrep.manifold.mds import stress

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
