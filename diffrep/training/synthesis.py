"""SSL-conditioned latent diffusion: denoise the latent of a patch under a frozen encoder's embedding of the patch.

The objective of Graikos, Yellapragada et al. (CVPR 2024): the mean squared error of the predicted noise (or v, as the
schedule says), with the raw embedding of some samples replaced by zeros. Optionally with condition embedding
perturbation (CEP; Chen et al., "Slight corruption in pre-training data makes better diffusion models", NeurIPS 2024):
noise on the token itself.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffrep.backbones.pipelines import load_parts
from diffrep.backbones.repositories import MODELS
from diffrep.devices import initial_weights, resolve_device
from diffrep.files import read_weights, save_weights
from diffrep.images import LUMINANCE
from diffrep.settings import NOT_NEGATIVE, check
from diffrep.synthesis import (
    About,
    ConditionEmbedder,
    SynthesisModel,
    SynthesisSettings,
    load_synthesis,
    sample_patches,
)
from diffrep.synthesis.grids import ImageEncoder, Pooling
from diffrep.synthesis.model import is_synthesis
from diffrep.training.loop import Batch, FitSettings, fit, step_generator
from diffrep.training.patches import Flips, Patches, PatchSource, encode_patches
from diffrep.training.tiny.vae import reconstruction

Cep = Literal["none", "uniform", "normal"]


# -- conditional denoising, of patches here and of grids of embeddings in `prior` ---------------------------


def conditional_batch(
    clean: Tensor, conditions: Tensor, timesteps: int, batch_size: int, dropout: float, generator: torch.Generator
) -> Batch:
    """A batch of what is denoised, "clean", and of its "conditions", with "noise", "timesteps", and who is "dropped".

    Args:
        clean, conditions: (N, ...) each.
        timesteps: how many there are.
        dropout: share of samples that lose their condition.
    """
    rows = torch.randint(len(clean), (batch_size,), generator=generator).to(clean.device)
    chosen = clean[rows].float()
    return {
        "clean": chosen,
        "noise": torch.randn(chosen.shape, generator=generator),
        "timesteps": torch.randint(timesteps, (batch_size,), generator=generator),
        "conditions": conditions[rows].float(),
        "dropped": torch.rand(batch_size, generator=generator) < dropout,
    }


def condition_check(
    clean: Tensor, conditions: Tensor, loss: Callable[[Any, Any, Batch], Mapping[str, Tensor]]
) -> Callable[[Any, int], Mapping[str, float]]:
    """A `validate` for `fit`: losses with a sample's own condition, with another sample's, with none."""

    @torch.no_grad()
    def measure(objective: Any, step: int) -> Mapping[str, float]:
        device, generator = objective.alphas_cumprod.device, step_generator(1, 0)
        batch = {"clean": clean.float(), "noise": torch.randn(clean.shape, generator=generator)}
        batch["timesteps"] = torch.randint(len(objective.alphas_cumprod), (len(clean),), generator=generator)
        kinds = {"own": (conditions, False), "other": (conditions.roll(1, 0), False), "null": (conditions, True)}
        losses = {}
        for name, (condition, drop) in kinds.items():
            batch |= {"conditions": condition.float(), "dropped": torch.full((len(clean),), drop)}
            total = 0.0
            for part in torch.arange(len(clean)).split(64):
                small = {key: value[part].to(device) for key, value in batch.items()}
                total += float(loss(objective, objective, small)["loss"]) * len(part)
            losses[name] = total / len(clean)
        return losses

    return measure


# -- the objective ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Denoised:
    """One training step's tensors, (B, c, h, w) each."""

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
        used = torch.ones(len(embeddings), len(timesteps), dtype=torch.bool, device=timesteps.device)
        for number, drop in enumerate(dropped):
            used[number] = ~drop
        context = self.model.context(*(e * use[:, None] for e, use in zip(embeddings, used, strict=True)))
        if perturbation is not None:
            context = context + perturbation * used.mT[..., None]
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
    """Loss of an `Objective` on a `conditional_batch`, where there is one with a "perturbation"; see `fit`."""
    tensors = [batch[name] for name in ("clean", "noise", "timesteps")]
    denoised: Denoised = module(
        *tensors, [batch["conditions"]], dropped=[batch["dropped"]], perturbation=batch.get("perturbation")
    )
    return {"loss": denoised.loss}


