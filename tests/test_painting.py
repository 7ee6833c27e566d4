"""`sample` on the public layouts, by parts of the network, from searched steps; samplers against kinds of models."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from diffrep import load_backbone, sample
from diffrep.backbones import BackboneError, early_exit
from diffrep.backbones.early_exit import PROBES, EarlyExitUViT, LayerOutputs, UViTConfig, load_early_exit
from diffrep.backbones.partial import PartialNetwork, skippable_units
from diffrep.cli import main
from diffrep.eval.benchmarks.samplers import SamplersBenchmark
from diffrep.eval.samplers import SamplersEvaluation, evaluate_samplers
from diffrep.eval.search import SearchSettings, best_start, extraction_fitness, search_steps
from diffrep.files import save_weights
from diffrep.painting import DiffusionModel, diffusion_model
from diffrep.sampling.core import run
from diffrep.sampling.samplers import SAMPLERS, build_table, model_schedule
from diffrep.sampling.schedules import Flow, NoiseSchedule, SamplingError, TableVP
from diffrep.searched import Candidate, as_candidate, read_candidate
from diffrep.synthesis import (
    EmbeddingGrid,
    SynthesisModel,
    SynthesisSettings,
    build_scheduler,
    denoise_canvas,
    load_synthesis,
    sample_patches,
)
from diffrep.synthesis.canvas import Run
from diffrep.synthesis.sampler import share_of_operations
from diffrep.training.fokker_planck import wasserstein

from . import layouts
from .test_sampling import MEAN, SPREAD, gaussian


@pytest.fixture(scope="module")
def tiny() -> DiffusionModel:
    return diffusion_model("tiny", "a cat", guidance=2.0)


# -- layouts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sdxl", "sd3", "flux.1-dev", "flux.1-schnell", "sd2.1"])
def test_public_layouts_are_painted(kind: str, tmp_path: Path) -> None:
    """Two prompts in one batch are what they are alone, and guidance changes them."""
    model = diffusion_model(layouts.build(kind, tmp_path / kind), ["a cat", "two dogs"])
    side = 8 * (model.multiple or model.factor)
    painted = sample(model, steps=2, size=(side, side), guidance=None)
    assert painted.images.shape == (2, 3, side, side)
    assert torch.isfinite(painted.latents).all()
    alone = sample(diffusion_model(tmp_path / kind, ["two dogs"]), steps=2, size=(side, side)).latents
    assert (painted.latents[0] - painted.latents[1]).abs().max() > 1e-3
    other = sample(diffusion_model(tmp_path / kind, ["a cat"], guidance=1.0), steps=2, size=(side, side)).latents
    if kind != "flux.1-schnell":  # which has no guidance where none is asked for
        assert (painted.latents[:1] - other).abs().max() > 1e-4
    else:
        torch.testing.assert_close(painted.latents[:1], other, atol=1e-3, rtol=1e-3)
    assert alone.shape[0] == 1


def test_flows_of_flux_are_shifted_by_the_number_of_tokens() -> None:
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True, "shift": 3.0}
    _, flow = model_schedule(config)
    assert isinstance(flow, Flow)
    assert flow.of_tokens(256).shift == pytest.approx(np.exp(0.5))
    assert flow.of_tokens(4096).shift == pytest.approx(np.exp(1.15))
    assert Flow(shift=2.0).of_tokens(4096).shift == 2.0


def test_flow_timesteps_are_those_of_diffusers() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    theirs = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    theirs.set_timesteps(sigmas=np.linspace(1, 1 / 6, 6).tolist(), mu=0.8)
    ours = build_table("euler", Flow(shift=float(np.exp(0.8))), 6)
    np.testing.assert_allclose(ours.grid.labels, theirs.timesteps.numpy(), rtol=1e-5)


# -- samplers against kinds of models -------------------------------------------------------------------------

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "stable diffusion": ("epsilon", SD),
    "v prediction": ("v_prediction", SD),
    "cosine": ("v_prediction", {"beta_schedule": "squaredcos_cap_v2"}),  # begins almost without signal
    "without signal": ("v_prediction", {**SD, "rescale_betas_zero_snr": True}),
    "adm": ("epsilon", {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}),
    "flow": ("flow_prediction", {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}),
}


def exact(prediction: str, schedule: NoiseSchedule) -> Any:
    """The exact network of normal data, in a model's own convention."""

    def network(x: Tensor, t: float) -> Tensor:
        t = t / 1000 if isinstance(schedule, Flow) else t
        a, s = float(schedule.alpha(t)), float(schedule.sigma(t))
        noise = gaussian(x, a, s)
        data = (
            torch.full_like(x, MEAN) if a < 1e-12 else MEAN + a * SPREAD**2 * (x - a * MEAN) / (a**2 * SPREAD**2 + s**2)
        )
        return {"epsilon": noise, "v_prediction": a * noise - s * data, "flow_prediction": noise - data}[prediction]

    return network


