"""What depth and normal heads give: maps that know what they measure, and the way into files."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from diffrep.alignment import LEAST_DISPARITY, Space, fit_robust, fit_scale_shift
from diffrep.heads.families import FRAME_SIGNS, Frame


@dataclass(frozen=True)
class DepthMap:
    """Depth or disparity of one image.

    Attributes:
        values: (H, W) float32. Relative: in [0, 1], up to an unknown scale and shift. Metric: metres.
        space: "depth" grows with the distance (0 near, 1 far), "disparity" falls with it (1 near, 0 far).
        metric: values are metres along the optical axis (`space` is "depth" then).
        uncertainty: (H, W) spread of an ensemble in the unit of `values`, or None.
        settings: what made the map, JSON-ready.
    """

    values: Tensor
    space: Space
    metric: bool = False
    uncertainty: Tensor | None = None
    settings: Mapping[str, object] = field(default_factory=dict)

    @property
    def near_is_one(self) -> bool:
        """Large values are near."""
        return self.space == "disparity"

    def metadata(self) -> dict[str, object]:
        """What a reader of the values must know."""
        unit = "metres" if self.metric else "relative, up to an unknown scale and shift"
        large = "near" if self.near_is_one else "far"
        return {"kind": self.space, "unit": unit, "large_values_are": large, "settings": dict(self.settings)}

    def align(
        self, reference: Tensor, valid: Tensor | None = None, *, method: Literal["least squares", "robust"] = "robust"
    ) -> DepthMap:
        """Metric depth by scale and shift fitted to known depths, for example sparse ones of a lidar.

        Fitted in the map's own space: a disparity map to 1 / reference.

        Args:
            reference: (H, W), metres; what is not finite or not positive does not count.
            valid: (H, W) bool, further pixels that do not count; None: all do.
            method: "robust" is hardly moved by wrong references (see `diffrep.alignment.fit_robust`).

        Raises:
            ValueError: another shape, fewer than two known depths, or a fit that turns near and far around.
        """
        if self.metric:
            raise ValueError("this map is metric already")
        if reference.shape != self.values.shape:
            raise ValueError(
                f"the known depths must be {tuple(self.values.shape)} like the map, got {tuple(reference.shape)}"
            )
        keep = torch.isfinite(reference) & (reference > 0)
        keep = keep if valid is None else keep & valid
        if int(keep.sum()) < 2:
            raise ValueError(f"scale and shift need at least two known depths, got {int(keep.sum())}")
        target = torch.where(keep, reference.float(), 1.0)
        target = 1 / target if self.space == "disparity" else target
        fit = fit_robust if method == "robust" else fit_scale_shift
        scale, shift = (x.item() for x in fit(self.values[None], target[None], keep[None]))
        if scale <= 0:
            raise ValueError(
                f"the fitted scale is {scale:.3g}: the known depths contradict the map (is it a {self.space} map, and"
                " are they metres?)"
            )
        values = scale * self.values + shift
        if self.space == "disparity":
            values = 1 / values.clamp(min=LEAST_DISPARITY)
        settings = {**self.settings, "scale": scale, "shift": shift, "fit": method, "known_depths": int(keep.sum())}
        return DepthMap(values.clamp(min=0), "depth", metric=True, settings=settings)

    def relative_depth(self, nearest: float = 1.0, farthest: float = 10.0) -> Tensor:
        """(H, W) positive depth for a picture in space, between an assumed nearest and farthest distance.

        A relative map does not know its scale and shift, so the shape in depth is a guess; metric maps are returned
        as they are.
        """
        if self.metric:
            return self.values
        if self.space == "disparity":
            return 1 / (self.values * (1 / nearest - 1 / farthest) + 1 / farthest)
        return nearest + self.values * (farthest - nearest)


@dataclass(frozen=True)
class NormalMap:
    """Surface normals of one image.

    Attributes:
        values: (3, H, W) float32; of unit length unless made with `official`.
        frame: their camera axes.
        uncertainty: (H, W) mean angle of an ensemble's members to their mean direction divided by pi, or None.
        settings: what made the map, JSON-ready.
    """

    values: Tensor
    frame: Frame
    uncertainty: Tensor | None = None
    settings: Mapping[str, object] = field(default_factory=dict)

    def metadata(self) -> dict[str, object]:
        """What a reader of the values must know."""
        return {"kind": "normals", "frame": self.frame, "axes": AXES[self.frame], "settings": dict(self.settings)}

    def to_frame(self, frame: Frame) -> NormalMap:
        """The same normals in other camera axes."""
        signs = [a * b for a, b in zip(FRAME_SIGNS[self.frame], FRAME_SIGNS[frame], strict=True)]
        values = self.values * self.values.new_tensor(signs)[:, None, None]
        return dataclasses.replace(self, values=values, frame=frame)


AXES: dict[Frame, str] = {
    "lub": "x left, y up, z towards the camera",
    "rub": "x right, y up, z towards the camera",
    "rdf": "x right, y down, z forward",
}
