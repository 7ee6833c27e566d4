"""The manifest of a store: what the features are, how they were made, which shards hold them; and its one writer.

The manifest is the store's only point of truth: what it does not list does not exist, and it is replaced as a
whole, so that a run that is killed leaves the last complete state. It holds no times and no random names: the same
images, settings (the batch size among them), threads and libraries give the same bytes. Another batch size or number
of threads changes features by rounding only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from filelock import BaseFileLock, FileLock, Timeout

from diffrep.backbones import Backbone
from diffrep.devices import library_versions
from diffrep.features import ExtractConfig, FeatureMaps
from diffrep.files import one_line, read_document, sweep_partials, write_whole
from diffrep.images import Sizing
from diffrep.settings import check_keys
from diffrep.store.shards import (
    SHARD_NAME,
    SHARDS,
    ImageFile,
    Keep,
    PlacesError,
    ShardBuilder,
    ShardEntry,
    StoreError,
    load_records,
    select,
    shard_number,
)

FORMAT, VERSION = "diffrep-store", 1
MANIFEST, LOCK = "manifest.json", ".lock"


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
        check_keys(Keep, values["keep"], "keep")
        values["keep"] = Keep(**values["keep"])
        values["environments"] = tuple(values["environments"])
        values["shards"] = tuple(ShardEntry(**shard) for shard in values["shards"])
        check_keys(Manifest, values, "it")
        return Manifest(**values)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise StoreError(f"{file}: is damaged ({one_line(error)})") from None


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
    device = backbone.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"device": name, "versions": library_versions(_LIBRARIES)}


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


class StoreWriter:
    """The one process that may change a store, as a context manager.

    Opening makes the store if there is none, takes its lock, and removes what a killed run left behind. The lock
    is the system's: it goes with the process, however that ends. A new store that got no shard before an error is
    removed again. Nothing is written or removed through a link, and no file whose name is not of a store's kind.

    Args:
        folder: the store.
        features: provenance; see `diffrep.store.manifest`.
        root: the folder to which image names are relative. None: that of the store that is there.

    Raises:
        StoreError: the folder holds something else, another writer, or features of another origin.
        OSError: the folder cannot be written to.
    """

    def __init__(
        self,
        folder: str | Path,
        features: Mapping[str, Any],
        keep: Keep,
        *,
        root: str | Path | None = None,
        shard_images: int = 1024,
    ) -> None:
        self.folder = Path(folder)
        if shard_images < 1:
            raise ValueError(f"shard_images must be at least 1, got {shard_images}")
        if self.folder.exists() and not self.folder.is_dir():
            raise StoreError(f"{self.folder}: is a file, a store is a folder")
        for path in (self.folder / name for name in (MANIFEST, LOCK, SHARDS)):
            if path.is_symlink() or (path.exists() and path.is_dir() != (path.name == SHARDS)):
                kind = "folder" if path.name == SHARDS else "file"
                raise StoreError(f"{path}: must be a {kind} of the store, no link")
        is_store = (self.folder / MANIFEST).is_file()
        if not is_store and self.folder.is_dir() and any(p.name != LOCK for p in self.folder.iterdir()):
            raise StoreError(f"{self.folder}: is neither empty nor a store (it has no {MANIFEST}); name another folder")
        self._root_matters = root is not None
        place = str(Path(root or ".").absolute())
        wanted = Manifest(keep=keep, features=features, root=place, shard_images=shard_images)
        if is_store:
            self._check_same(load_manifest(self.folder), wanted)  # before anything is written
        self._created = [p for p in (self.folder, *self.folder.parents) if not p.exists()]
        self._new, self.manifest = not is_store, wanted
        self._lock = self._take_lock()
        try:
            if is_store:
                self.manifest = load_manifest(self.folder)
                self._check_same(self.manifest, wanted)
            else:
                save_manifest(self.folder, wanted)
            (self.folder / SHARDS).mkdir(exist_ok=True)
            self._clean()
        except BaseException:
            self.__exit__(*sys.exc_info())
            raise

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and self._new and not self.manifest.shards:
            self._undo()
        self._lock.release()

    def save(self, builder: ShardBuilder, number: int) -> ShardEntry:
        """Write the files of a shard, which do not count before they are committed.

        Raises:
            OSError: the disk is full or cannot be written to; the store is as it was.
        """
        try:
            return builder.save(self.folder, number)
        except OSError as error:
            raise self._explained(error) from None

    def commit(self, shard: ShardEntry, environment: Mapping[str, Any]) -> None:
        """List a shard in the manifest: from here on it is there. One of the same number is replaced."""
        replaced = [s for s in self.manifest.shards if shard_number(s.name) == shard_number(shard.name)]
        manifest = self.manifest.with_shard(shard, environment)
        try:
            save_manifest(self.folder, manifest)
        except OSError as error:
            raise self._explained(error) from None
        self.manifest = manifest
        for old in replaced:
            if old.name != shard.name:
                self._remove(old.name)

    def drop(self, shard: ShardEntry) -> None:
        """Take a shard out of the store."""
        manifest = dataclasses.replace(self.manifest, shards=tuple(s for s in self.manifest.shards if s != shard))
        save_manifest(self.folder, manifest)
        self.manifest = manifest
        self._remove(shard.name)

    def _take_lock(self) -> BaseFileLock:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.folder / LOCK, thread_local=False)
            lock.acquire(blocking=False)
        except Timeout:
            raise StoreError(f"{self.folder}: another process is writing into this store; wait for it to end") from None
        except OSError as error:
            self._remove_folders()
            raise OSError(f"{self.folder}: cannot be written to ({error.strerror})") from None
        return lock

    def _check_same(self, manifest: Manifest, wanted: Manifest) -> None:
        differing = difference(manifest.features, wanted.features)
        for key in ("keep", "shard_images", "root"):
            if differing is None and (self._root_matters or key != "root"):
                differing = difference({key: getattr(manifest, key)}, {key: getattr(wanted, key)})
        if differing is not None:
            raise StoreError(f"{self.folder} was made otherwise ({differing}): use the same settings or another folder")

    def _clean(self) -> None:
        """Remove shards that a killed run could not list any more. Files of other names are not the store's."""
        listed = {shard.name for shard in self.manifest.shards}
        for file in sorted((self.folder / SHARDS).iterdir()):
            ours = SHARD_NAME.fullmatch(file.stem) and file.suffix in (".safetensors", ".json")
            if ours and file.stem not in listed and not file.is_dir():
                file.unlink()
        sweep_partials(self.folder / SHARDS)
        sweep_partials(self.folder)

    def _undo(self) -> None:
        """Remove a store that was begun and came to nothing, with the folders that were made for it."""
        with contextlib.suppress(OSError):
            self._clean()
        for name in (MANIFEST, LOCK):
            (self.folder / name).unlink(missing_ok=True)
        self._remove_folders()

    def _remove_folders(self) -> None:
        for folder in (self.folder / SHARDS, *self._created):
            with contextlib.suppress(OSError):  # it was not made, or somebody else has put something there
                folder.rmdir()

    def _remove(self, name: str) -> None:
        for ending in ("safetensors", "json"):
            (self.folder / SHARDS / f"{name}.{ending}").unlink(missing_ok=True)

    def _explained(self, error: OSError) -> OSError:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return OSError(f"{self.folder}: cannot be written to ({error.strerror})")
        what = "the disk is full" if error.errno == errno.ENOSPC else error.strerror
        return OSError(
            f"{self.folder}: {what}; the {self.manifest.images:,} images that are in the store are safe, make room"
            " and run the same command again"
        )


