"""Samplers: equal to diffusers where it has them, exact where they should be, independent of strips and stops."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from diffrep.backbones import BackboneError
from diffrep.backbones.partial import PartialNetwork
from diffrep.eval.likelihood import likelihood
from diffrep.eval.search import SearchSettings, search_steps
from diffrep.heads.mean_reverting import MeanReverting, mrs_table, sample_mean_reverting
from diffrep.sampling.core import SolverTable, Update, run, to_forms
from diffrep.sampling.flows import Transport, probability_flow
from diffrep.sampling.samplers import ALIASES, SAMPLERS, build_table, model_schedule, named_sampler
from diffrep.sampling.schedules import (
    GRIDS,
    Exploding,
    FewStepGrid,
    Flow,
    LinearVP,
    SamplingError,
    TableVP,
    TimeGrid,
    spaced_times,
)
from diffrep.sampling.score_sde import ScoreSDE, sample_flow, sample_pc
from diffrep.sampling.solvers import (
    RUNGE_KUTTA,
    Derivative,
    ddim_table,
    deis,
    derivative_weights,
    evodiff,
    exponential,
    multistep,
    phi,
    rho_runge_kutta,
    unified,
)
from diffrep.searched import Candidate, read_candidate
from diffrep.synthesis.sampler import KeyedNoise
from diffrep.synthesis.schedulers import Stepper, build_scheduler
from diffrep.table_scheduler import TableScheduler
from diffrep.training.interpolants import interpolant

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
MEAN, SPREAD = 0.7, 0.4


def gaussian(x: Tensor, alpha: float, sigma: float) -> Tensor:
    """The exact noise in a state whose clean samples are normal: mean `MEAN`, deviation `SPREAD`."""
    return sigma * (x - alpha * MEAN) / (alpha**2 * SPREAD**2 + sigma**2)


def exact_end(x: Tensor, schedule: LinearVP, first: float, last: float) -> Tensor:
    """Where the probability flow of `gaussian` carries a state."""
    a, s = (np.array([f(first), f(last)], dtype=float) for f in (schedule.alpha, schedule.sigma))
    spread = np.sqrt(a**2 * SPREAD**2 + s**2)
    return (x - a[0] * MEAN) / spread[0] * spread[1] + a[1] * MEAN


def network_of(schedule: LinearVP) -> Callable[[Tensor, float], Tensor]:
    return lambda x, t: gaussian(x, float(schedule.alpha(t)), float(schedule.sigma(t)))


# -- the machine ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("z", [-3.0, -0.4, 1e-6, 0.3, 2.0])
def test_phi_functions_follow_their_recursion(z: float) -> None:
    assert phi(1, z) == pytest.approx(math.expm1(z) / z, rel=1e-12)
    for k in (1, 2, 3):
        assert z * phi(k + 1, z) + 1 / math.factorial(k) == pytest.approx(phi(k, z), rel=1e-10)


def test_derivatives_are_exact_for_polynomials() -> None:
    d = np.array([-0.5, -1.3, 0.7])
    values = 2 * d - 3 * d**2 + 0.5 * d**3  # minus the value at 0, which is 0
    for order, expected in ((1, 2.0), (2, -6.0), (3, 3.0)):
        assert derivative_weights(d.tolist(), order) @ values == pytest.approx(expected, abs=1e-10)


def test_the_exact_third_order_integrates_quadratics_and_the_published_one_does_not() -> None:
    """On predictions that are quadratic in log-SNR an exact third-order step has no error."""
    schedule = LinearVP()
    grid = TimeGrid.of(schedule, schedule.time_of(np.array([-2.0, -1.2, -0.1, 0.9])))
    a, s, log_snr = grid.alpha, grid.sigma, grid.log_snr
    lambdas = np.linspace(log_snr[2], log_snr[3], 20001)
    middle = (lambdas[1:] + lambdas[:-1]) / 2
    exact = s[3] / s[2] + a[3] * np.sum(middle**2 * np.exp(middle - log_snr[3])) * (lambdas[1] - lambdas[0])
    history = (log_snr[:3] ** 2)[::-1]
    errors = []
    for halved in (False, True):
        update = exponential(grid, 2, 3, "data", [Derivative((-2, -3))] * 2, halved=halved)
        got = update.carry + update.scale * np.dot(update.direction, history)
        errors.append(abs(got - exact))
    assert errors[0] < 1e-8 < 1e-3 < errors[1]


@pytest.mark.parametrize(
    ("solver", "order"),
    [
        (lambda g, s: ddim_table(g), 1),
        (lambda g, s: multistep(g, order=2, final=False, relaxation=None), 2),
        (lambda g, s: multistep(g, order=3, final=False, exact=True), 3),
        (lambda g, s: multistep(g, order=2, form="noise", final=False), 2),
        (lambda g, s: multistep(g, order=2, relaxation="unipc-bh2", corrected=True, final=False), 2),
        (lambda g, s: deis(g, s, order=2, variable="log-snr"), 3),
        (lambda g, s: deis(g, s, order=1), 2),
        (lambda g, s: rho_runge_kutta(g, s, method="3kutta"), 3),
        (lambda g, s: rho_runge_kutta(g, s, method="4rk"), 4),
    ],
)
def test_solvers_converge_with_their_order(solver: Callable, order: int) -> None:
    """Halving the steps of an even log-SNR grid divides the error by 2^order, or more."""
    schedule = LinearVP(last=0.05)
    x = torch.linspace(-2, 2, 8, dtype=torch.float64)[None]
    errors = []
    for steps in (40, 80):
        grid = TimeGrid.of(schedule, spaced_times(schedule, "log-snr", steps))
        got = run(solver(grid, schedule), network_of(schedule), x)
        errors.append(float((got - exact_end(x, schedule, 1.0, 0.05)).abs().max()))
    assert errors[0] / errors[1] > 0.75 * 2**order, errors


@pytest.mark.parametrize("method", RUNGE_KUTTA)
def test_runge_kutta_calls_the_network_once_a_stage(method: str) -> None:
    schedule, calls = LinearVP(), list[float]()
    grid = TimeGrid.of(schedule, spaced_times(schedule, "quadratic", 4))

    def network(x: Tensor, t: float) -> Tensor:
        calls.append(t)
        return network_of(schedule)(x, t)

    run(rho_runge_kutta(grid, schedule, method=method), network, torch.zeros(1, 3))
    assert len(calls) == 4 * (len(RUNGE_KUTTA[method][2]))


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction", "score"])
def test_what_a_network_predicts_does_not_change_the_result(prediction: str) -> None:
    schedule = LinearVP()
    table = multistep(TimeGrid.of(schedule, spaced_times(schedule, "log-snr", 8)), order=2)
    x = torch.randn(2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def network(y: Tensor, t: float) -> Tensor:
        a, s = float(schedule.alpha(t)), float(schedule.sigma(t))
        noise = gaussian(y, a, s)
        clean = (y - s * noise) / a
        return {"epsilon": noise, "sample": clean, "v_prediction": a * noise - s * clean, "score": -noise / s}[
            prediction
        ]

    expected = run(table, network_of(schedule), x)
    torch.testing.assert_close(run(table, network, x, prediction=prediction), expected, atol=1e-9, rtol=1e-9)


def test_a_flow_is_the_same_ode_in_its_own_words() -> None:
    x, alpha, sigma = torch.tensor([[0.3, -1.2]]), 0.6, 0.4
    noise = torch.tensor([[0.5, -0.1]])
    clean = (x - sigma * noise) / alpha
    forms = to_forms("flow_prediction", noise - clean, x, alpha, sigma)
    torch.testing.assert_close(forms["noise"], noise)
    torch.testing.assert_close(forms["data"], clean)


def test_a_corrector_of_the_last_step_is_what_a_further_step_would_begin_with() -> None:
    schedule = LinearVP()
    times = spaced_times(schedule, "log-snr", 5)
    first, second = [Derivative((-2,))], [Derivative((-3, -1))] * 2

    def table(steps: int) -> SolverTable:
        return unified(
            TimeGrid.of(schedule, times[: steps + 1]),
            orders=[1] + [2] * (steps - 1),
            forms=["data"] * steps,
            derivatives=[[]] + [first] * (steps - 1),
            correctors=[[Derivative((-1,))]] + [second] * (steps - 1),
        )

    x, seen = torch.linspace(-1, 1, 4, dtype=torch.float64)[None], list[Tensor]()
    got = run(table(4), network_of(schedule), x)
    longer = table(5)
    still = Update("data", 1.0, (0.0,))
    longer = replace(longer, updates=(*longer.updates[:4], still), correctors=(*longer.correctors[:4], None))
    run(longer, network_of(schedule), x, after_step=lambda step, state: seen.append(state))
    torch.testing.assert_close(got, seen[-1], atol=1e-12, rtol=1e-12)
    assert (got - seen[-2]).abs().max() > 1e-6


def test_a_diverging_run_is_named() -> None:
    schedule = LinearVP()
    table = ddim_table(TimeGrid.of(schedule, spaced_times(schedule, "uniform", 4)))
    with pytest.raises(SamplingError, match=r"DDIM diverges: step 2 of 4"):
        run(table, lambda x, t: x * (math.nan if t < 0.8 else 1.0), torch.ones(1, 2))


def test_the_solver_that_contributing_shows_is_ddim() -> None:
    import diffrep.sampling.core as core

    text = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    code = text.split("## How to add a sampler")[1].split("```python\n")[1].split("```")[0]
    names = {"TimeGrid": TimeGrid, "SolverTable": core.SolverTable, "Update": core.Update}
    exec(compile("from __future__ import annotations\n" + code, "CONTRIBUTING.md", "exec"), names)
    schedule = LinearVP()
    grid = TimeGrid.of(schedule, spaced_times(schedule, "quadratic", 5))
    shown, ours = names["plain"](grid), ddim_table(grid, form="data")  # type: ignore[operator]
    for one, other in zip(shown.updates, ours.updates, strict=True):
        assert one.carry == pytest.approx(other.carry)
        assert one.direction == pytest.approx(other.direction)


def test_all_samplers_are_few_lines() -> None:
    files = (Path(__file__).parents[1] / "diffrep" / "sampling").glob("*.py")
    assert sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files) <= 1800


# -- samplers by name -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [
        ("ddim", "DDIMScheduler", {"clip_sample": False}),
        ("dpm++", "DPMSolverMultistepScheduler", {}),
        ("dpm", "DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}),
        ("unipc", "UniPCMultistepScheduler", {}),
    ],
)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_named_samplers_equal_those_of_diffusers(name: str, kind: str, options: dict, prediction: str) -> None:
    import diffusers

    theirs = getattr(diffusers, kind)(**SD, prediction_type=prediction, timestep_spacing="trailing", **options)
    theirs.set_timesteps(10)
    ours = TableScheduler.from_config({**SD, "prediction_type": prediction}, sampler=name)
    ours.set_timesteps(10)
    assert ours.timesteps.tolist() == theirs.timesteps.tolist()
    x = y = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(1))
    for step, t in enumerate(ours.timesteps):
        alpha, sigma = float(ours.table.grid.alpha[step]), float(ours.table.grid.sigma[step])
        outputs = []
        for state in (x, y):
            noise = gaussian(state, alpha, sigma)
            outputs.append(noise if prediction == "epsilon" else (noise - sigma * state) / alpha)
        if options.get("final_sigmas_type") == "sigma_min" and step == 9:
            break  # the noise form cannot end without noise in diffusers; ours does
        x = ours.step(outputs[0], t, x).prev_sample
        y = theirs.step(outputs[1], t, y).prev_sample
        torch.testing.assert_close(x, y, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", [name for name, sampler in SAMPLERS.items() if sampler.table])
def test_every_sampler_ends_near_the_data(name: str) -> None:
    config = {**SD, "prediction_type": "epsilon"}
    _, schedule = model_schedule(config)
    table = build_table(name, schedule, 20)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 1, 2, 2, generator=generator)
    noise = [torch.randn(x.shape, generator=generator) for _ in table.updates]
    got = run(table, lambda y, t: gaussian(y, float(schedule.alpha(t)), float(schedule.sigma(t))), x, noise=noise)
    assert abs(float(got.mean()) - MEAN) < 0.05
    if name != "lcm":  # it asks a distilled model; the estimates of another have less spread
        assert abs(float(got.std()) - SPREAD) < 0.1


@pytest.mark.parametrize("name", [name for name, sampler in SAMPLERS.items() if sampler.flow])
def test_flow_samplers_end_at_the_data(name: str) -> None:
    table = build_table(name, Flow(shift=3.0), 12)
    x = torch.randn(400, 4, generator=torch.Generator().manual_seed(0))

    def velocity(y: Tensor, label: float) -> Tensor:
        sigma = label / 1000
        noise = gaussian(y, 1 - sigma, sigma)
        return noise - (MEAN if sigma == 1 else (y - sigma * noise) / (1 - sigma))

    noise = [torch.zeros_like(x) for _ in table.updates]
    got = run(table, velocity, x, prediction="flow_prediction", noise=noise)
    assert abs(float(got.mean()) - MEAN) < 0.05


@pytest.mark.parametrize("name", [*SAMPLERS, *ALIASES])
def test_stops_batches_and_strips_change_no_bit(name: str) -> None:
    """Of every solver. Those that need whole images say so, and are not stepped by strips."""
    flow = not SAMPLERS[named_sampler(name)[0]].table
    config = {"prediction_type": "flow_prediction"} if flow else {**SD, "prediction_type": "epsilon"}

    def build() -> Stepper:
        return Stepper(TableScheduler.from_config(config, sampler=name) if flow else build_scheduler(name, config, 6))

    def paint(start: Tensor, parts: list[slice], *, stops: bool = False) -> Tensor:
        """Each part from the first step to the last; with stops each step is a run's that reads back all it has."""
        noise, ends = KeyedNoise(3), []
        for part in parts:
            stepper, state, memory = build(), start[part], dict[str, Tensor]()
            while stepper.position < len(stepper):
                shown = stepper.scale(state)
                draws = noise.arguments(stepper.position, range(*part.indices(len(start))))
                state, memory = stepper.step(0.3 * shown + 0.1 * shown.abs(), state, memory, draws)
                stepper.advance()
                if stops:
                    step, stepper = stepper.position, build()
                    for _ in range(step):
                        stepper.advance()
                    state, memory = torch.tensor(state.numpy()), {k: torch.tensor(v.numpy()) for k, v in memory.items()}
            ends.append(state)
        return torch.cat(ends)

    samples = KeyedNoise(0).start(range(5), (4, 20, 24)) * float(build().scheduler.init_noise_sigma)
    together = paint(samples, [slice(0, 5)])
    assert torch.isfinite(together).all()
    assert torch.equal(together, paint(samples, [slice(0, 2), slice(2, 3), slice(3, 5)]))
    assert torch.equal(together, paint(samples, [slice(0, 5)], stops=True))
    assert build().whole == (name in ("lml", "evodiff"))
    if not build().whole:
        rows = samples[0].movedim(1, 0)[:, :, None]  # a canvas as it is stepped: its rows are the batch
        by_seven = [slice(i, min(i + 7, 20)) for i in range(0, 20, 7)]
        assert torch.equal(paint(rows, [slice(0, 20)]), paint(rows, by_seven, stops=True))


