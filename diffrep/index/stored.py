"""An index of stores, on disk: FAISS finds candidates, their original vectors decide. Both are memory-mapped.

Vectors are streamed to disk, the index is trained on a sample of them. All kinds are searched with vectors of unit
length, where the order by Euclidean distance, which a centred projection keeps as far as it can, is the order by
cosine.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from diffrep.files import number_of, one_line, read_document, read_weights, replace_folder, save_weights, write_document
from diffrep.index.exact import Neighbours, TorchIndex, build_index, import_faiss, search
from diffrep.settings import SEED, check
from diffrep.store import Store, StoreError, Vectors
from diffrep.store.manifest import difference

logger = logging.getLogger(__name__)

FORMAT, VERSION = "diffrep-index", 1
DESCRIPTION, VECTORS, PLACES, CODES = "index.json", "vectors.safetensors", "places.safetensors", "codes.faiss"

IndexKind: TypeAlias = Literal["flat", "hnsw", "ivf", "ivf-pq"]
Level: TypeAlias = Literal["image", "patch"]

EXACT_TO = 100_000  # vectors: up to here an exact product answers within some milliseconds
EIGHT_BIT_TO = 20_000_000  # up to here 8 bits of 128 components, some 140 bytes a vector, fit into memory
_PROJECTED = 128  # components that 8-bit codes keep
_SUBSPACES = 64  # of product quantisation, 4 bits each
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
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where it is trained and filled: cuda needs faiss-gpu

    def __post_init__(self) -> None:
        check(self, sample="1..", seed=SEED)


@dataclass(frozen=True)
class Design:
    """How one index is built.

    Attributes:
        kind: flat: exact; hnsw: a graph; ivf: lists with 8-bit codes of principal components; ivf-pq: lists with
            4-bit product codes after an optimised rotation (OPQ).
        reason: why this kind, in words.
        factory: the description for FAISS's `index_factory`; empty for flat.
        lists: inverted lists, 0 without.
        probes: lists that a query looks into.
        rescore: candidates whose original vectors are compared.
    """

    kind: IndexKind
    reason: str
    factory: str
    lists: int
    probes: int
    rescore: int

    def __post_init__(self) -> None:
        check(self)


def choose_kind(count: int, channels: int, kind: IndexKind | None = None) -> Design:
    """The design for (count, channels) vectors; `kind` overrides the choice by size.

    >>> choose_kind(1_000_000, 768).factory
    'PCA128,IVF2048,SQ8'

    Raises:
        ValueError: there is no such kind, or there are too few vectors to train it.
    """
    if kind is not None:
        reason = f"{kind} was asked for"
    elif count <= EXACT_TO:
        kind = "flat"
        reason = f"{count:,} vectors are no more than {EXACT_TO:,}: the exact product is fast enough and misses nothing"
    elif count <= EIGHT_BIT_TO:
        kind = "ivf"
        reason = (
            f"more than {EXACT_TO:,} vectors: 8-bit codes are quick to build and fit into memory up to {EIGHT_BIT_TO:,}"
        )
    else:
        kind = "ivf-pq"
        reason = f"more than {EIGHT_BIT_TO:,} vectors: product codes need the least memory"
    if kind == "hnsw":
        return Design(kind, reason, "HNSW32,Flat", 0, 64, 10)
    if kind not in ("ivf", "ivf-pq"):  # `Design` refuses what is none at all
        return Design(kind, reason, "", 0, 0, 0)
    if count < 1000:
        raise ValueError(
            f"an index of kind {kind!r} is trained on at least 1,000 vectors, there are {count:,}: use 'flat'"
        )
    lists = min(2 ** round(math.log2(2 * math.sqrt(count))), count // 40)
    if kind == "ivf":
        projection = f"PCA{_PROJECTED}," if channels > _PROJECTED else ""
        return Design(kind, reason, f"{projection}IVF{lists},SQ8", lists, min(lists, 8), 20)
    subspaces = next(m for m in (_SUBSPACES, 32, 16, 8, 4, 2, 1) if channels >= 2 * m or m == 1)
    rotated = min(channels // subspaces, 4) * subspaces
    factory = f"OPQ{subspaces}_{rotated},IVF{lists},PQ{subspaces}x4fs"
    return Design(kind, reason, factory, lists, min(lists, 8), 50)


@dataclass(frozen=True)
class Place:
    """Where a vector comes from.

    Attributes:
        image: name, relative to `root`.
        root: folder of the collection.
        point: (x, y) in pixels of the image; None for whole images.
    """

    image: str
    root: Path
    point: tuple[float, float] | None


class StoredIndex:
    """The vectors of one tap of one or more stores.

    Args:
        folder: written by `index_store`.

    Raises:
        ValueError: the folder holds no index, or a damaged one; the message names the file.

    Attributes:
        tap, level: which vectors; level ``image`` has one per image, ``patch`` one per place.
        features: provenance that all of them share.
        design: kind of index, why, and its settings.
        vectors: (N, C) float16, of unit length, memory-mapped.
        collections: root, number of images and shards of each store; names are memory-mapped too.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        file = self.folder / DESCRIPTION
        if not file.is_file():
            raise ValueError(f"{self.folder}: is no index (it has no {DESCRIPTION}); `diffrep index` makes one")
        values = read_document(file)
        try:
            if (values["format"], values["version"]) != (FORMAT, VERSION):
                raise ValueError(f"{DESCRIPTION} is not of format {FORMAT!r}, version {VERSION}")
            self.tap: str = values["tap"]
            self.level: Level = values["level"]
            self.features: Mapping[str, Any] = values["features"]
            self.design = Design(**values["design"])
            self.collections: list[dict[str, Any]] = values["collections"]
            self.vectors = read_weights(self.folder / VECTORS)[0]["vectors"]
            places, _ = read_weights(self.folder / PLACES)
            self._images, self._names, self._ends = places["images"], places["names"], places["ends"]
            self._points = places["points"] if self.level == "patch" else None
            self._check()
        except (ValueError, KeyError, TypeError) as error:
            raise self._damaged(one_line(error)) from None

    def _check(self) -> None:
        """Refuse files that do not belong together.

        Raises:
            ValueError: saying which do not.
        """
        count, collections = len(self.vectors), self.collections
        if not (isinstance(self.tap, str) and self.level in ("image", "patch") and isinstance(self.features, Mapping)):
            raise ValueError(f"{DESCRIPTION} must name a tap, a level and features")
        if not all(type(c["images"]) is int and isinstance(c["root"], str) for c in collections):
            raise ValueError(f"{DESCRIPTION} must have a root and a number of images for each collection")
        if self.vectors.ndim != 2 or not self.vectors.is_floating_point() or 0 in self.vectors.shape:
            raise ValueError(f"{VECTORS} must hold a matrix, got {tuple(self.vectors.shape)}")
        if self._images.shape != (count,) or self._images.is_floating_point() or self._ends.ndim != 1:
            raise ValueError(f"{PLACES} must name an image for each of the {count:,} vectors")
        if self._points is not None and self._points.shape != (count, 2):
            raise ValueError(f"{PLACES} must hold a point for each of the {count:,} vectors")

    def _damaged(self, reason: str) -> ValueError:
        return ValueError(f"{self.folder}: the index is damaged ({reason}); `diffrep index` makes it again")

    def __len__(self) -> int:
        return len(self.vectors)

    def __repr__(self) -> str:
        what = f"{number_of(len(self), 'vector')} of {self.tap}, {self.level}, {self.design.kind}"
        return f"StoredIndex({str(self.folder)!r}, {what})"

    def holds(self, stores: Sequence[Store]) -> bool:
        """Whether the index was made of just these stores, as they are now."""
        return [collection.get("shards") for collection in self.collections] == [_shards(store) for store in stores]

    def search(self, queries: Tensor, k: int = 10, *, rescore: bool = True) -> Neighbours:
        """The k nearest vectors of each of (Q, C) queries by cosine, best first.

        Args:
            rescore: compare the original vectors of the candidates; without, the codes alone decide, and scores
                are those of the codes.

        Raises:
            ValueError: the queries have other channels, or k is not in 1..N.
        """
        if queries.ndim != 2 or queries.shape[1] != self.vectors.shape[1]:
            raise ValueError(f"queries must be (Q, {self.vectors.shape[1]}), got {tuple(queries.shape)}")
        if not 1 <= k <= len(self):
            raise ValueError(f"k must be in 1..{len(self)}, the size of the index, got {k}")
        queries = F.normalize(queries.float().cpu(), dim=1)
        if self.design.kind == "flat":
            return search(self._exact, queries, k)
        candidates = min(len(self), max(k, self.design.rescore) if rescore else k)
        distances, rows = self._codes.search(queries.numpy(), candidates)
        indices, scores = torch.from_numpy(rows), 1 - torch.from_numpy(distances) / 2  # of unit vectors
        if int(indices.max()) >= len(self):
            raise self._damaged(f"{CODES} knows vectors that {VECTORS} does not hold")
        if rescore:
            originals = self.vectors[indices.clamp(min=0).reshape(-1)].float()
            scores = torch.bmm(originals.view(*indices.shape, -1), queries[:, :, None])[..., 0]
        scores = scores.masked_fill(indices < 0, -torch.inf)  # the lists looked into held fewer than asked for
        order = scores.argsort(dim=1, descending=True, stable=True)[:, :k]
        return Neighbours(indices.gather(1, order), scores.gather(1, order))

    def place(self, vector: int) -> Place:
        """Where a vector comes from.

        Raises:
            ValueError: the index does not know, it is damaged.
        """
        number = rest = self.image_of(vector)
        point = None if self._points is None else tuple(self._points[vector].tolist())
        for collection in self.collections:
            if 0 <= rest < collection["images"] and number < len(self._ends):
                start, end = int(self._ends[number - 1]) if number else 0, int(self._ends[number])
                try:
                    name = bytes(self._names[start:end].tolist()).decode("utf-8", "surrogatepass")
                except ValueError as error:
                    raise self._damaged(one_line(error)) from None
                return Place(name, Path(collection["root"]), point)
            rest -= collection["images"]
        raise self._damaged(f"{PLACES} names image {number}, which no collection holds")

    def image_of(self, vector: int) -> int:
        """The number of the image of a vector, counted over all stores."""
        return int(self._images[vector])

    @cached_property
    def _exact(self) -> TorchIndex:
        try:
            return build_index(F.normalize(self.vectors.float(), dim=1))
        except ValueError as error:  # values that are not finite
            raise self._damaged(one_line(error)) from None

    @cached_property
    def _codes(self) -> Any:
        faiss, file = import_faiss(), self.folder / CODES
        graph = self.design.kind == "hnsw"  # FAISS maps graphs and inverted lists by different readers
        try:
            codes = faiss.read_index(str(file), faiss.IO_FLAG_MMAP_IFC if graph else faiss.IO_FLAG_MMAP)
            if (codes.ntotal, codes.d) != tuple(self.vectors.shape):
                raise RuntimeError(f"it holds {codes.ntotal:,} vectors of {codes.d} channels")
            # how far a query looks
            parameter = "efSearch" if graph else "nprobe"
            faiss.ParameterSpace().set_index_parameter(codes, parameter, self.design.probes)
        except RuntimeError as error:
            reason = str(error).splitlines()[-1]
            raise ValueError(f"{file}: is damaged ({reason}); `diffrep index` makes it again") from None
        return codes


