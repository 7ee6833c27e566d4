"""How images are brought to a network, read, matched and painted: settings, without anything that they set.

Nothing heavy is imported here, so that the command line can explain its options at once. Each class is used, and can
be imported, where the work is done: `diffrep.features.ExtractConfig`.

`check` is how every class of settings in the project refuses a wrong value: types and choices come from the
annotations, ranges are said in a word per field, and only what ties fields together is written by hand.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, TypeVar, Union, get_args, get_origin, get_type_hints

SettingsT = TypeVar("SettingsT")

Metric: TypeAlias = Literal["cosine", "euclidean", "manhattan"]

MAX_PLACES = 4096  # along a side of a dense field
MAX_CANVAS = 2**26  # pixels that a network's canvas has at most, 8192 x 8192

# ranges for `check`
POSITIVE, NOT_NEGATIVE, FINITE = "(0, inf)", "[0, inf)", "(-inf, inf)"
SEED = "(-2^63, 2^63)"  # what PyTorch's generators take
_MOST = max(64, 4 * (os.cpu_count() or 1))  # processes that a machine bears
WORKERS, ANY_WORKERS = f"1..{_MOST}", f"0..{_MOST}"  # of processes beside this one


def near_names(name: object, known: Iterable[str], otherwise: Iterable[str] = (), *, cutoff: float = 0.6) -> str:
    """Up to three known names that are spelt much like one that is not, or else others, in words."""
    near = difflib.get_close_matches(str(name), list(known), cutoff=cutoff) or otherwise
    return f"near names: {', '.join(near)}" if near else ""


def check(settings: Any, /, **ranges: str) -> None:
    """Refuse settings with a value of another type than its field's, none of its choices, or outside of its range.

        def __post_init__(self) -> None:
            check(self, steps="1..", quality="1..100", rate=POSITIVE, overlap="(0, 0.5]", seed=SEED)

    Types and choices (`Literal`) come from the annotations of all fields. NaN is no number.

    Args:
        settings: an instance of a dataclass.
        ranges: field -> ``1..`` or ``1..100`` (both ends belong to it), or an interval such as ``[0, 1)``, whose
            bounds may be ``inf`` and powers such as ``2^63``. NaN lies in none. Of a tuple every item has to lie in
            it, and there must be one, unless the field is empty by default.

    Raises:
        ValueError: the message names the field, what it takes and what it has.
    """
    kind: Any = type(settings)  # mypy takes no class for a hashable
    hints = {name: hint for name, hint in _hints(kind).items() if hasattr(settings, name)}
    values = {name: getattr(settings, name) for name in hints}
    for name, value in values.items():
        if not _fits(value, hints[name]):
            raise ValueError(f"{name} must be {_words(hints[name])}, got {value!r}")
    check_ranges(settings, **ranges)
    for name, value in values.items():
        if any(isinstance(item, float) and math.isnan(item) for item in _items(value)):
            raise ValueError(f"{name} must be a number, got {value!r}")


def check_ranges(settings: Any, /, **ranges: str) -> None:
    """`check`, of ranges alone."""
    _check_ranges(settings, ranges, str)


def check_options(command: Any, /, **ranges: str) -> None:
    """`check`, of ranges alone, of a command: the message names the option, ``--batch-size``."""
    _check_ranges(command, ranges, lambda name: f"--{name.replace('_', '-')}")


def check_values(
    values: Mapping[str, Any],
    usual: Mapping[str, Any],
    *,
    what: str,
    choices: Mapping[str, Collection[str]],
    several: Collection[str] = (),
    error: type[ValueError] = ValueError,
    **ranges: str,
) -> None:
    """`check`, of values that no class has: each is of the type of its usual value, and numbers are finite.

    Args:
        what: the values belong to, for the message.
        several: of these there may also be a tuple.
    """
    for name, value in values.items():
        kinds = _TYPES.get(type(usual[name]), (type(usual[name]),))
        more = name in several and isinstance(value, (tuple, list)) and len(value) > 0
        expected = _in_words(kinds) + (", or one for each step" if name in several else "")
        fits = all(_is_one(item, kinds) for item in (value if more else (value,)))
        if fits and name in choices:
            fits, expected = value in choices[name], f"one of {', '.join(choices[name])}"
        if fits and kinds == (Real,):
            allowed = _range(ranges.get(name, FINITE))
            fits, expected = allowed.holds(value), allowed.words
        if not fits:
            raise error(f"{what}: {name} must be {expected}, got {value!r}")


def _check_ranges(settings: Any, ranges: dict[str, str], label: Callable[[str], str]) -> None:
    for name, text in ranges.items():
        value, allowed = getattr(settings, name), _range(text)
        if isinstance(value, tuple) and not value and type(settings).__dataclass_fields__[name].default != ():
            raise ValueError(f"{label(name)} needs at least one value")
        for item in _items(value):
            if item is not None and not allowed.holds(item):
                shown = f"{item:g}" if isinstance(item, float) else item
                raise ValueError(f"{label(name)} must be {allowed.words}, got {shown}")


def check_keys(kind: type, values: Mapping[Any, Any], what: str = "") -> None:
    """Refuse values of a file that a class of settings has no fields for, or that lack one that must be given.

    Args:
        what: they belong to, for the message; the class where left out.

    Raises:
        ValueError: the message names the first such key and its near names, or all that there are.
    """
    fields, what = dataclasses.fields(kind), what or kind.__name__  # type: ignore[arg-type]  # a dataclass
    known = [f.name for f in fields if f.init]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=2)
            said = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(known)}"
            raise ValueError(f"{what} has no {key}; {said}")
    for f in fields:
        if f.init and f.name not in values and f.default is f.default_factory is dataclasses.MISSING:
            raise ValueError(f"{what} lacks {f.name}")


def changed(settings: SettingsT, values: Mapping[str, Any], what: str) -> SettingsT:
    """Settings with some values changed.

    Args:
        what: they belong to, for the message.

    Raises:
        TypeError: there is no such setting; the message lists the near names.
        ValueError: the settings refuse a value.
    """
    known = [f.name for f in dataclasses.fields(settings)]  # type: ignore[arg-type]  # a dataclass
    for name in values:
        if name not in known:
            raise TypeError(f"{what} has no setting {name!r}; {near_names(name, known, known)}")
    return dataclasses.replace(settings, **values)  # type: ignore[type-var]


class _Range(NamedTuple):
    low: float
    high: float
    ends: str  # "[)": the lower end belongs to it, the upper one does not
    words: str  # "must be ..."

    def holds(self, number: float) -> bool:
        above = self.low <= number if self.ends[0] == "[" else self.low < number
        return above and (number <= self.high if self.ends[1] == "]" else number < self.high)


@cache
def _range(text: str) -> _Range:
    if ".." in text:
        low, high = text.split("..")
        return _Range(_bound(low), _bound(high or "inf"), "[]", f"in {text}" if high else f"at least {low}")
    low, high = text[1:-1].split(", ")
    words = f"in {text}"
    if high == "inf":
        words = f"finite and {'at least' if text[0] == '[' else 'above'} {low}" if low != "-inf" else "a finite number"
    return _Range(_bound(low), _bound(high), text[0] + text[-1], words)


def _bound(text: str) -> float:
    base, _, power = text.partition("^")
    return float(base) ** int(power or 1)


def _items(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


_UNIONS = (Union, UnionType)
_TYPES: dict[Any, tuple[type, ...]] = {int: (Integral,), float: (Real,), tuple: (tuple, list)}  # what may stand for one
_WORDS: dict[type, str] = {Integral: "a whole number", Real: "a number", str: "text", tuple: "a tuple", bool: "a bool"}


def _is_one(value: Any, kinds: tuple[type, ...]) -> bool:
    return isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))  # to Python, True is a number


def _in_words(kinds: tuple[type, ...]) -> str:
    return " or ".join(_WORDS.get(one, one.__name__) for one in kinds if one is not list)


@cache
def _hints(kind: type) -> dict[str, Any]:
    """field -> its annotation, of a dataclass."""
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}  # type: ignore[arg-type]


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotation's kind; anything is where that cannot be said."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in _UNIONS:
        return any(_fits(value, part) for part in parts)
    if origin is Literal:
        return any(_is_one(value, (type(part),)) and value == part for part in parts)
    if origin is tuple and isinstance(value, (tuple, list)):
        parts = parts[:1] * len(value) if parts[-1] is Ellipsis else parts
        return len(value) == len(parts) and all(map(_fits, value, parts))
    kind = origin or hint
    return kind is Any or not isinstance(kind, type) or _is_one(value, _TYPES.get(kind, (kind,)))


def _words(hint: Any) -> str:
    """What fits an annotation, as `check` says it."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in _UNIONS:
        return " or ".join(_words(part) for part in parts if part is not NoneType)
    if origin is Literal:
        return f"one of {', '.join(map(str, parts))}"
    if origin is tuple:
        if parts[-1] is Ellipsis and get_origin(parts[0]) is Literal:
            return _words(parts[0])
        return f"a tuple ({', '.join('...' if part is Ellipsis else _words(part) for part in parts)})"
    kind = origin or hint
    return _in_words(_TYPES.get(kind, (kind,)))


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
        check(self, multiple="1..")
        sides = self.size if isinstance(self.size, tuple) else (self.size,)
        if self.mode != "native" and any(s is None or s < 1 for s in sides):
            raise ValueError(f"Sizing(mode={self.mode!r}) needs a size of at least 1 pixel, got {self.size}")
        if self.mode != "native" and math.prod(s or 0 for s in (sides[0], sides[-1])) > MAX_CANVAS:
            raise ValueError(f"a size of {self.size} pixels makes a canvas of more than {MAX_CANVAS:,} pixels")
        if isinstance(self.size, tuple) and (self.mode != "squash" or len(self.size) != 2):
            raise ValueError(f"a size of (height, width) goes with mode 'squash', got {self.size} for {self.mode!r}")


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

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """The inputs of a diffusion backbone beside the image. Other backbones ignore them."""

    timestep: int = 0  # 0..999; -1: no noise and time embedding 0
    clean: bool = False  # no noise whatever the timestep says (CleanDIFT)
    prompt: str = ""
    ensemble: int = 1  # noise draws; maps are averaged over them
    seed: int = 0
    posterior: Literal["mean", "sample"] = "mean"
    noise: Literal["random", "inverted"] = "random"  # inverted: U-Nets of latents, the image's by DDIM inversion
    inversion_steps: int = 10  # of the inversion, each a whole pass of the network
    freeu: FreeU | None = None  # U-Nets: amplify the decoder, damp its skips (GeoAware-SC)
    label: int | None = None  # class-conditional networks: the class; None: their null class, if they have one
    discard: tuple[int, ...] = ()  # transformers: channels set to 0 before the modulated taps are normalised
    guidance: float = 3.5  # guidance-distilled transformers (FLUX): the scale of the guidance to imitate

    def __post_init__(self) -> None:
        check(
            self,
            timestep="-1..999",
            ensemble="1..",
            seed=SEED,
            label="0..",
            discard="0..",
            guidance=FINITE,
            inversion_steps="1..1000",
        )


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
    noise: Literal["random", "inverted"] = "random"  # drawn, or the image's by DDIM inversion (U-Nets of latents)
    inversion_steps: int = 10  # of the inversion, each a whole pass of the network
    freeu: FreeU | None = None  # amplify the decoder, damp its skips (GeoAware-SC)
    label: int | None = None  # class-conditional networks: the class
    discard: tuple[int, ...] = ()  # transformers: channels set to 0 before modulated taps are normalised
    batch_size: int = 8  # images, windows or ensemble members that go through the network together

    def __post_init__(self) -> None:
        if isinstance(self.taps, str):  # one tap, as people write it
            object.__setattr__(self, "taps", (self.taps,))
        check(self, batch_size="1..", window="8..")
        Conditions(**self._conditions())  # refuses what no backbone takes
        if self.noise != "inverted" and self.inversion_steps != ExtractConfig.inversion_steps:
            raise ValueError("inversion_steps goes with noise='inverted'")
        if (self.ensemble or 1) > 1 and not self._random():
            raise ValueError(f"an ensemble of {self.ensemble} needs noise, its members would be equal: leave it out")
        if self.taps is not None and not all(self.taps):
            raise ValueError("a tap has no name: give names such as up.1, or None for the recommended ones")
        if self.taps is not None and not len(self.taps):
            raise ValueError("taps is empty: give at least one, or None for the recommended ones")

    def resolve(self, backbone: Recommending) -> ExtractConfig:
        """Fill what is None with the backbone's recommendations."""
        recommended = backbone.recommended
        taps = tuple(self.taps) if self.taps else tuple(recommended.taps)
        for tap in taps:
            backbone.tap(tap)  # raises TapError with the near names
        open_settings = [name for name in ("timestep", "clean", "ensemble", "posterior") if getattr(self, name) is None]
        filled = {name: getattr(recommended.conditions, name) for name in open_settings}
        if "ensemble" in filled and not dataclasses.replace(self, **(filled | {"ensemble": 1}))._random():
            filled["ensemble"] = 1
        return dataclasses.replace(self, taps=taps, sizing=self.sizing or recommended.sizing, **filled)

    def _random(self) -> bool:
        """Whether noise is drawn, as far as the settings say it."""
        without = self.clean or self.timestep == -1 or self.noise == "inverted"
        return not without or self.posterior == "sample"

    def conditions(self) -> Conditions:
        """The settings that the network itself needs; call `resolve` first."""
        assert None not in (self.timestep, self.clean, self.ensemble, self.posterior)
        return Conditions(**self._conditions())

    def _conditions(self) -> dict[str, Any]:
        """The settings that `Conditions` has too, those that are set."""
        values = {f.name: getattr(self, f.name, None) for f in dataclasses.fields(Conditions)}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class MatchConfig:
    """How a match is found."""

    # cell: the best cell's centre; pixel: the best pixel, as if features had been upsampled to the image
    # (DIFT); soft: the expected place in a window around the best cell (GeoAware); recipes, tiny too, have
    # their own
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
        check(self, temperature=POSITIVE, memory_mb="1..")
        if self.mode == "soft" and self.metric != "cosine":
            raise ValueError(f"mode 'soft' needs metric 'cosine', got {self.metric!r}")
        if self.backend == "faiss" and (self.mode, self.metric) != ("cell", "cosine"):
            raise ValueError(
                "backend 'faiss' finds cells by cosine: it needs mode 'cell' and metric 'cosine',"
                f" got {self.mode!r} and {self.metric!r}"
            )


