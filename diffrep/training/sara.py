"""SaRA: fine-tune only the smallest weights of a network (arXiv 2409.06633, sjtuplayer/SaRA ea21192).

AdamW on the entries below a threshold, which are chosen again once; a nuclear-norm term holds the change's rank low.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class SaRA(torch.optim.Optimizer):
    """AdamW on the entries of every parameter whose magnitude is below a threshold.

    Args:
        parameters: of the network, or groups of them.
        threshold: of magnitudes.
        lr: 1e-3 exp(-350 threshold) where left out.
        reselect: the entries are chosen again at the call after so many steps, which updates nothing; None: never.
        lambda_rank: weight of the nuclear norm of one matrix (both sides above 64), in turn.
        official: as released: at each choice the entries in the network lose their sign for a pass, and the nuclear
            norm, whose gradient goes astray there, does nothing.

    Raises:
        ValueError: a threshold or lr that is not above 0, or one that no entry is below.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor] | Iterable[dict[str, Any]],
        threshold: float,
        *,
        lr: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        reselect: int | None = 2500,
        lambda_rank: float = 5e-4,
        official: bool = False,
    ) -> None:
        lr = 1e-3 * math.exp(-350 * threshold) if lr is None else lr
        if not threshold > 0 or not lr > 0:
            raise ValueError(f"SaRA needs a threshold and a learning rate above 0, got {threshold} and {lr}")
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.threshold, self.reselect, self.lambda_rank, self.official = threshold, reselect, lambda_rank, official
        self.calls = 0
        self.matrices = [p for g in self.param_groups for p in g["params"] if p.ndim == 2 and min(p.shape) > 64]
        self._select()
        if not any(len(state["values"]) for state in self.state.values()):
            raise ValueError(f"no weight is below the threshold {threshold:g}: nothing would be trained")

    @torch.no_grad()
    def _select(self) -> None:
        self.age = 0
        for group in self.param_groups:
            for p in group["params"]:
                mask = p.abs() < self.threshold
                values = p[mask].clone()
                if self.official:
                    p[mask] = values.abs()
                zeros = torch.zeros_like(values)
                self.state[p] = {
                    "mask": mask,
                    "values": values,
                    "mean": zeros,
                    "square": zeros.clone(),
                    "start": values.clone(),
                }
                if self.official:
                    self.state[p]["sign"] = values.sign()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; see `torch.optim.Optimizer.step`."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.calls += 1
        if self.reselect is not None and self.calls == self.reselect + 1:
            self._select()
            return loss
        self.age += 1
        if self.lambda_rank and self.matrices and not self.official:
            self._add_rank_gradient(self.matrices[self.calls % len(self.matrices)])
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """As of `torch.optim.Optimizer`, with the numbers of calls and of steps since the last choice."""
        for state in self.state.values():
            state["calls"], state["age"] = torch.tensor(float(self.calls)), torch.tensor(float(self.age))
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on as another SaRA of the same parameters would."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            state["mask"] = state["mask"].bool()  # torch has given it the parameter's dtype
            self.calls, self.age = int(state["calls"]), int(state["age"])

    def _update(self, p: Tensor, group: dict[str, Any]) -> None:
        assert p.grad is not None
        state, betas = self.state[p], group["betas"]
        first, second = float(betas[0]), float(betas[1])
        gradient = p.grad[state["mask"]]
        if (sign := state.pop("sign", None)) is not None:  # of the pass that saw magnitudes
            gradient = gradient * sign
        values = state["values"].mul_(1 - group["lr"] * group["weight_decay"])
        state["mean"].lerp_(gradient, 1 - first)
        state["square"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
        root = state["square"].sqrt() / math.sqrt(1 - second**self.age) + group["eps"]
        values.addcdiv_(state["mean"], root, value=-group["lr"] / (1 - first**self.age))
        p[state["mask"]] = values

    def _add_rank_gradient(self, p: Tensor) -> None:
        """The nuclear norm of the change of a matrix: its gradient is U V^T."""
        if p.grad is None:
            return
        state = self.state[p]
        change = torch.zeros_like(p)
        change[state["mask"]] = state["values"] - state["start"]
        if bool(change.any()):
            u, s, vt = torch.linalg.svd(change, full_matrices=False)
            rank = s > 1e-6 * s[0]
            p.grad.add_(u[:, rank] @ vt[rank], alpha=self.lambda_rank)
