"""Restoration in one step: a photograph of any size in, a clean one out, in memory that its size does not change much.

A tile at a time goes through the encoder, the U-Net and the decoder; tiles are blended in the latent space behind the
first two and in pixels behind the last, so that no border is left to see.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from diffrep.backbones import draw_noise
from diffrep.heads.decoder import DetailDecoder
from diffrep.heads.head import Head
from diffrep.heads.one_step import OneStep, PlainUNet
from diffrep.heads.restoration.adapters import DegradationEstimator, Modulation
from diffrep.heads.restoration.families import RestorationFamily
from diffrep.heads.restoration.photograph import Photograph
from diffrep.heads.restoration.pixels import (
    REACH,
    Colours,
    blended_rows,
    low_band_colours,
    wavelet_colours,
)
from diffrep.heads.restoration.residual import PROCESSES
from diffrep.settings import check

_BAND = 1024  # rows whose colours are corrected together


@dataclass(frozen=True, kw_only=True)
class RestoreConfig:
    """How a photograph is restored."""

    scale: float = 4.0  # sides of the result over those of the photograph
    keep_size: bool = False  # enlarge and restore, then bring the result back to the photograph's size
    # taken from the photograph: low frequencies as published, or to a level; mean and spread; None: family's
    colours: Colours | None = None
    tile: int | None = None  # latent cells of a tile's side; 0: the whole at once; None: the family's
    overlap: int | None = None  # cells that neighbouring tiles have in common; None: the family's
    posterior: Literal["mean", "sample"] = "mean"  # which latent the image becomes; the authors draw a sample
    seed: int = 0  # of the sample
    guidance: float | None = None  # S3Diff: pull away from the negative prompt; 1: one pass instead of two
    pixel: float = 1.0  # PiSA-SR: strength of its adapter for fidelity
    semantic: float = 1.0  # PiSA-SR: strength of its adapter for detail
    steps: int | None = None  # ResShift, RDDM: passes of the network; None: the family's
    batch_size: int = 1  # images of one size that are read together; each goes through the network alone

    def __post_init__(self) -> None:
        check(
            self, scale="[1, 16]", tile="0..", overlap="0..", seed="[0, 2^63)", guidance="[0, 20]", pixel="[0, 10]",
            semantic="[0, 10]", batch_size="1..", steps="1..",
        )  # fmt: skip


class Restorer(OneStep):
    """The one-step machine with what restorers add to it.

    Args:
        pixel_unet: the U-Net with PiSA-SR's adapter for fidelity alone, for strengths other than 1.
        decoder: draws what is added to the enlarged image, in place of the VAE's decoder, which draws the image.
        negative: (1, tokens, C), embedding of the negative prompt.
        modulations: of U-Net and VAE, and `estimator`, what drives them: S3Diff's.
    """

    family: RestorationFamily

    def __init__(
        self,
        *parts: Any,
        pixel_unet: Any = None,
        negative: Tensor | None = None,
        modulations: tuple[Modulation, ...] = (),
        estimator: DegradationEstimator | None = None,
        fold: bool = True,
        decoder: DetailDecoder | None = None,
    ) -> None:
        super().__init__(*parts, fold=fold and not modulations, decoder=decoder)
        context: Tensor = self.network.context
        self.pixel_network = None if pixel_unet is None else PlainUNet(pixel_unet, context)
        self.negative = None if negative is None else PlainUNet(self.network.unet, negative)
        self.modulations, self.estimator = nn.ModuleList(modulations), estimator
        self.process = PROCESSES.get(self.family.process)

    def look(self, degraded: Tensor) -> None:
        """S3Diff: `modulate` for a photograph, (1, 3, H, W) in [0, 1] before it is enlarged."""
        assert self.estimator is not None
        self.modulate(self.estimator(degraded.to(next(self.estimator.parameters()))))

    def modulate(self, scores: Tensor) -> None:
        """Set the adapters for an image of these scores of blur and noise, (1, 2)."""
        for modulation in self.modulations:
            modulation.current = modulation(scores.float().to(self.device))

    def draws(self, shape: tuple[int, ...], config: RestoreConfig) -> list[Tensor]:
        """The normal noise (1, *shape) of a process and of those of its steps that are drawn; none without one."""
        if self.process is None:
            return []
        count = (config.steps or self.family.steps) if self.process.drawn else 1
        return [draw_noise(shape, config.seed, 0, stream=2 + step) for step in range(count)]

    def clean(self, latents: Tensor, config: RestoreConfig, noise: Sequence[Tensor] = ()) -> Tensor:
        """(B, c, h, w) latents of a degraded image -> those of the clean one; `noise` as of `draws`."""
        family, t = self.family, self.family.timestep
        if self.process is not None:

            def network(state: Tensor, step: Any) -> Tensor:
                return self.network(torch.cat([latents, state.to(latents)], 1), int(step)).float()

            moved = [one.to(latents.device) for one in noise]
            return self.process.restored(network, latents.float(), moved, config.steps or family.steps).to(latents)
        output = self.network(latents, t)
        guidance = family.guidance if config.guidance is None else config.guidance
        if self.negative is not None and guidance != 1:
            away = self.negative(latents, t)
            output = away + guidance * (output - away)
        if self.pixel_network is not None:
            fidelity = self.pixel_network(latents, t)
            output = config.pixel * fidelity + config.semantic * (output - fidelity)
        if family.result == "residual":
            return latents - output
        return self.schedule.clean(output, latents, t)


class RestorationHead(Head[RestoreConfig, Photograph]):
    """A one-step restorer. Its results are `Photograph`s of the kind that went in."""

    CONFIG = RestoreConfig
    model: Restorer

    def __init__(self, model: Restorer, *, name: str = "head", recognised: str = "", source: str = "") -> None:
        super().__init__(model, "restore", name=name, recognised=recognised, source=source)

    @staticmethod
    def opened(source: Any) -> Photograph:  # type: ignore[override]  # it keeps what a plain image would lose
        return Photograph.open(source)

    @property
    def family(self) -> RestorationFamily:
        return self.model.family

    def check(self, config: RestoreConfig) -> None:
        if (config.pixel, config.semantic) != (1, 1) and self.model.pixel_network is None:
            raise ValueError(
                f"pixel and semantic are strengths of PiSA-SR's adapters, which {self.name} does not have apart from"
                " each other (a PiSA-SR is loaded with adjustable=True for them)"
            )
        if config.guidance is not None and self.model.negative is None and config.guidance != 1:
            raise ValueError(f"guidance needs a negative prompt, which {self.name} does not have")
        process = self.model.process
        if config.steps is not None and process is None:
            raise ValueError(f"steps are of ResShift and RDDM; {self.name} is a {self.family.name} and takes one")
        if config.steps is not None and process is not None and config.steps > len(process):
            raise ValueError(f"steps must be in 1..{len(process)} for {self.family.name}, got {config.steps}")
        tile, overlap = self._tiles(config)
        if tile and not 0 <= overlap < tile:
            raise ValueError(f"overlap must be below tile, got {overlap} and {tile} latent cells")

    def _tiles(self, config: RestoreConfig) -> tuple[int, int]:
        tile = self.family.tile if config.tile is None else config.tile
        overlap = min(self.family.overlap, tile // 2) if config.overlap is None else config.overlap
        return tile, overlap

    def group(self, image: Any, config: RestoreConfig) -> Hashable:
        return None

    def predict_batch(self, images: list[Any], config: RestoreConfig, **drawn: Any) -> Iterator[Photograph]:
        for photograph in images:
            yield self._restored(photograph, config)

    def _restored(self, photograph: Photograph, config: RestoreConfig) -> Photograph:
        width, height = photograph.size
        size = max(1, round(height * config.scale)), max(1, round(width * config.scale))
        enlarged = self.enlarge(photograph.pixels, size)
        if self.model.estimator is not None:
            self.model.look(photograph.tensor()[None])
        restored = self._colours(self.restore_pixels(enlarged, config), enlarged, config)
        del enlarged
        if config.keep_size:
            size = height, width
        restored = resized(restored, size, "bicubic")
        alpha = photograph.alpha
        if alpha is not None:
            alpha = resized(alpha[..., None], size, "bicubic")[..., 0]
        return replace(photograph, pixels=restored, alpha=alpha)

    def enlarge(self, pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """(H, W, 3) at a size, or larger where the family needs more, in its own kind of integer."""
        more, multiple = max(self.family.smallest / min(size), 1), self.family.multiple
        enlarged = resized(pixels, (round(size[0] * more), round(size[1] * more)), self.family.upscale)
        if self.family.fit == "mirror":
            return enlarged
        height, width = (max(side - side % multiple, multiple) for side in enlarged.shape[:2])
        return resized(enlarged, (height, width), "lanczos")

    @torch.no_grad()
    def restore_pixels(self, enlarged: np.ndarray, config: RestoreConfig) -> np.ndarray:
        """What the decoder makes of an enlarged image (H, W, 3), of its kind and size, before colours are fixed."""
        model, family, levels = self.model, self.family, np.iinfo(enlarged.dtype).max
        height, width = enlarged.shape[:2]
        stride = model.stride
        multiple = max(family.multiple, stride)
        rows, columns = (side + -side % multiple for side in (height, width))
        mode: Any = "reflect" if min(height, width) > 1 else "edge"
        mirrored = [np.pad(np.arange(n), (0, more - n), mode=mode) for n, more in ((height, rows), (width, columns))]
        cells = rows // stride, columns // stride
        tile, overlap = self._tiles(config)
        if not tile or cells[0] * cells[1] <= tile**2:
            tile, overlap = max(cells), 0
        noise = draw_noise((model.channels, *cells), config.seed, 0, stream=1) if config.posterior == "sample" else None

        def window(*place: slice) -> Tensor:
            places = [at[cut.start * stride : cut.stop * stride] for at, cut in zip(mirrored, place, strict=True)]
            part = enlarged[np.ix_(*places)]
            return torch.from_numpy(part.astype(np.float32) / levels).permute(2, 0, 1)[None]

        def encode(y: slice, x: slice) -> Tensor:
            return model.encode(window(y, x), None if noise is None else noise[..., y, x])[0]

        latents = self._whole(encode, cells, tile, overlap)

        draws = model.draws((model.channels, *cells), config)

        def clean(y: slice, x: slice) -> Tensor:
            part = latents[None, ..., y, x].to(model.device, model.dtype)
            return model.clean(part, config, [drawn[..., y, x] for drawn in draws])[0]

        cleaned = self._whole(clean, cells, tile, overlap)

        def decode(y: slice, x: slice) -> Tensor:
            part = cleaned[None, ..., y, x].to(model.device, model.dtype)
            if model.decoder is None:
                return model.decode(part)[0].float() / 2 + 0.5
            pixels = window(y, x).to(part)
            return (pixels + model.decoder(part, pixels))[0]

        result = np.empty_like(enlarged)
        for top, band in blended_rows(decode, cells, tile, overlap, step=stride):
            shown = band[:, : max(height - top, 0), :width].clamp(0, 1) * levels
            result[top : top + shown.shape[1]] = shown.round().permute(1, 2, 0).numpy()
        return result

    def _whole(self, run: Any, cells: tuple[int, int], tile: int, overlap: int) -> Tensor:
        return torch.cat([band for _, band in blended_rows(run, cells, tile, overlap)], 1)

    def _colours(self, restored: np.ndarray, enlarged: np.ndarray, config: RestoreConfig) -> np.ndarray:
        """Colours of the enlarged image on the restored one, (H, W, 3) of one kind, in place, band by band."""
        kind, cells = config.colours or self.family.colours, self._tiles(config)[0] * self.model.stride
        if config.colours is None and cells and restored.shape[0] * restored.shape[1] > cells**2:
            kind = self.family.tiled_colours or kind
        if kind == "none":
            return restored
        levels = np.iinfo(restored.dtype).max

        def tensor(rows: np.ndarray) -> Tensor:
            return torch.from_numpy(rows.astype(np.float32) / levels)[None, None]

        height, reach = len(restored), REACH[kind]
        above = restored[:0].copy()  # rows that a band looks back on, as they were
        shift: Any = None
        if kind == "adain":
            (mean, spread), (wanted, breadth) = (_statistics(values) for values in (restored, enlarged))
            shift = (breadth / spread, wanted - mean * breadth / spread)
        fix = {"wavelet": wavelet_colours, "low-band": low_band_colours}.get(kind)
        for top in range(0, height, _BAND):
            first, last = max(top - reach, 0), min(top + _BAND + reach, height)
            rows = np.concatenate([above[len(above) - (top - first) :], restored[top:last]])
            above = rows[: top - first + _BAND].copy()
            for channel in range(3):  # alone, for the sake of memory
                image = tensor(rows[..., channel])
                if fix is None:
                    fixed = image * shift[0][channel] + shift[1][channel]
                else:
                    fixed = fix(image, tensor(enlarged[first:last, :, channel]))
                band = fixed[0, 0, top - first : top - first + _BAND].clamp(0, 1) * levels
                restored[top : top + len(band), :, channel] = band.round().numpy()
        return restored


def resized(values: np.ndarray, size: tuple[int, int], method: Literal["bicubic", "bilinear", "lanczos"]) -> np.ndarray:
    """(H, W, C) uint8 or uint16 at another size, antialiased where it shrinks, rounded to its own levels."""
    if values.shape[:2] == size:
        return values
    how = Image.Resampling[method.upper()]
    if values.dtype == np.uint8:
        picture = Image.fromarray(values if values.shape[2] > 1 else values[..., 0])
        return np.array(picture.resize(size[::-1], how)).reshape(*size, -1)
    planes = (Image.fromarray(plane.astype(np.float32)) for plane in np.moveaxis(values, 2, 0))
    limit = np.iinfo(values.dtype).max
    larger = (np.asarray(plane.resize(size[::-1], how)).round().clip(0, limit) for plane in planes)
    return np.stack([plane.astype(values.dtype) for plane in larger], 2)


def _statistics(values: np.ndarray) -> tuple[Tensor, Tensor]:
    """`pixels.channel_statistics` of (H, W, 3) integers, without a float copy of the whole."""
    rows, levels = values.reshape(-1, 3), np.iinfo(values.dtype).max
    mean = rows.mean(0, dtype=np.float64) / levels
    squares = np.einsum("nc,nc->c", rows, rows, dtype=np.float64) / levels**2
    variance = (squares - len(rows) * mean**2) / max(len(rows) - 1, 1)
    column = (torch.from_numpy(x).float() for x in (mean, np.sqrt(variance + 1e-5)))
    return tuple(column)  # type: ignore[return-value]