def refusal(name: str, schedule: NoiseSchedule) -> str:
    try:
        build_table(name, schedule, 20)
    except SamplingError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_works_or_says_so_before_the_first_step(name: str, kind: str) -> None:
    prediction, config = KINDS[kind]
    schedule = model_schedule({**config, "prediction_type": prediction})[1]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(100, 1, 4, 4, generator=generator)
    if refused := refusal(name, schedule):
        assert "\n" not in refused
        assert len(refused) < 300  # it may list the samplers that work
        assert kind in ("cosine", "without signal", "flow") or not SAMPLERS[name].table, f"{name} works elsewhere"
        assert kind != "cosine" or name in ("rho-rk", "pndm", "evodiff", "sit-sde")
        return
    table = build_table(name, schedule, 20)
    noise = [torch.randn(x.shape, generator=generator) for _ in table.updates]
    got = run(table, exact(prediction, schedule), x, prediction=prediction, noise=noise)
    assert abs(float(got.mean()) - MEAN) < 0.1, (name, kind)
    if name != "lcm":  # it asks a distilled model; the estimates of another have less spread
        assert abs(float(got.std()) - SPREAD) < 0.15, (name, kind)


# -- parts of the network -------------------------------------------------------------------------------------


def test_skipped_units_are_skipped_and_cost_nothing(tiny: DiffusionModel) -> None:
    units = skippable_units(tiny.network)
    whole = sample(tiny, timesteps=(900, 500, 100), count_flops=True)
    steps = Candidate((900, 500, 100), skipped=((), tuple(range(len(units))), (0, 1)))
    less = sample(tiny, timesteps=steps, count_flops=True)
    assert whole.flops is not None
    assert less.flops is not None
    assert 0.5 * whole.flops < less.flops < 0.8 * whole.flops
    assert (whole.latents - less.latents).abs().max() > 1e-3
    none = sample(tiny, timesteps=Candidate((900, 500, 100), skipped=((), (), ())))
    assert torch.equal(none.latents, whole.latents)
    assert torch.equal(sample(tiny, timesteps=(900, 500, 100)).latents, whole.latents)  # the network is as it was
    with pytest.raises(BackboneError, match="units 0"):
        sample(tiny, timesteps=Candidate((900,), skipped=((10_000,),)))


@pytest.mark.parametrize("kind", ["sd3", "flux.1-schnell"])
def test_blocks_of_transformers_are_skipped(kind: str, tmp_path: Path) -> None:
    model = diffusion_model(layouts.build(kind, tmp_path / kind), "a cat", guidance=1.0)
    side = 4 * (model.multiple or model.factor)
    steps = Candidate((1000, 500), skipped=((), tuple(range(len(skippable_units(model.network)) - 1))))
    whole, less = (
        sample(model, timesteps=t, size=(side, side), sampler="euler", count_flops=True) for t in ((1000, 500), steps)
    )
    assert less.flops < whole.flops  # type: ignore[operator]
    assert torch.isfinite(less.latents).all()


def test_a_fixed_table_of_depths_inherits_as_an_interval_does(tiny: DiffusionModel) -> None:
    by_interval = sample(tiny, steps=4, inherit=2, branch=1)
    by_table = sample(tiny, steps=4, depths=(-1, 1, -1, 1))
    assert torch.equal(by_interval.latents, by_table.latents)
    with pytest.raises(SamplingError, match="one entry for each of 4 calls"):
        sample(tiny, steps=4, depths=(-1, 1))


