"""The autoencoder: a stock `AutoencoderKL` that starts as the best linear one and learns the rest on top.

Group-normalised convolutions take thousands of steps to learn plain colour; a linear code of 8 x 8 patches has
24 dB or more at once. `start_linear` therefore fits the convolutions alone, as one linear chain, and then sets the
network so that it computes just that chain: residual branches end in zeros, and the SiLU in front of each last
convolution is made linear by pairs of channels x and -x (silu(x) - silu(-x) = x), with a pair of large constant
channels in each group that pins the variance by which the group norm divides.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffrep.devices import initial_weights
from diffrep.scenes import SceneSet
from diffrep.settings import check
from diffrep.training.loop import Batch, FitSettings, fit, step_generator
from diffrep.training.tiny.crops import Crops, gather, jitter

_CONSTANT = 16.0  # of the channels that pin a group's variance, in units of the signal


LINEAR = FitSettings(steps=900, learning_rate=5e-3, warmup=20, ema_decay=0.98, bf16=False, weight_decay=0.0)
FIT = FitSettings(steps=2400, minutes=6, learning_rate=1e-4, weight_decay=0.0, seed=1)


@dataclass(frozen=True, kw_only=True)
class VaeSettings:
    """The autoencoder and its training."""

    channels: tuple[int, ...] = (16, 32, 64, 64)  # per level; each but the last halves the resolution
    latent_channels: int = 8
    groups: int = 4  # of the group norms
    crop: int = 64  # pixels a side of the training crops
    colour: float = 0.3  # strength of the colour changes
    noise: float = 0.05  # standard deviation of the posterior, in units of the latents
    gradient: float = 1.0  # weight of the loss on differences between neighbouring pixels
    kl: float = 1e-4  # weight of the KL term
    linear: FitSettings = LINEAR
    fit: FitSettings = FIT
    batch_size: int = 16

    def __post_init__(self) -> None:
        check(self)


def build_vae(settings: VaeSettings) -> Any:
    """An `AutoencoderKL` with random weights: no attention, so that it does not care for the image's size."""
    from diffusers import AutoencoderKL

    levels = len(settings.channels)
    return AutoencoderKL(
        block_out_channels=settings.channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        latent_channels=settings.latent_channels,
        norm_num_groups=settings.groups,
        sample_size=128,
        scaling_factor=1.0,  # the latents themselves are made white
        mid_block_add_attention=False,
    )


def _convolutions(coder: Any) -> Iterator[tuple[str, Any]]:
    """("" | "down" | "up", convolution) of an encoder's or decoder's linear path, up to its norm."""
    yield "", coder.conv_in
    for block in getattr(coder, "down_blocks", None) or coder.up_blocks:
        yield from (("", r.conv_shortcut) for r in block.resnets if r.conv_shortcut is not None)
        yield from (("down", s.conv) for s in getattr(block, "downsamplers", None) or ())
        yield from (("up", s.conv) for s in getattr(block, "upsamplers", None) or ())


