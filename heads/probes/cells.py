"""Where features are read: cells of backbone x timestep x tap x pool, the pass that reads many of them at once, and
the folder that keeps them.

One forward pass at a timestep gives every tap; an image is decoded, and encoded by the VAE, once for all timesteps.

A folder of pooled features belongs to one backbone with one set of settings and one list of images, known by their
names and contents; its manifest says which. It holds memory-mapped safetensors shards, one per timestep and a few
hundred images, that are written whole, so a run that is killed goes on where it was. A row of NaN stands for an image
that cannot be read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from diffrep.backbones import Backbone, Conditions, TapInfo, draw_noise
from diffrep.backbones.diffusion import DiffusionBackbone
from diffrep.backbones.pixel_diffusion import numbered_blocks
from diffrep.features import ExtractConfig, FeatureMaps
from diffrep.files import claim_folder, read_document, sweep_partials, write_whole
from diffrep.heads.probes.grid import FeatureRows, map_tensor
from diffrep.heads.probes.labelled import DataError, Readable, images_sha256
from diffrep.images import ImageError, Placement, Sizing, decode_image, fit_image, stack_pixels
from diffrep.processes import end_with_parent
from diffrep.settings import check
from diffrep.store.manifest import provenance
from diffrep.store.shards import write_tensors

SHARD_IMAGES = 256
MOST_POOLED = 256  # sides of a grid of averaged vectors
MANIFEST = "features.json"
_PLANNED = frozenset({"taps", "timestep"})  # of the provenance: named in the plan instead


@dataclass(frozen=True, order=True)
class Cell:
    """One place where features are read, pooled to `pool` x `pool` cells.

    >>> str(Cell("tiny", 50, "up.1", 2))
    'tiny up.1 t=50 pool 2'
    """

    backbone: str
    timestep: int
    tap: str
    pool: int

    def __post_init__(self) -> None:
        check(self)

    def __str__(self) -> str:
        return f"{self.backbone} {self.tap} t={self.timestep} pool {self.pool}"


@dataclass(frozen=True)
class ReadPlan:
    """Everything that is read of one backbone.

    Attributes:
        taps: None: every block, see `block_taps`.
        timesteps: noise levels 0..999; None: the recommended one. Networks without one have 0.
        pools: sides of the grids of average-pooled vectors.
        extract: all other settings; its taps and timestep are not used.
    """

    backbone: str
    taps: tuple[str, ...] | None = None
    timesteps: tuple[int, ...] | None = None
    pools: tuple[int, ...] = (1,)
    extract: ExtractConfig = field(default_factory=ExtractConfig)

    def __post_init__(self) -> None:
        check(self)

    def resolve(self, backbone: Backbone) -> ReadPlan:
        """Fill what is None, and check the rest.

        Raises:
            TapError: the backbone has no such tap.
            ValueError: a timestep or a pool is out of range, or nothing is to be read.
        """
        taps = self.taps or block_taps(backbone)
        timesteps = self.timesteps or (backbone.recommended.conditions.timestep,)
        if backbone.denoises is None and self.timesteps not in (None, (0,)):
            raise ValueError(f"{backbone.name} has no timesteps, got {', '.join(map(str, timesteps))}")
        for timestep in timesteps:
            Conditions(timestep=timestep)
        if not self.pools or not all(1 <= pool <= MOST_POOLED for pool in self.pools):
            raise ValueError(f"pools must be in 1..{MOST_POOLED}, got {', '.join(map(str, self.pools)) or 'none'}")
        extract = replace(self.extract, taps=tuple(taps), timestep=timesteps[0]).resolve(backbone)
        if extract.window is not None or extract.freeu is not None:
            raise ValueError("probes read whole images: window and freeu are not for them")
        taps, timesteps = tuple(dict.fromkeys(taps)), tuple(dict.fromkeys(timesteps))
        return replace(self, taps=taps, timesteps=timesteps, extract=extract)

    @classmethod
    def covering(cls, backbone: str, cells: Sequence[Cell], extract: ExtractConfig) -> ReadPlan:
        """What reads all cells of one backbone."""
        chosen = [(cell.tap, cell.timestep, cell.pool) for cell in cells if cell.backbone == backbone]
        taps, timesteps, pools = (tuple(dict.fromkeys(column)) for column in zip(*chosen, strict=True))
        return cls(backbone, taps, timesteps, pools, extract)

    def cells(self) -> list[Cell]:
        """All cells in order of taps, timesteps, pools; call `resolve` first."""
        places = product(self.taps or (), self.timesteps or (), self.pools)
        return [Cell(self.backbone, timestep, tap, pool) for tap, timestep, pool in places]


def block_taps(backbone: Backbone) -> tuple[str, ...]:
    """One tap per block, in order: the numbered blocks of a U-Net, the layers of a transformer."""
    if backbone.has_unet:
        return tuple(tap.name for tap in numbered_taps(backbone).values())
    plain = [tap.name for tap in backbone.taps() if tap.name.count(".") == 1 and tap.name.split(".")[1].isdigit()]
    return tuple(plain) or (backbone.taps()[-1].name,)


def numbered_taps(backbone: Backbone) -> dict[int, TapInfo]:
    """The blocks of a U-Net as guided-diffusion numbers them: 1, 2, ... in the order of execution.

    The input blocks, the middle block, the output blocks, each behind its attention and its resampling, whatever
    library the U-Net is from.
    """
    # a numbered name, where there is one, comes after the plain one
    by_path = {tap.module: tap for tap in backbone.taps() if tap.name != "in"}
    return {number: by_path[path] for number, path in enumerate(numbered_blocks(backbone.network), 1)}


def parse_cells(texts: Sequence[str], backbones: Mapping[str, Backbone]) -> list[Cell]:
    """``BACKBONE[,TAP[,TIMESTEP[,POOL]]]`` -> cells; what is left out is as the backbone recommends, pool 1.

    Raises:
        ValueError: a text cannot be read, or the backbone has no such tap.
    """
    cells = []
    for text in texts:
        name, *rest = text.split(",")
        if len(rest) > 3 or not all(number.isdigit() for number in rest[1:]):
            raise ValueError(f"cannot read {text!r}: write BACKBONE[,TAP[,TIMESTEP[,POOL]]], as tiny,up.1,50,2")
        recommended = backbones[name].recommended
        tap = rest[0] if rest and rest[0] else recommended.taps[0]
        backbones[name].tap(tap)
        timestep = int(rest[1]) if len(rest) > 1 else recommended.conditions.timestep
        cells.append(Cell(name, timestep, tap, int(rest[2]) if len(rest) > 2 else 1))
    if len(set(cells)) < len(cells):
        raise ValueError(f"a cell is named twice: {' '.join(texts)}")
    return cells


def readings_of(cells: Sequence[Cell], extract: ExtractConfig) -> list[ReadPlan]:
    """One plan per backbone that covers its cells."""
    return [ReadPlan.covering(name, cells, extract) for name in dict.fromkeys(cell.backbone for cell in cells)]


Group: TypeAlias = tuple[Tensor, list[Placement], list[int]]  # canvases (B, 3, H, W) uint8 of one size, and their rows


def group_canvases(fitted: Iterable[tuple[int, Tensor, Placement]]) -> list[Group]:
    """Rows with what `fit_image` made of their images, those on canvases of one size together."""
    groups: dict[tuple[int, int], list[tuple[Tensor, Placement, int]]] = {}
    for row, canvas, placement in fitted:
        groups.setdefault(placement.canvas_size, []).append((canvas, placement, row))
    return [
        (torch.stack([c for c, _, _ in group]), [p for _, p, _ in group], [r for _, _, r in group])
        for group in groups.values()
    ]


@torch.no_grad()
def read_cells(
    backbone: Backbone, groups: Sequence[Group], count: int, plan: ReadPlan, timesteps: Sequence[int]
) -> Iterator[tuple[int, dict[Cell, Tensor]]]:
    """Read images on canvases.

    Args:
        groups: of `group_canvases`.
        count: of rows.
        plan: resolved.
        timesteps: of these.

    Yields:
        Timestep, and cell -> (count, C * pool * pool) float32, in the order (C, row, column); what lies on padding is
        left out. Rows that no group has are NaN.
    """
    diffusion, batch_size = backbone if isinstance(backbone, DiffusionBackbone) else None, plan.extract.batch_size
    encoded, taps = [], plan.taps or ()
    for canvases, _, _ in groups:
        pixels = stack_pixels(canvases.unbind())
        if diffusion is not None:
            diffusion.check_canvas(pixels.shape)
        encoded.append((pixels, None) if diffusion is None else diffusion.encode(pixels, batch_size=batch_size))
    for timestep in timesteps:
        conditions = replace(plan.extract, timestep=timestep).conditions()
        cells = [cell for cell in plan.cells() if cell.timestep == timestep]
        widths = [backbone.tap(cell.tap).channels * cell.pool**2 for cell in cells]
        values = {cell: torch.full((count, width), torch.nan) for cell, width in zip(cells, widths, strict=True)}
        for (_, placements, rows), (mean, std) in zip(groups, encoded, strict=True):
            if diffusion is None:
                maps = backbone.maps(mean, taps, conditions, batch_size=batch_size)
            else:
                maps = _noised_maps(diffusion, mean, std, taps, conditions, batch_size)
            grids = {tap: backbone.grid(tap, placements[0].canvas_size, m.shape[-2:]) for tap, m in maps.items()}
            whole = FeatureMaps({tap: m.float().cpu() for tap, m in maps.items()}, tuple(placements), grids)
            for cell in cells:
                values[cell][rows] = pool_content(whole, cell.tap, cell.pool)
        yield timestep, values


def _noised_maps(
    backbone: DiffusionBackbone,
    mean: Tensor,
    std: Tensor | None,
    taps: Sequence[str],
    conditions: Conditions,
    batch_size: int,
) -> dict[str, Tensor]:
    """The maps of encoded images, float32; one draw after the other, so that only their sum is held."""
    totals: dict[str, Tensor] = {}
    for draw in range(conditions.ensemble):
        noisy = noisy_input(backbone, mean, std, conditions, draw)
        parts = [backbone.network_maps(chunk, taps, conditions) for chunk in noisy.split(batch_size)]
        for tap in taps:
            value = torch.cat([part[tap] for part in parts]).float()
            totals[tap] = totals[tap] + value if draw else value
    return {tap: total / conditions.ensemble for tap, total in totals.items()}


def noisy_input(
    backbone: DiffusionBackbone, mean: Tensor, std: Tensor | None, conditions: Conditions, draw: int = 0
) -> Tensor:
    """The network's input for one draw, from encoded images; the numbers of `DiffusionBackbone.maps`."""
    shape, seed, clean = mean.shape[1:], conditions.seed, conditions.clean or conditions.timestep < 0
    spread = None
    if std is not None and conditions.posterior == "sample":
        spread = std * draw_noise(shape, seed, draw, stream=1).to(std)
    noise = None if clean else draw_noise(shape, seed, draw)
    return backbone.noisy(mean, spread, noise, max(conditions.timestep, 0))


