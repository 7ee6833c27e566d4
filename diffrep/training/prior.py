"""Training of `EmbeddingPrior`: grids of embeddings of scenes, denoised under their captions or categories."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from diffrep.backbones.pipelines import alphas_cumprod
from diffrep.devices import initial_weights
from diffrep.files import read_weights, save_weights
from diffrep.scenes import CATEGORIES, SceneSet
from diffrep.settings import NOT_NEGATIVE, check
from diffrep.synthesis.grids import ImageEncoder, Pooling
from diffrep.synthesis.prior import SCHEDULE, TIMESTEPS, EmbeddingPrior, PriorConfig, embed_texts
from diffrep.training.loop import Batch, FitSettings, fit
from diffrep.training.synthesis import Cep, condition_check, conditional_batch, draw_perturbation
from diffrep.training.tiny.crops import gather


@dataclass(frozen=True, kw_only=True)
class PriorTraining:
    """A prior and its training. The defaults made the embedded ``tiny-prior``."""

    condition: Literal["text", "label"] = "text"  # captions, or names of categories
    text: str = "tiny"  # encoder of texts: tiny, a diffusers folder, or open_clip:MODEL/PRETRAINED
    encoder: str = "tiny-dino"  # backbone of the embeddings
    pooling: Pooling = "mean"  # how a patch becomes one vector
    shape: tuple[int, int] = (2, 2)  # cells into which a scene is cut
    count: int = 2000  # scenes
    width: int = 96
    layers: int = 3
    dropout: float = 0.1  # share of samples that lose their condition
    cep: Cep = "none"  # condition embedding perturbation
    gamma: float = 1.0  # its strength
    held_out: int = 256
    batch_size: int = 128
    fit: FitSettings = field(
        default_factory=lambda: FitSettings(steps=2000, learning_rate=1e-3, ema_decay=0.995, seed=9)
    )

    def __post_init__(self) -> None:
        check(self, shape="1..", held_out="2..", batch_size="1..", dropout="[0, 1)", gamma=NOT_NEGATIVE)
        if self.count <= self.held_out:
            raise ValueError(f"count must be more than held_out, got {self.count} and {self.held_out}")


def embed_scenes(
    scenes: SceneSet, training: PriorTraining, encoder: ImageEncoder, *, progress: bool = True
) -> Mapping[str, Tensor]:
    """Grids of scenes, "grids" (N, R, C, D) float16, and their captions or categories as "conditions" (N, E)."""
    chosen = torch.arange(min(training.count, len(scenes))) * len(scenes) // min(training.count, len(scenes))
    rows, columns = training.shape
    grids = []
    for part in tqdm(chosen.split(32), desc="embedding", unit="batch", disable=not progress):
        images = gather(scenes, "image", part).permute(0, 3, 1, 2).float() / 255
        height, width = images.shape[-2] // rows, images.shape[-1] // columns
        cells = images.unfold(2, height, height).unfold(3, width, width).permute(0, 2, 3, 1, 4, 5)
        grids.append(encoder(cells.flatten(0, 2)).unflatten(0, (len(part), rows, columns)).half())
    if training.condition == "text":
        conditions = embed_texts(training.text, [scenes.captions[i] for i in chosen.tolist()])
    else:
        conditions = F.one_hot(torch.as_tensor(scenes.category[chosen.numpy()]).long(), len(CATEGORIES)).float()
    return {"grids": torch.cat(grids), "conditions": conditions}


class PriorObjective(nn.Module):
    """A prior with the schedule that it is trained on."""

    def __init__(self, prior: EmbeddingPrior) -> None:
        super().__init__()
        self.prior = prior
        self.alphas_cumprod: Tensor
        self.register_buffer("alphas_cumprod", alphas_cumprod(SCHEDULE))

    def forward(self, grids: Tensor, noise: Tensor, timesteps: Tensor, conditions: Tensor, dropped: Tensor) -> Tensor:
        """Mean squared error of the clean grid, ()."""
        alpha = self.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        predicted = self.prior(alpha.sqrt() * grids + (1 - alpha).sqrt() * noise, timesteps, conditions, dropped)
        return (predicted.float() - grids).square().mean()


def prior_loss(module: PriorObjective, ema: PriorObjective, batch: Batch) -> Mapping[str, Tensor]:
    """Loss of a `PriorObjective`; see `fit`."""
    return {"loss": module(*(batch[k] for k in ("clean", "noise", "timesteps", "conditions", "dropped")))}


def prior_batch(grids: Tensor, conditions: Tensor, training: PriorTraining, generator: torch.Generator) -> Batch:
    """A `conditional_batch` with perturbed conditions, where that is asked for (CEP)."""
    batch = conditional_batch(grids, conditions, TIMESTEPS, training.batch_size, training.dropout, generator)
    noise = draw_perturbation(batch["conditions"].shape, training.cep, training.gamma, generator)
    return batch if noise is None else {**batch, "conditions": batch["conditions"] + noise}


def train_prior(
    training: PriorTraining, scenes: SceneSet | Callable[[], SceneSet], folder: Path, *, progress: bool = True
) -> EmbeddingPrior:
    """Train a prior. Called again with the same folder, it goes on where it was.

    The log has, on held-out scenes, the loss with their own condition ("own"), with that of another scene ("other")
    and without any ("null").

    Args:
        scenes: or what renders them: called once the encoder is there, since it may take minutes.
    """
    encoder = ImageEncoder.load(training.encoder, training.pooling)
    scenes = scenes() if callable(scenes) else scenes
    cache = folder / "grids.safetensors"
    if not cache.exists():
        save_weights(cache, embed_scenes(scenes, training, encoder, progress=progress))
    data, _ = read_weights(cache)
    config = PriorConfig(
        dim=encoder.dim,
        condition_dim=data["conditions"].shape[1],
        encoder=encoder.name,
        text=training.text if training.condition == "text" else "",
        labels=() if training.condition == "text" else tuple(CATEGORIES),
        shape=training.shape,
        width=training.width,
        layers=training.layers,
    )
    with initial_weights(training.fit.seed):
        prior = EmbeddingPrior(config)
    learnt = data["grids"][: -training.held_out].float().flatten(0, 2)
    prior.mean.copy_(learnt.mean(0))
    prior.std.copy_(learnt.std(0).clamp(min=1e-6))
    grids, conditions, cut = (data["grids"].float() - prior.mean) / prior.std, data["conditions"], -training.held_out
    batches = partial(prior_batch, grids[:cut], conditions[:cut], training)
    average = fit(
        PriorObjective(prior), batches, prior_loss, training.fit, folder,
        validate=condition_check(grids[cut:], conditions[cut:], prior_loss), validate_every=500, progress=progress,
    )  # fmt: skip
    return average.prior.eval().requires_grad_(False)
