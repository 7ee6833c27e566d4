"""A store of features as a table, and small pictures of its images for the page to explore."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from diffrep.images import ImageError
from diffrep.manifold.tables import Table
from diffrep.pages import data_uri
from diffrep.store import open_store
from diffrep.store.sources import read_image


def store_table(folder: Path, tap: str | None = None) -> Table:
    """The vectors of one tap of a store.

    One row per image, or per place where the store keeps places. The columns are ``image``, ``folder`` (of the
    image, relative to the collection), and ``x`` and ``y`` of places.

    Raises:
        StoreError: there is no store, or no such tap.
        ValueError: the store is empty.
    """
    store = open_store(folder)
    runs = list(store.vectors(tap, "patch" if store.kind == "points" else "image"))
    if not runs:
        raise ValueError(f"{folder}: the store holds no images")
    names = np.array(store.names)[np.concatenate([run.images.numpy() for run in runs])]
    columns = {"image": names, "folder": np.array([str(PurePosixPath(name).parent) for name in names])}
    if points := [run.points.numpy() for run in runs if run.points is not None]:
        x, y = np.concatenate(points).T
        columns |= {"x": x, "y": y}
    return Table(np.concatenate([run.values.numpy() for run in runs]), (), columns)


def thumbnails(folder: Path, names: Sequence[str], *, side: int = 64) -> list[str]:
    """Data URIs of images of a store, at most `side` pixels long; empty where an image is gone."""
    root, pictures = open_store(folder).root, []
    for name in names:
        try:
            image = read_image(root, name)
        except ImageError:
            pictures.append("")
            continue
        image.thumbnail((side, side))
        pictures.append(data_uri(image, "JPEG", quality=70))
    return pictures
