"""Grids of embeddings without a reference image: a small diffusion model over the grid, under a label or a text.

The second half of unCLIP's idea (Ramesh et al., 2022) for grids: a transformer over the cells predicts the clean,
standardised embeddings; `SynthesisModel` paints what it draws.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffrep.backbones import BackboneError, check_weights, draw_noise
from diffrep.backbones.repositories import MODELS
from diffrep.backbones.text import TextEncoders
from diffrep.files import one_line, read_document, read_weights, save_weights, write_document
from diffrep.settings import check, check_keys
from diffrep.synthesis.grids import EmbeddingGrid

TIMESTEPS = 1000
SCHEDULE: dict[str, Any] = {"num_train_timesteps": TIMESTEPS, "beta_schedule": "squaredcos_cap_v2"}
OPEN_CLIP = "open_clip:"


@dataclass(frozen=True, kw_only=True)
class PriorConfig:
    """The conditions and the grids of a prior; ``config.json`` of its folder."""

    dim: int  # of the embeddings
    condition_dim: int  # of a text's embedding; number of labels
    encoder: str = ""  # backbone of the embeddings
    text: str = ""  # encoder of texts: a model folder with a text encoder, ``tiny``, or open_clip:MODEL/PRETRAINED
    labels: tuple[str, ...] = ()  # instead of texts
    shape: tuple[int, int] = (2, 2)  # of the grids that it was trained on; others are drawn by the same rule
    width: int = 128
    layers: int = 4
    heads: int = 4

    def __post_init__(self) -> None:
        check(self)
        if bool(self.text) == bool(self.labels):
            raise ValueError("a prior has texts or labels as conditions: give `text` or `labels`")
        if self.labels and len(self.labels) != self.condition_dim:
            raise ValueError(f"condition_dim must be the number of labels {len(self.labels)}, got {self.condition_dim}")
        if self.width % 4 or self.width % self.heads:
            raise ValueError(f"width must be a multiple of 4 and of heads, got {self.width} and {self.heads}")


class EmbeddingPrior(nn.Module):
    """Predicts clean embeddings of a grid from noisy ones.

    Attributes:
        mean, std: (D,) of the embeddings that it was trained on; inside, embeddings are standardised by them.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("mean", torch.zeros(config.dim))
        self.register_buffer("std", torch.ones(config.dim))
        self.read = nn.Linear(config.dim, config.width)
        self.tell = nn.Linear(config.condition_dim, config.width)
        self.null = nn.Parameter(torch.zeros(config.width))
        self.time = nn.Sequential(
            nn.Linear(config.width, config.width), nn.SiLU(), nn.Linear(config.width, config.width)
        )
        layer = nn.TransformerEncoderLayer(
            config.width, config.heads, 4 * config.width, dropout=0.0, activation="gelu", batch_first=True,
            norm_first=True,
        )  # fmt: skip
        self.blocks = nn.TransformerEncoder(layer, config.layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(config.width)
        self.write = nn.Linear(config.width, config.dim)

    def forward(self, noisy: Tensor, timesteps: Tensor, conditions: Tensor, dropped: Tensor) -> Tensor:
        """Predict clean standardised embeddings.

        Args:
            noisy: (B, R, C, D), standardised.
            timesteps: (B,), 0..999.
            conditions: (B, condition_dim), from `conditions`.
            dropped: (B,) bool: samples without condition.

        Returns:
            (B, R, C, D).
        """
        rows, columns = noisy.shape[1:3]
        width = self.config.width
        condition = torch.where(dropped[:, None], self.null.to(conditions.dtype), self.tell(conditions))
        time = self.time(sinusoids(timesteps.float(), width).to(noisy.dtype))
        cells = self.read(noisy.flatten(1, 2)) + cell_positions(rows, columns, width).to(noisy)
        tokens = torch.cat([condition[:, None], time[:, None], cells + time[:, None]], dim=1)
        clean: Tensor = self.write(self.norm(self.blocks(tokens)[:, 2:]))
        return clean.unflatten(1, (rows, columns))

    def conditions(self, names: Sequence[str]) -> Tensor:
        """Labels, or texts, as vectors for the network: (B, condition_dim).

        Raises:
            ValueError: a label that it does not know.
        """
        if self.config.text:
            return embed_texts(self.config.text, names)
        known = self.config.labels
        if unknown := sorted(set(names) - set(known)):
            raise ValueError(f"this prior knows no label {', '.join(unknown)}; it knows {', '.join(known)}")
        return torch.eye(len(known))[[known.index(name) for name in names]]

    @torch.no_grad()
    def sample(
        self,
        names: Sequence[str],
        *,
        shape: tuple[int, int] | None = None,
        steps: int = 50,
        guidance: float = 2.0,
        seed: int = 0,
    ) -> list[EmbeddingGrid]:
        """Draw a grid of embeddings for each label or text.

        Args:
            shape: (rows, columns); that of training where left out.
            guidance: null + guidance * (conditional - null); 1: none.
            seed: grid k depends on it, on k and on its name alone.

        Raises:
            ValueError: an unknown label, or a number out of range.
        """
        from diffusers import DDIMScheduler

        rows, columns = shape or self.config.shape
        if min(rows, columns, steps) < 1 or guidance < 0:
            raise ValueError(
                f"shape and steps must be at least 1 and guidance at least 0, got {(rows, columns)}, {steps} and"
                f" {guidance:g}"
            )
        conditions = self.conditions(names).to(self.mean)
        scheduler: Any = DDIMScheduler(
            **SCHEDULE, prediction_type="sample", clip_sample=False, timestep_spacing="trailing"
        )
        scheduler.set_timesteps(steps)
        noise = [draw_noise((rows, columns, self.config.dim), seed, k) for k in range(len(names))]
        grids = torch.cat(noise).to(self.mean)
        keep, drop = (torch.full((len(grids),), value, device=grids.device) for value in (False, True))
        for timestep in scheduler.timesteps:
            time = torch.full((len(grids),), int(timestep), device=grids.device)
            clean = self(grids, time, conditions, keep)
            if guidance != 1:
                null = self(grids, time, conditions, drop)
                clean = null + guidance * (clean - null)
            grids = scheduler.step(clean, timestep, grids).prev_sample
        embeddings = (grids * self.std + self.mean).float().cpu()
        return [EmbeddingGrid(grid, self.config.encoder) for grid in embeddings]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``config.json`` and ``model.safetensors``."""
        write_document(Path(folder) / "config.json", asdict(self.config))
        save_weights(Path(folder) / "model.safetensors", self.state_dict())


def load_prior(name: str | os.PathLike[str] = "tiny-prior") -> EmbeddingPrior:
    """Load a prior from a folder, or the embedded one, in eval mode.

    Raises:
        BackboneError: no such folder, or its files are damaged or do not fit.
    """
    name = os.fspath(name)
    folder = MODELS / name if (MODELS / name).is_dir() else Path(name)
    if not (folder / "config.json").is_file():
        raise BackboneError(f"{name}: is no folder of a prior (it has no config.json)")
    values = read_document(folder / "config.json", error=BackboneError)
    weights, _ = read_weights(folder / "model.safetensors", error=BackboneError)
    try:
        check_keys(PriorConfig, values)
        pairs = {"labels": tuple(values.get("labels", ())), "shape": tuple(values.get("shape", (2, 2)))}
        prior = EmbeddingPrior(PriorConfig(**{**values, **pairs}))
        prior.load_state_dict({k: v.float() for k, v in weights.items()})
    except (TypeError, ValueError, RuntimeError) as error:
        raise BackboneError(f"{folder / 'config.json'}: {one_line(error)}") from None
    check_weights(prior, name)
    return prior.eval().requires_grad_(False)


@torch.no_grad()
def embed_texts(name: str, texts: Sequence[str]) -> Tensor:
    """One unit vector per text, (B, E) float32.

    Args:
        name: a model with a CLIP text encoder, ``tiny`` or a diffusers folder, whose last token has seen the whole
            text; or open_clip:MODEL/PRETRAINED.

    Raises:
        BackboneError: there is no such model.
    """
    parts = [list(texts[i : i + 256]) for i in range(0, len(texts), 256)]
    if name.startswith(OPEN_CLIP):
        import open_clip

        model_name, _, pretrained = name.removeprefix(OPEN_CLIP).partition("/")
        try:
            model: Any = open_clip.create_model(model_name, pretrained=pretrained or None).eval()
        except RuntimeError as error:
            raise BackboneError(f"{name}: {one_line(error)}") from None
        tokenizer = open_clip.get_tokenizer(model_name)
        encoded = torch.cat([model.encode_text(tokenizer(part)) for part in parts])
    else:
        source = MODELS / name if (MODELS / name).is_dir() else Path(name)
        if not (source / "text_encoder").is_dir():
            raise BackboneError(
                f"{name}: has no text encoder; give tiny, a diffusers folder or {OPEN_CLIP}MODEL/PRETRAINED"
            )
        encoders = TextEncoders(str(source))
        unique = {text: state for part in parts for text, state in encoders.encode(part).items()}
        encoded = torch.cat([unique[text].context[:, -1] for text in texts])
    return nn.functional.normalize(encoded.float(), dim=1).clone()


def sinusoids(values: Tensor, width: int) -> Tensor:
    """(..., width) sines and cosines of values, at `width / 2` frequencies from 1 to 1/10000."""
    frequencies = torch.exp(-math.log(10000) * torch.arange(width // 2, device=values.device) / (width // 2))
    angles = values[..., None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def cell_positions(rows: int, columns: int, width: int) -> Tensor:
    """(rows * columns, width): where a cell's centre lies in the grid, each axis from 0 to 100."""
    row, column = ((torch.arange(n) + 0.5) * (100 / n) for n in (rows, columns))
    grid = torch.stack(torch.meshgrid(row, column, indexing="ij"), -1).flatten(0, 1)
    return sinusoids(grid, width // 2).flatten(1)
