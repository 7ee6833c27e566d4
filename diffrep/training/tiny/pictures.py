"""Pictures to judge the embedded models by: reconstructions, samples from captions, features as colours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from diffrep.features import ExtractConfig, extract

CAPTIONS = (
    "a photo of a red plain car side view on a gray road",
    "a photo of a brown spotted dog side view on green grass",
    "a photo of a blue striped mug front corner view on a brown wooden floor",
    "a photo of a yellow plain plane side view in the sky",
    "a photo of a white plain boat side view on the sea",
    "a photo of a black plain motorbike side view on a gray road",
    "a photo of a green plain chair front corner view on a white tiled floor",
    "a photo of a orange plain lamp side view on a beige carpet",
)


def grid(rows: Sequence[Tensor], *, gap: int = 2) -> Image.Image:
    """Rows of images, each (N, 3, H, W) in [0, 1], as one picture."""
    padded = [F.pad(row, (gap, gap, gap, gap), value=1.0) for row in rows]
    joined = torch.cat([torch.cat(list(row), dim=-1) for row in padded], dim=-2)
    return Image.fromarray((joined.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())


@torch.no_grad()
def reconstructions(vae: Any, images: Tensor) -> Image.Image:
    """Images (N, 3, H, W) in [0, 1] above what the autoencoder makes of them."""
    decoded = vae.decode(vae.encode(images * 2 - 1).latent_dist.mean).sample
    return grid([images, decoded / 2 + 0.5])


@torch.no_grad()
def samples(
    folder: Path, captions: Sequence[str] = CAPTIONS, *, columns: int = 4, steps: int = 30, guidance: float = 3.0
) -> Image.Image:
    """One row per caption, `columns` noise seeds each, sampled with the pipeline of a diffusers folder."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    rows = []
    for caption in captions:
        generators = [torch.Generator().manual_seed(seed) for seed in range(columns)]
        found = pipeline(
            [caption] * columns,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=generators,
            output_type="pt",
        ).images
        rows.append(found.float())
    return grid(rows)


def feature_colours(maps: Tensor, masks: Tensor | None = None) -> Tensor:
    """The first three principal components of features, joint over the images, as colours.

    Args:
        maps: (N, C, h, w).
        masks: (N, h, w) bool: the components are those of these cells, the others become white.

    Returns:
        (N, 3, h, w) in [0, 1].
    """
    rows = F.normalize(maps.float(), dim=1).movedim(1, -1)
    chosen = rows[masks] if masks is not None else rows.flatten(0, 2)
    centre = chosen.mean(0)
    _, _, axes = torch.linalg.svd(chosen - centre, full_matrices=False)
    colours = (rows - centre) @ axes[:3].T
    spread = ((chosen - centre) @ axes[:3].T).std(0)
    colours = (colours / (4 * spread) + 0.5).clamp(0, 1)
    if masks is not None:
        colours = torch.where(masks[..., None], colours, torch.ones(()))
    return colours.movedim(-1, 1)


def feature_picture(backbones: Sequence[Any], images: Tensor, masks: Tensor | None = None) -> Image.Image:
    """Images (N, 3, H, W) above the colours of each backbone's recommended tap.

    Args:
        masks: (N, H, W) bool, the objects; None colours the whole image.
    """
    rows, size = [images], images.shape[-2:]
    for backbone in backbones:
        found = extract(backbone, list(images), ExtractConfig())
        maps = found.maps[found.taps[-1]].float()
        cells = None
        if masks is not None:
            cells = F.adaptive_avg_pool2d(masks[:, None].float(), (maps.shape[-2], maps.shape[-1]))[:, 0] > 0.4
        rows.append(F.interpolate(feature_colours(maps, cells), size=tuple(size), mode="nearest"))
    return grid(rows)
