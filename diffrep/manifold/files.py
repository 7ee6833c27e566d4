"""`embed_file`: from a table on disk to a map, its numbers, its settings, a picture and a page to explore it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from diffrep.files import DRAWING, check_writable, number_of
from diffrep.manifold.embedding import HeatGeodesicEmbedding
from diffrep.manifold.tables import Table, read_table, read_values, store_table
from diffrep.pictures import data_uri, render
from diffrep.results import Result
from diffrep.settings import WORKERS, check

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image

Array = NDArray[Any]

FIGURES = (".png", ".pdf", ".svg")
OBSM = "X_heat_geodesic"  # the entry of an AnnData object that holds a map
Method = Literal["heat-geodesic", "reference", "phate", "sne", "diffusion-map", "shortest-path"]

_LONGEST = 40  # letters of a name in the legend
_MOST_CATEGORIES = 20  # more different values than this are a scale, or one colour where they are strings
_THUMBNAIL = 64  # pixels along the longer side
_PLAIN, _MISSING = "#3b6fb6", "#bbbbbb"  # colours of points without a value, and of a missing one


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
    id_features: bool = False  # integer columns called id, cell_id and the like are features too

    def __post_init__(self) -> None:
        check(
            self, n_components="1..1024", hover_points="1..", thumbnails="0..", seed="[0, 2^32)", n_jobs=f"-{WORKERS}"
        )

    def estimator(self, *, verbose: bool = False) -> HeatGeodesicEmbedding:
        """The estimator that these settings describe."""
        names = {field.name for field in dataclasses.fields(self)} & set(HeatGeodesicEmbedding().get_params())
        chosen = {name: value for name in names if (value := getattr(self, name)) is not None}
        return HeatGeodesicEmbedding.preset(self.method, **chosen, random_state=self.seed, verbose=verbose)


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
            pictures=self._thumbnails(),
        )

    def _thumbnails(self) -> dict[int, str]:
        """Row -> small picture as a data URI, of a store's images; evenly spread where there are too many."""
        if not self.source.is_dir() or not self.config.thumbnails:
            return {}
        from diffrep.images import ImageError
        from diffrep.store import open_store
        from diffrep.store.sources import read_image

        root, names = open_store(self.source).root, self.table.columns["image"]
        pictures = {}
        for row in np.unique(np.linspace(0, len(names) - 1, min(len(names), self.config.thumbnails)).astype(int)):
            try:
                image = read_image(root, str(names[row]))
            except ImageError:  # it is gone
                continue
            image.thumbnail((_THUMBNAIL, _THUMBNAIL))
            pictures[int(row)] = data_uri(image, "JPEG", quality=70)
        return pictures

    def _writers(self) -> dict[str, Callable[[Path], object]]:
        forms: dict[str, Callable[[Path], object]] = dict.fromkeys(
            FIGURES, lambda path: save_figure(self.figure(), path)
        )
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
            `diffrep.manifold.tables.store_table`.
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
            other = picture.with_name(f"{picture.stem}-map{picture.suffix}")
            raise ValueError(
                f"{output}: what lies beside it would write over the table {source}; take another name: -o {other}"
            )
    table, color = _coloured_table(source, config)
    features = table.features
    if config.standardize:
        from sklearn.preprocessing import StandardScaler

        features = StandardScaler(with_mean=not hasattr(features, "tocsr")).fit_transform(features)
    estimator = config.estimator(verbose=progress)
    try:
        estimator.fit(features)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    settings = {
        "source": str(source),
        "rows": features.shape[0],
        "features": features.shape[1],
        "config": dataclasses.asdict(config),
        "estimator": {k: v for k, v in estimator.get_params().items() if k != "verbose"},
        "result": {
            "path": estimator.path_,
            "landmarks": None if estimator.landmark_indices_ is None else len(estimator.landmark_indices_),
            "diffusion_times": None if estimator.t_ is None else estimator.t_.tolist(),
            "connected_components": estimator.n_connected_components_,
            "stress": estimator.stress_,
        },
    }
    result = EmbeddedFile(estimator.embedding_, table, estimator, settings, source, config, color)
    for path in paths:
        result.save(path)
    return dataclasses.replace(result, files=tuple(paths))


