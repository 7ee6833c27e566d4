"""Cases of samplers in continuous time: Score-SDE, stochastic interpolants, SiT, the Fokker-Planck residual."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from diffrep.eval.likelihood import likelihood, normal_log_density
from diffrep.sampling.flows import FORMS, Transport, integrate_sde, integrate_with_density, probability_flow
from diffrep.sampling.schedules import slope
from diffrep.sampling.score_sde import ScoreSDE, sample_flow, sample_pc
from diffrep.training.fokker_planck import Potential, fokker_planck_loss, kernel_score, residual, sample_reverse
from diffrep.training.interpolants import Path as Curves
from diffrep.training.interpolants import between, interpolant, interpolant_loss, transport_loss

from .cases import each, tensors_of
from .sampling_mixture import Mixture, assert_like

KINDS = ("vp", "subvp", "ve")


def sde_of(kind: Any, p: Any) -> ScoreSDE:
    betas, sigmas = p["beta_min_max"], p["sigma_min_max"]
    return ScoreSDE(kind, betas[0], betas[1], sigmas[0], sigmas[1], p["N"])


def check_score_sde_schedules(folder: Path, case: dict[str, Any]) -> None:
    inputs, expected = tensors_of(folder)
    x, t = inputs["x"].double(), inputs["t"].double().numpy()

    def times_x(factor: Any) -> Tensor:
        return torch.from_numpy(factor).view(-1, 1, 1, 1) * x

    for kind in KINDS:
        sde = sde_of(kind, case["parameters"])
        (drift, diffusion), (step, noise) = sde.drift(t), sde.discretize(inputs["t"].numpy())
        got = {
            "prior_logp": normal_log_density(x, sde.sigma_max if kind == "ve" else 1.0),
            "mean": times_x(sde.alpha(t)),
            "std": torch.from_numpy(sde.sigma(t)),
            "drift": times_x(drift),
            "diffusion": torch.from_numpy(diffusion),
            "f": times_x(step),
            "G": torch.from_numpy(noise),
        }
        if kind == "vp":
            got |= {"discrete_betas": torch.from_numpy(sde.betas)}
            got |= {"alphas_cumprod": (1 - got["discrete_betas"]).cumprod(0)}
        if kind == "ve":
            got["discrete_sigmas"] = torch.from_numpy(sde.sigmas)
        for name, value in got.items():
            assert_like(value, expected[f"{kind}_{name}"], atol=1e-5, rtol=1e-5, what=f"{kind} {name}")
    assert {key.split("_")[0] for key in expected} == set(KINDS)


def official_network(sde: ScoreSDE, model: Mixture, *, continuous: bool) -> Any:
    """The exact network with the official labels; the samples of a batch share their time."""

    def network(x: Tensor, label: Tensor) -> Tensor:
        first = label[0]
        if sde.kind == "ve":
            return model.score(x, 1.0, float(first) if continuous else float(sde.sigmas[::-1][int(first)]))
        if continuous or sde.kind == "subvp":
            return model.noise(x, float(sde.alpha(float(first) / 999)), float(sde.sigma(float(first) / 999)))
        abar = float((1 - sde.betas).cumprod()[int(first)])
        return model.noise(x, abar**0.5, (1 - abar) ** 0.5)

    return network


def check_score_sde_pc(folder: Path, case: dict[str, Any]) -> None:
    inputs, expected = tensors_of(folder)
    p, model = case["parameters"], Mixture(inputs)
    for i, one in enumerate(each(p["runs"])):
        sde = sde_of(one["sde"], p)
        network = official_network(sde, model, continuous=one["continuous"])
        noise = iter(inputs[f"run{i}_noise"])
        denoised, raw = sample_pc(
            sde,
            sde.score(network, continuous=one["continuous"]),
            inputs[f"run{i}_x_T"],
            noise,
            predictor=one["predictor"],
            corrector=one["corrector"],
            snr=one["snr"],
            corrector_steps=one["corrector_steps"],
            flow=one["probability_flow"],
            batch_mean=True,
            last=one["eps"],
        )
        assert next(noise, None) is None, f"run {i} leaves noise"
        assert one["reported_nfe"] == p["N"] * (one["corrector_steps"] + 1)  # also where the corrector is "none"
        assert_like(denoised, expected[f"run{i}_denoised"], atol=2e-4, rtol=2e-4, what=f"run {i}, denoised")
        assert_like(raw, expected[f"run{i}_raw"], atol=2e-4, rtol=2e-4, what=f"run {i}")


def check_score_sde_ode(folder: Path, case: dict[str, Any]) -> None:
    inputs, expected = tensors_of(folder)
    p, model = case["parameters"], Mixture(inputs)
    assert p["method"] == "scipy RK45"
    tolerance, offset = (p["rtol"], p["atol"]), re.fullmatch(r".*= (-?[\d.]+) bits", p["inverse_scaler"])
    assert offset
    ends = {kind: value for names, value in p["eps_sampling"].items() for kind in names.split(",")}
    for kind in KINDS:
        sde = sde_of(kind, p)

        calls = list[float]()

        def score(x: Tensor, t: float, sde: ScoreSDE = sde, calls: list[float] = calls) -> Tensor:
            calls.append(t)
            return model.score(x, float(sde.alpha(t)), float(sde.sigma(t)))

        z = inputs[f"{kind}_z"]
        for name, denoise in (("ode", False), ("ode_denoised", True)):
            calls.clear()
            got = sample_flow(sde, score, z, tolerance=tolerance, last=ends[kind], denoise=denoise)
            assert abs(len(calls) - p["nfe_reported"][f"{kind}_ode"]) <= 12, f"{kind}: {len(calls)} calls"
            assert_like(got, expected[f"{kind}_{name}"], atol=2e-3, what=f"{kind} {name}")
        probe = 2 * inputs[f"{kind}_probe_bits"].float() - 1
        calls.clear()
        ask = dict(tolerance=tolerance, first=p["eps_likelihood"], offset=float(offset[1]))
        bits, latent = likelihood(sde, score, inputs["data"], probe, **ask)
        assert abs(len(calls) - p["nfe_reported"][f"{kind}_likelihood"]) <= 12, f"{kind}: {len(calls)} calls"
        assert_like(bits, expected[f"{kind}_bpd"], atol=5e-3, what=f"{kind} bits per dimension")
        assert_like(latent, expected[f"{kind}_latent"], atol=5e-3, rtol=5e-3, what=f"{kind} latent")


# -- interpolants ---------------------------------------------------------------------------------------------


def check_interpolants(folder: Path, case: dict[str, Any]) -> None:
    inputs, expected = tensors_of(folder)
    p, times = case["parameters"], torch.tensor(case["parameters"]["t"])
    x0, x1, z = inputs["x0"], inputs["x1"], inputs["z"]
    for path, gamma in p["paths"]:
        curves, name = interpolant(path, gamma), f"{path}_{gamma}".replace("-", "_")
        t, both = times.double().numpy(), [between(curves, t, x0, x1) for t in times]
        arrays = {"a": curves.x0(t), "adot": slope(curves.x0, t), "b": curves.x1(t), "bdot": slope(curves.x1, t)}
        if gamma:
            arrays |= {"gamma": curves.gamma(t), "gg_dot": curves.gamma_slope(t)}
            arrays["gamma_dot"] = arrays["gg_dot"] / arrays["gamma"]
        got = {key: torch.from_numpy(value) for key, value in arrays.items()}
        got |= {"It": torch.stack([one for one, _ in both]), "dtIt": torch.stack([one for _, one in both])}
        for key, value in got.items():
            assert_like(value, expected[f"{name}_{key}"], atol=1e-4, rtol=1e-4, what=f"{name} {key}")
    assert p["model"] == "f(x,t) = A x + t c"
    for sided, words in p["loss_paths"].items():
        path, _, gamma = words.partition(", ")
        for kind in ("b", "s", "eta", "v"):
            got = interpolant_loss(
                kind,
                interpolant(path, gamma or None),
                lambda x, t: x @ inputs["A"].T + t * inputs["c"],
                torch.tensor(p["loss_t"]),
                x0,
                x1,
                z,
            )
            key = f"loss_{'one_sided_' if sided == 'one-sided' else ''}{kind}"
            assert_like(got, expected[key], atol=1e-4, rtol=1e-4, what=key)


def gaussian(text: str) -> float:
    """The standard deviation in words such as "N(m0, 0.7^2 I)"."""
    words = re.fullmatch(r"N\(m[01], ([\d.]+)\^2 I\)", text)
    assert words
    return float(words[1])


class GaussianEnds:
    """The exact drift and score of an interpolant between two Gaussians."""

    def __init__(self, curves: Curves, m0: Tensor, s0: float, m1: Tensor, s1: float) -> None:
        self.curves, self.m0, self.s0, self.m1, self.s1 = curves, m0, s0, m1, s1

    def moments(self, t: float) -> tuple[Tensor, float]:
        """Mean and variance of the state."""
        a, b = float(self.curves.x0(t)), float(self.curves.x1(t))
        latent = float(self.curves.variance(t)) if self.curves.variance else 0.0
        return a * self.m0 + b * self.m1, a**2 * self.s0**2 + b**2 * self.s1**2 + latent

    def drift(self, x: Tensor, t: float) -> Tensor:
        mean, variance = self.moments(t)
        a, b = float(self.curves.x0(t)), float(self.curves.x1(t))
        da, db = float(slope(self.curves.x0, t)), float(slope(self.curves.x1, t))
        latent = float(self.curves.gamma_slope(t)) if self.curves.variance else 0.0
        shrink = (da * a * self.s0**2 + db * b * self.s1**2 + latent) / variance
        return da * self.m0 + db * self.m1 + shrink * (x - mean)

    def score(self, x: Tensor, t: float) -> Tensor:
        mean, variance = self.moments(t)
        return -(x - mean) / variance


def check_interpolant_sampling(folder: Path, case: dict[str, Any]) -> None:
    inputs, expected = tensors_of(folder)
    p, eps = case["parameters"], case["parameters"]["eps"]
    assert p["note"].startswith("n_step POINTS")
    two_sided, one_sided = p["x0"].split("; ")
    assert one_sided == "one-sided: N(0, I)"
    for name in p["paths"]:
        path, gamma = name.rsplit("_", 1)
        alone = gamma == "None"
        curves = interpolant(path.replace("_", "-"), None if alone else gamma)
        s0, s1 = 1.0 if alone else gaussian(two_sided), gaussian(p["x1"])
        m0, m1 = torch.zeros_like(inputs["m0"]) if alone else inputs["m0"], inputs["m1"]

        exact = GaussianEnds(curves, m0, s0, m1, s1)
        times, start = np.linspace(*p["start_end"], p["n_step"]).tolist(), inputs[f"{name}_start"]
        for method in ("euler", "rk4"):
            end, change = integrate_with_density(exact.drift, start, times, method)
            key = f"{name}_ode_{method}"
            assert_like(end, expected[key], atol=2e-3, rtol=2e-3, what=key)
            assert_like(change, expected[f"{key}_dlogp"], atol=2e-3, rtol=2e-3, what=f"{key} density")

        for method, sign, where, key in (
            ("euler", 1, times, "sde_euler"),
            ("heun", 1, times, "sde_heun"),
            ("heun", -1, times[::-1], "sde_reverse_heun"),
        ):
            noise = list(inputs[f"{name}_{'reverse_' if sign < 0 else ''}noise"])

            def noisy(x: Tensor, t: float, sign: int = sign, exact: GaussianEnds = exact) -> Tensor:
                return exact.drift(x, t) + sign * eps * exact.score(x, t)

            spread = math.sqrt(2 * eps)
            got = integrate_sde(noisy, start, where, lambda t, s=spread: s, noise, method=method, ahead=True)  # type: ignore
            assert_like(got, expected[f"{name}_{key}"], atol=2e-3, rtol=2e-3, what=f"{name} {key}")


# -- SiT ------------------------------------------------------------------------------------------------------


def check_sit_paths(folder: Path, case: dict[str, Any]) -> None:
    inputs, expected = tensors_of(folder)
    p, model, t = case["parameters"], Mixture(inputs), inputs["t"]
    betas = p["vp_sigma_min_max"]
    for path in ("Linear", "GVP", "VP"):
        transport = Transport(path, beta_0=betas[0], beta_1=betas[1])
        x, velocity = between(curves(transport), t, inputs["z"], inputs["x1"])
        times = t.double().tolist()

        def each_at(of: Callable[[Tensor, float], Tensor], x: Tensor = x, times: list[float] = times) -> Tensor:
            return torch.cat([of(x[i : i + 1], u) for i, u in enumerate(times)])

        def score(y: Tensor, u: float, transport: Transport = transport) -> Tensor:
            return model.score(y, float(transport.alpha(u)), float(transport.sigma(u)))

        flow = probability_flow(transport, score)
        rates = [[float(v) for v in transport.rates(u)] for u in times]
        got = {"xt": x, "ut": velocity, "velocity_from_score": each_at(flow)}
        got["drift"] = torch.stack([-rate * y for (rate, _), y in zip(rates, x, strict=True)])
        got["drift_var"] = torch.tensor([half for _, half in rates]).view(-1, 1, 1, 1)
        for name, of in (
            ("score_from_velocity", transport.score),
            ("noise_from_velocity", transport.noise_from_velocity),
        ):
            got[name] = each_at(lambda y, u, of=of, flow=flow: of(flow(y, u), y, u))
        for name, value in got.items():
            assert_like(value, expected[f"{path}_{name}"], atol=2e-4, rtol=2e-4, what=f"{path} {name}")
        for form in FORMS:
            key = f"{path}_diffusion_{form}"
            value = torch.tensor([transport.diffusion(form, u, norm=p["norm"]) for u in times])
            shaped = value.view(-1, *[1] * (expected[key].ndim - 1))[: len(expected[key])]
            assert_like(shaped, expected[key], atol=2e-4, rtol=2e-4, what=key)
    assert p["loss_model"] == "f(x,t) = x/2 + t"
    for key in (key for key in expected if key.startswith("loss_")):
        _, path, prediction, weight = key.split("_")
        transport = Transport(path, prediction, betas[0], betas[1])
        x, velocity = between(curves(transport), t, inputs["z"], inputs["x1"])
        output = x / 2 + t.view(-1, 1, 1, 1)
        weighting = None if weight == "None" else weight
        got_loss = transport_loss(transport, output, x, t, inputs["z"], velocity, weighting)
        assert_like(got_loss, expected[key], atol=2e-4, rtol=2e-4, what=key)


def curves(transport: Transport) -> Curves:
    return Curves(transport.sigma, transport.alpha)


def check_sit_sampling(folder: Path, case: dict[str, Any]) -> None:
    inputs, expected = tensors_of(folder)
    model = Mixture(inputs)
    mean = (model.log_weights.softmax(0).view(-1, 1, 1, 1) * model.means).sum(0)
    for one in each(case["parameters"]["runs"]):
        key, transport = one["key"], Transport(one["path"], one["prediction"])

        def network(x: Tensor, t: float, transport: Transport = transport) -> Tensor:
            alpha, sigma = float(transport.alpha(t)), float(transport.sigma(t))
            if transport.prediction != "velocity":
                return getattr(model, transport.prediction)(x, alpha, sigma)
            data = model.data(x, alpha, sigma) if alpha > 0 else mean.expand_as(x)
            rise, fall = (float(slope(curve, t)) for curve in (transport.alpha, transport.sigma))
            return rise * data + fall * model.noise(x, alpha, sigma)

        first, last = one["interval"]
        if "diffusion_form" not in one:
            assert transport.interval() == (first, last), key
            got = transport.sample_ode(network, inputs["z"], one["points"], one["method"])
        else:
            size = one["last_step_size"]
            assert transport.interval(sde=True, last_step=size if one["last_step"] else 0.0) == (first, last), key
            got = transport.sample_sde(
                network,
                inputs["z"],
                one["points"],
                list(inputs[f"{key}_noise"]),
                method=one["method"].lower(),
                form=one["diffusion_form"],
                norm=one["norm"],
                last_step=one["last_step"],
                last_step_size=size,
            )
        assert_like(got, expected[key], atol=2e-3, rtol=2e-3, what=key)


# -- Fokker-Planck --------------------------------------------------------------------------------------------


def check_fokker_planck(folder: Path, case: dict[str, Any]) -> None:
    inputs, expected = tensors_of(folder)
    p = case["parameters"]
    assert p["process"].startswith("dx = -x dt + dW (2-D)")
    assert p["net"]["inputs"] == "(t, x, y)"
    assert p["net"]["activation"] == "Softplus(beta=100)"
    potential = Potential(p["net"]["layers"])
    potential.load_state_dict(load_file(folder / "model" / "model.safetensors"))
    places = inputs["collocation"]
    mean, variance = torch.tensor(p["exact"]["mean"]), p["exact"]["variance"]

    def log_density(t: Tensor, x: Tensor) -> Tensor:
        spread = variance * torch.exp(-2 * t) - torch.expm1(-2 * t) / 2
        squares = (x - mean * torch.exp(-t)).square().sum(1, keepdim=True)
        return -squares / (2 * spread) - torch.log(2 * math.pi * spread)

    def exact_score(t: Tensor, x: Tensor) -> Tensor:
        spread = variance * torch.exp(-2 * t) - torch.expm1(-2 * t) / 2
        return -(x - mean * torch.exp(-t)) / spread

    t, x_t = inputs["t"], inputs["x_t"]
    denoising, gap = fokker_planck_loss(potential, inputs["x0"], x_t, t, places, weight=1.0)
    exact = residual(log_density, places[:, :1], places[:, 1:]).square().mean()
    start, blocks = inputs["x_T"], [inputs[f"sde_noise_{i + 1}"] for i in range(int(inputs["n_noise_blocks"]))]
    coarse = [blocks[0][i % len(blocks[0])] for i in range(p["nfe"] - 10)]
    sampling = dict(end=p["T_sampling"], calls=p["nfe"])
    for name, got, atol, rtol in (
        ("residual_loss", gap[None], 1e-6, 1e-3),
        ("residual_loss_exact_density", exact[None], 1e-6, 1e-3),
        ("denoising_loss", denoising[None], 1e-6, 1e-3),
        ("kernel_score", kernel_score(inputs["x0"], x_t, t), 1e-4, 1e-4),
        ("score", potential.score(t, x_t), 1e-4, 1e-4),
        ("ode_samples", sample_reverse(exact_score, start, **sampling), 1e-3, 0.0),
        ("sde_samples", sample_reverse(exact_score, start, noise=[*coarse, *blocks[1]], **sampling), 1e-3, 0.0),
    ):
        assert_like(got.detach(), expected[name], atol=atol, rtol=rtol, what=name)
