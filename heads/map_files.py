"""The former place of what `diffrep.heads.maps` holds now."""

from __future__ import annotations

from PIL import Image

from diffrep.heads.maps import WRITERS, DepthMap, NormalMap, array_of, save_map

__all__ = ["WRITERS", "array_of", "preview", "save_map"]


def preview(values: DepthMap | NormalMap) -> Image.Image:
    """The picture of a map, see `DepthMap.picture`."""
    return values.picture()
