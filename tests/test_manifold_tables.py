"""Tables as people have them: what is no feature, what is refused, and that both are said."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from diffrep.cli import main
from diffrep.manifold import EmbedConfig, HeatGeodesicEmbedding, embed_anndata, embed_file
from diffrep.manifold.files import draw_embedding, figure_image
from diffrep.manifold.tables import Table, TableError, TableWarning, read_table

ROWS = np.random.default_rng(0).normal(size=(6, 3)).round(3)
FRAME = pd.DataFrame(ROWS, columns=["a", "b", "c"])
BODY = FRAME.to_csv(index=False, header=False)


def read(path: Path, **choice: Any) -> tuple[Table, list[str]]:
    """A table and what was said about it."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        table = read_table(path, **choice)
    assert all(issubclass(warning.category, TableWarning) for warning in said)
    return table, [str(warning.message).replace(f"{path}: ", "") for warning in said]


def tabbed(text: str) -> str:
    return text.replace(",", "\t")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("plain.csv", f"a,b,c\n{BODY}", None),
        ("no-header.csv", BODY, None),
        ("from-zero.csv", f"0,1,2\n{BODY}", r"the first line (0, 1, 2...) is taken for column names"),
        ("from-one.csv", f"1,2,3\n{BODY}", r"the first line (1, 2, 3...) is taken for column names"),
        ("index.csv", FRAME.to_csv(), None),
        ("filtered.csv", FRAME.set_axis([0, 2, 5, 6, 8, 9]).to_csv(), "'row name' is taken for names of the rows"),
        ("named.csv", FRAME.set_axis([3, 4, 5, 6, 7, 9]).rename_axis("index").to_csv(), "'index' is taken for names"),
        ("pandas.csv", FRAME.reset_index(names="Unnamed: 0").to_csv(index=False), None),
        ("r.csv", '"","a","b","c"\n' + FRAME.set_axis(range(1, 7)).to_csv(header=False), "names of the rows"),
        ("r-table.csv", '"a","b","c"\n' + FRAME.set_axis(range(1, 7)).to_csv(header=False), "one cell more"),
        ("trailing.csv", "a,b,c\n" + BODY.replace("\n", ",\n"), "left out columns without any cell: column 3"),
        ("blank-lines.csv", f"\n\n,,\na,b,c\n{BODY}\n\n", None),
        ("excel.csv", f"a,b,c\n{BODY},,\n,,\n", "left out 2 rows without any cell"),
        ("spaces.csv", f"a, b, c\n{BODY}".replace(",", ", "), None),
        ("two-lines.csv", f'\n"a\n\nb",b,"c\nd"\n\n{BODY}', None),
        ("mark.csv", f"\ufeffa,b,c\n{BODY}", None),
        ("UPPER.CSV", f"a,b,c\n{BODY}", None),
        ("UPPER.TSV", tabbed(f"a,b,c\n{BODY}"), None),
        ("tabs.csv", tabbed(f"a,b,c\n{BODY}"), "separated by tabs"),
        ("europe.csv", f"a,b,c\n{BODY}".replace(",", ";").replace(".", ","), "commas are taken to mark decimals"),
        ("quoted.csv", "a,b,c\n" + "".join(",".join(f'"{v}"' for v in row) + "\n" for row in ROWS.tolist()), None),
    ],
)
def test_a_table_of_numbers_is_read_whole(tmp_path: Path, name: str, content: str, said: str | None) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    table, notes = read(path)
    np.testing.assert_array_equal(table.features, ROWS)
    assert any(said in note for note in notes) if said else not notes


def test_fractions_in_the_first_line_are_a_row(tmp_path: Path) -> None:
    path = tmp_path / "iris.csv"
    path.write_text("5.1,3.5,setosa\n4.9,3.0,setosa\n7.0,3.2,versicolor\n")
    table, notes = read(path)
    assert table.features.tolist() == [[5.1, 3.5], [4.9, 3.0], [7.0, 3.2]]
    assert table.column("column 2").tolist() == ["setosa", "setosa", "versicolor"]
    assert "the first line holds fractions" in notes[0]


def test_counting_fractions_are_a_row_and_said(tmp_path: Path) -> None:
    path = tmp_path / "counting.csv"
    path.write_text(f"0.0,1.0,2.0\n{BODY}")
    table, notes = read(path)
    assert len(table.features) == len(ROWS) + 1
    assert "is taken for a row" in notes[0]


def test_a_line_is_counted_through_names_of_several_lines(tmp_path: Path) -> None:
    path = tmp_path / "lines.csv"
    path.write_text('"a\nb",c\n1,2\n3,4\n5,\n')
    with pytest.raises(TableError, match="line 5, column 'c'"):
        read(path)


