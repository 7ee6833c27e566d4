"""`embed_file`: from a table on disk to a map, its numbers, its settings and a page to explore it."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from diffrep.manifold.embedding import HeatGeodesicEmbedding
from diffrep.manifold.pictures import draw_embedding, hover_page
from diffrep.manifold.settings import PRESETS
from diffrep.manifold.tables import Table, read_table

PICTURES = (".png", ".pdf", ".svg")
Method = Literal["heat-geodesic", "reference", "phate", "sne", "diffusion-map", "shortest-path"]


@dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """How a table is embedded and drawn. What is None is as the method has it."""

    method: Method = "heat-geodesic"  # a preset of HeatGeodesicEmbedding
    features: tuple[str, ...] = ()  # columns to embed, or the array of an .npz or .h5ad file; empty: all numbers
    exclude: tuple[str, ...] = ()  # columns that are no features, but shown on the page
    color: str | None = None  # column that colours the points, or an .npy file of values; then no feature
    standardize: bool = False  # bring every feature to zero mean and unit variance first
    n_components: int = 2  # dimensions of the embedding; the picture shows two
    n_neighbors: int | None = None  # neighbours of the graph
    t: float | None = None  # diffusion time
    n_pca: int | None = None  # principal components to which the features are reduced first
    metric: Literal["euclidean", "cosine"] = "euclidean"
    n_landmarks: int | None = None  # landmarks; as many as there are points: all pairs are computed
    on_disconnected: Literal["warn", "connect", "raise", "keep"] | None = None  # what if the graph falls apart
    n_jobs: int | None = None  # threads of the neighbour search
    device: str = "cpu"  # where heat is computed: cpu or cuda
    seed: int = 0  # of landmarks and scaling
    hover_points: int = 50_000  # at most so many points on the page to explore
    tap: str | None = None  # of a store of features: which; may be left out where it has one
    thumbnails: int = 1000  # of a store: at most so many small pictures on the page to explore

    def __post_init__(self) -> None:
        if self.method not in PRESETS:
            raise ValueError(f"method must be one of {', '.join(PRESETS)}, got {self.method!r}")
        if self.hover_points < 1:
            raise ValueError(f"hover_points must be at least 1, got {self.hover_points}")
        if self.thumbnails < 0:
            raise ValueError(f"thumbnails must be at least 0, got {self.thumbnails}")

    def estimator(self, *, verbose: bool = False) -> HeatGeodesicEmbedding:
        """The estimator that these settings describe."""
        names = ("n_neighbors", "t", "n_pca", "n_landmarks", "on_disconnected")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        return HeatGeodesicEmbedding.preset(
            self.method,
            n_components=self.n_components,
            metric=self.metric,
            n_jobs=self.n_jobs,
            device=self.device,
            random_state=self.seed,
            verbose=verbose,
            **given,
        )


@dataclass(frozen=True)
class EmbeddedFile:
    """What `embed_file` made.

    Attributes:
        embedding: (n, n_components).
        table: what was read.
        estimator: fitted, for `transform` and its attributes.
        files: the picture, the coordinates (CSV), the settings (JSON) and the page (HTML) that were written.
        settings: what the JSON file holds.
    """

    embedding: NDArray[np.float64]
    table: Table
    estimator: HeatGeodesicEmbedding
    files: tuple[Path, ...]
    settings: dict[str, Any]


def embed_file(
    source: str | Path,
    output: str | Path | None = None,
    config: EmbedConfig | None = None,
    *,
    progress: bool = False,
) -> EmbeddedFile:
    """Embed the rows of a table and draw the map.

    Args:
        source: a .npy, .npz, .csv, .tsv, .parquet or .h5ad file, see `read_table`; or a store of features, see
            `diffrep.manifold.stores.store_table`.
        output: the picture, .png, .pdf or .svg. Beside it, with other endings, come the coordinates (.csv),
            what made them (.json) and a page to explore (.html). None: nothing is written.
        progress: show progress bars on standard error.

    Raises:
        ValueError: the table, a setting or the output path is not as it must be.
        OSError: a file cannot be read or written.
        ImportError: the format needs a library that is not installed.
    """
    config = config or EmbedConfig()
    picture = None if output is None else _checked_output(Path(output))
    from_file = config.color is not None and config.color.endswith(".npy")
    exclude = config.exclude
    if config.color is not None and not from_file and Path(source).suffix in (".csv", ".tsv", ".parquet"):
        exclude += (config.color,)
    table = _table_of(Path(source), config, exclude)
    values, name = None, config.color
    if from_file and config.color is not None:
        values, name = np.load(config.color, allow_pickle=False), Path(config.color).stem
        rows = table.features.shape[0]
        if values.shape != (rows,):
            raise ValueError(f"{config.color}: needs one value for each of {rows} rows, got {values.shape}")
    elif config.color is not None:
        values = table.column(config.color)
    features = _standardized(table.features) if config.standardize else table.features
    estimator = config.estimator(verbose=progress).fit(features)
    embedding = estimator.embedding_
    settings = _settings(source, table, config, estimator)
    files: tuple[Path, ...] = ()
    if picture is not None:
        columns = dict(table.columns)
        if values is not None and name is not None:
            columns[name] = values
        title = f"{Path(source).name}, {config.method}"
        figure = draw_embedding(embedding, values, name=name, title=title)
        page = hover_page(
            embedding,
            columns,
            values,
            name=name,
            title=title,
            max_points=config.hover_points,
            pictures=_pictures_of(Path(source), table, config),
        )
        numbers, document, explore = (picture.with_suffix(ending) for ending in (".csv", ".json", ".html"))
        picture.parent.mkdir(parents=True, exist_ok=True)
        _write_whole(picture, lambda path: figure.savefig(path))
        _write_whole(numbers, lambda path: _write_csv(path, embedding, columns))
        _write_whole(document, lambda path: path.write_text(json.dumps(settings, indent=2) + "\n"))
        _write_whole(explore, lambda path: path.write_text(page, encoding="utf-8"))
        files = (picture, numbers, document, explore)
    return EmbeddedFile(embedding, table, estimator, files, settings)


def _table_of(source: Path, config: EmbedConfig, exclude: tuple[str, ...]) -> Table:
    if not source.is_dir():
        if config.tap is not None:
            raise ValueError(f"{source}: a tap belongs to a store of features, this is no folder")
        return read_table(source, features=config.features, exclude=exclude)
    from diffrep.manifold.stores import store_table

    if config.features or exclude:
        raise ValueError(f"{source}: a store of features has no columns to choose, name a tap")
    return store_table(source, config.tap)


def _pictures_of(source: Path, table: Table, config: EmbedConfig) -> dict[int, str]:
    """Row -> small picture as a data URI, of a store's images; evenly spread where there are too many."""
    if not source.is_dir() or not config.thumbnails:
        return {}
    from diffrep.manifold.stores import thumbnails

    count = table.features.shape[0]
    rows = np.unique(np.linspace(0, count - 1, min(count, config.thumbnails)).astype(int)).tolist()
    made = thumbnails(source, [str(table.columns["image"][row]) for row in rows])
    return {row: picture for row, picture in zip(rows, made, strict=True) if picture}


