"""Refinement: a diffusion model goes over a pasted or swapped image until it looks like one of its own.

The image gets noise up to some timestep and is denoised again (SDEdit, arXiv:2108.01073); outside of a mask every
step is overwritten with the noised original, so that only the object changes (Blended Diffusion, arXiv:2111.14818).
sd-dino describes its refinement as DDIM inversion and sampling with injected features, but never released it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from diffrep.backbones import BackboneError, LatentDiffusion, draw_noise
from diffrep.backbones.loading import load_component
from diffrep.images import Sizing, fit_image, stack_pixels
from diffrep.settings import RefineConfig
from diffrep.swap import composite


@torch.inference_mode()
def refine(
    image: Image.Image,
    backbone: LatentDiffusion,
    config: RefineConfig | None = None,
    *,
    mask: Tensor | None = None,
    feather: float = 1.5,
) -> Image.Image:
    """Let a diffusion model draw an image, or what a mask selects of it, again from partial noise.

    The model sees the square around the mask, with a margin, at its own resolution.

    Args:
        image: RGB.
        backbone: its U-Net and VAE encoder are used; the VAE decoder is read from its folder.
        mask: (H', W') over the whole image, at any resolution: what may change; everything where None.
        feather: softness of the mask's edge, pixels of the image.

    Returns:
        RGB of the same size.

    Raises:
        ValueError: the mask is empty.
        BackboneError: the backbone's folder has no VAE with a decoder.
    """
    config = config or RefineConfig()
    box = _square_around(mask, image.size)
    crop = image.crop(box) if mask is not None else image
    side = backbone.recommended.sizing.size
    canvas = Sizing("pad", side if isinstance(side, int) else max(side or (512,)), resample="lanczos", fill="edge")
    pixels, placement = fit_image(crop, canvas)
    inside = None
    if mask is not None:
        cut = Image.fromarray((mask > 0).cpu().numpy()).resize(image.size, Image.Resampling.NEAREST).crop(box)
        fitted, _ = fit_image(cut.convert("RGB"), Sizing("pad", canvas.size, resample="bilinear"))
        inside = F.max_pool2d(fitted[:1][None].float() / 255, backbone.stride)
    drawn = denoise_again(stack_pixels([pixels]), backbone, config, inside=inside)[0]
    x0, y0, x1, y1 = (round(v) for v in placement.content_box)
    array = (drawn[:, y0:y1, x0:x1].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    patch = Image.fromarray(array).resize(crop.size, Image.Resampling.LANCZOS)
    if mask is None:
        return patch
    whole = image.copy()
    whole.paste(patch, box[:2])
    return composite(image, whole, mask, feather=feather)


def denoise_again(
    pixels: Tensor, backbone: LatentDiffusion, config: RefineConfig, *, inside: Tensor | None = None
) -> Tensor:
    """Add noise to images and denoise them by DDIM.

    Args:
        pixels: (B, 3, H, W) in [0, 1], sides multiples of the backbone's.
        inside: (1, 1, H / stride, W / stride) in [0, 1]: which latent cells may change; None: all.

    Returns:
        (B, 3, H, W), about [0, 1], not clamped.
    """
    mean, _ = backbone.encode(pixels)
    clean = backbone.scale(mean)
    noise = draw_noise(clean.shape[1:], config.seed).to(clean)
    context = backbone.embed(config.prompt).context
    plain = backbone.embed("").context if config.guidance != 1 else None
    first = max(round(config.strength * len(backbone.alphas_cumprod)) - 1, 0)
    times = torch.linspace(first, 0, min(config.steps, first + 1)).round().long().tolist()

    def original(timestep: int) -> Tensor:
        return clean if timestep < 0 else backbone.add_noise(clean, noise, timestep)

    latents = original(times[0])
    for before, after in zip(times, [*times[1:], -1], strict=True):
        seen = backbone.predict_noise(latents, before, context)
        if plain is not None:
            without = backbone.predict_noise(latents, before, plain)
            seen = without + config.guidance * (seen - without)
        latents, _ = backbone.ddim_step(latents, seen, before, after)
        if inside is not None:
            latents = torch.lerp(original(after), latents, inside.to(latents))
    vae = _decoder_of(backbone)
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    decoded: Tensor = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor + shift).sample
    return decoded.float() / 2 + 0.5


def _decoder_of(backbone: LatentDiffusion) -> Any:
    """The whole VAE of a backbone's folder: extraction has given its decoder away."""
    from diffusers import AutoencoderKL

    from diffrep.backbones.loading import local_variant

    folder = Path(backbone.source)
    if folder.is_dir() and not (folder / "vae").is_dir():
        raise BackboneError(f"{backbone.source}: has no folder vae/, nothing can be decoded")
    variant = local_variant(folder / "vae") if folder.is_dir() else None
    # decoded in float32: some VAEs overflow in half precision
    vae = load_component(AutoencoderKL, backbone.source, "vae", torch.float32, variant)
    return vae.to(backbone.device).eval()


def _square_around(mask: Tensor | None, size: tuple[int, int], margin: float = 0.15) -> tuple[int, int, int, int]:
    """x0, y0, x1, y1 of a square around the mask with a margin, inside the image of (width, height) where it fits."""
    width, height = size
    if mask is None:
        return 0, 0, width, height
    rows, columns = (np.flatnonzero((mask > 0).cpu().numpy().any(axis)) for axis in (1, 0))
    if not len(rows):
        raise ValueError("there is nothing to refine: the mask is empty")
    y0, y1 = rows[0] * height / mask.shape[0], (rows[-1] + 1) * height / mask.shape[0]
    x0, x1 = columns[0] * width / mask.shape[1], (columns[-1] + 1) * width / mask.shape[1]
    side = (1 + 2 * margin) * max(x1 - x0, y1 - y0)

    def span(low: float, high: float, length: int) -> tuple[int, int]:
        start = min(max((low + high - side) / 2, 0), max(length - side, 0))
        return int(start), min(length, int(np.ceil(start + side)))

    (left, right), (top, bottom) = span(x0, x1, width), span(y0, y1, height)
    return left, top, right, bottom
