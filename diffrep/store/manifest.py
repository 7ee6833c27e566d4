"""The manifest of a store: what the features are, how they were made, and which shards hold them.

The manifest is the store's only point of truth: what it does not list does not exist, and it is replaced as a
whole, so that a run that is killed leaves the last complete state. It holds no times and no random names: the same
images, settings (the batch size among them), threads and libraries give the same bytes. Another batch size or number
of threads changes features by rounding only.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch

from diffrep.backbones import Backbone
from diffrep.features import ExtractConfig
from diffrep.files import read_document, write_whole
from diffrep.images import Sizing
from diffrep.settings import check

FORMAT, VERSION = "diffrep-store", 1
MANIFEST = "manifest.json"
SHARD_NAME = re.compile(r"\d{6,}-[0-9a-f]{12}")

Kind: TypeAlias = Literal["maps", "pooled", "points"]
StoreType: TypeAlias = Literal["float16", "bfloat16", "float32"]


class StoreError(ValueError):
    """A store that cannot be used, or not in this way; the message names the file and what is wrong."""


@dataclass(frozen=True, kw_only=True)
class Keep:
    """What of an image's feature maps is kept, and in which precision.

    ``maps`` keeps them whole, ``pooled`` their mean over the image (padding left out), one vector per tap, and
    ``points`` the vectors at chosen places, interpolated bilinearly.
    """

    kind: Kind = "pooled"
    dtype: StoreType = "float16"
    points: str = "grid:8"  # grid:N (N x N places), random:N (seeded by the image's name), or a .json file of places

    def __post_init__(self) -> None:
        check(self)
        if not re.fullmatch(r"(grid|random):[1-9]\d*|.+\.json", self.points):
            raise ValueError(f"points must be grid:N, random:N or a .json file of places, got {self.points!r}")


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """One shard: ``shards/NAME.safetensors`` holds the numbers, ``shards/NAME.json`` says which images they are of."""

    name: str  # number, then the first digits of the hash: a shard is never overwritten
    images: int  # whose features it holds
    quarantined: int  # images that could not be used
    bytes: int  # of the .safetensors file
    sha256: str  # of the .safetensors file
    records_bytes: int  # of the .json file
    records_sha256: str  # of the .json file
    environment: int = 0  # which of the manifest's environments made it

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not SHARD_NAME.fullmatch(self.name):  # it becomes part of a path
            raise ValueError(f"{self.name!r} is no name of a shard")
        for key in ("images", "quarantined", "bytes", "records_bytes", "environment"):
            if type(value := getattr(self, key)) is not int or value < 0:
                raise ValueError(f"{key} of shard {self.name} must be a number from 0 on, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a store is.

    Attributes:
        keep: what is kept of each image.
        features: provenance: backbone, weights and their hash, dtype, and every extraction setting.
        root: the folder to which the images' names are relative.
        shard_images: images that go into one shard.
        environments: library versions and devices that made shards.
        shards: in order.
    """

    keep: Keep
    features: Mapping[str, Any]
    root: str
    shard_images: int
    environments: tuple[Mapping[str, Any], ...] = ()
    shards: tuple[ShardEntry, ...] = field(default=())

    def __post_init__(self) -> None:
        taps = self.features.get("taps")
        if not isinstance(taps, (list, tuple)) or not taps or not all(isinstance(tap, str) for tap in taps):
            raise ValueError(f"features.taps must be a list of names, got {taps!r}")
        if not isinstance(self.root, str) or type(self.shard_images) is not int or self.shard_images < 1:
            raise ValueError(f"root {self.root!r} must be a folder and shard_images {self.shard_images!r} at least 1")
        if len({shard_number(shard.name) for shard in self.shards}) < len(self.shards):
            raise ValueError("two shards have one number")

    @property
    def images(self) -> int:
        return sum(shard.images for shard in self.shards)

    def with_shard(self, shard: ShardEntry, environment: Mapping[str, Any]) -> Manifest:
        """The manifest with one shard more, or with another in the place of the one of its number."""
        environments = self.environments
        if environment not in environments:
            environments += (environment,)
        shard = dataclasses.replace(shard, environment=environments.index(environment))
        others = [s for s in self.shards if shard_number(s.name) != shard_number(shard.name)]
        shards = tuple(sorted([*others, shard], key=lambda s: s.name))
        return dataclasses.replace(self, environments=environments, shards=shards)


