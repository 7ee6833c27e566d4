"""Patches to train synthesis on, encoded once: latents of the autoencoder, embeddings of the frozen encoder."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from diffrep.files import number_of, read_weights, save_weights
from diffrep.images import load_image
from diffrep.scenes import SceneSet
from diffrep.synthesis import SynthesisModel
from diffrep.synthesis.grids import ImageEncoder
from diffrep.training.loop import step_generator
from diffrep.training.tiny.crops import Crops, gather

Flips = Literal["none", "horizontal", "both"]


@dataclass(frozen=True)
class ScenePatches:
    """Random square windows of rendered scenes, half of them mirrored."""

    scenes: SceneSet
    sides: tuple[float, float] = (0.2, 1.0)  # of a window, shares of the scene's side
    count: int | None = None  # only that many scenes, spread over the set

    @property
    def name(self) -> str:
        """What tells these patches from others."""
        return f"{number_of(len(self), 'scene')} of renderer {self.scenes.settings.renderer}, sides {self.sides}"

    def __len__(self) -> int:
        return min(self.count or len(self.scenes), len(self.scenes))

    def draw(self, indices: Sequence[int], size: int, generator: torch.Generator) -> Tensor:
        """One random patch of each image: (n, 3, size, size) in [0, 1]."""
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
        return f"{number_of(len(self.files), 'image')} from {self.files[0].parent}, sides {self.sides}"

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


Patches: TypeAlias = ScenePatches | ImagePatches
PatchSource: TypeAlias = "Patches | Callable[[], Patches]"
"""Patches, or what renders them; it may take minutes, and is called once all models are there."""


def encode_patches(
    patches: PatchSource,
    model: SynthesisModel,
    encoder: ImageEncoder | None,
    file: Path,
    *,
    held_out: int = 0,
    copies: int = 1,
    flips: Flips = "none",
    seed: int = 0,
    progress: bool = True,
) -> tuple[Tensor, Tensor]:
    """Encode patches once and keep them in `file`; what is there already is read.

    Args:
        encoder: None: the embeddings have no width.
        held_out: how many of them are not trained on.
        copies: patches drawn of each image.
        flips: mirror half of the patches left to right, or also upside down, with the embedding of the unmirrored
            patch, as the authors train: the model does not learn to tell the orientation.

    Returns:
        Scaled latents (M, c, h, w) and raw embeddings (M, D), both float16.

    Raises:
        ValueError: none would be left to train on, or the file holds other patches, or those of another autoencoder or
            encoder.
    """
    patches = patches() if callable(patches) else patches
    if (count := copies * len(patches)) <= held_out:
        raise ValueError(f"{number_of(count, 'patch', 'patches')} are too few to hold {held_out} out")
    made_with = {
        "patches": patches.name,
        "copies": copies,
        "flips": flips,
        "seed": seed,
        "autoencoder": fingerprint(model.autoencoder),
        "encoder": encoder and f"{encoder.name}, {encoder.pooling}, {fingerprint(encoder.backbone.network)}",
    }
    if file.exists():
        tensors, metadata = read_weights(file)
        recorded = json.loads(metadata.get("made_with", "{}"))
        if changed := [f"{k} {recorded.get(k)!r}, not {v!r}" for k, v in made_with.items() if recorded.get(k) != v]:
            raise ValueError(f"{file}: was made with {'; '.join(changed)}; choose another folder or delete it")
        return tensors["latents"], tensors["embeddings"]
    size, latents, embeddings = model.window * model.factor, [], []
    for start in tqdm(range(0, len(patches), 64), desc="encoding", unit="batch", disable=not progress):
        generator = step_generator(seed, start)
        for _ in range(copies):
            images = patches.draw(range(start, min(start + 64, len(patches))), size, generator)
            with torch.autocast(model.device.type, dtype=torch.bfloat16):
                embeddings.append(images.new_zeros(len(images), 0) if encoder is None else encoder(images).half())
                latents.append(model.encode(_flipped(images, flips, generator)).float().cpu().half())
    encoded = {"latents": torch.cat(latents), "embeddings": torch.cat(embeddings)}
    save_weights(file, encoded, made_with=json.dumps(made_with))
    return encoded["latents"], encoded["embeddings"]


def _flipped(images: Tensor, flips: Flips, generator: torch.Generator) -> Tensor:
    for axis in {"none": (), "horizontal": (-1,), "both": (-1, -2)}[flips]:
        chosen = torch.rand(len(images), generator=generator) < 0.5
        images = torch.where(chosen[:, None, None, None], images.flip(axis), images)
    return images


def fingerprint(module: Any) -> str:
    """Eight digits that tell networks apart: their weights' sums, in the order of their names."""
    values = enumerate(module.state_dict().values(), 1)
    return f"{sum(n * float(v.double().abs().sum()) for n, v in values if v.is_floating_point()):.8g}"
