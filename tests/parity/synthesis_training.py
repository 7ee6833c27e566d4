"""Kind `training_loss`: one step of the authors' objective, with dropped conditions and gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from diffrep.synthesis.model import OFFICIAL_TOKENS
from diffrep.training.synthesis import Objective

from .cases import assert_within, number_in, tensors_of
from .synthesis_model import embeddings_of, model_of, tolerances_of

OURS = {official: f"embedder.tokens.{number}" for number, official in enumerate(OFFICIAL_TOKENS)}
OURS |= {"conv_in": "unet.conv_in", "conv_out": "unet.conv_out"}


def check_training_loss(folder: Path, case: dict[str, Any]) -> None:
    given, expected = tensors_of(folder)
    parameters = case["parameters"]
    model = model_of(folder, case).requires_grad_(True)
    allowed = tolerances_of(case)
    assert given["timesteps"].tolist() == parameters["timesteps_zero_based"]
    dropped = [torch.tensor(parameters[k], dtype=torch.bool) for k in ("dropped", "dropped_region") if k in parameters]
    step = Objective(model)(given["x0"], given["noise"], given["timesteps"], embeddings_of(given), dropped=dropped)
    step.loss.backward()
    assert_within(step.noisy, expected["x_t"], atol=allowed["x_t"], what="x_t")
    assert_within(step.predicted.detach(), expected["eps"], atol=allowed["eps"], what="eps")
    assert_within(step.loss.detach()[None], expected["loss"], atol=allowed["loss"], what="loss")
    # logged only: the errors in the weights of the variational bound; timestep 0 has those of 1
    errors, at = (step.predicted - step.target).square().flatten(1).mean(1), given["timesteps"].clamp(min=1)
    roots = (model.scheduler[name] ** 0.5 for name in ("beta_start", "beta_end"))
    betas = torch.linspace(*roots, len(model.alphas_cumprod), dtype=torch.float64) ** 2
    weights = betas / (2 * (1 - betas) * (1 - (1 - betas).cumprod(0).roll(1)))
    assert_within(
        (errors * weights[at]).mean().detach()[None], expected["loss_vlb"], atol=allowed["loss"], what="loss_vlb"
    )

    relative, absolute = gradient_tolerance(case["tolerance"])
    named = dict(model.named_parameters())
    gradients = [key for key in expected if key.startswith("grad_")]
    assert gradients
    for key in gradients:
        official, _, kind = key.removeprefix("grad_").rpartition("_")
        gradient = named[f"{OURS[official]}.{kind}"].grad
        torch.testing.assert_close(
            gradient, expected[key], rtol=relative, atol=absolute, msg=lambda text, key=key: f"{key}: {text}"
        )
    largest = case["facts"].get("max_abs_grad_of_cross_attention_to_q_to_k")
    if largest is not None:  # one token: the softmax is 1 whatever the query and the key are
        looked = [p.grad for n, p in named.items() if ".attn2.to_q." in n or ".attn2.to_k." in n]
        assert looked
        greatest = max(float(g.abs().max()) for g in looked if g is not None)
        assert greatest == pytest.approx(largest, rel=relative, abs=absolute)


def gradient_tolerance(texts: dict[str, str]) -> tuple[float, float]:
    """(rtol, atol) of a text such as ``rtol 1e-3 atol 1e-6``."""
    text = next(value for names, value in texts.items() if "grad" in names)
    parts = {name: number_in(text.split(name)[1]) for name in ("rtol", "atol")}
    return parts["rtol"], parts["atol"]
