"""How images are brought to a network, read, matched and painted: settings, without anything that they set.

Nothing heavy is imported here, so that the command line can explain its options at once. Each class is used, and can
be imported, where the work is done: `diffrep.features.ExtractConfig`.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

Metric: TypeAlias = Literal["cosine", "euclidean", "manhattan"]

MAX_CANVAS = 2**26  # pixels that a network's canvas has at most, 8192 x 8192


@dataclass(frozen=True)
class Sizing:
    """The rule that brings an image to the network's canvas.

    Modes: ``squash`` resizes to exactly `size`; ``pad`` keeps the aspect, the long side becomes `size`, the
    image is centred on a square canvas; ``fit`` keeps the aspect, the long side becomes `size`; ``native``
    keeps the image's size. After ``fit`` and ``native`` the right and bottom edges are
    repeated until both sides are multiples of `multiple`.
    """

    mode: Literal["squash", "pad", "fit", "native"] = "squash"
    size: int | tuple[int, int] | None = 512  # pixels: the side of a square, or (height, width) for squash
    resample: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bicubic"
    fill: Literal["black", "edge"] = "black"  # what pad puts around the image
    multiple: int = 8

    def __post_init__(self) -> None:
        sides = self.size if isinstance(self.size, tuple) else (self.size,)
        if self.mode != "native" and any(s is None or s < 1 for s in sides):
            raise ValueError(f"Sizing(mode={self.mode!r}) needs a size of at least 1 pixel, got {self.size}")
        if self.mode != "native" and math.prod(s or 0 for s in (sides[0], sides[-1])) > MAX_CANVAS:
            raise ValueError(f"a size of {self.size} pixels makes a canvas of more than {MAX_CANVAS:,} pixels")
        if isinstance(self.size, tuple) and (self.mode != "squash" or len(self.size) != 2):
            raise ValueError(f"a size of (height, width) goes with mode 'squash', got {self.size} for {self.mode!r}")
        if self.multiple < 1:
            raise ValueError(f"Sizing.multiple must be at least 1, got {self.multiple}")


@dataclass(frozen=True, kw_only=True)
class FreeU:
    """Factors of FreeU; the defaults are GeoAware-SC's.

    "Deep" is what has the channel count of the U-Net's deepest level, "next" the next smaller count.
    """

    deep_input: float = 1.2  # b1: on the first half of the channels
    next_input: float = 1.4  # b2
    deep_skip: float = 0.9  # s1: on the lowest frequencies
    next_skip: float = 0.2  # s2
    threshold: int = 1  # half the side of the square of frequencies that is damped


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """The inputs of a diffusion backbone beside the image. Other backbones ignore them."""

    timestep: int = 0  # 0..999; -1: no noise and time embedding 0
    clean: bool = False  # no noise whatever the timestep says (CleanDIFT)
    prompt: str = ""
    ensemble: int = 1  # noise draws; maps are averaged over them
    seed: int = 0
    posterior: Literal["mean", "sample"] = "mean"
    freeu: FreeU | None = None  # U-Nets: amplify the decoder, damp its skips (GeoAware-SC)
    label: int | None = None  # class-conditional networks: the class; None: their null class, if they have one
    discard: tuple[int, ...] = ()  # transformers: channels set to 0 before the modulated taps are normalised
    guidance: float = 3.5  # guidance-distilled transformers (FLUX): the scale of the guidance to imitate

    def __post_init__(self) -> None:
        if not -1 <= self.timestep < 1000:
            raise ValueError(f"timestep must be in 0..999, or -1 for no noise, got {self.timestep}")
        if self.ensemble < 1:
            raise ValueError(f"ensemble must be at least 1, got {self.ensemble}")


class Recommending(Protocol):
    """A backbone, as far as `ExtractConfig.resolve` needs it."""

    @property
    def recommended(self) -> Any: ...

    def tap(self, name: str) -> object: ...


@dataclass(frozen=True, kw_only=True)
class ExtractConfig:
    """How features are read. Kept beside them, so that a number can be traced to its settings.

    None means: as the backbone recommends (`diffrep info BACKBONE` prints it).
    """

    taps: tuple[str, ...] | None = None  # which activations to read
    sizing: Sizing | None = None  # how the image is brought to the network's canvas
    window: int | None = None  # side of square windows that go through the network on their own; None: no tiling
    timestep: int | None = None  # 0..999: how much noise the image gets; -1: none at all
    clean: bool | None = None  # give the network the image without noise, whatever the timestep says
    prompt: str = ""  # the text condition
    ensemble: int | None = None  # noise draws that are averaged per image
    seed: int = 0  # of all noise
    posterior: Literal["mean", "sample"] | None = None  # which latent the image becomes
    freeu: FreeU | None = None  # amplify the decoder, damp its skips (GeoAware-SC)
    label: int | None = None  # class-conditional networks: the class
    discard: tuple[int, ...] = ()  # transformers: channels set to 0 before modulated taps are normalised
    batch_size: int = 8  # images, windows or ensemble members that go through the network together

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        if self.window is not None and self.window < 8:
            raise ValueError(f"window must be at least 8 pixels, got {self.window}")

    def resolve(self, backbone: Recommending) -> ExtractConfig:
        """Fill what is None with the backbone's recommendations."""
        recommended = backbone.recommended
        taps = tuple(self.taps) if self.taps else tuple(recommended.taps)
        for tap in taps:
            backbone.tap(tap)  # raises TapError with the near names
        own = recommended.conditions
        return dataclasses.replace(
            self,
            taps=taps,
            sizing=self.sizing or recommended.sizing,
            timestep=own.timestep if self.timestep is None else self.timestep,
            clean=own.clean if self.clean is None else self.clean,
            ensemble=own.ensemble if self.ensemble is None else self.ensemble,
            posterior=own.posterior if self.posterior is None else self.posterior,
        )

    def conditions(self) -> Conditions:
        """The settings that the network itself needs; call `resolve` first."""
        assert self.timestep is not None
        assert self.clean is not None
        assert self.ensemble is not None
        assert self.posterior is not None
        return Conditions(
            timestep=self.timestep,
            clean=self.clean,
            prompt=self.prompt,
            ensemble=self.ensemble,
            seed=self.seed,
            posterior=self.posterior,
            freeu=self.freeu,
            label=self.label,
            discard=self.discard,
        )


