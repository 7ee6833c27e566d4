"""``diffrep depth``: how far away everything in an image is."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from PIL import Image

from diffrep.commands.dense import Map, check_folder, run_images, write_map
from diffrep.files import write_whole
from diffrep.heads.dense import DenseHead, PredictConfig
from diffrep.heads.families import FRAME_SIGNS, Frame
from diffrep.heads.loading import load_head
from diffrep.heads.maps import DepthMap, NormalMap
from diffrep.heads.point_cloud import Intrinsics, normals_from_depth, ply_bytes, unproject
from diffrep.heads.sparse import read_known_depths
from diffrep.images import find_images

Format = Literal["png", "npy", "tiff", "ply"]


@dataclass(frozen=True)
class Depth:
    """Predict the depth of images in one pass of a diffusion U-Net.

    For example: diffrep depth photo.jpg -o maps, or a folder: diffrep depth photos/ -o maps --formats png npy

    Every image gets the files that --formats names, a coloured preview and a JSON file that says whether large values
    are near (disparity) or far (depth). Depth is relative, up to an unknown scale and shift, unless --known gives some
    depths in metres. Frames of a video, given in order, all see the same noise.
    """

    images: Annotated[tuple[str, ...], tyro.conf.Positional]  # files, folders or glob patterns
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("depth")  # folder that the files go into
    model: str = "tiny-depth"  # embedded head, folder or hub id: Lotus, Marigold, E2E-FT
    task: Literal["depth", "disparity"] | None = None  # what the model predicts, where its files do not say it
    family: str | None = None  # what the model is, where its files do not say it, for example e2e-ft
    formats: tuple[Format, ...] = ("png",)  # png: 16 bits; npy, tiff: float32; ply: point cloud
    preview: bool = True  # also write a coloured picture
    known: Path | None = (
        None  # known depths in metres (.npy map with 0 or nan elsewhere, 16-bit .png in millimetres, .csv
    )
    # with lines x,y,metres), or a folder of such files with the images' names: makes the depth metric
    fit: Literal["robust", "least squares"] = "robust"  # how scale and shift are fitted to them
    intrinsics: str | None = None  # ply: fx,fy,cx,cy of the camera in pixels
    field_of_view: float | None = None  # ply: degrees along the longer side, where the camera is not known
    normals_model: str | None = None  # ply: head whose normals the points get; else they come from the depth
    nearest: float = 1.0  # ply: distance that relative depth is assumed to start at
    farthest: float = 10.0  # ply: and to end at
    frame: Frame = "rub"  # ply: axes of the point cloud
    device: str = "cpu"  # cpu or cuda
    precision: Literal["float32", "bfloat16", "float16"] | None = None  # float32 on cpu, bfloat16 on cuda
    json: bool = False  # print what was written as JSON
    predict: Annotated[PredictConfig, tyro.conf.OmitArgPrefixes] = field(default_factory=PredictConfig)

    def run(self) -> None:
        self._check()
        paths = find_images(self.images)
        dtype = None if self.precision is None else getattr(torch, self.precision)
        head = load_head(self.model, task=self.task, family=self.family, device=self.device, dtype=dtype)
        if head.task == "normals":
            raise ValueError(f"{self.model}: predicts normals; use diffrep normals")
        normals = None
        if self.normals_model is not None:
            normals = load_head(self.normals_model, device=self.device, dtype=dtype)
            if normals.task != "normals":
                raise ValueError(f"{self.normals_model}: predicts {normals.task}, not normals")

        def write(path: Path, name: str, image: Image.Image, result: Map) -> list[Path]:
            assert isinstance(result, DepthMap)
            if self.known is not None:
                result = result.align(read_known_depths(self.known, path, image.size), method=self.fit)
            return self._write(self.output / name, image, result, normals)

        done = run_images(head, paths, self.predict, write)
        if self.json:
            print(json.dumps({"model": self.model, "found": head.found, "images": done}, indent=2))
        else:
            print(f"{self.model}: {head.found}")
            print(f"wrote {sum(len(entry['files']) for entry in done)} files for {len(done)} images into {self.output}")  # type: ignore[arg-type, misc]  # lists, by run_images

    def _check(self) -> None:
        """Refuse options that do not go together before any work.

        Raises:
            ValueError: naming them.
        """
        if not self.images:
            raise ValueError("say which images: diffrep depth IMAGES -o FOLDER")
        if not self.formats and not self.preview:
            raise ValueError("nothing would be written: name --formats, or leave the preview on")
        if "ply" in self.formats:
            if self.intrinsics is None and self.field_of_view is None:
                raise ValueError(
                    "a point cloud needs the camera: --intrinsics fx,fy,cx,cy, or --field-of-view DEGREES to assume one"
                )
            if self.intrinsics is not None and self.field_of_view is not None:
                raise ValueError("--intrinsics and --field-of-view do not go together")
            if not 0 < self.nearest < self.farthest:
                raise ValueError(f"nearest must be above 0 and below farthest, got {self.nearest} and {self.farthest}")
            self._camera(2, 2)
        elif self.intrinsics or self.field_of_view or self.normals_model:
            raise ValueError("--intrinsics, --field-of-view and --normals-model belong to --formats ply")
        if self.known is not None and not self.known.exists():
            raise ValueError(f"{self.known}: no such file or folder of known depths")
        check_folder(self.output)

    def _camera(self, height: int, width: int) -> Intrinsics:
        if self.intrinsics is None:
            return Intrinsics.assumed(height, width, self.field_of_view or 60.0)
        try:
            fx, fy, cx, cy = (float(number) for number in self.intrinsics.split(","))
        except ValueError:
            raise ValueError(f"cannot read the intrinsics {self.intrinsics!r}: write fx,fy,cx,cy in pixels") from None
        return Intrinsics(fx, fy, cx, cy)

    def _write(self, base: Path, image: Image.Image, result: DepthMap, normals: DenseHead | None) -> list[Path]:
        written = []
        if "ply" in self.formats:
            written.append(base.with_name(f"{base.name}_points.ply"))
            write_whole(written[0], self._points(image, result, normals))
        maps = [kind for kind in self.formats if kind != "ply"]
        return [*written, *write_map(base, result, maps, show=self.preview)]

    def _points(self, image: Image.Image, result: DepthMap, head: DenseHead | None) -> bytes:
        camera = self._camera(image.height, image.width)
        depth = result.relative_depth(self.nearest, self.farthest)
        if head is None:
            normals = normals_from_depth(depth, camera)
        else:
            predicted = head.predict(image, self.predict)
            assert isinstance(predicted, NormalMap)
            normals = predicted.to_frame("rdf").values
        colours = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        unit = "metres" if result.metric else f"assumed, {self.nearest:g} to {self.farthest:g}"
        x, y, z = ("right" if FRAME_SIGNS[self.frame][0] < 0 else "left", *_vertical(self.frame))
        comment = f"unit: {unit}; axes: x {x}, y {y}, z {z}; camera at 0, fx {camera.fx:.4g} fy {camera.fy:.4g}"
        return ply_bytes(unproject(depth, camera), colours, normals, frame=self.frame, comment=comment)


def _vertical(frame: Frame) -> tuple[str, str]:
    return ("up", "towards the camera") if FRAME_SIGNS[frame][1] > 0 else ("down", "forward")