@pytest.mark.parametrize("probe", PROBES)
def test_samples_leave_early_by_their_own_uncertainty(
    probe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sample leaves where its probe says so, whatever its company, and what has left costs nothing."""
    torch.manual_seed(1)
    monkeypatch.setattr(early_exit, "TIMESTEPS", 20)
    about = UViTConfig(img_size=8, embed_dim=16, depth=5, num_heads=2)
    network = EarlyExitUViT(about, probe).eval()
    for parameter in network.matrix.parameters():
        torch.nn.init.normal_(parameter, std=2.0)
    (tmp_path / "config.json").write_text(json.dumps({**vars(about), "probe": probe}))
    save_weights(tmp_path / "model.safetensors", network.state_dict())
    network = load_early_exit(tmp_path)
    x, t, flops = torch.randn(6, 3, 8, 8), torch.full((6,), 10.0), []
    with torch.no_grad():
        layers = network(x, t)
        assert isinstance(layers, LayerOutputs)
        assert layers.uncertainty.shape == (5, 6)
        threshold = float(layers.uncertainty[0].sort().values[2:4].mean())  # half leave at once
        exits = layers.exits(threshold)
        assert len(exits.unique()) > 1
        for value in (threshold, -1e9):
            with PartialNetwork(network, threshold=value), FlopCounterMode(display=False) as counter:
                early = network(x, t)
            flops.append(counter.get_total_flops())
            torch.testing.assert_close(early, layers.at(layers.exits(value)), atol=1e-5, rtol=1e-5)
        with PartialNetwork(network, threshold=threshold):
            torch.testing.assert_close(network(x[2:3], t[2:3]), layers.at(exits)[2:3], atol=1e-5, rtol=1e-5)
    assert flops[0] < flops[1]
    with pytest.raises(BackboneError, match="probes are"):
        EarlyExitUViT(about, "mlp")
    with pytest.raises(BackboneError, match="estimates no uncertainty"):
        PartialNetwork(torch.nn.Linear(2, 2), threshold=0.1)
    (tmp_path / "config.json").write_text(json.dumps({**vars(about), "probe": probe, "embed_dim": 32}))
    with pytest.raises(BackboneError, match=r"does not fit its config\.json"):
        load_early_exit(tmp_path)


def test_the_command_paints_with_parts_of_networks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    about = UViTConfig(img_size=8, embed_dim=16, depth=5, num_heads=2)
    folder = tmp_path / "exits"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**vars(about), "_class_name": "EarlyExitUViT"}))
    save_weights(folder / "model.safetensors", EarlyExitUViT(about).state_dict())
    file, operations = str(tmp_path / "painted.png"), []
    for more in (["--threshold", "-1"], ["--threshold", "0.99"], ["--depths", "-1", "2", "2"]):
        assert main(["sample", "--model", str(folder), "--steps", "3", "-o", file, *more]) == 0
        operations.append(float(capsys.readouterr().out.split(" G operations")[0].split()[-1]))
    assert operations[1] < operations[2] < operations[0]
    tiny = ["sample", "a cat", "--steps", "3", "-o", file]
    assert main([*tiny, "--inherit", "2", "--branch", "1", "--sampler", "ghvb", "--options", "order=2.5"]) == 0
    assert "G operations" in capsys.readouterr().out
    for more, message in (
        (["--options", "order"], "written NAME=VALUE"),
        (["--options", "orders=2"], "no option orders"),
        (["--threshold", "0.1"], "estimates no uncertainty"),
        (["--depths", "-1"], "one entry for each of 3"),
    ):
        assert main([*tiny, *more]) == 2
        assert message in capsys.readouterr().err


def test_an_early_exit_follows_its_table() -> None:
    network = EarlyExitUViT(UViTConfig(img_size=8, embed_dim=16, depth=5, num_heads=2)).eval()
    x, t = torch.randn(1, 3, 8, 8), torch.tensor([10.0])
    with torch.no_grad(), PartialNetwork(network, depths=(-1, 2, 5)) as part:
        part.at(0)
        whole = network(x, t)
        part.at(1)
        torch.testing.assert_close(network(x, t), whole.outputs[2])
        part.at(2)
        torch.testing.assert_close(network(x, t), whole.full)
    with pytest.raises(BackboneError, match=r"depths of 0\.\.5 blocks \(-1: all of them\)"):
        PartialNetwork(network, depths=(9,))


# -- searched steps -------------------------------------------------------------------------------------------


def test_searched_orders_and_files_take_the_place_of_timesteps(tiny: DiffusionModel, tmp_path: Path) -> None:
    file = tmp_path / "steps.json"
    file.write_text(json.dumps({"timesteps": [100, 900, 500], "orders": [1, 1, 2]}))  # in any order
    from_file = sample(tiny, timesteps=file, sampler="dpm++")
    expected = sample(tiny, timesteps=(900, 500, 100), sampler="dpm++", order=(1, 2, 1))
    assert torch.equal(from_file.latents, expected.latents)
    with pytest.raises(SamplingError, match="no option order"):
        sample(tiny, timesteps=file, sampler="ddim")
    for text, match in (
        ('{"timesteps": [1, 2], "orders": [1]}', "one entry for each of 2"),
        ('{"timesteps": [1, 2], "orders": [0, 1]}', "orders are whole numbers from 1"),
        ('{"timesteps": [0.5]}', "list of whole numbers"),
    ):
        file.write_text(text)
        with pytest.raises(SamplingError, match=match):
            sample(tiny, timesteps=file)


def test_tables_have_one_order_for_each_step() -> None:
    _, schedule = model_schedule(SD)
    assert isinstance(schedule, TableVP)
    with pytest.raises(SamplingError, match="one for each of 3 steps"):
        build_table("unipc", schedule, 3, order=(1, 2))
    assert build_table("unipc", schedule, 3, order=np.int64(2)).name == "UniPC-2"


# -- what searches, compares and times ------------------------------------------------------------------------


def test_the_best_start_is_that_of_the_least_cost(tiny: DiffusionModel) -> None:
    start, costs = best_start(lambda z: float(z.mean()), (8, 16, 16), candidates=5, seed=3)
    assert len(set(costs)) == 5
    assert float(start.mean()) == min(costs)
    painted = sample(tiny, steps=2, start=start)
    assert torch.equal(painted.latents, sample(tiny, steps=2, start=start, seed=9).latents)
    assert not torch.equal(painted.latents, sample(tiny, steps=2).latents)
    with pytest.raises(SamplingError, match="candidates"):
        best_start(lambda z: 0.0, (1, 2, 2), candidates=0)


def test_a_search_may_find_orders_and_units(tmp_path: Path) -> None:
    settings = SearchSettings(
        population=12, parents=4, mutations=5, crossovers=4, epochs=6, orders=3, layers=8, skip_after=0, skip_share=0.5
    )
    best = search_steps(
        lambda c: float(sum(c.orders) + 10 - sum(map(len, c.skipped))), 3, total=50, settings=settings,
        file=tmp_path / "steps.json",
    )  # fmt: skip
    assert best[0][1].orders
    assert best[0][0] < best[-1][0]
    assert any(candidate.skipped for _, candidate in best)
    found = as_candidate(tmp_path / "steps.json")
    assert found is not None
    assert best[0][0] == sum(found.orders) + 10 - sum(map(len, found.skipped))


def test_the_best_tap_and_timestep_are_searched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By wrong keypoints times operations: what is no better than another costs less, and a file takes its place."""
    file = tmp_path / "cell.json"
    line = ["search-schedule", "--population", "4", "--epochs", "1", "--per-category", "1", "-o", str(file)]
    assert main([*line, "--fitness", "pck"]) == 0
    assert "at the recommended" in capsys.readouterr().out
    found = read_candidate(file)
    backbone = load_backbone("tiny")
    assert found.taps[0] in [tap.name for tap in backbone.taps()]
    usual = Candidate((50,), taps=("up.2.resnet.0",))
    costs = [extraction_fitness(backbone, "pck", count=1, cost=c)(usual) for c in (0.0, 1.0)]  # type: ignore[arg-type]
    assert 0 < costs[1] < costs[0] < 1
    noise = extraction_fitness(backbone, "pck", count=1, cost=0.0)(Candidate((999,), taps=("up.2.resnet.0",)))  # type: ignore[arg-type]
    assert costs[0] < noise
    assert main([*line, "--fitness", "probe", "--steps", "3"]) == 2
    assert "--steps does not go with it" in capsys.readouterr().err
    assert main([*line, "--fitness", "pck", "--cost", "0.7"]) == 2
    assert "is of another search: cost 0.5, not 0.7" in capsys.readouterr().err
    with pytest.raises(SamplingError, match=r"cell\.json: is of a search for taps"):
        as_candidate(file)
    with pytest.raises(SamplingError, match="these are of a search for taps"):
        as_candidate(found)
    file.write_text('{"timesteps": [1], "taps": [2]}')
    with pytest.raises(SamplingError, match="taps are a list of names"):
        read_candidate(file)


def test_the_comparison_has_fid_searched_steps_and_a_picture(tiny: DiffusionModel, tmp_path: Path) -> None:
    (tmp_path / "steps.json").write_text('{"timesteps": [950, 400], "orders": [1, 2]}')
    settings = SamplersEvaluation(
        calls=(2, 3),
        samplers=("unipc", "ddim", "ghvb"),
        reference=6,
        schedule=tmp_path / "steps.json",
        fid=("tiny-dino@class",),
    )
    report = evaluate_samplers({"2": diffusion_model("tiny", ["a cat", "a car"], guidance=2.0)}, settings)
    picture = report.picture()
    assert (picture.width > 2 * 132, picture.height) == (True, 4 * 132)
    names = picture.crop((0, 0, picture.width - 2 * 132, 132)).convert("L")
    assert names.getextrema() == (0, 255)  # the first row says what it is
    assert report.searched["2"]["unipc"] > 0
    assert "no option order" in report.refused["ddim at the searched steps"]
    assert "order must be a number" in report.refused["ghvb at the searched steps"]
    assert set(report.searched["2"]) == {"unipc"}
    assert set(report.fid["tiny-dino@class"]["2"]["unipc"]) == {2, 3}
    document = json.loads(report.to_json())
    assert document["fid"]["tiny-dino@class"]["2"]["ddim"]["3"] >= 0
    assert "FID to the images" in report.table()


def test_steps_cost_what_those_of_diffusers_cost_and_give_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    for row in SamplersBenchmark(repeats=1, side=8, steps=5).run():
        assert float(row.equality.split()[2]) < 1e-4, row.equality


# -- canvases -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def painter() -> SynthesisModel:
    return load_synthesis()


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*SAMPLERS} - {"rho-rk", "pndm", "evodiff", "lml", "sit-sde"}))
def test_a_canvas_does_not_depend_on_bands_or_on_an_interruption(
    name: str, painter: SynthesisModel, tmp_path: Path
) -> None:
    grid = EmbeddingGrid(torch.randn(1, 2, painter.embedder.dims[0], generator=torch.Generator().manual_seed(0)))
    size = (painter.window, 2 * painter.window)
    settings = SynthesisSettings(scheduler=name, steps=3, batch_size=4, guidance=1.0)  # type: ignore[arg-type]
    whole = denoise_canvas(painter, grid, size, settings).tensor(0, size[0])
    banded = denoise_canvas(painter, grid, size, replace(settings, band=1)).tensor(0, size[0])
    assert torch.equal(whole, banded)
    identity = {"name": name}

    def stop(step: int, lines: object) -> None:
        if step == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        denoise_canvas(painter, grid, size, settings, run=Run(tmp_path, identity), after_step=stop)
    resumed = denoise_canvas(painter, grid, size, settings, run=Run(tmp_path, identity)).tensor(0, size[0])
    assert torch.equal(whole, resumed)


