"""Cases of solvers that are tables: momentum, DEIS, USF, LML, few-step grids, searched steps, MRS; and EVODiff."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from diffrep.eval.search import SearchSettings, search_steps, uniform_timesteps
from diffrep.heads.mean_reverting import MeanReverting, mrs_table, sample_mean_reverting
from diffrep.sampling.core import SolverTable, run
from diffrep.sampling.schedules import (
    Exploding,
    FewStepGrid,
    Flow,
    LinearVP,
    NoiseSchedule,
    TableVP,
    TimeGrid,
    distinct_indices,
    spaced_times,
)
from diffrep.sampling.solvers import (
    Derivative,
    ddim_table,
    deis,
    evodiff,
    ipndm,
    levenberg_marquardt,
    momentum,
    momentum_weights,
    multistep,
    rho_runge_kutta,
    unified,
    with_levenberg_marquardt,
    with_momentum,
)
from diffrep.searched import Candidate

from .cases import each, tensors_of
from .sampling_mixture import Mixture, assert_like

SPACING = {"t": "power", "log": "log-snr", "rho": "karras"}  # DEIS's names of grids


def check_schedule(schedule: Any, table: Tensor) -> None:
    """A case's noise schedule is the table that it has."""
    assert_like(DDPMScheduler(**schedule).alphas_cumprod, table, atol=1e-6, what="alphas_cumprod")


def number(text: str) -> float:
    return float(text.replace("p", "."))


def check_ghvb(folder: Path, case: dict[str, Any]) -> None:
    inputs, expected = tensors_of(folder)
    p, table, model = case["parameters"], inputs["alphas_cumprod"], Mixture(inputs)
    check_schedule(p["schedule"], table)
    timesteps, stride = p["timesteps"], len(table) // p["steps"]
    assert len(timesteps) == p["steps"]
    assert np.all(np.diff(timesteps) == -stride)  # so that each step ends at the next timestep
    ends = re.fullmatch(r"t - 1000//steps; below 0: .+ \(set_alpha_to_one (True|False)\)", p["previous"])
    assert ends
    grid = TimeGrid.of(TableVP(table), [*timesteps, max(timesteps[-1] - stride, -1 if ends[1] == "True" else 0)])
    grid = grid.ending() if grid.times[-1] < 0 else grid

    def check(key: str, method: str, order: float, prediction: str = "epsilon") -> None:
        network = model.of_table(table, {"epsilon": "noise", "v_prediction": "velocity", "sample": "data"}[prediction])
        solver = momentum(grid, method=method, order=order, raw_start=prediction != "epsilon")
        seen: dict[int, Tensor] = {}
        got = run(solver, network, inputs["x_T"], prediction=prediction, after_step=seen.__setitem__)
        assert_like(got, expected[key], atol=2e-4, rtol=2e-4, what=key)
        if f"{key}_after4" in expected:
            assert_like(seen[3], expected[f"{key}_after4"], atol=2e-4, rtol=2e-4, what=f"{key} after 4 steps")

    for one in each(p["runs"]):
        check(one["key"], one["method"], one["order"])
    for name in ("v_official", "sample_official"):
        one = p[name]
        check(f"{one['method']}_{name}", one["method"], one["order"], one["prediction_type"])
    for key in (key for key in expected if key.startswith("mixer_")):
        _, order, beta = key.split("_")
        oldest_first = torch.tensor(momentum_weights(int(order), number(beta))[::-1])
        assert_like(oldest_first, expected[key], atol=1e-5, what=key)


