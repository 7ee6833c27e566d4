"""SSL-conditioned latent diffusion: denoise the latent of a patch, told a frozen encoder's embedding of the patch.

The objective of Graikos, Yellapragada et al. (CVPR 2024): the mean squared error of the predicted noise (or v, as the
schedule says), with the raw embedding of some samples replaced by zeros. Optionally with condition embedding
perturbation (CEP; Chen et al., "Slight corruption in pre-training data makes better diffusion models", NeurIPS 2024):
noise on the token itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diffrep.synthesis import SynthesisModel
from diffrep.training.loop import Batch

Cep = Literal["none", "uniform", "normal"]


@dataclass(frozen=True)
class Denoised:
    """One training step's tensors, (B, c, h, w) each: what the U-Net saw, what it said, what it should have said."""

    noisy: Tensor
    predicted: Tensor
    target: Tensor

    @property
    def loss(self) -> Tensor:
        """Mean squared error, ()."""
        return (self.predicted.float() - self.target.float()).square().mean()


class Objective(nn.Module):
    """A synthesis model with its training objective."""

    def __init__(self, model: SynthesisModel) -> None:
        super().__init__()
        self.model = model
        self.prediction = model.scheduler.get("prediction_type", "epsilon")
        if self.prediction not in ("epsilon", "v_prediction"):
            raise ValueError(f"{model.name}: predicts {self.prediction}; epsilon and v_prediction can be trained")
        self.alphas_cumprod: Tensor
        self.register_buffer("alphas_cumprod", model.alphas_cumprod.float())

    def forward(
        self,
        latents: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        embeddings: Sequence[Tensor],
        *,
        dropped: Sequence[Tensor] = (),
        perturbation: Tensor | None = None,
    ) -> Denoised:
        """Noise the latents and predict the noise, or v.

        Args:
            latents, noise: (B, c, h, w).
            timesteps: (B,), 0..T-1.
            embeddings: raw, (B, dim) for each token.
            dropped: (B,) bool for each token: samples whose embedding becomes zeros, so that their token is the
                null one (official code). Missing ones drop nothing.
            perturbation: (B, tokens, width), added to the tokens that are not dropped.
        """
        alpha = self.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        target = noise if self.prediction == "epsilon" else alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
        kept = [~drop for drop in dropped] + [torch.ones_like(timesteps, dtype=torch.bool)] * (
            len(embeddings) - len(dropped)
        )
        context = self.model.context(*(e * keep[:, None] for e, keep in zip(embeddings, kept, strict=True)))
        if perturbation is not None:
            context = context + perturbation * torch.stack(kept, dim=1)[..., None]
        return Denoised(noisy, self.model(noisy, timesteps, context), target)


def draw_perturbation(shape: Sequence[int], kind: Cep, gamma: float, generator: torch.Generator) -> Tensor | None:
    """CEP noise for tokens (B, tokens, d), or None for "none".

    Per element uniform in [-gamma, gamma] / sqrt(d), or normal with standard deviation gamma / sqrt(d) (CEP-U, CEP-G).
    """
    scale = gamma / math.sqrt(shape[-1])
    if kind == "none":
        return None
    if kind == "uniform":
        return (2 * torch.rand(*shape, generator=generator) - 1) * scale
    return torch.randn(*shape, generator=generator) * scale


def synthesis_loss(module: Any, ema: Any, batch: Batch) -> Mapping[str, Tensor]:
    """Loss of an `Objective` on a batch of `patch_batches`; see `fit`."""
    denoised: Denoised = module(
        batch["latents"],
        batch["noise"],
        batch["timesteps"],
        [batch["embeddings"]],
        dropped=[batch["dropped"]],
        perturbation=batch.get("perturbation"),
    )
    return {"loss": denoised.loss}
