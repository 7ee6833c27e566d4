"""How far the embedded models get without labels: `python docs/label_free.py scenes 33 0.02 cpu`.

A U-Net like that of `tiny` learns by the diffusion loss alone, without captions; a transformer like `tiny-dino` learns
from two views of an image. Then features of several taps and timesteps, standardised by channel, are put side by side
and matched on validation pairs: the figures "without labels" of the model card. Told are the folder of rendered scenes,
their number, the minutes of each training and the device.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffrep.backbones.pipelines import load_parts
from diffrep.scenes import SEEN, UNSEEN, render_set
from diffrep.training.loop import FitSettings, fit
from diffrep.training.tiny.crops import jitter
from diffrep.training.tiny.dino import MEAN, DinoSettings, Student, build_vit, dino_loss
from diffrep.training.tiny.measures import ProbePairs, vit_maps
from diffrep.training.tiny.unet import UNetSettings, build_scheduler, build_unet

TAPS = ("mid_block", "up_blocks.0", "up_blocks.1", "up_blocks.2.resnets.0")
TIMESTEPS = (50, 200)
CELLS = 16  # a side of both networks' maps

folder, count, minutes, device = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), torch.device(sys.argv[4])
scenes = render_set(folder, "train", count, workers=1)
images = torch.from_numpy(np.array(scenes.image[:count])).to(device)
parts = load_parts("tiny", pad=False)
vae = parts.vae.to(device).eval().requires_grad_(False)


def windows(batch: int, generator: torch.Generator) -> Tensor:
    """Random windows (B, 2, 3) as `affine_grid` takes them, half of them mirrored."""
    scale = 0.6 + 0.4 * torch.rand(batch, generator=generator)
    x, y = (2 * torch.rand(2, batch, generator=generator) - 1) * (1 - scale)
    flip, none = torch.where(torch.rand(batch, generator=generator) < 0.5, -1.0, 1.0), torch.zeros(batch)
    return torch.stack([scale * flip, none, x, none, scale, y], 1).view(batch, 2, 3)


def through(theta: Tensor, rows: Tensor) -> Tensor:
    pixels = images[rows.to(device)].permute(0, 3, 1, 2).float() / 255
    grid = F.affine_grid(theta.to(device), list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)


class Denoiser(nn.Module):
    """A U-Net that is told nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = build_unet(UNetSettings(), vae.config.latent_channels, CELLS)
        self.register_buffer("context", parts.text.encode([""])[""].context.float())
        self.register_buffer("alphas", build_scheduler().alphas_cumprod.float())

    def forward(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """What is predicted of latents with noise, and what should be."""
        alpha = self.alphas[timesteps].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        context = self.context.expand(len(noisy), -1, -1)
        predicted = self.unet(noisy, timesteps, encoder_hidden_states=context).sample
        return predicted, alpha.sqrt() * noise - (1 - alpha).sqrt() * latents


def encoded(pixels: Tensor) -> Tensor:
    return vae.encode(pixels * 2 - 1).latent_dist.mean.float() * vae.config.scaling_factor


def noised(generator: torch.Generator) -> dict[str, Tensor]:
    rows = torch.randint(count, (BATCH,), generator=generator)
    with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16):
        latents = encoded(through(windows(BATCH, generator), rows))
    noise = torch.randn(latents.shape, generator=generator)
    return {"latents": latents, "noise": noise, "timesteps": torch.randint(1000, (BATCH,), generator=generator)}