def _coloured_table(source: Path, config: EmbedConfig) -> tuple[Table, str | None]:
    """The table, and the column of it that colours the points."""
    color = config.color
    values = Path(color) if color is not None and color.lower().endswith(".npy") else None
    color = color if values is None else None
    if source.is_dir():
        if config.features or config.exclude:
            raise ValueError(f"{source}: a store of features has no columns to choose, name a tap")
        table = store_table(source, config.tap)
    elif config.tap is not None:
        raise ValueError(f"{source}: a tap belongs to a store of features, this is no folder")
    else:
        table = read_table(
            source,
            features=config.features,
            exclude=config.exclude,
            color=color,
            id_features=config.id_features,
        )
    if values is not None:
        columns = {**table.columns, values.stem: read_values(values, table.features.shape[0])}
        return dataclasses.replace(table, columns=columns), values.stem
    if color is not None:
        table.column(color)  # it is there
    return table, color


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
    """The cells of an .h5ad file, with what is known about them, their other maps and this one, without their genes."""
    import anndata

    data = anndata.read_h5ad(source, backed="r")
    cells = anndata.AnnData(obs=data.obs, obsm={**data.obsm, OBSM: embedding})
    data.file.close()
    cells.write_h5ad(path)


def _whole(values: NDArray[Any]) -> Any:
    """Integers of which some are missing, which pandas reads as fractions, as integers again."""
    missing = np.isnan(values) if values.dtype.kind == "f" else np.zeros(0, dtype=bool)
    if not missing.any() or missing.all() or (values[~missing] % 1 != 0).any() or np.isinf(values).any():
        return values
    return np.array(["" if gone else str(int(v)) for v, gone in zip(values, missing, strict=True)])


