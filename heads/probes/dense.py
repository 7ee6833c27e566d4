"""Probes of depth and surface normals on frozen maps, with probe3d's heads and recipe (arXiv 2404.08636).

Three readers of the maps: linear (one convolution after resizing to four times the grid), multiscale (convolutions
before and after, eight times) and DPT (residual units from the last map back to the first, sixteen times); every
resizing is bilinear with aligned corners.

In training maps are extracted once into a store on disk; annotations are read batch by batch. So memory does not grow
with the number of images.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from diffrep.backbones import Backbone
from diffrep.devices import initial_weights
from diffrep.features import ExtractConfig, FeatureMaps
from diffrep.heads.maps import DepthMap, NormalMap
from diffrep.heads.probes.annotated import AnnotatedFiles, Annotation, DenseTask
from diffrep.heads.probes.grid import SEED, moments
from diffrep.heads.probes.labelled import DataError, image_file, images_sha256
from diffrep.heads.probes.probe import MapProbe, SavedKind, uncover
from diffrep.heads.probes.training import ProbeRecipe, shuffled, train_recipe
from diffrep.heads.training.dense import angular_loss
from diffrep.images import Placement
from diffrep.settings import NOT_NEGATIVE, POSITIVE, check
from diffrep.store import BulkConfig, Keep, Store, extract_store, open_store
from diffrep.store.manifest import provenance

Reader: TypeAlias = Literal["linear", "multiscale", "dpt"]


def _conv(channels: int, out: int, kernel: int) -> nn.Conv2d:
    return nn.Conv2d(channels, out, kernel, padding=kernel // 2)


def _grow(maps: Tensor, factor: int) -> Tensor:
    return F.interpolate(maps, scale_factor=factor, mode="bilinear", align_corners=True)


class LinearReader(nn.Module):
    """All maps side by side, resized to four times the grid, one convolution."""

    def __init__(self, channels: Sequence[int], out: int, hidden: int = 0, kernel: int = 1) -> None:
        super().__init__()
        self.conv = _conv(sum(channels), out, kernel)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps (B, C_i, h, w) -> (B, out, 4h, 4w)."""
        read = torch.cat(list(maps), dim=1)
        if self.conv.kernel_size == (1, 1):  # the same before resizing, where there are sixteen times fewer cells
            return _grow(self.conv(read), 4)
        return self.conv(_grow(read, 4))


class MultiscaleReader(nn.Module):
    """A convolution per map, resized to the last map's grid; three more at twice the grid, two at eight times."""

    def __init__(self, channels: Sequence[int], out: int, hidden: int = 512, kernel: int = 1) -> None:
        super().__init__()
        self.convs = nn.ModuleList(_conv(c, hidden, kernel) for c in channels)
        middle = [_conv(c, hidden, kernel) for c in (hidden * len(channels), hidden, hidden)]
        self.conv_mid = nn.Sequential(middle[0], nn.ReLU(), middle[1], nn.ReLU(), middle[2])
        self.conv_out = nn.Sequential(_conv(hidden, hidden, kernel), nn.ReLU(), _conv(hidden, out, kernel))

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps (B, C_i, h_i, w_i) -> (B, out, 8h, 8w), (h, w) of the last map."""
        size = maps[-1].shape[-2:]
        read = [conv(m) for conv, m in zip(self.convs, maps, strict=True)]
        x = torch.cat([F.interpolate(m, size=size, mode="bilinear", align_corners=True) for m in read], dim=1).relu()
        x = self.conv_mid(_grow(x, 2)).relu()
        return self.conv_out(_grow(x, 4))


class _ResidualUnit(nn.Module):
    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(_conv(width, width, kernel), nn.ReLU(), _conv(width, width, kernel), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + x


class _Fusion(nn.Module):
    def __init__(self, width: int, kernel: int, *, skip: bool) -> None:
        super().__init__()
        if skip:
            self.resConfUnit1 = _ResidualUnit(width, kernel)
        self.resConfUnit2 = _ResidualUnit(width, kernel)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        return self.resConfUnit2(x if skip is None else x + self.resConfUnit1(skip))


class DptReader(nn.Module):
    """Four maps, each through a 1x1 convolution and doubled, fused from the last back; then four times, then two.

    The caller's list of maps is left as it is (the released code overwrites it).
    """

    def __init__(self, channels: Sequence[int], out: int, hidden: int = 512, kernel: int = 3) -> None:
        super().__init__()
        if len(channels) != 4:
            raise ValueError(f"a DPT reader takes four maps, got {len(channels)}")
        for number, count in enumerate(channels):
            self.add_module(f"conv_{number}", nn.Conv2d(count, hidden, 1))
            self.add_module(f"ref_{number}", _Fusion(hidden, kernel, skip=number < 3))
        self.out_conv = nn.Sequential(_conv(hidden, hidden, 3), nn.ReLU(), _conv(hidden, out, 3))

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Four maps (B, C_i, h, w) -> (B, out, 16h, 16w)."""
        read = [_grow(getattr(self, f"conv_{number}")(m), 2) for number, m in enumerate(maps)]
        fuse = [getattr(self, f"ref_{number}") for number in range(4)]
        x = fuse[3](read[3])
        for number in (2, 1, 0):
            x = fuse[number](x, read[number])
        return _grow(self.out_conv(_grow(x, 4)), 2)


