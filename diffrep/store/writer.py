"""Writing into a store: one writer at a time, shard by shard, each there as a whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout

from diffrep.features import FeatureMaps
from diffrep.files import sweep_partials
from diffrep.store.manifest import (
    MANIFEST,
    SHARD_NAME,
    Keep,
    Manifest,
    ShardEntry,
    StoreError,
    difference,
    load_manifest,
    save_manifest,
    shard_number,
)
from diffrep.store.shards import SHARDS, ImageFile, PlacesError, ShardBuilder, load_records, select

LOCK = ".lock"


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
        manifest = replace(self.manifest, shards=tuple(s for s in self.manifest.shards if s != shard))
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
