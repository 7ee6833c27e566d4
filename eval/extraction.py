"""Extracting the images of a data set once each, in fixed batches, with the prompt that a recipe asks for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from PIL import Image
from tqdm import tqdm

from diffrep.eval.cache import FeatureCache
from diffrep.eval.datasets.pairs import PairSet
from diffrep.images import ImageError
from diffrep.recipes import Correspondence, Recipe

CATEGORY = "{category}"  # in a prompt: stands for the name of the image's category


def extract_images(
    groups: Mapping[str, Sequence[str]],
    load: Callable[[str], Image.Image],
    correspondence: Correspondence,
    cache: FeatureCache,
    *,
    batch_size: int,
    progress: bool,
) -> dict[str, str]:
    """Extract every image that the cache lacks.

    Batches are fixed by the list of images, and a batch that is not complete is extracted as a whole, so
    that a run in two halves gives the very numbers of a run in one.

    Args:
        groups: category -> images, as `images_by_prompt` gives them.
        load: reads an image by its name.

    Returns:
        Image -> what was wrong, for those that cannot be read.
    """
    unreadable: dict[str, str] = {}
    with tqdm(total=sum(map(len, groups.values())), desc="extract", unit="image", disable=not progress) as bar:
        for category, images in groups.items():
            own = _with_prompt(correspondence, category)
            for start in range(0, len(images), batch_size):
                batch = images[start : start + batch_size]
                if not all(cache_key(category, image) in cache for image in batch):
                    pictures: dict[str, Image.Image] = {}
                    for image in batch:
                        try:
                            pictures[image] = load(image)
                        except ImageError as error:
                            unreadable[image] = str(error)
                    for image, features in zip(pictures, own.features(list(pictures.values())), strict=True):
                        cache.save(cache_key(category, image), features)
                bar.update(len(batch))
    return unreadable


def cache_key(category: str, image: str) -> str:
    """The name of an image's features: with the category where the prompt depends on it."""
    return f"{category}/{image}" if category else image


def prompts_by_category(recipe: Recipe) -> bool:
    """Whether an image's features depend on its category's name."""
    return any(CATEGORY in reading.extract.prompt for reading in recipe.readings)


def images_by_prompt(pairs: PairSet, recipe: Recipe) -> dict[str, list[str]]:
    """Category -> its images, sorted; one entry "" with all images where the prompt is the same for all."""
    if not prompts_by_category(recipe):
        return {"": list(pairs.images())}
    names = sorted({pair.category for pair in pairs.pairs})
    return {name: list(replace(pairs, pairs=pairs.of(name)).images()) for name in names}


def _with_prompt(correspondence: Correspondence, category: str) -> Correspondence:
    if not category:
        return correspondence
    recipe = correspondence.recipe
    readings = tuple(
        replace(r, extract=replace(r.extract, prompt=r.extract.prompt.replace(CATEGORY, category)))
        for r in recipe.readings
    )
    backbones = {r.backbone: b for r, b in zip(readings, correspondence.backbones, strict=True)}
    return Correspondence(replace(recipe, readings=readings), backbones=backbones)
