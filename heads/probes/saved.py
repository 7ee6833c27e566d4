"""Probes on disk: one form for all kinds, ``probe.json`` and ``probe.safetensors``; the forms before it still open.

The JSON file names the kind, says where the features are read and how the probe was trained and what it scored; the
rest of it is what the kind needs to build its module again, before the weights are put in.
"""

from __future__ import annotations

import importlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeAlias

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from diffrep.backbones import Backbone, load_backbone
from diffrep.backbones.repositories import without_fetching
from diffrep.devices import resolve_device
from diffrep.files import read_document, save_weights, write_whole
from diffrep.images import ImageLike
from diffrep.store.manifest import difference, extract_config, provenance, weights_sha256

FORMAT, VERSION = "diffrep-probe", 2
ABOUT, WEIGHTS = "probe.json", "probe.safetensors"
SavedKind: TypeAlias = Literal["classification", "feedback", "pixels", "dense"]

_CLASSES: dict[SavedKind, str] = {  # imported when a folder holds one
    "classification": "diffrep.heads.probes.probe:Probe",
    "feedback": "diffrep.heads.probes.feedback_probe:FeedbackProbe",
    "pixels": "diffrep.heads.probes.pixel_probe:PixelProbe",
    "dense": "diffrep.heads.probes.dense_probe:DenseProbe",
}
_FORMS: dict[str, tuple[str, SavedKind]] = {  # format of version 1 -> its JSON file, its kind
    FORMAT: (ABOUT, "classification"),
    "diffrep-diffeed": ("diffeed.json", "feedback"),
    "diffrep-pixel-probe": ("pixel_probe.json", "pixels"),
    "diffrep-dense-probe": ("dense_probe.json", "dense"),
}


class SavedProbe(ABC):
    """Base of every probe: a trained module with everything needed to use it on images."""

    KIND: ClassVar[SavedKind]
    about: Mapping[str, Any]

    @property
    @abstractmethod
    def provenances(self) -> Mapping[str, Mapping[str, Any]]:
        """Backbone -> provenance of its features: hash of the weights and every extraction setting."""

    @property
    @abstractmethod
    def network(self) -> nn.Module:
        """The module that was trained."""

    @abstractmethod
    def document(self) -> dict[str, Any]:
        """What `from_document` needs, JSON-ready."""

    @classmethod
    @abstractmethod
    def from_document(cls, document: Mapping[str, Any], backbone: Backbone | None) -> Self:
        """The probe of a document that holds also "features" and "about", with weights of any value.

        Raises:
            Exception: of any kind where the document is damaged.
        """

    @abstractmethod
    def predict(self, images: Iterable[ImageLike], *, device: str = "auto") -> Any:
        """Use the probe on images of any size."""

    def save(self, folder: str | Path) -> None:
        """Write ``probe.json`` and ``probe.safetensors``; what was there is replaced by whole files."""
        folder = Path(folder)
        state = self.network.state_dict()
        save_weights(folder / WEIGHTS, {key: state[key] for key in state.keys() - _counters(state)})
        document = {
            "format": FORMAT,
            "version": VERSION,
            "kind": self.KIND,
            **self.document(),
            "features": {name: dict(values) for name, values in self.provenances.items()},
            "about": dict(self.about),
        }
        write_whole(folder / ABOUT, json.dumps(document, indent=1) + "\n")

    @classmethod
    def load(cls, folder: str | Path, backbone: Backbone | None = None) -> Self:
        """Read a probe of this kind that `save` wrote, now or in an older version.

        Args:
            backbone: feedback probes: theirs, where it is loaded already.

        Raises:
            ValueError: the folder holds none, one of another kind, or one that is damaged or of a newer version.
        """
        kind = saved_kind(folder)
        if kind != cls.KIND:
            raise ValueError(
                f"{folder}: holds no probe of the kind {cls.KIND!r}" + (f", one of {kind!r}" if kind else "")
            )
        file = _about(folder)
        document, weights = _read(file), file.with_suffix(".safetensors")
        try:
            with torch.device("meta"):  # the weights come from the file: nothing is allocated on a document's word
                probe = cls.from_document(document, backbone)
            for recorded in probe.provenances.values():
                extract_config(recorded)
            state = load_file(weights)
            if other := sorted(key for key, value in state.items() if value.dtype not in (torch.float32, torch.int64)):
                raise ValueError(f"{weights.name} holds {other[0]} as {state[other[0]].dtype}")
            counters = {key: torch.tensor(0) for key in _counters(probe.network.state_dict())}
            probe.network.load_state_dict({**counters, **state}, assign=True)
        except Exception as error:  # whatever a damaged file makes torch or Python raise
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"{folder}: the probe cannot be read ({reason or type(error).__name__})") from None
        probe.network.eval()
        return probe

    def load_backbones(self, device: str = "auto") -> dict[str, Backbone]:
        """The backbones that it was trained on, in the precision that it was trained with."""
        return {name: load_recorded(name, values, device) for name, values in self.provenances.items()}

    def check(self, backbone: Backbone, name: str | None = None) -> None:
        """Refuse a backbone that is not the one the probe was trained on.

        Args:
            name: of the one that it was trained on, where there are several.

        Raises:
            ValueError: its weights or its precision differ; the message names the first difference.
        """
        name = name or next(iter(self.provenances))
        recorded = self.provenances[name]
        check_weights(name, recorded, backbone)
        config = extract_config(recorded)
        if differs := difference(recorded, provenance(backbone, config), ignore=_NOT_COMPARED):
            raise ValueError(f"the probe was trained on {name}, this backbone is another ({differs})")

    def __repr__(self) -> str:
        places = "; ".join(f"{name} {' '.join(values.get('taps') or ())}" for name, values in self.provenances.items())
        return f"{type(self).__name__}({self.summary()} on {places.strip()})"

    def summary(self) -> str:
        """What it answers, in a few words."""
        return self.KIND


