"""``diffrep eval synthesis``: patches and large images painted from the embeddings of held-out scenes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from diffrep.eval.augmentation import Augmentation, AugmentationSettings, augmentation_experiment, paint_variations
from diffrep.eval.frechet import frechet_distance, load_features
from diffrep.eval.large_images import consistency, seam_ratio
from diffrep.eval.report import Report, Section, plain
from diffrep.scenes import SEEN, render_scene, scene_seed
from diffrep.synthesis import EmbeddingGrid, SynthesisModel, SynthesisSettings, synthesize
from diffrep.synthesis.conditions import ImageEncoder


@dataclass(frozen=True)
class SynthesisEvaluation:
    """What is painted and measured."""

    patches: int = 200  # painted alone, against as many real ones
    images: int = 4  # large ones of each kind: of unrelated cells, and cut from one scene; the seam ratio is their mean
    rows: int = 4  # cells of each
    columns: int = 4  # cells across a painted image
    features: tuple[str, ...] = ("tiny-dino@class",)  # FID's feature spaces; inception:FILE and open_clip models too
    augment: bool = True  # also the augmentation experiment
    augmentation: AugmentationSettings = field(default_factory=AugmentationSettings)
    seed: int = 0  # of the choice of scenes

    def __post_init__(self) -> None:
        if self.patches < 2 or self.images < 1 or min(self.rows, self.columns) < 1 or self.rows * self.columns < 2:
            raise ValueError(
                "patches must be at least 2, images 1, and an image needs 2 cells, got"
                f" {self.patches}, {self.images} and {self.rows} x {self.columns}"
            )


@dataclass(frozen=True)
class Fid:
    """Fréchet distances in one feature space; those of real images to other real ones tell what is zero here."""

    patches: float  # painted patches to real ones
    real: float  # other real patches to the same, as many
    crops: float  # crops of the large images, at random places, to real patches
    crop_count: int


@dataclass(frozen=True)
class LargePictures:
    """The measures of large pictures of one kind, means over them."""

    seams: Mapping[str, float]  # by where the borders lie
    control: float  # the same where no tile begins: an autoencoder's own steps from latent to latent
    own: float  # mean cosine of a painted cell and its condition
    other: float  # and the nearest other condition
    right: float  # share of cells nearest to their own condition

    def section(self, title: str) -> Section:
        """As a table."""
        seams = [(f"seams {name}", f"{v:.3f}", f"{v / self.control:.3f}") for name, v in self.seams.items()]
        return Section(
            title,
            ("", "against the control"),
            [
                *seams,
                ("seams where no tile begins (control)", f"{self.control:.3f}"),
                ("embedded again: cosine with its own", f"{self.own:.3f}"),
                ("with the nearest other condition", f"{self.other:.3f}"),
                ("nearest to its own condition", f"{100 * self.right:.1f} %"),
            ],
        )


@dataclass(frozen=True)
class SynthesisReport(Report):
    """The measures of one model."""

    model: str
    sampling: SynthesisSettings
    settings: SynthesisEvaluation
    fid: Mapping[str, Fid]  # by feature space
    unrelated: LargePictures  # every cell has the embedding of another scene
    whole: LargePictures  # the cells are cut from one scene
    right_patches: float  # share of patches painted alone that are nearest to their own condition
    augmentation: Augmentation | None

    def document(self) -> Mapping[str, object]:
        results = plain(self)
        results.pop("problems")
        return {"benchmark": "synthesis", **results}

    def sections(self) -> Iterator[Section]:
        yield Section(
            f"{self.model}, {self.sampling.scheduler}, {self.sampling.steps} steps; FID",
            ("patches", "real", "crops"),
            [(name, f"{f.patches:.2f}", f"{f.real:.2f}", f"{f.crops:.2f}") for name, f in self.fid.items()],
            [f"  patches nearest to their own condition: {100 * self.right_patches:.1f} %"],
        )
        yield self.unrelated.section(f"{self.settings.images} images of unrelated cells")
        yield self.whole.section(f"{self.settings.images} images of one scene each")
        if self.augmentation is not None:
            setup = self.settings.augmentation
            names = {
                "real": "these alone",
                "augmented": f"with {setup.variations} painted variations each",
                "more_real": f"with {setup.variations} more real scenes each",
                "painted": "the variations alone",
            }
            rows = []
            for key, name in names.items():
                values = 100 * np.array(getattr(self.augmentation, key))
                rows.append((name, f"{values.mean():.1f} %", f"({', '.join(f'{v:.1f}' for v in values)})"))
            title = f"accuracy of a linear probe, {setup.per_class} scenes a category (mean, and every draw of them)"
            yield Section(title, ("",), rows)


def held_out_images(count: int, size: int, *, first: int) -> Iterator[np.ndarray]:
    """Test scenes first, first + 1, ... of the seen categories in turn, (size, size, 3) uint8."""
    for i in range(count):
        yield render_scene(scene_seed("test", first + i), category=SEEN[i % len(SEEN)], size=size).image


def held_out_patches(count: int, size: int, *, first: int) -> Tensor:
    """`held_out_images` as a batch, (count, 3, size, size) in [0, 1]."""
    images = held_out_images(count, size, first=first)
    return torch.stack([torch.from_numpy(image.copy()).permute(2, 0, 1).float() / 255 for image in images])


def random_crops(image: np.ndarray, count: int, size: int, *, seed: int) -> Tensor:
    """Square crops of an (H, W, 3) uint8 image, (count, 3, size, size) in [0, 1]."""
    draws = np.random.default_rng(seed)
    rows, columns = (draws.integers(0, side - size + 1, count) for side in image.shape[:2])
    crops = [image[r : r + size, c : c + size] for r, c in zip(rows, columns, strict=True)]
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float() / 255


def evaluate_synthesis(
    model: SynthesisModel,
    settings: SynthesisEvaluation | None = None,
    sampling: SynthesisSettings | None = None,
    *,
    encoder: ImageEncoder | None = None,
    progress: bool = True,
) -> SynthesisReport:
    """Paint patches and large images from embeddings of held-out scenes and measure them.

    Args:
        encoder: makes the embeddings; the one that the model's record names where left out.

    Raises:
        ValueError: the model's record names no encoder that is here, or the embeddings do not fit the model.
    """
    settings, sampling = settings or SynthesisEvaluation(), sampling or SynthesisSettings()
    if encoder is None:
        encoder = ImageEncoder.of_model(model)
    size, shape = model.window * model.factor, (settings.rows, settings.columns)
    cells = settings.rows * settings.columns
    extractors = {name: load_features(name) for name in settings.features}
    first = settings.seed * 2**20
    shown = held_out_patches(settings.patches, size, first=first)
    others = held_out_patches(settings.patches, size, first=first + 2**18)
    conditions = encoder(shown)
    painted = paint_variations(model, conditions, 1, 0.0, sampling)
    alone = torch.nn.functional.normalize(encoder(painted), dim=1) @ torch.nn.functional.normalize(conditions, dim=1).T
    right_patches = float((alone.argmax(1) == torch.arange(len(alone))).float().mean())

    embeddings = encoder(held_out_patches(settings.images * cells, size, first=first + 2**19))
    mosaics = [EmbeddingGrid(part.unflatten(0, shape), encoder.name) for part in embeddings.split(cells)]
    scenes = held_out_images(settings.images, size * max(shape), first=first + 2**19 + 2**18)
    wholes = [encoder.grid(scene[: size * settings.rows, : size * settings.columns], shape) for scene in scenes]
    bar = tqdm(total=2 * settings.images, desc="images", unit="image", disable=not progress)
    unrelated, images = _large_pictures(model, mosaics, sampling, encoder, bar)
    whole, _ = _large_pictures(model, wholes, sampling, encoder, bar)
    bar.close()
    cropped = torch.cat([random_crops(image, 2 * cells, size, seed=number) for number, image in enumerate(images)])
    fid = {
        name: Fid(
            frechet_distance(others, painted, extractor),
            frechet_distance(others, shown, extractor),
            frechet_distance(others, cropped, extractor),
            len(cropped),
        )
        for name, extractor in extractors.items()
    }
    augmentation = None
    if settings.augment:
        augmentation = augmentation_experiment(
            model, encoder, encoder, settings.augmentation, sampling, progress=progress
        )
    return SynthesisReport(
        model=model.name,
        sampling=sampling,
        settings=settings,
        fid=fid,
        unrelated=unrelated,
        whole=whole,
        right_patches=right_patches,
        augmentation=augmentation,
    )


def _large_pictures(
    model: SynthesisModel,
    grids: Sequence[EmbeddingGrid],
    sampling: SynthesisSettings,
    encoder: ImageEncoder,
    bar: tqdm,
) -> tuple[LargePictures, list[np.ndarray]]:
    """Paint and measure; also the pictures."""
    stride = (sampling.stride or max(model.window // 2, 1)) * model.factor
    decode_stride = (sampling.decode_stride or max(model.window // 2, 1)) * model.factor
    size = model.window * model.factor
    beside = stride // 2 // model.factor * model.factor  # whole latents away: decoders have a period of one latent
    borders = {
        f"every {stride} px: windows": (stride, 0),
        f"every {decode_stride} px: decoding": (decode_stride, 0),
        f"every {size} px: cells": (size, 0),
        "control": (stride, beside),
    }
    ratios: dict[str, list[float]] = {name: [] for name in borders}
    measured, images = [], []
    for grid in grids:
        image = synthesize(model, grid, settings=sampling)
        for name, (period, offset) in borders.items():
            ratios[name].append(seam_ratio(image, period, offset=offset))
        measured.append(consistency(image, grid, encoder))
        images.append(image)
        bar.update(1)
    pictures = LargePictures(
        control=float(np.mean(ratios.pop("control"))),
        seams={name: float(np.mean(values)) for name, values in ratios.items()},
        own=float(np.mean([m.own for m in measured])),
        other=float(np.mean([m.other for m in measured])),
        right=float(np.mean([m.right for m in measured])),
    )
    return pictures, images
