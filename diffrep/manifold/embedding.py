"""The estimator: heat-geodesic embeddings with scikit-learn's contract, and presets that give other methods."""

from __future__ import annotations

import logging
import numbers
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from types import MappingProxyType, NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.sparse.csgraph import connected_components, shortest_path
from sklearn.base import ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import check_array, check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from tqdm import tqdm

from diffrep.manifold import mds as scaling
from diffrep.manifold.fitted import FittedMap
from diffrep.manifold.geodesics import (
    FEW_POINTS,
    GeodesicSettings,
    HeatGraph,
    choose_landmarks,
    landmark_distances,
    whole_distances,
)
from diffrep.manifold.graphs import (
    Csr,
    alpha_decay_graph,
    clean_affinity,
    connect_components,
    graph_lengths,
    out_of_sample_transitions,
)
from diffrep.manifold.heat import finite_distances, knee
from diffrep.manifold.neighbors import Backend, FeatureSpace, NeighborSearch

logger = logging.getLogger(__name__)
Array = NDArray[Any]

LANDMARKS = 256  # with n_landmarks="auto", above that: more of them cost time and hardly change a map in two dimensions

PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {  # the rest of the settings as by default
        "heat-geodesic": {},
        "reference": {  # the defaults of the official code, without its rescaling of the result
            "n_neighbors": 5,
            "t": 10.0,
            "heat_method": "chebyshev",
            "order": 32,
            "floor": 1e-16,
            "volume": None,
            "far_field": "floor",
            "on_disconnected": "keep",
            "n_landmarks": None,
            "init": "squared",
        },
        # PHATE's log-potential distance 4t || log H_i - log H_j ||, with a heat kernel for its random walk
        "phate": {
            "n_neighbors": 5,
            "t": "auto",
            "floor": 1e-16,
            "volume": None,
            "far_field": "floor",
            "triplet_weight": 1.0,
            "scale_power": 2.0,
        },
        "sne": {"scale_power": 2.0, "volume": None, "mds_weights": "heat"},
        "diffusion-map": {"dissimilarity": "diffusion", "mds": "classical"},
        "shortest-path": {"dissimilarity": "shortest-path"},
    }
)


