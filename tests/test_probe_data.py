"""Labelled images and their splits."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from diffrep.eval.probe_data import (
    SceneImages,
    aircraft,
    cars,
    cub,
    digit_images,
    dogs,
    flowers,
    from_list,
    imagenet,
    imagenet_subset,
    scene_images,
)
from diffrep.heads.probes import DataError, LabelledImages, balance, read_labelled, split_rows
from diffrep.images import ImageError, decode_image
from diffrep.store.sources import find_sources

from .probe_images import COLOURS, csv_table, image_folder, picture, png, shard


def labels_of(data: LabelledImages) -> dict[str, str]:
    return {image.name: data.classes[label] for image, label in zip(data.images, data.labels, strict=True)}


def first_pixels(data: LabelledImages) -> dict[str, tuple[int, ...]]:
    """The mean colour of the first image of each class."""
    found = {}
    for image, label in zip(data.images, data.labels, strict=True):
        pixels = np.asarray(decode_image(image.read(), image.name))
        found.setdefault(data.classes[label], tuple(pixels.mean((0, 1)).round().astype(int)))
    return found


def test_every_source_gives_the_same_images(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "folder", 4)
    rows = [{"path": f"folder/{c}/{n:02d}.png", "label": c} for c in COLOURS for n in range(4)]
    sources = {
        "folder": folder,
        "table": csv_table(tmp_path / "table.csv", rows),
        "shard": shard(tmp_path / "shard.tar", as_json=True),
        "arrow": hugging_face_set(tmp_path / "arrow"),
    }
    pixels = {}
    for name, source in sources.items():
        data = read_labelled(source)
        assert data.classes == tuple(sorted(COLOURS))
        assert set(data.counts().values()) == {4}
        pixels[name] = first_pixels(data)
    assert all(found == pixels["folder"] for found in pixels.values())
    numbered = read_labelled(shard(tmp_path / "numbered.tar"))
    assert numbered.classes == ("0", "1", "2")


def hugging_face_set(folder: Path, per_class: int = 4) -> Path:
    """What `datasets.Dataset.save_to_disk` writes, for a column of images and one of class labels."""
    import pyarrow as pa

    folder.mkdir()
    names = sorted(COLOURS)
    labels = [i for i in range(len(names)) for _ in range(per_class)]
    images = [{"bytes": png(picture(names[i], k % per_class)), "path": None} for k, i in enumerate(labels)]
    info = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}, "image": {"_type": "Image"}}}}
    table = pa.table(
        {
            "image": pa.array(images, pa.struct({"bytes": pa.binary(), "path": pa.string()})),
            "label": pa.array(labels, pa.int64()),
        }
    ).replace_schema_metadata({"huggingface": json.dumps(info)})
    with pa.ipc.new_stream(folder / "data-00000-of-00001.arrow", table.schema) as stream:
        stream.write_table(table)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    return folder


class FakeDataset:
    """The part of `datasets.Dataset` that is used: an Arrow table by ``with_format("arrow")[:]``."""

    def __init__(self, folder: Path, rows: slice) -> None:
        import pyarrow as pa

        with pa.memory_map(str(folder / "data-00000-of-00001.arrow")) as opened:
            self.table = pa.ipc.open_stream(opened).read_all().slice(rows.start or 0, rows.stop)

    def with_format(self, kind: str) -> FakeDataset:
        assert kind == "arrow"
        return self

    def __getitem__(self, rows: slice) -> object:
        assert rows == slice(None)
        return self.table


def test_a_data_set_in_memory_is_read_like_one_on_disk(tmp_path: Path) -> None:
    saved = hugging_face_set(tmp_path / "arrow")
    whole = read_labelled(FakeDataset(saved, slice(None)))
    assert first_pixels(whole) == first_pixels(read_labelled(saved))
    split = {"train": FakeDataset(saved, slice(None)), "test": FakeDataset(saved, slice(0, 5))}
    assert Counter(read_labelled(split).parts or ()) == {"train": 12, "test": 5}
    with pytest.raises(DataError, match=r"come from a path or a datasets\.Dataset, got int"):
        read_labelled(5)
    with pytest.raises(DataError, match="the split 'odd' is none of train, val, test"):
        read_labelled({"odd": split["train"]})


def test_a_parquet_file_is_read_and_numbers_sort_as_numbers(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = [{"bytes": png(picture("red", n)), "path": None} for n in range(12)]
    table = pa.table({"image": images, "label": [str(n) for n in range(12)]})
    pq.write_table(table, tmp_path / "set.parquet")
    assert read_labelled(tmp_path / "set.parquet").classes == tuple(str(n) for n in range(12))
    signs = ["\u00b2", "--1", "10"] * 4  # digits, but no numbers
    pq.write_table(table.set_column(1, "label", pa.array(signs)), tmp_path / "signs.parquet")
    assert read_labelled(tmp_path / "signs.parquet").classes == ("--1", "10", "\u00b2")


@pytest.mark.parametrize(
    ("note", "message"),
    [
        (b"[1]", "the label of red000 cannot be read .its .json must hold an object, found list"),
        (b"null", "must hold an object, found NoneType"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"label": "\xff"}', "the label of red000 cannot be read"),
        (b'{"label": {}}', "red000 has no label"),
        (b"{}", "red000 has no label"),
    ],
)
def test_a_damaged_note_in_a_shard_is_named(note: bytes, message: str, tmp_path: Path) -> None:
    content = {"red000.png": png(picture("red", 0)), "red000.json": note}
    with tarfile.open(tmp_path / "bad.tar", "w") as archive:
        for name, value in content.items():
            member = tarfile.TarInfo(name)
            member.size = len(value)
            archive.addfile(member, io.BytesIO(value))
    with pytest.raises(DataError, match=f"bad.tar: .*{message}"):
        read_labelled(tmp_path / "bad.tar")


def test_damaged_tables_and_data_sets_are_named(tmp_path: Path) -> None:
    (tmp_path / "latin.csv").write_bytes(b"path,label\na.png,\xff\n")
    (tmp_path / "set.parquet").write_bytes(b"no parquet")
    saved = hugging_face_set(tmp_path / "arrow")
    (saved / "data-00000-of-00001.arrow").write_bytes(b"no arrow")
    (tmp_path / "dict").mkdir()
    (tmp_path / "dict" / "dataset_dict.json").write_text('{"splits": [1]}')
    for name in ("latin.csv", "set.parquet", "arrow", "dict", "missing.csv", "missing.parquet"):
        with pytest.raises(DataError, match=f"{name}: cannot be read"):
            read_labelled(tmp_path / name)


def test_a_split_is_stratified_and_does_not_depend_on_the_order_of_files(tmp_path: Path) -> None:
    data = read_labelled(image_folder(tmp_path, 10))
    split = split_rows(data)
    assert Counter(data.labels[row] for row in split.train) == {0: 6, 1: 6, 2: 6}
    assert Counter(data.labels[row] for row in split.val) == {0: 2, 1: 2, 2: 2}
    assert set(split.train) | set(split.val) | set(split.test) == set(range(len(data)))
    assert len(split.train) + len(split.val) + len(split.test) == len(data)
    backwards = LabelledImages(data.name, data.images[::-1], data.labels[::-1], data.classes)
    again = split_rows(backwards)
    assert {data.images[r].name for r in split.val} == {backwards.images[r].name for r in again.val}
    assert split_rows(data, seed=1) != split
    assert "green" in balance(data, split)


def test_groups_stay_together(tmp_path: Path) -> None:
    image_folder(tmp_path / "folder", 12)
    rows = [
        {"path": f"folder/{c}/{n:02d}.png", "label": c, "owner": f"{c}{n // 3}"} for c in COLOURS for n in range(12)
    ]
    data = read_labelled(csv_table(tmp_path / "table.csv", rows), group="owner")
    assert data.groups is not None
    split = split_rows(data)
    owners = [{data.groups[row] for row in part} for part in (split.train, split.val, split.test)]
    assert all(owners)
    assert not owners[0] & owners[1]
    assert not owners[0] & owners[2]
    assert not owners[1] & owners[2]
    too_few = [row | {"owner": row["label"]} for row in rows]
    with pytest.raises(DataError, match="class 'blue' has 1 group; train and val and test need one each"):
        split_rows(read_labelled(csv_table(tmp_path / "few.csv", too_few), group="owner"))


def test_named_parts_are_kept(tmp_path: Path) -> None:
    data = read_labelled(image_folder(tmp_path / "three", 3, ("train", "val", "test")))
    split = split_rows(data)
    assert data.parts is not None
    assert {data.parts[row] for row in split.val} == {"val"}
    two = read_labelled(image_folder(tmp_path / "two", 8, ("train", "validation")))
    split = split_rows(two)
    assert two.parts is not None
    assert len(split.test) == 24  # all of the part that numbers are reported on
    assert {two.parts[row] for row in (*split.train, *split.val)} == {"train"}
    assert len(split.val) == 6


def test_images_beside_the_folders_of_classes_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = image_folder(tmp_path / "folder", 3)
    rows = len(read_labelled(folder).images)
    assert not caplog.messages
    picture("red", 0).save(folder / "._hidden.png")
    picture("red", 0).save(folder / "lost.png")
    assert len(read_labelled(folder).images) == rows
    assert caplog.messages == [f"{folder}: passed over 1 image beside the folders of classes: lost.png"]


def test_bad_data_is_refused_in_one_line(tmp_path: Path) -> None:
    def table(name: str, rows: list[dict[str, str]]) -> Path:
        return csv_table(tmp_path / f"{name}.csv", rows)

    folder = image_folder(tmp_path / "folder", 5)
    (folder / "yellow").mkdir()
    with pytest.raises(DataError, match="no images of yellow; each folder is a class"):
        read_labelled(folder)
    picture("red", 0).save(folder / "yellow" / "0.png")
    with pytest.raises(DataError, match="class 'yellow' has 1 image; train and val and test need one each"):
        split_rows(read_labelled(folder))
    disagree = [{"path": "a.png", "label": "cat"}, {"path": "a.png", "label": "dog"}]
    with pytest.raises(DataError, match=r"a\.png has two labels that disagree, 'cat' and 'dog'"):
        read_labelled(table("disagree", disagree))
    with pytest.raises(DataError, match="at least two classes apart, found only cat"):
        read_labelled(table("one", disagree[:1]))
    parts = [{"path": f"{n}.png", "label": "ab"[n % 2], "split": "train"} for n in range(8)]
    parts += [{"path": "8.png", "label": "a", "split": "sometimes"}]
    with pytest.raises(DataError, match="line 10: the split 'sometimes' is none of train, val, test"):
        read_labelled(table("split", parts))
    with pytest.raises(DataError, match="the test split is empty"):
        split_rows(read_labelled(table("untested", parts[:8])))
    with pytest.raises(DataError, match="has no column label, only path, kind"):
        read_labelled(table("columns", [{"path": "a.png", "kind": "b"}]))
    unlike = image_folder(tmp_path / "unlike", 2, ("train", "val"))
    (unlike / "val" / "red").rename(unlike / "val" / "orange")
    with pytest.raises(DataError, match="do not have the same classes; they differ in orange, red"):
        read_labelled(unlike)
    with pytest.raises(DataError, match="no such folder"):
        read_labelled(tmp_path / "nowhere")
    broken = tmp_path / "broken.tar"
    broken.write_bytes(b"no archive" * 100)
    with pytest.raises(DataError, match="is not an uncompressed webdataset shard"):
        read_labelled(broken)
    zero = table("zero", [{"path": "a\0.png", "label": "a"}, {"path": "b.png", "label": "b"}])
    if sys.version_info >= (3, 11):  # csv read no zero bytes before
        assert read_labelled(zero).images[0].size == -1
    whole = shard(tmp_path / "whole.tar").read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as archive:
        last = archive.getmembers()[-1].offset
    for damaged in (whole[: last + 100], whole[:last] + b"x" * 512 + whole[last + 512 :]):
        broken.write_bytes(damaged)
        with pytest.raises(DataError, match=rf"damaged or cut off after {last:,} bytes"):
            read_labelled(broken)
        with pytest.raises(ImageError, match=rf"damaged or cut off after {last:,} bytes"):
            find_sources([broken])


def test_scenes_and_digits_are_files_in_a_table(tmp_path: Path) -> None:
    settings = SceneImages(train=4, val=2, test=2, size=24, categories=("mug", "dog"))
    data = scene_images(tmp_path / "scenes", settings=settings, progress=False)
    assert data.classes == ("dog", "mug")
    assert data.parts == ("train",) * 4 + ("val",) * 2 + ("test",) * 2
    assert decode_image(data.images[0].read(), "scene").size == (24, 24)
    assert len({image.read() for image in data.images}) == 8
    with pytest.raises(ValueError, match="scenes have no label 'weight'"):
        scene_images(tmp_path / "scenes", "weight", settings)
    with pytest.raises(ValueError, match="holds scenes of other settings"):
        scene_images(tmp_path / "scenes", settings=SceneImages())
    digits = digit_images(tmp_path / "digits")
    assert len(digits) == 1797
    assert digits.classes == tuple("0123456789")


def touch(folder: Path, names: list[str]) -> None:
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"")


def test_released_layouts(tmp_path: Path) -> None:
    plane = tmp_path / "aircraft" / "data"
    touch(plane, ["images/1.jpg", "images/2.jpg", "images/3.jpg"])
    (plane / "images_variant_trainval.txt").write_text("1 707-320\n2 A340-200\n")
    (plane / "images_variant_test.txt").write_text("3 A340-200\n")
    data = aircraft(tmp_path / "aircraft")
    assert labels_of(data) == {f"data/images/{n}.jpg": c for n, c in ((1, "707-320"), (2, "A340-200"), (3, "A340-200"))}
    assert data.parts == ("train", "train", "test")

    bird = tmp_path / "cub"
    bird.mkdir()
    (bird / "images.txt").write_text("1 001.Albatross/a.jpg\n2 002.Auk/b.jpg\n")
    (bird / "image_class_labels.txt").write_text("1 1\n2 2\n")
    (bird / "train_test_split.txt").write_text("1 1\n2 0\n")
    (bird / "classes.txt").write_text("1 001.Albatross\n2 002.Auk\n")
    data = cub(bird)
    assert data.classes == ("1 001.Albatross", "2 002.Auk")
    assert data.parts == ("train", "test")

    dog = tmp_path / "dogs"
    dog.mkdir()
    for part, names in (("train", ["n1-pug/a.jpg", "n2-corgi/b.jpg"]), ("test", ["n1-pug/c.jpg"])):
        cells = np.empty((len(names), 1), dtype=object)
        cells[:, 0] = names
        savemat(dog / f"{part}_list.mat", {"file_list": cells})
    assert labels_of(dogs(dog)) == {
        "Images/n1-pug/a.jpg": "n1-pug", "Images/n2-corgi/b.jpg": "n2-corgi", "Images/n1-pug/c.jpg": "n1-pug"
    }  # fmt: skip

    car = tmp_path / "cars"
    (car / "devkit").mkdir(parents=True)
    for file, names, classes in (
        ("devkit/cars_train_annos.mat", ["1.jpg", "2.jpg"], [7, 12]),
        ("cars_test_annos_withlabels.mat", ["1.jpg"], [12]),
    ):
        kind = np.dtype([("fname", object), ("class", object)])
        savemat(car / file, {"annotations": np.array(list(zip(names, classes, strict=True)), dtype=kind)[None]})
    assert labels_of(cars(car)) == {"cars_train/1.jpg": "007", "cars_train/2.jpg": "012", "cars_test/1.jpg": "012"}

    flower = tmp_path / "flowers"
    flower.mkdir()
    savemat(flower / "imagelabels.mat", {"labels": np.array([[5, 6, 5]])})
    savemat(flower / "setid.mat", {"trnid": [[1]], "valid": [[2]], "tstid": [[3]]})
    data = flowers(flower)
    assert data.parts == ("train", "train", "test")
    assert labels_of(data)["jpg/image_00003.jpg"] == "005"
    with pytest.raises(DataError, match="is missing; is this the folder that the archive unpacks to"):
        cub(flower)


def test_imagenet_and_its_subsets(tmp_path: Path) -> None:
    for wnid in ("n01", "n02", "n03"):
        touch(tmp_path, [f"train/{wnid}/{wnid}_{k}.JPEG" for k in range(3)] + [f"val/{wnid}/v_{wnid}.JPEG"])
    data = imagenet(tmp_path)
    assert len(data) == 12
    assert data.parts is not None
    assert data.parts.count("test") == 3
    (tmp_path / "subset.txt").write_text("n01 tench\nn03 shark\n")
    assert imagenet_subset(tmp_path, tmp_path / "subset.txt").classes == ("n01", "n03")
    (tmp_path / "few.txt").write_text("n01_0.JPEG\nn02_1.JPEG\nn03_2.JPEG\n")
    few = from_list(tmp_path, tmp_path / "few.txt")
    assert few.parts is not None
    assert (few.parts.count("train"), few.parts.count("test")) == (3, 3)
    (tmp_path / "subset.txt").write_text("n01\nn99\n")
    with pytest.raises(DataError, match="has no class n99 of the subset"):
        imagenet_subset(tmp_path, tmp_path / "subset.txt")