def check_momentum_dpmpp(folder: Path, case: dict[str, Any]) -> None:
    inputs, expected = tensors_of(folder)
    p, table = case["parameters"], inputs["alphas_cumprod"]
    check_schedule(p["schedule"], table)
    assert p["last_target"].startswith("timestep 0 (alphas_cumprod[0])")
    assert p["steps"] == len(p["timesteps"])
    grid = TimeGrid.of(TableVP(table), [*p["timesteps"], 0])
    network = Mixture(inputs).of_table(table)
    runs = {"dpmpp2m_plain": multistep(grid)}
    for beta in p["betas"]:
        runs[f"dpmpp2m_hb_{beta}".replace(".", "p")] = with_momentum(multistep(grid), beta)
    u = p["unipc"]
    assert u["predict_x0"]
    relaxation = f"unipc-{u['solver_type']}"
    solver = multistep(grid, order=u["order"], relaxation=relaxation, corrected=True, final=u["lower_order_final"])
    runs[f"unipc{u['order']}_hb_{u['beta']}".replace(".", "p")] = with_momentum(solver, u["beta"])
    assert set(runs) == set(expected)
    for key, solver in runs.items():
        assert_like(run(solver, network, inputs["x_T"]), expected[key], atol=2e-4, rtol=2e-4, what=key)


# -- DEIS -----------------------------------------------------------------------------------------------------


class Cosine(NoiseSchedule):
    """`abar = cos^2((t + s) / (1 + s) pi / 2)` (Nichol & Dhariwal 2021)."""

    def log_alpha(self, t: Any) -> Any:
        return np.log(np.cos((t + 0.008) / 1.008 * np.pi / 2))


def coefficients(table: SolverTable, order: int, divisors: Sequence[float] | None = None) -> Tensor:
    """(steps, order + 1) the weights of a table's predictions, newest first."""
    rows = np.zeros((len(table.updates), order + 1))
    for i, update in enumerate(table.updates):
        rows[i, : len(update.direction)] = np.array(update.direction) / (1 if divisors is None else divisors[i])
    return torch.from_numpy(rows)


def check_deis_coefficients(folder: Path, case: dict[str, Any]) -> None:
    _, expected = tensors_of(folder)
    p = case["parameters"]
    schedule = LinearVP(*p["linear_beta_0_beta_1"], first=p["sampling_T"], last=p["sampling_eps"])
    assert p["grids"].startswith("expected/ts_PHASE_ORDER_STEPS")
    for key in (key for key in expected if key.startswith("ts_")):
        _, phase, power, steps = key.split("_")
        times = spaced_times(schedule, SPACING[phase], int(steps), power=number(power))
        assert_like(torch.from_numpy(times), expected[key], atol=0, rtol=1e-3, what=key)

    def check(key: str, got: Tensor, base: Tensor) -> None:
        assert_like(got, base, atol=1e-4, rtol=5e-3, what=key)
        if f"{key}_x64" in expected:
            exact = expected[f"{key}_x64"]
            share = (got - exact).abs() / exact.abs().amax(1, keepdim=True)
            assert share.max() < 5e-4, f"{key}: {share.max():.1e} of the row's largest entry"

    for one in each(p["tables"]):
        order, steps = one["ab_order"], one["steps"]
        grid = TimeGrid.of(schedule, spaced_times(schedule, SPACING[one["phase"]], steps, power=one["ts_order"]))
        name = f"{order}_{one['phase']}_{steps}"
        in_t, in_rho = (deis(grid, schedule, order=order, variable=variable) for variable in ("t", "rho"))
        check(f"tab{name}_coef", coefficients(in_t, order), expected[f"tab{name}_coef"])
        carries = torch.tensor([update.carry for update in in_t.updates])
        assert_like(carries, expected[f"tab{name}_psi"], atol=1e-4, rtol=5e-3, what=f"psi of {name}")
        scaled = coefficients(in_rho, order, grid.alpha[1:].tolist())
        check(f"rhoab{name}_coef", scaled, expected[f"rhoab{name}_coef"])
    c = p["cosine"]
    cosine = Cosine()
    cosine.first, cosine.last = c["sampling_T"], c["sampling_eps"]
    phase, steps = re.fullmatch(r"(\w+), (\d+) steps", c["grid"]).groups()  # type: ignore[union-attr]
    times = spaced_times(cosine, SPACING[phase], int(steps))
    assert_like(torch.from_numpy(times), expected[f"cos_ts_{phase}"], atol=0, rtol=1e-3, what="cosine grid")
    got = coefficients(deis(TimeGrid.of(cosine, times), cosine, order=c["order"]), c["order"])
    assert_like(got, expected[f"cos_tab{c['order']}_coef"], atol=1e-4, rtol=5e-3, what="cosine table")


