"""Published depth and normals, to print beside ours. Percent and degrees, as in the tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

LOTUS = "Lotus (arXiv 2409.18124)"
E2E = "E2E-FT (arXiv 2409.11355)"
LOTUS_2 = "Lotus-2 (arXiv 2512.01030), Table I"

_DEPTH_SETS = ("nyuv2", "kitti", "eth3d", "scannet", "diode")
_NORMAL_SETS = ("nyuv2", "scannet", "ibims", "sintel", "oasis")


@dataclass(frozen=True)
class PublishedDense:
    """One row of a table.

    Attributes:
        values: benchmark -> (AbsRel, delta1) in percent, or (mean angle in degrees, share under 11.25 in percent).
        quoted: the source ran or quotes another paper's method.
    """

    method: str
    source: str
    values: Mapping[str, tuple[float, float]]
    quoted: bool = False


def _row(sets: tuple[str, ...], method: str, source: str, text: str, *, quoted: bool = False) -> PublishedDense:
    """A row written as "5.4/96.8 -": one cell per set, - where the table has none."""
    cells = text.split()
    assert len(cells) == len(sets), text
    pairs = {name: cell.split("/") for name, cell in zip(sets, cells, strict=True) if cell != "-"}
    return PublishedDense(method, source, {k: (float(a), float(b)) for k, (a, b) in pairs.items()}, quoted)


def _depth(method: str, source: str, text: str, *, quoted: bool = False) -> PublishedDense:
    return _row(_DEPTH_SETS, method, source, text, quoted=quoted)


def _normals(method: str, source: str, text: str, *, quoted: bool = False) -> PublishedDense:
    return _row(_NORMAL_SETS, method, source, text, quoted=quoted)


_L1, _L2, _L3 = f"{LOTUS}, Table 1", f"{LOTUS}, Table 2", f"{LOTUS}, Table 3"
_E15, _E236 = f"{E2E}, Tables 1 and 5", f"{E2E}, Tables 2, 3 and 6"

PUBLISHED_DEPTH = (
    _depth("Lotus-G (disparity)", _L1, "5.4/96.8 8.5/92.2 5.9/97.0 5.9/95.7 22.9/72.9"),
    _depth("Lotus-D (disparity)", _L1, "5.1/97.2 8.1/93.1 6.1/97.0 5.5/96.5 22.8/73.8"),
    _depth("Lotus-G (depth)", _L3, "5.4/96.6 11.3/87.7 6.2/96.1 6.0/96.0 -"),
    _depth("Lotus-D (depth)", _L3, "5.3/96.7 9.3/92.8 6.8/95.3 6.0/96.3 -"),
    _depth("Lotus-2", LOTUS_2, "4.1/97.6 6.7/94.5 4.6/98.1 4.2/97.6 22.1/75.2"),
    _depth("Marigold v1-0, 50 steps x 10", _E15, "5.5/96.4 9.9/91.6 6.5/96.0 6.4/95.1 30.8/77.3", quoted=True),
    _depth("Marigold v1-0, 50 steps", _E15, "6.0/95.9 10.5/90.4 7.1/95.1 6.9/94.5 31.0/77.2", quoted=True),
    _depth("Marigold v1-0, 1 step, trailing", _E15, "5.7/96.2 10.8/89.6 6.9/95.5 6.6/95.2 31.1/76.8", quoted=True),
    _depth("Marigold LCM, 4 steps x 5", _E15, "6.2/95.6 9.9/91.7 6.9/95.5 7.0/94.5 30.9/77.6", quoted=True),
    _depth("Marigold LCM, 1 step", _E15, "6.5/95.4 10.7/89.9 7.5/94.5 7.6/93.8 31.5/76.3", quoted=True),
    _depth("E2E-FT from Marigold", _E15, "5.2/96.6 9.6/91.9 6.2/95.9 5.8/96.2 30.2/77.9"),
    _depth("E2E-FT from SD2", _E15, "5.4/96.5 9.6/92.1 6.4/95.9 5.8/96.5 30.3/77.6"),
    _depth("GeoWizard, claimed", _E15, "5.2/96.6 9.7/92.1 6.4/96.1 6.1/95.3 29.7/79.2", quoted=True),
    _depth("GeoWizard, run again", _E15, "5.7/96.2 14.4/82.0 7.5/94.3 6.1/95.8 31.4/77.1", quoted=True),
    _depth("GenPercept", _L1, "5.6/96.0 13.0/84.2 7.0/95.6 6.2/96.1 35.7/75.6", quoted=True),
    _depth("Depth Anything v1-L", _L1, "4.3/98.1 7.6/94.7 12.7/88.2 4.3/98.1 26.0/75.9", quoted=True),
    _depth("Depth Anything v2-L", _L1, "4.5/97.9 7.4/94.6 13.1/86.5 4.2/97.8 26.5/73.4", quoted=True),
)

PUBLISHED_NORMALS = (
    _normals("Lotus-G v1-1", _L2, "16.5/59.4 15.1/63.9 17.2/66.2 33.6/21.0 22.7/29.4"),
    _normals("Lotus-D v1-1", _L2, "16.2/59.8 14.7/64.0 17.1/66.4 32.3/22.4 22.3/31.8"),
    _normals("Lotus-2", LOTUS_2, "16.9/59.0 14.2/66.8 15.4/70.4 30.3/27.6 -"),
    _normals("E2E-FT from Marigold", _E236, "16.2/61.4 14.7/66.0 15.8/69.9 33.5/21.5 -"),
    _normals("E2E-FT from SD2", _E236, "16.5/60.4 14.7/66.1 16.1/69.7 33.5/22.3 23.2/29.4"),
    _normals("E2E-FT's Marigold normals, 50 steps x 10", _E236, "18.8/55.9 17.7/58.8 18.4/64.3 39.1/14.9 -"),
    _normals("E2E-FT's Marigold normals, 1 step", _E236, "17.4/56.5 16.8/57.6 18.1/62.9 37.1/15.7 -"),
    _normals("Marigold normals v0-1", _L2, "20.9/50.5 21.3/45.6 18.5/64.7 - -", quoted=True),
    _normals("GeoWizard, run again", _E236, "19.1/49.5 17.3/53.7 19.5/61.6 40.4/13.2 25.2/23.4", quoted=True),
    _normals("GeoWizard + E2E-FT", _E236, "16.1/60.7 15.3/63.6 16.2/69.4 33.4/22.4 -"),
    _normals("StableNormal", _L2, "18.6/53.5 17.1/57.4 18.2/65.0 36.7/14.1 26.5/23.5", quoted=True),
    _normals("DSINE", _L2, "16.4/59.6 16.2/61.0 17.1/67.4 34.9/21.5 24.4/28.8", quoted=True),
)


def depth_rows(benchmark: str) -> list[PublishedDense]:
    """Published depth on a benchmark."""
    return [row for row in PUBLISHED_DEPTH if benchmark in row.values]


def normal_rows(benchmark: str) -> list[PublishedDense]:
    """Published normals on a benchmark."""
    return [row for row in PUBLISHED_NORMALS if benchmark in row.values]