def test_what_cannot_be_is_said_before_the_first_step() -> None:
    _, cosine = model_schedule({"beta_schedule": "squaredcos_cap_v2"})
    _, table = model_schedule(SD)
    for match, call in (
        ("no sampler 'dpm3'", lambda: build_table("dpm3", table, 10)),
        ("no option eta; its options are order, variant", lambda: build_table("unipc", table, 10, eta=0.5)),
        (r"steps must be in 1\.\.1000", lambda: build_table("unipc", table, 1001)),
        ("twice on this schedule", lambda: build_table("unipc", cosine, 30, spacing="karras")),
        ("does not work on rectified flows", lambda: build_table("ghvb", Flow(), 10)),
        ("only on rectified flows; take one of euler", lambda: build_table("sit-sde", table, 10)),
        ("form SBDM is infinite without signal", lambda: build_table("sit-sde", Flow(), 4, form="SBDM")),
        ("few-step grids have 4, 5, 6, 8 steps", lambda: build_table("unipc", table, 7, spacing="few-step")),
        ("timesteps must fall inside", lambda: build_table("unipc", table, 2, timesteps=[10, 500])),
        ("spacing must be one of", lambda: build_table("unipc", table, 5, spacing="golden")),
        ("orders are 1 to 3", lambda: build_table("dpm++", table, 5, order=4)),
        (r"order must be a number, got \(1, 2\)", lambda: build_table("ghvb", table, 2, order=(1, 2))),
        (r"deis-tab: order must be a whole number, got \[1", lambda: build_table("deis-tab", table, 2, order=[1, 2])),
        ("ipndm: order must be a whole number, got 2.5", lambda: build_table("ipndm", table, 4, order=2.5)),
        ("whole number, or one for each step, got 'x'", lambda: build_table("unipc", table, 4, order="x")),
        (r"or one for each step, got \(\)", lambda: build_table("unipc", table, 4, order=())),
        (
            "order must be a whole number, or one for each step, got True",
            lambda: build_table("lml", table, 4, order=True),
        ),
        ("form must be one of noise, data, got 'velocity'", lambda: build_table("dpm", table, 4, form="velocity")),
        ("variant must be one of bh1, bh2, vary, got 'x'", lambda: build_table("unipc", table, 4, variant="x")),
        ("exact must be a bool, got 1", lambda: build_table("dpm++", table, 4, exact=1)),
        ("method must be text, got 2", lambda: build_table("rho-rk", table, 4, method=2)),
        ("ddim: eta must be finite and at least 0, got -0.5", lambda: build_table("ddim", table, 4, eta=-0.5)),
        ("beta must be a finite number, got nan", lambda: build_table("unipc-hb", table, 4, beta=math.nan)),
        (
            "two steps or more",
            lambda: evodiff(TimeGrid.of(Exploding(), [80, 1])),
        ),
        ("at least 20 steps", lambda: sample_pc(ScoreSDE("vp", steps=10), lambda x, t: x, torch.ones(1, 2), iter([]))),
        ("infinite at t = 0", lambda: Transport().sample_sde(lambda x, t: x, torch.ones(1, 2), 4, [], form="SBDM")),
        ("needs a gamma", lambda: interpolant("linear")),
        ("one of cosine, linear, constant", lambda: MeanReverting(schedule="sqrt")),
        ("noise, data or velocity, not 'score'", lambda: restored(torch.ones(1, 1, 1, 2), target="score")),
        (
            "must be euler or heun",
            lambda: Transport().sample_sde(lambda x, t: x, torch.ones(1, 2), 4, [], method="rk4"),
        ),
        (
            "each of 2 steps has one decision of a kind, and estimates",
            lambda: unified(TimeGrid.of(table, [9, 5, 1]), orders=[1, 2], forms=["data"] * 2, derivatives=[[], []]),
        ),
    ):
        with pytest.raises(SamplingError, match=match):
            call()