def deis_table(run: Any, grid: TimeGrid, schedule: Any) -> SolverTable:
    """A run's solver, by the official names."""
    if run["method"] == "ipndm":
        return ipndm(grid)
    if run["method"] == "rho_rk":
        return rho_runge_kutta(grid, schedule, method=run["rk_method"])
    return deis(grid, schedule, order=run["ab_order"], variable={"t_ab": "t", "rho_ab": "rho"}[run["method"]])


def check_deis_sampling(folder: Path, case: dict[str, Any]) -> None:
    inputs, expected = tensors_of(folder)
    p, model = case["parameters"], Mixture(inputs)
    schedule = LinearVP(*p["linear_beta_0_beta_1"], first=p["sampling_T"], last=p["sampling_eps"])

    def network(x: Tensor, t: float) -> Tensor:
        return model.noise(x, float(schedule.alpha(t)), float(schedule.sigma(t)))

    for i, one in enumerate(each(p["runs"], describing=("ab_order", "rk_method"))):  # the other methods' are null
        times = spaced_times(schedule, SPACING[one["ts_phase"]], one["num_step"], power=one["ts_order"])
        got = run(deis_table(one, TimeGrid.of(schedule, times), schedule), network, inputs["x_T"])
        assert_like(got, expected[f"run{i}"], atol=5e-3, rtol=5e-3, what=f"run {i}")


def check_deis_discrete(folder: Path, case: dict[str, Any]) -> None:
    inputs, expected = tensors_of(folder)
    p, table = case["parameters"], inputs["alphas_cumprod"]
    schedule, network = TableVP(table, between="abar"), Mixture(inputs).of_table(table)

    def times(phase: str, power: float, steps: int) -> np.ndarray:
        return distinct_indices(spaced_times(schedule, SPACING[phase], steps, power=power))

    for name, words in p["grids"].items():  # "ts_t2_N": "phase t, order 2"; "ts_rho7": "phase rho, order 7, 8 steps"
        phase, power, steps = re.fullmatch(r"phase (\w+), order ([\d.]+)(?:, (\d+) steps)?", words).groups()  # type: ignore
        keys = [key for key in expected if key == name or key.rsplit("_", 1)[0] == name.removesuffix("_N")]
        assert keys, name
        for key in keys:
            got = times(phase, float(power), int(steps or len(expected[key]) - 1))
            assert_like(torch.from_numpy(got), expected[key], atol=2e-2, what=key)
    for i, one in enumerate(each(p["runs"])):
        phase, power = one.get("ts_phase", "t"), one.get("ts_order", 1.0)  # iPNDM is made for even timesteps
        grid = TimeGrid.of(schedule, times(phase, power, one["num_step"]))
        got = run(deis_table(one, grid, schedule), network, inputs["x_T"])
        assert_like(got, expected[f"run{i}"], atol=1e-2, rtol=1e-2, what=f"run {i}")


# -- USF ------------------------------------------------------------------------------------------------------


def derivatives(estimates: Any) -> list[Derivative]:
    """A step's estimates as the toolkit has them."""
    found = []
    for one in estimates:
        points = tuple(one["active_points"])
        assert one["estimate"] == f"Difference_{len(points)}"
        coefficient = one.get("relaxation_coefficient")
        found.append(Derivative(points, one["relaxation"], coefficient or 0.0))
    return found


