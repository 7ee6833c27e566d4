"""A model without a network: what it predicts is plain arithmetic, so that only the sampler is tested."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from diffrep.synthesis import About


class Painter:
    """Predicts the noise of latents whose clean values are the first numbers of the embedding.

    Decoding repeats each latent pixel `factor` times.
    """

    def __init__(
        self, *, window: int = 8, channels: int = 3, factor: int = 4, dim: int = 6, calls_left: int = 10**9
    ) -> None:
        self.window, self.channels, self.factor = window, channels, factor
        self.scheduler: dict[str, Any] = {
            "num_train_timesteps": 1000,
            "beta_start": 0.0015,
            "beta_end": 0.0195,
            "beta_schedule": "scaled_linear",
            "prediction_type": "epsilon",
        }
        self.about = About(guidance=1.0)
        self.embedder = SimpleNamespace(dims=(dim,))
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.calls_left = calls_left
        self.name = "painter"
        betas = torch.linspace(0.0015**0.5, 0.0195**0.5, 1000, dtype=torch.float64) ** 2
        self.alphas = (1 - betas).cumprod(0).float()

    def context(self, *embeddings: Tensor) -> Tensor:
        return embeddings[0][:, None, : self.channels]

    def null_context(self, batch: int = 1) -> Tensor:
        return torch.zeros(batch, 1, self.channels)

    def __call__(self, latents: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        if not self.calls_left:
            raise KeyboardInterrupt
        self.calls_left -= 1
        alpha = self.alphas[int(timesteps)]
        clean = 0.1 * context[:, 0, :, None, None].tanh()
        # the neighbours count, as for a network: a window must be given whole
        blurred = torch.nn.functional.avg_pool2d(latents, 3, 1, 1)
        return 0.5 * ((latents - alpha.sqrt() * clean) / (1 - alpha).sqrt()) + 0.5 * blurred

    def decode(self, latents: Tensor, *, quantize: bool = True) -> Tensor:
        if not self.calls_left:
            raise KeyboardInterrupt
        self.calls_left -= 1
        image = latents[:, :3] - latents[:, :3].mean((2, 3), keepdim=True) * 0.5  # sees its whole input, as decoders do
        return (image * 0.2 + 0.5).repeat_interleave(self.factor, 2).repeat_interleave(self.factor, 3)

    def checksum(self) -> str:
        return "painter"
