"""Numbers from papers, each with its source, to print beside ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from diffrep.eval.pck import Aggregate

SPAIR_COLUMNS = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "dog", "horse",
    "motorbike", "person", "pottedplant", "sheep", "train", "tvmonitor",
)  # fmt: skip

SD_DINO = "Zhang et al. 2023, A Tale of Two Features (arXiv 2305.15347)"
GEOAWARE = "Zhang et al. 2024, Telling Left from Right (arXiv 2311.17034), project page"
CLEANDIFT = "Stracke et al. 2024, CleanDIFT (arXiv 2412.03439), project page"
# the next two are known from other papers' tables only
DTM = "the comparison table of DTM, at second hand"
ANCHORS = "the comparison tables of ImCorr and 3D-SC (2026), at second hand"
GDF = "Meng et al. 2024, Not All Diffusion Model Activations (arXiv 2410.03558)"


@dataclass(frozen=True, kw_only=True)
class Published:
    """One row of a paper's table, in percent."""

    method: str
    benchmark: str
    values: Mapping[float, float]  # alpha -> PCK
    source: str
    aggregate: Aggregate | None = None  # what the number averages; None where the paper leaves it open
    categories: Mapping[str, float] = field(default_factory=dict)  # at alpha 0.1
    threshold: str = "box"  # what alpha is a share of: box, image or keypoints
    trained: bool = False  # on the benchmark's own training pairs
    recipe: str = ""  # the recipe here that follows this method
    note: str = ""


def _by_category(method: str, row: Sequence[float], source: str, aggregate: Aggregate, **options: Any) -> Published:
    *categories, overall = row
    return Published(
        method=method,
        benchmark="spair",
        values={0.1: overall},
        source=source,
        aggregate=aggregate,
        categories=dict(zip(SPAIR_COLUMNS, categories, strict=True)),
        **options,
    )


def _dtm(method: str, row: Sequence[float], recipe: str) -> Published:
    return _by_category(method, row, DTM, "per point", recipe=recipe)


def _table_3(method: str, row: Sequence[float], *, trained: bool = False, recipe: str = "") -> Published:
    averages = "the caption says per point; the row's mean and pair-weighted mean differ from it"
    return _by_category(
        method, row, f"{SD_DINO}, table 3", "pair-weighted category" if trained else "per point",
        trained=trained, recipe=recipe, note="" if trained else averages,
    )  # fmt: skip


_TABLE_3 = (
    _table_3(
        "DINOv1-S/8",
        (57.2, 24.1, 67.4, 24.5, 26.8, 29.0, 27.1, 52.1, 15.7, 42.4, 43.3, 30.1, 23.2, 40.7, 16.6, 24.1, 31.0,
         24.9, 33.3),
    ),
    _table_3(
        "DINOv2-B/14",
        (72.7, 62.0, 85.2, 41.3, 40.4, 52.3, 51.5, 71.1, 36.2, 67.1, 64.6, 67.6, 61.0, 68.2, 30.7, 62.0, 54.3,
         24.2, 55.6),
    ),
    _table_3(
        "SD1.5",
        (63.1, 55.6, 80.2, 33.8, 44.9, 49.3, 47.8, 74.4, 38.4, 70.8, 53.7, 61.1, 54.4, 55.0, 54.8, 53.5, 65.0,
         53.3, 57.2),
    ),
    _table_3(
        "SD1.5 + DINOv2-B/14",
        (73.0, 64.1, 86.4, 40.7, 52.9, 55.0, 53.8, 78.6, 45.5, 77.3, 64.7, 69.7, 63.3, 69.2, 58.4, 67.6, 66.2,
         53.5, 64.0),
        recipe="sd-dino",
    ),
    _table_3(
        "DINOv2-B/14, trained readout",
        (80.4, 60.2, 88.1, 59.5, 54.9, 82.0, 73.5, 89.1, 53.3, 85.5, 73.6, 73.8, 65.2, 72.3, 43.6, 65.6, 91.4,
         60.3, 69.9),
        trained=True,
    ),
    _table_3(
        "SD1.5, trained readout",
        (75.6, 60.3, 87.3, 41.5, 50.8, 68.4, 77.2, 81.4, 44.3, 79.4, 62.8, 67.7, 64.9, 71.6, 57.8, 53.3, 89.2,
         65.1, 66.3),
        trained=True,
    ),
    _table_3(
        "SD1.5 + DINOv2-B/14, trained readout",
        (81.2, 66.9, 91.6, 61.4, 57.4, 85.3, 83.1, 90.8, 54.5, 88.5, 75.1, 80.2, 71.9, 77.9, 60.7, 68.9, 92.4,
         65.8, 74.6),
        trained=True,
    ),
)  # fmt: skip

