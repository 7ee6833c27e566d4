"""Training and evaluation of segmentation: ground truth, augmentations, DIS5K's layout, scores, thin structures."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from diffrep.cli import main
from diffrep.eval.borders import thin_places
from diffrep.eval.scene_maps import SceneMapSettings
from diffrep.eval.segmentation import (
    centred_guess,
    evaluate_dis,
    evaluate_scene_masks,
    grey,
    open_dis,
)
from diffrep.eval.segmentation import score_image as evaluated_score
from diffrep.eval.segmentation_metrics import f_curve, prepare, score_image, scores, simplified_length, together
from diffrep.heads.loading import load_segmentation
from diffrep.heads.tiling import stretch
from diffrep.heads.training.masks import augment, cut_mix, draw_boxes, edge_map, pyramid_noise, read_dis
from diffrep.scenes import render_set


def disc(height: int = 60, width: int = 80, radius: int = 20) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return (np.hypot(y - height / 2, x - width / 2) < radius).astype(np.uint8) * 255


def write_dis(root: Path, split: str = "DIS-VD", count: int = 3) -> Path:
    """A small split of DIS5K as it is released: white discs on grey."""
    for part in ("im", "gt"):
        (root / split / part).mkdir(parents=True)
    for number in range(count):
        mask = disc(60 + 2 * number, 80, 12 + 4 * number)
        Image.fromarray(mask).save(root / split / "gt" / f"{number}.png")
        picture = np.where(mask[..., None] > 0, 250, 90).astype(np.uint8).repeat(3, axis=2)
        Image.fromarray(picture).save(root / split / "im" / f"{number}.jpg")
    return root / split


# -- training -------------------------------------------------------------------------------------------------------


def test_edges_lie_on_both_sides_of_the_outline() -> None:
    mask = torch.from_numpy(disc())
    edge = edge_map(mask)
    assert set(edge.unique().tolist()) == {0, 255}
    assert 0 < int((mask[edge > 0] > 0).sum()) < int((edge > 0).sum())
    assert not edge_map(torch.full((8, 9), 255)).any()
    assert torch.equal(edge_map(mask.flip(-1)), edge.flip(-1))
    assert edge_map(mask, window=3).sum() < edge.sum() < edge_map(mask, window=7).sum()
    assert not edge_map(mask, threshold=256).any()


def test_noise_has_unit_deviation_and_repeats() -> None:
    first, again = (pyramid_noise((4, 8, 16, 16), generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again)
    assert float(first.std()) == pytest.approx(1, abs=1e-5)
    coarse = torch.nn.functional.avg_pool2d(first, 16).std()
    assert coarse > 3 * torch.nn.functional.avg_pool2d(torch.randn(4, 8, 16, 16), 16).std()


def test_cut_mix_swaps_within_pairs_and_stretch_keeps_constants_finite() -> None:
    values, boxes = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 5, 6), torch.zeros(4, 5, 6, dtype=torch.bool)
    boxes[1, :2] = True
    mixed = cut_mix(values, boxes)
    assert mixed[1, :, :2].eq(0).all()
    assert mixed[1, :, 2:].eq(1).all()
    assert torch.equal(mixed[[0, 2, 3]], values[[0, 2, 3]])
    with pytest.raises(ValueError, match="even batch"):
        cut_mix(values[:3], boxes[:3])
    assert bool(torch.isfinite(stretch(torch.ones(2, 1, 4, 4))).all())
    drawn = draw_boxes(400, (64, 64), torch.Generator().manual_seed(0))
    share = drawn.flatten(1).float().mean(1)
    assert 0.4 < float((share > 0).float().mean()) < 0.6
    assert float(share.max()) < 0.45


def test_augmentations_move_image_mask_and_edge_together() -> None:
    mask = disc(120, 160, 40)
    image = Image.fromarray(mask[..., None].repeat(3, axis=2))
    edge = Image.fromarray(edge_map(torch.from_numpy(mask)).numpy())
    for seed in range(6):
        views = augment(image, Image.fromarray(mask), edge, torch.Generator().manual_seed(seed))
        assert len({view.size for view in views}) == 1
        bright, inside = np.asarray(views[0].convert("L")), np.asarray(views[1])
        assert bright[inside > 200].mean() > bright[inside < 50].mean() + 60
        assert np.array_equal(
            inside, np.asarray(augment(image, Image.fromarray(mask), edge, torch.Generator().manual_seed(seed))[1])
        )


def test_pairs_of_another_size_are_left_out_in_training_and_named_in_evaluation(tmp_path: Path) -> None:
    folder = write_dis(tmp_path)
    Image.new("RGB", (5, 5)).save(folder / "im" / "1.jpg")
    assert [pair.mask.stem for pair in read_dis(folder)] == ["0", "2"]
    _, problems = open_dis(tmp_path)
    assert problems == ["DIS-VD/gt/1.png: no image of this name and size"]
    with pytest.raises(ValueError, match="is no split of DIS5K"):
        read_dis(tmp_path)
    with pytest.raises(ValueError, match="none of DIS-VD"):
        open_dis(tmp_path / "nowhere")


@pytest.mark.slow
@pytest.mark.parametrize("edges", [True, False])
def test_training_resumes_and_writes_a_head(tmp_path: Path, edges: bool) -> None:
    render_set(tmp_path / "scenes", "train", 6, workers=1, progress=False)
    flag = "--edges" if edges else "--no-edges"

    def train(work: str, steps: int) -> int:
        return main(
            ["train", "segmentation", "--data", f"scenes={tmp_path / 'scenes'}", "--work", str(tmp_path / work),
             "--steps", str(steps), "--batch-size", "2", "--validation-scenes", "2", flag]
        )  # fmt: skip

    assert train("run", 2) == 0
    head = load_segmentation(tmp_path / "run" / "head")
    assert "its own decoder" in head.recognised
    assert head.model.working_size == 128
    assert (tmp_path / "run" / "pictures" / "000002.png").is_file()
    about = json.loads((tmp_path / "run" / "head" / "head.json").read_text())
    assert about["base"] == "tiny"
    assert about["edges"] is edges
    assert train("run", 2) == 0  # nothing is left to do
    assert train("run", 3) == 2  # another run


# -- scores ---------------------------------------------------------------------------------------------------------


def test_a_perfect_map_and_its_inverse() -> None:
    truth = disc()
    found = score_image(truth, truth).values
    assert found["mae"] == 0
    assert found["maxf"] == pytest.approx(1)
    assert found["wfm"] == pytest.approx(1)
    assert score_image(255 - truth, truth).values["mae"] == 1
    faint = np.where(truth > 0, 200, 10).astype(np.uint8)
    assert evaluated_score(faint, truth, protocol="thresholded").values["mae"] == 0


@pytest.mark.filterwarnings("ignore:This class will be removed")
def test_scores_equal_those_of_the_maintained_package() -> None:
    sod = pytest.importorskip("py_sod_metrics")
    rng = np.random.default_rng(0)
    measures = {
        "mae": sod.MAE(), "sm": sod.Smeasure(), "wfm": sod.WeightedFmeasure(), "em": sod.Emeasure(), "f": sod.Fmeasure()
    }  # fmt: skip
    ours = []
    for number in range(6):
        truth = disc(50 + number, 70, 8 + 3 * number)
        noise = rng.integers(-90, 90, truth.shape)
        predicted = np.clip(truth * 0.7 + 30 + noise, 0, 255).astype(np.uint8)
        ours.append(score_image(predicted, truth))
        for measure in measures.values():
            measure.step(pred=predicted, gt=truth)
    got = together(ours)
    assert got["mae"] == pytest.approx(measures["mae"].get_results()["mae"], abs=1e-9)
    assert got["sm"] == pytest.approx(measures["sm"].get_results()["sm"], abs=1e-9)
    assert got["wfm"] == pytest.approx(measures["wfm"].get_results()["wfm"], abs=1e-9)
    assert got["em_mean"] == pytest.approx(measures["em"].get_results()["em"]["curve"].mean(), abs=1e-9)
    assert got["maxf"] == pytest.approx(measures["f"].get_results()["fm"]["curve"].max(), abs=1e-9)


def test_scores_refuse_what_they_cannot_compare_and_survive_extremes() -> None:
    with pytest.raises(ValueError, match="of one size"):
        prepare(disc(), disc(61))
    with pytest.raises(ValueError, match="8-bit"):
        prepare(disc().astype(float), disc())  # type: ignore[arg-type]
    empty, full = np.zeros((20, 30), np.uint8), np.full((20, 30), 255, np.uint8)
    for truth in (empty, full):
        for predicted in (empty, full, disc(20, 30, 5)):
            p, g = prepare(predicted, truth)
            assert all(np.isfinite(value) for value in scores(p, g).values())
            assert np.isfinite(f_curve(p, g)).all()
    assert np.isnan(together([])["maxf"])


def test_lines_are_simplified_as_before_opencv_changed_it() -> None:
    assert simplified_length([(3, 4)], 2.0) == 1
    assert simplified_length([(x, 0) for x in range(20)], 2.0) == 2
    square = [(x, 0) for x in range(10)] + [(9, y) for y in range(1, 10)]
    assert simplified_length(square, 2.0) == 3


def test_thin_places_are_rods_and_not_corners() -> None:
    mask = disc(80, 80, 18) > 0
    assert not thin_places(mask).any()
    mask[38:41, 50:78] = True  # a rod of three pixels
    thin = thin_places(mask)
    assert thin[39, 70]
    assert not thin[40, 40]


def test_scenes_are_scored_with_thin_parts() -> None:
    def truth(scenes: list) -> Tensor:  # type: ignore[type-arg]
        return torch.stack([torch.from_numpy(scene.mask).float() for scene in scenes])

    report = evaluate_scene_masks(
        {"no look": centred_guess, "truth": truth},  # type: ignore[dict-item]
        SceneMapSettings(count=3, size=64, workers=0, batch_size=2, categories=("chair", "dog", "giraffe")),
        progress=False,
    )
    rows = json.loads(report.to_json())["rows"]
    assert rows["truth"]["all"]["maxf"]["value"] == pytest.approx(1)
    assert rows["truth"]["all"]["thin"]["value"] == pytest.approx(1)
    assert rows["no look"]["all"]["mae"]["value"] > 0.1
    assert set(report.groups) >= {"all", "seen", "unseen"}
    assert "thin found" in report.table()


def test_dis_is_scored_at_the_size_of_its_truth_and_maps_are_kept(tmp_path: Path) -> None:
    write_dis(tmp_path / "data")

    def bright(images: list[Image.Image]) -> Iterator[Tensor]:
        for image in images:
            yield (torch.from_numpy(np.array(image.convert("L"))) > 170).float()

    report = evaluate_dis("bright", bright, tmp_path / "data", hce=False, folder=tmp_path / "maps", progress=False)
    assert json.loads(report.to_json())["rows"]["bright"]["DIS-VD"]["maxf"]["value"] > 0.97
    assert "DiffDIS" in report.table()
    assert "soft maps" in report.table()
    Image.fromarray(grey(torch.zeros(60, 80))).save(tmp_path / "maps" / "DIS-VD" / "0.png")
    worse = evaluate_dis("kept", None, tmp_path / "data", hce=False, folder=tmp_path / "maps", progress=False)
    assert worse.rows["kept"]["DIS-VD/0"].values["maxf"] < 0.5
    (tmp_path / "maps" / "DIS-VD" / "1.png").unlink()
    with pytest.raises(ValueError, match="the map is missing"):
        evaluate_dis("kept", None, tmp_path / "data", hce=False, folder=tmp_path / "maps", progress=False)
