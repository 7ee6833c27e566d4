"""Where features are read: cells of backbone x timestep x tap x pool, and the pass that reads many of them at once.

One forward pass at a timestep gives every tap; an image is decoded, and encoded by the VAE, once for all timesteps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from diffrep.backbones import Backbone, Conditions, draw_noise
from diffrep.backbones.diffusion import LatentBackbone
from diffrep.features import ExtractConfig, FeatureMaps
from diffrep.heads.probes.feedback import numbered_taps
from diffrep.images import Placement, stack_pixels


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

    def resolve(self, backbone: Backbone) -> ReadPlan:
        """Fill what is None, and check the rest.

        Raises:
            TapError: the backbone has no such tap.
            ValueError: a timestep or a pool is out of range, or nothing is to be read.
        """
        taps = self.taps or block_taps(backbone)
        noiseless = not hasattr(backbone, "alphas_cumprod")
        timesteps = self.timesteps or (backbone.recommended.conditions.timestep,)
        if noiseless and self.timesteps not in (None, (0,)):
            raise ValueError(f"{backbone.name} has no timesteps, got {', '.join(map(str, timesteps))}")
        for timestep in timesteps:
            Conditions(timestep=timestep)
        if not self.pools or min(self.pools) < 1:
            raise ValueError(f"pools must be at least 1, got {', '.join(map(str, self.pools)) or 'none'}")
        extract = replace(self.extract, taps=tuple(taps), timestep=timesteps[0]).resolve(backbone)
        if extract.window is not None or extract.freeu is not None:
            raise ValueError("probes read whole images: window and freeu are not for them")
        return replace(
            self, taps=tuple(dict.fromkeys(taps)), timesteps=tuple(dict.fromkeys(timesteps)), extract=extract
        )

    def cells(self) -> list[Cell]:
        """All cells in order of taps, timesteps, pools; call `resolve` first."""
        return [
            Cell(self.backbone, timestep, tap, pool)
            for tap in self.taps or ()
            for timestep in self.timesteps or ()
            for pool in self.pools
        ]


def block_taps(backbone: Backbone) -> tuple[str, ...]:
    """One tap per block, in order: the numbered blocks of a U-Net, the layers of a transformer."""
    if hasattr(backbone.network, "mid_block"):
        return tuple(tap.name for tap in numbered_taps(backbone).values())  # type: ignore[arg-type]  # it is a U-Net
    plain = [tap.name for tap in backbone.taps() if tap.name.count(".") == 1 and tap.name.split(".")[1].isdigit()]
    return tuple(plain) or (backbone.taps()[-1].name,)


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
    """One reading per backbone that covers its cells."""
    plans = []
    for name in dict.fromkeys(cell.backbone for cell in cells):
        chosen = [cell for cell in cells if cell.backbone == name]
        taps = tuple(dict.fromkeys(cell.tap for cell in chosen))
        timesteps = tuple(dict.fromkeys(cell.timestep for cell in chosen))
        pools = tuple(dict.fromkeys(cell.pool for cell in chosen))
        plans.append(ReadPlan(name, taps, timesteps, pools, extract))
    return plans


def read_cells(
    backbone: Backbone, canvases: Tensor, placements: Sequence[Placement], reading: ReadPlan, timesteps: Sequence[int]
) -> Iterator[tuple[int, dict[tuple[str, int], Tensor]]]:
    """Read images that lie on one size of canvas.

    Args:
        canvases: (B, 3, H, W) uint8.
        reading: resolved.
        timesteps: of these.

    Yields:
        Timestep, and (tap, pool) -> (B, C * pool * pool) float32, in the order (C, row, column). What lies on
        padding is left out.
    """
    taps = reading.taps or ()
    for timestep, maps in _maps(backbone, stack_pixels(canvases.unbind()), taps, reading.extract, timesteps):
        grids = {tap: backbone.grid(tap, placements[0].canvas_size, m.shape[-2:]) for tap, m in maps.items()}
        whole = FeatureMaps({tap: m.float().cpu() for tap, m in maps.items()}, tuple(placements), grids)
        yield timestep, {(tap, pool): pool_content(whole, tap, pool) for tap in taps for pool in reading.pools}


@torch.no_grad()
def _maps(
    backbone: Backbone, pixels: Tensor, taps: Sequence[str], extract: ExtractConfig, timesteps: Sequence[int]
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    if not isinstance(backbone, LatentBackbone):
        for timestep in timesteps:
            conditions = replace(extract, timestep=timestep).conditions()
            yield timestep, backbone.maps(pixels, taps, conditions, batch_size=extract.batch_size)
        return
    mean, std = backbone.encode(pixels, batch_size=extract.batch_size)
    for timestep in timesteps:
        conditions = replace(extract, timestep=timestep).conditions()
        sums: dict[str, Tensor] = {}
        for draw in range(conditions.ensemble):
            parts = []
            for start in range(0, len(mean), extract.batch_size):
                rows = slice(start, start + extract.batch_size)
                noisy = noisy_input(backbone, mean[rows], std[rows], conditions, draw)
                parts.append(backbone.network_maps(noisy, taps, conditions))
            for tap in taps:
                value = torch.cat([part[tap] for part in parts]).float()
                sums[tap] = sums[tap] + value if tap in sums else value
        yield timestep, {tap: value / conditions.ensemble for tap, value in sums.items()}


def noisy_input(backbone: LatentBackbone, mean: Tensor, std: Tensor, conditions: Conditions, draw: int = 0) -> Tensor:
    """What a latent network is given for one draw, from encoded images; the numbers of `LatentBackbone.maps`."""
    shape = mean.shape[1:]
    spread = None
    if conditions.posterior == "sample":
        spread = std * draw_noise(shape, conditions.seed, draw, stream=1).to(std)
    clean = conditions.clean or conditions.timestep < 0
    noise = None if clean else draw_noise(shape, conditions.seed, draw)
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
