"""Collections: the whole pipeline against the bare network, and indexes of clustered vectors.

The pipeline reads, decodes, extracts and writes; the bare network gets its batches ready made. An index is
compared with the exact product over the same vectors.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from diffrep.backbones import load_backbone
from diffrep.eval.benchmarks.timing import PairedBenchmark, Row, interleave
from diffrep.features import ExtractConfig, extract_canvases
from diffrep.images import Sizing, fit_image, load_image
from diffrep.index import IndexConfig, IndexKind, StoredIndex
from diffrep.index.stored import index_vectors
from diffrep.store import BulkConfig, Keep, Vectors, extract_store, open_store

_CLUSTERS, _INNER = 3000, 48  # clusters lie in so many dimensions; the rest is noise
_RUN = 16_384


@dataclass(frozen=True)
class BulkBenchmark(PairedBenchmark):
    """Images per second of the whole pipeline, and build time, query time, recall and memory of indexes."""

    images: int = 512  # for the pipeline; 0 leaves it out
    side: int = 256  # of the network's canvas, pixels
    image_side: int = 480  # of the JPEG files, pixels
    workers: int = 1  # processes that decode
    n: tuple[int, ...] = (10_000, 100_000)  # vectors in an index; 1000000 takes some minutes and 3 GB of disk
    channels: int = 768
    queries: int = 1000
    kind: IndexKind | None = None  # of index; None: as the size says
    repeats: int = 3

    def rows(self) -> Iterator[Row]:
        """The pipeline, and each index."""
        try:
            import faiss

            faiss.omp_set_num_threads(1)
        except ImportError:
            pass
        with tempfile.TemporaryDirectory() as folder:
            if self.images:
                yield self.pipeline(Path(folder))
            for count in self.n:
                yield measure_index(Path(folder) / str(count), count, self.channels, self.queries, self.kind)

    def pipeline(self, folder: Path) -> Row:
        """A cheap network (tiny-dino) alone, against the pipeline around it: wall time and the process's CPU time."""
        (folder / "images").mkdir()
        for number in range(self.images):
            noise = np.random.default_rng(number).integers(0, 256, (12, 16, 3), dtype=np.uint8)
            size = (self.image_side, self.image_side * 3 // 4)
            Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(folder / f"images/{number:05d}.jpg")
        backbone = load_backbone("tiny-dino", device=self.device)
        config = ExtractConfig(sizing=Sizing("squash", self.side), batch_size=32).resolve(backbone)
        assert config.sizing is not None
        fitted = [fit_image(load_image(file), config.sizing) for file in sorted((folder / "images").iterdir())[:32]]
        canvases, placements = torch.stack([c for c, _ in fitted]).to(self.device), [p for _, p in fitted]
        wall: dict[str, list[float]] = {"network": [], "pipeline": []}
        stores: list[Path] = []

        def network() -> None:
            begun = time.perf_counter()
            for start in range(0, self.images, 32):
                count = min(32, self.images - start)
                extract_canvases(backbone, canvases[:count], placements[:count], config)
            wall["network"].append(time.perf_counter() - begun)

        def pipeline() -> None:
            stores.append(folder / f"store{len(stores)}")
            begun = time.perf_counter()
            bulk = BulkConfig(workers=self.workers, shard_images=256)
            extract_store([folder / "images"], stores[-1], backbone, config, Keep(), bulk)
            wall["pipeline"].append(time.perf_counter() - begun)

        times = interleave(
            {"network": network, "pipeline": pipeline}, repeats=self.repeats, warmups=1, device=self.device
        )
        best = {name: min(seconds) for name, seconds in wall.items()}
        stored, tap = open_store(stores[-1]), config.taps[0] if config.taps else ""
        maps = extract_canvases(backbone, canvases, placements, config).maps[tap].float().mean((-2, -1)).cpu()
        got = torch.stack([stored[number].features[tap].float() for number in range(len(fitted))])
        return Row(
            f"{self.images} JPEGs of {self.image_side} px to {self.side} px, tiny-dino, {self.workers} workers;"
            " CPU time of the network's process (decoding is in others)",
            times["network"],
            times["pipeline"],
            f"largest difference {float((maps - got).abs().max() / maps.abs().max()):.1e} of the maximum (float16)",
            f"wall {self.images / best['network']:.1f} against {self.images / best['pipeline']:.1f} images/s, the"
            f" pipeline keeps {best['network'] / best['pipeline']:.1%}",
        )


def clustered(count: int, channels: int, seed: int) -> Iterator[Tensor]:
    """Vectors of clusters in 48 dimensions with noise in all, in runs, float32, of unit length."""
    fixed = torch.Generator().manual_seed(0)
    inner = min(_INNER, channels)
    centres = torch.randn(_CLUSTERS, inner, generator=fixed)
    directions = torch.linalg.qr(torch.randn(channels, inner, generator=fixed)).Q
    draws = torch.Generator().manual_seed(seed)
    for start in range(0, count, _RUN):
        size = min(_RUN, count - start)
        which = torch.randint(_CLUSTERS, (size,), generator=draws)
        inside = centres[which] + 0.5 * torch.randn(size, inner, generator=draws)
        noise = 0.02 * torch.randn(size, channels, generator=draws)
        yield F.normalize(inside @ directions.T + noise, dim=1)


@dataclass(frozen=True, kw_only=True)
class IndexRow(Row):
    """A claim about an index.

    Attributes:
        bytes: per vector, of all that is held in memory or mapped but for the originals, which are read for the
            candidates alone.
        recall: of the nearest, found first and among ten, re-scored; the same of the codes alone.
    """

    bytes: float
    recall: tuple[float, ...]


def measure_index(folder: Path, count: int, channels: int, queries: int, kind: IndexKind | None) -> IndexRow:
    """Build an index of clustered vectors and compare it with the exact product, on one core.

    The time to make the vectors up is left out.
    """
    spent = 0.0

    def runs() -> Iterator[Vectors]:
        nonlocal spent
        batches, first = clustered(count, channels, seed=1), 0
        while True:
            begun = time.process_time()
            values = next(batches, None)
            spent += time.process_time() - begun
            if values is None:
                return
            yield Vectors(values, torch.arange(first, first + len(values)))
            first += len(values)

    names = [f"{number:07d}.jpg" for number in range(count)]
    collections = [{"root": "/", "images": count}]
    description = {"tap": "made up", "level": "image", "features": {}, "collections": collections}
    begun = time.process_time()
    index = index_vectors(runs(), folder, IndexConfig(kind=kind), description=description, names=names)
    build = time.process_time() - begun - spent
    asked = torch.cat(list(clustered(queries, channels, seed=2)))
    nearest: list[Tensor] = []
    index.search(asked[:1], 10)
    sides = {
        "product": lambda: nearest.append(exact_nearest(index, asked)),
        "index": lambda: index.search(asked, 10),
        "one by one": lambda: [index.search(one[None], 10) for one in asked[:200]],
    }
    times = interleave(sides, repeats=1, warmups=0)
    hits = [index.search(asked, 10, rescore=rescore).indices == nearest[0][:, None] for rescore in (True, False)]
    recall = tuple(float(hit[:, :k].any(1).float().mean()) for hit in hits for k in (1, 10))
    held = sum(file.stat().st_size for file in folder.iterdir() if file.name != "vectors.safetensors")
    held += 4 * count * channels if index.design.kind == "flat" else 0
    together, alone = 1000 * times["index"].median / queries, 1000 * times["one by one"].median / len(asked[:200])
    return IndexRow(
        f"{queries} queries of an index ({index.design.kind}) of {count:,} x {channels} against the exact product",
        times["product"],
        times["index"],
        f"recall@1 {recall[0]:.4f}, @1 in 10 {recall[1]:.4f}; of the codes alone {recall[2]:.4f}, {recall[3]:.4f}",
        f"{together:.3f} ms a query, {alone:.3f} one by one; built in {build:.1f} s, {held / count:.0f} bytes/vector",
        bytes=held / count,
        recall=recall,
    )


def exact_nearest(index: StoredIndex, queries: Tensor) -> Tensor:
    """(Q,): the nearest of all original vectors."""
    best = torch.full((len(queries),), -torch.inf)
    where = torch.zeros(len(queries), dtype=torch.int64)
    first = 0
    for chunk in index.vectors.split(_RUN):
        scores, rows = (queries @ chunk.float().T).max(1)
        better = scores > best
        best, where = torch.where(better, scores, best), torch.where(better, rows + first, where)
        first += len(chunk)
    return where
