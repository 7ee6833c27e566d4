"""A small measure of matching on validation scenes, to watch while training: not the benchmark.

Pairs show different objects of one category from any side, every third pair with a mirrored target. The benchmark
(`diffrep.eval.scenes`) uses the test split, which nothing here touches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from diffrep.scenes import SEEN, mirror, render_scene, scene_pairs


@dataclass(frozen=True)
class ProbePairs:
    """Rendered pairs: images (P, 3, S, S) in [0, 1] and points (x, y) in pixels, per pair."""

    sources: Tensor
    targets: Tensor
    asked: tuple[Tensor, ...]
    truth: tuple[Tensor, ...]
    scale: tuple[float, ...]  # longer side of the target's box, pixels
    category: tuple[str, ...]

    @classmethod
    def render(
        cls, per_category: int, *, categories: Sequence[str] = SEEN, size: int = 128, seed: int = 0
    ) -> ProbePairs:
        """Render pairs of the validation split."""
        images: tuple[list[Tensor], list[Tensor]] = ([], [])
        asked, truth, scale, kinds = [], [], [], []
        for seed_a, seed_b, category, mirrored in scene_pairs("val", per_category, categories=categories, seed=seed):
            a, b = (render_scene(s, category=category, size=size) for s in (seed_a, seed_b))
            b = mirror(b) if mirrored else b
            both = np.flatnonzero(a.visible & b.visible)
            for store, scene in zip(images, (a, b), strict=True):
                store.append(torch.from_numpy(scene.image.copy()).permute(2, 0, 1).float() / 255)
            asked.append(torch.from_numpy(a.keypoints[both]))
            truth.append(torch.from_numpy(b.keypoints[both]))
            x0, y0, x1, y1 = b.box
            scale.append(float(max(x1 - x0, y1 - y0)))
            kinds.append(category)
        return cls(
            torch.stack(images[0]), torch.stack(images[1]), tuple(asked), tuple(truth), tuple(scale), tuple(kinds)
        )

    def hits(self, sources: Sequence[Tensor], targets: Sequence[Tensor], *, alpha: float = 0.1) -> list[Tensor]:
        """Which points are found, per pair.

        Args:
            sources, targets: maps (P, C, h, w); several are normalised per cell and laid side by side.
        """
        joined = []
        for maps in (sources, targets):
            size = maps[0].shape[-2:]
            resized = [m.float() if m.shape[-2:] == size else _resize(m, size) for m in maps]
            joined.append(F.normalize(torch.cat([F.normalize(m, dim=1) for m in resized], dim=1), dim=1))
        side = self.sources.shape[-1]
        found = []
        for i, (points, truth) in enumerate(zip(self.asked, self.truth, strict=True)):
            if not len(points):
                continue
            grid = ((points + 0.5) * (2 / side) - 1)[None, None]
            asked = F.grid_sample(joined[0][i : i + 1], grid, padding_mode="border", align_corners=False)[0, :, 0]
            similarity = torch.einsum("cn,chw->nhw", F.normalize(asked, dim=0), joined[1][i])
            dense = F.interpolate(similarity[None], size=(side // 2, side // 2), mode="bilinear")[0]
            best = dense.flatten(1).argmax(1)
            place = torch.stack([best % (side // 2), best // (side // 2)], -1) * 2 + 0.5
            found.append(torch.linalg.vector_norm(place - truth, dim=-1) <= alpha * self.scale[i])
        return found

    def pck(self, sources: Sequence[Tensor], targets: Sequence[Tensor], *, alpha: float = 0.1) -> float:
        """Share of points found, in percent."""
        return 100 * torch.cat(self.hits(sources, targets, alpha=alpha)).float().mean().item()


def _resize(maps: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    return F.interpolate(maps.float(), size=tuple(size), mode="bilinear")


@torch.no_grad()
def vit_maps(network: Any, images: Tensor, *, layer: int = -1) -> Tensor:
    """The raw output of a block of a timm ViT for images (B, 3, H, W) in [0, 1]: (B, C, h, w)."""
    from diffrep.training.tiny.dino import MEAN, STD

    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    found = []
    for chunk in images.split(32):
        x = network._pos_embed(network.patch_embed((chunk - mean) / std))
        for block in network.blocks[: len(network.blocks) + 1 + layer]:
            x = block(x)
        tokens = x[:, network.num_prefix_tokens :]
        found.append(tokens.mT.unflatten(2, (-1, chunk.shape[-1] // network.patch_embed.feat_ratio())))
    return torch.cat(found)


@torch.no_grad()
def unet_maps(vae: Any, model: Any, null: Tensor, images: Tensor, *, timestep: int = 50, seed: int = 0) -> list[Tensor]:
    """The tapped maps of a `CaptionedDenoiser` for images (B, 3, H, W) in [0, 1], with the empty caption."""
    found: list[list[Tensor]] = []
    noise = None
    for chunk in images.split(32):
        latents = vae.encode(chunk * 2 - 1).latent_dist.mean * vae.config.scaling_factor
        if noise is None:  # the same for every image, as extraction draws it
            noise = torch.randn(1, *latents.shape[1:], generator=torch.Generator().manual_seed(seed))
        alpha = model.alphas_cumprod[timestep]
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        steps = torch.full((len(chunk),), timestep)
        found.append(model(noisy, steps, null.expand(len(chunk), -1))[1])
    return [torch.cat(maps) for maps in zip(*found, strict=True)]


def probe_vit(pairs: ProbePairs, network: Any) -> Mapping[str, float]:
    """PCK@0.1 of a ViT's last block."""
    return {"pck": pairs.pck([vit_maps(network, pairs.sources)], [vit_maps(network, pairs.targets)])}


def probe_unet(pairs: ProbePairs, vae: Any, model: Any, null: Tensor) -> Mapping[str, float]:
    """PCK@0.1 of each trained tap, and of all together."""
    sources, targets = (unet_maps(vae, model, null, images) for images in (pairs.sources, pairs.targets))
    rows = {f"pck {tap}": pairs.pck([a], [b]) for tap, a, b in zip(model.settings.taps, sources, targets, strict=True)}
    return rows | {"pck together": pairs.pck(sources[::-1], targets[::-1])}
