"""Training synthesis: conditions dropped and perturbed, patches encoded once, what the network learns from them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from diffrep.cli import main
from diffrep.commands.parsing import read_command
from diffrep.commands.train import TrainSynthesis
from diffrep.scenes import SceneSet, render_set
from diffrep.synthesis import About, ConditionEmbedder, SynthesisModel, load_synthesis
from diffrep.synthesis.grids import ImageEncoder
from diffrep.training.consistency import FewStepTraining, train_few_step
from diffrep.training.early_exit import EarlyExitTraining, train_early_exit
from diffrep.training.loop import FitSettings, fit
from diffrep.training.patches import ImagePatches, ScenePatches, encode_patches
from diffrep.training.prior import PriorTraining, prior_batch
from diffrep.training.synthesis import (
    PUBLISHED,
    Objective,
    SynthesisTraining,
    build_model,
    condition_check,
    conditional_batch,
    draw_perturbation,
    paint_latents,
    relative_steps,
    smooth_decoder,
    synthesis_loss,
    train_synthesis,
    unrelated_cosine,
    whiten_tokens,
)

SHORT = FitSettings(steps=3, warmup=1, bf16=False, seed=3)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> SceneSet:
    return render_set(tmp_path_factory.mktemp("scenes"), "train", 14, workers=1, progress=False)


def small_model(prediction: str = "v_prediction", *, channels: tuple[int, ...] = (8,)) -> SynthesisModel:
    from diffusers import AutoencoderKL, UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=2, out_channels=2, block_out_channels=(16, 16), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8, attention_head_dim=2, norm_num_groups=4,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=channels, latent_channels=2, norm_num_groups=2, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * len(channels), up_block_types=("UpDecoderBlock2D",) * len(channels),
    )  # fmt: skip
    scheduler = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": prediction}
    return SynthesisModel(unet, ConditionEmbedder([4], 8), vae, scheduler)


# -- the objective ------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_prior_sees_perturbed_conditions() -> None:
    grids, conditions = draw(12, 2, 2, 5, seed=1), draw(12, 16, seed=2)
    plain, perturbed = (
        prior_batch(
            grids, conditions, PriorTraining(batch_size=6, cep=cep, gamma=2.0), torch.Generator().manual_seed(3)
        )
        for cep in ("none", "uniform")
    )
    apart = (perturbed["conditions"] - plain["conditions"]).abs()
    assert 0 < float(apart.max()) <= 2.0 / 4  # gamma / sqrt(16)
    assert torch.equal(plain["clean"], perturbed["clean"])


def test_dropped_samples_see_the_null_condition_and_no_perturbation() -> None:
    objective = Objective(small_model()).eval()
    latents, noise, embeddings = draw(3, 2, 8, 8), draw(3, 2, 8, 8, seed=1), draw(3, 4, seed=2)
    timesteps, dropped = torch.tensor([0, 400, 999]), torch.tensor([True, False, True])
    perturbation = draw(3, 1, 8, seed=3)
    found = objective(latents, noise, timesteps, [embeddings], dropped=[dropped], perturbation=perturbation)
    model = objective.model
    expected = model.context(embeddings) + perturbation
    expected[dropped] = model.null_context(2)
    torch.testing.assert_close(found.predicted, model(found.noisy, timesteps, expected))
    alpha = model.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    torch.testing.assert_close(found.noisy, alpha.sqrt() * latents + (1 - alpha).sqrt() * noise)
    # v and the noisy latent give the clean one back
    torch.testing.assert_close(alpha.sqrt() * found.noisy - (1 - alpha).sqrt() * found.target, latents)
    torch.testing.assert_close(Objective(small_model("epsilon"))(latents, noise, timesteps, [embeddings]).target, noise)
    with pytest.raises(ValueError, match="predicts sample"):
        Objective(small_model("sample"))


def test_perturbations_have_the_published_size() -> None:
    uniform = draw_perturbation((4000, 2, 25), "uniform", 1.5, generator())
    normal = draw_perturbation((4000, 2, 25), "normal", 1.5, generator())
    assert uniform is not None
    assert normal is not None
    assert float(uniform.abs().max()) <= 1.5 / 5
    assert float(uniform.std()) == pytest.approx(1.5 / 5 / 3**0.5, rel=0.02)
    assert float(normal.std()) == pytest.approx(1.5 / 5, rel=0.02)
    assert draw_perturbation((4, 1, 8), "none", 1.0, generator()) is None


def test_tokens_start_white() -> None:
    embedder = ConditionEmbedder([12], 8)
    embeddings = 5 + draw(400, 12) @ draw(12, 12, seed=1)
    whiten_tokens(embedder, embeddings)
    with torch.no_grad():
        tokens = embedder(embeddings)[:, 0]
    torch.testing.assert_close(tokens.mean(0), torch.zeros(8), atol=1e-3, rtol=0)
    torch.testing.assert_close(torch.cov(tokens.T), torch.eye(8), atol=1e-2, rtol=0)


def test_the_network_learns_to_listen_to_its_condition(tmp_path: Path) -> None:
    embeddings = torch.nn.functional.normalize(draw(256, 4), dim=1)
    latents = (embeddings @ draw(4, 2, seed=1))[:, :, None, None].expand(-1, -1, 8, 8) + 0.1 * draw(256, 2, 8, 8)
    objective = Objective(small_model())
    whiten_tokens(objective.model.embedder, embeddings[:192])
    batches = partial(conditional_batch, latents[:192].half(), embeddings[:192].half(), 1000, 16, 0.1)
    settings = FitSettings(steps=60, learning_rate=5e-3, warmup=5, ema_decay=0.9, bf16=False)
    trained = fit(objective, batches, synthesis_loss, settings, tmp_path, progress=False)
    found = condition_check(latents[192:], embeddings[192:], synthesis_loss)(trained, 0)
    assert found["own"] < 0.8 * found["other"]
    assert found["own"] < found["null"]


def test_unrelated_embeddings_are_told_by_their_cosine() -> None:
    assert unrelated_cosine(draw(2000, 400)) == pytest.approx(1.645 / 400**0.5, abs=0.01)  # normal, 95th percentile
    assert unrelated_cosine(torch.ones(50, 4)) == 0.99


# -- the decoder --------------------------------------------------------------------------------------------


def test_steps_are_compared_within_a_period() -> None:
    even = relative_steps(draw(64, 3, 16, 24), 4)
    torch.testing.assert_close(even, torch.ones(2, 4), atol=0.05, rtol=0)
    blocks = draw(64, 3, 4, 6).repeat_interleave(4, 2).repeat_interleave(4, 3)
    torch.testing.assert_close(relative_steps(blocks, 4), torch.tensor([[0.0, 0, 0, 4]] * 2))
    assert relative_steps(torch.zeros(1, 3, 8, 8), 4).isfinite().all()


def test_the_decoder_alone_learns_to_draw_no_grid(scenes: SceneSet, tmp_path: Path) -> None:
    model, patches = small_model(channels=(8, 8, 8)), ScenePatches(scenes)
    assert model.factor == 4
    before = {name: value.clone() for name, value in model.autoencoder.state_dict().items()}
    images = patches.draw([i % len(patches) for i in range(64)], 32, generator(5))
    latents, painted = model.encode(images), paint_latents(model, draw(16, 4), tmp_path / "painted")
    assert painted.shape == (16, 2, 8, 8)

    def measured() -> tuple[float, float, float]:
        """Unevenness against the images, and of painted patches; squared error."""
        decoded = model.decode(latents)
        uneven = relative_steps(decoded, 4) - relative_steps(images, 4)
        grid = relative_steps(model.decode(painted * model.autoencoder.config.scaling_factor), 4) - 1
        return float(uneven.abs().mean()), float(grid.abs().mean()), float((decoded - images).square().mean())

    uneven, grid, error = measured()
    settings = FitSettings(steps=80, learning_rate=5e-3, warmup=5, weight_decay=0.0, ema_decay=0.9, bf16=False)
    smooth_decoder(model, patches, painted, tmp_path, settings, progress=False)
    for name, value in model.autoencoder.state_dict().items():
        assert name.startswith(("decoder.", "post_quant_conv.")) or torch.equal(value, before[name])
    found = measured()
    assert found[0] < 0.5 * uneven
    assert found[1] < 0.5 * grid
    assert found[2] < 0.9 * error
    assert torch.equal(paint_latents(model, draw(16, 4, seed=1), tmp_path / "painted"), painted)  # kept
    assert not any(p.requires_grad for p in model.autoencoder.parameters())


def test_a_smoothed_decoder_is_kept_with_the_model(scenes: SceneSet, tmp_path: Path) -> None:
    from diffrep.commands.train import write_model

    training, patches = SynthesisTraining(fit=SHORT, batch_size=2, held_out=4, smooth=0.01), ScenePatches(scenes)
    model = train_synthesis(training, patches, tmp_path / "run", progress=False)
    assert model.about.autoencoder is None
    write_model(tmp_path / "model", model, training, patches, tmp_path / "run")
    loaded, latents = load_synthesis(tmp_path / "model"), draw(1, 8, 16, 16)
    torch.testing.assert_close(loaded.decode(latents), model.decode(latents), atol=2e-2, rtol=0)
    assert not torch.equal(load_synthesis().decode(latents), loaded.decode(latents))
    with pytest.raises(ValueError, match="smooth must be finite and at least 0"):
        SynthesisTraining(smooth=-1)


# -- patches ------------------------------------------------------------------------------------------------


def test_patches_are_encoded_once_and_others_refused(scenes: SceneSet, tmp_path: Path) -> None:
    encoder = ImageEncoder.load("tiny-dino", "mean")
    model = build_model(SynthesisTraining(), encoder)
    patches, file = ScenePatches(scenes, count=5), tmp_path / "patches.safetensors"
    first = encode_patches(patches, model, encoder, file, copies=2, seed=1, progress=False)
    assert first[0].shape == (10, 8, 16, 16)
    assert first[1].shape == (10, encoder.dim)
    written = file.stat().st_mtime_ns
    again = encode_patches(patches, model, encoder, file, copies=2, seed=1, progress=False)
    assert file.stat().st_mtime_ns == written
    assert torch.equal(again[0], first[0])
    with pytest.raises(ValueError, match="seed 1, not 2"):
        encode_patches(patches, model, encoder, file, copies=2, seed=2, progress=False)
    flipped = encode_patches(
        patches, model, encoder, tmp_path / "flipped", copies=2, flips="both", seed=1, progress=False
    )
    assert not torch.equal(flipped[0], first[0])
    assert torch.equal(flipped[1][:5], first[1][:5])  # of the unmirrored patches


def test_too_few_patches_and_a_base_that_is_none_are_refused_before_any_is_drawn(tmp_path: Path) -> None:
    (tmp_path / "image.png").write_bytes(b"not read")
    patches = ImagePatches((tmp_path / "image.png",))
    with pytest.raises(ValueError, match="2 patches are too few to hold 2 out"):
        encode_patches(patches, load_synthesis(), None, tmp_path / "f", held_out=2, copies=2, progress=False)

    def render() -> ScenePatches:
        raise AssertionError("scenes are rendered for a base that is none")

    for train, settings in ((train_few_step, FewStepTraining), (train_early_exit, EarlyExitTraining)):
        with pytest.raises(ValueError, match="nowhere"):
            train(settings(base=str(tmp_path / "nowhere")), render, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_patches_of_files_keep_their_scale_unless_told(tmp_path: Path) -> None:
    ramp = np.zeros((40, 60, 3), np.uint8)
    ramp[..., 0] = np.arange(60)  # the column
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    files = (tmp_path / "ramp.png",)
    patch = ImagePatches(files).draw([0], 16, generator())[0]
    steps = (patch[0] * 255).diff(dim=1)
    torch.testing.assert_close(steps, torch.ones_like(steps), atol=1e-3, rtol=0)
    assert not torch.equal(ImagePatches(files).draw([0], 16, generator(1))[0], patch)
    scaled = ImagePatches(files, (1.0, 1.0)).draw([0], 16, generator())[0]
    assert float((scaled[0] * 255).diff(dim=1)[:, 4:12].mean()) == pytest.approx(40 / 16, rel=0.1)
    with pytest.raises(ValueError, match="smaller than a patch of 64 pixels"):
        ImagePatches(files).draw([0], 64, generator())


# -- whole runs ---------------------------------------------------------------------------------------------


def test_training_starts_from_the_base_where_shapes_agree() -> None:
    encoder = ImageEncoder.load("tiny-dino", "mean")
    base: Any = build_model(SynthesisTraining(), encoder).unet.state_dict()
    wide: Any = build_model(SynthesisTraining(width=96), encoder)
    assert wide.embedder.width == wide.unet.config.cross_attention_dim == 96
    same = [k for k, v in wide.unet.state_dict().items() if v.shape == base[k].shape]
    assert all(torch.equal(wide.unet.state_dict()[k], base[k]) for k in same)
    assert all(".attn2.to_" in k for k in base if k not in same)
    scratch = build_model(SynthesisTraining(scratch=True), encoder).unet.state_dict()
    assert not torch.equal(scratch["conv_in.weight"], base["conv_in.weight"])


def test_a_run_is_written_and_trained_on(scenes: SceneSet, tmp_path: Path) -> None:
    from diffrep.commands.train import write_model

    training = SynthesisTraining(fit=SHORT, batch_size=4, held_out=4, cep="normal")
    patches = ScenePatches(scenes)
    model = train_synthesis(training, patches, tmp_path / "run", progress=False)
    write_model(tmp_path / "model", model, training, patches, tmp_path / "run")
    loaded = load_synthesis(tmp_path / "model")
    assert loaded.about.encoder == "tiny-dino"
    assert loaded.about.pooling == "mean"
    assert loaded.about.unrelated == model.about.unrelated != About().unrelated
    assert sum(p.numel() for p in loaded.unet.parameters()) < 3.3e6
    assert sum(f.stat().st_size for f in (tmp_path / "model").rglob("*") if f.is_file()) < 7 * 2**20
    for name, value in loaded.unet.state_dict().items():
        torch.testing.assert_close(value, model.unet.state_dict()[name], atol=2e-3, rtol=2e-3)
    further = SynthesisTraining(base=str(tmp_path / "model"), fit=SHORT, batch_size=4, held_out=4)
    start = build_model(further, ImageEncoder.load("tiny-dino", "mean"))
    assert torch.equal(start.embedder.tokens[0].weight, loaded.embedder.tokens[0].weight)
    with pytest.raises(ValueError, match="too few to hold 14 out"):
        train_synthesis(SynthesisTraining(fit=SHORT, held_out=14), patches, tmp_path / "run", progress=False)


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\)"):
        SynthesisTraining(dropout=1.0)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        SynthesisTraining(batch_size=0)


def test_options_that_were_typed_win_over_the_published_ones() -> None:
    typed = read_command(TrainSynthesis, ["--published", "--steps", "20000", "--flips", "none"], "train synthesis")
    default = SynthesisTraining()
    assert (typed.training.fit.steps, typed.training.flips) == (default.fit.steps, default.flips)
    assert typed.training.fit.learning_rate == PUBLISHED.fit.learning_rate
    assert read_command(TrainSynthesis, [], "train synthesis").training == default


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["synthesis", "--base", "nonsense"], "nonsense: no such folder"),
        (["synthesis", "--encoder", "nonsense"], "nonsense: no such folder"),
        (["synthesis", "--learning-rate", "nan"], "learning_rate must be finite and above 0, got nan"),
        (["synthesis", "--learning-rate", "-1"], "learning_rate must be finite and above 0, got -1"),
        (["synthesis", "--sides", "0.9", "0.1"], "--sides are a smallest and a largest share of the image"),
        (["synthesis", "--sides", "nan", "1"], "--sides are a smallest and a largest share of the image"),
        (["fewstep", "--scenes", "nonsense"], "nonsense: holds no set of scenes"),
        (["early-exit", "--count", "0"], "--count must be at least 1, got 0"),
        (["restore", "--data", "nonsense"], "nonsense: no such file or folder"),
        (["prior", "--encoder", "nonsense"], "nonsense: no such folder"),
        (["tiny", "--scenes", "0"], "--scenes must be at least 1, got 0"),
    ],
)
def test_nothing_is_rendered_for_a_training_that_cannot_start(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *options, "--work", str(tmp_path / "work")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "work").exists()