class LinearCoder(nn.Module):
    """An encoder or decoder with nothing but its convolutions.

    Its last convolution reads the first `signals` channels of the stream, as many as the groups of the norm have
    room for pairs of them.
    """

    def __init__(self, coder: Any) -> None:
        super().__init__()
        norm = coder.conv_norm_out
        self.size = norm.num_channels // norm.num_groups
        self.signals = norm.num_groups * ((self.size - 2) // 2)
        self.kinds = [kind for kind, _ in _convolutions(coder)]
        self.path = nn.ModuleList(convolution for _, convolution in _convolutions(coder))
        self.out = nn.Conv2d(self.signals, coder.conv_out.out_channels, 3, padding=1)

    def stream(self, x: Tensor) -> Tensor:
        """(B, signals, h, w): what reaches the last convolution."""
        for kind, convolution in zip(self.kinds, self.path, strict=True):
            if kind == "down":
                x = F.pad(x, (0, 1, 0, 1))  # diffusers pads right and below only
            elif kind == "up":
                x = F.interpolate(x, scale_factor=2.0, mode="nearest")
            x = convolution(x)
        return x[:, : self.signals]

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.stream(x))

    @torch.no_grad()
    def install(self, coder: Any, inputs: Tensor) -> Tensor:
        """Make `coder`, whose residual branches are zero, compute the same; returns its output for `inputs`."""
        outputs = self.forward(inputs)
        scale = self.stream(inputs).square().mean((0, 2, 3)).sqrt()
        pairs = (self.size - 2) // 2
        signal = torch.arange(self.signals)
        plus = signal // pairs * self.size + signal % pairs * 2
        constant = torch.arange(coder.conv_norm_out.num_groups) * self.size + self.size - 2
        last: Any = self.path[-1]
        weight, bias = last.weight[: self.signals].clone(), last.bias[: self.signals].clone()
        last.weight.zero_()
        last.bias.zero_()
        for channels, sign in ((plus, 1.0), (plus + 1, -1.0)):
            last.weight[channels] = sign * weight / scale[:, None, None, None]
            last.bias[channels] = sign * bias / scale
        last.bias[constant], last.bias[constant + 1] = _CONSTANT, -_CONSTANT
        # a group of unit signals and two constants has this variance; the norm's weight takes it back
        variance = (2 * pairs + 2 * _CONSTANT**2) / self.size
        coder.conv_norm_out.weight.fill_(variance**0.5)
        coder.conv_norm_out.bias.zero_()
        coder.conv_out.weight.zero_()
        coder.conv_out.weight[:, plus] = self.out.weight * scale[:, None, None]
        coder.conv_out.weight[:, plus + 1] = -self.out.weight * scale[:, None, None]
        coder.conv_out.bias.copy_(self.out.bias)
        return outputs


class LinearAutoencoder(nn.Module):
    """Both linear coders of an `AutoencoderKL`, sharing its convolutions."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.encoder, self.decoder = LinearCoder(vae.encoder), LinearCoder(vae.decoder)
        self.latent_channels = vae.config.latent_channels

    def forward(self, images: Tensor) -> Tensor:
        return self.decoder(self.encoder(images)[:, : self.latent_channels])


def start_linear(vae: Any, scenes: SceneSet, settings: VaeSettings, folder: Path, *, progress: bool = True) -> None:
    """Fit the linear chain and set the network to compute it, with white latents.

    Afterwards encoding and decoding equal the chain up to the change of the groups' variance between images.
    """
    chain = LinearAutoencoder(vae)

    def loss(module: nn.Module, ema: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        error = (module(batch["images"]) - batch["images"]).square().mean()
        return {"loss": error, "psnr": 10 * torch.log10(4 / error.detach())}

    fitted = fit(chain, partial(_image_batch, scenes, settings), loss, settings.linear, folder, progress=progress)
    chain.load_state_dict(fitted.state_dict())
    for module in vae.modules():
        if type(module).__name__ == "ResnetBlock2D":
            nn.init.zeros_(module.conv2.weight)
            nn.init.zeros_(module.conv2.bias)
    whole = replace(settings, crop=128, batch_size=64)
    images = _image_batch(scenes, whole, step_generator(settings.fit.seed, 0))["images"]
    moments = chain.encoder.install(vae.encoder, images)
    chain.decoder.install(vae.decoder, moments[:, : settings.latent_channels])
    for convolution in (vae.quant_conv, vae.post_quant_conv):
        nn.init.dirac_(convolution.weight)
        nn.init.zeros_(convolution.bias)
    whiten(vae, images, noise=settings.noise)


@torch.no_grad()
def whiten(vae: Any, images: Tensor, *, noise: float) -> None:
    """Turn the latents so that over `images` (B, 3, H, W) in [-1, 1] they are white; decoding stays as it was.

    Args:
        noise: the posterior gets this standard deviation everywhere.
    """
    latent = vae.config.latent_channels
    means = torch.cat([vae.encode(chunk).latent_dist.mean for chunk in images.split(32)])
    rows = means.movedim(1, -1).flatten(0, -2).double()
    centre = rows.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov(rows.T))
    forward = (vectors / values.sqrt()).T  # principal axes, unit variance
    backward = vectors * values.sqrt()
    convolution, after = vae.quant_conv, vae.post_quant_conv
    weight = convolution.weight[:latent, :, 0, 0].double()
    convolution.weight[:latent, :, 0, 0] = (forward @ weight).float()
    convolution.bias[:latent] = (forward @ (convolution.bias[:latent].double() - centre)).float()
    convolution.weight[latent:].zero_()
    convolution.bias[latent:] = 2 * math.log(noise)
    weight = after.weight[:, :, 0, 0].double()
    after.bias.add_((weight @ centre).float())
    after.weight[:, :, 0, 0] = (weight @ backward).float()


class Autoencoding(nn.Module):
    """The network with its loss: L1, gradient differences and KL, at a fixed width of the posterior."""

    def __init__(self, vae: Any, settings: VaeSettings) -> None:
        super().__init__()
        self.vae, self.settings = vae, settings

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstruction and posterior mean."""
        mean = self.vae.encode(images).latent_dist.mean
        return self.vae.decode(mean + self.settings.noise * noise).sample, mean


