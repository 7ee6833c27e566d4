"""`embed_file`: from a table on disk to a map, its numbers, its settings and a page to explore it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from diffrep.files import check_writable
from diffrep.manifold.embedding import PRESETS, HeatGeodesicEmbedding
from diffrep.manifold.pictures import draw_embedding, figure_image, hover_page, printable
from diffrep.manifold.tables import Table, read_table, read_values
from diffrep.results import Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image

FIGURES = (".png", ".pdf", ".svg")
OBSM = "X_heat_geodesic"  # the entry of an AnnData object that holds a map
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
    device: str = "auto"  # where heat is computed: auto, cpu, cuda or cuda:N
    seed: int = 0  # of landmarks and scaling
    hover_points: int = 50_000  # at most so many points on the page to explore
    tap: str | None = None  # of a store of features: which; may be left out where it has one
    thumbnails: int = 1000  # of a store: at most so many small pictures on the page to explore

    def __post_init__(self) -> None:
        if self.method not in PRESETS:
            raise ValueError(f"method must be one of {', '.join(PRESETS)}, got {self.method!r}")
        if self.hover_points < 1:
            raise ValueError(f"hover_points must be at least 1, got {self.hover_points}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must lie between 0 and {2**32 - 1}, got {self.seed}")
        if self.thumbnails < 0:
            raise ValueError(f"thumbnails must be at least 0, got {self.thumbnails}")

    def estimator(self, *, verbose: bool = False) -> HeatGeodesicEmbedding:
        """The estimator that these settings describe."""
        names = ("n_neighbors", "t", "n_pca", "n_landmarks", "on_disconnected")
        chosen = {name: value for name in names if (value := getattr(self, name)) is not None}
        return HeatGeodesicEmbedding.preset(
            self.method,
            n_components=self.n_components,
            metric=self.metric,
            n_jobs=self.n_jobs,
            device=self.device,
            random_state=self.seed,
            verbose=verbose,
            **chosen,
        )


@dataclass(frozen=True, repr=False)
class EmbeddedFile(Result):
    """The map of a table.

    `save` writes it as a picture (.png, .pdf, .svg), its numbers (.csv, .parquet, .npy), a page to explore (.html),
    its settings (.json), or, where the table was an .h5ad file, as one with the map in `obsm`.

    Attributes:
        embedding: (n, n_components).
        table: what was read.
        estimator: fitted, for `transform` and its attributes.
        settings: what the JSON file holds.
        source: the file that was embedded.
        config: how.
        color: the column of the table that colours the points.
        files: what was written: the picture, the coordinates (CSV), the settings (JSON), the page (HTML), and of an
            .h5ad file one with the map.
    """

    MAIN: ClassVar[str | None] = "embedding"

    embedding: NDArray[np.float64]
    table: Table
    estimator: HeatGeodesicEmbedding
    settings: dict[str, Any]
    source: Path
    config: EmbedConfig
    color: str | None = None
    files: tuple[Path, ...] = ()

    @property
    def title(self) -> str:
        """What pictures and pages are called."""
        return printable(f"{self.source.name}, {self.config.method}")

    def figure(self) -> Figure:
        """The map as a scatter plot."""
        values = None if self.color is None else self.table.column(self.color)
        return draw_embedding(self.embedding, values, name=self.color, title=self.title)

    def picture(self) -> Image.Image:
        """The scatter plot as an image."""
        return figure_image(self.figure())

    def columns(self) -> Mapping[str, Any]:
        """Coordinates and the columns of the table that are no features."""
        columns: dict[str, Any] = {f"coordinate {k + 1}": x for k, x in enumerate(self.embedding.T)}
        shown = dict(self.table.columns)
        if self.color is not None:
            shown[self.color] = self.table.column(self.color)
        return columns | {name if name not in columns else f"{name} (table)": _whole(v) for name, v in shown.items()}

    def page(self) -> str:
        """The page to explore, HTML."""
        return hover_page(
            self.embedding,
            dict(list(self.columns().items())[self.embedding.shape[1] :]),
            None if self.color is None else self.table.column(self.color),
            name=self.color,
            title=self.title,
            max_points=self.config.hover_points,
            pictures=_pictures_of(self.source, self.table, self.config),
        )

    def _writers(self) -> dict[str, Callable[[Path], object]]:
        forms: dict[str, Callable[[Path], object]] = dict.fromkeys(FIGURES, lambda path: self.figure().savefig(path))
        forms[".csv"] = lambda path: self.to_pandas().to_csv(path, index=False, errors="surrogateescape")
        forms[".parquet"] = lambda path: self.to_pandas().to_parquet(path, index=False)
        forms[".npy"] = lambda path: np.save(path, self.embedding)
        forms[".html"] = lambda path: path.write_bytes(self.page().encode("utf-8", "replace"))
        forms[".json"] = lambda path: path.write_text(json.dumps(self.settings, indent=2) + "\n", encoding="utf-8")
        if self.source.suffix.lower() == ".h5ad":
            forms[".h5ad"] = lambda path: _write_h5ad(self.source, path, self.embedding)
        return forms


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
            what made them (.json), a page to explore (.html), and for an .h5ad file its cells with the map in
            `obsm["X_heat_geodesic"]` (.h5ad, without the genes). None: nothing is written.
        progress: show progress bars on standard error.

    Raises:
        ValueError: the table, a setting or the output path is not as it must be.
        OSError: a file cannot be read or written.
        ImportError: the format needs a library that is not installed.
    """
    config, source = config or EmbedConfig(), Path(source)
    endings = [".csv", ".json", ".html", *([".h5ad"] if source.suffix.lower() == ".h5ad" else [])]
    paths: list[Path] = []
    if output is not None:
        picture = Path(output)
        check_writable(picture, FIGURES)
        paths = [picture, *(picture.with_suffix(ending) for ending in endings)]
        if any(path.exists() and source.exists() and path.samefile(source) for path in paths):
            raise ValueError(f"{output}: would write over the table {source}; choose another output name")
    color, from_file = config.color, config.color is not None and config.color.lower().endswith(".npy")
    table = _table_of(source, config, None if from_file else color)
    if color is not None and from_file:
        values, color = read_values(color, table.features.shape[0]), Path(color).stem
        table = dataclasses.replace(table, columns={**table.columns, color: values})
    elif color is not None:
        table.column(color)
    features = _standardized(table.features) if config.standardize else table.features
    estimator = config.estimator(verbose=progress).fit(features)
    settings = _settings(source, table, config, estimator)
    result = EmbeddedFile(estimator.embedding_, table, estimator, settings, source, config, color)
    for path in paths:
        result.save(path)
    return dataclasses.replace(result, files=tuple(paths))