def pool_content(maps: FeatureMaps, tap: str, pool: int) -> Tensor:
    """(B, C * pool * pool): the average-pooled part of each map that shows the image."""
    values = maps.maps[tap]
    pooled = values.new_empty(len(maps), values.shape[1], pool, pool)
    by_place: dict[Placement, list[int]] = {}
    for i, placement in enumerate(maps.placements):
        by_place.setdefault(placement, []).append(i)
    for rows in by_place.values():
        mask = maps.content_mask(tap, rows[0])
        down, across = (mask.any(1 - axis).nonzero()[:, 0].tolist() for axis in (0, 1))
        part = values[rows]
        if down and across:  # else the image is thinner than a cell
            part = part[..., down[0] : down[-1] + 1, across[0] : across[-1] + 1]
        pooled[rows] = F.adaptive_avg_pool2d(part, pool)
    return pooled.flatten(1)


@dataclass(frozen=True)
class PooledFeatures:
    """Features of N images at all cells of a plan; rows are those of the list of images.

    Attributes:
        features: provenance: backbone, hash of its weights, and every extraction setting.
        images_sha256: hash of the images' names and contents, see `diffrep.heads.probes.labelled.images_sha256`.
    """

    folder: Path
    reading: ReadPlan
    features: dict[str, Any]
    images: int
    dtype: Literal["float16", "float32"]
    images_sha256: str

    @property
    def shards(self) -> list[range]:
        """The rows of each shard."""
        return [range(i, min(i + SHARD_IMAGES, self.images)) for i in range(0, self.images, SHARD_IMAGES)]

    def file(self, timestep: int, shard: int) -> Path:
        """Where the features of a shard at a timestep lie."""
        return self.folder / f"t{timestep:04d}" / f"{shard:06d}.safetensors"

    def missing(self, shard: int) -> list[int]:
        """The timesteps at which a shard has not been read."""
        return [t for t in self.reading.timesteps or () if not self.file(t, shard).is_file()]

    def rows(self, cell: Cell) -> FeatureRows:
        """The memory-mapped matrix (N, D) of a cell.

        Raises:
            ValueError: the cell is not among those that were read.
        """
        if cell not in self.reading.cells():
            raise ValueError(f"{self.folder} holds no features of {cell}")
        files = [self.file(cell.timestep, number) for number in range(len(self.shards))]
        return FeatureRows([map_tensor(file, _tensor(cell)) for file in files])

    @cached_property
    def readable(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """(N,) bool: the images that could be read."""
        (pieces,) = self.rows(self.reading.cells()[0]).columns
        return np.concatenate([~np.isnan(piece[:, 0]) for piece in pieces])

    def unreadable(self) -> list[str]:
        """Why images could not be read, one line each."""
        log = self.folder / "unreadable.txt"
        return sorted(set(log.read_text(encoding="utf-8", errors="replace").splitlines())) if log.exists() else []


def _tensor(cell: Cell) -> str:
    return f"{cell.tap}/{cell.pool}"


def read_features(
    images: Sequence[Readable],
    backbone: Backbone,
    reading: ReadPlan,
    folder: str | Path,
    *,
    dtype: Literal["float16", "float32"] = "float16",
    workers: int = 0,
    progress: bool = True,
) -> PooledFeatures:
    """Read what a folder lacks of the features of some images.

    Args:
        images: their order is that of the rows.
        folder: below which each combination of backbone, settings and images has its own folder.
        workers: processes that decode ahead; 0: none beside this one.

    Raises:
        DataError: no image can be read.
        ValueError: the folder was made otherwise, or the features do not fit into float16.
    """
    reading = reading.resolve(backbone)
    features = {k: v for k, v in provenance(backbone, reading.extract).items() if k not in _PLANNED}
    about: dict[str, Any] = {
        # neither where the weights lie nor the size of a batch changes a number
        "features": {k: v for k, v in features.items() if k not in ("source", "batch_size")},
        "taps": list(reading.taps or ()),
        "pools": list(reading.pools),
        "images": len(images),
        "images_sha256": images_sha256(images),
        "dtype": dtype,
    }
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:12]
    home = Path(folder) / f"{Path(reading.backbone).name}-{digest}"
    cached = PooledFeatures(home, reading, features, len(images), dtype, about["images_sha256"])
    if (wider := _wider(cached, about)) is not None:
        return wider
    claim_folder(home, about, name=MANIFEST)
    jobs = {number: missing for number in range(len(cached.shards)) if (missing := cached.missing(number))}
    if jobs:
        for timestep in reading.timesteps or ():
            sweep_partials(cached.file(timestep, 0).parent)
        _read_shards(images, backbone, cached, jobs, workers, progress)
    if not cached.readable.any():
        reasons = cached.unreadable()
        raise DataError(f"none of the {len(images)} images can be read: {reasons[0] if reasons else home}")
    return cached