@pytest.mark.parametrize("cell", ["$1,000", "12 %", "1.234,5", "1 234", "€5"])
def test_quantities_that_stay_text_are_said(tmp_path: Path, cell: str) -> None:
    path = tmp_path / "quantities.csv"
    path.write_text("a,b,c\n" + "".join(f'{k},{k + 1},"{cell}"\n' for k in range(8)))
    table, notes = read(path)
    assert table.features.shape == (8, 2)
    assert f"cells such as {cell!r} look like numbers" in notes[0]


@pytest.mark.parametrize("cell", ["", "NA", "nan", "NULL", "inf"])
def test_a_missing_number_is_refused_by_line_and_column(tmp_path: Path, cell: str) -> None:
    path = tmp_path / "cells.csv"
    path.write_text(f'\nx,y,label\n1.5,2,"two\nlines"\n1.5,{cell},u\n3,4,v\n')
    with pytest.raises(TableError, match=rf"{re.escape(str(path))}: line 5, column 'y' holds (no number|inf)"):
        read_table(path)
    for choice in ({"exclude": ("y",)}, {"color": "y"}):
        table, _ = read(path, **choice)  # type: ignore[arg-type]
        assert table.feature_names == ("x",)
        assert not np.isfinite(table.column("y")[1])


def test_thousands_are_read_and_said(tmp_path: Path) -> None:
    path = tmp_path / "cells.csv"
    path.write_text('x,y\n"-8,857.0",1\n12,2\n"1,234,567",3\n')
    table, notes = read(path)
    assert table.features[:, 0].tolist() == [-8857.0, 12.0, 1234567.0]
    assert notes == ["column 'x': commas are taken to mark thousands"]


def test_text_among_numbers_is_refused_and_numbers_among_text_are_said(tmp_path: Path) -> None:
    path = tmp_path / "cells.csv"
    path.write_text("x,y\n" + "1,2\n" * 300 + "1_0,2\n")
    with pytest.raises(TableError, match="line 302, column 'x' holds '1_0' where other rows have numbers"):
        read_table(path)
    path.write_text("id,x\n1,1.5\nb2,2.5\nc3,3.5\n")
    table, notes = read(path)
    assert table.feature_names == ("x",)
    assert notes == ["column 'id' is taken for text, though 33% of its cells are numbers"]


def test_codes_and_labels_stay_what_they_are(tmp_path: Path) -> None:
    path = tmp_path / "cells.csv"
    path.write_text("code,label,id,x\n007,NA,12,1.5\n008,None,13,2.5\n019,x,9007199254740993,3.5\n")
    table, _ = read(path, color="id")
    assert table.feature_names == ("x",)
    assert table.column("code").tolist() == ["007", "008", "019"]
    assert table.column("label").tolist() == ["NA", "None", "x"]
    assert table.column("id").tolist() == [12, 13, 9007199254740993]