_SMALL, _PASCAL = (0.01, 0.05, 0.1), (0.05, 0.1, 0.15)
_SETS = (  # columns of GeoAware's summary: benchmark, alphas
    ("spair", _SMALL),
    ("ap-10k", _SMALL),
    ("ap-10k test_cross_species", _SMALL),
    ("ap-10k test_cross_family", _SMALL),
    ("pf-pascal", _PASCAL),
)
_SUMMARY = {  # method -> (recipe, trained, cells "a/b/c" of the sets above)
    "DINOv2": ("", False, "6.3/38.4/53.9 6.4/41.0/60.9 5.3/37.0/57.3 4.4/29.4/47.4 63.0/79.2/85.1"),
    "DIFT": ("dift", False, "7.2/39.7/52.9 6.2/34.8/50.3 5.1/30.8/46.0 3.7/22.4/35.0 66.0/81.1/87.2"),
    "SD + DINO": ("sd-dino", False, "7.9/44.7/59.9 7.6/43.5/62.9 6.4/39.7/59.3 5.2/30.8/48.3 72.7/82.7/91.6"),
    "GeoAware, zero-shot": (
        "geoaware", False, "8.9/48.7/64.2 8.1/47.4/66.7 6.7/42.7/62.4 5.4/33.0/50.8 72.5/82.6/91.5",
    ),
    "Hyperfeatures": (
        "hyperfeatures", True, "8.7/50.2/64.9 8.0/45.8/62.7 6.8/42.4/60.0 5.0/32.7/47.8 78.0/90.4/94.1",
    ),
    "SD + DINO, trained": (
        "", True, "9.6/57.7/74.6 9.9/57.0/77.0 8.8/53.9/74.0 6.9/46.2/65.8 80.9/93.6/96.9",
    ),
    "GeoAware, trained": (
        "", True, "21.6/72.6/82.9 23.1/73.0/87.5 21.7/70.2/85.8 18.4/63.1/78.4 85.5/95.1/97.4",
    ),
    "GeoAware, trained, adaptive pose": (
        "", True, "21.7/72.8/83.2 23.2/73.2/87.7 21.7/70.3/85.9 18.3/63.2/78.5 85.3/95.0/97.4",
    ),
}  # fmt: skip


def _summary() -> list[Published]:
    rows = []
    for method, (recipe, trained, cells) in _SUMMARY.items():
        for (benchmark, alphas), cell in zip(_SETS, cells.split(), strict=True):
            values = dict(zip(alphas, map(float, cell.split("/")), strict=True))
            rows.append(
                Published(
                    method=method,
                    benchmark=benchmark,
                    values=values,
                    source=f"{GEOAWARE}, summary table",
                    aggregate="per image",
                    threshold="image" if benchmark == "pf-pascal" else "box",
                    trained=trained,
                    recipe=recipe,
                )
            )
    return rows


# method -> (trained on keypoints, SPair at alpha 0.01 / 0.05 / 0.1, AP-10K at 0.1: same species / other / family)
_ANCHORS = {
    "Spherical maps": (False, "8.4/48.2/64.4 65.4/63.1/51.0"),
    "DIY-SC": (False, "10.1/53.8/71.6 70.6/69.8/57.8"),
    "DIY-SC, estimated pose": (False, "9.5/51.2/69.6 69.3/66.8/54.0"),
    "3D-SC": (False, "10.2/54.8/73.0 69.6/68.5/56.9"),
    "GECO": (True, "14.2/59.6/73.6 82.5/81.2/76.6"),
    "DTM on FLUX": (True, "-/70.0/80.5 86.2/84.8/77.9"),
    "MARCO": (True, "27.0/77.6/87.2 89.1/88.3/83.4"),
    "ImCorr": (True, "33.2/78.9/86.2 90.0/89.4/82.9"),
}


def _anchors() -> list[Published]:
    rows = []
    for method, (trained, cells) in _ANCHORS.items():
        spair, ap10k = (cell.split("/") for cell in cells.split())
        values = {alpha: float(v) for alpha, v in zip(_SMALL, spair, strict=True) if v != "-"}
        sets = [("spair", values), *((s, {0.1: float(v)}) for (s, _), v in zip(_SETS[1:4], ap10k, strict=True))]
        rows += [
            Published(
                method=method, benchmark=name, values=values, source=ANCHORS, aggregate="per image", trained=trained
            )
            for name, values in sets
        ]
    return rows


_FLUX = {  # one timestep of FLUX, per image, in the pipeline of DTM
    "spair": {0.05: 49.5, 0.1: 61.1},
    "spair-u": {0.1: 53.4},
    "ap-10k": dict(zip(_SMALL, (7.6, 49.7, 62.2), strict=True)),
    "ap-10k test_cross_species": dict(zip(_SMALL, (6.8, 48.2, 61.7), strict=True)),
    "ap-10k test_cross_family": dict(zip(_SMALL, (5.7, 34.2, 48.9), strict=True)),
}


