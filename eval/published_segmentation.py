"""Published DIS5K figures, to print beside ours. All are secondary: quoted from other papers' tables.

The sources disagree on some methods by up to 0.01 of maximum F, which is kept visible: one row per source.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

TE = "DIS-TE1-4"


@dataclass(frozen=True)
class PublishedMasks:
    """One row: split ("DIS-VD" or the mean over the four test splits) -> score -> value."""

    method: str
    quoted_in: str
    values: Mapping[str, Mapping[str, float]]


def _row(method: str, quoted_in: str, validation: str, test: str = "") -> PublishedMasks:
    """Scores are written "maxF wF MAE S E HCE", - where the source has none."""
    names = ("maxf", "wfm", "mae", "sm", "em_mean", "hce")
    values = {}
    for split, text in (("DIS-VD", validation), (TE, test)):
        found = {name: float(cell) for name, cell in zip(names, text.split(), strict=False) if cell != "-"}
        if found:
            values[split] = found
    return PublishedMasks(method, quoted_in, values)


PUBLISHED_DIS = (
    _row("DiffDIS", "PDFNet", ".908 .888 .029 .904 .948", ".911 - .027"),
    _row("DiffDIS", "BEN", ".918 .888 .029 .904 .948"),
    _row("BiRefNet (DIS only)", "PDFNet, BEN", ".897 .863 .036 .905 .937", ".900 - .035"),
    _row("MVANet", "PDFNet, BEN", ".904 .856 .036 .905 .938", ".908 - .035"),
    _row("InSPyReNet", "BEN", ".889 .834 .042 .900 .914"),
    _row("IS-Net", "third-party pages", ".791 .717 .074 .813 .856 1116", ".799 - .070 - - 1016"),
    _row("GenPercept (diffusion)", "PDFNet", ".877", ".875 - .036"),
    _row("PDFNet-L", "PDFNet", ".915", ".915 - .030"),
    _row("LawDIS (diffusion)", "FlowDIS", ".917 .884 .030 .917 .949", ".918 .884 .030 .916 .947"),
    _row("FlowDIS, 2 steps", "FlowDIS", ".958 .938 .014 .953 .974", ".959 .938 .016 .951 .973"),
)