def write_store(
    folder: str | Path,
    images: Iterable[tuple[str, FeatureMaps]],
    keep: Keep | None = None,
    *,
    root: str | Path | None = None,
    shard_images: int = 1024,
) -> Path:
    """Write features that are in memory already into a new store, or append them to one with the same settings.

    `diffrep.extract_store` is the way for whole collections: it decodes, batches, resumes and hashes the images.

    Args:
        images: (name, maps) with maps of one image each, from one backbone and configuration.

    Raises:
        ValueError: no image is given, or a name is in the store already.
    """
    keep = keep or Keep()
    images = iter(images)
    if (first := next(images, None)) is None:
        raise ValueError("write_store needs at least one image")
    features = json.loads(json.dumps({"taps": first[1].taps, **first[1].settings}, default=str))
    with StoreWriter(folder, features, keep, root=root, shard_images=shard_images) as writer:
        known = {name for shard in writer.manifest.shards for name in load_records(writer.folder, shard).names}
        number = shard_number(writer.manifest.shards[-1].name) + 1 if writer.manifest.shards else 0
        builder = ShardBuilder(keep)
        for name, maps in chain([first], images):
            if name in known:
                raise ValueError(f"{name} is in the store {folder} already")
            known.add(name)
            (stored,) = select(maps, keep, [ImageFile(name, 0, 0)])
            if isinstance(stored, PlacesError):
                raise stored
            builder.add(len(builder), stored, maps.grids)
            if len(builder) == shard_images:
                writer.commit(writer.save(builder, number), {})
                builder, number = ShardBuilder(keep), number + 1
        if len(builder):
            writer.commit(writer.save(builder, number), {})
    return Path(folder)
