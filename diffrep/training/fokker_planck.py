"""How far a score network is from a Fokker-Planck equation, as a training term (Deveney et al. 2023).

The network is a potential u(t, x) = log p_t(x) whose gradient is the score. Its residual bounds how far samples of the
ODE and of the SDE are apart; a smaller one is said to improve ODE samples and may worsen those of the SDE.

No weight was met that does. W2 of ODE to SDE samples, 1,024 of each, on the mixture of `PotentialTraining`, for two
seeds: without 2.0 and 1.0; 1e-4 2.3 and 0.9; 1e-3 2.6 and 0.5; 3e-3 2.7 and 2.6; from 1e-2 on both leave the data (7
and more), as a potential that only rises in time has no residual. After 8,000 steps: without 0.9 and 0.8; 1e-3 2.1 and
1.1. The residual itself falls as it should, from 4 to 3 at 1e-3. No gain for images is known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from diffrep.devices import initial_weights
from diffrep.settings import NOT_NEGATIVE, POSITIVE, SEED, check


class Potential(nn.Module):
    """A small network from (t, x) to log-density, up to a constant.

    Args:
        layers: widths, the first 1 + the dimension of x, the last 1.
    """

    def __init__(self, layers: Sequence[int] = (3, 64, 64, 64, 1)) -> None:
        super().__init__()
        names = ["input", *(f"hidden{i}" for i in range(1, len(layers) - 2)), "output"]
        for name, wide, narrow in zip(names, layers[:-1], layers[1:], strict=True):
            self.add_module(name, nn.Linear(wide, narrow))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """(n, 1) values at (n, 1) times and (n, d) places."""
        h = torch.cat([t, x], dim=1)
        *inner, last = self.children()
        for layer in inner:
            h = nn.functional.softplus(layer(h), beta=100)
        return last(h)

    def score(self, t: Tensor, x: Tensor) -> Tensor:
        """(n, d) gradient over x."""
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            (gradient,) = torch.autograd.grad(self(t, x).sum(), x, create_graph=True)
        return gradient


def residual(potential: Callable[[Tensor, Tensor], Tensor], t: Tensor, x: Tensor) -> Tensor:
    """(n,) residual of the Fokker-Planck equation of `dx = -x dt + dW` for a log-density.

    `u_t - d - <x, grad u> - |grad u|^2 / 2 - laplace u / 2` at (n, 1) times and (n, d) places.
    """
    with torch.enable_grad():
        t, x = t.detach().requires_grad_(True), x.detach().requires_grad_(True)
        in_t, in_x = torch.autograd.grad(potential(t, x).sum(), (t, x), create_graph=True)
        laplace = torch.zeros_like(t[:, 0])
        for j in range(x.shape[1]):
            (row,) = torch.autograd.grad(in_x[:, j].sum(), x, create_graph=True)
            laplace = laplace + row[:, j]
    inner = (x * in_x).sum(1) + in_x.square().sum(1) / 2 + laplace / 2
    return in_t[:, 0] - x.shape[1] - inner


def kernel_score(x0: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """(n, d) score of x at time t given where it started: mean `x0 e^-t`, variance `(1 - e^-2t) / 2`."""
    return -(x - x0 * torch.exp(-t)) / (-torch.expm1(-2 * t) / 2)


def fokker_planck_loss(
    potential: Potential, x0: Tensor, x: Tensor, t: Tensor, places: Tensor, *, weight: float = 0.1
) -> tuple[Tensor, Tensor]:
    """Denoising score matching, and the mean squared residual at places (n, 1 + d) of (t, x) times its weight."""
    denoising = (potential.score(t, x) - kernel_score(x0, x, t)).square().mean()
    return denoising, weight * residual(potential, places[:, :1], places[:, 1:]).square().mean()


def sample_reverse(
    score: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    *,
    end: float = 5.0,
    calls: int = 60,
    noise: Sequence[Tensor] | None = None,
) -> Tensor:
    """Euler steps back from time `end` to about 0: `calls - 10` of `end / calls`, then 100 of a tenth of it.

    Args:
        score: of (n, 1) times and (n, d) places.
        noise: standard normal draws for each step but the last (the SDE); None: the ODE.
    """
    coarse, fine = end / calls, end / calls / 10
    sizes = [coarse] * (calls - 10) + [fine] * 100
    t = end
    for i, h in enumerate(sizes):
        slope = score(torch.full_like(x[:, :1], t), x).detach()
        x = x + h * (x + slope * (0.5 if noise is None else 1.0))
        if noise is not None and i + 1 < len(sizes):
            x = x + math.sqrt(h) * noise[i]
        t -= h
    return x


@dataclass(frozen=True)
class PotentialTraining:
    """How a potential of two-dimensional data is trained; the data are a mixture of normal distributions."""

    # of the Fokker-Planck residual; from 1e-2 on it wins over the data; 0: denoising score matching alone
    weight: float = 1e-3
    boundary: float = 0.1  # of the density on the border of the square, which should vanish
    steps: int = 2000  # of the optimiser
    batch: int = 256  # samples of a step, and as many places of the residual
    rate: float = 1e-3  # of Adam
    components: int = 4  # of the mixture, on a circle
    seed: int = 0

    def __post_init__(self) -> None:
        check(
            self, weight=NOT_NEGATIVE, boundary=NOT_NEGATIVE, steps="1..", batch="2..", rate=POSITIVE,
            components="1..", seed=SEED,
        )  # fmt: skip

    def data(self, count: int, generator: torch.Generator) -> Tensor:
        """(count, 2) samples: components of deviation 0.2 on a circle of radius 2."""
        angles = 2 * math.pi * torch.randint(self.components, (count,), generator=generator) / self.components
        centres = 2 * torch.stack([angles.cos(), angles.sin()], dim=1)
        return centres + 0.2 * torch.randn(count, 2, generator=generator)


END, SIDE = 10.0, 3.5  # of the time, and half the square on which the residual is taken


def train_potential(training: PotentialTraining) -> Potential:
    """Train as published: times are 10 Beta(1, 2), residuals at uniform places, Adam."""
    generator = torch.Generator().manual_seed(training.seed)
    with initial_weights(training.seed):
        potential = Potential()
    optimizer, n = torch.optim.Adam(potential.parameters(), lr=training.rate), training.batch
    for _ in range(training.steps):
        x0 = training.data(n, generator)
        t = END * (1 - torch.rand(n, 1, generator=generator).sqrt()).clamp(min=1e-3)  # Beta(1, 2) by its inverse
        x = x0 * torch.exp(-t) + (-torch.expm1(-2 * t) / 2).sqrt() * torch.randn(n, 2, generator=generator)
        places = torch.rand(n, 3, generator=generator) * torch.tensor([END, 2 * SIDE, 2 * SIDE])
        places = places - torch.tensor([0.0, SIDE, SIDE])
        border = places.clone()
        edge = torch.arange(n) % 2 + 1
        border[torch.arange(n), edge] = SIDE * border[torch.arange(n), edge].sign()
        denoising, gap = fokker_planck_loss(potential, x0, x, t, places, weight=training.weight)
        outside = potential(border[:, :1], border[:, 1:]).mul(2).clamp(max=20).exp().mean()
        optimizer.zero_grad()
        (denoising + (gap if training.weight else 0) + training.boundary * outside).backward()
        optimizer.step()
    return potential


def ablation(training: PotentialTraining, *, count: int = 256) -> list[tuple[str, float, float, float, float]]:
    """With and without the regularisation: residual, and distances W2 (Euclidean) of ODE, SDE and fresh samples.

    Returns:
        For each training its name, the root mean square residual, W2 of ODE and SDE samples to each other, and of each
        to data.
    """
    rows = []
    for weight in dict.fromkeys((0.0, training.weight)):
        potential = train_potential(replace(training, weight=weight))
        generator = torch.Generator().manual_seed(training.seed + 1)
        places = torch.rand(1024, 3, generator=generator) * torch.tensor([END, 2 * SIDE, 2 * SIDE])
        rough = residual(potential, places[:, :1], places[:, 1:] - SIDE).detach().square().mean().sqrt()
        start = math.sqrt(0.5) * torch.randn(count, 2, generator=generator)
        noise = [torch.randn(count, 2, generator=generator) for _ in range(149)]
        flow, sde = sample_reverse(potential.score, start), sample_reverse(potential.score, start, noise=noise)
        data = training.data(count, generator)
        pairs = ((flow, sde), (flow, data), (sde, data))
        rows.append((f"weight {weight:g}", float(rough), *(wasserstein(one, other) for one, other in pairs)))
    return rows  # type: ignore[return-value]


def wasserstein(one: Tensor, other: Tensor) -> float:
    """W2 between two sets of as many points (n, d): that of their best assignment."""
    from scipy.optimize import linear_sum_assignment

    costs = torch.cdist(one.double(), other.double()).square().numpy()
    return float(costs[linear_sum_assignment(costs)].mean() ** 0.5)