def embed_anndata(data: Any, features: str | None = None, *, key: str = OBSM, **settings: Any) -> HeatGeodesicEmbedding:
    """Embed the cells of an AnnData object; the coordinates go into ``data.obsm[key]``.

    Args:
        features: the `obsm` entry that holds the features, such as ``X_pca``; None: `X`.
        settings: of `HeatGeodesicEmbedding`.

    Returns:
        The fitted estimator.

    Raises:
        ValueError: there is no such entry, or a setting is out of range.
    """
    if features is not None and features not in data.obsm:
        raise ValueError(f"there is no obsm entry {features!r}, only {', '.join(data.obsm.keys()) or 'none'}")
    values = data.X if features is None else data.obsm[features]
    if values is None:
        raise ValueError(f"there is no X; name an obsm entry: {', '.join(data.obsm.keys()) or 'there is none'}")
    fitted = HeatGeodesicEmbedding(**settings).fit(values)
    data.obsm[key] = fitted.embedding_
    return fitted


def _write_h5ad(source: Path, path: Path, embedding: NDArray[np.float64]) -> None:
    """The cells of an .h5ad file, with what is known about them and the map, without their genes."""
    import anndata

    data = anndata.read_h5ad(source, backed="r")
    cells = anndata.AnnData(obs=data.obs, obsm={OBSM: embedding})
    data.file.close()
    cells.write_h5ad(path)


def _whole(values: NDArray[Any]) -> Any:
    """Integers of which some are missing, which pandas reads as fractions, as integers again."""
    missing = np.isnan(values) if values.dtype.kind == "f" else np.zeros(0, dtype=bool)
    if not missing.any() or missing.all() or (values[~missing] % 1 != 0).any() or np.isinf(values).any():
        return values
    return np.array(["" if gone else str(int(v)) for v, gone in zip(values, missing, strict=True)])


def _table_of(source: Path, config: EmbedConfig, color: str | None) -> Table:
    if not source.is_dir():
        if config.tap is not None:
            raise ValueError(f"{source}: a tap belongs to a store of features, this is no folder")
        return read_table(source, features=config.features, exclude=config.exclude, color=color)
    from diffrep.manifold.stores import store_table

    if config.features or config.exclude:
        raise ValueError(f"{source}: a store of features has no columns to choose, name a tap")
    return store_table(source, config.tap)


def _pictures_of(source: Path, table: Table, config: EmbedConfig) -> dict[int, str]:
    """Row -> small picture as a data URI, of a store's images; evenly spread where there are too many."""
    if not source.is_dir() or not config.thumbnails:
        return {}
    from diffrep.manifold.stores import thumbnails

    count = table.features.shape[0]
    rows = np.unique(np.linspace(0, count - 1, min(count, config.thumbnails)).astype(int)).tolist()
    small = thumbnails(source, [str(table.columns["image"][row]) for row in rows])
    return {row: picture for row, picture in zip(rows, small, strict=True) if picture}


def _standardized(features: Any) -> Any:
    from sklearn.preprocessing import StandardScaler

    return StandardScaler(with_mean=not hasattr(features, "tocsr")).fit_transform(features)


def _settings(source: Path, table: Table, config: EmbedConfig, estimator: HeatGeodesicEmbedding) -> dict[str, Any]:
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
