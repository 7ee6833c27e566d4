"""`sample`, the likelihood of images and the comparison of samplers, on the models of the project."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffrep import load_synthesis, sample
from diffrep.cli import main
from diffrep.eval.likelihood import model_likelihood
from diffrep.eval.samplers import SamplersEvaluation, distance_to_fine, evaluate_samplers
from diffrep.painting import DiffusionModel, diffusion_model
from diffrep.sampling.samplers import SAMPLERS, model_schedule
from diffrep.sampling.schedules import Flow, SamplingError, TableVP
from diffrep.searched import Candidate, read_candidate

from .test_sampling import MEAN, SPREAD, gaussian


@pytest.fixture(scope="module")
def tiny() -> DiffusionModel:
    return diffusion_model("tiny", ["a cat", "a red car"], guidance=2.0)


def exact_model(schedule: TableVP | Flow, prediction: str = "epsilon") -> DiffusionModel:
    """Whose data are normal, mean `MEAN` and deviation `SPREAD`."""

    def predict(x: Tensor, t: float, rows: slice) -> Tensor:
        share = t / 1000 if isinstance(schedule, Flow) else t
        alpha, sigma = float(schedule.alpha(share)), float(schedule.sigma(share))
        noise = gaussian(x, alpha, sigma)
        if prediction == "epsilon":
            return noise
        return noise - (torch.full_like(x, MEAN) if alpha == 0 else (x - sigma * noise) / alpha)

    return DiffusionModel(
        "exact", torch.nn.Identity(), predict, prediction, schedule, lambda x: x, lambda x: x, 3, 1, 8, count=4
    )


def table() -> TableVP:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return TableVP((1 - betas).cumprod(0).numpy())


def test_samples_show_themselves_and_do_not_know_their_company(tiny: DiffusionModel) -> None:
    both = sample(tiny, steps=4, sampler="dpm++-sde")
    assert both.images.shape == (2, 3, 128, 128)
    assert both.calls == 4
    assert both.picture().size == (256, 128)
    assert "images float32 (2, 3, 128, 128)" in repr(both)
    alone = sample(tiny, steps=4, sampler="dpm++-sde", batch_size=1)
    torch.testing.assert_close(alone.latents, both.latents, atol=1e-3, rtol=1e-4)
    other = sample(tiny, steps=4, sampler="dpm++-sde", seed=1)
    assert (other.latents - both.latents).abs().max() > 0.1


@pytest.mark.parametrize("name", SAMPLERS)
def test_batches_change_no_bit_where_the_network_has_none_to_change(name: str) -> None:
    """The solver's arithmetic is each sample's own; what is left is how a network rounds."""
    model = exact_model(table() if SAMPLERS[name].table else Flow())
    model.predict = lambda x, t, rows: 0.3 * x + 0.1 * x.abs()
    if not SAMPLERS[name].table:
        model.prediction = "flow_prediction"
    together, *parts = (sample(model, sampler=name, steps=4, batch_size=n).latents for n in (4, 1, 3))
    assert torch.isfinite(together).all()
    assert all(torch.equal(part, together) for part in parts)


def test_a_pipeline_with_our_scheduler_paints_what_sample_paints(tiny: DiffusionModel) -> None:
    """The loop that diffusers' pipelines have, with guidance."""
    from diffrep.backbones.pipelines import load_parts
    from diffrep.table_scheduler import TableScheduler

    parts = load_parts("tiny")
    assert parts.text is not None
    scheduler = TableScheduler.from_config(parts.scheduler, sampler="ghvb", order=2.5)
    scheduler.set_timesteps(5)
    embeddings = parts.text.encode(["a cat", "a red car", ""])
    contexts = torch.cat([embeddings[p].context for p in ("", "", "a cat", "a red car")])
    ours = sample(tiny, sampler="ghvb", steps=5, order=2.5, seed=3)
    from diffrep.backbones.diffusion import keyed_generator

    x = torch.stack([torch.randn(8, 16, 16, generator=keyed_generator(3, n)) for n in range(2)])
    with torch.no_grad():
        for t in scheduler.timesteps:
            away, towards = parts.unet(torch.cat([x, x]), t, encoder_hidden_states=contexts).sample.chunk(2)
            x = scheduler.step(away + 2.0 * (towards - away), t, x).prev_sample
    torch.testing.assert_close(ours.latents, x, atol=2e-3, rtol=1e-4)


def test_inherited_steps_change_little(tiny: DiffusionModel) -> None:
    plain, cached = (sample(tiny, steps=30, inherit=n).images for n in (1, 2))
    difference = float((plain - cached).abs().mean())
    assert 0 < difference < 0.05


@pytest.mark.parametrize("sampler", ["euler", "dpm++", "unipc"])
def test_flows_are_sampled(sampler: str) -> None:
    painted = sample(exact_model(Flow(shift=2.0), "flow_prediction"), sampler=sampler, steps=20, size=(32, 32))
    assert abs(float(painted.latents.mean()) - MEAN) < 0.03
    assert abs(float(painted.latents.std()) - SPREAD) < 0.05


