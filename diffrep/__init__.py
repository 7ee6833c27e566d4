"""diffrep: diffusion models as vision backbones.

A diffusion U-Net that was trained to make images knows where the parts of objects are, how far away
they are and how surfaces turn. diffrep taps that knowledge: `load_backbone` gives a network,
its `extract` gives `FeatureMaps`, and everything else is what is done with them.

The public names are imported when first used, so that ``import diffrep`` stays fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from diffrep import _checkout

_checkout.install()

if TYPE_CHECKING:
    from diffrep.backbones import Backbone, TapInfo, load_backbone
    from diffrep.features import ExtractConfig, FeatureMaps, extract, extract_each
    from diffrep.fusion import Descriptors, Fusion, Part, fuse
    from diffrep.heads.loading import load_head
    from diffrep.images import Placement, Sizing, load_image
    from diffrep.matching import MatchConfig, match_dense, match_points
    from diffrep.recipes import Correspondence, Recipe, recipe
    from diffrep.refinement import refine
    from diffrep.store import Store, open_store
    from diffrep.swap import swap_appearance

__version__ = "0.1.0"

_HOME = {  # public name -> module that defines it
    "Backbone": "diffrep.backbones",
    "Correspondence": "diffrep.recipes",
    "Descriptors": "diffrep.fusion",
    "ExtractConfig": "diffrep.features",
    "FeatureMaps": "diffrep.features",
    "Fusion": "diffrep.fusion",
    "MatchConfig": "diffrep.matching",
    "Part": "diffrep.fusion",
    "Placement": "diffrep.images",
    "Recipe": "diffrep.recipes",
    "Sizing": "diffrep.images",
    "Store": "diffrep.store",
    "TapInfo": "diffrep.backbones",
    "extract": "diffrep.features",
    "extract_each": "diffrep.features",
    "fuse": "diffrep.fusion",
    "load_backbone": "diffrep.backbones",
    "load_head": "diffrep.heads.loading",
    "load_image": "diffrep.images",
    "match_dense": "diffrep.matching",
    "match_points": "diffrep.matching",
    "open_store": "diffrep.store",
    "recipe": "diffrep.recipes",
    "refine": "diffrep.refinement",
    "swap_appearance": "diffrep.swap",
}

__all__ = [  # noqa: RUF022  # in the order in which one meets them
    "load_image",
    "Sizing",
    "Placement",
    "load_backbone",
    "Backbone",
    "TapInfo",
    "load_head",
    "extract",
    "extract_each",
    "ExtractConfig",
    "FeatureMaps",
    "Fusion",
    "Part",
    "fuse",
    "Descriptors",
    "MatchConfig",
    "match_points",
    "match_dense",
    "Correspondence",
    "Recipe",
    "recipe",
    "swap_appearance",
    "refine",
    "open_store",
    "Store",
]


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'diffrep' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