READERS: dict[Reader, type[LinearReader | MultiscaleReader | DptReader]] = {
    "linear": LinearReader,
    "multiscale": MultiscaleReader,
    "dpt": DptReader,
}


class DepthProbe(nn.Module):
    """Depth between two limits, as the mean of 256 bins or through a sigmoid.

    Args:
        limits: lowest and highest depth, metres.
        predicts: "bins" weighs uniform bins by relu(logit) + 0.1; "sigmoid" has one output.
    """

    def __init__(
        self,
        channels: Sequence[int],
        *,
        reader: Reader = "linear",
        predicts: Literal["bins", "sigmoid"] = "bins",
        limits: tuple[float, float] = (0.001, 10.0),
        hidden: int = 512,
        kernel: int = 1,
        bins: int = 256,
    ) -> None:
        super().__init__()
        self.limits, self.predicts = limits, predicts
        self.head = READERS[reader](channels, bins if predicts == "bins" else 1, hidden, kernel)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps (B, C_i, h, w) -> depth (B, 1, H, W), metres."""
        x, (low, high) = self.head(maps), self.limits
        if self.predicts == "sigmoid":
            return low + (high - low) * x.sigmoid()
        weights = x.relu() + 0.1
        centres = torch.linspace(low, high, x.shape[1], device=x.device, dtype=x.dtype)
        return torch.einsum("bkhw,k->bhw", weights, centres)[:, None] / weights.sum(1, keepdim=True)


class NormalsProbe(nn.Module):
    """Surface normals, three channels; with `uncertainty` a fourth."""

    def __init__(
        self,
        channels: Sequence[int],
        *,
        reader: Reader = "linear",
        uncertainty: bool = False,
        hidden: int = 512,
        kernel: int = 1,
    ) -> None:
        super().__init__()
        self.head = READERS[reader](channels, 4 if uncertainty else 3, hidden, kernel)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps (B, C_i, h, w) -> (B, 3 or 4, H, W); not of unit length."""
        return self.head(maps)


def scale_invariant_loss(depth: Tensor, reference: Tensor, valid: Tensor, *, invariance: float = 0.85) -> Tensor:
    """sqrt(mean(g^2) - invariance mean(g)^2) over the valid pixels of a batch, g = log depth - log reference.

    Eigen et al. 2014 (arXiv 1406.2283), with the weight and the root of AdaBins (arXiv 2011.14141, equation 5).

    Args:
        depth, reference: (B, 1, H, W) metres, positive where valid.
        valid: (B, 1, H, W) bool. Zero where there is none.
    """
    g = depth[valid].log() - reference[valid].log()
    if not len(g):
        return depth.sum() * 0
    return (g.square().mean() - invariance * g.mean().square()).clamp(min=1e-12).sqrt()