@pytest.mark.parametrize("name", ["id", "ID", "cell_id", "patient id", "patientId", "UUID"])
def test_identifiers_are_no_features_and_that_is_said(tmp_path: Path, name: str) -> None:
    cells = FRAME.assign(**{name: [9007199254740993, 4, 4, 7, 1, 2], "grid": range(10, 16)})
    cells.to_csv(tmp_path / "t.csv", index=False)
    cells.to_parquet(tmp_path / "t.parquet")
    for path in (tmp_path / "t.csv", tmp_path / "t.parquet"):
        table, notes = read(path)
        assert table.feature_names == ("a", "b", "c", "grid")
        assert table.column(name).tolist() == cells[name].tolist()
        assert notes == [
            f"column {name!r} is taken for identifiers, not for a feature (--id-features takes it for one)"
        ]
        assert read(path, id_features=True)[0].feature_names == ("a", "b", "c", name, "grid")
        assert read(path, features=("a", name))[1] == []
    cells.astype({name: object}).assign(**{name: [8, None, 4, 7, 1, 2]}).to_csv(tmp_path / "gap.csv", index=False)
    np.testing.assert_array_equal(read(tmp_path / "gap.csv")[0].column(name), [8, np.nan, 4, 7, 1, 2])


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf_16_is_read_where_it_is_marked_and_named_where_not(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "excel.csv"
    path.write_bytes(FRAME.assign(label="ä").to_csv(index=False).encode(encoding))
    if encoding == "utf-16":
        table, notes = read(path)
        np.testing.assert_array_equal(table.features, ROWS)
        assert table.column("label").tolist() == ["ä"] * 6
        assert not notes
    else:
        with pytest.raises(TableError, match="no readable text table: UTF-16 without a mark"):
            read_table(path)


def test_a_colour_column_is_no_feature_in_any_format(tmp_path: Path) -> None:
    cells = FRAME.assign(day=range(6))
    for name in ("t.csv", "T.CSV", "t.TSV", "t.parquet", "T.PARQUET"):
        path = tmp_path / name
        if path.suffix.lower() == ".parquet":
            cells.to_parquet(path)
        else:
            cells.to_csv(path, index=False, sep="\t" if path.suffix == ".TSV" else ",")
        assert read(path, color="day")[0].feature_names == ("a", "b", "c")
        assert read(path, color="day", features=("a", "day"))[0].feature_names == ("a", "day")
        with pytest.raises(TableError, match="there is no column noon, only a, b, c, day"):
            read_table(path, color="noon")


def test_parquet_frames_keep_their_kinds(tmp_path: Path) -> None:
    cells = FRAME.assign(
        part=pd.Categorical(list("uvuvuv")), day=pd.date_range("2026-01-01", periods=6), text=list("123456")
    )
    count = pd.array([1, None, 3, 4, 5, 6], dtype="Int64")
    cells.iloc[[0, 2, 5]].to_parquet(tmp_path / "filtered.parquet")
    table, notes = read(tmp_path / "filtered.parquet")
    np.testing.assert_array_equal(table.features, ROWS[[0, 2, 5]])
    assert "names of the rows" in notes[0]
    assert table.column("row name").tolist() == [0, 2, 5]
    assert table.column("part").tolist() == ["u", "u", "v"]
    assert table.column("text").tolist() == ["1", "3", "6"]
    cells.assign(count=count).to_parquet(tmp_path / "count.parquet")
    with pytest.raises(TableError, match="row 1, column 'count' holds no number"):
        read_table(tmp_path / "count.parquet")


def test_numbers_in_arrays_are_checked(tmp_path: Path) -> None:
    bad = np.ones((5, 4))
    bad[3, 2] = np.nan
    np.save(tmp_path / "nan.npy", bad)
    np.savez(tmp_path / "nan.npz", x=bad)
    for name in ("nan.npy", "nan.npz"):
        with pytest.raises(TableError, match=rf"{name}: row 3, column 2 is nan \(counted from 0\)"):
            read_table(tmp_path / name)
    np.save(tmp_path / "one.npy", np.ones((1, 4)))
    with pytest.raises(TableError, match=r"one.npy: has one row; a map needs at least two"):
        read_table(tmp_path / "one.npy")
    np.savez(tmp_path / "some.npz", x=np.eye(5), meta=np.array([{}], dtype=object))
    table, notes = read(tmp_path / "some.npz")
    assert table.features.shape == (5, 5)
    assert "left out array 'meta'" in notes[0]


def damaged(folder: Path) -> dict[str, Path]:
    np.savez(folder / "whole.npz", x=np.eye(5))
    whole = (folder / "whole.npz").read_bytes()
    files = {"cut.npz": whole[: len(whole) // 2], "empty.npy": b"", "noise.parquet": b"PAR1" + bytes(40)}
    files |= {"noise.h5ad": b"\x89HDF\r\n\x1a\n" + bytes(64), "noise.npy": b"\x93NUMPY\x01\x00\xff\xff{" + bytes(9)}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    import zipfile

    with zipfile.ZipFile(folder / "inside.npz", "w") as archive:
        archive.writestr("x.npy", b"no array")
    np.save(folder / "pickled.npy", np.array([{}], dtype=object))
    return {path.name: path for path in folder.iterdir() if path.name != "whole.npz"}


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_damaged_tables_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "good.npy").write_bytes(b"")
    np.save(tmp_path / "good.npy", np.random.default_rng(0).random((30, 3)))
    for name, path in damaged(tmp_path / "bad").items():
        assert main(["embed", str(path), "-o", str(tmp_path / "map.png")]) == 2, name
        last = capsys.readouterr().err.strip().splitlines()
        assert str(path) in last[-1]
        if name.endswith(".npy"):
            assert main(["embed", str(tmp_path / "good.npy"), "--color", str(path), "-o", str(tmp_path / "m.png")]) == 2
            assert str(path) in capsys.readouterr().err.strip().splitlines()[-1]
    assert main(["embed", str(tmp_path / "good.npy"), "--exclude", "nonsense"]) == 2
    assert "there is no column nonsense" in capsys.readouterr().err
    assert not list(tmp_path.glob("m*.png"))


def test_notes_are_lines_on_standard_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    points = pd.DataFrame(np.random.default_rng(0).random((40, 3)))
    points.to_csv(tmp_path / "points.csv", index=False)
    assert main(["embed", str(tmp_path / "points.csv"), "-o", str(tmp_path / "map.png"), "--json"]) == 0
    shown = capsys.readouterr()
    assert '"rows": 40' in shown.out
    assert shown.err.strip().startswith("diffrep embed: ")
    assert "taken for column names" in shown.err
    assert main(["embed", str(tmp_path / "points.csv"), "-o", str(tmp_path / "m.png"), "--device", "nonsense"]) == 2
    assert "device must be auto, cpu" in capsys.readouterr().err


def test_integers_stay_integers_and_maps_describe_and_save_themselves(tmp_path: Path) -> None:
    cells = pd.DataFrame(np.random.default_rng(0).random((40, 3)), columns=list("abc"))
    cells["$x_"] = [f"_{k % 3}$" for k in range(40)]
    cells["id"], cells["part"] = range(100, 140), [None if k == 3 else k % 4 for k in range(40)]
    cells.to_csv(tmp_path / "cells.csv", index=False)
    config = EmbedConfig(color="$x_", exclude=("id", "part"))
    result = embed_file(tmp_path / "cells.csv", tmp_path / "map.png", config)
    written = (tmp_path / "map.csv").read_text().splitlines()
    assert written[0] == "coordinate 1,coordinate 2,$x_,id,part"
    assert written[1].endswith(",_0$,100,0")
    assert written[4].endswith(",_0$,103,")
    assert repr(result).startswith("EmbeddedFile(embedding float64 (40, 2) in ")
    pd.testing.assert_frame_equal(result.to_pandas()[["id"]], cells[["id"]])
    np.testing.assert_array_equal(result.numpy(), result.embedding)
    assert result._repr_png_()[:4] == b"\x89PNG"
    for name in ("again.svg", "again.npy", "again.parquet", "again.html"):
        assert result.save(tmp_path / name).stat().st_size > 200
    with pytest.raises(ValueError, match=r"saved as .*\.csv.* not as '\.xyz'"):
        result.save(tmp_path / "again.xyz")
    with pytest.raises(ValueError, match=r"would write over the table .*; take another name: -o .*-map\.\w+$"):
        embed_file(tmp_path / "cells.csv", tmp_path / "cells.png", config)


def test_names_of_any_kind_are_drawn() -> None:
    names = np.array(["$\\frac{", "_hidden", "a" * 200, b"\xff".decode("utf-8", "surrogateescape")] * 5)
    figure = draw_embedding(np.random.default_rng(0).random((20, 2)), names, name="$_", title="$\\bad{ _")
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels == ["$\\frac{", "_hidden", "a" * 39 + "…", "?"]
    assert figure_image(figure).size[0] > 1000


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_anndata_goes_in_and_obsm_comes_out(tmp_path: Path) -> None:
    anndata = pytest.importorskip("anndata")
    rng = np.random.default_rng(0)
    names = [f"cell {k}" for k in range(50)]
    obs = pd.DataFrame({"day": pd.Categorical([k % 12 for k in range(50)])}, index=names)
    data = anndata.AnnData(rng.random((50, 8)), obs=obs, obsm={"X_pca": rng.random((50, 3))})
    with pytest.raises(TypeError, match=r"X is an AnnData object: pass its features.*embed_anndata"):
        HeatGeodesicEmbedding().fit(data)
    fitted = embed_anndata(data, "X_pca", random_state=0)
    np.testing.assert_array_equal(data.obsm["X_heat_geodesic"], fitted.embedding_)
    with pytest.raises(ValueError, match="no obsm entry 'X_umap', only X_pca"):
        embed_anndata(data, "X_umap")
    del data.obsm["X_heat_geodesic"]
    data.write_h5ad(tmp_path / "cells.h5ad")
    arguments = ["--features", "X_pca", "--color", "day", "-o", str(tmp_path / "map.png"), "--json"]
    assert main(["embed", str(tmp_path / "cells.h5ad"), *arguments]) == 0
    written = anndata.read_h5ad(tmp_path / "map.h5ad")
    np.testing.assert_array_equal(written.obsm["X_heat_geodesic"], fitted.embedding_)
    np.testing.assert_array_equal(written.obsm["X_pca"], data.obsm["X_pca"])
    assert written.obs_names.tolist() == names
    assert read_table(tmp_path / "cells.h5ad").column("day").tolist() == [k % 12 for k in range(50)]  # no text
    assert read_table(tmp_path / "cells.h5ad", exclude=("3",)).feature_names == ("0", "1", "2", "4", "5", "6", "7")