def check_usf(folder: Path, case: dict[str, Any]) -> None:
    inputs, expected = tensors_of(folder)
    p, model = case["parameters"], Mixture(inputs)
    assert p["schedule"]["linear VP"].startswith("log alpha(t) = -t^2 (b1-b0)/4 - t b0/2")
    schedule = LinearVP(*p["schedule"]["b0_b1"])
    for one in each(p["runs"], describing=("equals",)):
        d, calls = one["decisions"], list[float]()
        correctors: list[Sequence[Derivative] | None] = []
        for corrector in d["corrector_types"]:
            estimates, order = corrector["derivative_type"], corrector["taylor_order"]
            assert corrector["start_point"] in (None, -2)
            if corrector["type"] == "no_corrector":
                correctors.append(None)
                continue
            assert corrector["type"] in ("pseudo", "implicit")  # the released implicit ones are never asked again
            assert order == len(estimates) + 1
            correctors.append(derivatives(estimates))
        table = unified(
            TimeGrid.of(schedule, d["timesteps"]),
            orders=d["orders"],
            forms=[name.removesuffix("_prediction") for name in d["prediction_types"]],
            derivatives=[derivatives(estimates) for estimates in d["derivative_types"]],
            starts=d["start_points"],
            correctors=correctors,
            clamp="dynamic" if one["thresholding"] else None,
            afs=None if d["afs"] == "no_afs" else d["afs"],
        )

        def network(x: Tensor, t: float, calls: list[float] = calls) -> Tensor:
            calls.append(t)
            return model.noise(x, float(schedule.alpha(t)), float(schedule.sigma(t)))

        got = run(table, network, inputs["x_T"], average=inputs.get("average_x0"))
        assert_like(got, expected[one["key"]], atol=1e-3, rtol=1e-3, what=one["key"])
        assert len(calls) == one["network_calls"], one["key"]


# -- EVODiff, LML, few-step grids -----------------------------------------------------------------------------


def check_evodiff(folder: Path, case: dict[str, Any]) -> None:
    inputs, expected = tensors_of(folder)
    p, model = case["parameters"], Mixture(inputs, torch.float64)
    spacing = {"logSNR": "log-snr", "edm": "karras", "time_quadratic": "quadratic", "time_uniform": "uniform"}
    for i, one in enumerate(each(p["runs"])):
        assert one["order"] == 2, f"EVODiff is described for order 2, not {one['order']}"
        schedule = Exploding(first=one["t_start"], last=one["t_end"])
        times = spaced_times(schedule, spacing[one["skip_type"]], one["steps"])
        assert_like(torch.from_numpy(times), expected[f"ts{i}"], atol=0, rtol=1e-5, what=f"grid {i}")
        grid, calls = TimeGrid.of(schedule, times), list[float]()

        def network(x: Tensor, t: float, calls: list[float] = calls) -> Tensor:
            calls.append(t)
            return model.data(x, 1.0, t)

        table = evodiff(grid, final=p["lower_order_final"], denoise=one["denoise_to_zero"])
        got = run(table, network, one["t_start"] * inputs["z"].double(), prediction="sample")
        assert len(calls) == one["steps"] + one["denoise_to_zero"] * (1 if p["lower_order_final"] else 2)
        assert_like(got, expected[one["key"]], atol=1e-4, rtol=1e-4, what=one["key"])