def _wider(cached: PooledFeatures, about: Mapping[str, Any]) -> PooledFeatures | None:
    """A complete folder that was read for more taps or pools, such as a sweep's, where there is one."""
    same = ("features", "images", "images_sha256", "dtype")
    for manifest in sorted(cached.folder.parent.glob(f"*/{MANIFEST}")):
        other = replace(cached, folder=manifest.parent)
        try:
            existing = read_document(manifest)
            covered = all(set(about[key]) <= set(existing[key]) for key in ("taps", "pools"))
        except (ValueError, KeyError, TypeError):  # damaged, or made by an older version: of no use here
            continue
        covered = covered and all(existing.get(key) == about[key] for key in same)
        if covered and not any(map(other.missing, range(len(other.shards)))):
            return other
    return None


@dataclass
class _Shards(Dataset[Any]):
    """The decoded images of some shards: (number of the shard, canvases by size, reasons)."""

    images: Sequence[Readable]
    shards: Sequence[tuple[int, range]]
    sizing: Sizing

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, index: int) -> tuple[int, list[Group], list[str]]:
        number, rows = self.shards[index]
        fitted, reasons = [], []
        for row, image in enumerate(self.images[rows.start : rows.stop]):
            try:
                fitted.append((row, *fit_image(decode_image(image.read(), image.name), self.sizing)))
            except ImageError as error:
                reasons.append(str(error))
        return number, group_canvases(fitted), reasons