def restored(clean: Tensor, **options: Any) -> Tensor:
    """What mean reversion makes of a network that always gives the same clean image."""
    schedule = MeanReverting()
    grid = TimeGrid.of(schedule, schedule.times("linspace", 4))
    network, grey = (lambda x, t: clean), torch.full_like(clean, 0.5)
    options = {"target": "data", "denoise_last": True, **options}
    return sample_mean_reverting(schedule, mrs_table(grid), network, grey, grey, **options)


@pytest.mark.parametrize(("brightest", "divisor"), [(0.9, 1.0), (1.25, 1.25), (2.0, 1.5)])
def test_thresholding_divides_clean_images_by_a_quantile_up_to_one_and_a_half(brightest: float, divisor: float) -> None:
    clean = torch.full((1, 1, 2, 2), 0.3)
    clean[..., 0] = brightest
    torch.testing.assert_close(restored(clean), clean.clamp(max=1))
    torch.testing.assert_close(restored(clean, thresholding=True), (clean / divisor).clamp(max=1))


def test_orders_of_mean_reversion_fall_behind_the_first_steps_alone() -> None:
    schedule = MeanReverting()
    for steps, orders in ((3, [1, 2, 3]), (5, [1, 2, 2, 1, 3]), (10, [1, 2, *[3] * 8])):
        table = mrs_table(TimeGrid.of(schedule, schedule.times("linspace", steps)), order=3)
        assert [len(update.direction) for update in table.updates] == orders


