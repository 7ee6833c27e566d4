"""Probes: a trained network with everything needed to use it on images. On disk all kinds have one form.

``probe.json`` names the kind, says where the features are read, how the probe was trained and what it scored, and
holds what its network is built from; the weights are in ``probe.safetensors``. The forms before it still open.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from itertools import islice, tee
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias, get_args, get_type_hints

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from diffrep.backbones import Backbone, load_backbone
from diffrep.backbones.hub import HubFolder
from diffrep.backbones.repositories import without_fetching
from diffrep.devices import resolve_device
from diffrep.features import FeatureMaps, extract_each, listed
from diffrep.files import one_line, read_document, read_weights, save_weights, write_whole
from diffrep.heads.probes.cells import Cell, ReadPlan, group_canvases, read_cells
from diffrep.heads.probes.layouts import FeatureHead, Layout
from diffrep.images import ImageLike, Placement, fit_image, load_image
from diffrep.results import Result
from diffrep.settings import check
from diffrep.store.manifest import difference, extract_config, provenance, weights_sha256

if TYPE_CHECKING:
    from typing_extensions import Self

FORMAT, VERSION = "diffrep-probe", 2
ABOUT, WEIGHTS = "probe.json", "probe.safetensors"
SavedKind: TypeAlias = Literal["classification", "feedback", "pixels", "dense"]

_CLASSES: dict[SavedKind, str] = {  # imported when a folder holds one
    "classification": "diffrep.heads.probes.probe:Probe",
    "feedback": "diffrep.heads.probes.feedback:FeedbackProbe",
    "pixels": "diffrep.heads.probes.pixels:PixelProbe",
    "dense": "diffrep.heads.probes.dense:DenseProbe",
}
_FORMS: dict[str, tuple[str, SavedKind]] = {  # format of version 1 -> its JSON file, its kind
    FORMAT: (ABOUT, "classification"),
    "diffrep-diffeed": ("diffeed.json", "feedback"),
    "diffrep-pixel-probe": ("pixel_probe.json", "pixels"),
    "diffrep-dense-probe": ("dense_probe.json", "dense"),
}
_NOT_COMPARED = frozenset({"taps", "timestep", "backbone"})  # the name of a folder may change, its weights may not


@dataclass(frozen=True, repr=False, kw_only=True)
class SavedProbe(HubFolder, ABC):
    """Base of every probe. A subclass adds as fields what `untrained` builds the network from; they are written too.

    Attributes:
        network: the module that was trained.
        features: backbone -> provenance of its features: hash of the weights and every extraction setting.
        about: how it was trained and what it scored, JSON-ready.
    """

    KIND: ClassVar[SavedKind]

    network: nn.Module = field(default_factory=nn.Module)
    features: Mapping[str, Mapping[str, Any]]
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check(self)

    @abstractmethod
    def untrained(self, backbone: Backbone | None = None) -> nn.Module:
        """Its network with weights of any value.

        Args:
            backbone: that it reads, where it is loaded already.
        """

    @abstractmethod
    def predict(self, images: Iterable[ImageLike], *, device: str = "auto") -> Any:
        """Use the probe on images of any size."""

    def summary(self) -> str:
        """What it answers, in a few words."""
        return self.KIND

    def __repr__(self) -> str:
        places = "; ".join(f"{name} {' '.join(values.get('taps') or ())}" for name, values in self.features.items())
        return f"{type(self).__name__}({self.summary()} on {places.strip()})"

    def save(self, folder: str | Path) -> None:
        """Write ``probe.json`` and ``probe.safetensors``; what was there is replaced by whole files."""
        state = self.network.state_dict()
        save_weights(Path(folder) / WEIGHTS, {key: state[key] for key in state.keys() - _counters(state)})
        values = dataclasses.asdict(dataclasses.replace(self, network=nn.Module()))
        del values["network"]
        document = {"format": FORMAT, "version": VERSION, "kind": self.KIND, **values}
        write_whole(Path(folder) / ABOUT, json.dumps(document, indent=1) + "\n")

    def save_folder(self, folder: Path) -> None:
        self.save(folder)

    @classmethod
    def open_folder(cls, folder: Path, **options: Any) -> Any:
        return load_probe(folder, **options)

    @classmethod
    def load(cls, folder: str | Path, backbone: Backbone | None = None) -> Self:
        """Read a probe of this kind that `save` wrote, now or in an older version.

        Args:
            backbone: feedback probes: theirs, where it is loaded already.

        Raises:
            ValueError: the folder holds none, one of another kind, or one that is damaged or of a newer version.
        """
        document = _document(folder) or {}
        if (kind := document.get("kind")) != cls.KIND:
            other = f", one of {kind!r}" if kind else ""
            raise ValueError(f"{folder}: holds no probe of the kind {cls.KIND!r}{other}")
        try:
            probe = from_json(cls, {f.name: document[f.name] for f in fields(cls) if f.name in document})
            with torch.device("meta"):  # the weights come from the file: nothing is allocated on a document's word
                network = probe.untrained(backbone)
            for recorded in probe.features.values():
                extract_config(recorded)
            state, _ = read_weights(document["file"].with_suffix(".safetensors"))
            if odd := sorted(key for key, value in state.items() if value.dtype not in (torch.float32, torch.int64)):
                raise ValueError(f"its weights hold {odd[0]} as {state[odd[0]].dtype}")
            counters = {key: torch.tensor(0) for key in _counters(network.state_dict())}
            network.load_state_dict({**counters, **state}, assign=True)
        except Exception as error:  # whatever a damaged file makes torch or Python raise
            raise ValueError(f"{folder}: the probe cannot be read ({one_line(error)})") from None
        return dataclasses.replace(probe, network=network.eval())

    @property
    def backbone(self) -> str:
        """The name of its backbone, or of the first one."""
        return next(iter(self.features))

    def usable(
        self, backbones: Backbone | Mapping[str, Backbone] | None, device: str = "auto", *, checked: bool = False
    ) -> dict[str, Backbone]:
        """The backbones that it reads, by the names in `features`: those that are handed in, else loaded.

        Args:
            checked: those that are handed in have been through `check` already.

        Raises:
            ValueError: one is missing, or is not the one that the probe was trained on.
        """
        if backbones is None:
            backbones = {name: load_recorded(name, values, device) for name, values in self.features.items()}
        elif isinstance(backbones, Backbone):
            backbones = {self.backbone: backbones}
        if missing := sorted(set(self.features) - set(backbones)):
            raise ValueError(f"the probe reads {', '.join(self.features)}; no {', '.join(missing)} is given")
        for name in self.features if not checked else ():
            self.check(backbones[name], name)
        return {name: backbones[name] for name in self.features}

    def check(self, backbone: Backbone, name: str | None = None) -> None:
        """Refuse a backbone that is not the one the probe was trained on.

        Args:
            name: of the one that it was trained on, where there are several.

        Raises:
            ValueError: its weights or its precision differ; the message names the first difference.
        """
        name = name or self.backbone
        recorded = self.features[name]
        if weights_sha256(backbone) != recorded["weights_sha256"]:
            raise ValueError(f"the probe was trained on the features of {name}; {backbone.name} has other weights")
        current = provenance(backbone, extract_config(recorded))
        if differs := difference(recorded, current, ignore=_NOT_COMPARED):
            raise ValueError(f"the probe was trained on {name}, this backbone is another ({differs})")


def from_json(kind: Any, values: Mapping[str, Any]) -> Any:
    """A dataclass from the JSON of its `asdict`: lists become tuples, objects the dataclasses of their fields."""
    hints = get_type_hints(kind)
    return kind(**{name: _typed(hints[name], value) for name, value in values.items()})


def _typed(hint: Any, value: Any) -> Any:
    if is_dataclass(hint) and isinstance(value, Mapping):
        return from_json(hint, value)
    if isinstance(value, list):
        return tuple(_typed(next(iter(get_args(hint)), None), item) for item in value)
    return value


def load_probe(folder: str | Path, backbone: Backbone | None = None) -> Any:
    """Read a probe of any kind, in the form of this or of an older version; `predict` uses it.

    Args:
        backbone: feedback probes: theirs, where it is loaded already.

    Raises:
        ValueError: the folder holds no probe, or one that is damaged or was made by a newer version.
    """
    kind = saved_kind(folder)
    if kind is None:
        raise ValueError(f"{folder}: holds no probe (no {ABOUT}); `diffrep probe train` makes one")
    module, _, name = _CLASSES[kind].partition(":")
    return getattr(importlib.import_module(module), name).load(folder, backbone=backbone)


def saved_kind(folder: str | Path) -> SavedKind | None:
    """Which kind of probe a folder holds; None: none.

    Raises:
        ValueError: its description cannot be read.
    """
    return (_document(folder) or {}).get("kind")


def saved_features(folder: str | Path) -> dict[str, dict[str, Any]]:
    """Backbone -> provenance of its features, of the probe in a folder; none where it holds no probe.

    Raises:
        ValueError: its description cannot be read.
    """
    return (_document(folder) or {}).get("features", {})


def load_recorded(name: str, features: Mapping[str, Any], device: str = "auto") -> Backbone:
    """The backbone that a probe was trained on, in the precision that it was trained with.

    Args:
        features: provenance of its features.

    Raises:
        ValueError: it would have to be fetched.
    """
    place = without_fetching(name)
    if place is None:
        raise ValueError(
            f"the probe was trained on {name}, which would have to be fetched: nothing is fetched because a file says"
            f" so; to have it fetched name it as the backbone: --backbone {name}, or load_backbone({name!r}) in Python"
        )
    return load_named(place, features, device)


def load_named(name: str, features: Mapping[str, Any], device: str = "auto") -> Backbone:
    """A backbone that the user names, in the precision that a probe was trained with."""
    return load_backbone(name, device=resolve_device(device), dtype=getattr(torch, features["dtype"]))


def _document(folder: str | Path) -> dict[str, Any] | None:
    """A probe's document in the form of this version, and its "file"; None: there is none."""
    file = next((file for name, _ in _FORMS.values() if (file := Path(folder) / name).is_file()), None)
    if file is None:
        return None
    document = read_document(file)
    form, version, features = (document.get(key) for key in ("format", "version", "features"))
    if not isinstance(form, str) or form not in _FORMS or version not in ((1, VERSION) if form == FORMAT else (1,)):
        raise ValueError(f"{file}: is not of format {FORMAT!r}, version 1 or {VERSION}: made by a newer diffrep?")
    if version == 1:
        document["kind"] = _FORMS[form][1]
    if isinstance(features, Mapping) and "weights_sha256" in features:  # of one backbone, in version 1
        features = document["features"] = {features.get("backbone"): features}
    if document.get("kind") not in list(_CLASSES):
        raise ValueError(f"{file}: the probe cannot be read (it has no known kind)")
    known = isinstance(features, Mapping) and all(_is_provenance(name, values) for name, values in features.items())
    if not features or not known:
        raise ValueError(f"{file}: the probe cannot be read (it does not say of which backbones its features are)")
    return {**document, "file": file}