def _read_shards(
    images: Sequence[Readable],
    backbone: Backbone,
    cached: PooledFeatures,
    jobs: Mapping[int, list[int]],
    workers: int,
    progress: bool,
) -> None:
    sizing, kind = cached.reading.extract.sizing, getattr(torch, cached.dtype)
    assert sizing is not None  # resolved
    shards = _Shards(images, [(number, cached.shards[number]) for number in jobs], sizing)
    spawn = "spawn" if workers else None
    loader = DataLoader(
        shards, batch_size=None, num_workers=workers, multiprocessing_context=spawn, worker_init_fn=end_with_parent
    )
    total = sum(len(cached.shards[number]) * len(timesteps) for number, timesteps in jobs.items())
    with tqdm(total=total, desc=f"reading {cached.reading.backbone}", unit="pass", disable=not progress) as bar:
        for number, groups, reasons in loader:
            if reasons:
                with (cached.folder / "unreadable.txt").open("a", encoding="utf-8", errors="replace") as log:
                    log.writelines(f"{reason}\n" for reason in reasons)
            count, read = len(cached.shards[number]), [row for _, _, rows in groups for row in rows]
            for timestep, values in read_cells(backbone, groups, count, cached.reading, jobs[number]):
                rounded = {cell: vectors.to(kind) for cell, vectors in values.items()}
                for cell, vectors in rounded.items():
                    if not bool(torch.isfinite(vectors[read]).all()):
                        raise ValueError(f"features of {cell.tap} do not fit into {cached.dtype}: choose float32")
                columns = {_tensor(cell): [vectors] for cell, vectors in rounded.items()}
                write_whole(cached.file(timestep, number), partial(write_tensors, tensors=columns))
                bar.update(count)
