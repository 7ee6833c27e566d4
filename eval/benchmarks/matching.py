"""Matching and joint PCA: ours against one product, FAISS, the published loops and upsampled features.

The descriptors are smooth fields, a part of a cell apart in the two images: on random vectors every precision would
give the same neighbours and equality would say nothing.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from diffrep.backbones import Grid, load_backbone
from diffrep.eval.benchmarks.timing import PairedBenchmark, Row, Timing, interleave
from diffrep.features import Descriptors, ExtractConfig, extract_canvases
from diffrep.fusion import joint_pca
from diffrep.images import Placement, Sizing, fit_image, load_image
from diffrep.index import FaissIndex, IndexConfig, IndexKind, StoredIndex, search
from diffrep.index.stored import index_vectors
from diffrep.matching import MatchConfig, match_dense, match_points
from diffrep.store import BulkConfig, Keep, Vectors, extract_store, open_store

LOOP_ROWS = 40  # of the published row loop, which is timed on a share of the rows


@dataclass(frozen=True)
class MatchingBenchmark(PairedBenchmark):
    """Compare matching of one pair with the plain ways, in one thread."""

    side: int = 60  # cells along each side of both maps
    channels: int = 1536
    keypoints: int = 20
    image: tuple[int, int] = (375, 500)  # (height, width) for the search at full resolution
    image_side: int = 48  # cells along each side of its map, of 1280 channels as DIFT's
    pca_maps: tuple[tuple[int, int], ...] = ((15, 1280), (30, 1280), (60, 640))  # side, channels of sd-dino's taps
    pca_dims: int = 256

    def rows(self) -> Iterator[Row]:
        yield from self._dense()
        yield self._full_resolution()
        yield self._joint_pca()

    def _dense(self) -> Iterator[Row]:
        size = f"{self.side**2} x {self.side**2} x {self.channels}"
        source, target = smooth_pair(self.side, self.channels, (16 * self.side, 16 * self.side), self.device)
        a, b = source.rows().joined(), target.rows().joined()
        config, mutual = MatchConfig(backend="torch"), MatchConfig(backend="torch", mutual=True)
        points = keypoints(source.placement.image_size, self.keypoints).to(self.device)

        def both_ways() -> Tensor:
            scores = a @ b.T
            forward, back = scores.argmax(1), scores.argmax(0)
            return back[forward] == torch.arange(len(forward), device=forward.device)

        def flags() -> Tensor:
            marked = match_dense(source, target, mutual).mutual
            assert marked is not None
            return marked.flatten()

        sides: dict[str, Callable[[], object]] = {
            "product": lambda: a @ b.T,
            "ours": lambda: match_dense(source, target, config),
            "ours, mutual": lambda: match_dense(source, target, mutual),
            "both argmax": both_ways,
            "loop": lambda: row_loop(a[:LOOP_ROWS], b),
            "points": lambda: match_points(source, target, points, config),
        }
        if self.device == "cpu":
            sides["faiss"] = lambda: search(FaissIndex(b), a)
        times = interleave(sides, repeats=self.repeats, device=self.device)
        exact = (a.double() @ b.double().T).argmax(1)
        ours = target.nearest_cells(match_dense(source, target, config).points.flatten(0, 1))
        reduced = share((a.bfloat16() @ b.bfloat16().T).argmax(1) == exact)
        same_in_loop = share(row_loop(a[:LOOP_ROWS], b) == ours[:LOOP_ROWS])
        times["loop"] = scaled(times["loop"], len(a) / LOOP_ROWS)
        agreement = f"the float64 neighbour on {share(ours == exact)} of the cells (a bfloat16 product: {reduced})"
        rows = [("one product alone", "product", "ours", agreement)]
        if self.device == "cpu":
            same = share(search(FaissIndex(b), a).indices[:, 0] == ours)
            rows.append(("FAISS flat, built and searched", "faiss", "ours", f"same neighbour on {same} of the cells"))
        rows += [
            ("row loop of the published code", "loop", "ours", f"same neighbour on {same_in_loop} of its rows"),
            (
                "both argmax of the whole matrix, mutual",
                "both argmax",
                "ours, mutual",
                f"same flag on {share(both_ways() == flags())} of the cells",
            ),
            (f"all pairs for {self.keypoints} keypoints", "product", "points", "same rows of the same product"),
        ]
        for claim, plain, side, equality in rows:
            part = f" ({LOOP_ROWS} rows timed, scaled)" if plain == "loop" else ""
            yield Row(f"{claim}, {size}{part}", times[plain], times[side], equality)

    def _full_resolution(self) -> Row:
        source, target = smooth_pair(self.image_side, 1280, self.image, self.device)
        points = keypoints(self.image, self.keypoints).round().to(self.device)
        config = MatchConfig(mode="pixel")

        def ours() -> Tensor:
            return match_points(source, target, points, config).points

        def plain() -> Tensor:
            return upsampled_search(source, target, points)

        # one plain run takes many seconds
        times = interleave({"plain": plain, "ours": ours}, repeats=min(self.repeats, 3), warmups=1, device=self.device)
        distance = torch.linalg.vector_norm(plain() - ours(), dim=1)
        return Row(
            f"features upsampled to {self.image[1]} x {self.image[0]} first, {self.keypoints} keypoints,"
            f" map {self.image_side} x {self.image_side} x 1280",
            times["plain"],
            times["ours"],
            f"same pixel for {share(distance == 0)} of the keypoints, {distance.max():g} px apart at most",
        )

    def _joint_pca(self) -> Row:
        pairs = [decaying_maps(side, channels, self.device) for side, channels in self.pca_maps]

        def reduced(exact: bool) -> list[list[Tensor]]:
            draw = None if exact else torch.Generator().manual_seed(0)
            return [joint_pca(pair, self.pca_dims, generator=draw) for pair in pairs]

        sides = {"plain": lambda: reduced(exact=False), "ours": lambda: reduced(exact=True)}
        times = interleave(sides, repeats=self.repeats, device=self.device)
        plain, ours, again = reduced(exact=False), reduced(exact=True), reduced(exact=True)
        variances = [sum(float(m.square().sum()) for maps in side for m in maps) for side in (plain, ours)]
        repeats = all(torch.equal(x, y) for a, b in zip(ours, again, strict=True) for x, y in zip(a, b, strict=True))
        apart = max(float((cosines(*a) - cosines(*b)).abs().max()) for a, b in zip(plain, ours, strict=True))
        return Row(
            f"joint PCA of {len(pairs)} maps to {self.pca_dims} each: randomised against exact",
            times["plain"],
            times["ours"],
            f"variance kept {variances[1] / variances[0] - 1:+.1e} of the randomised,"
            f" cosines up to {apart:.0e} apart, {'' if repeats else 'not '}the same numbers when run again",
        )


def smooth_pair(side: int, channels: int, image_size: tuple[int, int], device: str) -> tuple[Descriptors, Descriptors]:
    """The same smooth random field on two maps, the second a part of a cell further."""
    grid = Grid.covering(image_size, (side, side))
    generator = torch.Generator().manual_seed(0)
    waves = torch.randn(2, channels, generator=generator) * 0.06
    phases = torch.rand(channels, generator=generator) * 2 * torch.pi
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    cells = torch.stack([columns, rows], dim=-1).float()
    maps = [F.normalize(torch.cos((cells + shift) @ waves + phases), dim=-1) for shift in (0.0, 0.4)]
    placement = Placement.identity(image_size)
    one, two = (Descriptors((m.to(device),), (1.0,), placement, grid) for m in maps)
    return one, two


def keypoints(image_size: tuple[int, int], count: int) -> Tensor:
    """(count, 2) points spread over the middle of an image, (x, y)."""
    shares = torch.rand(count, 2, generator=torch.Generator().manual_seed(1)) * 0.8 + 0.1
    return shares * torch.tensor([image_size[1] - 1.0, image_size[0] - 1.0])


def row_loop(a: Tensor, b: Tensor) -> Tensor:
    """sd-dino's `pairwise_sim` with p = 2, its default: one row at a time against all others."""
    distance = torch.nn.PairwiseDistance(p=2)
    return torch.stack([(-distance(row[None], b)).argmax() for row in a])


