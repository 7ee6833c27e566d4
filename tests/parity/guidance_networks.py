"""The networks of the guidance cases: an exact prior, and small random U-Nets and VAEs beside the cases."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffrep.sampling.schedules import TableVP

from .cases import Fields, watched

SD = {"beta_start": 0.00085, "beta_end": 0.012}


def stable_diffusion_schedule() -> TableVP:
    """Stable Diffusion's table."""
    betas = np.linspace(SD["beta_start"] ** 0.5, SD["beta_end"] ** 0.5, 1000) ** 2
    return TableVP(np.cumprod(1 - betas))


class Prior:
    """`x0 ~ sum_k w_k N(mu_k, tau^2 I)`; evaluated in the dtype of the state or in float64."""

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str = "", *, double: bool = False) -> None:
        parts = (tensors[f"{prefix}gmm.{name}"] for name in ("means", "weights", "tau"))
        self.means, self.weights, tau = (part.double() if double else part for part in parts)
        self.tau, self.double = float(tau), double

    def data(self, x: Tensor, a: float, b: float) -> Tensor:
        """E[x0 | x] of `x = a x0 + b n`."""
        state = x.double() if self.double else x
        variance = a**2 * self.tau**2 + b**2
        distances = state[:, None] - a * self.means
        logits = self.weights.log() - distances.square().flatten(2).sum(-1) / (2 * variance)
        shares = logits.softmax(1).view(len(x), -1, *[1] * (x.ndim - 1))
        return (shares * (self.means + a * self.tau**2 / variance * distances)).sum(1).to(x)

    def noise(self, x: Tensor, a: float, b: float) -> Tensor:
        state = x.double() if self.double else x
        return ((state - a * self.data(state, a, b)) / b).to(x)


def model_folder(folder: Path, case: Mapping[str, Any], part: str) -> Path:
    """Where a case's text on its model says that a U-Net or a VAE lies."""
    texts = [case["model"], *case.get("shims", [])]
    for text in texts:
        if match := re.search(rf"[\w./-]*model/{part}", text):
            return folder / match[0]
    raise AssertionError(f"{folder}: its model names no {part}")


def load_unet(folder: Path, case: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    """(x, t, embedding) -> output."""
    from diffusers import UNet2DConditionModel

    loaded: Any = UNet2DConditionModel.from_pretrained(model_folder(folder, case, "unet"))
    unet = loaded.eval().requires_grad_(False).to(dtype)

    def network(x: Tensor, t: float, context: Tensor) -> Tensor:
        return unet(x, t, encoder_hidden_states=context.to(x).expand(len(x), -1, -1)).sample

    return network


def load_vae(folder: Path, case: Mapping[str, Any]) -> Any:
    from diffusers import AutoencoderKL

    loaded: Any = AutoencoderKL.from_pretrained(model_folder(folder, case, "vae"))
    return loaded.eval().requires_grad_(False)


def under_guidance(unet: Any, condition: Tensor, null: Tensor, scale: float) -> Callable[[Tensor, float], Tensor]:
    """Classifier-free guidance; one pass where the scale is 1."""

    def network(x: Tensor, t: float) -> Tensor:
        towards = unet(x, t, condition)
        if scale == 1:
            return towards
        away = unet(x, t, null)
        return away + scale * (towards - away)

    return network


def run_tensors(tensors: Mapping[str, Tensor], number: int) -> Mapping[str, Tensor]:
    """The tensors of one run of a case, `watched` as they were."""
    start = f"{number}."
    found = {name.removeprefix(start): tensors[name] for name in tensors if name.startswith(start)}
    return watched(found) if isinstance(tensors, Fields) else found