@pytest.mark.parametrize(
    "inheriting", [{"inherit": 2, "branch": 1}, {"depths": (-1, 1, 0, -1)}, {"inherit": 3, "scheduler": "ghvb"}]
)
def test_windows_of_a_canvas_inherit_their_own_deep_features(
    inheriting: dict[str, Any], painter: SynthesisModel, tmp_path: Path
) -> None:
    """Each window inherits its own, whatever the bands, and a stopped run goes on to the bit."""
    grid = EmbeddingGrid(torch.randn(2, 2, painter.embedder.dims[0], generator=torch.Generator().manual_seed(0)))
    size = (2 * painter.window, 2 * painter.window)
    settings = SynthesisSettings(steps=4, batch_size=4, guidance=2.0, **inheriting)
    whole = denoise_canvas(painter, grid, size, settings).tensor(0, size[0])
    plain = denoise_canvas(painter, grid, size, replace(settings, inherit=1, depths=())).tensor(0, size[0])
    assert 0 < (whole - plain).abs().mean() < 0.6 * plain.std()  # of four steps
    for band in (1, 3):
        banded = denoise_canvas(painter, grid, size, replace(settings, band=band)).tensor(0, size[0])
        torch.testing.assert_close(banded, whole, atol=1e-4, rtol=1e-4)
    assert 0.3 < share_of_operations(painter, settings) < 0.95
    assert share_of_operations(painter, replace(settings, inherit=1, depths=())) == 1

    def stop(step: int, lines: object) -> None:
        if step == 1:  # an inherited step is the first of the resumed run
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        denoise_canvas(painter, grid, size, settings, run=Run(tmp_path, {}), after_step=stop)
    resumed = denoise_canvas(painter, grid, size, settings, run=Run(tmp_path, {})).tensor(0, size[0])
    assert torch.equal(whole, resumed)
    embeddings = grid.embeddings.flatten(0, 1)
    patches = [sample_patches(painter, embeddings, replace(settings, batch_size=n)) for n in (4, 3)]
    torch.testing.assert_close(*patches, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="depths have one entry for each of 4 steps"):
        denoise_canvas(painter, grid, size, replace(settings, depths=(-1, 0)))


