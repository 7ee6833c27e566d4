"""How far a score network is from a Fokker-Planck equation, as a training term (Deveney et al. 2023).

The network is a potential u(t, x) = log p_t(x) whose gradient is the score. Its residual bounds how far samples of the
ODE and of the SDE are apart; a smaller one improves ODE samples and may worsen those of the SDE. No gain for images is
known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


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