@dataclass(eq=False, repr=False, kw_only=True)
class HeatGeodesicEmbedding(ClassNamePrefixFeaturesOutMixin, TransformerMixin, FittedMap, GeodesicSettings):
    """Embedding that keeps geodesic distances, measured by how heat spreads over a neighbourhood graph.

    Heat started at x has reached y after time t in the amount h_t(x, y), and -4t log h_t tends to the squared
    geodesic distance (Varadhan). Distances are taken from there and embedded by metric multidimensional
    scaling (Huguet et al., "A Heat Diffusion Perspective on Geodesic Preserving Dimensionality Reduction",
    NeurIPS 2023).

    Rows that are copies of each other count once and get the same coordinates.

    Up to 1,000 points all pairs are computed. Above, heat is computed from some hundred landmarks only, these
    are embedded, and every point is placed by its distances to them: time and memory grow linearly. `path_`
    says which way was taken, and `n_landmarks` chooses it.

    Parameters
    ----------
    n_components : dimensions of the embedding.
    n_neighbors : neighbours that set the bandwidth of each point; cut, with a warning, to what there is.
    decay : exponent of the kernel exp(-(distance / bandwidth)^decay).
    thresh : affinities below are dropped.
    anisotropy : 0 to 1, how much of the sampling density is divided out of the affinities.
    n_pca : principal components to which the data are reduced first; None: no reduction.
    metric : "euclidean"; "cosine" (Euclidean between rows of unit length); "precomputed" distances (n, n),
        dense or sparse; "affinity", a precomputed symmetric graph (n, n), dense or sparse.
    knn_backend : "auto", "faiss" or "sklearn", see `NeighborSearch`.
    laplacian : "normalized" or "combinatorial"; heat of the latter spreads faster by about the mean degree.
    t : diffusion time; "auto" takes the knee of the entropy of the heat between 1 and 300, often about 40;
        several times are averaged, short ones counting more.
    heat_method : "auto" squares a short-time kernel for all pairs and uses "chebyshev" for landmarks; also
        "squaring", "euler", "crank-nicolson", "exact" (eigenvectors).
    order : degree of the Chebyshev polynomial or number of implicit steps; "auto": as needed.
    floor : heat below counts as this much.
    dissimilarity : "heat"; "diffusion" (distance of rows of the heat kernel); "shortest-path" (as Isomap).
    volume : what normalises heat for the volume around both points, "geometric", "arithmetic" or None.
    volume_weight : its weight.
    triplet_weight : 0 to 1, share of the distance between rows of the distance matrix (denoising).
    scale_power : the distances are raised to this power; 2 gives squared ones.
    mds : "sgd" (stochastic gradient, then majorisation), "smacof" (majorisation) or "classical".
    mds_weights : weights of pairs in the stress: None, "heat", "inverse" or "gaussian"; of pairs of landmarks,
        where there are.
    mds_weights_argument : exponent of "inverse", width of "gaussian".
    n_landmarks : "auto" (all pairs up to 1,000 points, then 256 landmarks), a number, or None:
        all pairs, whatever the size.
    far_field : "stitch" gives pairs that heat did not reach the shortest path through others; "floor"
        leaves them at the largest distance that `floor` allows.
    on_disconnected : "warn" connects the components of the graph by shortest edges and says so, "connect"
        does it silently, "raise" refuses, "keep" leaves them apart, at a common large distance.
    init : start of the scaling: "classical", "squared" (the official code's), or an array (n, n_components);
        landmarks take their rows of it.
    random_state : seed of landmarks and of stochastic scaling.
    n_jobs : threads of the neighbour search.
    device : of the Chebyshev series: "cpu", "cuda", "cuda:N", or "auto", which takes CUDA above 1,000 points.
    dtype : of heat columns; "auto" is float64 for all pairs and float32 for landmarks.
    verbose : progress bars on standard error.

    Attributes
    ----------
    embedding_ : (n, n_components), centred, along its principal axes, in the units of the distances.
    path_ : "exact" or "landmarks".
    landmark_indices_ : (m,) rows that are landmarks, or None.
    distances_ : (n', n') between all different points, or (n', m) to the landmarks.
    stress_ : root of the relative squared error of the distances in the embedding.
    t_ : the diffusion times used. t_grid_, entropy_ : what t="auto" chose from, or None.
    affinity_ : the graph, CSR. n_connected_components_ : before any connecting. lmax_ : largest eigenvalue.

    Examples
    --------
    >>> from diffrep.manifold import HeatGeodesicEmbedding
    >>> from sklearn.datasets import make_swiss_roll
    >>> points, _ = make_swiss_roll(300, random_state=0)
    >>> HeatGeodesicEmbedding(random_state=0).fit_transform(points).shape
    (300, 2)
    """

    n_components: int = field(default=2, kw_only=False)
    n_neighbors: int = 10
    decay: float = 40.0
    thresh: float = 1e-4
    anisotropy: float = 0.0
    n_pca: int | None = None
    metric: Literal["euclidean", "cosine", "precomputed", "affinity"] = "euclidean"
    knn_backend: Backend = "auto"
    t: float | Sequence[float] | Literal["auto"] = "auto"
    mds: Literal["sgd", "smacof", "classical"] = "sgd"
    mds_weights: Literal["heat", "inverse", "gaussian"] | None = None
    mds_weights_argument: float = 1.0
    n_landmarks: int | Literal["auto"] | None = "auto"
    on_disconnected: Literal["warn", "connect", "raise", "keep"] = "warn"
    init: Literal["classical", "squared"] | Array = "classical"
    random_state: int | np.random.RandomState | None = None
    n_jobs: int | None = None
    dtype: Literal["auto", "float32", "float64"] = "auto"
    verbose: bool = False

    @classmethod
    def preset(cls, name: str, **settings: Any) -> HeatGeodesicEmbedding:
        """An estimator with the settings of `PRESETS[name]`, changed by `settings`."""
        if name not in PRESETS:
            raise ValueError(f"there is no preset {name!r}, only {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **settings})

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        tags.input_tags.pairwise = self.metric in ("precomputed", "affinity")
        return tags

    @property
    def _n_features_out(self) -> int:
        return self.embedding_.shape[1]

    def fit(self, X: Any, y: Any = None) -> HeatGeodesicEmbedding:
        """Embed the rows of X, array or sparse matrix of shape (n_samples, n_features)."""
        _check(self)
        if hasattr(X, "obsm") and hasattr(X, "obs"):
            raise TypeError(
                "X is an AnnData object: pass its features, X.X or X.obsm['X_pca'], or call"
                " diffrep.manifold.embed_anndata(X, 'X_pca'), which puts the map into its obsm"
            )
        X = self._validated(X, ensure_min_samples=2)
        rng = np.random.default_rng(check_random_state(self.random_state).randint(2**31 - 1))
        self._space: FeatureSpace | None = None
        self._original = self._copy_of = np.arange(X.shape[0])
        matrix = self.metric in ("precomputed", "affinity")
        self._join_components(self._from_matrix(X) if matrix else self._from_features(X))
        n = self.affinity_.shape[0]
        count = self._landmark_count(n)
        landmarks = None if count is None else choose_landmarks(self.affinity_, count, rng)
        logger.info("%d points, %s", n, "all pairs" if count is None else f"{count} landmarks")
        heat = self._measure(landmarks, rng)
        self.path_ = "exact" if landmarks is None else "landmarks"
        self.landmark_indices_ = None if landmarks is None else self._original[landmarks]
        self.embedding_ = self._embed(landmarks, heat, rng)[self._copy_of]
        return self

    def fit_transform(self, X: Any, y: Any = None) -> Array:
        """Embed the rows of X; the same as `fit(X).embedding_`."""
        return self.fit(X, y).embedding_

    def transform(self, X: Any) -> Array:
        """Place new rows, each on its own and without jumps.

        A row lies at the mean of its neighbours in the map, weighted by affinity. The closer it comes to a row of
        the training data, the closer it is moved to that row's coordinates, and an equal row gets them exactly.

        Raises
        ------
        ValueError : the estimator was fitted on a precomputed matrix.
        """
        check_is_fitted(self)
        points, space = self._points_of(X)
        shares, rest = space.shares(points, self.n_neighbors)
        placed = shares @ self.embedding_[self._original]
        new = np.flatnonzero(rest)
        if len(new):
            placed[new] += rest[new, None] * (self._transitions(points[new]) @ self.embedding_[self._original])
        return placed

    def heat_distances(self, X: Any = None, *, indices: Array | None = None) -> Array:
        """Distances in the units of the embedding.

        Parameters
        ----------
        X : new rows; None: the training data.
        indices : only these rows of the training data.

        Returns
        -------
        (rows, n') to all different training points, or (rows, m) to the landmarks.
        """
        check_is_fitted(self)
        if X is None:
            rows = self._copy_of if indices is None else self._copy_of[np.asarray(indices)]
            return self.distances_[rows]
        points, space = self._points_of(X)
        shares, rest = space.shares(points, self.n_neighbors)
        return shares @ self.distances_ + rest[:, None] * self._distances_of(points)

    def _from_features(self, X: Any) -> NeighborSearch:
        """The graph of feature rows, each different row once; the search for neighbours of its points."""
        metric: Literal["euclidean", "cosine"] = "cosine" if self.metric == "cosine" else "euclidean"
        space = FeatureSpace(X, metric=metric, n_pca=self.n_pca, backend=self.knn_backend, n_jobs=self.n_jobs)
        self._space, self._original, self._copy_of = space, space.original, space.copy_of
        n = len(space.original)
        self.affinity_ = self._graph(space.search, n) if n > 1 else sp.csr_matrix((n, n))
        return space.search

    def _from_matrix(self, X: Any) -> Array | None:
        """The graph of a precomputed matrix; the distances where it holds distances."""
        if X.shape[0] != X.shape[1]:
            raise ValueError(f"metric={self.metric!r} needs a square matrix, got shape {X.shape}")
        if self.metric == "affinity":
            self.affinity_ = clean_affinity(X)
            return None
        values = X.data if sp.issparse(X) else X
        if values.size and values.min() < 0:
            raise ValueError(f"distances must not be negative, got {values.min():.4g}")
        self.affinity_ = self._graph(X, X.shape[0])
        return None if sp.issparse(X) else np.asarray(X, dtype=np.float64)

    def _graph(self, places: NeighborSearch | Array | Csr, n: int) -> Csr:
        if self.n_neighbors >= n:
            text = f"n_neighbors={self.n_neighbors} needs more than {n} different points: using {n - 1}"
            warnings.warn(text, UserWarning, stacklevel=4)
        k = min(self.n_neighbors, n - 1)
        return alpha_decay_graph(places, k, decay=self.decay, thresh=self.thresh, anisotropy=self.anisotropy)

    def _join_components(self, places: NeighborSearch | Array | None) -> None:
        count, labels = connected_components(self.affinity_, directed=False)
        self.n_connected_components_ = int(count)
        if count == 1 or self.on_disconnected == "keep":
            return
        sizes = ", ".join(map(str, sorted(np.bincount(labels), reverse=True)[:5]))
        problem = f"the neighbourhood graph has {count} components (the largest of {sizes} points)"
        if self.on_disconnected == "raise" or (places is None and self.on_disconnected == "connect"):
            raise ValueError(f"{problem}: raise n_neighbors, or set on_disconnected to 'connect' or 'keep'")
        if self.on_disconnected == "warn":
            what = "leaving them apart" if places is None else "connecting them by their shortest edges"
            warnings.warn(f"{problem}: {what}", UserWarning, stacklevel=4)
        if places is not None:
            self.affinity_ = connect_components(self.affinity_, places, thresh=self.thresh)

    def _landmark_count(self, n: int) -> int | None:
        if self.n_landmarks == "auto":
            return None if n <= FEW_POINTS else LANDMARKS
        if self.n_landmarks is None or self.n_landmarks >= n:
            return None
        if self.n_landmarks <= self.n_components:
            raise ValueError(f"n_landmarks must be more than n_components={self.n_components}, got {self.n_landmarks}")
        return int(self.n_landmarks)

    def _measure(self, landmarks: NDArray[np.int64] | None, rng: np.random.Generator) -> Array | None:
        """Set `distances_`, `t_` and what belongs to them; return the heat among the anchors."""
        dtype = self.dtype if self.dtype != "auto" else ("float64" if landmarks is None else "float32")
        self.t_: NDArray[np.float64] | None = None
        self.t_grid_: NDArray[np.float64] | None = None
        self.entropy_: NDArray[np.float64] | None = None
        self.lmax_: float | None = None
        if self.dissimilarity == "shortest-path":
            search = None if self._space is None else self._space.search
            lengths = graph_lengths(self.affinity_, search, self.n_neighbors)
            paths = shortest_path(lengths, method="D", directed=False, indices=landmarks)
            largest = paths[np.isfinite(paths)].max(initial=0.0)
            if largest and not 1e-30 < largest < 1e30:
                dtype = "float64"  # float32 holds no such lengths
            self.distances_ = finite_distances(paths.T.astype(dtype))
            return None
        graph = HeatGraph(self.affinity_, self, dtype)
        self.lmax_, self.t_ = graph.lmax, self._times(graph, rng)
        times = self.t_.tolist()
        if landmarks is None:
            self.distances_, heat = whole_distances(graph, times, rng=rng, progress=self._progress)
        else:
            self.distances_, heat = landmark_distances(graph, landmarks, times, progress=self._progress)
        return heat

    def _times(self, graph: HeatGraph, rng: np.random.Generator) -> NDArray[np.float64]:
        if not isinstance(self.t, str):
            return np.atleast_1d(np.asarray(self.t, dtype=np.float64))
        grid = graph.times()
        columns = np.sort(rng.choice(graph.n, min(graph.n, 64 if graph.n <= 20_000 else 16), replace=False))
        entropy = graph.entropies(grid.tolist(), columns)
        best = knee(grid, entropy)
        if best is None:  # heat has mixed from the beginning, or still spreads at the end
            best = 0 if np.ptp(entropy) < 0.05 else len(grid) // 2
        self.t_grid_, self.entropy_ = grid, entropy
        return grid[[best]]

    def _embed(self, landmarks: NDArray[np.int64] | None, heat: Array | None, rng: np.random.Generator) -> Array:
        """Coordinates of all different points."""
        largest = float(self.distances_.max(initial=0.0))
        ordinary = largest == 0 or 1e-3 < largest < 1e6
        unit = 1.0 if ordinary else 2.0 ** np.floor(np.log2(largest))  # scaling works on numbers around 1
        measured = self.distances_ if ordinary else self.distances_ / unit
        distances = measured if landmarks is None else measured[landmarks].astype(np.float64)
        distances = (distances + distances.T) / 2
        if len(distances) == 1 or not distances.any():
            self.stress_ = 0.0
            return np.zeros((len(measured), self.n_components))
        weights = None
        if self.mds_weights is not None:
            heat = np.zeros_like(distances) if heat is None else heat
            weights = scaling.mds_weights(self.mds_weights, distances, heat, self.mds_weights_argument)
        anchors = self._scaled(distances, weights, landmarks, rng)
        if landmarks is None:
            (anchors,) = scaling.principal_axes(anchors)
            self.stress_ = scaling.stress(distances, anchors, weights=weights, rescale=False)
            return anchors * unit
        placed = scaling.place_points(measured, anchors, progress=self._progress)
        placed[landmarks] = anchors
        placed, anchors = scaling.principal_axes(placed, anchors)
        self.stress_ = scaling.placement_stress(measured, placed, anchors)
        return placed * unit

    def _scaled(
        self, distances: Array, weights: Array | None, landmarks: NDArray[np.int64] | None, rng: np.random.Generator
    ) -> Array:
        zero_diagonal = distances.copy()
        np.fill_diagonal(zero_diagonal, 0.0)
        if not isinstance(self.init, str):
            start = check_array(self.init)
            if start.shape != (len(self._copy_of), self.n_components):
                raise ValueError(f"init must have shape {(len(self._copy_of), self.n_components)}, got {start.shape}")
            start = start[self._original if landmarks is None else self._original[landmarks]]
        elif self.init == "squared":
            start = scaling.squared_axes_start(distances, self.n_components)
        else:
            start = scaling.classical_mds(zero_diagonal, self.n_components)
        if self.mds == "classical":
            return start
        start = scaling.best_scale(zero_diagonal, start, weights)
        if self.mds == "smacof":
            return scaling.smacof(zero_diagonal, start, weights=weights)
        return scaling.metric_mds(zero_diagonal, start, weights=weights, rng=rng, progress=self._progress)

    def _validated(self, X: Any, **how: Any) -> Any:
        """Numbers (n, features); what scikit-learn says against them, in one line without its advice on estimators."""
        try:
            return validate_data(self, X, accept_sparse="csr", dtype=[np.float64, np.float32], **how)
        except ValueError as error:
            lines = str(error).splitlines()
            raise ValueError("X: " + (lines[0] if "Input " in lines[0] else " ".join(lines))) from None

    def _points_of(self, X: Any) -> tuple[Any, FeatureSpace]:
        """New rows as the graph sees them, and the space in which they lie."""
        if self._space is None:
            raise ValueError(f"transform needs features, but this embedding was fitted with metric={self.metric!r}")
        X = self._validated(X, reset=False)
        return self._space.points_of(X), self._space

    def _transitions(self, points: Any) -> Csr:
        """Affinity of new points to the training points, (q, n'), rows summing to one."""
        assert self._space is not None
        search = self._space.search
        k = max(1, min(self.n_neighbors, search.points.shape[0] - 1))
        return out_of_sample_transitions(search, points, k, decay=self.decay, thresh=self.thresh)

    def _distances_of(self, points: Any) -> Array:
        """Distances of new points, from those of their neighbours weighted by affinity.

        The mean of the neighbours' squared distances is that of their centre plus their spread around it, which
        is taken out as it shows in the embedding.
        """
        assert self._space is not None
        weights = self._transitions(points)
        used = np.unique(weights.indices)
        weights, near = weights[:, used], self.embedding_[self._original[used]]
        spread = weights @ (near**2).sum(axis=1) - ((weights @ near) ** 2).sum(axis=1)
        squared = weights @ self.distances_[used].astype(np.float64) ** 2 - spread[:, None]
        return np.sqrt(np.maximum(squared, 0))

    def _progress(self, steps: Sequence[Any], what: str) -> Iterable[Any]:
        return tqdm(steps, desc=what, disable=not self.verbose)


@cache
def _choices() -> dict[str, tuple[Any, ...]]:
    """setting -> what it may be, of those that are a choice among names."""
    choices = {}
    for name, hint in get_type_hints(HeatGeodesicEmbedding).items():
        parts = (hint,) if get_origin(hint) is Literal else get_args(hint)
        if parts and all(part is NoneType or get_origin(part) is Literal for part in parts):
            choices[name] = tuple(value for part in parts for value in get_args(part) or (None,))
    return choices


def _check(settings: HeatGeodesicEmbedding) -> None:
    """Raise ValueError for the first setting that is out of range."""
    values = settings.get_params(deep=False)
    for name, choices in _choices().items():
        value = values[name]
        if not (value is None or isinstance(value, str)) or value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    counts: list[tuple[str, int, tuple[Any, ...]]] = [  # name, least, what else it may be
        ("n_components", 1, ()),
        ("n_neighbors", 1, ()),
        ("n_pca", 1, (None,)),
        ("order", 1, ("auto",)),
        ("n_landmarks", 3, ("auto", None)),
    ]
    for name, least, others in counts:
        value = values[name]
        if isinstance(value, numbers.Integral) and int(value) >= least:
            continue
        if not (value is None or isinstance(value, str)) or value not in others:
            allowed = " or ".join([f"an integer of at least {least}", *map(repr, others)])
            raise ValueError(f"{name} must be {allowed}, got {value!r}")
    t, init = settings.t, settings.init
    positive_t = (
        not isinstance(t, str)
        and np.size(t) > 0
        and np.isfinite(t).all()
        and (np.asarray(t, dtype=np.float64) > 0).all()
    )
    for name, right, must in (
        *((name, values[name] > 0, "be positive") for name in ("decay", "thresh", "floor", "scale_power")),
        ("mds_weights_argument", settings.mds_weights_argument > 0, "be positive"),
        ("thresh", settings.thresh < 1, "be below 1"),
        *((name, values[name] >= 0, "not be negative") for name in ("anisotropy", "volume_weight")),
        ("triplet_weight", 0 <= settings.triplet_weight <= 1, "lie in [0, 1]"),
        ("n_jobs", settings.n_jobs != 0, "be a number of threads, -1 for all cores, or None"),
        ("t", positive_t or (isinstance(t, str) and t == "auto"), "be 'auto' or positive"),
        (
            "init",
            not isinstance(init, str) or init in ("classical", "squared"),
            "be 'classical', 'squared' or an array",
        ),
    ):
        if not right:
            raise ValueError(f"{name} must {must}, got {values[name]!r}")