def test_a_canvas_takes_searched_steps_and_refuses_whole_solvers(painter: SynthesisModel) -> None:
    grid = EmbeddingGrid(torch.ones(1, 1, painter.embedder.dims[0]))
    size = (painter.window, painter.window)
    even = SynthesisSettings(scheduler="unipc", timesteps=(900, 500, 100), guidance=1.0)
    skipping = replace(even, skipped=("", "0,1", ""))
    ordered = replace(even, orders=(1, 2, 2))
    assert denoise_canvas(painter, grid, size, ordered).tensor(0, size[0]).isfinite().all()
    one, other = (denoise_canvas(painter, grid, size, s).tensor(0, size[0]) for s in (even, skipping))
    assert not torch.equal(one, other)
    patch = sample_patches(painter, torch.zeros(1, painter.embedder.dims[0]), skipping)
    assert torch.isfinite(patch).all()
    with pytest.raises(ValueError, match="sampler pndm has no option order"):
        replace(ordered, scheduler="pndm").build(painter.scheduler)
    with pytest.raises(ValueError, match="one entry for each of 3"):
        replace(even, orders=(1,))
    with pytest.raises(ValueError, match="needs whole images"):
        denoise_canvas(painter, grid, size, scheduler=build_scheduler("lml", painter.scheduler, 3))


# -- Fokker-Planck --------------------------------------------------------------------------------------------


def test_regularisation_lowers_the_residual(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = [
        "train",
        "potential",
        "--steps",
        "60",
        "--batch",
        "64",
        "--weight",
        "1",
        "-o",
        str(tmp_path / "u.safetensors"),
    ]
    assert main(line) == 0
    rows = [row.split() for row in capsys.readouterr().out.splitlines() if row.startswith("weight")]
    assert [row[1] for row in rows] == ["0", "1"]
    assert float(rows[1][2]) < float(rows[0][2])
    assert (tmp_path / "u.safetensors").is_file()
    assert main([*line[:-1], str(tmp_path / "u.txt")]) == 2


def test_distances_are_of_the_best_assignment() -> None:
    points = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    assert wasserstein(points, points.flip(0)) == 0
    assert wasserstein(points, points + torch.tensor([0.0, 2.0])) == pytest.approx(2.0)