def reconstruction(decoded: Tensor, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """L1, L1 of the differences between neighbouring pixels, and PSNR in dB, which has no gradient.

    Args:
        decoded, images: (B, 3, H, W) in [-1, 1].
    """
    difference = decoded - images
    gradient = difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()
    return difference.abs().mean(), gradient, 10 * torch.log10(4 / difference.detach().square().mean())


def vae_loss(module: Autoencoding, ema: Autoencoding, batch: Batch) -> Mapping[str, Tensor]:
    """Losses of `Autoencoding`; see `fit`."""
    decoded, mean = module(batch["images"], batch["noise"])
    l1, gradient, psnr = reconstruction(decoded.float(), batch["images"])
    kl = 0.5 * mean.float().square().mean()
    return {"loss": l1 + ema.settings.gradient * gradient + ema.settings.kl * kl, "psnr": psnr}


def train_vae(scenes: SceneSet, settings: VaeSettings, folder: Path, *, progress: bool = True) -> Any:
    """Linear start, training, white latents. Returns the `AutoencoderKL`; it resumes from `folder`."""
    with initial_weights(settings.fit.seed):
        vae = build_vae(settings)
        start_linear(vae, scenes, settings, folder / "linear", progress=progress)
    batches = partial(_image_batch, scenes, settings)
    vae = fit(Autoencoding(vae, settings), batches, vae_loss, settings.fit, folder / "vae", progress=progress).vae
    whole = replace(settings, crop=128, batch_size=256)
    images = _image_batch(scenes, whole, step_generator(settings.fit.seed, 1))["images"]
    whiten(vae, images, noise=settings.noise)
    return vae


@torch.no_grad()
def psnr(vae: Any, images: Tensor) -> float:
    """Mean over images (B, 3, H, W) in [0, 1] of the PSNR of encoding to the mean and decoding, dB."""
    values = []
    for chunk in images.split(16):
        decoded = vae.decode(vae.encode(chunk * 2 - 1).latent_dist.mean).sample
        error = ((decoded + 1) / 2).clamp(0, 1) - chunk
        values.append(-10 * torch.log10(error.square().mean((1, 2, 3))))
    return torch.cat(values).mean().item()


def _image_batch(scenes: SceneSet, settings: VaeSettings, generator: torch.Generator) -> Batch:
    indices = torch.randint(len(scenes), (settings.batch_size,), generator=generator)
    images = gather(scenes, "image", indices)
    share = settings.crop / images.shape[1]
    crops = Crops.draw(len(images), images.shape[1], settings.crop, generator, sides=(share, share))
    pixels = jitter(crops.images(images), settings.colour, generator)
    side = settings.crop // 2 ** (len(settings.channels) - 1)
    noise = torch.randn(len(images), settings.latent_channels, side, side, generator=generator)
    return {"images": pixels * 2 - 1, "noise": noise}
