"""Probes on disk: which kind a folder holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, TypeAlias

from diffrep.heads.probes import dense_probe, feedback_probe, pixel_probe, probe

SavedKind: TypeAlias = Literal["classification", "feedback", "pixels", "dense"]
_FILES: dict[str, SavedKind] = {
    probe.ABOUT: "classification",
    feedback_probe.ABOUT: "feedback",
    pixel_probe.ABOUT: "pixels",
    dense_probe.ABOUT: "dense",
}


def saved_kind(folder: str | Path) -> SavedKind | None:
    """What the files in a folder say that it holds; None: no probe."""
    return next((kind for name, kind in _FILES.items() if (Path(folder) / name).is_file()), None)


def saved_features(folder: str | Path) -> dict[str, Any]:
    """The provenance of the features of a probe of pixels, depth, normals or feedback: they have one backbone.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    name = next((name for name, kind in _FILES.items() if kind == saved_kind(folder)), "")
    try:
        return dict(json.loads((Path(folder) / name).read_text(encoding="utf-8"))["features"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: the probe cannot be read ({' '.join(str(error).split())[:300]})") from None
