"""Do generated variations help a classifier? Labelled scenes, each painted again from its own embedding.

After the augmentation experiments of Graikos, Yellapragada et al. (CVPR 2024): every labelled image is painted again
under its own, slightly turned, embedding and keeps its label; a classifier is trained with and without them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from diffrep.scenes import SEEN, render_scene, scene_seed
from diffrep.scenes.sets import Split
from diffrep.synthesis import EmbeddingGrid, SynthesisModel, SynthesisSettings, sample_patches
from diffrep.synthesis.conditions import ImageEncoder, vary_grid


@dataclass(frozen=True)
class AugmentationSettings:
    """The experiment."""

    per_class: int = 4  # labelled scenes of each category
    variations: int = 2  # painted for each of them
    degrees: float = 10.0  # by which their embeddings are turned
    test_per_class: int = 12
    repeats: int = 3  # draws of the labelled scenes
    categories: tuple[str, ...] = SEEN

    def __post_init__(self) -> None:
        if min(self.per_class, self.variations, self.test_per_class, self.repeats) < 1 or len(self.categories) < 2:
            raise ValueError("all counts must be at least 1, and there must be two categories or more")


@dataclass(frozen=True)
class Augmentation:
    """Test accuracies, one for each draw of the labelled scenes."""

    real: tuple[float, ...]  # with the labelled scenes alone
    augmented: tuple[float, ...]  # with their painted variations beside them
    more_real: tuple[float, ...]  # with as many rendered scenes in their place: the most that can be hoped for
    painted: tuple[float, ...]  # with the variations alone


def labelled_scenes(split: Split, per_class: int, categories: Sequence[str], *, first: int, size: int) -> Tensor:
    """(len(categories) * per_class, 3, size, size) in [0, 1], category by category; no other call shares a scene
    whose `first` is further away than the number of scenes.
    """
    images = []
    for number, category in enumerate(categories):
        for k in range(per_class):
            scene = render_scene(scene_seed(split, first + number * per_class + k), category=category, size=size)
            images.append(torch.from_numpy(scene.image.copy()).permute(2, 0, 1).float() / 255)
    return torch.stack(images)


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
    probed: ImageEncoder,
    settings: AugmentationSettings,
    sampling: SynthesisSettings,
    *,
    progress: bool = True,
) -> Augmentation:
    """Train a linear probe with and without painted variations and count its accuracy on test scenes.

    The labelled scenes come from the validation split, which neither the model nor the test has seen.

    Args:
        encoder: makes the conditions.
        probed: makes the features that the probe reads.
    """
    size, kinds = model.window * model.factor, torch.arange(len(settings.categories))
    test = probed(labelled_scenes("test", settings.test_per_class, settings.categories, first=2**20, size=size))
    truth = kinds.repeat_interleave(settings.test_per_class)
    labels = kinds.repeat_interleave(settings.per_class)
    more_labels = labels.repeat_interleave(settings.variations)
    accuracies: dict[str, list[float]] = {"real": [], "augmented": [], "more_real": [], "painted": []}
    for repeat in tqdm(range(settings.repeats), desc="augmentation", unit="draw", disable=not progress):
        first = 2**20 + repeat * 2**12
        images = labelled_scenes("val", settings.per_class, settings.categories, first=first, size=size)
        extra = labelled_scenes(
            "val", settings.per_class * settings.variations, settings.categories, first=first + 2**11, size=size
        )
        painted = probed(paint_variations(model, encoder(images), settings.variations, settings.degrees, sampling))
        real, more = probed(images), probed(extra)
        accuracies["real"].append(accuracy(real, labels, test, truth))
        accuracies["painted"].append(accuracy(painted, more_labels, test, truth))
        both = torch.cat([labels, more_labels])
        accuracies["augmented"].append(accuracy(torch.cat([real, painted]), both, test, truth))
        accuracies["more_real"].append(accuracy(torch.cat([real, more]), both, test, truth))
    return Augmentation(**{name: tuple(np.round(values, 6).tolist()) for name, values in accuracies.items()})