def test_a_schedule_without_signal_is_refused() -> None:
    config = {**SD, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    with pytest.raises(SamplingError, match="no signal left"):
        TableScheduler.from_config(config)
    assert TableScheduler.from_config(config, spacing="leading").timesteps[0] == 950


@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [
        ("dpmpp_2m", "DPMSolverMultistepScheduler", {}),
        ("heun", "HeunDiscreteScheduler", {}),
        ("euler", "EulerDiscreteScheduler", {}),
        ("pndm", "PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": True}),
    ],
)
@pytest.mark.parametrize("steps", [1, 2, 5, 20])
def test_names_of_diffusers_stand_for_what_they_compute(
    name: str, kind: str, options: dict[str, Any], steps: int
) -> None:
    theirs: Any = getattr(diffusers, kind)(**SD, timestep_spacing="trailing", **options)
    theirs.set_timesteps(steps)
    ours = TableScheduler.from_config(SD, sampler=name)
    ours.set_timesteps(steps)
    assert ours.timesteps.tolist() == theirs.timesteps.tolist()
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scaled = kind.startswith(("Heun", "Euler"))  # theirs are x / alpha
    y = x / float(ours.table.grid.alpha[0]) if scaled else x
    for t in ours.timesteps:
        x = ours.step(torch.tanh(0.7 * x) + 0.2 * x, t, x).prev_sample
    for t in theirs.timesteps:
        shown = theirs.scale_model_input(y, t)
        y = theirs.step(torch.tanh(0.7 * shown) + 0.2 * shown, t, y).prev_sample
    torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)


