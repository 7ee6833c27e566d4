"""Building an index of stores: vectors are streamed to disk, the index is trained on a sample of them."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from diffrep.files import replace_folder, write_document
from diffrep.index.exact import import_faiss
from diffrep.index.stored import (
    CODES,
    DESCRIPTION,
    FORMAT,
    PLACES,
    VECTORS,
    VERSION,
    Design,
    IndexKind,
    Level,
    StoredIndex,
    choose_kind,
    shard_names,
)
from diffrep.store import Store, StoreError, Vectors
from diffrep.store.manifest import difference

logger = logging.getLogger(__name__)

_HEADER = 256  # bytes kept free for the header of the vectors' file, which is known last
_OPQ_ROUNDS, _OPQ_SAMPLE = 20, 20_000
_CHUNK = 65_536  # vectors that are added at a time


@dataclass(frozen=True, kw_only=True)
class IndexConfig:
    """What is indexed and how."""

    tap: str | None = None  # whose vectors; may be left out where the stores have one
    level: Level | None = None  # image: whole images, patch: places in them; else places, if the store has them
    kind: IndexKind | None = None  # flat, hnsw, ivf or ivf-pq; else chosen by size, and the reason is printed
    sample: int = 100_000  # vectors on which it is trained, at most
    seed: int = 0  # of the sample
    device: str = "cpu"  # where it is trained and filled: cuda needs faiss-gpu

    def __post_init__(self) -> None:
        if self.sample < 1:
            raise ValueError(f"sample must be at least 1, got {self.sample}")
        torch.Generator().manual_seed(self.seed)  # refuses what is no seed


def index_store(
    stores: Sequence[Store],
    folder: str | Path,
    config: IndexConfig | None = None,
    *,
    replace: bool = False,
    progress: bool = False,
) -> StoredIndex:
    """Index the vectors of one tap of stores, and write the index into a new folder.

    Args:
        stores: with features of one origin: the same backbone, weights, tap, seed and settings.
        replace: put it in the place of an index that is in the folder.

    Raises:
        StoreError: the stores' features are of different origin, or lack the tap or the level.
        ValueError: the folder exists already, or there are too few vectors for the kind of index.
        OSError: the folder cannot be written to.
        ImportError: ``cuda`` without faiss-gpu.
    """
    config = config or IndexConfig()
    if not stores:
        raise ValueError("index_store needs at least one store")
    check_same_origin(stores)
    level = config.level or ("image" if stores[0].kind == "pooled" else "patch")
    tap = stores[0].taps[0] if config.tap is None and len(stores[0].taps) == 1 else config.tap
    return index_vectors(
        _all_vectors(stores, tap, level),
        folder,
        config,
        description={
            "tap": tap or stores[0].taps[0],
            "level": level,
            "features": dict(stores[0].manifest.features),
            "collections": [
                {"root": str(store.root), "images": len(store), "shards": shard_names(store)} for store in stores
            ],
        },
        names=[name for store in stores for name in store.names],
        replace=replace,
        progress=progress,
    )


def index_vectors(
    runs: Iterator[Vectors],
    folder: str | Path,
    config: IndexConfig,
    *,
    description: Mapping[str, Any],
    names: Sequence[str],
    replace: bool = False,
    progress: bool = False,
) -> StoredIndex:
    """Index vectors that come in runs, and write the index into a new folder.

    Args:
        description: tap, level, features and collections, as `StoredIndex` has them.
        names: of the images, which the runs number.

    Raises:
        ValueError, OSError, ImportError: as `index_store`.
    """
    folder = Path(folder)
    empty = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    if folder.is_symlink() or not (empty or (replace and (folder / DESCRIPTION).is_file())):
        raise ValueError(f"{folder}: exists already; remove it, or name another folder for the index")

    def write(partial: Path) -> None:
        vectors = _write_vectors(partial, runs, names, progress)
        design = choose_kind(vectors.shape[0], vectors.shape[1], config.kind)
        logger.info("index: %s, because %s", design.factory or design.kind, design.reason)
        if design.factory:
            codes = train(vectors, design, sample=config.sample, seed=config.seed, device=config.device)
            add(codes, vectors, progress=progress)
            _write_codes(codes, partial / CODES)
        document = {"format": FORMAT, "version": VERSION, **description, "design": asdict(design)}
        write_document(partial / DESCRIPTION, document)

    replace_folder(folder, write)
    return StoredIndex(folder)


def check_same_origin(stores: Sequence[Store]) -> None:
    """Refuse to mix features of different backbones, taps, seeds or other settings.

    Raises:
        StoreError: naming the first difference.
    """
    first = stores[0]
    for other in stores[1:]:
        ways = ({**store.manifest.features, "kind": store.kind} for store in (first, other))
        if (differing := difference(*ways)) is not None:
            raise StoreError(
                f"{first.folder} and {other.folder} hold features of different origin ({differing}): they cannot be"
                " mixed"
            )


def train(vectors: Tensor, design: Design, *, sample: int, seed: int, device: str = "cpu") -> Any:
    """A FAISS index of a design, trained on a sample of (N, C) vectors, empty."""
    faiss = import_faiss()
    codes = faiss.index_factory(vectors.shape[1], design.factory, faiss.METRIC_L2)
    if design.factory.startswith("OPQ"):
        rotation = faiss.downcast_VectorTransform(codes.chain.at(0))
        # fitted to the 4-bit codes that follow; FAISS's default, 8 bits, takes sixteen times as long
        rotation.pq = quantiser = faiss.ProductQuantizer(rotation.d_out, rotation.M, 4)
        rotation.niter, rotation.max_train_points = _OPQ_ROUNDS, _OPQ_SAMPLE
    if device != "cpu":
        if not hasattr(faiss, "StandardGpuResources") or not faiss.get_num_gpus():
            raise ImportError(f"an index on {device!r} needs faiss-gpu and a GPU: pip install 'diffrep[faiss-gpu]'")
        codes = faiss.index_cpu_to_all_gpus(codes)
    if not codes.is_trained:
        chosen = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(seed))[:sample]
        codes.train(vectors[chosen.sort().values].float().numpy())
    if design.factory.startswith("OPQ"):
        rotation.pq = None  # it belongs to Python and ends with this function
        del quantiser
    return codes


def add(codes: Any, vectors: Tensor, *, progress: bool = False) -> None:
    """Fill a trained index, chunk by chunk."""
    for chunk in tqdm(vectors.split(_CHUNK), desc="index", unit="chunk", disable=not progress):
        codes.add(chunk.float().numpy())


def _write_codes(codes: Any, file: Path) -> None:
    faiss = import_faiss()
    if hasattr(faiss, "index_gpu_to_cpu"):  # leaves what is on the CPU as it is
        codes = faiss.index_gpu_to_cpu(codes)
    try:
        faiss.write_index(codes, str(file))
    except RuntimeError as error:
        raise OSError(f"{file.name}: cannot be written ({str(error).splitlines()[-1]})") from None


def _all_vectors(stores: Sequence[Store], tap: str | None, level: Level) -> Iterator[Vectors]:
    first = 0  # number of the store's first image among all
    for store in stores:
        for run in store.vectors(tap, level):
            yield dataclasses.replace(run, images=run.images + first)
        first += len(store)


def _write_vectors(folder: Path, runs: Iterator[Vectors], names: Sequence[str], progress: bool) -> Tensor:
    """Stream vectors of unit length into a safetensors file, and their places into another; (N, C) float16."""
    owners: list[Tensor] = []
    points: list[Tensor] = []
    channels = 0
    with (
        (folder / VECTORS).open("wb") as file,
        tqdm(total=len(names), desc="read", unit="image", disable=not progress) as bar,
    ):
        file.write(b" " * (8 + _HEADER))
        for run in runs:
            channels = run.values.shape[1]
            file.write(F.normalize(run.values, dim=1).half().numpy().data.cast("B"))
            owners.append(run.images.int())
            if run.points is not None:
                points.append(run.points)
            bar.update(int(run.images[-1]) + 1 - bar.n)
        count = sum(map(len, owners))
        if not count:
            raise StoreError("the stores hold no vectors")
        entry = {"dtype": "F16", "shape": [count, channels], "data_offsets": [0, 2 * count * channels]}
        file.seek(0)
        file.write(_HEADER.to_bytes(8, "little") + json.dumps({"vectors": entry}).encode())
    encoded = [name.encode("utf-8", "surrogatepass") for name in names]
    places = {
        "images": torch.cat(owners),
        "names": torch.frombuffer(bytearray(b"".join(encoded)), dtype=torch.uint8),
        "ends": torch.tensor([len(name) for name in encoded]).cumsum(0),
    }
    save_file(places | ({"points": torch.cat(points)} if points else {}), folder / PLACES)
    with safe_open(folder / VECTORS, "pt") as opened:
        vectors: Tensor = opened.get_tensor("vectors")
    return vectors
