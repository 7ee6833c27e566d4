from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from diffrep.backbones import Backbone, BackboneError, Conditions, load_backbone
from diffrep.features import ExtractConfig, extract_each
from diffrep.images import ImageError, Sizing
from diffrep.store import (
    BulkConfig,
    Extracted,
    Keep,
    Store,
    StoreError,
    StoreWriter,
    extract_store,
    open_store,
    write_store,
)
from diffrep.store.extraction import ShardMaker
from diffrep.store.sources import find_sources, read_image

CONFIG = ExtractConfig(taps=("layer.1",), sizing=Sizing("squash", 64), batch_size=4)
HERE = BulkConfig(workers=0, shard_images=4)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven images and one that is none."""
    folder = tmp_path_factory.mktemp("images")
    paint(folder, range(11))
    (folder / "05-broken.png").write_bytes(b"nothing")
    return folder


def paint(folder: Path, numbers: Sequence[int]) -> None:
    for number in numbers:
        noise = np.random.default_rng(number).integers(0, 256, (6 + number % 3, 7, 3), dtype=np.uint8)
        smooth = Image.fromarray(noise).resize((48, 40 + 8 * (number % 2)), Image.Resampling.BICUBIC)
        smooth.save(folder / f"{number:02d}.png")


@pytest.fixture(scope="module")
def backbone(vit_folder: Path) -> Backbone:
    return load_backbone(str(vit_folder))


def run(images: Path | Sequence[str], folder: Path, backbone: Backbone, **settings: object) -> Extracted:
    config, keep, bulk = settings.pop("config", CONFIG), settings.pop("keep", None), settings.pop("bulk", HERE)
    inputs = [images] if isinstance(images, Path) else images
    return extract_store(inputs, folder, backbone, config, keep, bulk, **settings)  # type: ignore[arg-type]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def whole(images: Path, backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stores") / "whole"
    run(images, folder, backbone)
    return folder


def test_a_store_shows_its_images_and_gives_its_numbers(whole: Path, images: Path, backbone: Backbone) -> None:
    store = open_store(whole)
    frame = store.to_pandas()
    assert list(frame.columns) == ["image", "height", "width"]
    assert list(frame.image) == list(store.names)
    with Image.open(images / "03.png") as picture:
        assert picture.size == (frame.width[3], frame.height[3])
    shown = store._repr_html_()
    assert repr(store) in shown.replace("&#x27;", "'")
    assert "<td>07.png</td>" in shown
    assert "<td>08.png</td>" not in shown
    (tap,) = store.taps
    numbers = store.numpy()
    assert numbers.shape[0] == len(store)
    assert np.array_equal(numbers[4], store[4].features[tap].numpy())
    with pytest.raises(BackboneError, match="is no backbone but a store of features, which open_store"):
        load_backbone(whole)


@pytest.mark.parametrize("kind", ["maps", "pooled", "points"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_what_is_read_back_is_what_was_extracted(
    kind: str, dtype: str, images: Path, backbone: Backbone, tmp_path: Path
) -> None:
    config = ExtractConfig(taps=("layer.0", "layer.1"), sizing=Sizing("pad", 64, multiple=8), batch_size=4)
    keep = Keep(kind=kind, dtype=dtype, points="grid:3")  # type: ignore[arg-type]
    done = run(images, tmp_path / "s", backbone, config=config, keep=keep)
    assert (done.images, done.before) == (11, 0)
    store = open_store(tmp_path / "s")
    assert (len(store), store.taps, store.kind) == (11, ("layer.0", "layer.1"), kind)
    assert store.names == tuple(f"{number:02d}.png" for number in range(11))
    expected = list(extract_each(backbone, [images / name for name in store.names], config))
    rounding = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}[dtype]
    for number, maps in enumerate(expected):
        stored = store[number]
        assert stored.placement == maps.placements[0]
        for tap in store.taps:
            values = stored.features[tap]
            assert values.dtype == getattr(torch, dtype)
            if kind == "maps":
                wanted = maps.maps[tap][0]
                assert store.maps(number).grids == maps.grids
            elif kind == "pooled":
                wanted = maps.maps[tap][0][:, maps.content_mask(tap)].mean(1)
            else:
                assert stored.points is not None
                height, width = maps.placements[0].image_size
                assert stored.points[4].tolist() == [(width - 1) / 2, (height - 1) / 2]
                wanted = maps.at(tap, stored.points[None])[0]
            torch.testing.assert_close(values.float(), wanted, atol=rounding, rtol=rounding)
    assert store.verify() == []


def test_a_store_can_be_read_without_diffrep(whole: Path) -> None:
    manifest = json.loads((whole / "manifest.json").read_text())
    assert (manifest["format"], manifest["version"]) == ("diffrep-store", 1)
    features = manifest["features"]
    assert (features["taps"], features["seed"], len(features["weights_sha256"])) == (["layer.1"], 0, 64)
    assert manifest["environments"][0]["versions"]["torch"] == torch.__version__.partition("+")[0]
    store, names, rows = open_store(whole), [], []
    for shard in manifest["shards"]:
        names += json.loads((whole / "shards" / f"{shard['name']}.json").read_text())["images"]["name"]
        with safe_open(whole / "shards" / f"{shard['name']}.safetensors", "pt") as file:
            rows.append(file.get_tensor("layer.1"))
    assert tuple(names) == store.names
    assert torch.equal(torch.cat(rows), torch.stack([store[name].features["layer.1"] for name in names]))


def test_batches_the_dataset_and_the_table_agree(whole: Path) -> None:
    store = open_store(whole)
    batches = list(store.batches(3))
    assert [number for numbers, _ in batches for number in numbers] == list(range(11))
    every = torch.cat([batch["layer.1"] for _, batch in batches])
    loader = torch.utils.data.DataLoader(store.dataset(target=lambda name: int(name[:2])), batch_size=4)
    values, targets = (torch.cat(list(column)) for column in zip(*loader, strict=True))
    assert torch.equal(values, every)
    assert targets.tolist() == list(range(11))
    table = store.table()
    assert table["image"].to_pylist() == list(store.names)
    assert np.array_equal(np.array(table["features"].to_pylist(), np.float16), every.numpy())
    runs = list(store.vectors())
    assert torch.equal(torch.cat([r.values for r in runs]), every.float())


def test_whole_maps_of_several_sizes(images: Path, backbone: Backbone, tmp_path: Path) -> None:
    config = ExtractConfig(taps=("layer.1",), sizing=Sizing("fit", 64, multiple=8), batch_size=4)
    run(images, tmp_path / "s", backbone, config=config, keep=Keep(kind="maps"))
    store = open_store(tmp_path / "s")
    shapes = {tuple(batch["layer.1"].shape[-2:]) for _, batch in store.batches(4)}
    assert len(shapes) == 2
    patches = list(store.vectors(level="patch", size=100))
    owners = torch.cat([r.images for r in patches])
    assert owners.unique().tolist() == list(range(11))
    with pytest.raises(StoreError, match="differ in size"):
        store.table()
    first = store.maps(0)
    inside = first.content_mask("layer.1")
    got = torch.cat([r.values for r in patches])[owners == 0]
    assert torch.equal(got, first.maps["layer.1"][0].permute(1, 2, 0)[inside].float())
    points = torch.cat([r.points for r in patches if r.points is not None])[owners == 0]
    assert torch.equal(points, first.cell_centres("layer.1")[inside])


def test_unusable_images_are_set_apart_with_the_reason(whole: Path) -> None:
    ((name, reason),) = open_store(whole).quarantined
    assert name == "05-broken.png"
    assert reason.startswith("is not an image that can be read")


def test_names_numbers_and_taps_that_are_not_there(whole: Path) -> None:
    store = open_store(whole)
    with pytest.raises(KeyError, match=r"nothing\.png"):
        store["nothing.png"]
    with pytest.raises(IndexError, match="image 11 of a store of 11"):
        store[11]
    with pytest.raises(StoreError, match=r"no tap 'up\.1'; it has layer\.1"):
        store.dataset("up.1")
    with pytest.raises(StoreError, match="no vectors of level 'patch'"):
        next(store.vectors(level="patch"))
    with pytest.raises(StoreError, match="is no store of features"):
        open_store(whole / "shards")


def test_workers_give_the_bytes_of_one_process(images: Path, backbone: Backbone, whole: Path, tmp_path: Path) -> None:
    run(images, tmp_path / "s", backbone, bulk=BulkConfig(workers=2, shard_images=4))
    assert contents(tmp_path / "s") == contents(whole)


def test_a_run_that_ends_early_goes_on(
    images: Path, backbone: Backbone, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = StoreWriter.save

    def dies(self: StoreWriter, builder: object, number: int) -> object:
        entry = save(self, builder, number)  # type: ignore[arg-type]
        if number == 2:
            raise KeyboardInterrupt  # the shard's files are there, the manifest does not list them
        return entry

    monkeypatch.setattr(StoreWriter, "save", dies)
    with pytest.raises(KeyboardInterrupt):
        run(images, tmp_path / "s", backbone)
    monkeypatch.undo()
    assert len(open_store(tmp_path / "s")) == 8 - 1  # two whole shards, with one image set apart
    assert run(images, tmp_path / "s", backbone).before == 7
    assert contents(tmp_path / "s") == contents(whole)
    again = run(images, tmp_path / "s", backbone)
    assert (again.images, again.before) == (0, 11)
    assert contents(tmp_path / "s") == contents(whole)


def _extract_in_child(images: str, folder: str, backbone: str, workers: int) -> None:
    torch.set_num_threads(1)
    extract_store([images], folder, backbone, CONFIG, None, BulkConfig(workers=workers, shard_images=4))


@pytest.mark.slow
def test_twenty_kills_lose_and_double_nothing(vit_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    paint(tmp_path / "images", range(32))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["diffrep.store", "timm", "tests.test_store"])
    draws, kills, finished, attempt = random.Random(0), 0, 0, 0
    reached: set[int] = set()

    def start(folder: Path, workers: int) -> multiprocessing.process.BaseProcess:
        child = context.Process(
            target=_extract_in_child, args=(str(tmp_path / "images"), str(folder), str(vit_folder), workers)
        )
        child.start()
        return child

    start(tmp_path / "warm", 0).join()
    begun = time.monotonic()
    start(tmp_path / "whole", 0).join()
    length = time.monotonic() - begun
    expected = contents(tmp_path / "whole")
    assert len(open_store(tmp_path / "whole")) == 32
    while kills < 20 or finished == 0 or not reached - {0, 32}:  # some of them in the middle
        folder = tmp_path / f"killed{finished}"
        attempt += 1
        child = start(folder, workers=attempt % 2)
        # all moments of a run, and enough runs that get further than the one before
        child.join(None if kills >= 20 and reached - {0, 32} else draws.uniform(0, 1.2 * length))
        if child.is_alive():
            child.kill()
            child.join()
            kills += 1
            length *= 1.02  # should the machine have become slower than it was
            if (folder / "manifest.json").exists():
                names = open_store(folder).names
                assert len(set(names)) == len(names)
                reached.add(len(names))
        else:
            assert child.exitcode == 0
            assert contents(folder) == expected
            finished += 1
    assert kills >= 20


def test_new_images_are_appended(images: Path, backbone: Backbone, tmp_path: Path) -> None:
    more = tmp_path / "images"
    shutil.copytree(images, more)
    run(more, tmp_path / "s", backbone)
    before = contents(tmp_path / "s" / "shards")
    paint(more, [11, 12])
    done = run(more, tmp_path / "s", backbone)
    assert (done.images, done.before) == (2, 11)
    assert open_store(tmp_path / "s").names[-2:] == ("11.png", "12.png")
    assert before.items() <= contents(tmp_path / "s" / "shards").items()


def test_changed_images_are_named_and_nothing_is_lost(images: Path, backbone: Backbone, tmp_path: Path) -> None:
    mine = tmp_path / "images"
    shutil.copytree(images, mine)
    run(mine, tmp_path / "s", backbone)
    before = contents(tmp_path / "s")
    (mine / "03.png").touch()  # another time, the same bytes: no change
    assert run(mine, tmp_path / "s", backbone).images == 0
    shutil.copy(mine / "04.png", mine / "03.png")
    with pytest.raises(StoreError, match=r"1 of the images have changed since they were extracted, first 03\.png"):
        run(mine, tmp_path / "s", backbone)
    kept = run(mine, tmp_path / "s", backbone, bulk=BulkConfig(workers=0, shard_images=4, changed="keep"))
    assert kept.images == 0
    assert contents(tmp_path / "s") == before
    run(mine, tmp_path / "s", backbone, bulk=BulkConfig(workers=0, shard_images=4, changed="update"))
    store = open_store(tmp_path / "s")
    assert sorted(store.names) == [f"{number:02d}.png" for number in range(11)]
    assert store.files[3].sha256 == store.files[4].sha256
    torch.testing.assert_close(store[3].features["layer.1"], store[4].features["layer.1"], atol=1e-3, rtol=1e-3)
    assert store.verify() == []


@pytest.mark.parametrize("harm", ["truncated", "missing", "records"])
def test_damaged_shards_are_named_and_made_again(
    harm: str, images: Path, backbone: Backbone, whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "s"
    shutil.copytree(whole, folder)
    file = sorted((folder / "shards").glob("000001-*.json" if harm == "records" else "000001-*.safetensors"))[0]
    if harm == "truncated":
        os.truncate(file, 100)
    else:
        file.unlink()
    with pytest.raises(StoreError, match=f"{file.name}: is {'truncated' if harm == 'truncated' else 'missing'}"):
        open_store(folder)
    done = run(images, folder, backbone)
    assert file.name in done.notes[0]
    assert contents(folder) == contents(whole)


def test_changed_bytes_of_a_shard_are_found_when_asked_for(
    images: Path, backbone: Backbone, whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "s"
    shutil.copytree(whole, folder)
    file = sorted((folder / "shards").glob("000001-*.safetensors"))[0]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    (wrong,) = open_store(folder).verify()
    assert f"{file.name}: its bytes have changed" in wrong
    run(images, folder, backbone, bulk=BulkConfig(workers=0, shard_images=4, verify=True))
    assert contents(folder) == contents(whole)


def test_other_settings_weights_and_folders_are_refused(
    images: Path, backbone: Backbone, whole: Path, tmp_path: Path, vit_folder: Path
) -> None:
    other = load_backbone(str(vit_folder))
    next(other.network.parameters()).data.add_(1e-3)
    other_seed = ExtractConfig(taps=("layer.1",), sizing=Sizing("squash", 64), batch_size=4, seed=1)
    for network, config, keep, found in (
        (other, CONFIG, None, "weights_sha256 .* against"),
        (backbone, other_seed, None, "seed 0 against 1"),
        (backbone, CONFIG, Keep(kind="maps"), "keep .* against"),
    ):
        with pytest.raises(StoreError, match=f"was made otherwise \\({found}"):
            run(images, whole, network, config=config, keep=keep)
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="is neither empty nor a store"):
        run(images, tmp_path, backbone)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("part", ["shards", "manifest.json", ".lock"])
def test_no_link_in_a_store_is_followed(
    part: str, images: Path, backbone: Backbone, whole: Path, tmp_path: Path
) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    for name in ("precious.txt", "b.json", "000000-0123456789ab.json"):
        (victim / name).write_text("precious")
    shutil.copytree(whole, tmp_path / "s")
    if part == "shards":
        shutil.rmtree(tmp_path / "s/shards")
        (tmp_path / "s/shards").symlink_to(victim)
    else:
        (tmp_path / "s" / part).unlink(missing_ok=True)
        (tmp_path / "s" / part).symlink_to(victim / "b.json")
    with pytest.raises(StoreError, match=rf"s/{re.escape(part)}: "):
        run(images, tmp_path / "s", backbone)
    assert contents(victim) == dict.fromkeys(contents(victim), b"precious")
    assert len(contents(victim)) == 3


def test_only_files_of_a_stores_own_naming_are_removed(
    images: Path, backbone: Backbone, whole: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole, tmp_path / "s")
    shards = tmp_path / "s/shards"
    victim = tmp_path / "victim.txt"
    victim.write_text("precious")
    for name in ("notes.txt", "b.json", "000000-0123456789ab.json", ".000009.999999999.partial"):
        (shards / name).write_text("x")
    for number in range(3):  # under the very names that this process will write
        (shards / f".{number:06d}.{os.getpid()}.partial.safetensors").symlink_to(victim)
    run(images, tmp_path / "s", backbone)
    assert (shards / "notes.txt").exists()
    assert (shards / "b.json").exists()
    assert not (shards / "000000-0123456789ab.json").exists()
    assert not (shards / ".000009.999999999.partial").exists()
    assert victim.read_text() == "precious"


DAMAGES = {
    "deep": "[" * 100_000,
    "list": "[]",
    "binary": b"\xff\xfe\x00",
    "separator": ("shards", 0, "name", "../000000-0123456789ab"),
    "absolute": ("shards", 0, "name", "/tmp/x"),
    "number": ("shards", 0, "name", 5),
    "negative": ("shards", 0, "bytes", -1),
    "text": ("shards", 0, "images", "many"),
    "root": ("root", 7),
    "taps": ("features", "taps", "up.1"),
    "features": ("features", []),
    "keep": ("keep", "kind", ["maps"]),
    "shards": ("shards", {"a": 1}),
    "size": ("shard_images", 0),
    "version": ("version", {"a": []}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_manifests_of_strangers_are_refused_in_a_line(
    damage: str, images: Path, backbone: Backbone, whole: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole, tmp_path / "s")
    file, change = tmp_path / "s/manifest.json", DAMAGES[damage]
    if isinstance(change, tuple):
        manifest = place = json.loads(file.read_text())
        for key in change[:-2]:
            place = place[key]
        place[change[-2]] = change[-1]
        change = json.dumps(manifest)
    file.write_bytes(change if isinstance(change, bytes) else change.encode())
    before = contents(tmp_path / "s")
    for act in (open_store, lambda folder: run(images, folder, backbone)):
        with pytest.raises(StoreError, match=r"manifest\.json: ") as caught:
            act(tmp_path / "s")
        assert "\n" not in str(caught.value)
    assert contents(tmp_path / "s") == before


@pytest.mark.parametrize("content", ["[" * 100_000, "[]", "{}", '{"images": 5}', "null"])
def test_records_of_strangers_are_refused_in_a_line(content: str, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "s")
    file = next((tmp_path / "s/shards").glob("*.json"))
    manifest = json.loads((tmp_path / "s/manifest.json").read_text())
    file.write_text(content)
    next(s for s in manifest["shards"] if s["name"] == file.stem)["records_bytes"] = len(content)
    (tmp_path / "s/manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(StoreError, match=file.name):
        _ = open_store(tmp_path / "s").names


@pytest.mark.parametrize(
    "content",
    ["[" * 100_000, '{"im0.png": "here"}', '{"im0.png": [1, 2]}', '{"im0.png": []}', '{"im0.png": [[1, {}]]}'],
)
def test_places_of_strangers_are_refused_and_nothing_is_left(
    content: str, images: Path, backbone: Backbone, tmp_path: Path
) -> None:
    (tmp_path / "places.json").write_text(content)
    with pytest.raises(ValueError, match=r"places\.json: "):
        run(images, tmp_path / "a/b/s", backbone, keep=Keep(kind="points", points=str(tmp_path / "places.json")))
    assert not (tmp_path / "a").exists()


def test_a_run_that_comes_to_nothing_leaves_no_store(images: Path, backbone: Backbone, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"layer\.99"):
        run(images, tmp_path / "s", backbone, config=ExtractConfig(taps=("layer.99",)))
    assert not (tmp_path / "s").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match="disk"), StoreWriter(tmp_path / "empty", {"taps": ["a"]}, Keep()):
        raise OSError("disk")
    assert list((tmp_path / "empty").iterdir()) == []
    with pytest.raises(OSError, match="disk"), StoreWriter(tmp_path / "a/b", {"taps": ["a"]}, Keep()):
        raise OSError("disk")
    assert not (tmp_path / "a").exists()


def test_names_of_any_bytes_are_stored(images: Path, backbone: Backbone, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    names = ["two\nlines.png", os.fsdecode(b"caf\xe9.png"), "\u56fe.png"]
    for name in names:
        Image.new("RGB", (32, 32), (9, 90, 200)).save(folder / name)
    for kind in ("pooled", "points"):
        run(folder, tmp_path / kind, backbone, keep=Keep(kind=kind, points="random:3"))
        store = open_store(tmp_path / kind)
        assert sorted(store.names) == sorted(names)
        assert store.table().num_rows == (3 if kind == "pooled" else 9)


def test_one_writer_at_a_time(images: Path, backbone: Backbone, whole: Path) -> None:
    manifest = open_store(whole).manifest
    with (
        StoreWriter(whole, manifest.features, manifest.keep, shard_images=4),
        pytest.raises(StoreError, match="another process is writing into this store"),
    ):
        run(images, whole, backbone)
    assert len(open_store(whole)) == 11


def test_a_full_disk_leaves_what_is_there(images: Path, backbone: Backbone, whole: Path, tmp_path: Path) -> None:
    """The system itself refuses to write: files are limited to fewer bytes than whole maps need."""
    config = ExtractConfig(taps=("layer.1",), sizing=Sizing("fit", 64, multiple=8), batch_size=4)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        with pytest.raises(OSError, match=r"the 0 images that are in the store are safe, make room"):
            run(images, tmp_path / "s", backbone, config=config, keep=Keep(kind="maps"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "s").exists()
    assert run(images, tmp_path / "s", backbone, config=config, keep=Keep(kind="maps")).images == 11


def test_a_full_disk_is_called_so(
    images: Path, backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = []

    def full(descriptor: int) -> None:
        synced.append(descriptor)
        if len(synced) > 4:  # the manifest, one shard's two files, the manifest with it
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"the disk is full; the 4 images that are in the store are safe"):
        run(images, tmp_path / "s", backbone)
    assert len(open_store(tmp_path / "s")) == 4
    assert not list((tmp_path / "s").rglob("*.partial"))


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a file system that nobody can write to")
def test_a_folder_that_cannot_be_written_to_is_named(images: Path, backbone: Backbone) -> None:
    with pytest.raises(OSError, match="/proc/store: cannot be written to"):
        run(images, Path("/proc/store"), backbone)


def test_a_read_only_folder_is_named() -> None:
    """In a child without the rights of the superuser, who may write everywhere."""
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "s"
        folder.mkdir()
        folder.chmod(0o555)
        Path(parent).chmod(0o755)
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                if os.geteuid() == 0:
                    os.setgroups([])
                    os.setgid(65534)
                    os.setuid(65534)
                StoreWriter(folder, {"taps": ["a"]}, Keep())
                os.write(writing, b"it was written to")
            except OSError as error:
                os.write(writing, f"OSError: {error}".encode())
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        os.close(writing)
        with os.fdopen(reading) as answer:
            assert answer.read() == f"OSError: {folder}: cannot be written to (Permission denied)"
        assert list(folder.iterdir()) == []


class SmallMemory(Backbone):
    """A backbone that cannot take more than two images at a time."""

    def __init__(self, inner: Backbone) -> None:
        self.inner, self.network, self.name, self.source = inner, inner.network, inner.name, inner.source
        self.recommended, self.batches = inner.recommended, []  # type: ignore[var-annotated]

    def taps(self):  # type: ignore[no-untyped-def]
        return self.inner.taps()

    def maps(
        self, pixels: Tensor, taps: Sequence[str], conditions: Conditions, *, batch_size: int = 8
    ) -> dict[str, Tensor]:
        self.batches.append(min(len(pixels), batch_size))
        if self.batches[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.inner.maps(pixels, taps, conditions, batch_size=batch_size)


def test_smaller_batches_where_memory_runs_out(images: Path, backbone: Backbone, whole: Path, tmp_path: Path) -> None:
    small = SmallMemory(backbone)
    run(images, tmp_path / "s", small)
    assert small.batches.count(4) == 1  # once it has failed it is not tried again
    one, two = open_store(tmp_path / "s"), open_store(whole)
    assert one.names == two.names
    for number in range(11):
        torch.testing.assert_close(
            one[number].features["layer.1"], two[number].features["layer.1"], atol=2e-3, rtol=2e-3
        )


def test_other_errors_of_a_network_are_not_taken_for_full_memory(
    images: Path, backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object, **kwargs: object) -> dict[str, Tensor]:
        raise RuntimeError("a shape is wrong")

    monkeypatch.setattr(backbone, "maps", broken)
    with pytest.raises(RuntimeError, match="a shape is wrong"):
        run(images, tmp_path / "s", backbone)


def test_features_that_do_not_fit_are_set_apart(
    images: Path, backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    maps = backbone.maps
    monkeypatch.setattr(backbone, "maps", lambda *a, **k: {tap: 1e6 * values for tap, values in maps(*a, **k).items()})
    done = run(images, tmp_path / "s", backbone)
    assert done.images == 0
    assert "not finite in float16 (bfloat16 has the range of float32)" in done.quarantined[0][1]
    assert run(images, tmp_path / "t", backbone, keep=Keep(dtype="bfloat16")).images == 11


def test_places_come_from_a_file_and_draws_from_names(images: Path, backbone: Backbone, tmp_path: Path) -> None:
    places = {f"{number:02d}.png": [[number, 2]] * (number + 1) for number in range(1, 11)}
    places["10.png"] = [[99, 0]]
    file = tmp_path / "places.json"
    file.write_text(json.dumps(places))
    done = run(images, tmp_path / "s", backbone, keep=Keep(kind="points", points=str(file)))
    reasons = dict(done.quarantined)
    assert "has no places for 00.png" in reasons["00.png"]
    assert "lie outside of its 48 x 40 pixels" in reasons["10.png"]
    store = open_store(tmp_path / "s")
    assert store["03.png"].points is not None
    assert store["03.png"].points.tolist() == [[3, 2]] * 4
    run(images, tmp_path / "r", backbone, keep=Keep(kind="points", points="random:5"))
    drawn = [open_store(tmp_path / "r")[name].points for name in ("01.png", "03.png")]
    assert drawn[0] is not None
    assert drawn[0].shape == (5, 2)
    assert not torch.equal(*drawn)  # type: ignore[arg-type]


def test_archives_tables_and_patterns(images: Path, backbone: Backbone, whole: Path, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for number in range(5):
            archive.add(images / f"{number:02d}.png", f"{number:02d}.png")
            (tmp_path / "label.txt").write_text("7")
            archive.add(tmp_path / "label.txt", f"{number:02d}.txt")
    paths = [str(images / f"{number:02d}.png") for number in range(5, 8)] + ["gone.png"]
    pq.write_table(pa.table({"path": paths}), tmp_path / "paths.parquet")
    inputs = [str(tmp_path / "*.tar"), str(tmp_path / "paths.parquet"), str(images / "0[89].png")]
    done = run(inputs, tmp_path / "s", backbone)
    store, other = open_store(tmp_path / "s"), open_store(whole)
    gone = os.path.relpath(tmp_path / "gone.png", store.root)
    assert done.quarantined == ((gone, "no such image file"),)
    assert len(store) == 10
    for number, file in enumerate(store.files):
        assert file.sha256 == other.files[number].sha256
    inside = next(name for name in store.names if name.endswith("a.tar/03.png"))
    assert read_image(store.root, inside).tobytes() == read_image(images, "03.png").tobytes()
    assert run(inputs, tmp_path / "s", backbone).images == 0


def test_inputs_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    (tmp_path / "no.tar").write_bytes(b"nothing at all")
    (tmp_path / "no.parquet").write_bytes(b"nothing at all")
    for name, message in (
        ("nothing", "no such file or folder"),
        ("no.tar", "is not an uncompressed tar archive"),
        ("no.parquet", "is not a Parquet file"),
    ):
        with pytest.raises(ImageError, match=message):
            find_sources([tmp_path / name])


def test_features_in_memory_can_be_written(images: Path, backbone: Backbone, whole: Path, tmp_path: Path) -> None:
    names = open_store(whole).names
    pairs = zip(names, extract_each(backbone, [images / name for name in names], CONFIG), strict=True)
    written = open_store(write_store(tmp_path / "s", pairs, shard_images=4))
    assert (written.names, len(written.manifest.shards)) == (names, 3)
    for name in names:
        torch.testing.assert_close(
            written[name].features["layer.1"], open_store(whole)[name].features["layer.1"], atol=2e-3, rtol=2e-3
        )
    again: Iterator[object] = iter([(names[0], next(extract_each(backbone, [images / names[0]], CONFIG)))])
    with pytest.raises(ValueError, match=r"00\.png is in the store .* already"):
        write_store(tmp_path / "s", again, shard_images=4)  # type: ignore[arg-type]


def test_settings_that_cannot_be(tmp_path: Path) -> None:
    for settings, message in (({"points": "grid:0"}, "grid:N, random:N"), ({"kind": "all"}, "kind must be")):
        with pytest.raises(ValueError, match=message):
            Keep(**settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"workers must be in 0\.\."):
        BulkConfig(workers=-1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Ray and what it brings along
def test_ray_gives_the_same_store(images: Path, vit_folder: Path, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for engine, actors in (("local", 1), ("ray", 2)):
            bulk = BulkConfig(workers=0, shard_images=4, engine=engine, actors=actors)  # type: ignore[arg-type]
            done = extract_store([images], tmp_path / engine, str(vit_folder), CONFIG, None, bulk)
            assert (done.images, len(done.quarantined)) == (11, 1)
    finally:
        torch.set_num_threads(threads)
    assert contents(tmp_path / "local") == contents(tmp_path / "ray")
    assert isinstance(open_store(tmp_path / "ray"), Store)


def test_ray_needs_a_name_a_cluster_and_ray(
    images: Path, backbone: Backbone, vit_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="give its name"):
        run(images, tmp_path / "s", backbone, bulk=BulkConfig(engine="ray"))
    nowhere = BulkConfig(engine="ray", address="127.0.0.1:1")
    with pytest.raises(OSError, match=r"127\.0\.0\.1:1: no Ray cluster answers there"):
        extract_store([images], tmp_path / "t", str(vit_folder), CONFIG, None, nowhere)
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(ImportError, match=r"diffrep\[ray\]"):
        extract_store([images], tmp_path / "t", str(vit_folder), CONFIG, None, BulkConfig(engine="ray"))


def test_batches_do_not_depend_on_how_images_are_decoded(images: Path, backbone: Backbone) -> None:
    from diffrep.store.sources import Job

    base, sources = find_sources([images])
    maker = ShardMaker(backbone, CONFIG.resolve(backbone), Keep())
    counts: list[int] = []
    jobs = [Job(0, tuple(sources[:7])), Job(1, tuple(sources[7:]))]
    made = [(job.number, len(builder)) for job, builder in maker.run(jobs, workers=0, progress=counts.append)]
    assert made == [(0, 7), (1, 5)]
    assert sum(counts) == 12
    assert base == images