def check_lml(folder: Path, case: dict[str, Any]) -> None:
    inputs, expected = tensors_of(folder)
    p, table = case["parameters"], inputs["alphas_cumprod"]
    check_schedule(p["schedule"], table)
    model, x = Mixture(inputs, torch.float64), inputs["x_T"].double()
    network = model.of_table(table)
    direction = inputs["direction"]
    for one in each(p["correct"]):
        correct = levenberg_marquardt(one["lamb"], one["kappa"], released=True).act
        assert_like(correct(direction, inputs["previous"])[0], expected[one["key"]], atol=5e-4, what=one["key"])
        assert_like(correct(direction, direction)[0], expected[f"{one['key']}_first"], atol=5e-4, what="the first")
        exact = levenberg_marquardt(one["lamb"], one["kappa"]).act(direction, inputs["previous"])[0]
        assert_like(exact, expected[one["key"]], atol=5e-3, what=f"{one['key']} without cancellation")
    for released in (True, False):
        correct = levenberg_marquardt(1e-3, 0.0, released=released).act
        void = correct(direction.double(), inputs["previous"].double())[0]
        assert_like(void, expected["correct_float64_kappa0_small_lambda"], atol=1e-6, what="kappa 0")
    assert p["dpm_last_target"].startswith("timestep 0 (alphas_cumprod[0]); lower order in the last steps")
    for one in each(p["dpm"]):
        form = {"dpmsolver": "noise", "dpmsolver++": "data"}[one["algorithm_type"]]
        plain = multistep(TimeGrid.of(TableVP(table), [*one["timesteps"], 0]), order=one["order"], form=form)
        assert_like(run(plain, network, x), expected[f"{one['key']}_plain"], atol=1e-4, rtol=1e-4, what="plain")
        solver = with_levenberg_marquardt(plain, one["lamb"], one["kappa"])
        assert_like(run(solver, network, x), expected[one["key"]], atol=1e-4, rtol=1e-4, what=one["key"])
    assert p["ddim_note"].startswith("set_alpha_to_one True, trailing, eta 0, no clipping")
    for one in each(p["ddim"]):
        until = len(table) * (1 - one["freeze"])
        plain = diffusers_ddim(table, one["timesteps"])
        solver = with_levenberg_marquardt(plain, one["lamb"], one["kappa"], split=True, until=until)
        assert_like(run(solver, network, x), expected[one["key"]], atol=1e-4, rtol=1e-4, what=one["key"])
    assert p["flow_note"].startswith("the state is a sequence (B, tokens, width)")
    weights = model.log_weights.softmax(0).view(-1, 1, 1, 1)

    def velocity(y: Tensor, sigma: float) -> Tensor:
        if sigma == 1:  # nothing of the data is left: their mean
            return y - (weights * model.means).sum(0)
        return model.noise(y, 1 - sigma, sigma) - model.data(y, 1 - sigma, sigma)

    for one in each(p["flow"]):
        shift = one["shift"]  # of the grid's end, too, as diffusers' scheduler has it
        even = np.linspace(1, shift / 1000 / (1 + (shift - 1) / 1000), one["steps"])
        sigmas = [*(shift * even / (1 + (shift - 1) * even)), 0.0]
        assert_like(torch.tensor(sigmas), torch.tensor(one["sigmas"]), atol=1e-6, what="sigmas")
        plain = ddim_table(TimeGrid.of(Flow(), one["sigmas"]), form="velocity")
        solver = with_levenberg_marquardt(plain, one["lamb"], one["kappa"])
        got = run(solver, velocity, x, prediction="flow_prediction")
        assert_like(got, expected[one["key"]], atol=4e-2, what=one["key"])


def diffusers_ddim(table: Tensor, timesteps: Sequence[int]) -> SolverTable:
    """DDIM whose steps go to `t - 1000 // steps`, which is not always the next timestep, and end clean."""
    schedule, stride, updates = TableVP(table), len(table) // len(timesteps), []
    for t in timesteps:
        step = TimeGrid.of(schedule, [t, t - stride])
        updates += ddim_table(step if t >= stride else step.ending()).updates
    return SolverTable("DDIM", TimeGrid.of(schedule, [*timesteps, -1]), tuple(updates))