def test_the_scheduler_can_be_called_as_pipelines_call_it() -> None:
    scheduler = TableScheduler.from_config(SD, sampler="dpm++-sde")
    scheduler.set_timesteps(4, device="cpu")
    assert {"generator", "return_dict"} <= set(inspect.signature(scheduler.step).parameters)
    results = []
    for _ in range(2):
        scheduler.set_timesteps(4)
        generator, x = torch.Generator().manual_seed(5), torch.ones(1, 4, 2, 2)
        for t in scheduler.timesteps:
            (x,) = scheduler.step(scheduler.scale_model_input(x, t) * 0.1, t, x, generator=generator, return_dict=False)
        results.append(x)
    assert torch.equal(*results)
    assert set(GRIDS) > {"trailing", "karras"}


# -- density, inheritance, search -----------------------------------------------------------------------------


def test_adaptive_steps_are_chosen_by_the_states_alone() -> None:
    sde = ScoreSDE("vp")

    def score(x: Tensor, t: float) -> Tensor:
        return -x / (0.04 * float(sde.alpha(t)) ** 2 + float(sde.sigma(t)) ** 2)

    x, field = torch.tensor([[1.0], [-0.3], [2.0]]), probability_flow(sde, score)
    alone = solve_ivp(
        lambda t, y: field(torch.from_numpy(y).float(), t).numpy(), (1.0, sde.last), x.double().numpy().ravel(),
        rtol=1e-3, atol=1e-3,
    )  # fmt: skip
    got = sample_flow(sde, score, x, tolerance=1e-3)
    torch.testing.assert_close(got, torch.from_numpy(alone.y[:, -1:]).float(), atol=1e-6, rtol=0)


