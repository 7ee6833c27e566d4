"""``diffrep eval synthesis``: patches and large images painted from the embeddings of held-out scenes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from diffrep.eval.painted import consistency, frechet_distance, load_features, seam_ratio
from diffrep.eval.report import Report, Section, plain
from diffrep.files import number_of
from diffrep.scenes import SEEN, render_scene, scene_seed
from diffrep.scenes.sets import Split
from diffrep.settings import check
from diffrep.synthesis import EmbeddingGrid, SynthesisModel, SynthesisSettings, sample_patches, synthesize
from diffrep.synthesis.grids import ImageEncoder, vary_grid


@dataclass(frozen=True)
class AugmentationSettings:
    """Do generated variations help a classifier?

    After the augmentation experiments of Graikos, Yellapragada et al. (CVPR 2024): every labelled image is painted
    again under its own, slightly turned, embedding and keeps its label; a classifier is trained with and without them.
    """

    per_class: int = 4  # labelled scenes of each category
    variations: int = 2  # painted for each of them
    degrees: float = 10.0  # by which their embeddings are turned
    test_per_class: int = 12
    repeats: int = 3  # draws of the labelled scenes
    categories: tuple[str, ...] = SEEN

    def __post_init__(self) -> None:
        check(self, per_class="1..", variations="1..", test_per_class="1..", repeats="1..")
        if len(self.categories) < 2:
            raise ValueError("there must be two categories or more")


@dataclass(frozen=True)
class Augmentation:
    """Test accuracies, one for each draw of the labelled scenes."""

    real: tuple[float, ...]  # with the labelled scenes alone
    augmented: tuple[float, ...]  # with their painted variations beside them
    more_real: tuple[float, ...]  # with as many rendered scenes in their place: the most that can be hoped for
    painted: tuple[float, ...]  # with the variations alone


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
        check(self, patches="2..", images="1..", rows="1..", columns="1..")
        if self.rows * self.columns < 2:
            raise ValueError("an image needs 2 cells, rows and columns are 1")


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
    checksum: str  # of its weights
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
        yield self.unrelated.section(f"{number_of(self.settings.images, 'image')} of unrelated cells")
        yield self.whole.section(f"{number_of(self.settings.images, 'image')} of one scene each")
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
            scenes = number_of(setup.per_class, "scene")
            title = f"accuracy of a linear probe, {scenes} a category (mean, and every draw of them)"
            yield Section(title, ("",), rows)


def scene_image(split: Split, number: int, category: str, size: int) -> Tensor:
    """A rendered scene, (3, size, size) in [0, 1]."""
    scene = render_scene(scene_seed(split, number), category=category, size=size)
    return torch.from_numpy(scene.image.copy()).permute(2, 0, 1).float() / 255


def held_out_images(count: int, size: int, *, first: int) -> Tensor:
    """Test scenes first, first + 1, ... of the seen categories in turn, (count, 3, size, size) in [0, 1]."""
    return torch.stack([scene_image("test", first + i, SEEN[i % len(SEEN)], size) for i in range(count)])


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
    shown = held_out_images(settings.patches, size, first=first)
    others = held_out_images(settings.patches, size, first=first + 2**18)
    conditions = encoder(shown)
    painted = paint_variations(model, conditions, 1, 0.0, sampling)
    alone = F.normalize(encoder(painted), dim=1) @ F.normalize(conditions, dim=1).T
    right_patches = float((alone.argmax(1) == torch.arange(len(alone))).float().mean())

    embeddings = encoder(held_out_images(settings.images * cells, size, first=first + 2**19))
    mosaics = [EmbeddingGrid(part.unflatten(0, shape), encoder.name) for part in embeddings.split(cells)]
    scenes = held_out_images(settings.images, size * max(shape), first=first + 2**19 + 2**18)
    cut = (scenes[:, :, : size * settings.rows, : size * settings.columns] * 255).round().byte()
    wholes = [encoder.grid(scene.permute(1, 2, 0).numpy(), shape) for scene in cut]
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
        augmentation = augmentation_experiment(model, encoder, settings.augmentation, sampling, progress=progress)
    return SynthesisReport(
        model=model.name,
        checksum=model.checksum(),
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


def labelled_scenes(split: Split, per_class: int, categories: Sequence[str], *, first: int, size: int) -> Tensor:
    """Scenes first, first + 1, ..., category by category: (len(categories) * per_class, 3, size, size) in [0, 1]."""
    kinds = [category for category in categories for _ in range(per_class)]
    return torch.stack([scene_image(split, first + k, kind, size) for k, kind in enumerate(kinds)])


def paint_variations(
    model: SynthesisModel, embeddings: Tensor, variations: int, degrees: float, settings: SynthesisSettings
) -> Tensor:
    """Patches painted under turned embeddings, (B * variations, 3, S, S) in [0, 1]; those of an image adjoin.

    Args:
        embeddings: (B, D), raw.
    """
    repeated = EmbeddingGrid(embeddings.repeat_interleave(variations, 0)[None])
    turned = vary_grid(repeated, degrees, seed=settings.seed).embeddings[0]
    latents = sample_patches(model, turned, settings)
    return torch.cat([model.decode(part).float().cpu() for part in latents.split(16)]).clamp(0, 1)


def accuracy(train: Tensor, labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
    """Of logistic regression on standardised features, (N, D) each."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000))
    probe.fit(train.numpy(), labels.numpy())
    return float(probe.score(test.numpy(), test_labels.numpy()))


def augmentation_experiment(
    model: SynthesisModel,
    encoder: ImageEncoder,
    settings: AugmentationSettings,
    sampling: SynthesisSettings,
    *,
    progress: bool = True,
) -> Augmentation:
    """Train a linear probe with and without painted variations and count its accuracy on test scenes.

    The labelled scenes come from the validation split, which neither the model nor the test has seen.

    Args:
        encoder: makes the conditions, and the features that the probe reads.
    """
    size, kinds = model.window * model.factor, torch.arange(len(settings.categories))
    test = encoder(labelled_scenes("test", settings.test_per_class, settings.categories, first=2**20, size=size))
    truth = kinds.repeat_interleave(settings.test_per_class)
    labels = kinds.repeat_interleave(settings.per_class)
    more_labels = labels.repeat_interleave(settings.variations)
    accuracies: dict[str, list[float]] = {}
    for repeat in tqdm(range(settings.repeats), desc="augmentation", unit="draw", disable=not progress):
        first, counts = 2**20 + repeat * 2**12, (settings.per_class, settings.per_class * settings.variations)
        images, extra = (
            labelled_scenes("val", count, settings.categories, first=place, size=size)
            for count, place in zip(counts, (first, first + 2**11), strict=True)
        )
        painted = encoder(paint_variations(model, encoder(images), settings.variations, settings.degrees, sampling))
        real, more, both = encoder(images), encoder(extra), torch.cat([labels, more_labels])
        trained_on = {
            "real": (real, labels),
            "augmented": (torch.cat([real, painted]), both),
            "more_real": (torch.cat([real, more]), both),
            "painted": (painted, more_labels),
        }
        for name, (features, kinds_of) in trained_on.items():
            accuracies.setdefault(name, []).append(accuracy(features, kinds_of, test, truth))
    return Augmentation(**{name: tuple(np.round(values, 6).tolist()) for name, values in accuracies.items()})
