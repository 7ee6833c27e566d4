from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from diffrep.backbones import Backbone, Grid, load_backbone
from diffrep.cli import main
from diffrep.eval.benchmarks.matching import measure_index
from diffrep.features import ExtractConfig, FeatureMaps, extract
from diffrep.images import Placement, Sizing, load_image
from diffrep.index import (
    IndexConfig,
    StoredIndex,
    choose_kind,
    contact_sheet,
    index_store,
    open_index,
    query_image,
    search_folder,
)
from diffrep.store import BulkConfig, Keep, Store, StoreError, extract_store, open_store, write_store

from .fields import generator
from .test_store import paint

CLUSTERS, CHANNELS = 60, 32


def clustered(count: int, seed: int) -> Tensor:
    """Unit vectors around common centres."""
    centres = torch.randn(CLUSTERS, CHANNELS, generator=generator(0))
    draws = generator(seed)
    which = torch.randint(CLUSTERS, (count,), generator=draws)
    return F.normalize(centres[which] + 0.3 * torch.randn(count, CHANNELS, generator=draws), dim=1)


def store_of(vectors: Tensor, folder: Path, **settings: object) -> Store:
    """A pooled store that holds given vectors."""
    placement, grid = Placement.identity((1, 1)), Grid((0.0, 0.0), (1.0, 1.0))
    provenance = {"backbone": "made up", "taps": ("a",), "seed": 0} | settings
    items = (
        (f"{number:05d}.png", FeatureMaps({"a": v[None, :, None, None]}, (placement,), {"a": grid}, provenance))
        for number, v in enumerate(vectors)
    )
    return open_store(write_store(folder, items, Keep(dtype="float32"), shard_images=2000))


@pytest.fixture(scope="module")
def vectors() -> Tensor:
    return clustered(4000, seed=1)