def open_index(folder: str | Path) -> StoredIndex:
    """Open an index that `index_store` wrote.

    Raises:
        ValueError: the folder holds none, or a damaged one.
    """
    return StoredIndex(folder)


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
    first, level = stores[0], config.level or ("image" if stores[0].kind == "pooled" else "patch")
    for other in stores[1:]:
        ways = ({**store.manifest.features, "kind": store.kind} for store in (first, other))
        if (differing := difference(*ways)) is not None:
            raise StoreError(
                f"{first.folder} and {other.folder} hold features of different origin ({differing}): they cannot be"
                " mixed"
            )
    tap = first.taps[0] if config.tap is None and len(first.taps) == 1 else config.tap

    def runs() -> Iterator[Vectors]:
        before = 0  # images of earlier stores
        for store in stores:
            for run in store.vectors(tap, level):
                yield dataclasses.replace(run, images=run.images + before)
            before += len(store)

    description = {
        "tap": tap or first.taps[0],
        "level": level,
        "features": dict(first.manifest.features),
        "collections": [{"root": str(store.root), "images": len(store), "shards": _shards(store)} for store in stores],
    }
    names = [name for store in stores for name in store.names]
    return index_vectors(
        runs(), folder, config, description=description, names=names, replace=replace, progress=progress
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
            _write_codes(vectors, design, config, partial / CODES, progress)
        document = {"format": FORMAT, "version": VERSION, **description, "design": asdict(design)}
        write_document(partial / DESCRIPTION, document)

    replace_folder(folder, write)
    return StoredIndex(folder)


def _write_vectors(folder: Path, runs: Iterator[Vectors], names: Sequence[str], progress: bool) -> Tensor:
    """Stream vectors of unit length into a safetensors file, and their places into another; (N, C) float16."""
    images: list[Tensor] = []
    points: list[Tensor] = []
    channels = 0
    with (
        (folder / VECTORS).open("wb") as file,
        tqdm(total=len(names), desc="read", unit="image", disable=not progress) as bar,
    ):
        file.write(b" " * (8 + _HEADER))
        for run in runs:
            if not len(run.values):  # images thinner than a cell
                continue
            channels = run.values.shape[1]
            file.write(F.normalize(run.values, dim=1).half().numpy().data.cast("B"))
            images.append(run.images.int())
            if run.points is not None:
                points.append(run.points)
            bar.update(int(run.images[-1]) + 1 - bar.n)
        count = sum(map(len, images))
        if not count:
            raise StoreError("there is nothing to index: no image covers a cell of the backbone's grid")
        entry = {"dtype": "F16", "shape": [count, channels], "data_offsets": [0, 2 * count * channels]}
        file.seek(0)
        file.write(_HEADER.to_bytes(8, "little") + json.dumps({"vectors": entry}).encode())
    encoded = [name.encode("utf-8", "surrogatepass") for name in names]
    places = {
        "images": torch.cat(images),
        "names": torch.frombuffer(bytearray(b"".join(encoded)), dtype=torch.uint8),
        "ends": torch.tensor([len(name) for name in encoded]).cumsum(0),
    }
    save_weights(folder / PLACES, places | ({"points": torch.cat(points)} if points else {}))
    return read_weights(folder / VECTORS)[0]["vectors"]


def _write_codes(vectors: Tensor, design: Design, config: IndexConfig, file: Path, progress: bool) -> None:
    """Train a FAISS index of a design on a sample of (N, C) vectors, fill it chunk by chunk, and write it."""
    faiss = import_faiss()
    codes = faiss.index_factory(vectors.shape[1], design.factory, faiss.METRIC_L2)
    rotation: Any = None
    if design.factory.startswith("OPQ"):
        rotation = faiss.downcast_VectorTransform(codes.chain.at(0))
        # fitted to the 4-bit codes that follow; FAISS's default, 8 bits, takes sixteen times as long
        rotation.pq = quantiser = faiss.ProductQuantizer(rotation.d_out, rotation.M, 4)
        rotation.niter, rotation.max_train_points = _OPQ_ROUNDS, _OPQ_SAMPLE
    gpus = faiss.get_num_gpus() if hasattr(faiss, "StandardGpuResources") else 0
    if config.device == "cuda" and not gpus:
        raise ImportError("an index on 'cuda' needs faiss-gpu and a GPU: pip install 'diffrep[faiss-gpu]'")
    if config.device != "cpu" and gpus:
        codes = faiss.index_cpu_to_all_gpus(codes)
    if not codes.is_trained:
        chosen = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(config.seed))[: config.sample]
        codes.train(vectors[chosen.sort().values].float().numpy())
    if rotation is not None:
        rotation.pq = None  # it belongs to Python and ends with this function
        del quantiser
    for chunk in tqdm(vectors.split(_CHUNK), desc="index", unit="chunk", disable=not progress):
        codes.add(chunk.float().numpy())
    if hasattr(faiss, "index_gpu_to_cpu"):  # leaves what is on the CPU as it is
        codes = faiss.index_gpu_to_cpu(codes)
    try:
        faiss.write_index(codes, str(file))
    except RuntimeError as error:
        raise OSError(f"{file.name}: cannot be written ({str(error).splitlines()[-1]})") from None


def _shards(store: Store) -> list[str]:
    """The shards of a store, which are named after their contents: what an index was made of."""
    return [shard.name for shard in store.manifest.shards]