def gradient_loss(depth: Tensor, reference: Tensor, valid: Tensor, *, scales: int = 4) -> Tensor:
    """Mean absolute gradient of log depth - log reference, summed over every, every second, fourth, ... pixel.

    MegaDepth (arXiv 1804.00607, equation 4); gradients whose two pixels are valid count.

    Args:
        depth, reference, valid: as of `scale_invariant_loss`.
    """
    difference = torch.where(valid, depth, 1.0).log() - torch.where(valid, reference, 1.0).log()
    total = difference.sum() * 0
    for scale in range(scales):
        part, known = difference[..., :: 2**scale, :: 2**scale], valid[..., :: 2**scale, :: 2**scale]
        for axis in (-2, -1):
            both = known.narrow(axis, 1, known.shape[axis] - 1) & known.narrow(axis, 0, known.shape[axis] - 1)
            total = total + (part.diff(dim=axis).abs() * both).sum() / known.sum().clamp(min=1)
    return total


def depth_loss(depth: Tensor, reference: Tensor, valid: Tensor) -> Tensor:
    """probe3d's loss (arXiv 2404.08636): 10 times the scale-invariant one, 0.5 times that of the gradients.

    The weights are published; the forms of the two are the ones their papers give, see above.
    """
    return 10 * scale_invariant_loss(depth, reference, valid) + 0.5 * gradient_loss(depth, reference, valid)


def normals_loss(predicted: Tensor, reference: Tensor, valid: Tensor) -> Tensor:
    """Mean angle in radians over the valid pixels, of (B, 3, H, W) predictions of any length."""
    return angular_loss(F.normalize(predicted, dim=1), reference, valid)


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
        positive = ("nearest", "farthest", "hidden", "kernel", "learning_rate", "epochs", "batch_size")
        check(self, **dict.fromkeys(positive, POSITIVE), weight_decay=NOT_NEGATIVE, warmup=NOT_NEGATIVE, seed=SEED)
        if self.nearest >= self.farthest:
            raise ValueError(f"nearest must be below farthest, got {self.nearest} and {self.farthest}")

    def recipe(self) -> ProbeRecipe:
        """The loop's settings."""
        shared = ("learning_rate", "weight_decay", "epochs", "warmup")
        return ProbeRecipe(
            optimiser="adamw", schedule="quarter cosine", **{name: getattr(self, name) for name in shared}
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


def _resize(maps: Tensor, size: Sequence[int]) -> Tensor:
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)


