"""Published accuracies of probes, each with its source and how it was obtained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

PAPER_1 = "Mukhopadhyay et al. 2023, Diffusion Models Beat GANs on Image Classification (arXiv 2307.08702)"
PAPER_2 = "Mukhopadhyay et al. 2024, Do text-free diffusion models learn discriminative visual representations?"
PAPER_2 += " (arXiv 2311.17921)"


@dataclass(frozen=True, kw_only=True)
class PublishedProbe:
    """Top-1 accuracy in percent.

    Attributes:
        obtained: "table" printed in the paper; "figure" decoded from its vector figure, exact to about 0.02;
            "bars" read off a bar chart, good to about 0.5.
    """

    benchmark: str
    method: str
    value: float
    source: str
    obtained: Literal["table", "figure", "bars"]
    block: int | None = None  # of the 37 of the 256-pixel ADM network
    timestep: int | None = None
    pool: int | None = None


def _imagenet() -> list[PublishedProbe]:
    rows = []
    for block, timestep, values in ((24, 90, (61.95, 64.98, 62.93, 60.08)), (19, 150, (54.77, 60.66, 60.06, 55.70))):
        for pool, value in zip((1, 2, 4, 8), values, strict=True):
            rows.append(_linear(block, timestep, pool, value))
    for timestep, value in ((10, 49.23), (30, 53.10), (50, 54.37), (90, 55.09), (300, 50.74), (500, 34.67)):
        rows.append(_linear(19, timestep, 1, value))
    swept: dict[int, dict[int, float]] = {  # timestep -> block -> value
        90: {6: 11.08, 9: 16.67, 15: 41.23, 30: 45.98, 33: 30.08},
        150: {6: 9.65, 9: 14.43, 15: 40.77, 24: 61.86, 30: 47.22, 33: 30.80},
    }
    rows += [_linear(block, timestep, 1, v) for timestep, found in swept.items() for block, v in found.items()]
    named = (
        ("ADM attention head, one block", 71.89, PAPER_1),
        ("ADM attention head", 74.6, PAPER_2),
        ("DifFormer", 76.0, PAPER_2),
        ("DifFeed", 77.0, PAPER_2),
        ("ADM linear", 64.9, PAPER_2),
        ("supervised U-Net encoder, same architecture", 64.3, PAPER_2),
        ("BigBiGAN", 60.8, PAPER_2),
        ("MAGE", 78.9, PAPER_2),
        ("SimCLR", 69.3, PAPER_2),
        ("SwAV", 75.3, PAPER_2),
        ("MAE", 73.5, PAPER_2),
    )
    for method, value, source in named:
        rows.append(PublishedProbe(benchmark="imagenet", method=method, value=value, source=source, obtained="table"))
    return rows


def _linear(block: int, timestep: int, pool: int, value: float) -> PublishedProbe:
    return PublishedProbe(
        benchmark="imagenet",
        method="ADM linear",
        value=value,
        source=PAPER_1,
        obtained="figure",
        block=block,
        timestep=timestep,
        pool=pool,
    )


_FINE_1 = {  # ADM linear, MLP, CNN, attention; SimCLR and SwAV linear
    "aircraft": (48.32, 47.87, 54.21, 25.24, 46.40, 58.18),
    "cars": (20.97, 23.72, 20.57, 11.48, 40.86, 57.62),
    "cub": (31.57, 28.11, 24.84, 19.37, 43.86, 63.84),
    "dogs": (46.64, 48.83, 48.26, 50.63, 64.24, 74.85),
    "flowers": (76.87, 71.63, 65.89, 62.13, 86.20, 91.76),
    "nabirds": (22.47, 23.93, 23.41, 22.05, 35.94, 54.05),
}
_FINE_2 = {  # ADM linear, attention, DifFormer, DifFeed
    "aircraft": (31.5, 64.0, 65.0, 73.0),
    "cars": (26.0, 71.0, 77.0, 82.5),
    "cub": (25.0, 66.0, 72.0, 71.0),
    "dogs": (57.0, 79.0, 81.0, 80.0),
    "flowers": (75.0, 88.0, 89.5, 90.0),
    "nabirds": (18.0, 64.0, 69.0, 70.5),
}
_CUB_SWEEP = {  # (block, pool) -> t = 50, 150, 300, 500
    (15, 4): (21.4, 24.6, 24.9, 18.0),
    (19, 1): (5.2, 7.9, 8.5, 6.7),
    (19, 2): (17.0, 20.4, 21.8, 16.1),
    (19, 4): (30.2, 34.9, 33.7, 22.8),
    (19, 8): (26.6, 30.0, 30.2, 21.4),
    (24, 1): (10.1, 12.1, 13.2, 10.7),
    (24, 2): (17.5, 20.8, 21.7, 16.6),
    (24, 4): (25.0, 27.6, 27.1, 19.3),
    (24, 8): (20.6, 23.5, 23.0, 15.5),
}


def _fine_grained() -> list[PublishedProbe]:
    rows = []
    heads = ("ADM linear", "ADM MLP", "ADM CNN", "ADM attention", "SimCLR linear", "SwAV linear")
    for benchmark, values in _FINE_1.items():
        for method, value in zip(heads, values, strict=True):
            rows.append(
                PublishedProbe(benchmark=benchmark, method=method, value=value, source=PAPER_1, obtained="figure")
            )
    for benchmark, bars in _FINE_2.items():
        for method, value in zip(("ADM linear", "ADM attention", "DifFormer", "DifFeed"), bars, strict=True):
            rows.append(
                PublishedProbe(benchmark=benchmark, method=method, value=value, source=PAPER_2, obtained="bars")
            )
    for (block, pool), row in _CUB_SWEEP.items():
        for timestep, value in zip((50, 150, 300, 500), row, strict=True):
            rows.append(
                PublishedProbe(
                    benchmark="cub",
                    method="ADM linear",
                    value=value,
                    source=PAPER_1,
                    obtained="figure",
                    block=block,
                    timestep=timestep,
                    pool=pool,
                )
            )
    return rows


PUBLISHED: tuple[PublishedProbe, ...] = (*_imagenet(), *_fine_grained())


def published_rows(benchmark: str) -> Sequence[PublishedProbe]:
    """What papers report for a benchmark, best first."""
    return sorted((p for p in PUBLISHED if p.benchmark == benchmark), key=lambda p: -p.value)


def published_table(benchmark: str, rows: int = 12) -> str:
    """The best published rows as text; empty where there are none."""
    found = published_rows(benchmark)
    if not found:
        return ""
    lines = [f"published top-1 on {benchmark}, % (bars: read off a chart, good to about 0.5)"]
    for p in found[:rows]:
        where = "" if p.block is None else f" block {p.block}, t={p.timestep}, pool {p.pool}"
        paper = "2307.08702" if p.source == PAPER_1 else "2311.17921"
        lines.append(f"  {p.value:>6.2f}  {p.method}{where}  (arXiv {paper}, {p.obtained})")
    return "\n".join(lines)
