"""Settings of `HeatGeodesicEmbedding`: named choices, their check, and presets that give other methods."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from diffrep.manifold.geodesics import HEAT_METHODS
from diffrep.manifold.neighbors import BACKENDS

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

CHOICES: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "metric": ("euclidean", "cosine", "precomputed", "affinity"),
        "knn_backend": BACKENDS,
        "laplacian": ("normalized", "combinatorial"),
        "heat_method": HEAT_METHODS,
        "dissimilarity": ("heat", "diffusion", "shortest-path"),
        "volume": ("geometric", "arithmetic", None),
        "mds": ("sgd", "smacof", "classical"),
        "mds_weights": ("heat", "inverse", "gaussian", None),
        "far_field": ("stitch", "floor"),
        "on_disconnected": ("warn", "connect", "raise", "keep"),
        "dtype": ("auto", "float32", "float64"),
    }
)

_LEAST = {"n_components": 1, "n_neighbors": 1, "n_pca": 1, "order": 1, "n_landmarks": 3}  # of integers
_OR = {"n_pca": (None,), "order": ("auto",), "n_landmarks": ("auto", None)}  # what else they may be


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raise ValueError for the first setting, by the estimator's names, that is out of range."""
    for name, choices in CHOICES.items():
        value = settings[name]
        if not (value is None or isinstance(value, str)) or value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    for name, least in _LEAST.items():
        value, others = settings[name], _OR.get(name, ())
        if (value is None or isinstance(value, str)) and value in others:
            continue
        if not isinstance(value, numbers.Integral) or value < least:
            allowed = " or ".join([f"an integer of at least {least}", *map(repr, others)])
            raise ValueError(f"{name} must be {allowed}, got {value!r}")
    for name in ("decay", "thresh", "floor", "scale_power", "mds_weights_argument"):
        if not settings[name] > 0:
            raise ValueError(f"{name} must be positive, got {settings[name]!r}")
    if not settings["thresh"] < 1:
        raise ValueError(f"thresh must be below 1, got {settings['thresh']!r}")
    for name in ("anisotropy", "volume_weight"):
        if not settings[name] >= 0:
            raise ValueError(f"{name} must not be negative, got {settings[name]!r}")
    if not 0 <= settings["triplet_weight"] <= 1:
        raise ValueError(f"triplet_weight must lie in [0, 1], got {settings['triplet_weight']!r}")
    if settings["n_jobs"] == 0:
        raise ValueError("n_jobs must be a number of threads, -1 for all cores, or None, got 0")
    t = settings["t"]
    if isinstance(t, str):
        if t != "auto":
            raise ValueError(f"t must be 'auto' or positive, got {t!r}")
    elif not (np.size(t) and np.all(np.asarray(t, dtype=np.float64) > 0) and np.all(np.isfinite(t))):
        raise ValueError(f"t must be 'auto' or positive, got {t!r}")