def test_a_few_step_grid_may_end_behind_its_outer_points() -> None:
    table = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    for end_index in (8, 7):  # the 0 behind the points, and the last of them, which is the table's least
        times = FewStepGrid(4, 8, 5, end_index).times(table)
        assert times[0] == pytest.approx(999)
        assert abs(times[-1]) < 1e-9


def test_the_likelihood_of_a_gaussian_is_its_own() -> None:
    sde = ScoreSDE("vp")

    def score(x: Tensor, t: float) -> Tensor:
        return -gaussian(x, float(sde.alpha(t)), float(sde.sigma(t))) / float(sde.sigma(t))

    x = torch.tensor([[0.7, 0.2, 1.5], [0.0, 0.7, 0.7]], dtype=torch.float64)
    bits, _ = likelihood(sde, score, x, torch.ones_like(x), offset=0.0)
    exact = -torch.distributions.Normal(MEAN, SPREAD).log_prob(x).mean(1) / math.log(2)
    torch.testing.assert_close(bits, exact, atol=5e-3, rtol=0)  # the prior is not quite what is left at t = 1
    calls = []
    for tolerance in (1e-8, (1e-3, 1e-8), (1e-3, 1e-3)):
        count = list[float]()
        likelihood(sde, lambda y, t, c=count: (c.append(t), score(y, t))[1], x, torch.ones_like(x), tolerance=tolerance)
        calls.append(len(count))
    assert calls[0] > calls[1] >= calls[2]


def test_a_corrector_does_not_see_the_batch() -> None:
    """The official norms are means over the batch; ours are each sample's own."""
    sde = ScoreSDE("ve", steps=5)
    noise = [torch.randn(3, 4, generator=torch.Generator().manual_seed(i)) for i in range(10)]
    x = 50 * noise[0]

    def score(y: Tensor, t: float) -> Tensor:
        return -y / float(sde.sigma(t)) ** 2

    both = sample_pc(sde, score, x, iter(noise))[0]
    alone = sample_pc(sde, score, x[:1], iter([n[:1] for n in noise]))[0]
    torch.testing.assert_close(both[:1], alone, atol=1e-6, rtol=1e-6)


