"""Training a one-step head: from a base model and data sets to a U-Net."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffrep.backbones.pipelines import PipelineParts, load_parts
from diffrep.files import claim_folder
from diffrep.heads.families import LOTUS_D, Family, Task
from diffrep.heads.training.dense import (
    OneStepModel,
    adapt_unet,
    decoded_losses,
    encode_rows,
    latent_losses,
    latent_mask,
)
from diffrep.heads.training.dense_data import AnnotatedImages, cache_latents, latent_batches, sample_batches
from diffrep.training.loop import Batch, FitSettings, Loss, fit

EMBEDDED_RECIPE = replace(LOTUS_D, posterior="mean")
EMBEDDED_FIT = FitSettings(
    steps=20000, minutes=12, learning_rate=1e-3, warmup=50, weight_decay=0.02, ema_decay=0.998, seed=11
)


def embedded(task: Task) -> tuple[Family, FitSettings]:
    """The settings that made the heads in the package."""
    if task != "normals":
        return EMBEDDED_RECIPE, EMBEDDED_FIT
    # half of the work would go to the detail preserver, which brings nothing here: `diffrep eval depth-ablation`
    return replace(EMBEDDED_RECIPE, preserve=0.0), replace(EMBEDDED_FIT, minutes=24)


def published_fit(recipe: str, task: Task) -> FitSettings:
    """The settings of the papers' scripts, but bfloat16 where they take half precision."""
    plain = FitSettings(
        steps=20000, learning_rate=3e-5, warmup=0, schedule="constant", weight_decay=1e-2, decay="all",
        betas=(0.9, 0.999), ema_decay=0.0, seed=42,
    )  # fmt: skip
    if recipe.startswith("lotus"):  # 16 images on each of 8 devices
        return plain
    falling = replace(plain, schedule="exponential", warmup=100, final_rate=0.01, bf16=False, accumulate=16)
    if recipe == "e2e-ft":
        return falling
    rate = 6e-5 if task == "normals" else 3e-5
    return replace(falling, steps=25000, learning_rate=rate, weight_decay=0.0, clip=float("inf"))


PUBLISHED_BATCH: Mapping[str, int] = {"lotus-d": 16, "lotus-g": 16, "e2e-ft": 2, "marigold": 2}


@dataclass(frozen=True, kw_only=True)
class OneStepTraining:
    """One head: what it predicts, from which base, and how it is trained."""

    task: Task = "disparity"
    base: str = "tiny"  # embedded model, diffusers folder or hub id
    recipe: Family = field(default_factory=lambda: EMBEDDED_RECIPE)
    fit: FitSettings = field(default_factory=lambda: EMBEDDED_FIT)
    batch_size: int = 16  # images of a batch; the detail preserver's rows come on top
    scratch: bool = False  # start from random weights instead of the base's U-Net
    cache: bool = False  # encode every image once and train on the latents' means
    gradient_checkpointing: bool = False  # less memory, more time

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")


def build_model(training: OneStepTraining, parts: PipelineParts) -> OneStepModel:
    """The model to train, from the base's U-Net or from random weights.

    Raises:
        ValueError: the base has no text encoder for the empty prompt, or channels that do not fit the recipe.
    """
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import AttnProcessor

    if parts.text is None:
        raise ValueError(f"{parts.source}: has no text encoder, which the empty prompt needs")
    unet: Any = parts.unet
    if training.scratch:
        with torch.random.fork_rng():
            torch.manual_seed(training.fit.seed)  # diffusers draws initial weights from the global generator
            unet = UNet2DConditionModel.from_config(unet.config)
    unet = adapt_unet(unet, training.recipe, seed=training.fit.seed)
    if training.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if not torch.cuda.is_available():
        unet.set_attn_processor(AttnProcessor())  # faster on a CPU than its flash attention, and equal
        unet.to(memory_format=torch.channels_last)
    context = parts.text.encode([""])[""].context
    return OneStepModel(unet, context, parts.alphas_cumprod, training.recipe)


def train_one_step(
    training: OneStepTraining,
    sets: Sequence[AnnotatedImages],
    shares: Sequence[float],
    folder: Path,
    *,
    latents: Path | None = None,
    validate: Callable[[OneStepModel, int], Mapping[str, float]] | None = None,
    validate_every: int = 1000,
    progress: bool = True,
) -> OneStepModel:
    """Train a head. Called again with the same folder, it goes on where it was.

    Args:
        sets, shares: data sets, and how often a batch comes from each.
        folder: of checkpoint and log.
        latents: folder of cached latents, which heads of one base can share; `folder` where None.
        validate: given the moving average and the step.

    Returns:
        The moving average of the weights (the weights themselves where its decay is 0), in eval mode.

    Raises:
        ValueError: settings that do not go together, or a folder of another run.
    """
    settings = {name: value for name, value in asdict(training).items() if name != "fit"}  # `fit` checks its own
    claim_folder(folder, settings, name="training.json")
    parts = load_parts(training.base, pad=training.recipe.padded_context)
    model = build_model(training, parts)
    vae, recipe = parts.vae, training.recipe
    loss: Loss[Any]
    if training.cache:
        if len(sets) != 1:
            raise ValueError(f"latents are cached of one data set, not of {len(sets)}")
        vae.to(memory_format=torch.channels_last)
        made_with = f"{training.base} ({parts_fingerprint(parts)})"
        kept = cache_latents(vae, sets[0], training.task, latents or folder, made_with=made_with, progress=progress)
        batches, loss = latent_batches(kept, recipe, batch_size=training.batch_size), latent_losses
    else:
        batches = sample_batches(
            sets, shares, recipe,
            batch_size=training.batch_size,
            latent_channels=vae.config.latent_channels,
            stride=2 ** (len(vae.config.block_out_channels) - 1),
        )  # fmt: skip
        loss = _encoding(vae, training)
    return fit(
        model, batches, loss, training.fit, folder,
        validate=validate, validate_every=validate_every, progress=progress,
    )  # fmt: skip


def _encoding(vae: Any, training: OneStepTraining) -> Loss[Any]:
    """The recipe's loss on batches of images, which are encoded first."""
    decoded = decoded_losses(vae, training.task) if training.recipe.loss == "decoded" else None
    stride = 2 ** (len(vae.config.block_out_channels) - 1)

    def loss(module: nn.Module, ema: OneStepModel, batch: Batch) -> Mapping[str, torch.Tensor]:
        vae.to(batch["pixels"].device)
        encoded = {**batch, **encode_rows(vae, batch["pixels"], batch["annotation"], batch)}
        if decoded is not None:
            return decoded(module, ema, {**encoded, "valid": batch["measured"]})
        return latent_losses(module, ema, {**encoded, "mask": latent_mask(batch["valid"], stride)})

    return loss


def parts_fingerprint(parts: PipelineParts) -> str:
    """Short text that changes with the weights of the VAE's encoder."""
    total = sum(float(p.detach().double().abs().sum()) for p in parts.vae.encoder.parameters())
    return f"{total:.6g}"