@dataclass(frozen=True, repr=False, kw_only=True)
class DenseProbe(MapProbe):
    """Depth in metres, or unit normals in "lub", of images: `DepthMap`, `NormalMap`.

    Attributes:
        channels: of each map that is read.
    """

    KIND: ClassVar[SavedKind] = "dense"

    task: DenseTask
    channels: tuple[int, ...]
    settings: DenseSettings

    def untrained(self, backbone: Backbone | None = None) -> nn.Module:
        return StandardisedProbe(self.task, self.channels, self.settings)

    def summary(self) -> str:
        return f"{self.task}, {self.settings.reader} reader,"

    def answer(self, maps: Sequence[FeatureMaps]) -> DepthMap | NormalMap:
        (of_image,), taps = maps, list(self.features[self.backbone]["taps"])
        placement = of_image.placements[0]
        canvas = self.network([of_image.maps[tap].float().cpu() for tap in of_image.taps], placement.canvas_size)
        values = uncover(canvas, placement, _resize)
        about = {"probe": self.settings.reader, "backbone": self.backbone, "taps": taps}
        if self.task == "depth":
            return DepthMap(values[0, 0], "depth", metric=True, settings=about)
        return NormalMap(F.normalize(values, dim=1)[0], "lub", settings=about)


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
    store, names = _extracted(data, backbone, config, Path(folder), settings, workers, progress)
    readable = set(store.names)
    rows = [row for row, name in enumerate(names) if name in readable]
    if not rows:
        reason = f": {store.quarantined[0][1]}" if store.quarantined else ""
        raise DataError(f"{data.name}: none of the {len(data)} images can be read{reason}")
    canvas, *others = {store[names[row]].placement.canvas_size for row in rows}
    if others:
        raise ValueError("a dense probe trains on images of one canvas size: choose a Sizing with 'squash' or 'pad'")
    channels = tuple(backbone.tap(tap).channels for tap in store.taps)
    with initial_weights(settings.seed):
        module = StandardisedProbe(task, channels, settings)
    _standardise(module, store, [names[row] for row in rows])
    steps = -(-len(rows) // settings.batch_size)
    bar = tqdm(total=steps * settings.epochs, desc=f"{task} probe", unit="step", disable=not progress)

    def batches(epoch: int) -> Iterator[tuple[list[Tensor], tuple[Tensor, Tensor]]]:
        for some in shuffled(rows, settings.batch_size, settings.seed, epoch):
            stored, targets = [store[names[row]] for row in some], []
            for row, one in zip(some, stored, strict=True):
                values = annotation.read(task, data.annotations[row], one.placement.image_size)
                targets.append(on_canvas(values, one.placement))
            target = torch.stack(targets)
            valid = (target != 0).any(1, keepdim=True)
            if task == "depth":
                valid = (target >= settings.nearest) & (target <= settings.farthest)
            if bool(valid.any()):
                yield [torch.stack([one.features[tap] for one in stored]) for tap in store.taps], (target, valid)
            bar.update()

    def loss(predicted: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
        return (depth_loss if task == "depth" else normals_loss)(predicted, *target)

    def forward(maps: Sequence[Tensor]) -> Tensor:
        return module(maps, canvas)

    with bar:
        losses = train_recipe(module, batches, settings.recipe(), steps=steps, forward=forward, loss=loss)
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
    features = {backbone.name: provenance(backbone, config)}
    return DenseProbe(network=module, features=features, about=about, task=task, channels=channels, settings=settings)


def on_canvas(values: Tensor, placement: Placement) -> Tensor:
    """An annotation (C, H, W) of an image where the image lies on its canvas; 0 on the padding."""
    from diffrep.heads.training.dense_data import resize_nearest  # brings the renderer of scenes

    x0, y0, x1, y1 = (round(edge) for edge in placement.content_box)
    canvas = values.new_zeros(len(values), *placement.canvas_size)
    canvas[:, y0:y1, x0:x1] = resize_nearest(values, (y1 - y0, x1 - x0))
    return canvas


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
    keep, bulk = Keep(kind="maps", dtype=settings.dtype), BulkConfig(workers=workers, changed="update")
    extract_store(files, home, backbone, config, keep, bulk, root=root, progress=progress)
    return open_store(home), [file.relative_to(root).as_posix() for file in files]


def _standardise(module: StandardisedProbe, store: Store, names: Sequence[str]) -> None:
    """Set mean and scale from the maps of some images, in one pass.

    Raises:
        ValueError: a map is not finite.
    """
    for number, tap in enumerate(store.taps):
        mean, spread = moments(store[name].features[tap].flatten(1).T for name in names)
        if not bool(torch.isfinite(mean).all()):
            raise ValueError(f"features of {tap} do not fit into {store.manifest.keep.dtype}: choose float32")
        getattr(module, f"mean_{number}").copy_(mean)
        getattr(module, f"scale_{number}").copy_(1 / spread)