def _checked_output(path: Path) -> Path:
    if path.suffix.lower() not in PICTURES:
        raise ValueError(f"{path}: the output must end in {', '.join(PICTURES)}")
    if path.is_dir():
        raise ValueError(f"{path}: is a folder, give a file name")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise OSError(f"{path}: the folder {folder} cannot be written to")
    return path


def _standardized(features: Any) -> Any:
    from sklearn.preprocessing import StandardScaler

    return StandardScaler(with_mean=not hasattr(features, "tocsr")).fit_transform(features)


def _settings(
    source: str | Path, table: Table, config: EmbedConfig, estimator: HeatGeodesicEmbedding
) -> dict[str, Any]:
    used = {k: v for k, v in estimator.get_params().items() if k != "verbose"}
    return {
        "source": str(source),
        "rows": table.features.shape[0],
        "features": table.features.shape[1],
        "config": dataclasses.asdict(config),
        "estimator": used,
        "result": {
            "path": estimator.path_,
            "landmarks": None if estimator.landmark_indices_ is None else len(estimator.landmark_indices_),
            "diffusion_times": None if estimator.t_ is None else estimator.t_.tolist(),
            "connected_components": estimator.n_connected_components_,
            "stress": estimator.stress_,
        },
    }


def _write_csv(path: Path, embedding: NDArray[np.float64], columns: dict[str, Any]) -> None:
    coordinates = [f"coordinate {k + 1}" for k in range(embedding.shape[1])]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*coordinates, *columns])
        for i, row in enumerate(embedding.tolist()):
            writer.writerow([*row, *(column[i] for column in columns.values())])


def _write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under another name and rename it, so that it is never half there."""
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        write(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