def shard_number(name: str) -> int:
    """
    >>> shard_number("000012-5f3a9c01d2e4")
    12
    """
    return int(name.partition("-")[0])


def load_manifest(folder: Path) -> Manifest:
    """Read a store's manifest.

    Raises:
        StoreError: the folder holds none, or it is damaged, or of a format that this version cannot read.
    """
    file = folder / MANIFEST
    if not file.is_file():
        raise StoreError(f"{folder}: is no store of features (it has no {MANIFEST}); `diffrep extract` makes one")
    values = read_document(file, error=StoreError)
    if (values.pop("format", None), values.pop("version", None)) != (FORMAT, VERSION):
        raise StoreError(f"{file}: is not of format {FORMAT!r}, version {VERSION}: made by a newer diffrep?")
    try:
        values["keep"] = Keep(**values["keep"])
        values["environments"] = tuple(values["environments"])
        values["shards"] = tuple(ShardEntry(**shard) for shard in values["shards"])
        return Manifest(**values)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise StoreError(f"{file}: is damaged ({error})") from None


def save_manifest(folder: Path, manifest: Manifest) -> None:
    """Put a manifest in the place of the one that is there, at once."""
    text = json.dumps({"format": FORMAT, "version": VERSION, **dataclasses.asdict(manifest)}, indent=1)
    write_whole(folder / MANIFEST, text + "\n", sync=True)


_LIBRARIES = ("torch", "diffusers", "transformers", "timm", "open_clip_torch", "numpy", "Pillow")
_DESCRIPTIVE = frozenset({"source", "batch_size"})  # say where and how, and change the numbers by rounding at most


def provenance(backbone: Backbone, config: ExtractConfig) -> dict[str, Any]:
    """Everything that features depend on, JSON-ready: the backbone, its weights and every extraction setting."""
    values = {
        "backbone": backbone.name,
        "source": backbone.source,
        "weights_sha256": weights_sha256(backbone),
        "dtype": str(backbone.dtype).removeprefix("torch."),
        **dataclasses.asdict(config.resolve(backbone)),
    }
    return dict(json.loads(json.dumps(values)))


def weights_sha256(backbone: Backbone) -> str:
    """SHA-256 over all weights of a backbone, with their names, as they were loaded."""
    digest = hashlib.sha256()
    for part, module in sorted(backbone.named_children()):
        for name, values in sorted(module.state_dict().items()):
            digest.update(f"{part}.{name} {values.dtype} {tuple(values.shape)}".encode())
            digest.update(values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def environment(backbone: Backbone) -> dict[str, Any]:
    """Library versions and the device, JSON-ready."""
    import diffrep

    versions = {"diffrep": diffrep.__version__, "python": platform.python_version()}
    for library in _LIBRARIES:
        try:
            versions[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    device = backbone.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"device": name, "versions": versions}


def extract_config(features: Mapping[str, Any]) -> ExtractConfig:
    """The settings of a provenance, to extract further images in the same way."""
    known = {f.name for f in dataclasses.fields(ExtractConfig)}
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in features.items() if k in known}
    if isinstance(sizing := values.get("sizing"), Mapping):
        size = tuple(sizing["size"]) if isinstance(sizing["size"], list) else sizing["size"]
        values["sizing"] = Sizing(**{**sizing, "size": size})
    if isinstance(freeu := values.get("freeu"), Mapping):
        from diffrep.backbones import FreeU

        parts: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in freeu.items()}
        values["freeu"] = FreeU(**parts)
    return ExtractConfig(**values)


def difference(a: Mapping[str, Any], b: Mapping[str, Any], *, ignore: frozenset[str] = frozenset()) -> str | None:
    """The first setting in which two provenances differ, in words; None: their features can be compared.

    >>> difference({"backbone": "tiny", "seed": 0}, {"backbone": "tiny", "seed": 1})
    'seed 0 against 1'
    """
    for key in {**a, **b}:
        if key not in _DESCRIPTIVE | ignore and a.get(key) != b.get(key):
            return f"{key} {_short(a.get(key))} against {_short(b.get(key))}"
    return None


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."
