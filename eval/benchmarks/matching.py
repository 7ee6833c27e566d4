"""Matching and joint PCA: ours against one product, FAISS, the published loops and upsampled features.

The descriptors are smooth fields, a part of a cell apart in the two images: on random vectors every precision would
give the same neighbours and equality would say nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from diffrep.backbones import Grid
from diffrep.eval.benchmarks.timing import PairedBenchmark, Row, Timing, interleave
from diffrep.features import Descriptors
from diffrep.fusion import joint_pca
from diffrep.images import Placement
from diffrep.index import FaissIndex, search
from diffrep.matching import MatchConfig, match_dense, match_points

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
