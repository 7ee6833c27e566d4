"""Guidance with options that no published case exercises, against plain computations in the papers' symbols."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from diffrep.guidance import operators
from diffrep.guidance.composition import superpose
from diffrep.guidance.core import guided
from diffrep.guidance.ensembles import afdps, karras_grid, reconstruct_volume
from diffrep.guidance.operators import Operator
from diffrep.guidance.posterior import measured_start, pigdm, red_diff, spaced_grid, stsl
from diffrep.sampling.score_sde import ScoreSDE

from .test_guidance import LINEAR, SHAPE, TABLE, Mixture, random


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("and", {"lift": 3.0}),
        ("and_ode", {"lift": 3.0}),
        ("or", {"temperature": 0.01, "bias": 20.0}),
        ("or", {"temperature": 0.01, "bias": -5.0, "official": True}),
        ("avg", {}),
    ],
)
def test_superposition_is_what_the_paper_writes(method: str, options: dict[str, float]) -> None:
    """One step after another, each sample on its own, in the paper's symbols."""
    a, b, u = (lambda x, t, s=s: torch.tanh(s * x + t / 9) for s in (0.7, -0.4, 0.2))
    w = 2.5
    sigmas, start = [4.0, 2.0, 0.7, 0.0], 4 * random(2, 1, 3, 3)
    draws = [random(2, 1, 3, 3, seed=i) for i in range(3)]
    draws = [d.sign() for d in draws] if method == "and_ode" else draws
    x, (kappas, densities) = superpose(
        a, b, u, start, sigmas, [3.0, 2.0, 1.0], draws, method=method, guidance=w, **options
    )
    lift, official = options.get("lift", 0.0), options.get("official", False)
    for row in range(2):
        z, la, lb = start[row], 1.0, 1.0
        for i, t in enumerate((3.0, 2.0, 1.0)):
            s, d, n = sigmas[i], sigmas[i + 1] - sigmas[i], draws[i][row]
            c = (s * s + 1) ** 0.5
            va, vb, vu = (f(z / c, t) for f in (a, b, u))
            if method == "and_ode":
                with torch.enable_grad():
                    divs = []
                    for f in (a, b):
                        leaf = z.clone().requires_grad_()
                        pulled = torch.autograd.grad((f(leaf / c, t) * n).sum(), leaf)[0]
                        divs.append(-float((pulled * n).sum()))
                top = s * (divs[0] - divs[1]) + ((va - vb) * (va + vb)).sum() + lift * s / (d * 3)
                k = (top - ((va - vb) * (vu + w * (vb - vu))).sum()) / (w * (va - vb).square().sum())
                vf = vu + w * ((vb - vu) + k * (va - vb))
                la = la + d * (divs[0] + float((va * (va - vf)).sum()) / s)
                lb = lb + d * (divs[1] + float((vb * (vb - vf)).sum()) / s)
                z = z + d * vf
            else:
                noise = (2 * abs(d) * s) ** 0.5 * n
                dx0 = 2 * d * (vu + w * (vb - vu)) + noise
                k = 0.5
                if method == "and":
                    top = abs(d) * ((vb - va) * (vb + va)).sum() - (dx0 * (va - vb)).sum() + s * lift / 3
                    k = top / (2 * d * w * (va - vb).square().sum())
                if method == "or":
                    both = torch.tensor([options["temperature"] * (la + options["bias"]), options["temperature"] * lb])
                    k = float(both.softmax(0)[0])
                dx = 2 * d * (vu + w * ((vb - vu) + k * (va - vb))) + noise
                for which, v in (("a", va), ("b", vb)):
                    gain = -abs(d) / s * v.square().sum() - (dx * v).sum() / s
                    if official:  # the released sign
                        gain = -(v * (dx + d * v)).sum() / s
                    la, lb = (la + float(gain), lb) if which == "a" else (la, lb + float(gain))
                z = z + dx
            assert float(kappas[i + 1][row]) == pytest.approx(float(k), rel=1e-4, abs=1e-6)
            assert [float(v) for v in densities[i + 1][:, row]] == pytest.approx([la, lb], rel=1e-4)
        assert torch.allclose(x[row], z, atol=1e-5)


def _plain_ddim(x: Tensor, data: Tensor, now: tuple[float, float], then: tuple[float, float]) -> Tensor:
    return then[0] * data + then[1] * (x - now[0] * data) / now[1]