def test_inherited_steps_run_less_and_leave_the_network_as_it_was() -> None:
    from diffusers import UNet2DConditionModel
    from torch.utils.flop_counter import FlopCounterMode

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=2, cross_attention_dim=8, norm_num_groups=4,
        attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()  # fmt: skip
    x, context, counts, outputs = torch.randn(1, 4, 8, 8), torch.randn(1, 3, 8), [], []
    with torch.no_grad():
        plain = unet(x, 10, encoder_hidden_states=context).sample
        with PartialNetwork(unet, interval=2, branch=0) as cache:
            for step in range(3):
                cache.at(step)
                with FlopCounterMode(display=False) as counter:
                    outputs.append(unet(x, 10, encoder_hidden_states=context).sample)
                counts.append(counter.get_total_flops())
        assert torch.equal(unet(x, 10, encoder_hidden_states=context).sample, plain)
    assert torch.equal(outputs[0], plain)
    torch.testing.assert_close(outputs[1], plain)  # the same input: what is inherited is right
    assert counts[1] < 0.5 * counts[0] == 0.5 * counts[2]
    with pytest.raises(BackboneError, match=r"branch and depths in 0\.\.5"):
        PartialNetwork(unet, interval=2, branch=6)
    with pytest.raises(BackboneError, match="has no down_blocks"):
        PartialNetwork(torch.nn.Linear(2, 2), interval=2)


def test_a_search_goes_on_where_it_stopped_and_never_asks_twice(tmp_path: Path) -> None:
    settings, asked = (
        SearchSettings(population=10, parents=4, mutations=4, crossovers=3, epochs=7, layers=6),
        list[Candidate](),
    )

    def fitness(candidate: Candidate) -> float:
        asked.append(candidate)
        if len(asked) == 15 and interrupted:
            raise KeyboardInterrupt
        return float(sum(abs(t - 40) for t in candidate.timesteps)) + sum(len(s) for s in candidate.skipped)

    interrupted = False
    whole = search_steps(fitness, 3, total=100, settings=settings)
    assert len(asked) == len(set(asked))
    assert any(candidate.skipped for candidate in asked)
    assert all(len(set(c.timesteps)) == 3 for c in asked)
    count, interrupted = len(asked), True
    asked.clear()
    with pytest.raises(KeyboardInterrupt):
        search_steps(fitness, 3, total=100, settings=settings, file=tmp_path / "search.json")
    interrupted = False
    again = search_steps(fitness, 3, total=100, settings=settings, file=tmp_path / "search.json")
    assert again == whole
    assert len(asked) == count + 1  # the interrupted one is asked once more
    assert read_candidate(tmp_path / "search.json") == whole[0][1]
    with pytest.raises(SamplingError, match="of another search"):
        search_steps(fitness, 4, total=100, settings=settings, file=tmp_path / "search.json")
    of, file = {"model": "one", "prompt": ("a", "b")}, tmp_path / "of.json"
    kept = search_steps(fitness, 3, total=100, settings=settings, file=file, of=of)
    count = len(asked)
    assert search_steps(fitness, 3, total=100, settings=settings, file=file, of=of) == kept
    assert len(asked) == count  # everything was in the file
    for other, said in (
        ({**of, "model": "two"}, 'model "one", not "two"'),
        ({}, r'model "one", not null; prompt \["a'),
    ):
        with pytest.raises(SamplingError, match=rf"of\.json: is of another search: {said}"):
            search_steps(fitness, 3, total=100, settings=settings, file=file, of=other)
    (tmp_path / "hand.json").write_text('{"timesteps": [1, 1]}')
    with pytest.raises(SamplingError, match=r"hand\.json: its timesteps are not distinct"):
        read_candidate(tmp_path / "hand.json")


def test_a_table_that_rises_is_refused() -> None:
    with pytest.raises(SamplingError, match="must fall"):
        TableVP([0.5, 0.9])
    with pytest.raises(SamplingError, match="times must fall"):
        TimeGrid.of(LinearVP(), [0.5, 0.5, 0.1])
