"""What evaluations keep knows its content; reports say everything; published numbers are the papers'."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from diffrep.cli import main
from diffrep.eval.cache import ImageResults, digest
from diffrep.eval.datasets.archives import Archive, read_array, read_plain
from diffrep.eval.datasets.dense_images import open_benchmark
from diffrep.eval.maps import DepthProtocol, NormalProtocol, evaluate_maps
from diffrep.eval.report import (
    PUBLISHED,
    PUBLISHED_DEPTH,
    PUBLISHED_DIS,
    PUBLISHED_FLOW,
    PUBLISHED_NORMALS,
    Problem,
    Report,
    Section,
    bootstrap,
    plain,
    with_interval,
)

from .benchmark_folders import write_image, write_spair
from .test_correspondence import run, vit

__all__ = ["vit"]  # the fixture


def test_a_replaced_image_is_extracted_and_matched_again(tmp_path: Path, vit: object) -> None:
    root = write_spair(tmp_path)
    before = run(root, tmp_path / "out", vit)  # type: ignore[arg-type]
    image = sorted((root / "JPEGImages/cat").iterdir())[1]
    seconds = image.stat()
    write_image(image, 64, 48, seed=999)  # in place: name and size of the picture stay
    os.utime(image, ns=(seconds.st_atime_ns, seconds.st_mtime_ns))
    again = run(root, tmp_path / "out", vit)  # type: ignore[arg-type]
    fresh = run(root, tmp_path / "fresh", vit)  # type: ignore[arg-type]
    kept = {match.pair.name: match.predicted for match in again.matches}
    assert all(torch.equal(kept[match.pair.name], match.predicted) for match in fresh.matches)
    assert any(not torch.equal(kept[match.pair.name], match.predicted) for match in before.matches)


def test_moved_keypoints_are_matched_again(tmp_path: Path, vit: object) -> None:
    root = write_spair(tmp_path)
    run(root, tmp_path / "out", vit)  # type: ignore[arg-type]
    for file in (root / "PairAnnotation/test").glob("*:bus.json"):
        note = json.loads(file.read_text())
        file.write_text(json.dumps({**note, "src_kps": [[1, 2] for _ in note["src_kps"]]}))
    again, fresh = (run(root, tmp_path / out, vit) for out in ("out", "fresh"))  # type: ignore[arg-type]
    for ours, theirs in zip(again.matches, fresh.matches, strict=True):
        assert torch.equal(ours.predicted, theirs.predicted)


def test_other_weights_under_the_same_name_are_refused(tmp_path: Path, vit_folder: Path) -> None:
    from diffrep.backbones import load_backbone

    root, backbone = write_spair(tmp_path), load_backbone(vit_folder)
    run(root, tmp_path / "out", backbone)
    with torch.no_grad():
        next(backbone.network.parameters()).add_(1)
    with pytest.raises(ValueError, match="was made with weights_sha256"):
        run(root, tmp_path / "out", backbone)


def test_what_killed_runs_left_half_written_is_removed(tmp_path: Path, vit: object) -> None:
    root = write_spair(tmp_path)
    run(root, tmp_path / "out", vit)  # type: ignore[arg-type]
    left = [
        tmp_path / "out/features/JPEGImages/cat/.x.jpg.999999999.partial.safetensors",
        next((tmp_path / "out/matches").iterdir()) / ".00000.999999999.partial.json",
    ]
    for file in left:
        file.write_bytes(b"half")
    run(root, tmp_path / "out", vit)  # type: ignore[arg-type]
    assert not any(file.exists() for file in left)


@pytest.fixture
def scannet(tmp_path: Path) -> Path:
    """Two images with depth rising from left to right."""
    for i in range(2):
        write_image(tmp_path / f"set/scene0000_00/color/{i:06d}.jpg", 32, 24, i)
        depth = (1000 + 100 * np.arange(32) + np.zeros((24, 1))).astype(np.uint16)
        file = tmp_path / f"set/scene0000_00/depth/{i:06d}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(depth).save(file)
    return tmp_path / "set"


def test_replaced_images_and_depths_are_measured_again(scannet: Path, tmp_path: Path) -> None:
    asked: list[int] = []

    def predict(image: Tensor) -> Tensor:
        asked.append(1)
        return torch.arange(32.0).expand(24, 32)

    def evaluate(weights: str = "a") -> dict[str, float]:
        data = open_benchmark("depth", "scannet", scannet)
        options = {"method": "ramp", "weights": weights, "folder": tmp_path / "work", "progress": False}
        return dict(evaluate_maps(predict, data, DepthProtocol(space="depth"), **options).metrics)  # type: ignore[arg-type]

    assert evaluate()["abs_rel"] == pytest.approx(0, abs=1e-5)
    evaluate()
    assert len(asked) == 2
    random = np.random.default_rng(0).integers(1000, 5000, (24, 32), dtype=np.uint16)
    Image.fromarray(random).save(scannet / "scene0000_00/depth/000001.png")
    assert evaluate()["abs_rel"] > 0.05
    assert len(asked) == 3
    with pytest.raises(ValueError, match="was made with weights = 'a'"):
        evaluate("b")


def test_lists_that_lead_out_of_the_folder_and_damaged_lists_are_named(scannet: Path, tmp_path: Path) -> None:
    write_image(tmp_path / "secret.jpg", 32, 24, 0)
    listing = scannet / "scannet_list.txt"
    listing.write_text("../secret.jpg scene0000_00/depth/000000.png\nscene0000_00/color/000000.jpg /etc/passwd\n")
    data = open_benchmark("depth", "scannet", scannet)
    report = evaluate_maps(lambda image: image[0], data, DepthProtocol(), method="red", progress=False)
    assert all("leads out of the data set's folder" in str(problem) for problem in report.problems)
    assert len(report.problems) == 2
    listing.write_bytes(b"\xff\xfe\x00\x00")
    with pytest.raises(ValueError, match=r"scannet_list\.txt: cannot be read as text"):
        open_benchmark("depth", "scannet", scannet)


@pytest.mark.parametrize(
    "content",
    [
        b"", b"PK\x03\x04 no zip", b"\x93NUMPY\x01\x00", b"\x93NUMPY\x01\x00\x10\x00{'descr': ((((((",
        b"\x93NUMPY\x01\x00v\x00{'descr': '<f8', 'fortran_order': False, 'shape': (99999999999, 999999), }".ljust(128),
    ],
)  # fmt: skip
def test_damaged_arrays_and_pickles_are_named(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"depth\.npy: is no \.npy file of numbers"):
        read_array(content, "depth.npy")
    with pytest.raises(ValueError, match=r"n\.pkl: "):
        read_plain(content, "n.pkl")


def test_normals_that_cannot_be_read_are_named_and_the_rest_counts(tmp_path: Path) -> None:
    for i in range(2):
        write_image(tmp_path / f"oasis/val/{i}_img.png", 8, 6, i)
    import pickle

    box = {"min_y": 0, "max_y": 5, "min_x": 0, "max_x": 7, "normal": np.tile([0.0, 0, 1], (6, 8, 1))}
    (tmp_path / "oasis/val/0_normal.pkl").write_bytes(pickle.dumps(box))
    (tmp_path / "oasis/val/1_normal.pkl").write_bytes(pickle.dumps({**box, "max_y": 99}))

    def wall(image: Tensor) -> Tensor:
        return torch.tensor([0.0, 0, 1]).view(3, 1, 1).expand(3, *image.shape[1:])

    data = open_benchmark("normals", "oasis", tmp_path)
    report = evaluate_maps(wall, data, NormalProtocol(), method="wall", folder=tmp_path / "w", progress=False)
    assert len(report.images) == 1
    assert report.metrics["mean"] == pytest.approx(0, abs=0.1)
    (problem,) = report.problems
    assert "1_normal.pkl: holds no normals of a box in the image" in str(problem)
    assert not list((tmp_path / "w").rglob("*.partial*"))


def test_kept_numbers_of_damaged_folders_are_named(tmp_path: Path) -> None:
    results = ImageResults(tmp_path)
    results.add("../../a.png", {"x": 1.0}, digest(b"1"), torch.tensor([1.0, 2.0]))
    again = ImageResults(tmp_path)
    assert again.holds("../../a.png", digest(b"1"))
    assert not again.holds("../../a.png", digest(b"2"))
    assert again.errors("../../a.png").tolist() == [1, 2]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 2
    next(path for path in files if path.suffix == ".npy").write_bytes(b"no array")
    with pytest.raises(ValueError, match=r"npy: not a file of kept errors"):
        again.errors("../../a.png")
    (tmp_path / "images.jsonl").write_text("[1]\n")
    with pytest.raises(ValueError, match=r"images\.jsonl: line 1 must hold a JSON object"):
        ImageResults(tmp_path)


def test_an_archive_cut_off_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"\0" * 300)
    with pytest.raises(ValueError, match=r"a\.tar: is no uncompressed tar archive|no sample"):
        Archive(tmp_path / "a.tar")


# -- reports --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Small(Report):
    values: dict[str, float]

    def document(self) -> dict[str, object]:
        return {"values": self.values, "problems": self.problems}

    def sections(self) -> Iterator[Section]:
        rows = [(name, f"{value:.1f}", "a remark") for name, value in self.values.items()]
        yield Section("Title", ("value",), [*rows, "a line"], ["below"])


def test_a_report_is_a_table_and_strict_json() -> None:
    many = tuple(Problem(f"{i}.png", "is missing") for i in range(25))
    report = Small({"one": 1.0, "a longer name": math.nan}, problems=many)
    lines = report.table().splitlines()
    assert lines[:4] == [
        "Title", "                 value", "  one              1.0  a remark", "  a longer name    nan  a remark"
    ]  # fmt: skip
    assert lines[4:6] == ["a line", "below"]
    assert "25 problems, not counted in any number:" in lines
    assert lines[-1] == "  ... and 5 more, all in the JSON"
    document = json.loads(report.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert document["values"] == {"one": 1.0, "a longer name": None}
    assert document["problems"][24] == {"where": "24.png", "what": "is missing"}
    assert "problem" not in Small({"one": 1}).table()


def test_intervals_repeat_and_leave_nan_out() -> None:
    values = np.array([0.0, 1.0, np.nan, 1.0])
    low, high = bootstrap(lambda rows: np.nanmean(values[rows], axis=1), 4)
    assert (low, high) == bootstrap(lambda rows: np.nanmean(values[rows], axis=1), 4)
    assert 0 <= low < 2 / 3 < high <= 1
    assert with_interval(1.5, 1, 2) == "1.50 (1.00..2.00)"
    assert plain({1: {2, 1}, "p": Path("a/b")}) == {"1": [1, 2], "p": str(Path("a/b"))}


def test_published_numbers_are_those_of_the_tables() -> None:
    assert [len(rows) for rows in (PUBLISHED, PUBLISHED_FLOW, PUBLISHED_DEPTH, PUBLISHED_NORMALS, PUBLISHED_DIS)] == [
        108, 3, 17, 12, 10
    ]  # fmt: skip
    fused = next(row for row in PUBLISHED if row.method == "SD1.5 + DINOv2-B/14" and row.categories)
    assert (fused.values, fused.categories["cat"], fused.recipe) == ({0.1: 64.0}, 78.6, "sd-dino")
    assert len(fused.categories) == 18
    assert PUBLISHED_FLOW[2].smoothness == {"FG3DCar": 3.52, "JODS": 7.55, "PASCAL": 8.75}
    assert all(row.source for row in (*PUBLISHED, *PUBLISHED_FLOW, *PUBLISHED_DEPTH, *PUBLISHED_NORMALS))
    assert PUBLISHED_DIS[0].values["DIS-TE1-4"] == {"maxf": 0.911, "mae": 0.027}


# -- commands -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["depth-ablation", "--base", "nonsense"], "nonsense"),
        (["depth-ablation", "--learning-rate", "nan"], "learning_rate"),
        (["depth-ablation", "--steps", "0"], "steps"),
        (["depth-ablation", "--work", __file__], "is a file"),
        (["depth-ablation", "--latents", __file__], "is a file"),
        (["depth", "--count", "-1"], "count"),
        (["depth", "--size", "100000000"], "size"),
        (["scenes", "--alphas", "-1"], "alphas"),
        (["scenes", "--alphas", "nan"], "alphas"),
        (["scenes", "--size", "0"], "size"),
        (["homography", "--rotation", "nan"], "rotation"),
        (["depth", "--working-size", "-5"], "size"),
        (["correspondence", "--benchmark", "scenes", "--data", "x"], "--data"),
        (["correspondence", "--benchmark", "spair", "--data", "none", "--batch-size", "0"], "--batch-size"),
        (["synthesis", "--patches", "1"], "patches"),
    ],
)
def test_bad_options_are_one_line_and_leave_nothing(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["eval", *arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert message in lines[-1]
    assert not list(tmp_path.iterdir())