_NOT_COMPARED = frozenset({"taps", "timestep", "backbone"})  # the name of a folder may change, its weights may not


class OneBackboneProbe(SavedProbe):
    """Base of probes that read one backbone: their `features` are its provenance."""

    features: Mapping[str, Any]

    @property
    def backbone(self) -> str:
        """The name of its backbone."""
        return str(self.features["backbone"])

    @property
    def provenances(self) -> Mapping[str, Mapping[str, Any]]:
        """The one backbone's provenance, by its name."""
        return {self.backbone: self.features}

    def usable(self, backbone: Backbone | None, device: str = "auto", *, checked: bool = False) -> Backbone:
        """A backbone that was checked: the one that is handed in, else the recorded one, loaded.

        Args:
            checked: the one that is handed in has been through `check` already.

        Raises:
            ValueError: it is not the one that the probe was trained on.
        """
        if backbone is None:
            backbone, checked = load_recorded(self.backbone, self.features, device), False
        if not checked:
            self.check(backbone)
        return backbone


def load_probe(folder: str | Path, backbone: Backbone | None = None) -> Any:
    """Read a probe of any kind, in the form of this or of an older version; `predict` uses it.

    Args:
        backbone: feedback probes: theirs, where it is loaded already.

    Raises:
        ValueError: the folder holds no probe, or one that is damaged or was made by a newer version.
    """
    kind: SavedKind = _existing(folder)["kind"]
    module, _, name = _CLASSES[kind].partition(":")
    return getattr(importlib.import_module(module), name).load(folder, backbone=backbone)


def saved_kind(folder: str | Path) -> SavedKind | None:
    """Which kind of probe a folder holds; None: none.

    Raises:
        ValueError: its description cannot be read.
    """
    file = _about(folder)
    return _read(file)["kind"] if file.is_file() else None


def saved_features(folder: str | Path) -> dict[str, dict[str, Any]]:
    """Backbone -> provenance of its features, of the probe in a folder.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    return dict(_existing(folder)["features"])


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


def check_weights(name: str, features: Mapping[str, Any], backbone: Backbone) -> None:
    """Refuse a backbone with other weights than those of the features' provenance.

    Args:
        name: of the backbone that is recorded.

    Raises:
        ValueError: its weights differ.
    """
    if weights_sha256(backbone) != features["weights_sha256"]:
        raise ValueError(f"the probe was trained on the features of {name}; {backbone.name} has other weights")


def as_list(images: ImageLike | Iterable[ImageLike]) -> Iterable[ImageLike]:
    """One image or several, as several; an array or tensor of up to three axes is one image."""
    one = isinstance(images, (str, os.PathLike, Image.Image)) or getattr(images, "ndim", 4) < 4
    return [images] if one else images  # type: ignore[list-item, return-value]  # by the check


def batches_of(images: ImageLike | Iterable[ImageLike], size: int) -> Iterator[list[ImageLike]]:
    """The images in lists of at most `size`."""
    iterator = iter(as_list(images))
    while batch := list(islice(iterator, size)):
        yield batch


def _about(folder: str | Path) -> Path:
    """The JSON file of a probe; where there is none, where it would be."""
    files = [Path(folder) / name for name, _ in _FORMS.values()]
    return next((file for file in files if file.is_file()), files[0])


def _existing(folder: str | Path) -> dict[str, Any]:
    if saved_kind(folder) is None:
        raise ValueError(f"{folder}: holds no probe (no {ABOUT}); `diffrep probe train` makes one")
    return _read(_about(folder))


def _read(file: Path) -> dict[str, Any]:
    """A probe's document in the form of this version."""
    document = read_document(file)
    form, version, features = (document.get(key) for key in ("format", "version", "features"))
    if not isinstance(form, str) or form not in _FORMS or version not in ((1, VERSION) if form == FORMAT else (1,)):
        raise ValueError(f"{file}: is not of format {FORMAT!r}, version 1 or {VERSION}: made by a newer diffrep?")
    if version == 1:
        document["kind"] = _FORMS[form][1]
    if isinstance(features, Mapping) and "weights_sha256" in features:  # of one backbone, in version 1
        features = document["features"] = {features.get("backbone"): features}
    if not isinstance(features, Mapping) or not features or document.get("kind") not in list(_CLASSES):
        raise ValueError(f"{file}: the probe cannot be read (it has no known kind, or no features)")
    if not all(_is_provenance(name, values) for name, values in features.items()):
        raise ValueError(f"{file}: the probe cannot be read (it does not say of which backbones its features are)")
    if not isinstance(document.setdefault("about", {}), Mapping):
        raise ValueError(f"{file}: the probe cannot be read (about must hold an object)")
    return document


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
