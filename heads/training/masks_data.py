"""Images with masks to train segmentation on: rendered scenes with cached latents, and DIS5K as it is released."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageEnhance
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from diffrep.files import save_weights
from diffrep.heads.training.masks import cut_mix, edge_map, encode_step, pyramid_noise, stretch
from diffrep.images import load_image
from diffrep.scenes import SceneSet
from diffrep.training.loop import Batch

Encode = Callable[[Tensor], Tensor]
"""(B, 3, H, W) pixels in [0, 1] -> scaled latents."""


# -- rendered scenes ------------------------------------------------------------------------------------------------


def scene_maps(scenes: SceneSet, rows: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    """Image (B, 3, H, W), mask and edge (B, 1, H, W) of scenes, all in [0, 1]."""
    images = torch.from_numpy(np.array(scenes.image[rows])).permute(0, 3, 1, 2).float() / 255
    masks = torch.from_numpy(np.array(scenes.mask[rows]))[:, None].to(torch.uint8) * 255
    return images, masks.float() / 255, edge_map(masks).float() / 255


@torch.no_grad()
def cache_scenes(
    encode: Encode, scenes: SceneSet, count: int, levels: int, file: Path, *, made_with: str, progress: bool = True
) -> dict[str, Tensor]:
    """Latents of the first `count` scenes, encoded once and kept in a file.

    Args:
        made_with: what the latents depend on beside the scenes; a file made with something else is refused.

    Returns:
        As `encode_step`, float16 (N, c, h, w).

    Raises:
        ValueError: the file holds other latents.
    """
    note = f"{made_with}, {count} scenes of {scenes.settings.renderer}, {levels + 1} sizes"
    if not file.exists():
        parts: dict[str, list[Tensor]] = {}
        for start in tqdm(range(0, count, 64), desc="encoding", unit="batch", disable=not progress):
            images, masks, edges = scene_maps(scenes, np.arange(start, min(start + 64, count)))
            with torch.autocast("cpu", dtype=torch.bfloat16):
                found = encode_step(encode, images, masks, edges, levels=levels)
            for name, latents in found.items():
                parts.setdefault(name, []).append(latents.half())
        file.parent.mkdir(parents=True, exist_ok=True)
        save_weights(file, {name: torch.cat(chunks) for name, chunks in parts.items()}, made_with=note)
    with safe_open(file, "pt") as opened:
        kept = (opened.metadata() or {}).get("made_with")
    if kept != note:
        raise ValueError(f"{file}: holds latents of {kept}, not of {note}; choose another folder or delete it")
    return load_file(file)


def scene_batches(
    scenes: SceneSet, latents: dict[str, Tensor], *, batch_size: int, edges: bool, pixels: bool
) -> Callable[[torch.Generator], Batch]:
    """Batches of cached latents with pyramid noise; see `SegmentationModel`.

    Args:
        latents: of `cache_scenes`.
        edges: train the edges too.
        pixels: also give images and maps, for a decoder.
    """

    def batches(generator: torch.Generator) -> Batch:
        rows = torch.randint(len(latents["mask"]), (batch_size,), generator=generator)
        batch = {name: values[rows].float() for name, values in latents.items() if name.startswith("image ")}
        kinds = ("mask", "edge") if edges else ("mask",)
        batch["target"] = torch.cat([latents[kind][rows].float() for kind in kinds])
        batch["noise"] = pyramid_noise(batch["target"].shape, generator=generator)
        if pixels:
            images, masks, outlines = scene_maps(scenes, rows.numpy())
            batch["pixels"] = images.to(memory_format=torch.channels_last)
            batch["maps"] = torch.cat([masks, outlines]) if edges else masks
        return batch

    return batches


# -- DIS5K ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MaskedImage:
    """One image of a data set with its mask, and its edges where they lie beside it."""

    image: Path
    mask: Path
    edge: Path | None


def read_dis(folder: Path) -> list[MaskedImage]:
    """The pairs of a DIS5K split: ``im/*.jpg``, ``gt/*.png``, and ``contour/*.png`` where they were made.

    Pairs are found by name; those whose image and mask differ in size are left out, as published.

    Raises:
        ValueError: the folder is not laid out so, or has no pair.
    """
    if missing := [part for part in ("im", "gt") if not (folder / part).is_dir()]:
        raise ValueError(f"{folder}: is no split of DIS5K, {' and '.join(missing)} missing (expected im/ and gt/)")
    images = {p.stem: p for p in sorted((folder / "im").iterdir()) if p.suffix.lower() in (".jpg", ".jpeg", ".png")}
    found = []
    for mask in sorted((folder / "gt").glob("*.png")):
        if (image := images.get(mask.stem)) is None:
            continue
        with Image.open(image) as a, Image.open(mask) as b:
            if a.size != b.size:
                continue
        edge = folder / "contour" / mask.name
        found.append(MaskedImage(image, mask, edge if edge.is_file() else None))
    if not found:
        raise ValueError(f"{folder}: no image in im/ has a mask of the same name and size in gt/")
    return found


def read_maps(pair: MaskedImage) -> tuple[Image.Image, Image.Image, Image.Image]:
    """Image (RGB), mask and edge (8-bit grey); the edge is made at full size where there is none."""
    image, mask = load_image(pair.image), load_image(pair.mask).convert("L")
    if pair.edge is not None:
        return image, mask, load_image(pair.edge).convert("L")
    edge = edge_map(torch.from_numpy(np.array(mask)))
    return image, mask, Image.fromarray(edge.numpy())


def augment(
    image: Image.Image, mask: Image.Image, edge: Image.Image, generator: torch.Generator
) -> tuple[Image.Image, Image.Image, Image.Image]:
    """The published augmentations, in their order: mirror, centred crop, rotation, colours.

    The crop takes up to 30 pixels off each axis; one image in five is turned by -15 to 14 degrees; brightness and
    contrast change by factors in 0.5..1.5, colour in 0..2, sharpness in 0..3, in steps of 0.1.
    """

    def integer(low: int, high: int) -> int:  # both ends included
        return int(torch.randint(low, high + 1, (), generator=generator))

    views = [image, mask, edge]
    if integer(0, 1):
        views = [view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for view in views]
    width, height = image.size
    if min(width, height) > 30:
        w, h = integer(width - 30, width - 1), integer(height - 30, height - 1)
        box = ((width - w) // 2, (height - h) // 2, (width + w) // 2, (height + h) // 2)
        views = [view.crop(box) for view in views]
    if float(torch.rand((), generator=generator)) < 0.2:
        angle = integer(-15, 14)
        views = [view.rotate(angle, Image.Resampling.BICUBIC) for view in views]
    for kind, low, high in (
        (ImageEnhance.Brightness, 5, 15),
        (ImageEnhance.Contrast, 5, 15),
        (ImageEnhance.Color, 0, 20),
        (ImageEnhance.Sharpness, 0, 30),
    ):
        views[0] = kind(views[0]).enhance(integer(low, high) / 10)
    return views[0], views[1], views[2]


def draw_boxes(batch: int, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """CutMix boxes (B, H, W) bool: half of the samples have one, of 2 to 40 % of the area, aspect 0.3 to 3.33."""
    height, width = size
    boxes = torch.zeros(batch, height, width, dtype=torch.bool)
    for number in range(batch):
        chance, area, aspect, x, y = torch.rand(5, generator=generator).tolist()
        if chance >= 0.5:
            continue
        area, aspect = (0.02 + 0.38 * area) * height * width, 0.3 + (1 / 0.3 - 0.3) * aspect
        w, h = min(width, round((area * aspect) ** 0.5)), min(height, round((area / aspect) ** 0.5))
        left, top = int(x * (width - w + 1)), int(y * (height - h + 1))
        boxes[number, top : top + h, left : left + w] = True
    return boxes


def image_batches(
    pairs: list[MaskedImage],
    encode: Encode,
    *,
    size: int,
    batch_size: int,
    levels: int,
    edges: bool,
    decoder: bool,
    workers: int = 8,
) -> Callable[[torch.Generator], Batch]:
    """Batches of images from files, augmented as published and encoded on the way.

    Args:
        size: pixels a side of the square that each image is squashed to.
        decoder: also give images and maps, for a decoder.
        workers: threads that read and augment files.
    """
    pool = ThreadPoolExecutor(workers)

    def sample(task: tuple[MaskedImage, int]) -> tuple[Tensor, Tensor, Tensor]:
        pair, seed = task
        views = augment(*read_maps(pair), torch.Generator().manual_seed(seed))
        image, mask, edge = (np.array(view.resize((size, size), Image.Resampling.BILINEAR)) for view in views)
        return torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(mask)[None], torch.from_numpy(edge)[None]

    @torch.no_grad()
    def batches(generator: torch.Generator) -> Batch:
        rows = torch.randint(len(pairs), (batch_size,), generator=generator).tolist()
        seeds = torch.randint(2**62, (batch_size,), generator=generator).tolist()
        read = list(pool.map(sample, [(pairs[row], seed) for row, seed in zip(rows, seeds, strict=True)]))
        boxes = draw_boxes(batch_size, (size, size), generator)
        images, masks, outlines = (cut_mix(stretch(torch.stack(kind)), boxes) for kind in zip(*read, strict=True))
        found = encode_step(encode, images, masks, outlines, levels=levels)
        mask, edge = found.pop("mask"), found.pop("edge")
        target = torch.cat([mask, edge]) if edges else mask
        batch = found | {"target": target, "noise": pyramid_noise(target.shape, generator=generator).to(target)}
        if decoder:
            batch |= {"pixels": images, "maps": torch.cat([masks, outlines]) if edges else masks}
        return batch

    return batches