def check_few_step_grid(folder: Path, case: dict[str, Any]) -> None:
    inputs, expected = tensors_of(folder)
    p, table, model = case["parameters"], inputs["alphas_cumprod"], Mixture(inputs)
    in_abar, k_diffusion = TableVP(table, between="abar"), TableVP(table, between="log-sigma")

    def network(x: Tensor, sigma: float) -> Tensor:
        t = k_diffusion.time_of(-np.log(sigma))[0]
        return model.noise(x / (1 + sigma**2) ** 0.5, float(k_diffusion.alpha(t)), float(k_diffusion.sigma(t)))

    for name, one in p["grids"].items():
        times = FewStepGrid(**one).times(table)
        sigmas = in_abar.sigma(times) / in_abar.alpha(times)
        # where a grid ends at timestep 0 no relative bound means anything: the rounding of single precision
        rounding = float(np.spacing(np.float32(times[0]))) if times[-1] < 1e-9 else 0.0
        assert_like(torch.from_numpy(times), expected[f"t_{name}"], atol=rounding, rtol=1e-4, what=f"t of {name}")
        assert_like(torch.from_numpy(sigmas), expected[f"sigma_{name}"], atol=0, rtol=1e-3, what=f"sigma of {name}")
        grid = TimeGrid.of(Exploding(), sigmas)
        for order, word in ((1, "first"), (2, "second")):
            got = run(multistep(grid, order=order, final=False), network, inputs["z"] * sigmas[0])
            assert_like(got, expected[f"{word}_order_{name}"], atol=2e-3, rtol=2e-3, what=f"{word} order, {name}")
    assert p["used_by_default"]["8 steps"] == "sd_8_full with 2M (SDXL: xl_8)"
    assert p["used_by_default"]["5, 6"] == p["used_by_default"]["4"] == "first order"


# -- AutoDiffusion --------------------------------------------------------------------------------------------


def check_autodiffusion(folder: Path, case: dict[str, Any]) -> None:
    inputs, expected = tensors_of(folder)
    p, model = case["parameters"], Mixture(inputs)
    assert p["beta_schedule"] in ("cosine", "linear")  # the table is among the inputs
    assert p["variance"] == "FIXED_SMALL (posterior), clip_denoised True, eta 0"
    table = (1 - inputs["betas"]).cumprod(0)
    network = model.of_table(table)
    for one in each(p["runs"]):
        key, chosen = one["key"], sorted(set(one["timesteps"]))
        assert chosen == one["timestep_map"]
        grid = TimeGrid.of(TableVP(table), [*chosen[::-1], chosen[0] - 1]).ending()
        rising = torch.from_numpy(grid.alpha[::-1] ** 2)
        variance = torch.tensor([u.noise**2 for u in ddim_table(grid, eta=1.0).updates[::-1]], dtype=torch.float64)
        for name, got in (
            ("betas", 1 - rising[1:] / rising[:-1]),
            ("alphas_cumprod", rising[1:]),
            ("posterior_variance", variance),
            ("posterior_log_variance", torch.cat([variance[1:2], variance[1:]]).log()),  # the first would be of 0
        ):
            assert_like(got, expected[f"{key}_{name}"], atol=1e-9, rtol=1e-6, what=f"{key} {name}")
        no_signal = p["beta_schedule"] == "cosine" and len(table) - 1 in chosen
        atol = 2e-2 if no_signal else 1e-3
        for name, eta in (("ddim", 0.0), ("ddpm", 1.0)):
            solver = replace(ddim_table(grid, eta=eta), clamp="static")
            got = run(solver, network, inputs["x_T"], noise=list(inputs[f"{key}_ddpm_noise"]))
            assert_like(got, expected[f"{key}_{name}"], atol=atol, what=f"{key} {name}")
    for name, timesteps in p["uniform"].items():
        assert uniform_timesteps(int(name.removeprefix("ddim"))) == timesteps
    s = p["search"]
    assert s["fitness"] == "sum |sorted(candidate) - target|"
    assert s["seeds"].startswith("random.seed")
    target = sorted(s["target"])
    best, evaluations = [], []

    def fitness(candidate: Candidate) -> float:
        evaluations.append(candidate)
        return float(sum(abs(a - b) for a, b in zip(sorted(candidate.timesteps), target, strict=True)))

    for seed in range(20):
        settings = SearchSettings(
            population=s["population_num"], parents=s["select_num"], mutations=s["mutation_num"],
            crossovers=s["crossover_num"], mutation_rate=s["m_prob"], epochs=s["max_epochs"], seed=seed,
        )  # fmt: skip
        best.append(search_steps(fitness, len(target), settings=settings)[0][0])
    assert len(evaluations) <= 20 * s["evaluations"]
    official = [fitness(Candidate(tuple(eval_list(one["candidate"])))) for one in s["top5"]]
    assert official == [one["fitness"] for one in s["top5"]]
    assert np.mean(best) <= min(official), f"{np.mean(best)} on average, {min(official)} by the official search"


