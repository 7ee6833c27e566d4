"""Depth and normals from one-step heads: images of any size in, typed maps out."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffrep.heads.decoder import sharp_at_edges
from diffrep.heads.families import Family, Frame, Task
from diffrep.heads.head import Head
from diffrep.heads.maps import DepthMap, NormalMap, facing_camera, unit_length
from diffrep.heads.one_step import OneStep, Spacing
from diffrep.heads.tiling import (
    DIFFUSERS_ENSEMBLE,
    E2E_ENSEMBLE,
    MARIGOLD_ENSEMBLE,
    DepthEnsemble,
    Resample,
    ensemble_depth,
    ensemble_normals,
    pad_to_multiple,
    predict_tiled,
    stretch,
    to_image_size,
    to_working,
)
from diffrep.settings import check

BEYOND = 0.005  # share of the pixels that are brought back to the farthest of the others
ENSEMBLES = {"e2e-ft": E2E_ENSEMBLE, "marigold-diffusers": DIFFUSERS_ENSEMBLE}


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """How a head looks at an image. Kept beside the map, so that it can be traced to its settings."""

    size: int | None = None  # long side that the network sees, pixels; 0: the image's own; None: as the head recommends
    resample: Resample = "bilinear"  # how the image is resized
    posterior: Literal["mean", "sample"] = "mean"  # which latent the image becomes
    seed: int = 0  # of all noise; the same noise for every image of one size
    ensemble: int = 1  # predictions from different noise that are aligned and brought together
    reduction: Literal["median", "mean", "closest"] | None = None  # median and mean: depth; closest and mean: normals
    steps: int = 1  # of DDIM; more than one for Marigold only
    timestep: int | None = None  # of the single pass; None: the last of the schedule, 999
    # of Marigold's timesteps: trailing begins at 999, where there is noise alone; leading at 1 for a single step, as
    # diffusers runs folders whose scheduler says so (Marigold 1.0), a mistake that E2E-FT describes
    spacing: Spacing = "trailing"
    official: bool = False  # treat sizes, posterior and lengths exactly as the family's released code does
    tile: int | None = None  # side of square tiles that go through the network on their own, pixels
    overlap: float = 0.25  # share of a tile that it has in common with its neighbour
    batch_size: int = 4  # images, members or tiles that go through the network together

    def __post_init__(self) -> None:
        check(
            self, size="0..8192", ensemble="1..", steps="1..", batch_size="1..", seed="[0, 2^63)", timestep="0..999",
            tile="64..", overlap="(0, 0.5]",
        )  # fmt: skip
        if self.timestep is not None and self.steps > 1:
            raise ValueError(f"timestep is of a single step, got {self.timestep} for {self.steps} steps")
        if self.timestep is not None and self.spacing != "trailing":
            raise ValueError(f"timestep {self.timestep} is the single step: spacing={self.spacing!r} would say another")


class DenseHead(Head[PredictConfig, "DepthMap | NormalMap"]):
    """A one-step head for depth, disparity or normals.

    The noise of `predict` and `predict_each` can be named instead of drawn: `noise` (E, c, h, w), one for each member
    of the ensemble, and `posterior_noise` (1, c, h, w) standard normal, for a posterior that is sampled.
    """

    CONFIG = PredictConfig
    model: OneStep
    task: Task

    def __init__(
        self, model: OneStep, task: Task, *, name: str = "head", recognised: str = "", source: str = ""
    ) -> None:
        super().__init__(model, task, name=name, recognised=recognised, source=source)

    @property
    def family(self) -> Family:
        return self.model.family

    def read(self, decoded: Tensor, pixels: Tensor | None = None, *, unit: bool = True) -> Tensor:
        """What was decoded, (B, 3, h, w), or of depth (B, 1, h, w), as a map.

        Args:
            pixels: images (B, 3, h, w) in [0, 1] at whose edges depth from a decoder of its own is made sharp.
            unit: bring normals to unit length where the family's released code does not; where there is no surface,
                towards the camera.

        Returns:
            Depth or disparity (B, 1, h, w) in [0, 1], from a decoder of its own of any scale and shift; normals
            (B, 3, h, w) in the family's frame.
        """
        decoded = decoded.float()
        if self.task != "normals":
            if self.model.decoder is not None:  # of any scale and shift; along outlines it overshoots beyond the sky
                values = decoded.mean(1, keepdim=True) / 2 + 0.5
                if pixels is not None:
                    values = sharp_at_edges(values, pixels.to(values))
                count, far = int(BEYOND * values[0].numel()) + 1, self.task != "disparity"
                limit = values.flatten(1).topk(count, largest=far).values[:, -1].view(-1, 1, 1, 1)
                return torch.minimum(values, limit) if far else torch.maximum(values, limit)
            if self.family.depth == "clamp, mean":
                return (decoded / 2 + 0.5).clamp(0, 1).mean(1, keepdim=True)
            return (decoded.mean(1, keepdim=True).clamp(-1, 1) + 1) / 2
        if self.family.normals == "twice":
            for _ in range(2):
                decoded = decoded / (decoded.norm(dim=1, keepdim=True) + 1e-5)
            return decoded
        normals = decoded.clamp(-1, 1)
        if self.family.half_z:
            normals = torch.cat([normals[:, :2], normals[:, 2:] / 2 + 0.5], dim=1)
        if self.family.normals == "unit":
            return normals / normals.norm(dim=1, keepdim=True).clamp(min=1e-6)
        return surface_normals(normals, self.family.frame) if unit else normals

    def check(self, config: PredictConfig) -> None:
        family = self.family
        if config.ensemble > 1 and family.first_latent != "noise" and not self._sampled(config):
            raise ValueError(
                f"an ensemble of {config.ensemble} needs noise, and a {family.name} head has none: its members would be"
                " equal (posterior='sample' makes them differ a little)"
            )
        if config.steps > 1 and family.result != "sample":
            raise ValueError(f"a {family.name} head predicts in one step, got steps={config.steps}")
        if config.spacing != "trailing" and family.result != "sample":
            raise ValueError(f"a {family.name} head has one timestep: spacing={config.spacing!r} goes with Marigold")
        allowed = ("closest", "mean") if self.task == "normals" else ("median", "mean")
        if config.reduction not in (None, *allowed):
            raise ValueError(f"reduction of {self.task} must be {' or '.join(allowed)}, got {config.reduction!r}")
        if config.tile is not None and config.ensemble > 1:
            raise ValueError("tiles and an ensemble do not go together: choose one of them")

    def _sampled(self, config: PredictConfig) -> bool:
        return config.posterior == "sample" or (config.official and self.family.posterior == "sample")

    def group(self, image: Image.Image, config: PredictConfig) -> Hashable:
        return None if self._is_tiled(image, config) else image.size

    def _is_tiled(self, image: Image.Image, config: PredictConfig) -> bool:
        return config.tile is not None and max(image.size) > config.tile

    def predict_batch(
        self, images: list[Image.Image], config: PredictConfig, **drawn: Tensor | None
    ) -> Iterator[DepthMap | NormalMap]:
        pixels = [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]
        if self._is_tiled(images[0], config):
            yield predict_tiled(self, pixels[0], config)
            return
        # the family's way back to the image's size, or ours: bilinear with antialiasing
        back = self.family if config.official else dataclasses.replace(self.family, resize_back="antialias")
        size = (images[0].height, images[0].width)
        # as bytes to the device, which resizes them: it would wait for a host that does
        maps, uncertainty = self.maps(torch.stack(pixels).to(self.device), config, **drawn)
        values, spreads = to_image_size(maps, size, back, config.resample).cpu(), None
        if uncertainty is not None:
            spreads = to_image_size(uncertainty, size, back, config.resample)[:, 0].cpu()
        if self.task != "normals":
            values = values[:, 0].clamp(0, 1)
        elif config.official and not self.family.renormalize:  # interpolation between pixels can leave the range
            values = values.clamp(-1, 1)
        else:
            values = unit_length(values, self.family.frame)
        for number, one in enumerate(values):
            yield self.wrap(one, config, None if spreads is None else spreads[number])

    def canvas(self, pixels: Tensor, config: PredictConfig) -> tuple[Tensor, tuple[int, int]]:
        """What the network sees of images (B, 3, H, W) uint8: (B, 3, h', w') in [0, 1], and the h, w of it that count.

        Raises:
            ValueError: a side is smaller than a cell.
        """
        side = self.working_size if config.size is None else config.size
        canvas = to_working(pixels, self.family, side, config.resample)
        size = (int(canvas.shape[-2]), int(canvas.shape[-1]))
        if self.family.pad or not config.official:
            canvas = pad_to_multiple(canvas, self.model.stride)
        elif min(size) < self.model.stride:
            raise ValueError(
                f"the network sees {size[1]} x {size[0]} pixels, it needs {self.model.stride} on each side"
            )
        return canvas, size

    @torch.no_grad()
    def maps(
        self,
        pixels: Tensor,
        config: PredictConfig,
        *,
        noise: Tensor | None = None,
        posterior_noise: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Maps of images of one size, at the size that the network worked at.

        Args:
            pixels: (B, 3, H, W) uint8.
            noise, posterior_noise: as of `predict`.

        Returns:
            (B, 1 or 3, h, w) as of `read`, and the uncertainty (B, 1, h, w) of an ensemble.
        """
        model, family, members = self.model, self.family, config.ensemble
        canvas, size = self.canvas(pixels, config)
        latent_size = canvas.shape[-2] // model.stride, canvas.shape[-1] // model.stride
        if self._sampled(config) and posterior_noise is None:
            count = members if family.first_latent != "noise" else 1
            posterior_noise = torch.cat([model.draw(latent_size, config.seed, k, stream=1) for k in range(count)])
        if family.first_latent == "noise" and noise is None:
            noise = torch.cat([model.draw(latent_size, config.seed, k) for k in range(members)])
        draws = [None] if posterior_noise is None else list(posterior_noise.split(1))
        # depth from a decoder of its own is the mean of what is drawn of the image and of its mirror image
        twice = model.decoder is not None and self.task != "normals"
        views = (canvas, canvas.flip(-1)) if twice else (canvas,)
        results = []
        for member in range(members):
            if member < len(draws):  # every member has a latent of its own, or all share one
                latents = [model.encode(view, draws[member], batch_size=config.batch_size) for view in views]
            start = None if noise is None else noise[member : member + 1]
            decoded = []
            for view, latent in zip(views, latents, strict=True):
                annotation = model.predict(
                    latent,
                    start,
                    steps=config.steps,
                    timestep=config.timestep,
                    spacing=config.spacing,
                    batch_size=config.batch_size,
                )
                decoded.append(model.draw_maps(annotation, view, batch_size=config.batch_size).float())
            drawn = (decoded[0] + decoded[1].flip(-1)) / 2 if twice else decoded[0]
            results.append(self.read(drawn, canvas, unit=not config.official)[..., : size[0], : size[1]])
        if members > 1:
            return self.combine(torch.stack(results, dim=1), config)
        unbounded = family.stretch or model.decoder is not None
        return (stretch(results[0]) if self.task != "normals" and unbounded else results[0]), None

    def combine(self, members: Tensor, config: PredictConfig) -> tuple[Tensor, Tensor]:
        """(B, E, C, h, w) -> the ensemble's maps (B, C, h, w) and uncertainty (B, 1, h, w)."""
        if self.task == "normals":
            pairs = [ensemble_normals(image, "mean" if config.reduction == "mean" else "closest") for image in members]
        else:
            preset = ENSEMBLES.get(self.family.name, MARIGOLD_ENSEMBLE) if config.official else DepthEnsemble()
            reduction: Literal["median", "mean"] = "mean" if config.reduction == "mean" else "median"
            preset = dataclasses.replace(preset, reduction=reduction, shift=self.family.shift_invariant)
            pairs = [ensemble_depth(image[:, 0], preset) for image in members]
        maps, uncertainties = (torch.stack(part) for part in zip(*pairs, strict=True))
        return maps if self.task == "normals" else maps[:, None], uncertainties[:, None]

    def wrap(self, values: Tensor, config: PredictConfig, uncertainty: Tensor | None = None) -> DepthMap | NormalMap:
        """The typed map of finished values: (H, W) depth or disparity in [0, 1], or (3, H, W) normals."""
        settings = self.settings(config, family=self.family.name)
        if self.task == "normals":
            return NormalMap(values, self.family.frame, uncertainty, settings)
        return DepthMap(values, self.task, uncertainty=uncertainty, settings=settings)


def surface_normals(normals: Tensor, frame: Frame, shortest: float = 0.3) -> Tensor:
    """(B, 3, h, w) of unit length; what is shorter than `shortest` is drawn towards the camera, the more the shorter.

    Networks that learn the vector 0 in the sky, which faces nowhere, would otherwise show noise there, blown up to unit
    length.
    """
    missing = (shortest - normals.norm(dim=1, keepdim=True)).clamp(min=0)
    return unit_length(normals + missing * facing_camera(normals, frame), frame)