def _is_provenance(name: object, values: object) -> bool:
    words = ("weights_sha256", "dtype", "backbone")
    return (
        isinstance(name, str)
        and isinstance(values, Mapping)
        and all(isinstance(values.get(word), str) for word in words)
        and isinstance(getattr(torch, values["dtype"], None), torch.dtype)
        and isinstance(values.get("taps", ()), (list, tuple))
    )


def _counters(state: Mapping[str, Tensor]) -> set[str]:
    """Names of batch norms' counters of batches, which no prediction needs."""
    return {key for key in state if key.endswith("num_batches_tracked")}


@dataclass(frozen=True, repr=False)
class Prediction(Result):
    """Probabilities (B, K) of the classes, in the order of the images."""

    MAIN = "probabilities"

    probabilities: Tensor
    classes: tuple[str, ...]

    def columns(self) -> Mapping[str, Any]:
        """The likeliest class of each image, and the probability of every class."""
        return {"class": self.labels(), **dict(zip(self.classes, self.probabilities.T, strict=True))}

    def labels(self) -> list[str]:
        """The likeliest class of each image."""
        return [self.classes[i] for i in self.probabilities.argmax(1).tolist()]

    def top(self, n: int) -> list[list[tuple[str, float]]]:
        """The n likeliest classes of each image with their probabilities."""
        values, numbers = self.probabilities.topk(min(n, len(self.classes)), dim=1)
        return [
            [(self.classes[i], v) for i, v in zip(row, shares, strict=True)]
            for row, shares in zip(numbers.tolist(), values.tolist(), strict=True)
        ]