def eval_list(text: str) -> list[int]:
    return [int(word) for word in text.strip("[]").split(",")]


# -- mean reversion -------------------------------------------------------------------------------------------


def check_mr_sampler(folder: Path, case: dict[str, Any]) -> None:
    inputs, expected = tensors_of(folder)
    p, model, mean = case["parameters"], Mixture(inputs), inputs["cond"]
    sde = p["sde"]
    assert p["max_sigma_used"] == ("max_sigma/255" if sde["max_sigma"] >= 1 else "max_sigma")
    schedule = MeanReverting(sde["max_sigma"], steps=sde["T"], schedule=sde["schedule"], eps=sde["eps"])
    reversion = np.cumsum(schedule.thetas)
    for name, got in (
        ("thetas", schedule.thetas), ("sigma_bars", schedule.sigmas), ("alphas", schedule.alphas),
        ("thetas_cumsum", reversion), ("dt", -np.log(schedule.alphas[-1:]) / reversion[-1]),
    ):  # fmt: skip
        assert_like(torch.from_numpy(got), expected[name], atol=1e-6, rtol=1e-5, what=name)
    for one in each(p["runs"]):
        key = one["key"]
        times = schedule.times(one["time_schedule"], one["num_sample_steps"], lowest=one["lambda_min"])
        grid = TimeGrid.of(schedule, times)
        tables = (("timesteps", times), ("alphas", grid.alpha), ("sigmas", grid.sigma), ("lambdas", grid.log_snr))
        for name, got in tables:
            # the official tables are float32, and log-SNR is flat in the index
            assert_like(torch.from_numpy(got), expected[f"{key}_{name}"], atol=1e-3, rtol=1e-4, what=f"{key} {name}")
        network = target_network(model, schedule, mean, one["fit_target"])
        noisy = {"ode": False, "sde": True}[one["solver_type"]]
        got = sample_mean_reverting(
            schedule,
            mrs_table(grid, order=one["order"], form=one["parameterization"], noisy=noisy),
            network,
            mean,
            mean + inputs[f"{key}_prior_noise"] * schedule.stationary,
            target=one["fit_target"],
            noise=list(inputs[f"{key}_noise"]) if noisy else None,
            denoise_last=one["denoise_last"],
            thresholding=p["thresholding"],
        )
        assert_like(got, expected[key], atol=1e-3, rtol=1e-3, what=key)


def target_network(
    model: Mixture, schedule: MeanReverting, mean: Tensor, target: str
) -> Callable[[Tensor, float], Tensor]:
    """The exact network, giving what the case's networks give."""

    def network(x: Tensor, t: float) -> Tensor:
        a, s, far = float(schedule.alpha(t)), float(schedule.sigma(t)), schedule.stationary
        y = x - (1 - a) * mean
        if target == "velocity":
            return far * a * model.noise(y, a, s) - s / far * (model.data(y, a, s) - mean)
        return {"noise": model.noise, "data": model.data}[target](y, a, s)

    return network