def test_what_does_not_fit_is_one_line(tiny: DiffusionModel) -> None:
    for match, call in (
        ("sides must be multiples of 8", lambda: sample(tiny, size=(100, 128))),
        ("evodiff has no option order", lambda: sample(tiny, sampler="evodiff", order=3)),
        ("steps must be a whole number of at least 1, got 'x'", lambda: sample(tiny, steps="x")),  # type: ignore[arg-type]
        ("no sampler 'golden'", lambda: sample(tiny, sampler="golden")),
        ("is painted under embeddings", lambda: sample("tiny-synthesis", "a cat")),
        ("cannot be sampled", lambda: sample("tiny-dino")),
        ("a table of noise", lambda: model_likelihood(exact_model(Flow()), torch.zeros(1, 3), torch.ones(1, 3))),
    ):
        with pytest.raises(SamplingError, match=match):
            call()


def test_the_likelihood_of_a_model_is_that_of_its_data() -> None:
    _, cosine = model_schedule({"beta_schedule": "squaredcos_cap_v2"})  # ends with less signal than Stable Diffusion's
    assert isinstance(cosine, TableVP)
    model, x = exact_model(cosine), torch.tensor([[0.7, 0.2, 1.5], [0.0, 0.7, 0.7]], dtype=torch.float64)
    bits = model_likelihood(model, x, torch.ones_like(x), tolerance=1e-6)
    exact = -torch.distributions.Normal(MEAN, SPREAD).log_prob(x).mean(1) / math.log(2)
    torch.testing.assert_close(bits, exact, atol=5e-3, rtol=0)


def test_samplers_are_ranked_on_an_exact_model() -> None:
    settings = SamplersEvaluation(calls=(5, 20), reference=200)
    report = evaluate_samplers({"1": exact_model(table())}, settings)
    rows = report.distances["1"]
    assert {"unipc", "ghvb", "evodiff", "rho-rk"} <= set(rows)
    assert "dpm++-sde" not in rows  # noise has no fine solution
    for name in ("unipc", "dpm++", "ghvb"):
        assert rows[name][20] < rows[name][5]
        assert rows[name][20] < rows["ddim"][20]
    assert rows["lml"][20] == pytest.approx(rows["dpm++ of order 3"][20], rel=1e-4)  # as published it does nothing
    assert rows["lml, kappa 0.3"][20] != pytest.approx(rows["lml"][20], rel=1e-2)
    assert "network calls" in report.table()
    assert json.loads(report.to_json())["distances"]["1"]["unipc"]["20"] == rows["unipc"][20]
    refused = evaluate_samplers({"1": exact_model(table())}, replace(settings, samplers=("ipndm",), spacing="few-step"))
    assert "few-step grids have" in refused.refused["ipndm"]
    with pytest.raises(ValueError, match="no sampler magic"):
        SamplersEvaluation(samplers=("magic",))


def test_searched_steps_beat_even_ones() -> None:
    fitness = distance_to_fine(exact_model(table()), "ddim", 3, 100)
    better = min(fitness(Candidate((t, 500, 100))) for t in (999, 900, 800))
    assert better < fitness(None)
    assert fitness(None) == distance_to_fine(exact_model(table()), "ddim", 3, 100)(Candidate((999, 666, 332)))


def test_the_help_says_which_schedule(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "samplers", "--help-all"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "search-schedule" in shown
    assert "how the learning rate falls" not in shown


@pytest.mark.slow
def test_the_commands_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    Image.new("RGB", (60, 40), (200, 30, 90)).save(tmp_path / "plain.png")
    bits = tmp_path / "bits.csv"
    assert main(["likelihood", str(tmp_path / "plain.png"), "--tolerance", "0.05", "-o", str(bits)]) == 0
    assert bits.read_text().startswith("image,bits_per_dimension\n")
    steps = tmp_path / "steps.json"
    search = [
        "search-schedule",
        "--steps",
        "2",
        "--count",
        "1",
        "--population",
        "4",
        "--epochs",
        "2",
        "--reference",
        "6",
    ]
    assert main([*search, "-o", str(steps)]) == 0
    found = read_candidate(steps)
    assert len(found.timesteps) == 2
    first = steps.read_bytes()
    assert main([*search, "-o", str(steps)]) == 0
    assert steps.read_bytes() == first
    capsys.readouterr()
    assert main([*search, "--sampler", "ddim", "-o", str(steps)]) == 2
    assert 'is of another search: sampler "unipc", not "ddim"' in capsys.readouterr().err
    report = tmp_path / "samplers.json"
    compare = ["eval", "samplers", "--count", "1", "--calls", "2", "--reference", "4", "--samplers", "unipc", "ghvb"]
    assert main([*compare, "-o", str(report)]) == 0
    assert set(json.loads(report.read_text())["distances"]) == {"1", "4"}
    capsys.readouterr()
    for line, message in (
        (["likelihood", str(tmp_path / "none.png")], "none.png"),
        (["likelihood", str(tmp_path / "plain.png"), "--tolerance", "2", "-o", str(bits)], "tolerance"),
        (["search-schedule", "--sampler", "magic"], "no sampler 'magic'"),
        (["eval", "samplers", "--samplers", "magic"], "no sampler magic"),
    ):
        assert main(line) == 2
        assert message in capsys.readouterr().err


def test_a_synthesis_model_is_painted_under_embeddings() -> None:
    model = load_synthesis()
    painted = sample(model, torch.zeros(2, model.embedder.dims[0]), steps=2)
    assert painted.images.shape == (2, 3, 128, 128)


def test_painting_prints_no_warnings_of_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    warned: list[str] = []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", lambda record: warned.append(record.getMessage()))
    logger = logging.getLogger("diffusers")
    logger.addHandler(handler)
    try:
        sample("tiny", "a cat", steps=1)
    finally:
        logger.removeHandler(handler)
    assert not warned
