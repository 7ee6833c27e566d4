"""Where embeddings come from: an encoder over an image, files, what lies between two grids, variations of one.

Everything downstream sees an `EmbeddingGrid` only. `diffrep.synthesis.prior` makes grids from labels and texts.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from diffrep.backbones import BackboneError, VisionTransformer, draw_noise, load_backbone
from diffrep.backbones.repositories import without_fetching
from diffrep.devices import resolve_device
from diffrep.images import ImageLike, load_image
from diffrep.synthesis.grids import EmbeddingGrid, GridError, slerp

if TYPE_CHECKING:
    from diffrep.synthesis.model import SynthesisModel

Pooling = Literal["class", "mean"]


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
        network: Any = backbone.network
        self._norm = network.norm if hasattr(network, "patch_embed") else network.ln_post
        self._project = getattr(network, "proj", None) if pooling == "class" else None
        self.dim = backbone.channels if self._project is None else int(self._project.shape[1])

    @classmethod
    def load(cls, name: str, pooling: str = "class", *, device: str | torch.device = "auto") -> ImageEncoder:
        """By the backbone's name: ``tiny-dino``, a folder, any timm ViT, any open_clip model.

        Raises:
            BackboneError: there is none, or it is no vision transformer.
        """
        backbone = load_backbone(name, device=resolve_device(device), dtype=torch.float32)
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
        found = []
        for chunk in images.split(batch_size):
            if chunk.shape[-2:] != (self.size, self.size):
                chunk = F.interpolate(chunk, size=(self.size, self.size), mode="bicubic", antialias=True).clamp(0, 1)
            tokens = self._norm(self.backbone.tokens(chunk, [tap], batch_size=batch_size)[tap])
            pooled = tokens[:, 0] if self.pooling == "class" else tokens[:, self.backbone.prefix :].mean(1)
            found.append((pooled if self._project is None else pooled @ self._project).float().cpu())
        return torch.cat(found)

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


def load_grid(path: str | os.PathLike[str], *, encoder: str = "") -> EmbeddingGrid:
    """Read a grid from ``.npy``, or from a zarr array (a folder, or ``.zarr``).

    Args:
        encoder: the backbone that made the embeddings, where known.

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
            values = np.load(path, allow_pickle=False)
    except ImportError:
        raise ImportError('grids in zarr need zarr: pip install "diffrep[synthesis]", or give a .npy file') from None
    except Exception as error:  # numpy and zarr raise many kinds for files that are no arrays
        raise GridError(f"{path}: cannot be read as an array ({' '.join(str(error).split())[:160]})") from None
    if not isinstance(values, np.ndarray) or not np.issubdtype(values.dtype, np.floating):
        raise GridError(f"{path}: a grid of embeddings is an array of floating point numbers")
    try:
        return EmbeddingGrid(torch.from_numpy(values.astype(np.float32)), encoder)
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
