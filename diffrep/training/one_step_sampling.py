"""What a model in training predicts: the clean latent in one step or by DDIM, decoded to a map."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffrep.backbones.noise import draw_noise
from diffrep.training.one_step import OneStepModel, Task, task_vector


@torch.no_grad()
def predict_latents(model: OneStepModel, images: Tensor, *, steps: int = 1, seed: int = 0) -> Tensor:
    """Annotation latents of image latents.

    One step asks the recipe's timestep; more are DDIM (eta 0) with trailing spacing.

    Args:
        images: (B, c, h, w), scaled.
        seed: of the noise that recipes with noise start from, the same for all images.

    Raises:
        ValueError: several steps of a recipe that is trained on one timestep.
    """
    recipe = model.recipe
    if steps > 1 and recipe.timesteps == "one":
        raise ValueError(f"this recipe predicts in one step, got steps={steps}")
    tasks = task_vector(annotate=True).to(images).expand(len(images), 4) if recipe.task_vector else None
    noise = draw_noise(images.shape[1:], seed).to(images).expand_as(images) if recipe.first == "noise" else None
    total = len(model.alphas_cumprod)
    asked = [round(total - i * total / steps) - 1 for i in range(steps)] if steps > 1 else [recipe.timestep]
    noisy = noise if noise is not None else model.noisy(images, None, torch.empty(0))
    clean = images
    for step, timestep in enumerate(asked):
        timesteps = torch.full((len(images),), timestep, device=images.device)
        output = model(model.inputs(images, noisy), timesteps, tasks)
        clean = model.clean(output, noisy, timesteps)
        if step + 1 < steps and noisy is not None:
            now, later = (float(model.alphas_cumprod[t]) for t in (timestep, asked[step + 1]))
            drawn = (noisy - now**0.5 * clean) / (1 - now) ** 0.5
            noisy = later**0.5 * clean + (1 - later) ** 0.5 * drawn
    return clean


@torch.no_grad()
def predict_maps(
    model: OneStepModel, vae: Any, pixels: Tensor, task: Task, *, steps: int = 1, seed: int = 0, batch_size: int = 16
) -> Tensor:
    """Maps of images, decoded.

    Args:
        pixels: (B, 3, H, W) in [-1, 1], sides that are multiples of the VAE's stride.

    Returns:
        (B, 1, H, W) in [0, 1] for depth and disparity; (B, 3, H, W) normals in LUB as they are decoded, short where
        there is no surface.
    """
    factor, maps = vae.config.scaling_factor, []
    for chunk in pixels.split(batch_size):
        images = vae.encode(chunk).latent_dist.mean * factor
        decoded = vae.decode(predict_latents(model, images, steps=steps, seed=seed) / factor).sample.float()
        if task == "normals":
            maps.append(decoded.clamp(-1, 1))
        else:  # Lotus: each channel is clamped, then averaged
            maps.append(decoded.clamp(-1, 1).mean(1, keepdim=True) / 2 + 0.5)
    return torch.cat(maps)