def is_categorical(values: Array) -> bool:
    """Strings and booleans are categories, and so are a few different integers."""
    if values.dtype.kind in "iu":
        return len(np.unique(values)) <= _MOST_CATEGORIES
    if values.dtype.kind == "f":
        finite = values[np.isfinite(values)]
        return len(np.unique(finite)) <= min(_MOST_CATEGORIES, len(values) // 5) and bool((finite % 1 == 0).all())
    return True


def colours(values: Array | None, n: int) -> tuple[Array, list[tuple[str, str]]]:
    """A hex colour for each point, and the legend (name, colour) of categories."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    if values is None:
        return np.full(n, _PLAIN), []
    if is_categorical(values):
        names, member = np.unique(values, return_inverse=True)
        if len(names) > _MOST_CATEGORIES:
            return np.full(n, _PLAIN), []
        wheel = colormaps["tab10" if len(names) <= 10 else "tab20"]
        shades = np.array([to_hex(wheel(k)) for k in range(len(names))])
        labels = [f"{v:g}" if isinstance(v, (float, np.floating)) else printable(str(v)) for v in names]
        return shades[member], list(zip(labels, shades.tolist(), strict=True))
    low, high = _limits(values)
    number = values.astype(np.float64)
    scaled = np.clip((number - low) / max(high - low, 1e-300), 0, 1)
    palette = np.array([to_hex(colormaps["viridis"](k / 255)) for k in range(256)])
    shades = palette[np.round(np.nan_to_num(scaled) * 255).astype(int)]
    shades[~np.isfinite(number)] = _MISSING
    return shades, []


def _limits(values: Array) -> tuple[float, float]:
    """Between which values a scale of colours lies."""
    finite = values[np.isfinite(values)].astype(np.float64)
    low, high = np.quantile(finite, [0.01, 0.99]) if len(finite) else (0.0, 1.0)
    return float(low), float(high)


def printable(text: str) -> str:
    """A text, perhaps from a file name, as fonts and files can hold it: bytes that are no text as question marks."""
    return text.encode("utf-8", "replace").decode()


def draw_embedding(
    embedding: Array, values: Array | None = None, *, name: str | None = None, title: str | None = None
) -> Figure:
    """Scatter plot of the first two coordinates, with equal scales.

    Args:
        embedding: (n, k); of one column, the second coordinate is 0.
        values: (n,) numbers or strings that colour the points.
        name: what the values are.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    n = len(embedding)
    x, y = embedding[:, 0], embedding[:, 1] if embedding.shape[1] > 1 else np.zeros(n)
    shades, legend = colours(values, n)
    figure = Figure(figsize=(8, 6.4), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    order = np.random.default_rng(0).permutation(n)  # no class is painted over by a later one
    size = float(np.clip(8000 / max(n, 1), 0.5, 22))
    axes.scatter(x[order], y[order], c=shades[order], s=size, linewidths=0, rasterized=True)
    axes.set_aspect("equal", adjustable="datalim")
    axes.set_xlabel("coordinate 1")
    axes.set_ylabel("coordinate 2")
    if title:
        axes.set_title(title, parse_math=False)  # a dollar sign in a name is no formula
    if legend:
        marks = [Line2D([], [], marker="o", linestyle="", color=c) for _, c in legend]
        numbers = [str(k) for k in range(len(marks))]
        box = axes.legend(marks, numbers, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
        box.set_title(name or "")
        box.get_title().set_parse_math(False)
        for text, (label, _) in zip(box.get_texts(), legend, strict=True):  # also names that begin with _
            text.set_text(label if len(label) <= _LONGEST else f"{label[: _LONGEST - 1]}…")
            text.set_parse_math(False)
    elif values is not None and not is_categorical(values):
        bar = figure.colorbar(ScalarMappable(Normalize(*_limits(values)), "viridis"), ax=axes)
        bar.ax.set_ylabel(name or "", parse_math=False)
    return figure


def figure_image(figure: Figure) -> Image.Image:
    """A figure as an RGB image."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure; a PNG says that it is a drawing of diffrep's."""
    figure.savefig(path, metadata={"Software": DRAWING} if path.suffix.lower() == ".png" else None)


def hover_page(
    embedding: Array,
    columns: Mapping[str, Array],
    values: Array | None = None,
    *,
    name: str | None = None,
    title: str = "embedding",
    max_points: int = 50_000,
    pictures: Mapping[int, str] | None = None,
) -> str:
    """One self-contained HTML page: the map on a canvas, to zoom, drag and point at.

    Args:
        embedding: (n, k), of which two coordinates are shown.
        columns: name -> (n,), shown for the point under the mouse.
        values, name: as in `draw_embedding`.
        max_points: of more, so many are drawn at random and the page says so.
        pictures: row -> data URI of a small picture, shown for the point under the mouse.
    """
    n, known = len(embedding), pictures or {}
    shown = np.arange(n)
    if n > max_points:
        shown = np.sort(np.random.default_rng(0).choice(n, max_points, replace=False))
    shades, legend = colours(values, n)
    palette, shade = np.unique(shades[shown], return_inverse=True)
    y = embedding[shown, 1] if embedding.shape[1] > 1 else np.zeros(len(shown))
    content = {
        "x": [float(f"{v:.5g}") for v in embedding[shown, 0]],
        "y": [float(f"{v:.5g}") for v in y],
        "row": shown.tolist(),
        "shade": shade.tolist(),
        "palette": palette.tolist(),
        "pictures": {place: known[row] for place, row in enumerate(shown.tolist()) if row in known},
        "columns": {key: [_cell(v) for v in column[shown]] for key, column in columns.items()},
    }
    note = f"{len(shown):,} of {number_of(n, 'point')}" if len(shown) < n else f"{number_of(n, 'point')}"
    return render(
        "map.html",
        title=title,
        style="map.css",
        script="map.js",
        note=note,
        name=name,
        legend=legend,
        content=content,
    )


def _cell(value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return float(f"{value:.6g}") if np.isfinite(value) else str(value)
    return value if isinstance(value, (int, str)) else str(value)
