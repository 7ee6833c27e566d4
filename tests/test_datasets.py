"""Readers of the released layouts, and what they say about folders that are not in order."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

from diffrep.eval.datasets.pair_sets import (
    SPAIR_CATEGORIES,
    Ap10kSet,
    read_ap10k,
    read_pf_pascal,
    read_pf_willow,
    read_spair,
    read_spair_u,
)
from diffrep.eval.datasets.pairs import (
    AnnotatedPair,
    DatasetError,
    KeypointTable,
    PairSet,
    read_flo,
    read_keypoint_tables,
    read_tss,
    table_of,
    tss_category,
)

from .benchmark_folders import (
    write_ap10k,
    write_ap10k_release,
    write_pf_pascal,
    write_pf_willow,
    write_spair,
    write_tss,
)

TWO = ("bus", "cat")


def images_of(pairs: PairSet) -> set[str]:
    return {image.path for pair in pairs.pairs for image in (pair.source, pair.target)}


def of(pairs: PairSet, category: str) -> list[AnnotatedPair]:
    return [pair for pair in pairs.pairs if pair.category == category]


def test_spair_both_ways_of_reading_agree(tmp_path: Path) -> None:
    root = write_spair(tmp_path)
    own, listed = (read_spair(root, categories=TWO, keypoints=kind) for kind in ("image", "pair"))
    assert len(own.pairs) == len(listed.pairs) == 12
    assert not own.problems
    assert len(images_of(own)) == 6
    for a, b in zip(own.pairs, listed.pairs, strict=True):
        assert (a.name, a.ids, a.source.path, a.target.size, a.target.box) == (
            b.name, b.ids, b.source.path, b.target.size, b.target.box
        )  # fmt: skip
        assert torch.equal(a.target.points(a.ids), b.target.points(b.ids))
    extra = [set(pair.target.keypoints) - set(pair.ids) for pair in own.pairs]
    assert any(extra), "the images' own annotations know keypoints that the pair does not share"


def test_spair_u_is_annotated_on_the_images_of_spair(tmp_path: Path) -> None:
    spair = write_spair(tmp_path)
    plain = read_spair(spair, categories=TWO, keypoints="image")
    other = tmp_path / "SPair-U"  # as it is unpacked: annotations alone
    shutil.copytree(spair, other, ignore=shutil.ignore_patterns("JPEGImages"))
    for file in (other / "ImageAnnotation").rglob("*.json"):
        note = json.loads(file.read_text())
        file.write_text(json.dumps({**note, "kps": {**note["kps"], "0": None}}))
    read = read_spair_u(other, categories=TWO, keypoints="image")
    assert read.name == "SPair-U"
    assert read.root == spair
    assert [p.name for p in read.pairs] == [p.name for p in plain.pairs]
    assert [p.ids for p in read.pairs] == [tuple(i for i in p.ids if i != 0) for p in plain.pairs]
    assert not read.problems
    (spair / "JPEGImages").rename(other / "JPEGImages")
    assert read_spair_u(other, categories=TWO).root == other
    (other / "JPEGImages").rename(tmp_path / "elsewhere")
    with pytest.raises(DatasetError, match="annotated on the images of SPair-71k, which are neither in"):
        read_spair_u(other)


def test_a_colon_in_a_file_name_may_be_escaped(tmp_path: Path) -> None:
    spair, ap10k = write_spair(tmp_path), write_ap10k(tmp_path)
    as_released = read_spair(spair, categories=TWO), read_ap10k(ap10k)
    for root in (spair, ap10k):
        for file in (root / "PairAnnotation/test").iterdir():
            file.rename(file.with_name(file.name.replace(":", "%3A")))
    assert (read_spair(spair, categories=TWO), read_ap10k(ap10k)) == as_released


def test_spair_says_what_it_lacks(tmp_path: Path) -> None:
    root = write_spair(tmp_path)
    pairs = sorted((root / "PairAnnotation/test").glob("*:cat.json"))
    note = json.loads(pairs[0].read_text())
    pairs[0].write_text("{")
    pairs[1].write_text(json.dumps({k: v for k, v in json.loads(pairs[1].read_text()).items() if k != "src_kps"}))
    pairs[2].write_text(json.dumps({**json.loads(pairs[2].read_text()), "trg_bndbox": [5, 5, 5, 9]}))
    pairs[3].write_text(json.dumps({**json.loads(pairs[3].read_text()), "kps_ids": ["0"]}))
    missing = root / "JPEGImages/cat" / note["trg_imname"]
    missing.unlink()
    read = read_spair(root, categories=("cat", "dog"))
    what = {problem.where: problem.what for problem in read.problems}
    assert "cannot be read as JSON" in what[pairs[0].name]
    assert what[pairs[1].name] == "has no field 'src_kps'"
    assert "the box [5, 5, 5, 9] is empty" in what[pairs[2].name]
    assert "points for 1 kps_ids" in what[pairs[3].name]
    assert what["dog"] == "no usable pair"
    assert any(str(Path("JPEGImages/cat") / missing.name) in text for text in what.values())
    assert len(read.pairs) + len(what) == 6 + 1
    assert all(missing.name not in path for path in images_of(read))


def test_folders_that_are_no_data_set_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no such folder; the data set needs PairAnnotation/test, JPEGImages"):
        read_spair(tmp_path)
    with pytest.raises(ValueError, match="no category zebra"):
        read_spair(write_spair(tmp_path), categories=["zebra"])
    with pytest.raises(DatasetError, match=r"val_pairs_pf_pascal\.csv: no such list"):
        read_pf_pascal(write_pf_pascal(tmp_path), split="val")
    (tmp_path / "PF-dataset-PASCAL/test_pairs_pf_pascal.csv").write_text("a,b,c\n1,2,3\n")
    with pytest.raises(DatasetError, match="columns should begin with source_image"):
        read_pf_pascal(tmp_path / "PF-dataset-PASCAL")
    with pytest.raises(DatasetError, match="none of the folders FG3DCar, JODS, PASCAL"):
        read_tss(tmp_path)
    with pytest.raises(DatasetError, match="ImageAnnotation"):
        read_ap10k(tmp_path)


def test_pf_pascal(tmp_path: Path) -> None:
    read = read_pf_pascal(write_pf_pascal(tmp_path), categories=("bottle", "sofa"))
    assert [pair.category for pair in read.pairs] == ["bottle", "bottle", "sofa"]
    pair = read.pairs[1]
    assert (pair.source.size, pair.target.size) == ((44, 60), (44, 50))
    assert pair.source.points(pair.ids).tolist() == [[6, 6], [13.5, 13.5], [31, 31]]
    assert pair.target.box is None
    assert not read.problems


def test_pf_pascal_says_what_it_lacks(tmp_path: Path) -> None:
    root = write_pf_pascal(tmp_path)
    table = root / "test_pairs_pf_pascal.csv"
    rows = table.read_text().splitlines()
    (root / "JPEGImages/2009_000000.jpg").unlink()
    table.write_text("\n".join([*rows[:2], rows[2].replace("13.5000;", "", 1), rows[3], "x,y,nine,1,2,3,4"]) + "\n")
    read = read_pf_pascal(root, categories=("bottle", "sofa"))
    assert [str(problem).removeprefix("test_pairs_pf_pascal.csv ") for problem in read.problems] == [
        "row 1: image JPEGImages/2009_000000.jpg is missing",
        "row 2: malformed annotation (XA, YA, XB, YB have 2, 3, 3, 3 numbers)",
        "row 4: malformed annotation (invalid literal for int() with base 10: 'nine')",
        "bottle: no usable pair",
    ]
    assert len(read.pairs) == 1


def test_pf_willow(tmp_path: Path) -> None:
    read = read_pf_willow(write_pf_willow(tmp_path), categories=("car", "duck"))
    assert [pair.category for pair in read.pairs] == ["car", "duck"]
    assert not read.problems
    assert read.pairs[0].source.path == "car(G)/6000.png"
    assert read.pairs[1].source.points([0, 9]).tolist() == [[1.5, 1.5], [28.5, 28.5]]


def test_ap10k(tmp_path: Path) -> None:
    read = read_ap10k(write_ap10k(tmp_path))
    assert not read.problems
    assert read.categories == ("fox",)
    assert len(read.pairs) == 6
    pair = read.pairs[0]
    assert pair.source.path == "JPEGImages/Canidae/fox/000000000000.jpg"
    assert pair.source.box == (4, 5, 54, 35)
    assert set(range(17)) - set(pair.ids) == {5, 6}  # each image hides one
    with pytest.raises(ValueError, match="no category wolf; it has fox"):
        read_ap10k(tmp_path / "ap-10k", categories=["wolf"])


def test_ap10k_pairs_are_made_of_the_release(tmp_path: Path) -> None:
    root = write_ap10k_release(tmp_path, {("Canidae", "fox"): 53, ("Canidae", "wolf"): 4, ("Felidae", "cat"): 3})
    read = {split: read_ap10k(root, split=split) for split in get_args(Ap10kSet)}
    assert not any(pairs.problems for pairs in read.values())
    test = read["test"]
    assert "pairs made here" in test.name
    assert {c: len(of(test, c)) for c in test.categories} == {"cat": 3, "fox": 435, "wolf": 6}
    assert min(p.source.path for p in of(test, "fox")) == "data/000000000024.jpg"  # the last 30 of 53
    pair = of(test, "cat")[0]
    assert (pair.name, pair.source.box) == ("000000000058-000000000059:cat", (1, 2, 37, 30))
    assert set(range(17)) - set(pair.ids) == {58 % 17, 59 % 17}
    assert len(read["val"].pairs) == 20 * 19 / 2
    assert len(read["trn"].pairs) == 3
    across = read["test_cross_species"]
    assert across.categories == ("Canidae",)
    assert len(across.pairs) == 30 * 4  # fewer than 900
    families = read["test_cross_family"]
    assert families.categories == ("Canidae-Felidae",)
    assert len({p.name for p in families.pairs}) == 30
    assert read_ap10k(root, split="test_cross_family") == families
    with pytest.raises(ValueError, match="no category bear; it has cat, fox, wolf"):
        read_ap10k(root, categories=["bear"])


def test_ap10k_release_says_what_it_lacks(tmp_path: Path) -> None:
    root = write_ap10k_release(tmp_path, {("Canidae", "fox"): 5})
    for file in sorted((root / "annotations").glob("*.json")):
        note = json.loads(file.read_text())
        for animal in note["annotations"]:
            if animal["image_id"] == 2:
                animal["keypoints"] = animal["keypoints"][:6]
            if animal["image_id"] == 3:
                animal["keypoints"] = [0] * 45 + [9, 9, 2] * 2  # too few of them to be of use
        file.write_text(json.dumps(note))
    (root / "data/000000000004.jpg").unlink()
    read = read_ap10k(root)
    assert [p.name for p in read.pairs] == ["000000000001-000000000005:fox"]
    what = [str(problem) for problem in read.problems]
    assert "has 6 keypoint numbers, expected 51" in what[0]
    assert sum("000000000004.jpg is missing" in text for text in what) == 2
    (root / "annotations/ap10k-train-split1.json").write_text('{"images": 3}')
    with pytest.raises(DatasetError, match=r"ap10k-train-split1\.json: annotations as COCO has them were expected"):
        read_ap10k(root)
    for file in (root / "annotations").iterdir():
        file.write_text('{"images": [], "annotations": [], "categories": []}')
    with pytest.raises(DatasetError, match="no two images that make a pair of the set val"):
        read_ap10k(root, split="val")


def test_tss_flow_leads_from_target_to_source(tmp_path: Path) -> None:
    read = read_tss(write_tss(tmp_path), subsets=("FG3DCar", "JODS", "PASCAL"))
    assert [str(problem) for problem in read.problems] == ["PASCAL: the subset's folder is missing"]
    assert [(item.name, item.category) for item in read.items] == [
        ("FG3DCar/Car_01/1to2", "car"), ("FG3DCar/Car_01/2to1", "car"),
        ("JODS/plane_2_5/1to2", "aeroplane"), ("JODS/plane_2_5/2to1", "aeroplane"),
    ]  # fmt: skip
    item = read.items[0]
    assert item.padded_size == (36, 48)
    flow, mask = item.flow(read.root), item.mask(read.root)
    assert flow.shape == (2, 36, 48)
    assert flow[:, 10, 47].tolist() == [-4, -2]  # padded by repetition
    assert int(mask.sum()) == 20 * 24
    assert tss_category("busd_3") == "bus"


def test_broken_flow_is_named(tmp_path: Path) -> None:
    root = write_tss(tmp_path)
    file = root / "JODS/plane_2_5/flow1.flo"
    whole = file.read_bytes()
    file.write_bytes(whole[:-8])
    with pytest.raises(ValueError, match=r"flow1.flo: cut off"):
        read_flo(file)
    file.write_bytes(b"PNG!" + whole)
    with pytest.raises(ValueError, match=r"flow1.flo: not a .flo file"):
        read_flo(file)
    (root / "JODS/plane_2_5/mask2.png").unlink()
    read = read_tss(root)
    assert "JODS/plane_2_5: mask2.png missing" in map(str, read.problems)
    assert {item.subset for item in read.items} == {"FG3DCar"}


@pytest.mark.parametrize("category", SPAIR_CATEGORIES)
def test_a_mirror_twice_is_no_mirror_and_groups_are_apart(category: str) -> None:
    table = table_of("spair", category)
    swapped = {"left": "right", "right": "left"}
    for i, name in table.names.items():
        partner = table.mirror.get(i, i)
        assert table.mirror.get(partner, partner) == i
        assert table.names[partner] == " ".join(swapped.get(word, word) for word in name.split())
    assert sum(map(len, table.groups)) == len(set().union(*table.groups))
    assert set().union(*table.groups) <= table.names.keys()
    assert len(set(table.names.values())) == len(table.names)


def test_groups_are_those_of_the_released_tables() -> None:
    """Reference, section 5.1: ear tips and horns have groups, eyes and nostrils have none."""

    def groups(category: str, benchmark: str = "spair") -> set[tuple[int, ...]]:
        return {tuple(sorted(group)) for group in table_of(benchmark, category).groups}

    assert groups("cat") == {(2, 3), (9, 10, 11, 12)}
    assert groups("cow") == {(2, 3), (9, 10, 11, 12), (15, 16, 17, 18), (19, 20)}
    assert (2, 3, 5, 6) in groups("bus")  # head and tail lights together
    assert groups("pottedplant") == {(0, 1, 2, 3), (4, 5), (6, 8)}
    assert (0, 1) not in groups("person")  # its eyes
    assert groups("fox", "ap-10k") == {(5, 8), (6, 9, 12, 15), (7, 10, 13, 16), (11, 14)}
    assert table_of("spair", "car").mirror[11] == 21  # right and left back wheel
    assert 11 not in table_of("spair", "bicycle").names


def test_keypoint_tables_come_from_files(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text("[cat]\nmirror = [[0, 1]]\ngroups = [[9, 10, 11]]\n")
    (tmp_path / "own.json").write_text(json.dumps({"cat": {"mirror": [[0, 1]], "groups": [[9, 10, 11]]}}))
    tables = read_keypoint_tables(tmp_path / "own.toml")
    assert tables == read_keypoint_tables(tmp_path / "own.json")
    assert table_of("spair", "cat", tables) == KeypointTable({0: 1, 1: 0}, (frozenset({9, 10, 11}),))
    assert table_of("spair", "dog", tables) == table_of("spair", "dog")
    assert table_of("ap-10k", "fox").mirror[7] == 10  # front paws
    with pytest.raises(ValueError, match="pf-pascal does not name its keypoints"):
        table_of("pf-pascal", "cat")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[cat]\nmirror = [[0, 1, 2]]", r"cat.mirror must be pairs of ids, got \[0, 1, 2\]"),
        ("[cat]\ngroups = [[3]]", "cat.groups must have two or more ids"),
        ("[cat]\ngroups = [[3, 4], [4, 5]]", "cat.groups names an id twice"),
        ("[cat]\ngroups = [[3, -4]]", "must hold ids"),
        ("[cat]\ngroup = [[3, 4]]", "cat must have mirror and groups"),
        ("cat = [", "own.toml: "),
        ("[cat]\nnames = [3]", "cat.names must be a list of names"),
        ("cat = 3", "cat must have mirror and groups, got 3"),
    ],
)
def test_wrong_keypoint_tables_are_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "own.toml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_keypoint_tables(tmp_path / "own.toml")
    with pytest.raises(ValueError, match="cannot be read"):
        read_keypoint_tables(tmp_path / "none.toml")


def test_everything_in_fg3dcar_is_a_car(tmp_path: Path) -> None:
    root = write_tss(tmp_path)
    (root / "FG3DCar/Car_01").rename(root / "FG3DCar/001_suv_bike")
    assert {item.category for item in read_tss(root, subsets=["FG3DCar"]).items} == {"car"}
    assert tss_category("bike_3", "JODS") == "bicycle"


@pytest.mark.parametrize("name", ["../outside.jpg", "/etc/passwd", "a/../../../outside.jpg"])
def test_names_in_a_data_set_never_lead_out_of_its_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "outside.jpg").write_bytes(b"secret")
    spair = write_spair(tmp_path)
    file = sorted((spair / "PairAnnotation/test").glob("*:cat.json"))[0]
    file.write_text(json.dumps({**json.loads(file.read_text()), "src_imname": f"../../../{name}"}))
    pascal = write_pf_pascal(tmp_path)
    table = pascal / "test_pairs_pf_pascal.csv"
    head, first, *rest = table.read_text().splitlines()
    table.write_text("\n".join([head, ",".join([name, *first.split(",")[1:]]), *rest]) + "\n")
    for read in (read_spair(spair, categories=["cat"]), read_pf_pascal(pascal)):
        assert any("leads out of the data set's folder" in str(problem) for problem in read.problems)
        assert all(name not in path for path in images_of(read))


@pytest.mark.parametrize(
    "damaged",
    [b"", b"{", b"[" * 100_000, b"\xff\xfe\x00", b"[]", b'{"category": "cat"}', b'{"category": 3, "kps_ids": 4}'],
)
def test_damaged_annotations_are_named_and_the_rest_counts(tmp_path: Path, damaged: bytes) -> None:
    root = write_spair(tmp_path)
    pair = sorted((root / "PairAnnotation/test").glob("*:cat.json"))[0]
    image = sorted((root / "ImageAnnotation/bus").glob("*.json"))[0]
    pair.write_bytes(damaged)
    image.write_bytes(damaged)
    for keypoints, left in (("pair", 11), ("image", 11 - 4)):
        read = read_spair(root, categories=TWO, keypoints=keypoints)  # type: ignore[arg-type]
        assert len(read.pairs) == left
        assert any(problem.where == pair.name for problem in read.problems)
        assert all("\n" not in str(problem) for problem in read.problems)


def test_damaged_tables_and_flows_are_named(tmp_path: Path) -> None:
    root = write_pf_pascal(tmp_path)
    (root / "test_pairs_pf_pascal.csv").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(DatasetError, match=r"test_pairs_pf_pascal\.csv: cannot be read as text"):
        read_pf_pascal(root)
    tss = write_tss(tmp_path)
    (tss / "JODS/plane_2_5/mask1.png").write_bytes(b"\x89PNG no picture")
    (tss / "JODS/plane_2_5/flow2.flo").write_bytes(
        np.float32(202021.25).tobytes() + np.array([-1, -1], "<i4").tobytes()
    )
    for item in read_tss(tss, subsets=["JODS"]).items:
        with pytest.raises(ValueError, match=r"mask1\.png: is not an image|flow2\.flo: cut off"):
            item.flow(tss), item.mask(tss)
