"""Heads as files: variants, revisions, saved folders; and folders that nothing may replace."""

from __future__ import annotations

import errno
import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from diffrep.backbones import BackboneError, load_backbone
from diffrep.backbones.repositories import MODELS
from diffrep.cli import main
from diffrep.files import partial_path, replace_folder, save_weights, write_whole
from diffrep.heads.loading import WEIGHTS, HeadError, load_head

from .one_step_heads import random_head
from .test_segmentation import MODEL as DIFFDIS
from .test_segmentation import folder_of as diffdis_folder

PUBLISHED = "jingheya/lotus-depth-d-v1-1"


@pytest.fixture(scope="module")
def image() -> Image.Image:
    return Image.effect_noise((40, 32), 60).convert("RGB")


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A head whose U-Net has two variants that differ."""
    folder = random_head(tmp_path / "two", working_size=32)
    weights = load_file(folder / "unet" / WEIGHTS)
    half = {key: value.mul(0.9 if key.startswith("conv_out") else 1).half() for key, value in weights.items()}
    save_file(half, folder / "unet" / WEIGHTS.replace(".", ".fp16.", 1))
    return folder


def test_a_head_is_read_in_the_variant_that_was_asked_for(two: Path, image: Image.Image, tmp_path: Path) -> None:
    plain, half = load_head(two)(image), load_head(two, variant="fp16")
    assert not torch.equal(half(image).values, plain.values)
    behind = load_head(half.name)  # the name says it too
    assert torch.equal(behind(image).values, half(image).values)
    half.save_pretrained(tmp_path / "saved")
    assert [file.name for file in (tmp_path / "saved" / "unet").glob("*.safetensors")] == [
        "diffusion_pytorch_model.fp16.safetensors"
    ]
    assert torch.equal(load_head(tmp_path / "saved")(image).values, half(image).values)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("two", {"variant": "bf16"}, "unet has no variant bf16; there is fp16, the plain one"),
        ("tiny-normals", {"variant": "fp16"}, "unet has no variant fp16"),
        ("tiny-restore", {"revision": "main"}, "is a folder, which has no revision main"),
        ("two?lora=style.safetensors", {}, "takes no LoRA files"),
        ("alone.safetensors", {"variant": "fp16", "base": "tiny"}, "is a file, which has no variant"),
    ],
)
def test_variants_and_revisions_that_are_not_there(
    two: Path, name: str, options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(two.parent)
    shutil.copy(DIFFDIS / "unet" / WEIGHTS, "alone.safetensors")
    with pytest.raises(HeadError, match=message):
        load_head(name, **options)


def test_a_cache_of_the_hub_is_read_at_a_revision(two: Path, image: Image.Image, tmp_path: Path) -> None:
    cache = tmp_path / f"models--{PUBLISHED.replace('/', '--')}"
    for commit in ("aaa", "bbb"):
        shutil.copytree(two, cache / "snapshots" / commit)
    (cache / "snapshots" / "bbb" / "unet" / WEIGHTS).unlink()
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("aaa")
    assert torch.equal(load_head(cache)(image).values, load_head(two)(image).values)
    other = load_head(cache, revision="bbb")
    assert torch.equal(other(image).values, load_head(two, variant="fp16")(image).values)
    assert other.source.endswith("bbb")
    with pytest.raises(HeadError, match="no revision ccc"):
        load_head(cache, revision="ccc")


def test_commands_pass_them_on(
    two: Path, image: Image.Image, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image.save(tmp_path / "a.png")
    command = ["depth", str(tmp_path / "a.png"), "-o", str(tmp_path / "out"), "--model", str(two)]
    assert main([*command, "--formats", "npy", "--variant", "fp16"]) == 0
    for command, option in ((["normals"], "--variant"), (["segment"], "--revision"), (["restore"], "--variant")):
        assert main([*command, str(tmp_path / "a.png"), "-o", str(tmp_path / "x"), option, "nothing"]) == 2
        assert "nothing" in capsys.readouterr().err
    assert main(["export", str(two), "--head", "--variant", "bf16", "-o", str(tmp_path / "x.onnx")]) == 2
    assert "no variant bf16" in capsys.readouterr().err


def test_a_backbone_without_weights_has_its_variants_checked_too() -> None:
    with pytest.raises(BackboneError, match="unet has no variant fp16; there is the plain one"):
        load_backbone("tiny", variant="fp16", weights=False)


@pytest.mark.parametrize("form", ["file", "folder"])
def test_a_unet_alone_saves_all_that_it_needs(form: str, image: Image.Image, tmp_path: Path) -> None:
    base = diffdis_folder(tmp_path)
    place = tmp_path / "alone.safetensors"
    if form == "folder":
        place = tmp_path / "alone" / WEIGHTS
        place.parent.mkdir()
        shutil.copy(base / "unet" / "config.json", place.parent)
    shutil.copy(base / "unet" / WEIGHTS, place)
    head = load_head(place if form == "file" else place.parent, task="segmentation", base=base, device="cpu")
    head.save_pretrained(tmp_path / "saved")
    again = load_head(tmp_path / "saved", device="cpu")
    assert torch.equal(again(image, size=64).mask, head(image, size=64).mask)


def test_a_folder_of_other_things_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photograph = tmp_path / "photos" / "a.jpg"
    photograph.parent.mkdir()
    photograph.write_bytes(b"dear to somebody")
    with pytest.raises(ValueError, match="photos: holds other files, which would be removed"):
        load_head("tiny-depth").save_pretrained(photograph.parent)
    with pytest.raises(ValueError, match="holds other files"):
        replace_folder(photograph.parent, lambda partial: (partial / "head.json").write_text("{}"))
    for command in (["prior"], ["depth"], ["synthesis"], ["fewstep"]):
        work = tmp_path / "work"
        assert main(["train", *command, "--work", str(work), "-o", str(photograph.parent)]) == 2
        assert "photos: holds other files" in capsys.readouterr().err
        assert main(["train", *command, "--work", str(photograph)]) == 2
        assert "a.jpg: is a file; a folder goes there" in capsys.readouterr().err
        assert not work.exists()
    assert main(["train", "tiny", "--work", str(photograph)]) == 2
    assert capsys.readouterr().err == f"diffrep train tiny: {photograph}: is a file; a folder goes there\n"
    assert photograph.read_bytes() == b"dear to somebody"
    for _ in range(2):  # one of ours is
        replace_folder(tmp_path / "head", lambda partial: shutil.copy(MODELS / "tiny-depth" / "head.json", partial))


@contextmanager
def full_disk(size: int = 8192) -> Iterator[None]:
    """The system itself refuses to write longer files."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_names_what_was_to_be_written_and_leaves_what_was_there(tmp_path: Path) -> None:
    """Of bytes and by safetensors, as a file and in a folder."""
    file, folder = tmp_path / "a.safetensors", tmp_path / "head"
    write_whole(file, b"kept")
    shutil.copytree(MODELS / "tiny-depth", folder)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    head = load_head("tiny-depth")
    with full_disk():
        for write, place in (
            (lambda: write_whole(file, bytes(10_000)), file),
            (lambda: save_weights(file, {"a": torch.zeros(10_000)}), file),
            (lambda: head.save_pretrained(folder), folder),
        ):
            with pytest.raises(OSError, match="File too large") as caught:
                write()
            assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(place))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_an_input_that_is_missing_keeps_its_own_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="gone"):
        write_whole(tmp_path / "a", lambda partial: (tmp_path / "gone").read_bytes())


