"""EVODiff (Li et al. 2025): a second-order data-prediction solver whose weights come from the predictions themselves.

Its dot products run over the height and width of each channel, so that a canvas cannot be stepped by strips.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from diffrep.sampling.schedules import SamplingError, TimeGrid


def _share(a: Tensor, b: Tensor, bound: float = 2.0) -> Tensor:
    """The projection of a on b, one number per sample and channel, within +-bound."""
    return ((a * b).sum((-2, -1), keepdim=True) / (b * b).sum((-2, -1), keepdim=True)).clamp(-bound, bound)


def evodiff(
    network: Callable[[Tensor, float], Tensor], x: Tensor, grid: TimeGrid, *, final: bool = True, denoise: bool = False
) -> Tensor:
    """Sample.

    Args:
        network: from (state, label) to the clean sample.
        x: (B, C, H, W) at the grid's first time.
        final: the last step is of lower order.
        denoise: end at the clean prediction for the last time, one more call.

    Returns:
        (B, C, H, W) at the grid's last time.

    Raises:
        SamplingError: fewer than two steps.
    """
    if grid.steps < 2:
        raise SamplingError("EVODiff takes at least two steps")
    k, s = grid.rho.tolist(), grid.sigma.tolist()
    labels = [*grid.labels.tolist(), float(grid.times[-1])]

    def euler(x: Tensor, m: Tensor, i: int) -> tuple[Tensor, float]:
        h = 1 / k[i + 1] - 1 / k[i]
        return s[i + 1] / s[i] * x + s[i + 1] * h * m, h

    older = network(x, labels[0])
    x, _ = euler(x, older, 0)
    newer = network(x, labels[1])
    for i in range(1, grid.steps):
        straight, h = euler(x, newer, i)
        if i + 1 == grid.steps and final:
            ratio = k[i + 1] / k[i]
            c = 1 - math.sqrt(ratio if ratio < 0.5 else ratio - 0.5) / 2
            x = (1 - math.sqrt(k[i + 1] * k[i])) * straight + s[i + 1] * h / 2 * (newer - c * older)
            break
        x, answer = _middle(network, labels[i + 1], x, straight, newer, older, k, i, s[i + 1] * h, h, grid.steps)
        older, newer = newer, answer
    return network(x, labels[-1]) if denoise else x


def _middle(
    network: Callable[[Tensor, float], Tensor],
    label: float,
    x: Tensor,
    straight: Tensor,
    m0: Tensor,
    m1: Tensor,
    k: list[float],
    i: int,
    sh: float,
    h: float,
    steps: int,
) -> tuple[Tensor, Tensor]:
    """One middle step; returns the state, and the network's answer on the way."""
    old, now, new = k[i - 1], k[i], k[i + 1]
    ratio = math.log(old / now) / math.log(now / new)
    tau = (new + k[-1]) / (k[0] + k[-1])
    w = (1 - tau**2) / 2
    base = math.sqrt((new / now) / (now / old))
    b1 = (1 - w) * base + w * _share(m0, m1)
    d1 = m0 - b1 * m1
    r = ((b1.abs() / 4).sigmoid() * ratio).clamp(ratio / 4, 1.5 * ratio)
    moved = straight + sh / (2 * r) * d1
    m = network(moved, label)
    b2 = (1 - w) * base + w * _share(m, m0)
    d2 = m - b2 * m0
    before, after = d1 / (ratio * h), ratio * d2 / h
    eta = (_share(after + before, after - before).abs() / 2).sigmoid() / 2
    slope = -(eta / ratio) * d1 + ratio * (1 - eta) * d2
    q = (_share(moved - straight - sh / (2 * r) * slope, d1) / sh).abs() - 0.5
    if steps <= 20:
        zeta = q.sigmoid()
    else:
        zeta = (-q * (_share(m0, (m0 - m1) / h) * (2 - (new / now) ** 2)).sigmoid()).sigmoid()
    return straight + sh / (2 * zeta) * slope, m
