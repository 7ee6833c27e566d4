"""Depth and normals from frozen maps as a saved probe, trained with probe3d's recipe (arXiv 2404.08636).

Maps are extracted once into a store on disk; annotations are read batch by batch. So memory does not grow with the
number of images.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeAlias, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from diffrep.backbones import Backbone
from diffrep.features import ExtractConfig, extract_each
from diffrep.heads.families import Frame
from diffrep.heads.maps import DepthMap, NormalMap
from diffrep.heads.probes.annotated import AnnotatedFiles, read_normals
from diffrep.heads.probes.dense import DepthProbe, NormalsProbe, Reader, depth_loss
from diffrep.heads.probes.labelled import DataError, image_file, images_sha256
from diffrep.heads.probes.recipe import ProbeRecipe, check_settings, train_recipe
from diffrep.heads.probes.saved import OneBackboneProbe, SavedKind, as_list
from diffrep.heads.sparse import read_known_depths
from diffrep.heads.training.dense import angular_loss
from diffrep.images import ImageLike, Placement
from diffrep.store import BulkConfig, Keep, Store, extract_store, open_store
from diffrep.store.manifest import extract_config, provenance

DenseTask: TypeAlias = Literal["depth", "normals"]


@dataclass(frozen=True, kw_only=True)
class DenseSettings:
    """What the probe looks like and how it is trained; the published values, depth limits those for NYUv2."""

    reader: Reader = "linear"
    predicts: Literal["bins", "sigmoid"] = "bins"  # depth: mean of 256 bins, or one number
    nearest: float = 0.001  # depth: metres, of the first bin
    farthest: float = 10.0  # depth: metres, of the last bin; what is farther does not count in training
    hidden: int = 512  # multiscale, dpt: channels inside
    kernel: int = 1  # of the convolutions, pixels
    learning_rate: float = 5e-4  # of AdamW, its highest
    weight_decay: float = 0.01
    epochs: int = 10
    warmup: float = 1.5  # epochs
    batch_size: int = 8
    dtype: Literal["float16", "float32"] = "float16"  # in which maps are kept
    seed: int = 0

    def __post_init__(self) -> None:
        check_settings(
            self,
            positive=("nearest", "farthest", "hidden", "kernel", "learning_rate", "epochs", "batch_size"),
            not_negative=("weight_decay", "warmup", "seed"),
        )
        if self.nearest >= self.farthest:
            raise ValueError(f"nearest must be below farthest, got {self.nearest} and {self.farthest}")

    def recipe(self) -> ProbeRecipe:
        """The loop's settings."""
        return ProbeRecipe(
            optimiser="adamw",
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            epochs=self.epochs,
            warmup=self.warmup,
            schedule="quarter cosine",
        )