@dataclass(frozen=True, kw_only=True)
class MatchConfig:
    """How a match is found."""

    # cell: the best cell's centre; pixel: the best pixel, as if features had been upsampled to the image
    # (DIFT); soft: the expected place in a window around the best cell (GeoAware)
    mode: Literal["cell", "pixel", "soft"] = "cell"
    metric: Metric = "cosine"
    source: Literal["bilinear", "cell"] = "bilinear"  # a point's descriptor: interpolated, or its cell's
    mutual: bool = False  # also say which matches lead back to where they came from
    window: int = 7  # soft: cells to each side; 0: all; negative: Gaussian of that sigma
    temperature: float = 0.02  # soft: similarities are divided by it
    outside: Literal["exclude", "zero"] = "exclude"  # soft: zero is what GeoAware's released code does
    # of dense searches for cells; auto takes FAISS from 50,000 target cells on
    backend: Literal["auto", "torch", "faiss"] = "auto"
    memory_mb: int = 64  # of similarity maps held at once

    def __post_init__(self) -> None:
        if self.mode == "soft" and (self.temperature <= 0 or self.metric != "cosine"):
            raise ValueError(
                "mode 'soft' needs metric 'cosine' and a temperature above 0,"
                f" got {self.metric!r} and {self.temperature}"
            )
        if self.backend == "faiss" and (self.mode, self.metric) != ("cell", "cosine"):
            raise ValueError(
                "backend 'faiss' finds cells by cosine: it needs mode 'cell' and metric 'cosine',"
                f" got {self.mode!r} and {self.metric!r}"
            )
        if self.memory_mb < 1:
            raise ValueError(f"memory_mb must be at least 1, got {self.memory_mb}")


@dataclass(frozen=True, kw_only=True)
class SwapConfig:
    """How two images are swapped."""

    resolution: int = 128  # places of the dense field along the longer side
    metric: Metric = "euclidean"  # of descriptors
    smooth: int = 5  # side of the window that judges outliers of the field, places; 1: they stay
    feather: float = 1.5  # softness of the mask's edge, pixels of the result

    def __post_init__(self) -> None:
        if self.resolution < 2:
            raise ValueError(f"resolution must be at least 2 places, got {self.resolution}")
        if self.smooth < 1 or self.smooth % 2 == 0:
            raise ValueError(f"smooth must be an odd number of places, 1 for none, got {self.smooth}")
        if self.feather < 0:
            raise ValueError(f"feather must not be negative, got {self.feather:g}")


@dataclass(frozen=True, kw_only=True)
class RefineConfig:
    """How much of an image is drawn again, and how."""

    strength: float = 0.2  # share of the schedule that is added as noise: 0 changes nothing, 1 draws it anew
    steps: int = 20  # of denoising
    prompt: str = ""  # what the image shows
    guidance: float = 1.0  # scale of classifier-free guidance; 1: none
    seed: int = 0  # of the noise

    def __post_init__(self) -> None:
        if not 0 < self.strength <= 1:
            raise ValueError(f"strength must be above 0 and at most 1, got {self.strength:g}")
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