def _pascal(method: str, values: Sequence[float], *, trained: bool = False, recipe: str = "") -> Published:
    return Published(
        method=method,
        benchmark="pf-pascal",
        values=dict(zip(_PASCAL, values, strict=True)),
        source=f"{SD_DINO}, PF-PASCAL table",
        threshold="image",
        trained=trained,
        recipe=recipe,
    )


def _cleandift(method: str, image: float, box: float, recipe: str = "") -> list[Published]:
    return [
        Published(
            method=method, benchmark="spair", values={0.1: value}, source=CLEANDIFT, aggregate="per point",
            threshold=threshold, recipe=recipe, note="per point by its DIFT row; the page does not say",
        )
        for threshold, value in (("image", image), ("box", box))
    ]  # fmt: skip


PUBLISHED: tuple[Published, ...] = (
    *_TABLE_3,
    _dtm(
        "DIFT, SD2.1",
        (63.5, 54.5, 80.8, 34.5, 46.2, 52.7, 48.3, 77.7, 39.0, 76.0, 54.9, 61.3, 53.3, 46.0, 57.8, 57.1, 71.1,
         63.4, 57.7),
        "dift",
    ),
    _dtm(
        "DiTF, FLUX",
        (74.3, 65.0, 88.1, 48.1, 53.2, 60.7, 60.7, 84.9, 42.4, 82.8, 68.4, 72.1, 70.9, 74.2, 62.1, 72.6, 66.0,
         60.3, 67.1),
        "ditf",
    ),
    *_summary(),
    *(
        Published(method="FLUX, one timestep", benchmark=name, values=values, source=DTM, aggregate="per image")
        for name, values in _FLUX.items()
    ),
    *_anchors(),
    _pascal("DINOv2-B/14", (56.2, 77.3, 83.3)),
    _pascal("SD1.5", (61.0, 80.3, 86.1)),
    _pascal("SD1.5 + DINOv2-B/14", (73.0, 86.1, 91.1), recipe="sd-dino"),
    _pascal("DINOv2-B/14, trained readout", (74.2, 90.8, 95.4), trained=True),
    _pascal("SD1.5, trained readout", (77.4, 89.7, 93.9), trained=True),
    _pascal("SD1.5 + DINOv2-B/14, trained readout", (80.9, 93.6, 96.9), trained=True),
    *_cleandift("DIFT", 66.53, 59.57, "dift"),
    *_cleandift("DIFT on CleanDIFT", 68.32, 61.43, "cleandift"),
    *_cleandift("SD + DINO", 72.31, 63.73, "sd-dino"),
    *_cleandift("SD + DINO on CleanDIFT", 73.35, 64.81, "cleandift-sd-dino"),
    *_cleandift("GeoAware, zero-shot", 77.07, 68.64, "geoaware"),
    *_cleandift("GeoAware, zero-shot, on CleanDIFT", 78.40, 69.99),
    *(
        Published(
            method=method, benchmark="spair", values={0.1: value}, source=GDF, trained=True,
        )
        for method, value in (
            ("GDF, usual taps of SD1.5", 66.7), ("GDF, usual taps of SDXL", 59.2), ("GDF, SD1.5", 69.8),
            ("GDF, SDXL", 75.2),
        )
    ),
)  # fmt: skip


@dataclass(frozen=True)
class PublishedFlow:
    """One row of the TSS table: PCK@0.05 in percent and smoothness in pixels, by subset."""

    method: str
    pck: Mapping[str, float]
    smoothness: Mapping[str, float]
    source: str = f"{SD_DINO}, TSS table"
    recipe: str = ""


_TSS = ("FG3DCar", "JODS", "PASCAL")
PUBLISHED_FLOW: tuple[PublishedFlow, ...] = tuple(
    PublishedFlow(method, dict(zip(_TSS, pck, strict=True)), dict(zip(_TSS, smooth, strict=True)), recipe=recipe)
    for method, pck, smooth, recipe in (
        ("DINOv2-B/14", (82.8, 73.9, 53.9), (6.99, 10.09, 15.14), ""),
        ("SD1.5", (93.9, 69.4, 57.7), (3.48, 7.87, 8.44), ""),
        ("SD1.5 + DINOv2-B/14", (94.3, 73.2, 60.9), (3.52, 7.55, 8.75), "sd-dino"),
    )
)


def published(benchmark: str, *, threshold: str = "box", trained: bool | None = None) -> tuple[Published, ...]:
    """The rows of one benchmark that count with the same threshold; `trained` None: trained or not."""
    return tuple(
        row
        for row in PUBLISHED
        if row.benchmark == benchmark and row.threshold == threshold and trained in (None, row.trained)
    )