def upsampled_search(source: Descriptors, target: Descriptors, points: Tensor) -> Tensor:
    """DIFT's evaluation: both maps to the image's size, then a cosine map per keypoint over all pixels.

    The official code normalises the target again for every keypoint; here that is done once.
    """
    size = target.placement.image_size
    maps = [d.vectors().movedim(-1, 0)[None] for d in (source, target)]
    dense_source, dense_target = (F.interpolate(m, size, mode="bilinear")[0].flatten(1) for m in maps)
    dense_target = F.normalize(dense_target, dim=0)
    places = []
    for x, y in points.long().tolist():
        scores = F.normalize(dense_source[:, y * size[1] + x], dim=0) @ dense_target
        best = int(scores.argmax())
        places.append((best % size[1], best // size[1]))
    return torch.tensor(places, dtype=torch.float32, device=points.device)


def decaying_maps(side: int, channels: int, device: str) -> list[Tensor]:
    """Maps of a pair, (C, h, w) each, with a power-law spectrum as features have."""
    generator = torch.Generator().manual_seed(side)
    rank = min(2 * side * side, channels)
    left = torch.linalg.qr(torch.randn(2 * side * side, rank, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(channels, rank, generator=generator)).Q
    cells = (left * torch.arange(1, rank + 1).float().pow(-0.8)) @ right.T
    return [half.T.reshape(channels, side, side).to(device) for half in cells.chunk(2)]


def cosines(one: Tensor, two: Tensor) -> Tensor:
    """Cosines between the first 400 cells of two (C, h, w) maps."""
    a, b = (F.normalize(maps.flatten(1).T[:400], dim=1) for maps in (one, two))
    return a @ b.T


def share(equal: Tensor) -> str:
    """A share of true values as text."""
    return f"{100 * float(equal.float().mean()):.2f} %"


def scaled(timing: Timing, factor: float) -> Timing:
    """What was timed on a part, for the whole."""
    return replace(timing, median=timing.median * factor, low=timing.low * factor, high=timing.high * factor)


# -- Collections: the whole pipeline against the bare network, and indexes of clustered vectors --------------
# The pipeline reads, decodes, extracts and writes; the bare network gets its batches ready made. An index is
# compared with the exact product over the same vectors.


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