# -- a decoder that draws no grid ---------------------------------------------------------------------------
#
# A decoder that doubles the resolution by repeating pixels tends to step more where one latent pixel ends than inside
# it. One hardly sees it in a reconstruction, but every border of a large picture's windows lies there, and each looks
# like a seam. The loss therefore also compares how steep the pictures are at each place within a latent pixel, and asks
# the same of latents that the model has painted, on which the steps are largest, with no picture to compare with.

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
    device: str | torch.device = "auto",
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

    trained = fit(decoding, batches, decoding_losses, settings, folder, device=device, progress=progress)
    weights = (trained if settings.ema_decay > 0 else decoding).autoencoder.state_dict()
    model.autoencoder.load_state_dict(weights)
    model.autoencoder.to(model.device).eval().requires_grad_(False)


# -- a whole training ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SynthesisTraining:
    """A model for synthesis and its training. ``tiny-synthesis`` was made so, in stages; see its card."""

    base: str = "tiny"  # autoencoder, schedule and first weights: embedded model, diffusers or synthesis folder, hub id
    scratch: bool = False  # start the U-Net from random weights
    encoder: str = "tiny-dino"  # backbone that makes the embeddings
    pooling: Pooling = "mean"  # how its tokens become one embedding
    width: int | None = None  # of the condition's token; None: as the base has it
    dropout: float = 0.1  # share of samples that lose their condition
    cep: Cep = "none"  # condition embedding perturbation
    gamma: float = 1.0  # its strength; tokens of a new embedder have the length sqrt(width)
    copies: int = 1  # patches drawn of each image
    flips: Flips = "none"  # mirrored patches with the unmirrored patch's embedding
    held_out: int = 256  # patches that the condition is checked on and nothing is trained on
    batch_size: int = 32
    guidance: float = 4.0  # scale that is written into the model's record
    smooth: float = 0.0  # minutes in which the autoencoder's decoder alone learns on, not to draw a grid; then kept
    fit: FitSettings = field(default_factory=lambda: FitSettings(steps=20000, minutes=135, learning_rate=1e-3, seed=8))

    def __post_init__(self) -> None:
        check(
            self,
            dropout="[0, 1)", smooth=NOT_NEGATIVE, batch_size="1..", copies="1..", held_out="2..", gamma=NOT_NEGATIVE,
        )  # fmt: skip


PUBLISHED = SynthesisTraining(  # the authors' script, with bfloat16 for half precision and AdamW in full
    pooling="class",
    flips="both",
    batch_size=100,
    fit=FitSettings(
        steps=1_000_000, learning_rate=1e-4, warmup=1000, schedule="constant", weight_decay=1e-2, decay="all",
        betas=(0.9, 0.999), clip=float("inf"), ema_decay=0.0, seed=0,
    ),
)  # fmt: skip


def build_model(training: SynthesisTraining, encoder: ImageEncoder) -> SynthesisModel:
    """The model that training starts from: the base's U-Net where shapes agree, a new embedder.

    A base that is a synthesis model keeps its embedder where that takes the encoder's embeddings.
    """
    base: SynthesisModel | None = None
    home = training.base if (MODELS / training.base).is_dir() else os.path.abspath(training.base)
    if is_synthesis(training.base):
        base = load_synthesis(training.base).requires_grad_(True)
        unet, autoencoder, scheduler = base.unet, base.autoencoder, base.scheduler
        home = base.about.autoencoder or home
    else:
        parts = load_parts(training.base)
        unet, autoencoder = parts.unet, parts.vae
        scheduler = {k: v for k, v in parts.scheduler.items() if not k.startswith("_")}
    width = training.width or int(unet.config.cross_attention_dim)
    with initial_weights(training.fit.seed):
        unet = _unet_of_width(unet, width, keep=not training.scratch)
        embedder = ConditionEmbedder([encoder.dim], width)
    if base is not None and base.embedder.dims == embedder.dims and base.embedder.width == width:
        embedder = base.embedder
    about = About(autoencoder=home, encoder=encoder.name, pooling=encoder.pooling, guidance=training.guidance)
    return SynthesisModel(unet, embedder, autoencoder, scheduler, about=about, name="model in training")


def _unet_of_width(unet: Any, width: int, *, keep: bool) -> Any:
    """The same architecture for tokens of that width; weights are kept where shapes agree."""
    if keep and unet.config.cross_attention_dim == width:
        return unet
    other = type(unet).from_config(unet.config, cross_attention_dim=width)
    if keep:
        ours = other.state_dict()
        other.load_state_dict({k: v if v.shape == ours[k].shape else ours[k] for k, v in unet.state_dict().items()})
    return other