@pytest.mark.parametrize("contrast", [0.0, 50.0])
def test_pigdm_step_by_hand(contrast: float) -> None:
    """Of an operator that is not linear, with and without its contrast term, without noise, each sample on its own."""
    prior, grid = Mixture(), spaced_grid(TABLE, 4)
    bright = Operator("HDR", SHAPE, lambda x: (2 * x).clamp(-1, 1), None, lambda y: y / 2, linear=False)
    y, start = bright(prior.means[:2]), random(2, *SHAPE).float()
    result = guided(prior, start, grid, pigdm(bright, y, eta=0.0, weight=0.7, contrast=contrast), gradient=True)
    x = start
    for i, t in enumerate(grid.labels.tolist()):
        (a, b), (p, q) = ((float(grid.alpha[j]), float(grid.sigma[j])) for j in (i, i + 1))
        leaf = x.clone().requires_grad_()
        data = (leaf - b * prior(leaf, t)) / a
        missed = (y / 2 - bright(data) / 2).detach()
        objective = (missed * data).sum() + contrast * sum(one.std() for one in data)
        x = _plain_ddim(x, data.detach(), (a, b), (p, q)) + 0.7 * a * p * torch.autograd.grad(objective, leaf)[0]
    assert torch.allclose(result, x, atol=1e-4)


@pytest.mark.parametrize(
    ("weighting", "of"), [("log", math.log1p), ("trunc", lambda r: min(r, 1)), ("const", lambda r: 1.0)]
)
def test_red_diff_by_hand(weighting: str, of: object) -> None:
    prior, grid, operator = Mixture(), spaced_grid(TABLE, 5), LINEAR["averaging"]
    y = operator(prior.means[:1])
    draws = [random(1, *SHAPE, seed=i).float() for i in range(2 * grid.steps)]
    guide = red_diff(
        operator, y, lambda i: (draws[2 * i], draws[2 * i + 1]), lr=0.2, prior=0.5, weighting=weighting,
        data_weight=2.0, spread=0.1,
    )  # fmt: skip
    states = [measured_start(operator, y, grid, draws[1], 0.1 * draws[0])]
    guided(prior, states[0], grid, guide, after_step=lambda i, x: states.append(x))
    before, after = (states[-2] - float(grid.sigma[-2]) * draws[-1]) / float(grid.alpha[-2]), states[-1]
    mu = operator.pinv(y)
    first = second = torch.zeros_like(mu)
    for i, t in enumerate(grid.labels.tolist()):
        a, b = float(grid.alpha[i]), float(grid.sigma[i])
        clean = mu + 0.1 * draws[2 * i]
        seen = prior(a * clean + b * draws[2 * i + 1], t)
        slope = 0.5 * of(b / a) * (seen - draws[2 * i + 1]) / mu.numel()  # type: ignore[operator]
        slope = slope + 2.0 * operator.adjoint(operator(clean) - y) / y.numel()
        first, second = 0.9 * first + 0.1 * slope, 0.99 * second + 0.01 * slope**2
        mu = mu - 0.2 * (first / (1 - 0.9 ** (i + 1))) / ((second / (1 - 0.99 ** (i + 1))).sqrt() + 1e-8)
    assert torch.allclose(before, clean, atol=1e-3)
    assert torch.allclose(after, mu, atol=1e-3)


def test_stsl_step_by_hand() -> None:
    """The move, then DDPM's posterior mean of the moved state and the x0 from before."""
    prior, grid, operator = Mixture(), spaced_grid(TABLE, 6), LINEAR["averaging"]
    y, start, probe = operator(prior.means[:1]), random(1, *SHAPE).float(), random(1, *SHAPE, seed=9).float()
    states: list[Tensor] = []
    guided(
        prior, start, grid, stsl(prior, operator, y, lambda i: probe, weight=0.3, curvature=2.0), gradient=True,
        noise=lambda i: torch.zeros_like(start), after_step=lambda i, x: states.append(x),
    )  # fmt: skip
    (a, b), p, t = (float(grid.alpha[0]), float(grid.sigma[0])), float(grid.alpha[1]), float(grid.labels[0])
    leaf = start.clone().requires_grad_()
    data = (leaf - b * prior(leaf, t)) / a
    score, near = -prior(leaf, t) / b, -prior(leaf + probe, t) / b
    loss = -0.3 * (y - operator(data)).norm() - 2.0 / probe.numel() * ((probe * near).sum() - (probe * score).sum())
    moved = start + torch.autograd.grad(loss, leaf)[0]
    total, before = a * a, p * p
    alpha = total / before
    beta = 1 - alpha
    mean = before**0.5 * beta / (1 - total) * data.detach() + alpha**0.5 * (1 - before) / (1 - total) * moved
    assert torch.allclose(states[0], mean, atol=1e-4)