@dataclass(frozen=True, kw_only=True)
class SwapConfig:
    """How two images are swapped."""

    resolution: int = 128  # places of the dense field along the longer side
    metric: Metric = "euclidean"  # of descriptors
    smooth: int = 5  # side of the window that judges outliers of the field, places; 1: they stay
    feather: float = 1.5  # softness of the mask's edge, pixels of the result

    def __post_init__(self) -> None:
        check(self, resolution=f"2..{MAX_PLACES}", smooth="1..63", feather=NOT_NEGATIVE)
        if self.smooth % 2 == 0:
            raise ValueError(f"smooth must be an odd number of places, got {self.smooth}")


@dataclass(frozen=True, kw_only=True)
class RefineConfig:
    """How much of an image is drawn again, and how."""

    strength: float = 0.2  # share of the schedule that is added as noise: 0 changes nothing, 1 draws it anew
    steps: int = 20  # of denoising
    prompt: str = ""  # what the image shows
    guidance: float = 1.0  # scale of classifier-free guidance; 1: none
    seed: int = 0  # of the noise
    # where the noise comes from: drawn, or the image's by an inversion without prompt; bdia and edict are exact, edict
    # and null-text cost twice and ten times as much
    inversion: Literal["none", "ddim", "bdia", "edict", "null-text"] = "none"

    def __post_init__(self) -> None:
        check(self, strength="(0, 1]", steps="1..", guidance=FINITE, seed=SEED)
        if self.inversion == "null-text" and self.guidance == 1:
            raise ValueError("null-text inversion makes guided sampling faithful: it needs a guidance other than 1")
