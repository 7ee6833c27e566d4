"""The door: tables in several formats, pictures, pages, and what happens with files that are wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from diffrep.cli import main
from diffrep.eval.toy_manifolds import random_tree
from diffrep.manifold import EmbedConfig, HeatGeodesicEmbedding, embed_file
from diffrep.manifold.files import colours, draw_embedding, hover_page, is_categorical
from diffrep.manifold.tables import read_table

TOY = random_tree(20, branches=3, noise=0.05, dim=5, seed=1)
NAMES = tuple(f"gene {k}" for k in range(5))
BRANCH = np.array([f'branch "{k}", old' for k in TOY.labels])


def write_csv(path: Path, *, delimiter: str = ",") -> Path:
    lines = [delimiter.join(["", *NAMES, "branch", "time"])]
    for i, row in enumerate(TOY.points):
        quoted = '"' + BRANCH[i].replace('"', '""') + '"'
        lines.append(delimiter.join([str(i), *map(repr, row.tolist()), quoted, repr(float(TOY.position[i]))]))
    path.write_text("\n".join(lines) + "\n")
    return path


def write_table(path: Path) -> Path:
    if path.suffix == ".parquet":
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        columns: dict[str, Any] = {name: TOY.points[:, k] for k, name in enumerate(NAMES)}
        parquet.write_table(pyarrow.table(columns | {"branch": BRANCH.tolist(), "time": TOY.position}), path)
    elif path.suffix == ".h5ad":
        anndata = pytest.importorskip("anndata")
        pandas = pytest.importorskip("pandas")
        obs = pandas.DataFrame({"branch": BRANCH, "time": TOY.position}, index=[f"cell {k}" for k in range(60)])
        data = anndata.AnnData(TOY.points, obs=obs)
        data.var_names = NAMES
        data.obsm["X_pca"] = TOY.points[:, :3]
        data.write_h5ad(path)
    elif path.suffix == ".npz":
        np.savez(path, pcs=TOY.points, branch=BRANCH, time=TOY.position)
    elif path.suffix == ".npy":
        np.save(path, TOY.points)
    else:
        write_csv(path, delimiter="\t" if path.suffix == ".tsv" else ",")
    return path


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("ending", [".csv", ".tsv", ".parquet", ".npz", ".h5ad"])
def test_every_format_gives_the_same_table(tmp_path: Path, ending: str) -> None:
    path = write_table(tmp_path / f"tree{ending}")
    table = read_table(path, exclude=() if ending in (".npz", ".h5ad") else ("time",))
    np.testing.assert_array_equal(table.features, TOY.points)
    assert list(table.columns) == ["branch", "time"]
    assert table.column("branch").tolist() == BRANCH.tolist()
    np.testing.assert_array_equal(table.column("time"), TOY.position)
    if ending != ".npz":
        assert table.feature_names == NAMES
        np.testing.assert_array_equal(table.column("gene 2"), TOY.points[:, 2])
    with pytest.raises(ValueError, match="there is no column 'tissue', only branch, time"):
        table.column("tissue")


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_features_may_be_chosen(tmp_path: Path) -> None:
    table = read_table(write_table(tmp_path / "tree.csv"), features=("gene 3", "gene 1"))
    np.testing.assert_array_equal(table.features, TOY.points[:, [3, 1]])
    assert "gene 0" in table.columns
    cells = read_table(write_table(tmp_path / "tree.h5ad"), features=("X_pca",))
    np.testing.assert_array_equal(cells.features, TOY.points[:, :3])


def test_tables_without_header(tmp_path: Path) -> None:
    path = tmp_path / "plain.csv"
    np.savetxt(path, TOY.points, delimiter=",", fmt="%.17g")
    table = read_table(path)
    np.testing.assert_array_equal(table.features, TOY.points)
    assert table.feature_names[0] == "column 0"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.csv", b"", "the file is empty"),
        ("names.csv", b"a,b\n", "has a header, but no rows"),
        ("ragged.csv", b"a,b\n1,2\n3\n", "line 3, column 'b' holds no number"),
        ("text.csv", b"a,b\nx,y\nu,v\n", "no column of numbers"),
        ("twice.csv", b"a,a\n1,2\n", "column names repeat: a"),
        ("late.csv", b"a,b\n" + b"1,2\n" * 300 + b"oops,2\n", "oops"),
        ("binary.csv", b"\xff\x00\x01" * 9, "no readable text table"),
        ("broken.npy", b"not an array", "no readable .npy file"),
        ("broken.npz", b"not an archive", "no readable .npz file"),
        ("what.xlsx", b"x", "cannot read .xlsx, only .npy"),
    ],
)
def test_broken_tables_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read_table(path)
    assert name in str(caught.value)


def test_arrays_that_are_no_tables(tmp_path: Path) -> None:
    np.save(tmp_path / "cube.npy", np.ones((2, 2, 2)))
    with pytest.raises(ValueError, match=r"rows by columns, got shape \(2, 2, 2\)"):
        read_table(tmp_path / "cube.npy")
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object))
    with pytest.raises(ValueError, match=r"no readable .npy file"):
        read_table(tmp_path / "objects.npy")
    np.savez(tmp_path / "two.npz", a=np.ones((3, 2)), b=np.ones((3, 4)))
    with pytest.raises(ValueError, match="name one two-dimensional array of numbers, it has a, b"):
        read_table(tmp_path / "two.npz")
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_table(tmp_path / "absent.npy")


def test_embed_file_writes_picture_numbers_settings_and_page(tmp_path: Path) -> None:
    source = write_table(tmp_path / "tree.csv")
    output = tmp_path / "maps" / "tree.png"
    result = embed_file(source, output, EmbedConfig(color="branch", exclude=("time",), n_neighbors=5))
    assert [path.name for path in result.files] == ["tree.png", "tree.csv", "tree.json", "tree.html"]
    assert sorted(path.name for path in output.parent.iterdir()) == sorted(p.name for p in result.files)
    expected = HeatGeodesicEmbedding(n_neighbors=5, random_state=0).fit_transform(TOY.points)
    np.testing.assert_array_equal(result.embedding, expected)
    numbers = read_table(output.with_suffix(".csv"), features=("coordinate 1", "coordinate 2"))
    np.testing.assert_array_equal(numbers.features, expected)
    assert numbers.column("branch").tolist() == BRANCH.tolist()
    settings = json.loads(output.with_suffix(".json").read_text())
    assert settings["config"]["n_neighbors"] == settings["estimator"]["n_neighbors"] == 5
    assert settings["result"]["path"] == "exact"
    picture = imread(output)
    assert picture.shape[0] > 600
    shades, _ = colours(BRANCH, 60)
    for shade in set(shades):  # every branch is to be seen
        rgb = np.array([int(shade[k : k + 2], 16) for k in (1, 3, 5)]) / 255
        assert (np.abs(picture[..., :3] - rgb).max(axis=-1) < 0.02).sum() > 50
    page = output.with_suffix(".html").read_text()
    data = json.loads(re.search(r'type="application/json">(.*?)</script>', page, re.S)[1])  # type: ignore[index]
    np.testing.assert_allclose(data["x"], expected[:, 0], rtol=1e-4, atol=1e-12)
    assert data["columns"]["branch"] == BRANCH.tolist()
    assert "http:" not in page.replace("http-equiv", "")
    assert "https:" not in page


def test_colour_by_a_file_of_values(tmp_path: Path) -> None:
    source = write_table(tmp_path / "tree.npy")
    np.save(tmp_path / "time.npy", TOY.position)
    config = EmbedConfig(color=str(tmp_path / "time.npy"), standardize=True, method="diffusion-map")
    result = embed_file(source, tmp_path / "map.svg", config)
    assert read_table(tmp_path / "map.csv", features=("coordinate 1",)).columns["time"].shape == (60,)
    assert result.estimator.dissimilarity == "diffusion"
    np.save(tmp_path / "short.npy", np.ones(3))
    with pytest.raises(ValueError, match="one value for each of 60 rows"):
        embed_file(source, None, EmbedConfig(color=str(tmp_path / "short.npy")))


def test_page_holds_what_it_is_given_and_nothing_that_ends_the_script() -> None:
    rng = np.random.default_rng(0)
    names = np.array(["</script><b>"] * 100)
    page = hover_page(rng.random((100, 2)), {"name": names, "x": np.full(100, np.nan)}, names, max_points=30)
    assert page.count("</script>") == 2
    assert "30 of 100 points" in page
    data = json.loads(re.search(r'type="application/json">(.*?)</script>', page, re.S)[1])  # type: ignore[index]
    assert data["columns"]["name"] == ["</script><b>"] * 30
    assert data["columns"]["x"] == ["nan"] * 30
    assert len(set(data["row"])) == 30


def test_categories_and_scales() -> None:
    assert is_categorical(np.array(["a", "b"]))
    assert is_categorical(np.repeat(np.arange(5), 10))
    assert is_categorical(np.repeat([0.0, 1.0], 20))
    assert not is_categorical(np.arange(100))
    assert not is_categorical(np.linspace(0, 1, 50))
    shades, legend = colours(np.array([0.0, 0.5, np.nan, 1.0]), 4)
    assert legend == []
    assert shades[2] == "#bbbbbb"
    assert shades[0] == "#440154"
    figure = draw_embedding(np.random.default_rng(0).random((50, 1)), np.linspace(0, 1, 50), name="age")
    assert len(figure.axes) == 2
    assert figure.axes[1].get_ylabel() == "age"


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, output = write_table(tmp_path / "tree.csv"), tmp_path / "map.png"
    assert main(["embed", str(source), "-o", str(output), "--color", "time", "--method", "shortest-path"]) == 0
    assert output.is_file()
    assert "wrote" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--color", "tissue"], "there is no column tissue"),
        (["--t", "-3"], "t must be 'auto' or positive, got -3.0"),
        (["--t", "inf"], "t must be 'auto' or positive, got inf"),
        (["--seed", "-1"], "seed must be in [0, 2^32), got -1"),
        (["--n-jobs", "0"], "n_jobs must be a number of threads"),
        (["-o", "map.gif"], "the output must end in .png"),
        (["--features", "branch"], "features must be numbers, column branch is not"),
    ],
)
def test_command_refuses_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    source = write_table(tmp_path / "tree.csv")
    before = sorted(tmp_path.iterdir())
    arguments = ["-o", str(tmp_path / "map.png")] if "-o" not in options else []
    assert main(["embed", str(source), *arguments, *options]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert message in error[-1]
    assert sorted(tmp_path.iterdir()) == before