@torch.no_grad()
def whiten_tokens(embedder: ConditionEmbedder, embeddings: Tensor) -> None:
    """Start the first token as the strongest principal components of the normalised embeddings, each of unit variance.

    Embeddings of one encoder share most of their direction; a random projection of them would hardly differ from
    image to image, and a network that has to find the differences first trains slowly.

    Args:
        embeddings: (N, D), raw.
    """
    rows = F.normalize(embeddings.double(), dim=1) if embedder.normalize else embeddings.double()
    mean = rows.mean(0)
    _, spread, axes = torch.linalg.svd(rows - mean, full_matrices=False)
    spread = spread / max(len(rows) - 1, 1) ** 0.5
    count = int(min(embedder.width, (spread > 1e-3 * spread[0]).sum()))
    linear: Any = embedder.tokens[0]
    linear.weight[:count] = (axes[:count] / spread[:count, None]).to(linear.weight)
    linear.bias.copy_(-(linear.weight.double() @ mean.to(linear.weight.device)))


def unrelated_cosine(embeddings: Tensor) -> float:
    """The cosine that 19 of 20 pairs of different patches' embeddings (N, D) stay under, at most 0.99; see `About`."""
    rows = F.normalize(embeddings.float(), dim=1)
    others = torch.randperm(len(rows), generator=step_generator(0, 0)).to(rows.device)
    cosines = (rows * rows[others]).sum(1)[others != torch.arange(len(rows), device=rows.device)]
    return round(min(float(np.quantile(cosines.cpu().numpy(), 0.95)), 0.99), 3)


def train_synthesis(
    training: SynthesisTraining,
    patches: PatchSource,
    folder: Path,
    *,
    device: str | torch.device = "auto",
    progress: bool = True,
) -> SynthesisModel:
    """Train a model. Called again with the same folder, it goes on where it was.

    The log has, on patches that are held out, the loss with their own condition ("own"), with that of another patch
    ("other") and without any ("null").

    Args:
        folder: of the encoded patches, checkpoint and log.
        device: where; the encoded patches are kept there.

    Returns:
        The moving average of the weights (the weights themselves where its decay is 0), in eval mode.

    Raises:
        ValueError: settings that do not go together, too few patches, or a folder of another run.
    """
    place = resolve_device(device)
    encoder = ImageEncoder.load(training.encoder, training.pooling, device=place)
    model = build_model(training, encoder)
    patches = patches() if callable(patches) else patches
    model.to(place)
    latents, embeddings = encode_patches(
        patches, model, encoder, folder / "patches.safetensors",
        held_out=training.held_out, copies=training.copies, flips=training.flips, seed=training.fit.seed,
        progress=progress,
    )  # fmt: skip
    cut = len(latents) - training.held_out
    if not is_synthesis(training.base):
        whiten_tokens(model.embedder, embeddings[: min(cut, 20000)].float())
    if place.type == "cpu":
        from diffusers.models.attention_processor import AttnProcessor

        model.unet.set_attn_processor(AttnProcessor())  # faster on a CPU than its flash attention, and equal
    model.unet.to(memory_format=torch.channels_last)
    latents, embeddings = latents.to(place), embeddings.to(place)
    model.about = replace(model.about, unrelated=unrelated_cosine(embeddings[:cut]))
    objective, shape = Objective(model), (training.batch_size, 1, model.embedder.width)
    timesteps = len(objective.alphas_cumprod)

    def batches(generator: torch.Generator) -> Batch:
        batch = conditional_batch(
            latents[:cut], embeddings[:cut], timesteps, training.batch_size, training.dropout, generator
        )
        noise = draw_perturbation(shape, training.cep, training.gamma, generator)
        return batch if noise is None else {**batch, "perturbation": noise}

    average = fit(
        objective, batches, synthesis_loss, training.fit, folder,
        validate=condition_check(latents[cut:].cpu(), embeddings[cut:].cpu(), synthesis_loss),
        validate_every=500, device=place, progress=progress,
    )  # fmt: skip
    trained: SynthesisModel = (average if training.fit.ema_decay > 0 else objective).model
    if training.smooth:
        trained.about = replace(trained.about, autoencoder=None)  # it is no longer the base's
        trained.eval()
        painted = paint_latents(trained, embeddings[: min(cut, PAINTED)].float(), folder / "painted.safetensors")
        smoothing = replace(SMOOTHING, minutes=training.smooth)
        smooth_decoder(trained, patches, painted, folder / "decoder", smoothing, device=place, progress=progress)
    return trained.eval().requires_grad_(False)
