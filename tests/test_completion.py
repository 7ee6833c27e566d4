"""Depth completed from known depths: guided heads, holes filled, the command and its evaluation."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from diffrep.cli import main
from diffrep.eval.completion import CompletionEvaluation, CompletionReport, evaluate_completion, known_depths
from diffrep.heads.completion import CompletionConfig, carried, complete_depth, fill_holes, fill_mask, krige_errors
from diffrep.heads.dense import DenseHead, PredictConfig
from diffrep.heads.loading import load_head
from diffrep.heads.maps import DepthMap, nearest_known
from diffrep.heads.segmentation import ObjectMask
from diffrep.scenes import render_scene

from .one_step_heads import random_head


def head_of(folder: Path, family: str, task: str) -> DenseHead:
    head = load_head(random_head(folder / f"{family}-{task}", family=family, task=task), device="cpu")
    assert isinstance(head, DenseHead)
    return head


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 56, 3), dtype=np.uint8))


def some_depths(count: int = 60) -> tuple[Tensor, Tensor]:
    """A slope with a step, and some of it."""
    truth = torch.linspace(2, 5, 56).expand(40, 56) + 3 * (torch.arange(40) > 20)[:, None]
    places = torch.randperm(40 * 56, generator=torch.Generator().manual_seed(1))[:count]
    known = torch.zeros(40 * 56).index_copy(0, places, truth.flatten()[places])
    return truth, known.view(40, 56)


def missed(depth: DepthMap, known: Tensor) -> float:
    seen = known > 0
    return float((depth.values - known)[seen].square().mean().sqrt())


@pytest.mark.parametrize(
    ("family", "task"), [("lotus-d", "disparity"), ("lotus-g", "depth"), ("e2e-ft", "depth"), ("marigold", "depth")]
)
def test_guidance_follows_the_known_depths(tmp_path: Path, family: str, task: str) -> None:
    head, (_, known) = head_of(tmp_path, family, task), some_depths()
    how = CompletionConfig(steps=6, rounds=12, reach=0.0, spread=0.0, rate=0.2)
    still = CompletionConfig(steps=6, rounds=0, reach=0.0, rate=1e-9)
    guided, unguided = (complete_depth(head, picture(), known, how=h) for h in (how, still))
    assert missed(guided, known) < 0.95 * missed(unguided, known)
    assert guided.metric
    assert guided.settings["known_depths"] == 60
    assert guided.settings["guidance"] == ("Marigold-DC" if family == "marigold" else "latent through the decoder")
    again = complete_depth(head, picture(), known, how=how)
    assert torch.equal(guided.values, again.values)


def test_few_depths_do_not_move_the_latent(tmp_path: Path) -> None:
    head, (_, known) = head_of(tmp_path, "lotus-d", "disparity"), some_depths(20)
    moved, still = (complete_depth(head, picture(), known, how=CompletionConfig(rounds=n)) for n in (5, 0))
    assert torch.equal(moved.values, still.values)


def test_an_ensemble_has_a_spread(tmp_path: Path) -> None:
    head, (_, known) = head_of(tmp_path, "marigold", "depth"), some_depths()
    one = complete_depth(head, picture(), known, PredictConfig(ensemble=2), CompletionConfig(steps=2))
    assert one.uncertainty is not None
    assert float(one.uncertainty.max()) > 0


def test_guided_completion_refuses(tmp_path: Path) -> None:
    head, (_, known) = head_of(tmp_path, "lotus-d", "disparity"), some_depths()
    with pytest.raises(ValueError, match=r"must be \(40, 56\) like the image, got \(3, 3\)"):
        complete_depth(head, picture(), torch.ones(3, 3))
    with pytest.raises(ValueError, match="two different known depths, got 60"):
        complete_depth(head, picture(), (known > 0).float())
    with pytest.raises(ValueError, match="two different known depths, got 0"):
        complete_depth(head, picture(), torch.full((40, 56), torch.nan))
    with pytest.raises(ValueError, match="guided completion is of whole depth maps"):
        complete_depth(head, picture(), known, PredictConfig(tile=64))
    with pytest.raises(ValueError, match="an ensemble of 3 needs noise"):
        complete_depth(head, picture(), known, PredictConfig(ensemble=3))
    with pytest.raises(ValueError, match="steps must be in"):
        CompletionConfig(steps=0)


def test_holes_are_filled_and_the_rest_stays() -> None:
    truth, _ = some_depths()
    known = truth.clone()
    known[10:25, 20:40] = 0
    biased = DepthMap(1.1 * truth, "depth", metric=True)
    filled = fill_holes(biased, known)
    assert torch.equal(filled.values[known > 0], known[known > 0])
    errors = [(m.values - truth).abs()[known == 0].mean() for m in (filled, biased)]
    assert float(errors[0]) < 0.6 * float(errors[1])
    # no edge at the rim: nearer to the known side than the biased map's jump of 10 %
    assert float((filled.values - truth).abs()[10, 20:40].max()) < 0.04 * float(truth.max())
    assert filled.settings["filled"] == 300


def test_errors_are_carried_around_known_pixels_alone() -> None:
    depth, known = torch.full((32, 32), 2.0), torch.zeros(32, 32)
    known[4, 4] = 3.0
    met = carried(depth, known, known > 0, reach=2.0)
    assert 2.6 < float(met[4, 4]) < 3.0
    assert float(met[28, 28]) == pytest.approx(2.0)


def test_errors_are_kriged_to_like_pixels() -> None:
    """Two surfaces side by side: what is missed on one is taken off there, up to the edge and not beyond."""
    truth, image = torch.full((32, 32), 2.0), torch.zeros(3, 32, 32)
    truth[:, 16:], image[:, :, 16:] = 6.0, 1.0
    depth, known = torch.where(truth == 2.0, 2.4, 6.0), torch.zeros(32, 32)
    for x, y in ((4, 6), (10, 20), (22, 8), (28, 24)):
        known[y, x] = truth[y, x]
    kriged = krige_errors(depth, known, image, reach=2.0)
    assert float((kriged - truth).abs()[:, :16].mean()) < 0.3 * 0.4
    assert float((kriged - truth).abs()[:, 16:].max()) < 0.05
    many = torch.where(torch.rand(64, 64, generator=torch.Generator().manual_seed(0)) < 0.6, 3.0, 0.0)
    met = krige_errors(torch.full((64, 64), 2.0), many, torch.zeros(3, 64, 64), reach=2.0)
    assert float((met - 3).abs().max()) < 0.3


def test_masks_with_holes_are_filled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truth = (torch.arange(40)[:, None] > 15).float().expand(40, 56)
    known = truth.clone()
    known[10:22, 20:40] = torch.nan
    unsure = ObjectMask(0.5 + 0.1 * (truth - 0.5))
    filled = fill_mask(unsure, known).mask
    assert torch.equal(filled[~torch.isnan(known)], truth[~torch.isnan(known)])
    hole = torch.isnan(known)
    assert float((filled - truth)[hole].abs().mean()) < float((unsure.mask - truth)[hole].abs().mean())
    picture().save(tmp_path / "photo.png")
    seen = (~hole).numpy().astype(np.uint8) * 255
    Image.merge("LA", [Image.fromarray((truth.numpy() * 255).astype(np.uint8)), Image.fromarray(seen)]).save(
        tmp_path / "part.png"
    )
    np.save(tmp_path / "part.npy", known.numpy())
    call = ["segment", str(tmp_path / "photo.png"), "--outputs", "mask", "-o", str(tmp_path / "out")]
    masks = []
    for file in ("part.png", "part.npy"):
        assert main([*call, "--known", str(tmp_path / file), "--fill"]) == 0
        masks.append(np.asarray(Image.open(tmp_path / "out" / "photo_mask.png")))
    assert np.array_equal(*masks)
    assert np.array_equal(masks[0][seen > 0], (truth.numpy() * 255)[seen > 0])
    Image.new("L", (56, 40)).save(tmp_path / "opaque.png")
    np.save(tmp_path / "small.npy", np.zeros((3, 3), np.float32))
    capsys.readouterr()
    for file, message in (("opaque.png", "this picture is opaque"), ("small.npy", "is (40, 56) like the image")):
        assert main([*call, "--known", str(tmp_path / file), "--fill"]) != 0
        assert message in capsys.readouterr().err
    assert main([*call, "--fill"]) == 2
    assert "--known and --fill go together" in capsys.readouterr().err


def test_nearest_known() -> None:
    known = torch.zeros(3, 5)
    known[0, 0], known[2, 4] = 1.0, 7.0
    assert nearest_known(known)[1, 1] == 1
    assert nearest_known(known)[1, 3] == 7
    assert not nearest_known(torch.zeros(2, 2)).any()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(random_head(tmp_path / "head", family="lotus-d", task="disparity"))
    picture().save(tmp_path / "photo.png")
    _, known = some_depths()
    lines = [f"{x},{y},{known[y, x]}" for y, x in known.nonzero().tolist()]
    (tmp_path / "points.csv").write_text("x,y,metres\n" + "\n".join(lines))
    call = ["depth", str(tmp_path / "photo.png"), "--model", model, "--formats", "npy", "-o", str(tmp_path / "out")]
    guided = ["--known", str(tmp_path / "points.csv"), "--fit", "guided", "--guidance.rounds", "2", "--fill"]
    assert main([*call, *guided]) == 0
    depth = np.load(tmp_path / "out" / "photo_depth.npy")
    np.testing.assert_allclose(depth[known > 0], known[known > 0], rtol=1e-6)
    about = json.loads((tmp_path / "out" / "photo_depth.json").read_text())
    assert about["unit"] == "metres"
    assert about["settings"]["rounds"] == 2
    assert main([*call, "--known", str(tmp_path / "points.csv"), "--guidance.rounds", "2"]) == 2
    assert "--guidance.rounds says how --fit guided works" in capsys.readouterr().err
    assert main([*call, "--fill"]) == 2
    assert "--fill says how --known works" in capsys.readouterr().err
    assert main([*call, *guided[:4], "--guidance.steps", "2"]) == 2
    assert "guided by latent through the decoder, without --guidance.steps" in capsys.readouterr().err


def test_the_command_on_a_marigold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, (_, known) = str(random_head(tmp_path / "head", family="marigold", task="depth")), some_depths()
    picture().save(tmp_path / "photo.png")
    np.save(tmp_path / "known.npy", known.numpy())
    call = ["depth", str(tmp_path / "photo.png"), "--model", model, "--formats", "npy", "-o", str(tmp_path / "out")]
    guided = ["--known", str(tmp_path / "known.npy"), "--fit", "guided", "--ensemble", "2", "--guidance.steps", "3"]
    assert main([*call, *guided]) == 0
    assert "Marigold-DC; for an image, passes with gradients: 6 of U-Net and decoder" in capsys.readouterr().out
    about = json.loads((tmp_path / "out" / "photo_depth.json").read_text())
    assert about["unit"] == "metres"
    assert about["settings"]["steps"] == 3
    assert "rounds" not in about["settings"]
    assert np.load(tmp_path / "out" / "photo_depth.npy").shape == (40, 56)
    assert (tmp_path / "out" / "photo_uncertainty.png").exists()
    assert main([*call, *guided, "--guidance.rounds", "3"]) == 2
    assert "guided by Marigold-DC, without --guidance.rounds" in capsys.readouterr().err


def test_the_evaluation(tmp_path: Path) -> None:
    head = head_of(tmp_path, "lotus-d", "disparity")
    settings = CompletionEvaluation(count=3, points=(10, 40), size=32, workers=0)
    report = evaluate_completion(head, settings, CompletionConfig(rounds=2), progress=False)
    assert isinstance(report, CompletionReport)
    ((title, errors),) = report.scores.items()
    assert set(errors) == {"nearest known", "least squares", "robust", "robust, errors carried", "guided"}
    assert all(len(of[n]) == 3 for of in errors.values() for n in (10, 40))
    assert report.mean(title, "nearest known", 40)[0] < report.mean(title, "nearest known", 10)[0]
    assert "guided against least squares" in report.table()
    document = json.loads(report.to_json())
    assert document["means"][title]["guided"]["10"][0] == pytest.approx(np.mean(errors["guided"][10]))
    fit, guided = (np.mean(errors[name][40]) for name in ("least squares", "guided"))
    assert document["gain"]["40"][0] == pytest.approx(1 - guided / fit)


def test_known_depths_are_of_the_scene() -> None:
    scene = render_scene(3, category="chair", size=48)
    known, again = (known_depths(scene, 20, seed=5) for _ in range(2))
    assert torch.equal(known, again)
    assert int((known > 0).sum()) == 20
    assert torch.equal(known[known > 0], torch.from_numpy(scene.depth).float()[known > 0])
