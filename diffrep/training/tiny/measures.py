"""Measures of the embedded models on validation scenes, for their card: not the benchmark.

Pairs show different objects of one category from any side, every third pair with a mirrored target. The benchmark
(`diffrep.eval.scenes`) uses the test split, which nothing here touches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from diffrep.scenes import SEEN, UNSEEN, mirror, render_scene, scene_pairs
from diffrep.training.tiny.dino import patch_tokens
from diffrep.training.tiny.unet import CaptionedDenoiser, caption_tokenizer, tokenize
from diffrep.training.tiny.vae import psnr


@dataclass(frozen=True)
class ProbePairs:
    """P rendered pairs: images (P, 3, S, S) in [0, 1] and, per pair, points (x, y) in pixels."""

    sources: Tensor
    targets: Tensor
    queries: tuple[Tensor, ...]
    truth: tuple[Tensor, ...]
    scale: tuple[float, ...]  # longer side of the target's box, pixels

    @classmethod
    def render(cls, per_category: int, categories: Sequence[str], *, size: int = 128) -> ProbePairs:
        """Render pairs of the validation split."""
        rows = []
        for seed_a, seed_b, category, mirrored in scene_pairs("val", per_category, categories=categories, seed=0):
            a, b = (render_scene(seed, category=category, size=size) for seed in (seed_a, seed_b))
            b = mirror(b) if mirrored else b
            both = np.flatnonzero(a.visible & b.visible)
            images = [torch.from_numpy(s.image.copy()).permute(2, 0, 1).float() / 255 for s in (a, b)]
            x0, y0, x1, y1 = b.box
            points = [torch.from_numpy(s.keypoints[both]) for s in (a, b)]
            rows.append((*images, *points, float(max(x1 - x0, y1 - y0))))
        sources, targets, queries, truth, scale = zip(*rows, strict=True)
        return cls(torch.stack(sources), torch.stack(targets), queries, truth, scale)

    def pck(self, sources: Sequence[Tensor], targets: Sequence[Tensor], *, alpha: float = 0.1) -> float:
        """Share of points whose best place lies within alpha of the target's box, in percent.

        Args:
            sources, targets: maps (P, C, h, w); several are normalised per cell and laid side by side.
        """
        joined = []
        for maps in (sources, targets):
            size = maps[0].shape[-2:]
            resized = [
                m.float() if m.shape[-2:] == size else F.interpolate(m.float(), size, mode="bilinear") for m in maps
            ]
            joined.append(F.normalize(torch.cat([F.normalize(m, dim=1) for m in resized], dim=1), dim=1))
        side, hits = self.sources.shape[-1], []
        for i, (points, truth) in enumerate(zip(self.queries, self.truth, strict=True)):
            if not len(points):
                continue
            grid = ((points + 0.5) * (2 / side) - 1)[None, None]
            queries = F.grid_sample(joined[0][i : i + 1], grid, padding_mode="border", align_corners=False)[0, :, 0]
            similarity = torch.einsum("cn,chw->nhw", F.normalize(queries, dim=0), joined[1][i])
            dense = F.interpolate(similarity[None], size=(side // 2, side // 2), mode="bilinear")[0]
            best = dense.flatten(1).argmax(1)
            place = torch.stack([best % (side // 2), best // (side // 2)], -1) * 2 + 0.5
            hits.append(torch.linalg.vector_norm(place - truth, dim=-1) <= alpha * self.scale[i])
        return 100 * torch.cat(hits).float().mean().item()


@torch.no_grad()
def vit_maps(network: Any, images: Tensor) -> Tensor:
    """The raw output of the last block of a timm ViT for images (B, 3, H, W) in [0, 1]: (B, C, h, w)."""
    tokens = torch.cat([patch_tokens(network, chunk) for chunk in images.split(32)])
    return tokens.mT.unflatten(2, (-1, images.shape[-1] // network.patch_embed.feat_ratio()))


@torch.no_grad()
def unet_maps(vae: Any, model: CaptionedDenoiser, images: Tensor, *, timestep: int = 50) -> list[Tensor]:
    """The tapped maps for images (B, 3, H, W) in [0, 1], with the empty caption and, as in extraction, one noise."""
    null, alpha, parts = tokenize(caption_tokenizer(), [""]), model.alphas_cumprod[timestep], []
    for chunk in images.split(32):
        latents = vae.encode(chunk * 2 - 1).latent_dist.mean * vae.config.scaling_factor
        noise = torch.randn(1, *latents.shape[1:], generator=torch.Generator().manual_seed(0))
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        parts.append(model(noisy, torch.full((len(chunk),), timestep), null.expand(len(chunk), -1))[1])
    return [torch.cat(maps) for maps in zip(*parts, strict=True)]


def measure(count: int, vae: Any, denoisers: Sequence[CaptionedDenoiser], vits: Sequence[Any]) -> dict[str, Any]:
    """PSNR of the autoencoder; PCK@0.1 of both networks and of both together, label-free and after joint training.

    Args:
        count: pairs of each category.
        denoisers, vits: of the label-free and the joint phase.
    """
    measured: dict[str, Any] = {}
    for group, categories in (("seen", SEEN), ("unseen", UNSEEN)):
        pairs = ProbePairs.render(count, categories)
        measured[group] = {"pairs": len(pairs.sources), "points": sum(map(len, pairs.queries))}
        if group == "seen":
            measured["psnr"] = psnr(vae, pairs.sources)
        for phase, denoiser, vit in zip(("label-free", "joint"), denoisers, vits, strict=True):
            (a, vit_a), (b, vit_b) = (
                (unet_maps(vae, denoiser, images), vit_maps(vit, images)) for images in (pairs.sources, pairs.targets)
            )
            taps = {f"pck {tap}": pairs.pck([x], [y]) for tap, x, y in zip(denoiser.settings.taps, a, b, strict=True)}
            measured[group][phase] = {
                "unet": taps | {"pck together": pairs.pck(a[::-1], b[::-1])},
                "vit": {"pck": pairs.pck([vit_a], [vit_b])},
                "fused": pairs.pck([a[-1], vit_a], [b[-1], vit_b]),
            }
    return measured
