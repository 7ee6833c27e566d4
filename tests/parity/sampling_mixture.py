"""The exact network of most sampling cases: the score of a Gaussian mixture."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


class Mixture:
    """`x0 ~ sum_k w_k N(m_k, s_k^2 I)` over all entries of a sample."""

    def __init__(self, tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> None:
        self.means, self.stds = tensors["gmm_means"].to(dtype), tensors["gmm_stds"].to(dtype)
        self.log_weights = tensors["gmm_log_weights"].to(dtype)

    def score(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        """Of `x = alpha x0 + sigma eps`."""
        variances = alpha**2 * self.stds**2 + sigma**2
        distances = x[:, None] - alpha * self.means
        squares = distances.square().flatten(2).sum(-1)
        logits = self.log_weights - x[0].numel() / 2 * variances.log() - squares / (2 * variances)
        shares = logits.softmax(1) / variances
        return -(shares.view(*shares.shape, *[1] * (x.ndim - 1)) * distances).sum(1)

    def noise(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        return -sigma * self.score(x, alpha, sigma)

    def data(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        return (x + sigma**2 * self.score(x, alpha, sigma)) / alpha

    def velocity(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        """alpha eps - sigma x0, of variance preserving paths."""
        return alpha * self.noise(x, alpha, sigma) - sigma * self.data(x, alpha, sigma)

    def of_table(self, alphas_cumprod: Tensor, kind: str = "noise") -> Callable[[Tensor, float], Tensor]:
        """A network that is called with indices of a table."""
        evaluate = getattr(self, kind)

        def network(x: Tensor, t: float) -> Tensor:
            abar = float(alphas_cumprod[round(t)])
            return evaluate(x, abar**0.5, (1 - abar) ** 0.5)

        return network


def assert_like(got: Tensor, expected: Tensor, *, atol: float, rtol: float = 0.0, what: str) -> None:
    assert got.shape == expected.shape, f"{what}: shape {tuple(got.shape)} instead of {tuple(expected.shape)}"
    torch.testing.assert_close(got.double(), expected.double(), atol=atol, rtol=rtol, msg=lambda m: f"{what}: {m}")
