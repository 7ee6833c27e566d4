"""Training: exact resume, the linear start, labels that follow crops, and all stages in a smoke run."""

from __future__ import annotations

import cProfile
import json
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diffrep.backbones import load_backbone
from diffrep.scenes import PART_MIRROR, SEEN, UNSEEN, VOCABULARY, SceneSet, render_scene, render_set, scene_seed
from diffrep.training import Batch, FitSettings, TinyTraining, fit, train_tiny
from diffrep.training.loop import Averages, clip_gradients, step_generator
from diffrep.training.tiny.crops import (
    Crops,
    LabelSettings,
    check_unseen,
    draw_groups,
    draw_queries,
    gather,
    jitter,
    matching_loss,
)
from diffrep.training.tiny.dino import sinkhorn
from diffrep.training.tiny.unet import caption_tokenizer
from diffrep.training.tiny.vae import VaeSettings, build_vae, psnr, start_linear


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> SceneSet:
    folder = tmp_path_factory.mktemp("scenes")
    return render_set(folder, "train", 2 * len(SEEN), workers=1, progress=False)


# -- the loop -----------------------------------------------------------------------------------------------


def small_network() -> nn.Module:
    network = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2))
    source = generator(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=source))
    return network


def random_batches(source: torch.Generator) -> Batch:
    x = torch.randn(16, 4, generator=source)
    return {"x": x, "y": x[:, :2] * x[:, 2:]}


