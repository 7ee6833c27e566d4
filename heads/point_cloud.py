"""From depth and normals to points in space, and into a PLY file."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffrep.heads.families import Frame
from diffrep.heads.maps import change_frame
from diffrep.settings import check


@dataclass(frozen=True)
class Intrinsics:
    """A pinhole camera without distortion, in pixels; (0, 0) is the centre of the first pixel."""

    fx: float
    fy: float
    cx: float
    cy: float

    def __post_init__(self) -> None:
        check(self)
        values = (self.fx, self.fy, self.cx, self.cy)
        if not all(map(math.isfinite, values)) or self.fx <= 0 or self.fy <= 0:
            raise ValueError(f"intrinsics are fx,fy,cx,cy in pixels with positive focal lengths, got {values}")

    @classmethod
    def assumed(cls, height: int, width: int, field_of_view: float = 60.0) -> Intrinsics:
        """A camera that looks along the image's centre and sees `field_of_view` degrees along its longer side.

        Raises:
            ValueError: the angle is not between 0 and 180.
        """
        if not 0 < field_of_view < 180:
            raise ValueError(f"the field of view must lie between 0 and 180 degrees, got {field_of_view}")
        focal = max(height, width) / 2 / math.tan(math.radians(field_of_view) / 2)
        return cls(focal, focal, (width - 1) / 2, (height - 1) / 2)


def unproject(depth: Tensor, intrinsics: Intrinsics) -> Tensor:
    """Points of every pixel.

    Args:
        depth: (H, W), along the optical axis.

    Returns:
        (3, H, W) in x right, y down, z forward, in the unit of the depth.
    """
    height, width = depth.shape
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    right = (x.to(depth) - intrinsics.cx) / intrinsics.fx
    down = (y.to(depth) - intrinsics.cy) / intrinsics.fy
    return torch.stack([right * depth, down * depth, depth])


def normals_from_depth(depth: Tensor, intrinsics: Intrinsics) -> Tensor:
    """Unit normals (3, H, W) in "rdf" that face the camera, from differences of neighbouring points.

    For depth without a normal map; noisy where the depth is, wrong across its jumps.
    """
    points = torch.nn.functional.pad(unproject(depth, intrinsics)[None], (1, 1, 1, 1), mode="replicate")[0]
    right, down = points[:, 1:-1, 2:] - points[:, 1:-1, :-2], points[:, 2:, 1:-1] - points[:, :-2, 1:-1]
    normals = torch.linalg.cross(down, right, dim=0)  # towards the camera where the surface is seen from the front
    return normals / normals.norm(dim=0).clamp(min=1e-12)


def ply_bytes(
    points: Tensor,
    colours: Tensor,
    normals: Tensor | None = None,
    *,
    frame: Frame = "rub",
    keep: Tensor | None = None,
    comment: str = "",
) -> bytes:
    """A point cloud as a binary PLY file.

    Args:
        points: (3, H, W) in x right, y down, z forward, as `unproject` gives them.
        colours: (3, H, W) uint8.
        normals: (3, H, W) in "rdf", or None.
        frame: axes of the file; "rub", with y up, is what viewers expect.
        keep: (H, W) bool, the pixels that become points; None: all with finite coordinates.
        comment: one line kept in the header.
    """
    finite = torch.isfinite(points).all(0)
    keep = finite if keep is None else keep & finite
    parts = [(("x", "y", "z"), "<f4", "float", change_frame(points, "rdf", frame))]
    if normals is not None:
        parts.append((("nx", "ny", "nz"), "<f4", "float", change_frame(normals, "rdf", frame)))
    parts.append((("red", "green", "blue"), "u1", "uchar", colours))
    vertices = np.empty(int(keep.sum()), dtype=[(name, kind) for names, kind, _, _ in parts for name in names])
    for names, _, _, values in parts:
        for name, column in zip(names, values[:, keep].cpu().numpy(), strict=True):
            vertices[name] = column
    properties = [f"property {kind} {name}" for names, _, kind, _ in parts for name in names]
    comments = [f"comment {' '.join(comment.split())}"] if comment else []
    header = ["ply", "format binary_little_endian 1.0", *comments, f"element vertex {len(vertices)}", *properties]
    return ("\n".join([*header, "end_header"]) + "\n").encode("ascii", "replace") + vertices.tobytes()