@pytest.fixture(scope="module")
def store(vectors: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Store:
    return store_of(vectors, tmp_path_factory.mktemp("stores") / "clustered")


@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivf", "ivf-pq"])
def test_every_kind_finds_what_an_exact_product_finds(kind: str, store: Store, vectors: Tensor, tmp_path: Path) -> None:
    index_store([store], tmp_path / "i", IndexConfig(kind=kind))  # type: ignore[arg-type]
    index = open_index(tmp_path / "i")
    assert (len(index), index.design.kind, index.level, index.tap) == (4000, kind, "image", "a")
    assert index.design.reason == f"{kind} was asked for"
    queries = clustered(200, seed=2)
    exact = (queries @ F.normalize(vectors, dim=1).T).topk(10)
    found = index.search(queries, 10)
    # the originals are float16: places may change among neighbours that are that near to each other
    worse = exact.values[:, 0] - (queries * vectors[found.indices[:, 0]]).sum(1)
    assert (worse < 1e-3).float().mean() >= (1 if kind == "flat" else 0.97)
    assert (found.scores.diff(dim=1) <= 0).all()
    torch.testing.assert_close(
        found.scores, torch.einsum("qc,qkc->qk", queries, vectors[found.indices]), atol=1e-3, rtol=0
    )
    if kind == "ivf-pq":  # its codes alone are much coarser than that
        coarse = index.search(queries, 10, rescore=False)
        hit, coarse_hit = ((f.indices[:, 0] == exact.indices[:, 0]).float().mean() for f in (found, coarse))
        assert coarse_hit < hit - 0.1


def test_kinds_are_chosen_by_size_and_say_why() -> None:
    assert choose_kind(100_000, 768).kind == "flat"
    assert choose_kind(100_001, 768).factory == "PCA128,IVF512,SQ8"
    assert choose_kind(100_001, 96).factory == "IVF512,SQ8"
    assert choose_kind(30_000_000, 768).factory == "OPQ64_256,IVF8192,PQ64x4fs"
    assert "more than 100,000 vectors" in choose_kind(200_000, 8).reason
    with pytest.raises(ValueError, match="at least 1,000 vectors, there are 10: use 'flat'"):
        choose_kind(10, 768, "ivf")
    with pytest.raises(ValueError, match=r"kind must be .* got 'lsh'"):
        choose_kind(5000, 768, "lsh")  # type: ignore[arg-type]


def test_the_same_seed_gives_the_same_index(store: Store, tmp_path: Path) -> None:
    for name in ("a", "b"):
        index_store([store], tmp_path / name, IndexConfig(kind="ivf", sample=2000, seed=3))
    assert (tmp_path / "a/codes.faiss").read_bytes() == (tmp_path / "b/codes.faiss").read_bytes()


def test_stores_of_one_origin_are_joined_and_others_refused(tmp_path: Path) -> None:
    one, two = clustered(30, seed=3), clustered(20, seed=4)
    stores = [store_of(one, tmp_path / "one"), store_of(two, tmp_path / "two")]
    index = index_store(stores, tmp_path / "i")
    assert index.search(two[7:8], 1).indices.item() == 37
    assert (index.place(37).image, index.place(37).point) == ("00007.png", None)
    for setting, value in (("backbone", "another"), ("taps", ("a", "b")), ("seed", 1), ("timestep", 9)):
        if setting == "taps":
            continue
        other = store_of(two, tmp_path / setting, **{setting: value})
        with pytest.raises(StoreError, match=f"different origin \\({setting} .* against .*cannot be mixed"):
            index_store([stores[0], other], tmp_path / "j")
    assert not (tmp_path / "j").exists()


def test_folders_that_are_taken_or_damaged(store: Store, tmp_path: Path) -> None:
    index_store([store], tmp_path / "i", IndexConfig(kind="ivf"))
    with pytest.raises(ValueError, match="exists already"):
        index_store([store], tmp_path / "i")
    assert [p.name for p in tmp_path.iterdir()] == ["i"]
    os.truncate(tmp_path / "i/codes.faiss", 1000)
    with pytest.raises(ValueError, match=r"codes\.faiss: is damaged"):
        open_index(tmp_path / "i").search(torch.ones(1, CHANNELS))
    os.truncate(tmp_path / "i/vectors.safetensors", 1000)
    with pytest.raises(ValueError, match="the index is damaged"):
        open_index(tmp_path / "i")
    with pytest.raises(ValueError, match="is no index"):
        open_index(tmp_path)


def test_questions_that_cannot_be_asked(store: Store, tmp_path: Path) -> None:
    index = index_store([store], tmp_path / "i")
    with pytest.raises(ValueError, match=r"queries must be \(Q, 32\), got \(1, 5\)"):
        index.search(torch.ones(1, 5))
    with pytest.raises(ValueError, match=r"k must be in 1\.\.4000"):
        index.search(torch.ones(1, CHANNELS), 4001)
    with pytest.raises(ImportError, match="needs faiss-gpu and a GPU"):
        index_store([store], tmp_path / "j", IndexConfig(kind="ivf", device="cuda"))


CONFIG = ExtractConfig(taps=("layer.2",), sizing=Sizing("squash", 64))


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    paint(folder, range(8))
    return folder


@pytest.fixture(scope="module")
def backbone(vit_folder: Path) -> Backbone:
    return load_backbone(str(vit_folder))


@pytest.fixture(scope="module")
def places(photographs: Path, vit_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> StoredIndex:
    folder = tmp_path_factory.mktemp("places")
    extract_store([photographs], folder / "s", str(vit_folder), CONFIG, Keep(kind="maps"), BulkConfig(workers=0))
    return index_store([open_store(folder / "s")], folder / "i")


def test_a_place_finds_itself_and_every_image_comes_once(
    places: StoredIndex, photographs: Path, backbone: Backbone
) -> None:
    assert (places.level, len(places)) == ("patch", 8 * 64)
    stored = open_store(places.folder.parent / "s").maps("03.png")
    x, y = stored.cell_centres("layer.2")[5, 2].tolist()
    hits = query_image(places, photographs / "03.png", point=(x, y), k=8, backbone=backbone)
    assert len({hit.place.image for hit in hits}) == 8
    assert (hits[0].place.image, hits[0].score) == ("03.png", pytest.approx(1, abs=1e-3))
    assert hits[0].place.point == pytest.approx((x, y), abs=1e-3)
    assert hits[0].document()["path"] == str(photographs / "03.png")
    in_box = query_image(places, photographs / "03.png", box=(x - 1, y - 1, x + 1, y + 1), k=1, backbone=backbone)
    assert in_box[0].vector == hits[0].vector


def test_parts_and_backbones_that_do_not_fit(places: StoredIndex, photographs: Path, backbone: Backbone) -> None:
    image = photographs / "03.png"
    with pytest.raises(ValueError, match="one point or one box"):
        query_image(places, image, point=(1, 1), box=(0, 0, 5, 5), backbone=backbone)
    with pytest.raises(ValueError, match="k must be at least 1"):
        query_image(places, image, point=(1, 1), k=0, backbone=backbone)
    with pytest.raises(ValueError, match="lies outside of the image of 48 x 48 pixels"):
        query_image(places, image, point=(48, 2), backbone=backbone)
    with pytest.raises(ValueError, match="a box is x0,y0,x1,y1"):
        query_image(places, image, box=(5, 5, 2, 8), backbone=backbone)
    other = load_backbone(places.features["source"])
    next(other.network.parameters()).data.mul_(1.001)
    with pytest.raises(ValueError, match=r"is not the backbone of the index .* against"):
        query_image(places, image, point=(3, 3), backbone=other)


def test_whole_images(photographs: Path, backbone: Backbone, tmp_path: Path) -> None:
    extract_store([photographs], tmp_path / "s", backbone, CONFIG, None, BulkConfig(workers=0))
    index = index_store([open_store(tmp_path / "s")], tmp_path / "i")
    hits = query_image(index, photographs / "06.png", k=3, backbone=backbone)
    assert (hits[0].place.image, hits[0].place.point) == ("06.png", None)
    assert len(hits) == 3
    maps = extract(backbone, [photographs / "06.png"], CONFIG)
    x, y = maps.cell_centres("layer.2")[5, 2].tolist()
    first, *others = query_image(index, photographs / "06.png", point=(x, y), k=3, backbone=backbone)
    assert (first.place.image, first.score) == ("06.png", pytest.approx(1, abs=1e-5))
    assert first.place.point == pytest.approx((x, y), abs=1e-3)
    assert {hit.place.image for hit in (first, *others)} == {hit.place.image for hit in hits}
    assert all(hit.place.point is not None for hit in others)


def test_an_index_of_a_stranger_has_nothing_fetched(
    places: StoredIndex, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(places.folder, tmp_path / "i")
    file = tmp_path / "i/index.json"
    document = json.loads(file.read_text())
    document["features"]["backbone"] = "somebody/model"
    file.write_text(json.dumps(document))

    def load(name: str, **settings: object) -> Backbone:
        raise AssertionError(f"{name} would have been fetched")

    monkeypatch.setattr("diffrep.index.query.load_backbone", load)
    with pytest.raises(ValueError, match="--backbone somebody/model"):
        query_image(open_index(tmp_path / "i"), photographs / "03.png", point=(3, 3))
    with pytest.raises(AssertionError, match="would have been fetched"):  # where the user names it
        query_image(open_index(tmp_path / "i"), photographs / "03.png", point=(3, 3), backbone="somebody/model")


INDEX_DAMAGES = {
    "deep": "[" * 100_000,
    "null": "null",
    "empty": "{}",
    "tap": ("tap", 5),
    "level": ("level", ["patch"]),
    "design": ("design", {"kind": "flat"}),
    "kind": ("design", "kind", {}),
    "collections": ("collections", 7),
    "images": ("collections", 0, "images", "8"),
    "few": ("collections", 0, "images", 0),
    "features": ("features", "tiny"),
    "dtype": ("features", "dtype", "load"),
    "sizing": ("features", "sizing", {"mode": "squash"}),
    "taps": ("features", "taps", {"a": 1}),
    "weights": ("vectors.safetensors", {"vectors": torch.zeros(3)}),
    "names": ("places.safetensors", {"images": torch.zeros(512, dtype=torch.int32), "points": torch.zeros(512, 2)}),
    "numbers": (
        "places.safetensors",
        {
            "images": torch.full((512,), 99, dtype=torch.int32),
            "points": torch.zeros(512, 2),
            "names": torch.full((8,), 255, dtype=torch.uint8),
            "ends": torch.arange(8),
        },
    ),
}


@pytest.mark.parametrize("damage", INDEX_DAMAGES)
def test_damaged_indexes_are_named_in_a_line(
    damage: str, places: StoredIndex, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(places.folder, tmp_path / "i")
    change = INDEX_DAMAGES[damage]
    if isinstance(change, str):
        (tmp_path / "i/index.json").write_text(change)
    elif change[0].endswith(".safetensors"):
        save_file(change[1], tmp_path / "i" / change[0])
    else:
        document = place = json.loads((tmp_path / "i/index.json").read_text())
        for key in change[:-2]:
            place = place[key]
        place[change[-2]] = change[-1]
        (tmp_path / "i/index.json").write_text(json.dumps(document))
    question = ["query", str(tmp_path / "i"), str(photographs / "03.png"), "--point", "3,3"]
    assert main([*question, "-o", str(tmp_path / "q.png")]) == 2
    error = capsys.readouterr().err
    assert str(tmp_path / "i") in error
    assert error.count("\n") == 1
    assert not (tmp_path / "q.png").exists()


def test_a_killed_index_leaves_nothing_for_ever(store: Store, tmp_path: Path) -> None:
    (tmp_path / ".i.999999999.partial").mkdir()
    (tmp_path / ".i.999999999.partial/vectors.safetensors").touch()
    index_store([store], tmp_path / "i")
    assert [p.name for p in tmp_path.iterdir()] == ["i"]


def test_a_folder_is_searched_in_one_step_and_the_next_time_at_once(
    photographs: Path, vit_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(photographs, tmp_path / "photos")
    (tmp_path / "photos/two\nlines.png").write_bytes((photographs / "01.png").read_bytes())
    question = ["search", str(tmp_path / "photos"), str(photographs / "02.png"), "--backbone", str(vit_folder)]
    sheet = ["-o", str(tmp_path / "sheet.png"), "-k", "9"]
    assert main([*question, "--point", "8.5,12", *sheet]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("  1  1.000  02.png  at (")
    assert r"two\nlines.png" in "".join(lines)
    assert len(lines) == 10
    assert load_image(tmp_path / "sheet.png").width > 300
    (place,) = (tmp_path / "photos.search").iterdir()
    # without the locks, which some versions of filelock touch
    before = {file: file.stat().st_mtime_ns for file in place.rglob("[!.]*") if file.is_file()}
    assert main([*question, "--point", "8.5,12", *sheet]) == 0
    assert {file: file.stat().st_mtime_ns for file in place.rglob("[!.]*") if file.is_file()} == before
    assert capsys.readouterr().out.splitlines()[:9] == lines[:9]

    (tmp_path / "photos/03.png").unlink()
    paint(tmp_path / "photos", [20])
    assert main([*question, "--json", "--point", "8.5,12", *sheet]) == 0
    names = [hit["image"] for hit in json.loads(capsys.readouterr().out)["hits"]]
    assert "20.png" in names
    assert "03.png" not in names
    assert main([*question, "--json", "-k", "2"]) == 0  # the whole image
    assert json.loads(capsys.readouterr().out)["hits"][0]["image"] == "02.png"
    assert main([*question, "--point", "800,12"]) == 2
    assert main(["search", str(tmp_path / "nowhere"), str(photographs / "02.png")]) == 2


def test_names_of_any_bytes_are_found(photographs: Path, backbone: Backbone, tmp_path: Path) -> None:
    names = ["two\nlines.png", os.fsdecode(b"caf\xe9.png")]
    for name in names:
        shutil.copy(photographs / "04.png", tmp_path / name)
    answer = search_folder(tmp_path, photographs / "04.png", backbone=backbone, config=CONFIG, work=tmp_path / "w")
    assert sorted(hit.place.image for hit in answer.hits) == sorted(names)
    assert contact_sheet(load_image(photographs / "04.png"), answer.hits).width > 300
    json.dumps([hit.document() for hit in answer.hits]).encode()


def test_matching_imports_no_store() -> None:
    code = "import sys, diffrep.matching; print([m for m in sys.modules if m.startswith('diffrep.store')])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_the_contact_sheet_shows_what_is_there_and_names_what_is_gone(
    places: StoredIndex, photographs: Path, backbone: Backbone
) -> None:
    hits = query_image(places, photographs / "03.png", point=(20, 20), k=8, backbone=backbone)
    picture = load_image(photographs / "03.png")
    sheet = contact_sheet(picture, hits, point=(20, 20))
    kept = (photographs / "03.png").read_bytes()
    (photographs / "03.png").unlink()
    try:
        without = contact_sheet(picture, hits, point=(20, 20))
    finally:
        (photographs / "03.png").write_bytes(kept)
    assert sheet.size == without.size
    assert sheet.tobytes() != without.tobytes()


def test_from_a_folder_to_an_answer_on_the_command_line(
    photographs: Path, vit_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, index, sheet = (str(tmp_path / name) for name in ("s", "i", "found.png"))
    options = ["--backbone", str(vit_folder), "--taps", "layer.2", "--size", "64", "--workers", "0", "--json"]
    assert main(["extract", str(photographs), "-o", store, "--keep.kind", "maps", *options]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 8
    assert main(["index", store, "-o", index]) == 0
    assert "flat: 512 vectors are no more than 100,000" in capsys.readouterr().out
    image = str(photographs / "02.png")
    assert main(["query", index, image, "--point", "8.5,12", "-k", "3", "--json", "-o", sheet]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["point"], len(answer["hits"]), answer["hits"][0]["image"]) == ([8.5, 12], 3, "02.png")
    assert load_image(sheet).width > 300
    assert main(["query", index, image, "--json"]) == 0  # the mean of the image
    assert len(json.loads(capsys.readouterr().out)["hits"]) == 8
    assert main(["query", index, image, "--point", "10"]) == 2
    assert "cannot read the point '10'" in capsys.readouterr().err


def test_a_store_is_embedded_with_small_pictures(photographs: Path, backbone: Backbone, tmp_path: Path) -> None:
    many = tmp_path / "many"
    for part in ("left", "right"):
        (many / part).mkdir(parents=True)
        paint(many / part, range(0 if part == "left" else 30, 20 if part == "left" else 50))
    extract_store([many], tmp_path / "s", backbone, CONFIG, None, BulkConfig(workers=0))
    options = ["--tap", "layer.2", "--color", "folder", "--method", "shortest-path", "--thumbnails", "10", "--json"]
    assert main(["embed", str(tmp_path / "s"), "-o", str(tmp_path / "map.png"), *options]) == 0
    page = (tmp_path / "map.html").read_text()
    content = json.loads(page.partition('type="application/json">')[2].partition("</script>")[0])
    assert content["columns"]["image"][0] == "left/00.png"
    assert set(content["columns"]["folder"]) == {"left", "right"}
    assert len(content["pictures"]) == 10
    assert all(picture.startswith("data:image/jpeg;base64,") for picture in content["pictures"].values())
    assert main(["embed", str(tmp_path / "s"), "-o", str(tmp_path / "m.png"), "--tap", "up.1"]) == 2
    assert not (tmp_path / "m.png").exists()


def test_the_benchmark_compares_with_the_exact_product(tmp_path: Path) -> None:
    row = measure_index(tmp_path / "i", 3000, CHANNELS, 100, "ivf")
    first, ten, code_first, code_ten = row.recall
    assert 0.8 < first <= ten <= 1
    assert code_first <= code_ten <= ten
    assert CHANNELS < row.bytes < 4 * CHANNELS + 60
    assert min(row.plain.median, row.ours.median) > 0