@dataclass(frozen=True, repr=False, kw_only=True)
class ClassProbe(SavedProbe):
    """Base of probes that tell the classes of images.

    Attributes:
        classes: names of the K classes.
    """

    classes: tuple[str, ...]

    @abstractmethod
    def probabilities(self, images: Sequence[Image.Image], backbones: Mapping[str, Backbone]) -> Tensor:
        """(B, K) of a batch of images."""

    @torch.no_grad()
    def predict(
        self,
        images: Iterable[ImageLike],
        *,
        backbone: Backbone | None = None,
        backbones: Mapping[str, Backbone] | None = None,
        device: str = "auto",
        batch_size: int = 32,
    ) -> Prediction:
        """Classify images of any size.

        Args:
            backbone: the one that it reads, where it is loaded already.
            backbones: the same where it reads several, by the names in `features`.

        Raises:
            ImageError: an image cannot be read.
            ValueError: no image is given, or a backbone is not the one the probe was trained on.
        """
        chosen = self.usable(backbones if backbone is None else backbone, device)
        loaded, shares = map(load_image, listed(images)), []
        while batch := list(islice(loaded, batch_size)):
            shares.append(self.probabilities(batch, chosen))
        if not shares:
            raise ValueError("predict needs at least one image")
        return Prediction(torch.cat(shares), self.classes)

    def summary(self) -> str:
        test = self.about.get("test", {}).get("top1")
        return f"{len(self.classes)} classes" + ("" if test is None else f", {100 * test:.1f} % of test,")


