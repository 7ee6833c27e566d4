"""``diffrep train synthesis``: from patches and a base model to a model that paints large images."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from diffrep.backbones.pipelines import load_parts
from diffrep.backbones.repositories import MODELS
from diffrep.synthesis import About, ConditionEmbedder, SynthesisModel, load_synthesis
from diffrep.synthesis.conditions import ImageEncoder, Pooling
from diffrep.training.decoder import PAINTED, SMOOTHING, paint_latents, smooth_decoder
from diffrep.training.loop import FitSettings, fit, step_generator
from diffrep.training.synthesis import Cep, Objective, draw_perturbation, synthesis_loss
from diffrep.training.synthesis_data import EncodedPatches, Flips, Patches, encode_patches, patch_batches


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
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout:g}")
        if not self.smooth >= 0:
            raise ValueError(f"smooth must be 0 minutes or more, got {self.smooth:g}")
        if self.batch_size < 1 or self.copies < 1 or self.held_out < 2 or self.gamma < 0:
            raise ValueError(
                "batch_size and copies must be at least 1, held_out 2 and gamma 0, got"
                f" {self.batch_size}, {self.copies}, {self.held_out} and {self.gamma:g}"
            )


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
    if _is_synthesis(training.base):
        base = load_synthesis(training.base).requires_grad_(True)
        unet, autoencoder, scheduler = base.unet, base.autoencoder, base.scheduler
        home = base.about.autoencoder or home
    else:
        parts = load_parts(training.base)
        unet, autoencoder = parts.unet, parts.vae
        scheduler = {k: v for k, v in parts.scheduler.items() if not k.startswith("_")}
    width = training.width or int(unet.config.cross_attention_dim)
    with torch.random.fork_rng():
        torch.manual_seed(training.fit.seed)  # the libraries draw initial weights from the global generator
        unet = _unet_of_width(unet, width, keep=not training.scratch)
        embedder = ConditionEmbedder([encoder.dim], width)
    if base is not None and base.embedder.dims == embedder.dims and base.embedder.width == width:
        embedder = base.embedder
    about = About(autoencoder=home, encoder=encoder.name, pooling=encoder.pooling, guidance=training.guidance)
    return SynthesisModel(unet, embedder, autoencoder, scheduler, about=about, name="model in training")


def _is_synthesis(base: str) -> bool:
    folder = MODELS / base if (MODELS / base).is_dir() else Path(base)
    return any((folder / part).is_dir() for part in ("embedder", "cond_stage"))


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
    kept = int(min(embedder.width, (spread > 1e-3 * spread[0]).sum()))
    linear: Any = embedder.tokens[0]
    linear.weight[:kept] = (axes[:kept] / spread[:kept, None]).to(linear.weight)
    linear.bias.copy_(-(linear.weight.double() @ mean))


def unrelated_cosine(embeddings: Tensor) -> float:
    """The cosine that 19 of 20 pairs of different patches' embeddings (N, D) stay under, at most 0.99; see `About`."""
    rows = F.normalize(embeddings.float(), dim=1)
    others = torch.randperm(len(rows), generator=step_generator(0, 0))
    cosines = (rows * rows[others]).sum(1)[others != torch.arange(len(rows))]
    return round(min(float(np.quantile(cosines.numpy(), 0.95)), 0.99), 3)


def train_synthesis(
    training: SynthesisTraining,
    patches: Patches | Callable[[], Patches],
    folder: Path,
    *,
    validate_every: int = 500,
    progress: bool = True,
) -> SynthesisModel:
    """Train a model. Called again with the same folder, it goes on where it was.

    The log has, on patches that are held out, the loss with their own condition ("own"), with that of another patch
    ("other") and without any ("null").

    Args:
        patches: or what renders them: called once the base and the encoder are there, since it may take minutes.
        folder: of the encoded patches, checkpoint and log.

    Returns:
        The moving average of the weights (the weights themselves where its decay is 0), in eval mode.

    Raises:
        ValueError: settings that do not go together, too few patches, or a folder of another run.
    """
    encoder = ImageEncoder.load(training.encoder, training.pooling)
    model = build_model(training, encoder)
    patches = patches() if callable(patches) else patches
    if torch.cuda.is_available():
        model.to("cuda")
    encoded = encode_patches(
        patches, model, encoder, folder / "patches.safetensors",
        copies=training.copies, flips=training.flips, seed=training.fit.seed, progress=progress,
    )  # fmt: skip
    if len(encoded) <= training.held_out:
        raise ValueError(f"{len(encoded)} patches are too few to hold {training.held_out} out")
    learnt, held_out = encoded.split(training.held_out)
    if not _is_synthesis(training.base):
        whiten_tokens(model.embedder, learnt.embeddings[:20000].float())
    if not torch.cuda.is_available():
        from diffusers.models.attention_processor import AttnProcessor

        model.unet.set_attn_processor(AttnProcessor())  # faster on a CPU than its flash attention, and equal
        model.unet.to(memory_format=torch.channels_last)
    model.about = replace(model.about, unrelated=unrelated_cosine(learnt.embeddings))
    shape = 1, model.embedder.width

    def perturb(count: int, generator: torch.Generator) -> Tensor | None:
        return draw_perturbation((count, *shape), training.cep, training.gamma, generator)

    objective = Objective(model)
    batches = patch_batches(
        learnt, len(objective.alphas_cumprod),
        batch_size=training.batch_size, dropout=training.dropout, perturb=perturb,
    )  # fmt: skip
    average = fit(
        objective, batches, synthesis_loss, training.fit, folder,
        validate=condition_check(held_out), validate_every=validate_every, progress=progress,
    )  # fmt: skip
    trained: SynthesisModel = (average if training.fit.ema_decay > 0 else objective).model
    if training.smooth:
        trained.about = replace(trained.about, autoencoder=None)  # it is no longer the base's
        trained.eval()
        painted = paint_latents(trained, learnt.embeddings[:PAINTED].float(), folder / "painted.safetensors")
        settings = replace(SMOOTHING, minutes=training.smooth)
        smooth_decoder(trained, patches, painted, folder / "decoder", settings, progress=progress)
    return trained.eval().requires_grad_(False)


def condition_check(held_out: EncodedPatches) -> Callable[[Objective, int], Mapping[str, float]]:
    """A `validate` for `fit`: losses with a patch's own condition, with another patch's, with none."""

    @torch.no_grad()
    def check(objective: Objective, step: int) -> Mapping[str, float]:
        device = objective.alphas_cumprod.device
        generator = step_generator(1, 0)
        latents, embeddings = held_out.latents.float(), held_out.embeddings.float()
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = torch.randint(len(objective.alphas_cumprod), (len(latents),), generator=generator)
        conditions = {"own": embeddings, "other": embeddings.roll(1, 0), "null": torch.zeros_like(embeddings)}
        losses = {}
        for name, condition in conditions.items():
            total = 0.0
            for part in torch.arange(len(latents)).split(64):
                *tensors, embedding = (t[part].to(device) for t in (latents, noise, timesteps, condition))
                total += float(objective(*tensors, [embedding]).loss) * len(part)
            losses[name] = total / len(latents)
        return losses

    return check
