"""An autoencoder's decoder that draws no grid: trained on alone, for pictures that are painted from latents.

A decoder that doubles the resolution by repeating pixels tends to step more where one latent pixel ends than inside it.
One hardly sees it in a reconstruction, but every border of a large picture's windows lies there, and each looks like a
seam. The loss therefore also compares how steep the pictures are at each place within a latent pixel, and asks the same
of latents that the model has painted, on which the steps are largest and for which there is no picture to compare with.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffrep.files import read_weights, save_weights
from diffrep.images import LUMINANCE
from diffrep.synthesis import SynthesisModel, SynthesisSettings, sample_patches
from diffrep.training.loop import Batch, FitSettings, fit
from diffrep.training.patches import Patches
from diffrep.training.tiny.vae import reconstruction

SMOOTHING = FitSettings(
    steps=4000, learning_rate=4e-4, warmup=100, weight_decay=0.0, ema_decay=0.995, bf16=False, seed=31
)
NOISE = 0.05  # added to the latents, in units of theirs: painted ones are not exact either
BALANCE = 0.05  # weight of uneven `relative_steps`
PAINTED = 192  # patches that the model paints


def relative_steps(images: Tensor, period: int) -> Tensor:
    """How steep images are at each place of a period, relative to all places.

    Args:
        images: (B, 3, H, W), H and W multiples of the period.
        period: pixels, at least 2.

    Returns:
        (2, period): across and down, the mean absolute luminance difference to the next pixel at places 0, 1, ...,
        divided by the mean over the places; the last is the step from one period to the next.
    """
    luminance = images.movedim(1, -1) @ torch.tensor(LUMINANCE, dtype=images.dtype, device=images.device)
    steps = [lines.diff(dim=-1).abs().mean((0, 1)) for lines in (luminance, luminance.mT)]
    values = torch.stack([torch.stack([step[place::period].mean() for place in range(period)]) for step in steps])
    return values / values.mean(1, keepdim=True).clamp_min(1e-12)


class Decoding(nn.Module):
    """A frozen encoder and the decoder that learns."""

    autoencoder: Any

    def __init__(self, model: SynthesisModel) -> None:
        super().__init__()
        self.autoencoder, self.period = model.autoencoder, model.factor
        self.autoencoder.requires_grad_(False)
        for name in ("decoder", "post_quant_conv"):
            part = getattr(self.autoencoder, name, None)
            if part is not None:
                part.requires_grad_(True)

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1], encoded and decoded; noise is of the latents' shape and unit variance."""
        with torch.no_grad():
            encoded = self.autoencoder.encode(images)
            if hasattr(encoded, "latent_dist"):
                latents = encoded.latent_dist.mean + NOISE / self.autoencoder.config.scaling_factor * noise
            else:
                latents = encoded.latents  # goes through the codebook, as painted ones do
        return self.autoencoder.decode(latents).sample


def decoding_losses(module: Decoding, ema: Decoding, batch: Batch) -> Mapping[str, Tensor]:
    """L1, L1 of differences between neighbouring pixels, and uneven `relative_steps`; see `fit`."""
    images = batch["images"]
    decoded = module(images, batch["noise"]).float()
    l1, gradient, psnr = reconstruction(decoded, images)
    balance = (relative_steps(decoded, ema.period) - relative_steps(images, ema.period)).abs().mean()
    painted = module.autoencoder.decode(batch["painted"]).sample.float()
    even = (relative_steps(painted, ema.period) - 1).abs().mean()
    return {
        "loss": l1 + gradient + BALANCE * (balance + even),
        "balance": balance.detach(),
        "painted": even.detach(),
        "psnr": psnr,
    }


def paint_latents(model: SynthesisModel, embeddings: Tensor, file: Path) -> Tensor:
    """Latents (N, c, h, w), not scaled, that a model paints for embeddings (N, D); painted once and kept in `file`."""
    if not file.exists():
        scaled = sample_patches(model, embeddings, SynthesisSettings(seed=SMOOTHING.seed))
        save_weights(file, {"latents": model.unscaled(scaled).half()})
    return read_weights(file)[0]["latents"].float()


def smooth_decoder(
    model: SynthesisModel,
    patches: Patches,
    painted: Tensor,
    folder: Path,
    settings: FitSettings = SMOOTHING,
    *,
    batch_size: int = 8,
    progress: bool = True,
) -> None:
    """Train the decoder of a model's autoencoder on, in place; the latents stay what they are.

    Called again with the same folder, it goes on where it was.

    Args:
        painted: see `paint_latents`.
    """
    decoding = Decoding(model)

    def batches(generator: torch.Generator) -> Batch:
        rows = torch.randint(len(patches), (batch_size,), generator=generator).tolist()
        images = patches.draw(rows, model.window * model.factor, generator)
        noise = torch.randn(batch_size, model.channels, model.window, model.window, generator=generator)
        chosen = torch.randint(len(painted), (batch_size,), generator=generator)
        return {"images": images * 2 - 1, "noise": noise, "painted": painted[chosen]}

    trained = fit(decoding, batches, decoding_losses, settings, folder, progress=progress)
    weights = (trained if settings.ema_decay > 0 else decoding).autoencoder.state_dict()
    model.autoencoder.load_state_dict(weights)
    model.autoencoder.to(model.device).eval().requires_grad_(False)
