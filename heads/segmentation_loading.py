"""The former place of what `diffrep.heads.loading` holds now."""

from __future__ import annotations

import os
from typing import Any

from diffrep.heads.loading import WEIGHTS, HeadError, diffdis_unet, load_head
from diffrep.heads.mask_prediction import SegmentationHead

__all__ = ["WEIGHTS", "HeadError", "diffdis_unet", "load_segmentation"]


def load_segmentation(name: str | os.PathLike[str], **options: Any) -> SegmentationHead:
    """Load a segmentation head; see `load_head`."""
    head: SegmentationHead = load_head(name, task="segmentation", **options)
    return head
