"""Training DiffDIS: images with masks, what its U-Net is shown, and what is minimised (arXiv 2410.10105 and its code).

The noised latents of mask and edge go in with the image's, at the last timestep; the loss is the squared error of the
clean latents that the one-step formula gives, mask plus edge. Where the VAE cannot draw sharp masks, a decoder for them
is trained along by the error of the drawn masks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance
from torch import Tensor, nn

from diffrep.heads.one_step import TIMESTEP, Schedule
from diffrep.heads.tiling import stretch
from diffrep.heads.training.dense_data import READERS, cached_latents
from diffrep.images import load_image, shrink
from diffrep.scenes import SceneSet
from diffrep.training.loop import Batch

DISCOUNT = 0.8  # of pyramid noise, from one level to the next
DRAWN_WEIGHT = 10.0  # brings the cross-entropy of drawn maps to the size of the error of latents
EDGE_THRESHOLD = 6  # grey levels
PUBLISHED_FASTER = (("class_embedding", 10.0),)  # `FitSettings.faster`: the embedding of the branches learns faster

Encode = Callable[[Tensor], Tensor]
"""(B, 3, H, W) pixels in [0, 1] -> scaled latents."""


def edge_map(masks: Tensor, *, window: int = 5, threshold: float = EDGE_THRESHOLD) -> Tensor:
    """Edge ground truth of masks (..., H, W) in 0..255, as uint8 of the same shape.

    255 where the mask dilated by a square of `window` pixels a side and the eroded one differ by `threshold` or more,
    else 0; what lies outside of the image does not count.
    """
    maps = masks.reshape(-1, 1, *masks.shape[-2:]).float()
    spread = F.max_pool2d(maps, window, 1, window // 2) + F.max_pool2d(-maps, window, 1, window // 2)
    return ((spread >= threshold).to(torch.uint8) * 255).reshape(masks.shape)


def pyramid_noise(
    shape: Sequence[int],
    *,
    discount: float = DISCOUNT,
    generator: torch.Generator | None = None,
    draws: Sequence[Tensor] | None = None,
    uniforms: Sequence[float] | None = None,
) -> Tensor:
    """Noise of many resolutions, of unit deviation over the whole batch.

    Level k adds bilinearly enlarged noise of weight discount^k; its side is that of the level before, divided by r^k
    with r drawn from [2, 4): 64, 17, 3, 1. Level 0 is a second draw at full size.

    Args:
        shape: (B, c, h, w).
        generator: draws the noise and r.
        draws, uniforms: instead of drawn ones, the noise of the base and of each level, and (r - 2) / 2.
    """
    full = size = (shape[2], shape[3])

    def draw(number: int, size: tuple[int, int]) -> Tensor:
        return draws[number] if draws is not None else torch.randn(*shape[:2], *size, generator=generator)

    noise = draw(0, full).clone()
    for level in range(10):
        u = float(uniforms[level]) if uniforms is not None else float(torch.rand((), generator=generator))
        factor = (u * 2 + 2) ** level
        size = (max(1, int(size[0] / factor)), max(1, int(size[1] / factor)))
        noise = noise + F.interpolate(draw(level + 1, size), size=full, mode="bilinear") * discount**level
        if 1 in size:
            break
    return noise / noise.std()


def cut_mix(values: Tensor, boxes: Tensor) -> Tensor:
    """(B, C, H, W) with the partner of each sample inside its box (B, H, W); 0 and 1, 2 and 3, ... are partners.

    Raises:
        ValueError: B is odd.
    """
    if len(values) % 2:
        raise ValueError(f"cut_mix needs an even batch, got {len(values)}")
    partner = torch.arange(len(values), device=values.device) ^ 1
    return torch.where(boxes[:, None], values[partner], values)


def encode_step(encode: Encode, images: Tensor, masks: Tensor, edges: Tensor, *, levels: int) -> dict[str, Tensor]:
    """Latents of images (B, 3, H, W), masks and edges (B, 1, H, W) in [0, 1]: "image 0", "image 1", ... of the image
    and its smaller versions; "mask", "edge".
    """
    latents = {f"image {k}": encode(view) for k, view in enumerate(shrink(images, levels))}
    return latents | {name: encode(maps.expand(-1, 3, -1, -1)) for name, maps in (("mask", masks), ("edge", edges))}


def image_latents(latents: Mapping[str, Tensor]) -> list[Tensor]:
    """ "image 0", "image 1", ... of `encode_step`, in this order."""
    return [latents[f"image {k}"] for k in range(sum(name.startswith("image ") for name in latents))]


class SegmentationModel(nn.Module):
    """What is trained: a DiffDIS U-Net, and a decoder where the VAE's is not used.

    Args:
        unet: `diffrep.heads.diffdis.DiffDisUNet`.
        context: (1, tokens, C), the embedding of the empty prompt.
        decoder: (scaled latents, pixels in [0, 1]) -> (B, 1, H, W) logits.
    """

    context: Tensor

    def __init__(self, unet: nn.Module, context: Tensor, schedule: Schedule, decoder: nn.Module | None = None) -> None:
        super().__init__()
        self.unet, self.schedule, self.decoder = unet, schedule, decoder
        self.register_buffer("context", context.detach().clone())

    def predict(self, images: Sequence[Tensor], noisy: Tensor) -> tuple[Tensor, Tensor]:
        """The U-Net's output for noised latents, and the clean latents that it means."""
        edges = len(noisy) == 2 * len(images[0])
        output = self.unet(images, noisy, self.context, timestep=TIMESTEP, edges=edges)
        return output, self.schedule.clean(output.float(), noisy, TIMESTEP)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """One step on a batch of B images.

        Args:
            batch: "image 0", "image 1", ... (B, c, h, w) latents; "target", the latents of the masks, (B, c, h, w),
                or of masks and then edges, (2B, c, h, w); "noise" of the shape of "target"; with a decoder "pixels"
                (B, 3, H, W) in [0, 1].

        Returns:
            "noisy", "output" of the U-Net and "clean", each of the shape of "target"; with a decoder "logits",
            (rows of "target", 1, H, W).
        """
        noisy = self.schedule.add_noise(batch["target"], batch["noise"], TIMESTEP)
        output, clean = self.predict(image_latents(batch), noisy)
        results = {"noisy": noisy, "output": output, "clean": clean}
        if self.decoder is not None:
            pixels = batch["pixels"].repeat(len(clean) // len(batch["pixels"]), 1, 1, 1)
            results["logits"] = self.decoder(clean, pixels)
        return results


def segmentation_losses(module: nn.Module, ema: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
    """Squared error of the clean latents, of masks plus of edges; see `fit`.

    With a decoder, `DRAWN_WEIGHT` times its maps' binary cross-entropy with "maps" (rows, 1, H, W) in [0, 1] is added.
    """
    results, images = module(batch), len(batch["image 0"])

    def means(names: tuple[str, str], errors: Tensor) -> dict[str, Tensor]:
        return {name: rows.mean() for name, rows in zip(names, errors.split(images), strict=False)}

    losses = means(("mask", "edge"), (results["clean"] - batch["target"].float()).square())
    total = torch.stack(list(losses.values())).sum()
    if "logits" in results:
        entropy = F.binary_cross_entropy_with_logits(results["logits"].float(), batch["maps"].float(), reduction="none")
        drawn = means(("drawn mask", "drawn edge"), entropy)
        total = total + DRAWN_WEIGHT * torch.stack(list(drawn.values())).sum()
        losses |= drawn
    return {"loss": total, **losses}


def drawn_losses(module: nn.Module, ema: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
    """Losses of a decoder on its own: binary cross-entropy plus 1 - soft intersection over union; see `fit`.

    Args:
        batch: "latents" (B, c, h, w), "pixels" (B, 3, H, W), "maps" (B, 1, H, W) in [0, 1].
    """
    logits, maps = module(batch["latents"], batch["pixels"]).float(), batch["maps"].float()
    entropy = F.binary_cross_entropy_with_logits(logits, maps)
    drawn = logits.sigmoid()
    both = (drawn * maps).sum((1, 2, 3))
    overlap = 1 - ((both + 1) / ((drawn + maps).sum((1, 2, 3)) - both + 1)).mean()
    return {"loss": entropy + overlap, "entropy": entropy, "overlap": overlap}


def held_scenes(
    scenes: SceneSet, rows: slice | np.ndarray, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Images uint8 (B, H, W, 3) and masks bool (B, H, W) of scenes, on a device."""
    images, masks = (torch.from_numpy(np.array(part[rows])).to(device) for part in (scenes.image, scenes.mask))
    return images, masks


def scene_maps(images: Tensor, masks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Image (B, 3, H, W), mask and edge (B, 1, H, W), all in [0, 1], of what `held_scenes` gives, where that lies."""
    levels = masks[:, None].to(torch.uint8) * 255
    return images.permute(0, 3, 1, 2).float() / 255, levels.float() / 255, edge_map(levels).float() / 255


@torch.no_grad()
def cache_scenes(
    encode: Encode, scenes: SceneSet, count: int, levels: int, file: Path, *, made_with: str, progress: bool = True
) -> dict[str, Tensor]:
    """Latents of the first `count` scenes, as of `encode_step`; see `cached_latents`."""

    def encoded(rows: range) -> dict[str, Tensor]:
        images, masks, edges = scene_maps(*held_scenes(scenes, np.array(rows)))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return encode_step(encode, images, masks, edges, levels=levels)

    note = f"{made_with}, {count} scenes of {scenes.settings.renderer}, {levels + 1} sizes"
    return cached_latents(file, encoded, count, made_with=note, progress=progress)


def scene_batches(
    latents: Mapping[str, Tensor], held: tuple[Tensor, Tensor] | None, *, batch_size: int, edges: bool
) -> Callable[[torch.Generator], Batch]:
    """Batches of cached latents with pyramid noise, where the latents lie; see `SegmentationModel`.

    Args:
        latents: of `cache_scenes`.
        held: of `held_scenes`, beside the latents: also give images and maps, for a decoder.
        edges: train the edges too.
    """

    def batches(generator: torch.Generator) -> Batch:
        rows = torch.randint(len(latents["mask"]), (batch_size,), generator=generator).to(latents["mask"].device)
        drawn = {name: values[rows].float() for name, values in latents.items()}
        maps = scene_maps(held[0][rows], held[1][rows]) if held is not None else None
        return _batch(drawn, maps, edges, generator)

    return batches


def _batch(
    latents: dict[str, Tensor], maps: Sequence[Tensor] | None, edges: bool, generator: torch.Generator
) -> dict[str, Tensor]:
    """A batch of `SegmentationModel`: latents as of `encode_step`; for a decoder images, masks and edges."""
    mask, edge = latents.pop("mask"), latents.pop("edge")
    target = torch.cat([mask, edge]) if edges else mask
    batch = latents | {"target": target, "noise": pyramid_noise(target.shape, generator=generator).to(target)}
    if maps is not None:
        batch["pixels"] = maps[0].to(memory_format=torch.channels_last)
        batch["maps"] = torch.cat([maps[1], maps[2]]) if edges else maps[1]
    return batch


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
    pairs = []
    for mask in sorted((folder / "gt").glob("*.png")):
        if mask.stem not in images:
            continue
        with Image.open(images[mask.stem]) as a, Image.open(mask) as b:
            if a.size == b.size:
                edge = folder / "contour" / mask.name
                pairs.append(MaskedImage(images[mask.stem], mask, edge if edge.is_file() else None))
    if not pairs:
        raise ValueError(f"{folder}: no image in im/ has a mask of the same name and size in gt/")
    return pairs


def read_maps(pair: MaskedImage) -> tuple[Image.Image, Image.Image, Image.Image]:
    """Image (RGB), mask and edge (8-bit grey); the edge is computed at full size where there is none."""
    image, mask = load_image(pair.image), load_image(pair.mask).convert("L")
    if pair.edge is not None:
        return image, mask, load_image(pair.edge).convert("L")
    return image, mask, Image.fromarray(edge_map(torch.from_numpy(np.array(mask))).numpy())


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
    for box in boxes:
        chance, area, aspect, x, y = torch.rand(5, generator=generator).tolist()
        if chance >= 0.5:
            continue
        area, aspect = (0.02 + 0.38 * area) * height * width, 0.3 + (1 / 0.3 - 0.3) * aspect
        w, h = min(width, round((area * aspect) ** 0.5)), min(height, round((area / aspect) ** 0.5))
        left, top = int(x * (width - w + 1)), int(y * (height - h + 1))
        box[top : top + h, left : left + w] = True
    return boxes


def image_batches(
    pairs: Sequence[MaskedImage], encode: Encode, *, size: int, batch_size: int, levels: int, edges: bool, decoder: bool
) -> Callable[[torch.Generator], Batch]:
    """Batches of images from files, augmented as published and encoded on the way.

    Args:
        size: pixels a side of the square that each image is squashed to.
        decoder: also give images and maps, for a decoder.
    """
    pool = ThreadPoolExecutor(READERS)

    def sample(row: int, seed: int) -> list[Tensor]:
        views = augment(*read_maps(pairs[row]), torch.Generator().manual_seed(seed))
        arrays = [np.array(view.resize((size, size), Image.Resampling.BILINEAR)) for view in views]
        return [torch.from_numpy(np.atleast_3d(array)).permute(2, 0, 1) for array in arrays]

    @torch.no_grad()
    def batches(generator: torch.Generator) -> Batch:
        rows = torch.randint(len(pairs), (batch_size,), generator=generator).tolist()
        seeds = torch.randint(2**62, (batch_size,), generator=generator).tolist()
        read = list(pool.map(sample, rows, seeds))
        boxes = draw_boxes(batch_size, (size, size), generator)
        maps = [cut_mix(stretch(torch.stack(kind)), boxes) for kind in zip(*read, strict=True)]
        return _batch(encode_step(encode, *maps, levels=levels), maps if decoder else None, edges, generator)

    return batches
