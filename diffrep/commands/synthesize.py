"""``diffrep synthesize``: paint a large image that looks like a reference."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from PIL import Image

from diffrep.commands.options import PrecisionOptions, numbers
from diffrep.files import check_writable
from diffrep.painting import synthesis_facts
from diffrep.searched import Candidate, as_candidate
from diffrep.synthesis import EmbeddingGrid, SynthesisModel, SynthesisSettings, load_synthesis, synthesize_file
from diffrep.synthesis.canvas import Lines, Run
from diffrep.synthesis.composition import as_lines, compose_canvas, place_object
from diffrep.synthesis.grids import ImageEncoder, interpolate_grids, load_grid, vary_grid
from diffrep.synthesis.large import (
    SUFFIXES,
    FileSettings,
    check_canvas,
    check_output,
    check_room,
    grid_shape,
    grid_size,
    latent_size,
    paint,
    write_pixels,
)
from diffrep.synthesis.prior import load_prior
from diffrep.synthesis.sampler import share_of_operations

COMPOSED = ("steps", "guidance", "seed", "batch_size", "decode_stride", "decode_weights", "decode_sigma", "quantize")


@dataclass(frozen=True, kw_only=True)
class Synthesize(PrecisionOptions):
    """Paint an image of any size under the embeddings of a reference image, or of a grid of embeddings.

    For example: diffrep synthesize --reference city.png --size 4096x4096 -o city.tiff

    Memory does not grow with the image. When it is interrupted, the same command goes on where it was. TIFF and
    OME-TIFF files have a pyramid that slide viewers read.
    """

    FIRST = "reference grid text size output model sampling.steps sampling.guidance sampling.seed cells"

    reference: Path | None = None  # an image: its cells' embeddings say what is painted where
    grid: Path | None = None  # instead: embeddings as .npy or zarr, (rows, columns, dim)
    text: str | None = None  # instead: a text, or a label, whose embeddings `--prior` draws
    prior: str = "tiny-prior"  # what draws embeddings from texts or labels; or a folder
    towards: Path | None = None  # a second reference; `--blend` says how far to go to it
    blend: float = 0.5  # 0: the first, 1: the second
    vary: float = 0.0  # degrees by which every embedding is turned in a random direction
    size: str | None = None  # HEIGHTxWIDTH in pixels, or one number; as the reference where left out
    cells: str | None = None  # ROWSxCOLUMNS into which the reference is cut; as many windows as fit where left out
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("synthesis.png")  # .png, .tiff, .ome.tiff, .zarr
    model: str = "tiny-synthesis"  # or a folder
    encoder: str | None = None  # of the reference; the one that the model was trained with where left out
    sampler: str | None = None  # any that `diffrep sample` takes and that needs no whole images; same as --scheduler
    schedule: Path | None = None  # what `diffrep search-schedule` wrote: timesteps, orders, skipped units
    # paint what both references say at every place instead of what lies between them: avg; and: where both are as
    # likely; or: where one is likelier (SuperDiff). In memory, with a sampler of its own
    compose: Literal["avg", "and", "or"] | None = None
    insert: Path | None = None  # instead: a cut-out of an object that stays as it is in the painted scene (COW)
    insert_at: str = "0,0"  # x,y of its top left corner, pixels
    work: Path | None = None  # folder for what is unfinished; beside the output where left out
    quiet: bool = False  # no progress on stderr
    sampling: Annotated[SynthesisSettings, tyro.conf.OmitArgPrefixes] = field(default_factory=SynthesisSettings)
    file: Annotated[FileSettings, tyro.conf.OmitArgPrefixes] = field(default_factory=FileSettings)

    def run(self) -> None:
        check_writable(self.output, SUFFIXES)
        if sum(source is not None for source in (self.reference, self.grid, self.text)) != 1:
            raise ValueError("say what to paint: one of --reference IMAGE, --grid FILE and --text TEXT")
        self._check_composition()
        size = None if self.size is None else parse_size(self.size, "size")
        if size is not None:
            check_output(self.output, size)
        settings = self._settings(searched := as_candidate(self.schedule))
        model = load_synthesis(self.model, **self.placed())
        if searched is not None:
            searched.for_model(model.name, lambda: synthesis_facts(model))
        share = share_of_operations(model, settings)
        if size is not None:
            check_room(self.output, size, model, settings, self.work)
        grid = self._grid(model)
        size = size or grid_size(model, grid)
        grid = grid.resized(grid_shape(model, size))
        check_canvas(model, grid, size, settings)
        if self.compose is not None or self.insert is not None:
            lines = self._composed(model, grid, size)
            pixels = paint(model, grid, size, settings, Run(None, {}), latents=lines, progress=not self.quiet)
            write_pixels(self.output, pixels, self.file)
        else:
            synthesize_file(
                model, grid, self.output, size, settings, file=self.file, work=self.work, progress=not self.quiet
            )
        print(f"wrote {self.output}: {size[0]} x {size[1]} pixels from {grid.shape[0]} x {grid.shape[1]} embeddings")
        if share != 1:
            print(f"the network ran {100 * share:.0f} % of the operations that all steps of the whole one take")

    def _check_composition(self) -> None:
        """Refuse options of a composition that do not go together, before any work.

        Raises:
            ValueError: naming them.
        """
        if self.compose is not None and (self.towards is None or self.insert is not None or "blend" in self.typed):
            raise ValueError("--compose needs --towards, a second reference, and goes without --blend and --insert")
        if "insert_at" in self.typed and self.insert is None:
            raise ValueError("--insert-at says where --insert goes, which is not asked for")
        if self.compose is None and self.insert is None:
            return
        other = {f"sampling.{name}" for name in vars(self.sampling)} - {f"sampling.{name}" for name in COMPOSED}
        if unused := sorted(self.typed & (other | {"sampler", "schedule", "work"})):
            names = ", ".join(f"--{name.removeprefix('sampling.').replace('_', '-')}" for name in unused)
            raise ValueError(f"--compose and --insert paint with a sampler of their own, which takes no {names}")

    def _composed(self, model: SynthesisModel, grid: EmbeddingGrid, size: tuple[int, int]) -> Lines:
        """Latents of the canvas under two grids, or around an object."""
        s, latent = self.sampling, latent_size(model, size)
        options: dict[str, Any] = {"guidance": s.guidance, "seed": s.seed, "batch_size": s.batch_size}
        if "sampling.steps" in self.typed:
            options["steps"] = s.steps
        if self.compose is not None:
            other = self._embed(model, self.towards).resized(grid.shape)
            return as_lines(compose_canvas(model, grid, other, latent, method=self.compose, **options)[0])
        assert self.insert is not None
        with Image.open(self.insert) as opened:
            cut = opened.convert("RGBA")
        x, y = (round(v / model.factor) for v in numbers(self.insert_at, "point"))
        width, height = (side // model.factor * model.factor for side in cut.size)
        if min(width, height) < (least := model.window * model.factor):
            raise ValueError(f"{self.insert}: an object needs {least} pixels a side, got {cut.width} x {cut.height}")
        pixels = torch.from_numpy(np.array(cut)[:height, :width]).permute(2, 0, 1).float() / 255
        one = replace(self, cells="1")._embed(model, self.insert).embeddings[0, 0]
        return as_lines(place_object(model, grid, pixels[None, :3], pixels[3], one, (y, x), latent, **options))

    def _settings(self, searched: Candidate | None) -> SynthesisSettings:
        """Those of the options, with the sampler and the steps of a search."""
        settings = self.sampling
        if self.sampler is not None:
            if "sampling.scheduler" in self.typed and self.sampler != settings.scheduler:
                raise ValueError(f"--sampler and --scheduler are one option, got {self.sampler}, {settings.scheduler}")
            settings = replace(settings, scheduler=self.sampler)
        if searched is not None:
            if clash := sorted(
                self.typed & {f"sampling.{name}" for name in ("steps", "timesteps", "orders", "skipped")}
            ):
                raise ValueError(f"--schedule says what --{clash[0].removeprefix('sampling.')} would; give one of them")
            units = tuple(",".join(map(str, row)) for row in searched.skipped)
            timesteps = tuple(int(t) for t in searched.timesteps)
            settings = replace(settings, timesteps=timesteps, orders=searched.orders, skipped=units)
        return settings

    def _grid(self, model: SynthesisModel) -> EmbeddingGrid:
        if self.grid is not None:
            grid = load_grid(self.grid)
        elif self.text is not None:
            grid = self._draw(model, self.text)
        else:
            grid = self._embed(model, self.reference)
        if self.towards is not None and self.compose is None:
            grid = interpolate_grids(grid, self._embed(model, self.towards), self.blend)
        return vary_grid(grid, self.vary, seed=self.sampling.seed) if self.vary else grid

    def _draw(self, model: SynthesisModel, text: str) -> EmbeddingGrid:
        prior = load_prior(self.prior)
        drawn, painted = prior.config.encoder, model.about.encoder
        if drawn and painted and drawn != painted:
            raise ValueError(f"{self.prior} draws embeddings of {drawn}, {self.model} paints those of {painted}")
        shape = None if self.cells is None else parse_size(self.cells, "cells")
        if shape is None and self.size is not None:
            shape = grid_shape(model, parse_size(self.size, "size"))
        return prior.sample([text], shape=shape, seed=self.sampling.seed)[0]

    def _embed(self, model: SynthesisModel, image: Path | None) -> EmbeddingGrid:
        assert image is not None
        if self.encoder is None:
            encoder = ImageEncoder.of_model(model, device=self.device)
        else:
            encoder = ImageEncoder.load(self.encoder, model.about.pooling, device=self.device)
        shape = None if self.cells is None else parse_size(self.cells, "cells")
        return encoder.grid(image, shape, patch=model.window * model.factor)


def parse_size(text: str, name: str) -> tuple[int, int]:
    """``4096x2048`` or ``4096`` -> (height, width).

    Raises:
        ValueError: it is something else.

    >>> parse_size("4096x2048", "size")
    (4096, 2048)
    """
    sides = text.lower().split("x")
    if not 1 <= len(sides) <= 2 or not all(side.isdigit() and int(side) > 0 for side in sides):
        raise ValueError(f"cannot read the {name} {text!r}: write two whole numbers, for example 4096x2048")
    return int(sides[0]), int(sides[-1])