@dataclass(frozen=True, repr=False, kw_only=True)
class Probe(ClassProbe):
    """A head on the pooled features of one or several backbones.

    Attributes:
        layout: of the head, with the cells that it reads.
    """

    KIND: ClassVar[SavedKind] = "classification"

    layout: Layout

    @property
    def cells(self) -> tuple[Cell, ...]:
        """Where the features are read."""
        return self.layout.cells

    def untrained(self, backbone: Backbone | None = None) -> nn.Module:
        if len(self.classes) != self.layout.classes or {cell.backbone for cell in self.cells} != set(self.features):
            raise ValueError("its layout, classes and features do not belong together")
        return FeatureHead(self.layout)

    def summary(self) -> str:
        return f"{self.layout.kind}, {super().summary()}"

    def __repr__(self) -> str:
        return f"Probe({self.summary()} on {'; '.join(map(str, self.cells))})"

    def probabilities(self, images: Sequence[Image.Image], backbones: Mapping[str, Backbone]) -> Tensor:
        """(B, K); the votes of k-NN are probabilities already, up to their sum."""
        by_cell: dict[Cell, Tensor] = {}
        for name, backbone in backbones.items():
            plan = ReadPlan.covering(name, self.cells, extract_config(self.features[name])).resolve(backbone)
            assert plan.extract.sizing is not None  # resolved
            sizing = plan.extract.sizing
            groups = group_canvases((row, *fit_image(image, sizing)) for row, image in enumerate(images))
            for _, values in read_cells(backbone, groups, len(images), plan, plan.timesteps or ()):
                by_cell |= values
        scores = self.network(torch.cat([by_cell[cell] for cell in self.cells], dim=1))
        return F.normalize(scores, p=1, dim=1) if self.layout.kind == "knn" else scores.softmax(1)


@dataclass(frozen=True, repr=False, kw_only=True)
class MapProbe(SavedProbe):
    """Base of probes that say something of every pixel, from the maps of one backbone."""

    @property
    def noise_levels(self) -> tuple[int, ...]:
        """The timesteps at which maps are read."""
        return (self.features[self.backbone]["timestep"],)

    @abstractmethod
    def answer(self, maps: Sequence[FeatureMaps]) -> Any:
        """What it says of one image, in the image's pixels, from its maps at each noise level."""

    def predict(
        self, images: Iterable[ImageLike], *, backbone: Backbone | None = None, device: str = "auto"
    ) -> list[Any]:
        """The results of images of any sizes; see `predict_each`."""
        return list(self.predict_each(images, backbone=backbone, device=device))

    @torch.no_grad()
    def predict_each(
        self,
        images: Iterable[ImageLike],
        *,
        backbone: Backbone | None = None,
        checked: bool = False,
        device: str = "auto",
        batch_size: int = 8,
    ) -> Iterator[Any]:
        """Use the probe on images of any sizes; yields one result after the other.

        Args:
            checked: the backbone has been through `check` already.

        Raises:
            ImageError: an image cannot be read.
            ValueError: the backbone is not the one it was trained on.
        """
        network = self.usable(backbone, device, checked=checked)[self.backbone]
        config = dataclasses.replace(extract_config(self.features[self.backbone]), batch_size=batch_size)
        levels = self.noise_levels
        streams = [
            extract_each(network, some, dataclasses.replace(config, timestep=timestep))
            for timestep, some in zip(levels, tee(listed(images), len(levels)), strict=True)
        ]
        yield from map(self.answer, zip(*streams, strict=True))


def uncover(canvas: Tensor, placement: Placement, resize: Callable[[Tensor, tuple[int, int]], Tensor]) -> Tensor:
    """The part of a canvas (..., H, W) that shows the image, at the image's size."""
    x0, y0, x1, y1 = (round(edge) for edge in placement.content_box)
    return resize(canvas[..., y0:y1, x0:x1], placement.image_size)
