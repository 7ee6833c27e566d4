"""The training step of DiffDIS: what its U-Net is shown, and what is minimised (arXiv 2410.10105 and its code).

The noised latents of mask and edge go in with the image's, at the last timestep; the loss is the squared error of the
clean latents that the one-step formula gives, mask plus edge. Where the VAE cannot draw sharp masks, a decoder of its
own is trained along by the error of the drawn masks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffrep.images import shrink
from diffrep.training.loop import Batch

TIMESTEP = 999
DISCOUNT = 0.8  # of pyramid noise, from one level to the next
DRAWN_WEIGHT = 10.0  # brings the cross-entropy of drawn maps to the size of the error of latents
EDGE_THRESHOLD = 6  # grey levels
PUBLISHED_FASTER = (("class_embedding", 10.0),)  # `FitSettings.faster`: the embedding of the branches learns faster


class Schedule(Protocol):
    """The noise schedule of a diffusion model; `diffrep.heads.one_step.Schedule` is one."""

    def clean(self, output: Tensor, noisy: Tensor, timestep: int) -> Tensor: ...

    def add_noise(self, clean: Tensor, noise: Tensor, timestep: int) -> Tensor: ...


def edge_map(masks: Tensor, *, window: int = 5, threshold: float = EDGE_THRESHOLD) -> Tensor:
    """Edge ground truth: where the dilated mask and the eroded one differ; what lies outside does not count.

    Args:
        masks: (..., H, W), grey levels in 0..255, any dtype.
        window: pixels a side of the square that dilates and erodes.

    Returns:
        (..., H, W) uint8, 255 where the difference is `threshold` or more, else 0.
    """
    maps = masks.reshape(-1, 1, *masks.shape[-2:]).float()
    radius = window // 2
    spread = F.max_pool2d(maps, window, 1, radius) + F.max_pool2d(-maps, window, 1, radius)
    return ((spread >= threshold).to(torch.uint8) * 255).reshape(masks.shape)


def pyramid_noise(
    shape: Sequence[int],
    *,
    discount: float = DISCOUNT,
    levels: int = 10,
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
        draws, uniforms: given instead of drawn: the noise of the base and of each level, and (r - 2) / 2.
    """
    batch, channels, height, width = shape

    def draw(number: int, size: tuple[int, int]) -> Tensor:
        if draws is not None:
            return draws[number]
        return torch.randn(batch, channels, *size, generator=generator)

    noise = draw(0, (height, width)).clone()
    size = (height, width)
    for level in range(levels):
        u = float(uniforms[level]) if uniforms is not None else float(torch.rand((), generator=generator))
        factor = (u * 2 + 2) ** level
        size = (max(1, int(size[0] / factor)), max(1, int(size[1] / factor)))
        coarse = draw(level + 1, size)
        noise = noise + F.interpolate(coarse, size=(height, width), mode="bilinear") * discount**level
        if 1 in size:
            break
    return noise / noise.std()


def stretch(values: Tensor) -> Tensor:
    """Each sample (C, H, W) of a batch to [0, 1] by its extremes over all its values; a constant one becomes 0."""
    values = values.float()
    low, high = values.amin((-3, -2, -1), keepdim=True), values.amax((-3, -2, -1), keepdim=True)
    return (values - low) / (high - low).clamp(min=1e-12)


def cut_mix(values: Tensor, boxes: Tensor) -> Tensor:
    """Inside its own box each sample shows its partner: samples 0 and 1, 2 and 3, ... are partners.

    Args:
        values: (B, C, H, W), B even.
        boxes: (B, H, W) bool.

    Raises:
        ValueError: B is odd.
    """
    if len(values) % 2:
        raise ValueError(f"cut_mix needs an even batch, got {len(values)}")
    partner = torch.arange(len(values), device=values.device) ^ 1
    return torch.where(boxes[:, None], values[partner], values)


def encode_step(
    encode: Callable[[Tensor], Tensor],
    images: Tensor,
    masks: Tensor,
    edges: Tensor,
    *,
    levels: int,
) -> dict[str, Tensor]:
    """Latents of one training batch.

    Args:
        encode: pixels (B, 3, H, W) in [0, 1] to scaled latents.
        images: (B, 3, H, W); masks, edges: (B, 1, H, W); all in [0, 1].

    Returns:
        "image 0", "image 1", ... of the image and its smaller versions; "mask", "edge".
    """
    found = {f"image {k}": encode(view) for k, view in enumerate(shrink(images, levels))}
    for name, maps in (("mask", masks), ("edge", edges)):
        found[name] = encode(maps.expand(-1, 3, -1, -1))
    return found


class SegmentationModel(nn.Module):
    """What is trained: a DiffDIS U-Net, and a decoder where the VAE's is not used.

    Args:
        unet: `diffrep.heads.diffdis.DiffDisUNet`.
        context: (1, tokens, C), the embedding of the empty prompt.
        decoder: (scaled latents, pixels in [0, 1]) -> (B, 1, H, W) logits.
    """

    def __init__(self, unet: nn.Module, context: Tensor, schedule: Schedule, decoder: nn.Module | None = None) -> None:
        super().__init__()
        self.unet, self.schedule, self.decoder = unet, schedule, decoder
        self.context: Tensor
        self.register_buffer("context", context.detach().clone())

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
        names = sorted((name for name in batch if name.startswith("image ")), key=lambda name: int(name.split()[1]))
        latents = [batch[name] for name in names]
        target, images = batch["target"], len(latents[0])
        noisy = self.schedule.add_noise(target, batch["noise"], TIMESTEP)
        with_edges = len(target) == 2 * images
        output = self.unet(latents, noisy, self.context, timestep=TIMESTEP, edges=with_edges)
        found = {"noisy": noisy, "output": output, "clean": self.schedule.clean(output.float(), noisy, TIMESTEP)}
        if self.decoder is not None:
            pixels = batch["pixels"].repeat(2 if with_edges else 1, 1, 1, 1)
            found["logits"] = self.decoder(found["clean"], pixels)
        return found


def segmentation_losses(module: nn.Module, ema: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
    """Squared error of the clean latents, of masks plus of edges; see `fit`.

    With a decoder, `DRAWN_WEIGHT` times its maps' binary cross-entropy with "maps" (rows, 1, H, W) in [0, 1] is added.
    """
    found = module(batch)
    images = len(batch["image 0"])
    errors = (found["clean"] - batch["target"].float()).square()
    losses = {name: rows.mean() for name, rows in zip(("mask", "edge"), errors.split(images), strict=False)}
    total = torch.stack(list(losses.values())).sum()
    if "logits" in found:
        entropy = F.binary_cross_entropy_with_logits(found["logits"].float(), batch["maps"].float(), reduction="none")
        names = ("drawn mask", "drawn edge")
        drawn = {name: rows.mean() for name, rows in zip(names, entropy.split(images), strict=False)}
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
