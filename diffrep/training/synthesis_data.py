"""Patches to train synthesis on, encoded once: latents of the autoencoder, embeddings of the frozen encoder."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from diffrep.files import read_weights, save_weights
from diffrep.images import load_image
from diffrep.scenes import SceneSet
from diffrep.synthesis import SynthesisModel
from diffrep.synthesis.conditions import ImageEncoder
from diffrep.training.loop import Batch, step_generator
from diffrep.training.tiny.crops import Crops, gather

Flips = Literal["none", "horizontal", "both"]


class Patches(Protocol):
    """Images that patches are cut from."""

    @property
    def name(self) -> str:
        """What tells these patches from others."""

    def __len__(self) -> int: ...

    def draw(self, indices: Sequence[int], size: int, generator: torch.Generator) -> Tensor:
        """One random patch of each image: (n, 3, size, size) in [0, 1]."""


@dataclass(frozen=True)
class ScenePatches:
    """Random square windows of rendered scenes, half of them mirrored."""

    scenes: SceneSet
    sides: tuple[float, float] = (0.2, 1.0)  # of a window, shares of the scene's side
    count: int | None = None  # only that many scenes, spread over the set

    @property
    def name(self) -> str:
        return f"{len(self)} scenes of renderer {self.scenes.settings.renderer}, sides {self.sides}"

    def __len__(self) -> int:
        return min(self.count or len(self.scenes), len(self.scenes))

    def draw(self, indices: Sequence[int], size: int, generator: torch.Generator) -> Tensor:
        rows = torch.tensor(indices) * len(self.scenes) // len(self)
        crops = Crops.draw(len(rows), self.scenes.image.shape[1], size, generator, sides=self.sides)
        return crops.images(gather(self.scenes, "image", rows))


@dataclass(frozen=True)
class ImagePatches:
    """Random square windows of image files."""

    files: tuple[Path, ...]
    sides: tuple[float, float] | None = None  # of a window, shares of the shorter side; None: `size` pixels, unscaled

    @property
    def name(self) -> str:
        return f"{len(self.files)} images from {self.files[0].parent}, sides {self.sides}"

    def __len__(self) -> int:
        return len(self.files)

    def draw(self, indices: Sequence[int], size: int, generator: torch.Generator) -> Tensor:
        return torch.stack([self._patch(self.files[i], size, generator) for i in indices])

    def _patch(self, file: Path, size: int, generator: torch.Generator) -> Tensor:
        pixels = torch.from_numpy(np.array(load_image(file))).permute(2, 0, 1)
        shorter = min(pixels.shape[-2:])
        share, *place = torch.rand(3, generator=generator).tolist()
        if self.sides is None:
            if shorter < size:
                raise ValueError(
                    f"{file}: is {pixels.shape[-2]} x {pixels.shape[-1]}, smaller than a patch of {size} pixels; give"
                    " sides as shares of the image, and patches are scaled"
                )
            side = size
        else:
            low, high = self.sides
            side = max(1, round(shorter * (low + (high - low) * share)))
        top, left = (int(p * (length - side + 1)) for p, length in zip(place, pixels.shape[-2:], strict=True))
        patch = pixels[None, :, top : top + side, left : left + side].float() / 255
        if side != size:
            patch = F.interpolate(patch, size=(size, size), mode="bicubic", antialias=True).clamp(0, 1)
        return patch[0]


@dataclass(frozen=True)
class EncodedPatches:
    """M patches as the network is trained on them.

    Attributes:
        latents: (M, c, h, w) float16, scaled.
        embeddings: (M, D) float16, raw.
    """

    latents: Tensor
    embeddings: Tensor

    def __len__(self) -> int:
        return len(self.latents)

    def split(self, last: int) -> tuple[EncodedPatches, EncodedPatches]:
        """All but the last patches, and these."""
        cut = len(self) - last
        return (
            EncodedPatches(self.latents[:cut], self.embeddings[:cut]),
            EncodedPatches(self.latents[cut:], self.embeddings[cut:]),
        )


def encode_patches(
    patches: Patches,
    model: SynthesisModel,
    encoder: ImageEncoder,
    file: Path,
    *,
    copies: int = 1,
    flips: Flips = "none",
    seed: int = 0,
    progress: bool = True,
) -> EncodedPatches:
    """Encode patches once and keep them in `file`; what is there already is read.

    Args:
        copies: patches drawn of each image.
        flips: mirror half of the patches left to right, or also upside down, with the embedding of the unmirrored
            patch, as the authors train: the model does not learn to tell the orientation.

    Raises:
        ValueError: the file holds other patches, or those of another autoencoder or encoder.
    """
    made_with = {
        "patches": patches.name,
        "copies": copies,
        "flips": flips,
        "seed": seed,
        "autoencoder": fingerprint(model.autoencoder),
        "encoder": f"{encoder.name}, {encoder.pooling}, {fingerprint(encoder.backbone.network)}",
    }
    if file.exists():
        tensors, metadata = read_weights(file)
        _check_same(file, json.loads(metadata.get("made_with", "{}")), made_with)
        return EncodedPatches(**tensors)
    size = model.window * model.factor
    latents, embeddings = [], []
    starts = range(0, len(patches), 64)
    for start in tqdm(starts, desc="encoding", unit="batch", disable=not progress):
        indices = range(start, min(start + 64, len(patches)))
        generator = step_generator(seed, start)
        for _ in range(copies):
            images = patches.draw(indices, size, generator)
            with torch.autocast(model.device.type, dtype=torch.bfloat16):
                embeddings.append(encoder(images).half())
                latents.append(model.encode(_flipped(images, flips, generator)).float().cpu().half())
    encoded = EncodedPatches(torch.cat(latents), torch.cat(embeddings))
    file.parent.mkdir(parents=True, exist_ok=True)
    save_weights(file, vars(encoded), made_with=json.dumps(made_with))
    return encoded


def _flipped(images: Tensor, flips: Flips, generator: torch.Generator) -> Tensor:
    for axis in {"none": (), "horizontal": (-1,), "both": (-1, -2)}[flips]:
        chosen = torch.rand(len(images), generator=generator) < 0.5
        images = torch.where(chosen[:, None, None, None], images.flip(axis), images)
    return images


def _check_same(file: Path, recorded: Mapping[str, Any], made_with: Mapping[str, Any]) -> None:
    if changed := [f"{k} {recorded.get(k)!r}, not {v!r}" for k, v in made_with.items() if recorded.get(k) != v]:
        raise ValueError(f"{file}: was made with {'; '.join(changed)}; choose another folder or delete it")


def fingerprint(module: Any) -> str:
    """Eight digits that tell networks apart: their weights' sums, in the order of their names."""
    total = 0.0
    for number, value in enumerate(module.state_dict().values()):
        if value.is_floating_point():
            total += (number + 1) * float(value.double().abs().sum())
    return f"{total:.8g}"


def patch_batches(
    encoded: EncodedPatches,
    alphas: int,
    *,
    batch_size: int,
    dropout: float,
    perturb: Callable[[int, torch.Generator], Tensor | None],
) -> Callable[[torch.Generator], Batch]:
    """Batches for `synthesis_loss`.

    Args:
        alphas: number of timesteps.
        dropout: share of samples that lose their condition.
        perturb: (batch size, generator) -> CEP noise or None.
    """

    def batches(generator: torch.Generator) -> Batch:
        rows = torch.randint(len(encoded), (batch_size,), generator=generator)
        latents = encoded.latents[rows].float()
        batch = {
            "latents": latents,
            "noise": torch.randn(latents.shape, generator=generator),
            "timesteps": torch.randint(alphas, (batch_size,), generator=generator),
            "embeddings": encoded.embeddings[rows].float(),
            "dropped": torch.rand(batch_size, generator=generator) < dropout,
        }
        noise = perturb(batch_size, generator)
        return batch if noise is None else batch | {"perturbation": noise}

    return batches