def square_loss(module: nn.Module, ema: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
    return {"loss": (module(batch["x"]) - batch["y"]).square().mean()}


def run(folder: Path, settings: FitSettings, batches: Callable[[torch.Generator], Batch] = random_batches) -> nn.Module:
    return fit(small_network(), batches, square_loss, settings, folder, progress=False)


SHORT = FitSettings(steps=40, learning_rate=1e-2, warmup=5, bf16=False)


def test_an_interrupted_run_ends_with_the_same_weights(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", SHORT)
    made = 0

    def interrupted(source: torch.Generator) -> Batch:
        nonlocal made
        made += 1
        if made == 25:
            raise KeyboardInterrupt
        return random_batches(source)

    often = replace(SHORT, checkpoint_seconds=0.0)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", often, interrupted)
    made = 100
    resumed = run(tmp_path / "broken", often, interrupted)
    assert made == 100 + 40 - 24  # went on behind the last whole step
    for ours, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=0, rtol=0)
    for a, b in zip(small_network().parameters(), whole.parameters(), strict=True):
        assert not torch.equal(a, b)


def test_sara_trains_small_weights_alone_and_resumes(tmp_path: Path) -> None:
    sparse = replace(SHORT, sara=0.15, weight_decay=0.0, ema_decay=0.0)
    before, after = small_network(), run(tmp_path / "whole", sparse)
    for old, new in zip(before.parameters(), after.parameters(), strict=True):
        small = old.abs() < 0.15
        assert torch.equal(old[~small], new[~small])
        assert bool((old != new)[small].all())
    left = 20

    def interrupted(source: torch.Generator) -> Batch:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return random_batches(source)

    often = replace(sparse, checkpoint_seconds=0.0)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", often, interrupted)
    for ours, theirs in zip(run(tmp_path / "broken", often).parameters(), after.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(ValueError, match="sara must be"):
        FitSettings(steps=1, sara=0.0)


def test_a_finished_run_returns_at_once(tmp_path: Path) -> None:
    first = run(tmp_path, SHORT)

    def no_more(source: torch.Generator) -> Batch:
        raise AssertionError("a batch was asked for")

    again = run(tmp_path, SHORT, no_more)
    torch.testing.assert_close(dict(again.named_parameters()), dict(first.named_parameters()), atol=0, rtol=0)


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    run(tmp_path, SHORT)
    with pytest.raises(ValueError, match=r"learning_rate 0\.01, not 0\.02"):
        run(tmp_path, replace(SHORT, learning_rate=2e-2))
    with pytest.raises(ValueError, match="of another network"):
        fit(nn.Linear(4, 2), random_batches, square_loss, SHORT, tmp_path, progress=False)


def test_training_learns_and_logs(tmp_path: Path) -> None:
    settings = FitSettings(steps=400, learning_rate=2e-2, bf16=False, ema_decay=0.9)
    found = fit(
        small_network(),
        random_batches,
        square_loss,
        settings,
        tmp_path,
        validate=lambda ema, step: {"checked": float(step)},
        validate_every=200,
        progress=False,
    )
    batch = random_batches(generator(9))
    before, after = (square_loss(m, m, batch)["loss"].item() for m in (small_network(), found))
    assert after < 0.5 * before
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [r["checked"] for r in rows if "checked" in r] == [200, 400]
    losses = [r["loss"] for r in rows if "loss" in r]
    assert losses[-1] < losses[0]


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    def broken(source: torch.Generator) -> Batch:
        return {"x": torch.full((2, 4), torch.nan), "y": torch.zeros(2, 2)}

    with pytest.raises(FloatingPointError, match="the loss is nan at step 0"):
        run(tmp_path, SHORT, broken)


@pytest.mark.parametrize("most", [0.5, 100.0, float("inf")])
def test_gradients_are_clipped_together(most: float) -> None:
    ours, theirs = small_network(), small_network()
    for module in (ours, theirs):
        module(torch.arange(8.0).view(2, 4)).square().sum().backward()
    clip_gradients(list(ours.parameters()), most)
    torch.nn.utils.clip_grad_norm_(theirs.parameters(), most)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_no_python_is_spent_on_every_small_tensor() -> None:
    """Clipping and averaging make as many calls for 600 tensors as for 6."""

    def calls(layers: int) -> int:
        module = nn.ModuleList(nn.Linear(3, 3) for _ in range(layers))
        averages, parameters = Averages(deepcopy(module), module), list(module.parameters())
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        profile = cProfile.Profile()
        with profile:
            clip_gradients(parameters, 1.0)
            averages.update(0.9)
        return sum(entry.callcount for entry in profile.getstats())

    assert calls(300) < calls(3) + 100  # a call for every tensor would make 594 more; coverage and collection a few


def test_moving_average() -> None:
    ema, module = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    with torch.no_grad():
        module.weight.fill_(3.0)
        module.running_mean.fill_(5.0)
        module.num_batches_tracked.fill_(7)
    Averages(ema, module).update(0.75)
    assert ema.weight.tolist() == [1.5] * 3
    assert ema.running_mean.tolist() == [1.25] * 3
    assert ema.num_batches_tracked.item() == 7


def test_learning_rate() -> None:
    settings = FitSettings(steps=100, learning_rate=1.0, warmup=9, final_rate=0.1)
    assert settings.rate(0.0, 0) == pytest.approx(0.1)
    assert settings.rate(0.5, 50) == pytest.approx(0.55)
    assert settings.rate(1.0, 100) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("warmup", "rates"), [(100, {99: 0.99, 100: 0.01, 105: 0.01}), (120, {100: 100 / 120, 119: 119 / 120, 120: 0.01})]
)
def test_an_exponential_schedule_that_ends_in_its_warm_up(warmup: int, rates: dict[int, float]) -> None:
    settings = FitSettings(steps=100, learning_rate=1.0, warmup=warmup, schedule="exponential", final_rate=0.01)
    for step, rate in rates.items():
        assert settings.rate(step / 100, step) == pytest.approx(rate)


# -- crops and labels ---------------------------------------------------------------------------------------


def test_crops_map_points_there_and_back() -> None:
    crops = Crops.draw(6, 128, 96, generator(), sides=(0.6, 1.0))
    points = 96 * torch.rand(6, 5, 2, generator=generator(1))
    inside = crops.to_image(points)
    torch.testing.assert_close(crops.from_image(inside), points, atol=1e-3, rtol=0)
    assert inside.min() >= 0
    assert inside.max() <= 128
    assert 0 < crops.mirrored.sum() < 6


def test_a_whole_crop_is_the_image_and_a_mirrored_one_its_mirror(scenes: SceneSet) -> None:
    indices = torch.arange(2)
    images = gather(scenes, "image", indices)
    crops = Crops(torch.zeros(2, 2), torch.full((2,), 128.0), torch.tensor([False, True]), 128)
    found = crops.images(images)
    plain = images.permute(0, 3, 1, 2).float() / 255
    torch.testing.assert_close(found[0], plain[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(found[1], plain[1].flip(-1), atol=1e-4, rtol=0)


def test_labels_follow_a_mirror(scenes: SceneSet) -> None:
    indices = torch.arange(len(scenes))
    part, canonical = gather(scenes, "part", indices), gather(scenes, "canonical", indices)
    count = len(indices)
    whole = Crops(torch.zeros(count, 2), torch.full((count,), 128.0), torch.zeros(count, dtype=torch.bool), 128)
    mirrored = replace(whole, mirrored=torch.ones(count, dtype=torch.bool))
    plain, place = whole.labels(part, canonical, 16)
    swapped, turned = mirrored.labels(part, canonical, 16)
    # a cell's label is that of one pixel near its centre, and the nearest one may lie on either side of it
    same = torch.from_numpy(PART_MIRROR).long()[plain.flip(2)] == swapped
    assert same.float().mean() > 0.97
    expected = place.flip(2) * torch.tensor([-1.0, 1.0, 1.0])
    near = (expected - turned).abs().amax(-1) < 0.2
    assert near[same].float().mean() > 0.97
    assert (plain > 0).float().mean() > 0.05


def test_groups_are_different_objects_of_one_category() -> None:
    category = np.array([0, 1, 2] * 5)
    rows = draw_groups(category, 4, 3, generator()).view(4, 3)
    for group in rows:
        assert len(set(group.tolist())) == 3
        assert len(set(category[group.numpy()].tolist())) == 1
    with pytest.raises(ValueError, match="needs 6 scenes of a category, one category has 5"):
        draw_groups(category, 1, 6, generator())


def test_jitter_keeps_range_and_strength_zero_changes_nothing() -> None:
    images = torch.rand(4, 3, 8, 8, generator=generator())
    torch.testing.assert_close(jitter(images, 0.0, generator()), images)
    changed = jitter(images, 1.0, generator())
    assert changed.min() >= 0
    assert changed.max() <= 1
    assert (changed - images).abs().mean() > 0.02


# -- losses -------------------------------------------------------------------------------------------------


def test_matching_loss_is_least_where_features_are_places() -> None:
    settings = LabelSettings(members=2, queries=8, spread=0.1)
    place = torch.rand(4, 6, 6, 3, generator=generator()) * 2 - 1
    place[1::2] = place[::2].flip(1)  # the partner shows the same places elsewhere
    part = torch.ones(4, 6, 6, dtype=torch.int64)
    part[2:] = 5
    part[:, :, :2] = 0
    part[1::2] = part[::2].flip(1)
    batch = {"part": part, "canonical": place, "queries": draw_queries(part, settings, generator(1))}
    assert (part.flatten(1).gather(1, batch["queries"]) > 0).all()
    waves = torch.randn(3, 64, generator=generator(2)) * 6
    angles = place @ waves
    good = torch.cat([angles.sin(), angles.cos()], -1) * (part > 0)[..., None]
    bad = torch.randn(good.shape, generator=generator(3))
    loss, right = matching_loss(good.movedim(-1, 1), batch, settings)
    worse, wrong = matching_loss(bad.movedim(-1, 1), batch, settings)
    assert loss < 0.5 * worse
    assert right > 0.9
    assert wrong < 0.3


def test_sinkhorn_spreads_prototypes_evenly() -> None:
    scores = torch.randn(64, 4, generator=generator()) + torch.tensor([3.0, 0, 0, 0])
    found = sinkhorn(scores, 1.0, rounds=30)
    torch.testing.assert_close(found.sum(1), torch.ones(64))
    torch.testing.assert_close(found.sum(0), torch.full((4,), 16.0), atol=0.05, rtol=0)


def test_unseen_categories_never_enter_the_data(scenes: SceneSet, tmp_path: Path) -> None:
    check_unseen(scenes)
    other = render_set(tmp_path, "train", 2, categories=("car", UNSEEN[0]), workers=1, size=16, progress=False)
    with pytest.raises(ValueError, match=f"holds {UNSEEN[0]}, which training must never see"):
        check_unseen(other)


# -- tokenizer and autoencoder ------------------------------------------------------------------------------


def test_every_word_is_one_token_and_comes_back() -> None:
    tokenizer = caption_tokenizer()
    assert {word: tokenizer.tokenize(word) for word in VOCABULARY} == {w: [f"{w}</w>"] for w in VOCABULARY}
    for category in (*SEEN, *UNSEEN):
        caption = render_scene(scene_seed("val", 3), category=category, size=16).caption
        ids = tokenizer(caption).input_ids
        assert len(ids) == len(caption.split()) + 2 <= tokenizer.model_max_length
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == caption
    assert tokenizer("an unknown naïve word").input_ids[-1] == tokenizer.eos_token_id


@pytest.mark.slow
def test_the_linear_start_is_a_good_autoencoder_at_once(scenes: SceneSet, tmp_path: Path) -> None:
    settings = VaeSettings()
    settings = replace(settings, linear=replace(settings.linear, steps=160))
    torch.manual_seed(0)
    vae = build_vae(settings)
    images = gather(scenes, "image", torch.arange(16)).permute(0, 3, 1, 2).float() / 255
    assert psnr(vae, images) < 15
    start_linear(vae, scenes, settings, tmp_path, progress=False)
    assert psnr(vae, images) > 20
    posterior = vae.encode(images * 2 - 1).latent_dist
    rows = posterior.mean.movedim(1, -1).flatten(0, 2)
    torch.testing.assert_close(torch.cov(rows.T), torch.eye(8), atol=0.35, rtol=0)
    torch.testing.assert_close(posterior.std, torch.full_like(posterior.std, settings.noise))


# -- everything ---------------------------------------------------------------------------------------------


def test_a_step_has_its_own_generator() -> None:
    draws = {torch.rand(1, generator=step_generator(seed, step)).item() for seed in (0, 1) for step in range(50)}
    assert len(draws) == 100


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_smoke_run_gives_loadable_models(tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    config = TinyTraining.smoke(tmp_path / "work", tmp_path / "models")
    card = train_tiny(config, progress=False)
    assert set(card["data"]["categories"]) == set(SEEN)
    assert card["steps"]["unet-joint"]["steps"] == 2
    assert 0 <= card["validation"]["unseen"]["joint"]["fused"] <= 100
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "models/tiny")
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a photo of a red car", num_inference_steps=2, output_type="pt", generator=generator()).images
    assert image.shape == (1, 3, 128, 128)
    for name, tap in (("tiny", "up.2.resnet.0"), ("tiny-dino", "layer.1")):
        backbone = load_backbone(tmp_path / "models" / name)
        assert tap in [t.name for t in backbone.taps()]
    assert json.loads((tmp_path / "models/tiny/model-card.json").read_text()) == json.loads(json.dumps(card))
    again = train_tiny(config, progress=False)  # resumes: nothing is trained twice
    assert again["validation"] == card["validation"]
