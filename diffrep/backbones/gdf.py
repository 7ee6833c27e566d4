"""Layer names of generic-diffusion-feature ("Not All Diffusion Model Activations Have Been Evaluated", 2024)."""

from __future__ import annotations

import re

from diffrep.backbones.base import TapError

_NAME = re.compile(r"(?:(down|up)-level(\d+)|(mid))(?:-repeat(\d+))?-(.+)")
_WHOLE = {"unet-in": "in", "unet-after-conv-in": "conv_in", "unet-out": "out"}


def gdf_tap(name: str) -> str:
    """The tap of a layer that generic-diffusion-feature names.

    >>> gdf_tap("up-level1-repeat1-vit-block0-cross-q")
    'up.1.attention.1.block.0.cross.q'
    >>> gdf_tap("mid-vit-out"), gdf_tap("up-level2-upsampler-out")
    ('mid.attention.0', 'up.2.upsampler')

    Raises:
        TapError: no layer of that project has such a name, or it has no map (keys and values of prompts).
    """
    if name in _WHOLE:
        return _WHOLE[name]
    match = _NAME.fullmatch(name)
    if match is None:
        raise TapError(f"{name!r} is no layer name such as 'up-level1-repeat0-res-out' or 'mid-vit-block0-self-q'")
    stage, level, mid, repeat, part = match.groups()
    block = mid or f"{stage}.{level}"
    if part in ("upsampler-out", "downsampler-out") and repeat is None and not mid:
        return f"{block}.{part.removesuffix('-out')}"
    if part in ("res-out", "res-increment") and repeat is not None:
        return f"{block}.resnet.{repeat}" + (".increment" if part == "res-increment" else "")
    if part.startswith("vit-") and (repeat is None) == bool(mid):
        attention = f"{block}.attention.{repeat or 0}"
        if part == "vit-out":
            return attention
        inner = re.fullmatch(r"vit-block(\d+)-(out|ffn-inner|self-(?:q|k|v|map)|cross-(?:q|map))", part)
        if inner is not None:
            number, what = inner.groups()
            suffix = {"out": "", "ffn-inner": ".ff"}.get(what, "." + what.replace("-", "."))
            return f"{attention}.block.{number}{suffix}"
    raise TapError(f"{name!r} names no activation with a place in the image that can be tapped ({part!r} is unknown)")
