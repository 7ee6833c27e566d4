"""Grids of embeddings: from an encoder over an image, from files, between two grids or around one.

Everything downstream sees an `EmbeddingGrid` only. `diffrep.synthesis.prior` makes grids from labels and texts.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from diffrep.backbones import BackboneError, VisionTransformer, draw_noise, load_backbone
from diffrep.backbones.repositories import without_fetching
from diffrep.files import one_line
from diffrep.images import ImageLike, load_image
from diffrep.results import read_array

if TYPE_CHECKING:
    from diffrep.synthesis.model import SynthesisModel

Pooling = Literal["class", "mean"]
NEARLY_PARALLEL = 0.9995  # |cosine| above which the official code interpolates linearly


class GridError(ValueError):
    """A grid of embeddings that cannot be used; the message says where."""


@dataclass(frozen=True)
class EmbeddingGrid:
    """What a large image shall look like, cell by cell.

    Attributes:
        embeddings: (R, C, D) float32, raw, not normalised. Cell (r, c) describes the square of one window whose top
            left corner is at (r, c) windows.
        encoder: the backbone that made them; "" where that is not known.
    """

    embeddings: Tensor
    encoder: str = ""

    def __post_init__(self) -> None:
        values = torch.as_tensor(self.embeddings)
        if values.ndim != 3 or 0 in values.shape:
            raise GridError(f"a grid of embeddings must be (rows, columns, dim), got {tuple(values.shape)}")
        values = values.detach().float().cpu()
        faults = {"NaN or infinite values": ~values.isfinite().all(-1), "length 0": values.norm(dim=-1) == 0}
        for what, bad in faults.items():
            if bool(bad.any()):
                row, column = bad.nonzero()[0].tolist()
                raise GridError(f"the embedding of cell ({row}, {column}) has {what}")
        object.__setattr__(self, "embeddings", values.contiguous())

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        return int(self.embeddings.shape[0]), int(self.embeddings.shape[1])

    @property
    def dim(self) -> int:
        return int(self.embeddings.shape[2])

    def checksum(self) -> str:
        """16 hexadecimal digits."""
        return hashlib.sha256(self.embeddings.numpy().tobytes()).hexdigest()[:16]

    def at(self, offsets: Tensor, cell: int | Sequence[int]) -> Tensor:
        """Embeddings of windows anywhere on the canvas.

        The four cells around a corner are interpolated spherically, first along the row, then down (official code);
        beyond the last row and column the border is repeated.

        Args:
            offsets: (N, 2), row and column of each window's top left corner, in any unit.
            cell: the side of a cell in that unit, or its (height, width).

        Returns:
            (N, D).
        """
        (upper, lower), (down, across) = self._around(offsets, cell)
        return slerp(down, slerp(across, *upper), slerp(across, *lower))

    def agreement(self, offsets: Tensor, cell: int | Sequence[int]) -> Tensor:
        """The smallest cosine between the embeddings of two cells that a window touches; see `at`.

        Returns:
            (N,); 1 for a window that touches a single cell.
        """
        (upper, lower), parts = self._around(offsets, cell)
        down, across = (part > 0 for part in parts)
        cells = F.normalize(torch.stack([*upper, *lower], dim=1), dim=2)
        touched = torch.stack([torch.ones_like(down), across, down, down & across], dim=1)
        cells = torch.where(touched[:, :, None], cells, cells[:, :1])
        # not as a product of matrices, whose rounding may depend on how many windows there are
        return (cells[:, :, None] * cells[:, None]).sum(3).flatten(1).amin(1)

    def _around(self, offsets: Tensor, cell: int | Sequence[int]) -> tuple[list[list[Tensor]], tuple[Tensor, Tensor]]:
        """The four cells around each corner, upper and lower, left and right, and how far down and across it lies."""
        rows, columns = self.shape
        height, width = (cell, cell) if isinstance(cell, int) else cell
        place = offsets.double() / torch.tensor([height, width], dtype=torch.float64)
        corner = place.floor().long()
        r0, c0 = corner[:, 0].clamp(0, rows - 1), corner[:, 1].clamp(0, columns - 1)
        r1, c1 = (r0 + 1).clamp(max=rows - 1), (c0 + 1).clamp(max=columns - 1)
        down, across = (place - corner).clamp(0, 1).float().unbind(1)
        return [[self.embeddings[r, c0], self.embeddings[r, c1]] for r in (r0, r1)], (down, across)

    def resized(self, shape: tuple[int, int]) -> EmbeddingGrid:
        """The grid brought to (rows, columns): cell centres are laid over each other, values between interpolated."""
        rows, columns = shape
        if rows < 1 or columns < 1:
            raise GridError(f"a grid needs at least one row and one column, got {shape}")
        if shape == self.shape:
            return self
        pairs = zip(shape, self.shape, strict=True)
        places = [((torch.arange(new) + 0.5) * old / new - 0.5).clamp(0, old - 1) for new, old in pairs]
        corners = torch.cartesian_prod(*places)
        return EmbeddingGrid(self.at(corners, 1).reshape(rows, columns, -1), self.encoder)


def slerp(t: Tensor | float, a: Tensor, b: Tensor) -> Tensor:
    """Spherical interpolation of raw vectors, (..., D).

    The coefficients come from the angle between the vectors, whose lengths stay in; nearly parallel and opposite
    pairs are interpolated linearly (official code).

    Args:
        t: () or (...,), 0 gives a, 1 gives b.
    """
    t = torch.as_tensor(t, dtype=a.dtype, device=a.device)[..., None]
    cosine = ((a * b).sum(-1, keepdim=True)) / (a.norm(dim=-1, keepdim=True) * b.norm(dim=-1, keepdim=True))
    linear = cosine.abs() > NEARLY_PARALLEL
    angle = torch.arccos(torch.where(linear, torch.zeros_like(cosine), cosine))
    spherical = (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)
    return torch.where(linear, (1 - t) * a + t * b, spherical)


class ImageEncoder:
    """One embedding per image, by a frozen vision transformer.

    Args:
        backbone: its last block is read, behind the network's final norm.
        pooling: "class" takes the class token (through the projection, where open_clip's towers have one), "mean"
            the mean of the patches.

    Raises:
        ValueError: another pooling, or "class" where the network has no class token.
    """

    def __init__(self, backbone: VisionTransformer, pooling: str = "class") -> None:
        if pooling not in ("class", "mean"):
            raise ValueError(f"pooling is class or mean, not {pooling!r}")
        if pooling == "class" and backbone.prefix == 0:
            raise ValueError(f"{backbone.name} has no class token: use pooling 'mean'")
        self.backbone, self.pooling = backbone, pooling
        self.name = backbone.name
        self._norm = backbone.final_norm
        self._project: Any = getattr(backbone.network, "proj", None) if pooling == "class" else None
        self.dim = backbone.channels if self._project is None else int(self._project.shape[1])

    @classmethod
    def load(cls, name: str, pooling: str = "class", *, device: str | torch.device = "auto") -> ImageEncoder:
        """By the backbone's name: ``tiny-dino``, a folder, any ViT of timm or transformers, any open_clip model.

        Raises:
            BackboneError: there is none, or it is no vision transformer.
        """
        backbone = load_backbone(name, device=device, dtype=torch.float32)
        if not isinstance(backbone, VisionTransformer):
            kind = type(backbone).__name__
            raise BackboneError(f"{name}: embeddings are made by vision transformers, this is a {kind}")
        return cls(backbone, pooling)

    @classmethod
    def of_model(cls, model: SynthesisModel, *, device: str | torch.device = "auto") -> ImageEncoder:
        """The encoder that a model's record names.

        Raises:
            ValueError: it names none, or one that would have to be fetched.
        """
        name = model.about.encoder
        if name is None:
            raise ValueError(f"{model.name} does not say which encoder made its embeddings: name it with --encoder")
        place = without_fetching(name)
        if place is None:
            raise ValueError(
                f"{model.name} names the encoder {name}, which would have to be fetched: nothing is fetched because a"
                f" file says so; to have it fetched say --encoder {name}"
            )
        return cls.load(place, model.about.pooling, device=device)

    @property
    def size(self) -> int:
        """Pixels a side of what the network sees."""
        size = self.backbone.recommended.sizing.size
        assert isinstance(size, int)
        return size

    @torch.no_grad()
    def __call__(self, images: Tensor, *, batch_size: int = 32) -> Tensor:
        """Embed images (B, 3, H, W) in [0, 1], brought to the network's size; (B, D) float32 on the CPU."""
        tap = self.backbone.recommended.taps[-1]
        embeddings = []
        for chunk in images.split(batch_size):
            if chunk.shape[-2:] != (self.size, self.size):
                chunk = F.interpolate(chunk, size=(self.size, self.size), mode="bicubic", antialias=True).clamp(0, 1)
            tokens = self._norm(self.backbone.tokens(chunk, [tap], batch_size=batch_size)[tap])
            pooled = tokens[:, 0] if self.pooling == "class" else tokens[:, self.backbone.prefix :].mean(1)
            embeddings.append((pooled if self._project is None else pooled @ self._project).float().cpu())
        return torch.cat(embeddings)

    def grid(
        self, image: ImageLike, shape: tuple[int, int] | None = None, *, patch: int | None = None
    ) -> EmbeddingGrid:
        """Embed an image cell by cell.

        Args:
            image: see `load_image`.
            shape: (rows, columns): the image is divided into that many cells of equal size. None: cells of `patch`
                pixels, as many as fit; the image is resized by less than half a cell so that they do.
            patch: pixels a side of a cell, where `shape` is None; None: the network's size.

        Raises:
            ImageError: the image cannot be read.
            GridError: it has fewer pixels than cells.
        """
        pixels = torch.from_numpy(np.array(load_image(image))).permute(2, 0, 1).float() / 255
        height, width = pixels.shape[-2:]
        if shape is None:
            side = patch or self.size
            shape = max(1, round(height / side)), max(1, round(width / side))
        rows, columns = shape
        if rows < 1 or columns < 1 or rows > height or columns > width:
            raise GridError(f"an image of {height} x {width} pixels cannot be divided into {rows} x {columns} cells")
        cells = []
        for row in range(rows):  # each row resized on its own: memory is that of one row of cells
            top, bottom = row * height // rows, (row + 1) * height // rows
            band = F.interpolate(
                pixels[None, :, top:bottom], size=(self.size, self.size * columns), mode="bicubic", antialias=True
            )
            cells.append(self(torch.cat(band.clamp(0, 1).split(self.size, dim=-1))))
        return EmbeddingGrid(torch.stack(cells), self.name)


def load_grid(path: str | os.PathLike[str]) -> EmbeddingGrid:
    """Read a grid from ``.npy``, or from a zarr array (a folder, or ``.zarr``).

    Raises:
        GridError: the file is missing, unreadable, or holds no (R, C, D) array of finite numbers.
    """
    path = Path(path)
    if not path.exists():
        raise GridError(f"{path}: there is no such file")
    try:
        if path.is_dir():
            import zarr

            values = np.asarray(zarr.open_array(str(path), mode="r")[:])
        else:
            values = read_array(path)
    except ImportError:
        raise ImportError('grids in zarr need zarr: pip install "diffrep[synthesis]", or give a .npy file') from None
    except Exception as error:  # numpy and zarr raise many kinds for files that are no arrays
        raise GridError(f"{path}: cannot be read as an array ({one_line(error)})") from None
    if not np.issubdtype(values.dtype, np.floating):
        raise GridError(f"{path}: a grid of embeddings is an array of floating point numbers")
    try:
        return EmbeddingGrid(torch.from_numpy(values.astype(np.float32)))
    except GridError as error:
        raise GridError(f"{path}: {error}") from None


def interpolate_grids(a: EmbeddingGrid, b: EmbeddingGrid, t: float) -> EmbeddingGrid:
    """What lies between two grids, cell by cell, on the sphere: t = 0 gives `a`, 1 gives `b`.

    The second grid is brought to the shape of the first.

    Raises:
        GridError: the embeddings have different widths or come from different encoders.
        ValueError: t is not in [0, 1].
    """
    if not 0 <= t <= 1:
        raise ValueError(f"t must be in [0, 1], got {t:g}")
    if a.dim != b.dim:
        raise GridError(f"embeddings of width {a.dim} and {b.dim} cannot be interpolated")
    if a.encoder and b.encoder and a.encoder != b.encoder:
        raise GridError(f"embeddings of {a.encoder} and {b.encoder} cannot be interpolated")
    other = b if a.shape == b.shape else b.resized(a.shape)
    return EmbeddingGrid(slerp(t, a.embeddings, other.embeddings), a.encoder or b.encoder)


def vary_grid(grid: EmbeddingGrid, degrees: float, *, seed: int = 0) -> EmbeddingGrid:
    """Turn every embedding by an angle, in a direction of its own; lengths stay.

    The direction of a cell depends on the seed and its place alone.

    Args:
        degrees: in [0, 90]; 0 gives the grid itself.
    """
    if not 0 <= degrees <= 90:
        raise ValueError(f"degrees must be in [0, 90], got {degrees:g}")
    rows, columns = grid.shape
    places = [row * 2**20 + column for row in range(rows) for column in range(columns)]
    noise = torch.cat([draw_noise((grid.dim,), seed, place, stream=3) for place in places]).view(grid.embeddings.shape)
    length = grid.embeddings.norm(dim=-1, keepdim=True)
    unit = grid.embeddings / length
    aside = F.normalize(noise - (noise * unit).sum(-1, keepdim=True) * unit, dim=-1)
    angle = math.radians(degrees)
    return EmbeddingGrid(length * (math.cos(angle) * unit + math.sin(angle) * aside), grid.encoder)