class StandardisedProbe(nn.Module):
    """`DepthProbe` or `NormalsProbe` on maps whose channels are brought to mean 0 and variance 1.

    That is ours: the channels of a U-Net differ by orders of magnitude. So is that the linear and the DPT reader, which
    take maps of one size, get all maps resized to the largest one.
    """

    def __init__(self, task: DenseTask, channels: Sequence[int], settings: DenseSettings) -> None:
        super().__init__()
        for number, count in enumerate(channels):
            self.register_buffer(f"mean_{number}", torch.zeros(count))
            self.register_buffer(f"scale_{number}", torch.ones(count))
        self.one_size = settings.reader != "multiscale"
        common: dict[str, Any] = {"reader": settings.reader, "hidden": settings.hidden, "kernel": settings.kernel}
        limits = (settings.nearest, settings.farthest)
        self.probe: DepthProbe | NormalsProbe = (
            DepthProbe(channels, predicts=settings.predicts, limits=limits, **common)
            if task == "depth"
            else NormalsProbe(channels, **common)
        )

    def forward(self, maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """Maps (B, C_i, h_i, w_i) of a canvas of size (H, W) -> (B, 1 or 3, H, W)."""
        read = []
        for number, values in enumerate(maps):
            mean, scale = (getattr(self, f"{name}_{number}")[:, None, None] for name in ("mean", "scale"))
            read.append((values.float() - mean) * scale)
        if self.one_size:
            grid = max((m.shape[-2:] for m in read), key=lambda shape: shape[0] * shape[1])
            read = [_resize(m, grid) for m in read]
        return _resize(self.probe(read), size)


@dataclass(frozen=True, repr=False)
class DenseProbe(OneBackboneProbe):
    """A trained probe with everything needed to use it on images.

    Attributes:
        features: provenance: backbone, hash of its weights, and every extraction setting.
        about: how it was trained and what it scored, JSON-ready.
    """

    KIND: ClassVar[SavedKind] = "dense"

    module: StandardisedProbe
    task: DenseTask
    settings: DenseSettings
    features: Mapping[str, Any]
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def network(self) -> nn.Module:
        """The same as `module`."""
        return self.module

    def document(self) -> dict[str, Any]:
        """Task, channels of each map, and settings."""
        state = self.module.state_dict()
        channels = [len(state[f"mean_{number}"]) for number in range(len(self.features["taps"]))]
        return {"task": self.task, "channels": channels, "settings": asdict(self.settings)}

    @classmethod
    def from_document(cls, document: Mapping[str, Any], backbone: Backbone | None) -> Self:
        """A probe of the document's shapes."""
        task, settings = document["task"], DenseSettings(**document["settings"])
        if task not in get_args(DenseTask):
            raise ValueError(f"its task must be {' or '.join(get_args(DenseTask))}, found {task!r}")
        ((_, features),) = document["features"].items()
        module = StandardisedProbe(task, document["channels"], settings)
        return cls(module, task, settings, features, document["about"])

    def summary(self) -> str:
        """What it predicts, through which reader."""
        return f"{self.task}, {self.settings.reader} reader,"

    def predict(
        self, images: Iterable[ImageLike], *, backbone: Backbone | None = None, device: str = "auto"
    ) -> list[DepthMap | NormalMap]:
        """The maps of images of any sizes; see `predict_each`."""
        return list(self.predict_each(images, backbone=backbone, device=device))

    @torch.no_grad()
    def predict_each(
        self,
        images: Iterable[ImageLike],
        *,
        backbone: Backbone | None = None,
        checked: bool = False,
        device: str = "auto",
        batch_size: int = 8,
    ) -> Iterator[DepthMap | NormalMap]:
        """The maps of images of any sizes, in order: depth in metres, or unit normals in "lub".

        Args:
            checked: the backbone has been through `check` already.

        Raises:
            ImageError: an image cannot be read.
            ValueError: the backbone is not the one it was trained on.
        """
        backbone = self.usable(backbone, device, checked=checked)
        config = dataclasses.replace(extract_config(self.features), batch_size=batch_size)
        about = {"probe": self.settings.reader, "backbone": self.backbone, "taps": list(self.features["taps"])}
        for maps in extract_each(backbone, list(as_list(images)), config):
            placement = maps.placements[0]
            canvas = self.module([maps.maps[tap].float().cpu() for tap in maps.taps], placement.canvas_size)
            x0, y0, x1, y1 = (round(edge) for edge in placement.content_box)
            values = _resize(canvas[..., y0:y1, x0:x1], placement.image_size)
            if self.task == "depth":
                yield DepthMap(values[0, 0], "depth", metric=True, settings=about)
            else:
                yield NormalMap(F.normalize(values, dim=1)[0], "lub", settings=about)


@dataclass(frozen=True, kw_only=True)
class Annotation:
    """How annotation files are read."""

    per_metre: float = 1000.0  # counts of a 16-bit depth .png; 1000: millimetres
    frame: Frame = "lub"  # camera axes of normals: lub (x left, y up, z to the camera), rub, rdf

    def read(self, task: DenseTask, file: Path, size: tuple[int, int]) -> Tensor:
        """Depth (1, H, W) in metres or normals (3, H, W) in "lub" of an image of size (H, W); 0 where unknown.

        Raises:
            ValueError: the file cannot be read, or is of another size.
        """
        if task == "normals":
            return read_normals(file, size, self.frame)
        return read_known_depths(file, file, size[::-1], per_metre=self.per_metre)[None]


def train_dense_probe(
    data: AnnotatedFiles,
    task: DenseTask,
    backbone: Backbone,
    folder: str | Path,
    *,
    settings: DenseSettings | None = None,
    extract: ExtractConfig | None = None,
    annotation: Annotation | None = None,
    workers: int = 0,
    progress: bool = True,
) -> DenseProbe:
    """Train a probe on annotated images.

    Depth is trained with `depth_loss`. The loss of normals is ours, since probe3d's is not stated: the mean angle.
    Predictions are compared on the network's canvas, to which annotations are brought by nearest neighbour.

    Args:
        folder: below which maps are kept; the next run on the same images, backbone and settings reads them there.
        extract: taps and timestep among others; None: as the backbone recommends.
        workers: processes that decode images ahead while maps are extracted.

    Raises:
        DataError: no image can be read, or none has a known pixel; an annotation does not fit its image.
        ValueError: images come to canvases of different sizes, or maps do not fit into float16.
    """
    settings, annotation = settings or DenseSettings(), annotation or Annotation()
    config = (extract or ExtractConfig()).resolve(backbone)
    features = provenance(backbone, config)
    store, names = _extracted(data, backbone, config, Path(folder), settings, workers, progress)
    known = set(store.names)
    rows = [row for row, name in enumerate(names) if name in known]
    if not rows:
        reason = f": {store.quarantined[0][1]}" if store.quarantined else ""
        raise DataError(f"{data.name}: none of the {len(data)} images can be read{reason}")
    canvases = {store[names[row]].placement.canvas_size for row in rows}
    if len(canvases) > 1:
        raise ValueError("a dense probe trains on images of one canvas size: choose a Sizing with 'squash' or 'pad'")
    (canvas,) = canvases
    channels = [backbone.tap(tap).channels for tap in store.taps]
    with torch.random.fork_rng(devices=[]):  # torch's initialisers draw from the global generator
        torch.manual_seed(settings.seed)
        module = StandardisedProbe(task, channels, settings)
    _standardise(module, store, [names[row] for row in rows])
    steps = -(-len(rows) // settings.batch_size)
    bar = tqdm(total=steps * settings.epochs, desc=f"{task} probe", unit="step", disable=not progress)

    def batches(epoch: int) -> Iterator[tuple[list[Tensor], tuple[Tensor, Tensor]]]:
        order = np.random.default_rng([settings.seed, epoch]).permutation(rows)
        for start in range(0, len(order), settings.batch_size):
            some = order[start : start + settings.batch_size]
            stored = [store[names[row]] for row in some]
            maps = [torch.stack([one.features[tap] for one in stored]) for tap in store.taps]
            targets = []
            for row, one in zip(some, stored, strict=True):
                values = annotation.read(task, data.annotations[row], one.placement.image_size)
                targets.append(on_canvas(values, one.placement))
            target = torch.stack(targets)
            valid = (target != 0).any(1, keepdim=True)
            if task == "depth":
                valid = (target >= settings.nearest) & (target <= settings.farthest)
            if bool(valid.any()):
                yield maps, (target, valid)
            bar.update()

    measure = depth_loss if task == "depth" else normals_loss
    with bar:
        losses = train_recipe(
            module, batches, settings.recipe(), steps=steps,
            forward=lambda maps: module(maps, canvas), loss=lambda predicted, target: measure(predicted, *target),
        )  # fmt: skip
    if not losses:
        span = f" between {settings.nearest:g} and {settings.farthest:g} m" if task == "depth" else ""
        raise DataError(f"{data.name}: no pixel of the {len(rows)} images has known {task}{span}")
    about = {
        "data": data.name,
        "images": len(rows),
        "unreadable": len(data) - len(rows),
        "annotation": asdict(annotation),
        "first_loss": losses[0],
        "last_loss": float(np.mean(losses[-steps:])),
    }
    return DenseProbe(module, task, settings, features, about)


def normals_loss(predicted: Tensor, reference: Tensor, valid: Tensor) -> Tensor:
    """Mean angle in radians over the valid pixels, of (B, 3, H, W) predictions of any length."""
    return angular_loss(F.normalize(predicted, dim=1), reference, valid)


def on_canvas(values: Tensor, placement: Placement) -> Tensor:
    """An annotation (C, H, W) of an image where the image lies on its canvas; 0 on the padding."""
    from diffrep.heads.training.dense_data import resize_nearest  # brings the renderer of scenes

    x0, y0, x1, y1 = (round(edge) for edge in placement.content_box)
    canvas = values.new_zeros(len(values), *placement.canvas_size)
    canvas[:, y0:y1, x0:x1] = resize_nearest(values, (y1 - y0, x1 - x0))
    return canvas


def _resize(maps: Tensor, size: Sequence[int]) -> Tensor:
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)


def _extracted(
    data: AnnotatedFiles,
    backbone: Backbone,
    config: ExtractConfig,
    folder: Path,
    settings: DenseSettings,
    workers: int,
    progress: bool,
) -> tuple[Store, list[str]]:
    """The store of the maps, and each image's name in it."""
    files = [file.absolute() for file in data.images]
    root = Path(os.path.commonpath([file.parent for file in files]))
    settled = {k: v for k, v in provenance(backbone, config).items() if k not in ("source", "batch_size")}
    contents = images_sha256(image_file(file, root) for file in files)
    identity = json.dumps([settled, str(root), contents, settings.dtype], sort_keys=True)
    home = folder / f"{Path(backbone.name).name}-maps-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
    keep = Keep(kind="maps", dtype=settings.dtype)
    bulk = BulkConfig(workers=workers, changed="update")
    extract_store(files, home, backbone, config, keep, bulk, root=root, progress=progress)
    return open_store(home), [file.relative_to(root).as_posix() for file in files]


def _standardise(module: StandardisedProbe, store: Store, names: Sequence[str]) -> None:
    """Set mean and scale from the maps of some images, in one pass, in float64.

    Raises:
        ValueError: a map is not finite.
    """
    for number, tap in enumerate(store.taps):
        count, total, squares = 0, torch.zeros(()), torch.zeros(())
        for name in names:
            values = store[name].features[tap].double().flatten(1)
            if not bool(torch.isfinite(values).all()):
                raise ValueError(f"features of {tap} do not fit into {store.manifest.keep.dtype}: choose float32")
            count += values.shape[1]
            total, squares = total + values.sum(1), squares + values.square().sum(1)
        mean = total / count
        variance = (squares / count - mean.square()).clamp(min=0)
        getattr(module, f"mean_{number}").copy_(mean)
        # a channel that never changes says nothing: it is left at 0
        getattr(module, f"scale_{number}").copy_(torch.where(variance > 1e-12, variance.rsqrt(), 0.0))