def two_views(generator: torch.Generator) -> dict[str, Tensor]:
    """What `dino_loss` takes: a view with hidden cells, another, and where that shows some of the first one's cells."""
    rows = torch.randint(count, (BATCH,), generator=generator)
    first, second = windows(BATCH, generator), windows(BATCH, generator)
    view, other = (jitter(through(one, rows), VIEWS.colour, generator) for one in (first, second))
    cells = torch.rand(BATCH, CELLS**2, generator=generator).argsort(1)[:, : VIEWS.places]
    place = torch.stack([cells % CELLS, cells // CELLS], -1) * (2 / CELLS) + 1 / CELLS - 1
    place = place * first[:, [0, 1], [0, 1]][:, None] + first[:, None, :, 2]
    place = (place - second[:, None, :, 2]) / second[:, [0, 1], [0, 1]][:, None]
    there = ((place + 1) * (CELLS / 2)).floor().long()
    shared = ((there >= 0) & (there < CELLS)).all(-1)
    elsewhere = there[..., 1].clamp(0, CELLS - 1) * CELLS + there[..., 0].clamp(0, CELLS - 1)
    hidden = (torch.rand(BATCH, 1, CELLS, CELLS, generator=generator) < VIEWS.hidden).float()
    blank = F.interpolate(hidden, scale_factor=8.0, mode="nearest").to(device) > 0
    view = torch.where(blank, torch.tensor(MEAN, device=device)[:, None, None], view)
    return {"view": view, "other": other, "cells": cells, "elsewhere": elsewhere, "shared": shared}


def diffusion_loss(module: nn.Module, ema: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    predicted, target = module(batch["latents"], batch["noise"], batch["timesteps"])
    return {"loss": (predicted.float() - target).square().mean()}


@torch.no_grad()
def features(denoiser: Denoiser, pictures: Tensor) -> list[Tensor]:
    """The maps of all taps at all timesteps, under one noise."""
    maps: dict[str, Tensor] = {}
    for tap in TAPS:
        denoiser.unet.get_submodule(tap).register_forward_hook(lambda m, i, out, tap=tap: maps.update({tap: out}))
    chunks: list[list[Tensor]] = []
    for chunk in pictures.split(32):
        latents = encoded(chunk.to(device))
        noise = torch.randn(1, *latents.shape[1:], generator=torch.Generator().manual_seed(0)).to(device)
        chunks.append([])
        for timestep in TIMESTEPS:
            denoiser(latents, noise, torch.full((len(chunk),), timestep, device=device))
            chunks[-1] += [F.interpolate(maps[tap], (CELLS, CELLS), mode="bilinear").cpu() for tap in TAPS]
    return [torch.cat(parts) for parts in zip(*chunks, strict=True)]


BATCH, VIEWS = (256 if device.type == "cuda" else 8), DinoSettings(crop=128, hidden=0.3, places=48)
runs = {"steps": 100_000, "minutes": minutes}
torch.manual_seed(4)
denoiser = fit(
    Denoiser(),
    noised,
    diffusion_loss,
    FitSettings(**runs, learning_rate=1.2e-3, seed=4),
    folder / "unet",
    device=device,
)
torch.manual_seed(2)
BATCH //= 4
student = Student(build_vit(VIEWS), VIEWS)
student = fit(
    student, two_views, dino_loss, FitSettings(**runs, ema_decay=0.996, seed=2), folder / "vit", device=device
)
for group, categories in (("seen", SEEN), ("unseen", UNSEEN)):
    pairs = ProbePairs.render(10 if count > 1000 else 1, categories)
    sides = [features(denoiser, pictures) for pictures in (pairs.sources, pairs.targets)]
    tokens = [
        vit_maps(student.network.to(device), pictures.to(device)).cpu() for pictures in (pairs.sources, pairs.targets)
    ]
    both = [torch.cat(maps) for maps in zip(*sides, strict=True)]
    spread = [(maps.mean((0, 2, 3), keepdim=True), maps.std((0, 2, 3), keepdim=True) + 1e-6) for maps in both]
    alike = [[(m - mean) / std for m, (mean, std) in zip(maps, spread, strict=True)] for maps in sides]
    rows = {"one tap": [[maps[2]] for maps in sides], "joined": alike, "views": [[maps] for maps in tokens]}
    rows["joined and views"] = [[*maps, *[own] * len(maps)] for maps, own in zip(alike, tokens, strict=True)]
    print(group, {name: round(pairs.pck(*maps), 1) for name, maps in rows.items()})
