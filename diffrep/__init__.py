"""diffrep: diffusion models as vision backbones.

A diffusion U-Net that was trained to make images knows where the parts of objects are, how far away
they are and how surfaces turn. diffrep taps that knowledge: `load_backbone` gives a network,
its `extract` gives `FeatureMaps`, and everything else is what is done with them.

The public names are imported when first used, so that ``import diffrep`` stays fast.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from diffrep.backbones import Backbone, TapInfo, load_backbone
    from diffrep.draw import draw_components, draw_field, draw_heat, draw_matches
    from diffrep.features import Descriptors, ExtractConfig, FeatureMaps, extract, extract_each
    from diffrep.fusion import Fusion, Part, fuse
    from diffrep.heads.loading import load_head
    from diffrep.heads.probes import load_probe
    from diffrep.images import Placement, Sizing, load_image
    from diffrep.manifold import HeatGeodesicEmbedding
    from diffrep.masks import load_mask
    from diffrep.matching import MatchConfig, match_dense, match_points
    from diffrep.painting import sample
    from diffrep.recipes import Correspondence, Recipe, recipe
    from diffrep.store import Store, open_store
    from diffrep.swap import refine, swap_appearance
    from diffrep.synthesis import load_synthesis, synthesize
    from diffrep.table_scheduler import TableScheduler
    from diffrep.tasks import pipeline

__version__ = "0.1.0"

_NAMES = {  # module -> the public names that it defines
    "images": "load_image Sizing Placement",
    "masks": "load_mask",
    "tasks": "pipeline",
    "backbones": "load_backbone Backbone TapInfo",
    "features": "extract extract_each ExtractConfig FeatureMaps Descriptors",
    "fusion": "Fusion Part fuse",
    "matching": "MatchConfig match_points match_dense",
    "recipes": "Correspondence Recipe recipe",
    "swap": "swap_appearance refine",
    "draw": "draw_matches draw_field draw_components draw_heat",
    "heads.loading": "load_head",
    "heads.probes": "load_probe",
    "manifold": "HeatGeodesicEmbedding",
    "synthesis": "load_synthesis synthesize",
    "painting": "sample",
    "table_scheduler": "TableScheduler",
    "store": "open_store Store",
}
_HOME = {name: f"diffrep.{module}" for module, names in _NAMES.items() for name in names.split()}

__all__ = [  # noqa: RUF022  # in the order in which one meets them
    "load_image",
    "Sizing",
    "Placement",
    "load_mask",
    "pipeline",
    "load_backbone",
    "Backbone",
    "TapInfo",
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
    "draw_matches",
    "draw_field",
    "draw_components",
    "draw_heat",
    "load_head",
    "load_probe",
    "HeatGeodesicEmbedding",
    "load_synthesis",
    "synthesize",
    "sample",
    "TableScheduler",
    "open_store",
    "Store",
]


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'diffrep' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])


class _CheckoutFinder:
    """Let a checkout import ``diffrep.heads`` and ``diffrep.eval`` from the folders beside ``diffrep/``.

    A wheel or an editable install maps them to sub-packages. The finder knows these two names only, and comes last, so
    an installed package is asked first.
    """

    @classmethod
    def find_spec(
        cls, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        folder = _PACKAGE.parent / name.removeprefix("diffrep.")
        if name not in ("diffrep.heads", "diffrep.eval") or not (folder / "__init__.py").is_file():
            return None
        return importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )


class _Moved:
    """Import a module that has moved, by a name that README, docs or notebooks showed once, as what it is now."""

    NOW: ClassVar = {  # former name -> today's; what it held is there under the same names
        "diffrep.commands.dense": "diffrep.commands.image_runs",
        "diffrep.eval.benchmarks.segmentation": "diffrep.eval.benchmarks.networks",
        "diffrep.heads.map_files": "diffrep.heads.maps",
        "diffrep.heads.mask_prediction": "diffrep.heads.segmentation",
        "diffrep.heads.segmentation_loading": "diffrep.heads.loading",
        "diffrep.synthesis.conditions": "diffrep.synthesis.grids",
    }

    @classmethod
    def find_spec(
        cls, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(name, cls()) if name in cls.NOW else None  # type: ignore[arg-type]

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        """As Python does."""

    def exec_module(self, module: ModuleType) -> None:
        sys.modules[module.__name__] = importlib.import_module(self.NOW[module.__name__])


sys.meta_path.append(_Moved)  # type: ignore[arg-type]

_PACKAGE = Path(__file__).resolve().parent
if (_PACKAGE.parent / "pyproject.toml").is_file() and not (_PACKAGE / "heads").exists():
    sys.meta_path.append(_CheckoutFinder)  # type: ignore[arg-type]  # a class with find_spec is a finder
