"""The part of the demo page about depth and normals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from diffrep.draw import side_by_side
from diffrep.eval.homography import photographs
from diffrep.heads.loading import load_head
from diffrep.heads.map_files import preview
from diffrep.heads.maps import DepthMap, NormalMap
from diffrep.heads.point_cloud import Intrinsics, unproject
from diffrep.images import load_image
from diffrep.pages import Page
from diffrep.scenes import UNSEEN, Scene, render_scene, scene_seed

SCENES = (
    ("dog", 0),
    ("chair", 2),
    ("giraffe", 5),
)  # category, number in the test split; giraffes were never trained on


def section(page: Page) -> None:
    """Predict depth and normals of held-out scenes and of photographs."""
    depth, normals = load_head("tiny-depth"), load_head("tiny-normals")
    figures = []
    for category, number in SCENES:
        scene = render_scene(scene_seed("test", number), category=category, size=256)
        image = Image.fromarray(scene.image)
        disparity = depth.predict(image)
        assert isinstance(disparity, DepthMap)
        metric = disparity.align(torch.from_numpy(scene.depth), method="least squares")
        known = np.isfinite(scene.depth)
        error = float(np.mean(np.abs(metric.values.numpy() - scene.depth)[known] / scene.depth[known]))
        turned = normals.predict(image)
        assert isinstance(turned, NormalMap)
        pictures = [
            image,
            preview(disparity),
            preview(true_disparity(scene)),
            preview(turned),
            preview(true_normals(scene)),
        ]
        titles = ["image", "disparity", "as rendered", "normals", "as rendered"]
        note = ", a category it never saw" if category in UNSEEN else ""
        caption = f"{category}{note}: depth is off by {100 * error:.0f} % on average once scale and shift are known"
        figures.append((side_by_side(pictures, titles=titles, height=220)[0], caption))
    for name, path in ((Path(file).stem, path) for file, path in photographs().items()):
        image = load_image(path)
        disparity = depth.predict(image)
        assert isinstance(disparity, DepthMap)
        pictures = [image, preview(disparity), preview(normals.predict(image)), seen_from_the_side(image, disparity)]
        titles = ["photograph", "disparity", "normals", "as points, from the side"]
        caption = (
            f"{name}: the heads have seen nothing but renderings; scale, shift and camera are assumed for the points"
        )
        figures.append((side_by_side(pictures, titles=titles, height=220)[0], caption))
    page.section(
        "Depth and normals in one step",
        "One pass of a diffusion U-Net that became a depth or normal head: red is near, blue is far; normals are"
        " coloured by x right, y up and z towards the camera. These scenes are held out.",
    )
    page.figures(figures, layout="wide")
    page.code("diffrep depth photo.jpg -o maps\ndiffrep normals photo.jpg -o maps")


def true_disparity(scene: Scene) -> DepthMap:
    """A scene's disparity as heads are trained on it: between its 2 % and 98 % quantiles."""
    inverse = 1 / scene.depth.astype(np.float64)  # 0 in the sky
    low, high = np.quantile(inverse, [0.02, 0.98])
    share = ((inverse - low) / max(high - low, 1e-5)).clip(0, 1)
    return DepthMap(torch.from_numpy(share.astype(np.float32)), "disparity")


def true_normals(scene: Scene) -> NormalMap:
    """A scene's normals, towards the camera."""
    return NormalMap(torch.from_numpy(scene.normals).permute(2, 0, 1), "rdf")


def seen_from_the_side(image: Image.Image, disparity: DepthMap, degrees: float = 28.0, size: int = 300) -> Image.Image:
    """The image's pixels as points in space, from a camera that has moved around their middle."""
    image = image.resize((size, round(size * image.height / image.width)), Image.Resampling.BILINEAR)
    small = torch.nn.functional.interpolate(disparity.values[None, None], (image.height, image.width), mode="bilinear")
    depth = DepthMap(small[0, 0], "disparity").relative_depth(1.0, 4.0)
    camera = Intrinsics.assumed(image.height, image.width)
    points = unproject(depth, camera).flatten(1).numpy()
    middle = np.median(points, axis=1, keepdims=True)
    angle = np.radians(degrees)
    turn = np.array([[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]])
    x, y, z = turn @ (points - middle) + middle
    column = np.round(camera.fx * x / z + camera.cx).astype(int)
    row = np.round(camera.fy * y / z + camera.cy).astype(int)
    colours = np.array(image).reshape(-1, 3)
    canvas = np.full((image.height + 1, image.width + 1, 3), 250, dtype=np.uint8)
    order = np.argsort(-z)  # the nearest are painted last
    seen = order[((row >= 0) & (row < image.height) & (column >= 0) & (column < image.width) & (z > 0.1))[order]]
    for down, right in ((0, 0), (0, 1), (1, 0), (1, 1)):  # dots of 2 x 2 pixels close most gaps
        canvas[row[seen] + down, column[seen] + right] = colours[seen]
    return Image.fromarray(canvas[: image.height, : image.width])