def test_a_folder_that_is_replaced_is_never_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, link = tmp_path / "head", tmp_path / "link"
    shutil.copytree(MODELS / "tiny-depth", folder)
    link.symlink_to(folder)
    rename, calls = Path.replace, []

    def stopped(path: Path, target: Path) -> Path:
        calls.append(path)
        if len(calls) == 2:  # the old folder is away, the new one is not yet there
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        replace_folder(folder, lambda partial: (partial / "head.json").write_text("{}"))
    assert load_head(folder).task == "disparity"
    replace_folder(link, lambda partial: (partial / "head.json").write_text("{}"))
    assert link.is_symlink()
    assert [path.name for path in folder.iterdir()] == ["head.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["head", "link"]


@pytest.mark.parametrize("name", ["head", "head.v2"])
def test_a_folder_whose_replacement_was_killed_comes_back(tmp_path: Path, name: str) -> None:
    shutil.copytree(MODELS / "tiny-depth", tmp_path / f"{partial_path(tmp_path / name).name}.old")
    (left,) = tmp_path.iterdir()
    left.rename(left.with_name(left.name.replace(str(os.getpid()), "999999999")))
    with pytest.raises(KeyboardInterrupt):
        replace_folder(tmp_path / name, _interrupted)
    assert load_head(tmp_path / name).task == "disparity"
    assert [path.name for path in tmp_path.iterdir()] == [name]


def _interrupted(_: Path) -> None:
    raise KeyboardInterrupt


def test_weights_can_be_read_by_whom_the_umask_lets(tmp_path: Path) -> None:
    tensors = {"weight": torch.zeros(2)}
    before = os.umask(0o027)
    try:
        save_weights(tmp_path / "alone.safetensors", tensors)
        replace_folder(tmp_path / "head", lambda partial: save_file(tensors, partial / "model.safetensors"))
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in tmp_path.rglob("*.safetensors")} == {0o640}