def test_a_nonlinear_operator_is_its_jacobian() -> None:
    curved = Operator("curved", SHAPE, lambda x: torch.tanh(LINEAR["averaging"](x)), linear=False)
    x, d, y = random(1, *SHAPE), random(1, *SHAPE, seed=1), random(1, 3, 4, 4, seed=2)
    measured, pull, push = curved.at(x)
    pushed = push(d)
    assert torch.equal(measured, curved(x))
    assert torch.allclose(pushed, (curved(x + 1e-5 * d) - curved(x - 1e-5 * d)) / 2e-5, atol=1e-6)
    assert float((pushed * y).sum()) == pytest.approx(float((d * pull(y)).sum()), rel=1e-6)


@pytest.mark.parametrize("chunk", [1, 12])
def test_volumes_by_hand(chunk: int) -> None:
    """Two iterations of DiffusionMBIR written out."""
    sde, operator = ScoreSDE("ve", sigma_min=0.1, sigma_max=2.0, steps=2), operators.averaging((1, 4, 4), 2)
    y, start = random(3, 1, 2, 2), random(3, 1, 4, 4, seed=1)
    draws = [random(3, 1, 4, 4, seed=2 + i) for i in range(4)]

    def score(x: Tensor, t: float) -> Tensor:
        return -x / (1 + float(sde.sigma(t)) ** 2)

    ours = reconstruct_volume(
        sde, score, operator, y, start, iter(draws), rho=3.0, smoothness=0.2, snr=0.2, chunk=chunk, batch_mean=False
    )
    ahead = lambda v: torch.roll(v, -1, 0) - v  # noqa: E731
    back = lambda v: torch.roll(v, 1, 0) - v  # noqa: E731
    normal = lambda v: operator.adjoint(operator(v)) + 3.0 * back(ahead(v))  # noqa: E731
    x, z, w = start, torch.zeros_like(start), torch.zeros_like(start)
    for i, t in enumerate((1.0, 1e-10)):
        s, below = (2.0, 0.1) if i == 0 else (0.1, 0.0)
        x = x + (s**2 - below**2) * score(x, t) + (s**2 - below**2) ** 0.5 * draws[2 * i]
        g, n = score(x, t), draws[2 * i + 1]
        h = 2 * (0.2 * n.flatten(1).norm(dim=1) / g.flatten(1).norm(dim=1)).square().view(-1, 1, 1, 1)
        x = x + h * g + (2 * h).sqrt() * n
        r = operator.adjoint(y) + 3.0 * back(z - w) - normal(x)
        x = x + (r * r).sum() / (r * normal(r)).sum() * r
        z = torch.nn.functional.softshrink(ahead(x) + w, 0.2 / 3.0)
        w = w + ahead(x) - z
    x = x + operator.adjoint(y - operator(x)) / operator.adjoint(operator(torch.ones_like(x)))
    assert torch.allclose(ours, x, atol=1e-5)


@pytest.mark.parametrize("at", ["noisy", "denoised"])
def test_particles_by_hand(at: str) -> None:
    operator, grid, y = operators.averaging((1, 4, 4), 2), karras_grid(3, 0.1, 1.0), random(1, 1, 2, 2)
    start, noise = random(5, 1, 4, 4), [random(5, 1, 4, 4, seed=i) for i in range(3)]
    chosen = torch.tensor([0, 0, 3, 3, 4])
    weights = torch.zeros(5, dtype=torch.float64)
    guide = afdps(
        operator, y, weights, sigma_y=2.0, at=at, widening=1.5, resample=lambda i, shares: chosen, threshold=1.1
    )  # fmt: skip
    ours = guided(lambda x, t: x / (1 + t * t), start, grid, guide, prediction="sample", noise=noise)
    x, log = start, torch.zeros(5, dtype=torch.float64)
    for i in range(3):
        t, h = float(grid.times[i]), float(grid.times[i] - grid.times[i + 1])
        variance = 4.0 + (1.5 * t) ** 2
        clean = x / (1 + t * t)
        g = operator.adjoint(operator(x if at == "noisy" else clean) - y) / variance
        energy = 4 * 0.25 / variance  # four blocks of four quarters
        log = log + h * (t * (g.square().sum((1, 2, 3)) - energy) + 2 / t * ((x - clean) * g).sum((1, 2, 3)))
        x = x - h * 2 / t * (x - clean) - 2 * h * t * g + (2 * h * t) ** 0.5 * noise[i]
        log = log - log.max()
        if i < 2:
            x, log = x[chosen], torch.zeros_like(log)
    assert torch.allclose(ours, x, atol=1e-8)
    assert torch.allclose(weights, log, atol=1e-8)
