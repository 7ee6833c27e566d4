"""Checkers of system `restoration-and-few-step`: degradations."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

from torch import Tensor

from diffrep.heads.restoration.degrade import (
    DEGRADATIONS,
    Degradation,
    Draws,
    Order,
    add_gaussian,
    add_poisson,
    blur_kernel,
    degraded_pair,
    filter_images,
    jpeg,
    paired_crop,
    sharpen,
    sinc_kernel,
)

from .cases import assert_within, each, tensors_of


class Replayed(Draws):
    """The recorded draws of another program, in order."""

    def __init__(self, python: Sequence[Any], tensors: Sequence[tuple[str, Tensor]], rates: list[Tensor]) -> None:
        self.python, self.tensors, self.rates = list(python), list(tensors), rates

    def _next(self, kind: str) -> Any:
        drawn, value = self.python.pop(0)
        assert drawn == kind, f"the run drew a {drawn}, not a {kind}"
        return value

    def _tensor(self, kind: str) -> Tensor:
        drawn, value = self.tensors.pop(0)
        assert drawn == kind, f"the run drew {drawn}, not {kind}"
        return value

    def choice(self, options: Sequence[Any], weights: Sequence[float] | None = None) -> Any:
        value = self._next("choice")
        assert value in options
        assert weights is None or weights[options.index(value)] > 0, f"{value} was drawn, whose probability is 0"
        return value

    def uniform(self, low: float, high: float) -> float:
        value: float = self._next("uniform")
        assert low <= value <= high, f"{value} was drawn, which does not lie in {low}..{high}"
        return value

    def random(self) -> float:
        return float(self._next("random"))

    def integer(self, most: int) -> int:
        value = int(self._next("randint"))
        assert value <= most
        return value

    def share(self, count: int) -> Tensor:
        return self._tensor("rand")

    def quality(self, count: int, low: float, high: float) -> Tensor:
        drawn = self._tensor("uniform_")
        assert bool(((drawn >= low) & (drawn <= high)).all()), f"{drawn} was drawn, which does not lie in {low}..{high}"
        return drawn

    def normal(self, *shape: int) -> Tensor:
        drawn = self._tensor("randn")
        assert tuple(drawn.shape) == shape
        return drawn

    def poisson(self, rate: Tensor) -> Tensor:
        self.rates.append(rate)
        drawn = self._tensor("poisson")
        assert drawn.shape == rate.shape
        return drawn


KERNELS = {
    "bivariate_Gaussian": lambda run: {},
    "bivariate_generalized_Gaussian": lambda run: {"beta": run["beta"]},
    "bivariate_plateau": lambda run: {"beta": run["beta"], "plateau": True},
}


def check_degradation_parts(folder: Path, case: dict[str, Any]) -> None:
    inputs, expected = tensors_of(folder)
    atol, image, got = case["tolerance"]["atol"], inputs["image"], {}
    for run in each(case["runs"]):
        if run["function"] == "circular_lowpass_kernel":
            kernel = sinc_kernel(run["cutoff"], run["kernel_size"], pad_to=run["pad_to"])
        else:
            # an isotropic one is round whatever else is named
            spread_y, angle = (run["sig_x"], 0.0) if run["isotropic"] else (run["sig_y"], run["theta"])
            run.get("sig_y"), run.get("theta")
            shape = KERNELS[run["function"]](run)
            kernel = blur_kernel(run["kernel_size"], run["sig_x"], spread_y, angle, **shape)
        got[f"kernel.{run['kernel']}"] = kernel
    got["filtered"] = filter_images(image, inputs["kernels"])
    got["filtered_one"] = filter_images(image, inputs["kernels"][:1])
    radius, weight, threshold = re.findall(r"[\d.]*\d", case["expected"]["usm"])
    got["usm"] = sharpen(image, radius=int(radius), weight=float(weight), threshold=float(threshold))
    rates: list[Tensor] = []
    draws = [("randn", inputs[name]) for name in sorted(inputs) if name.startswith("gaussian.draw")]
    got["gaussian"] = add_gaussian(image, inputs["sigma"], inputs["gray"], Replayed([], draws, rates))
    counts = [("poisson", inputs[name]) for name in sorted(inputs) if name.startswith("poisson.count")]
    got["poisson"] = add_poisson(image, inputs["poisson_scale"], inputs["gray"], Replayed([], counts, rates))
    got |= {f"poisson.rate{number}": rate for number, rate in enumerate(rates)}
    got["jpeg"], got["jpeg_differentiable"] = (
        jpeg(image, inputs["quality"], differentiable=soft) for soft in (False, True)
    )
    assert set(got) == set(expected)
    for name, value in got.items():
        if name.startswith("jpeg"):
            ((limit, percent),) = re.findall(r"^atol (\S+) on ([\d.]+)% of the pixels", case["tolerance"]["jpeg"])
            near = ((value - expected[name]).abs() <= float(limit)).double().mean()
            assert float(near) >= float(percent) / 100, f"{name}: {float(near):.4f} of the pixels are near"
        else:
            assert_within(value, expected[name], atol=atol, what=name)


def settings_of(sf: int, d: dict[str, Any]) -> Degradation:
    """Our settings of the released configuration's names; those of kernels, which the case stores, are S3Diff's."""
    preset = DEGRADATIONS["s3diff"]

    def order(published: Order, number: str) -> Order:
        return Order(
            blur=1.0 if not number else d["second_blur_prob"], largest=published.largest, spread=published.spread,
            resize=tuple(d[f"resize_range{number}"]), directions=tuple(d[f"resize_prob{number}"]),
            noise=tuple(d[f"noise_range{number}"]), poisson=tuple(d[f"poisson_scale_range{number}"]),
            quality=tuple(d[f"jpeg_range{number}"]), gaussian=d[f"gaussian_noise_prob{number}"],
            gray=d[f"gray_noise_prob{number}"],
        )  # fmt: skip

    first, second = order(preset.first, ""), order(preset.second, "2")
    return Degradation(first=first, second=second, scale=sf, clean=d["no_degradation_prob"], rounds=False)


def check_degradation_pipeline(folder: Path, case: dict[str, Any]) -> None:
    inputs, expected = tensors_of(folder)
    parameters = case["parameters"]
    published = parameters["degradation"]
    settings, size = settings_of(parameters["sf"], published), published["gt_size"]
    assert "clamped, NOT rounded" in case["expected"]["i.lq"]
    ((percent, limit),) = re.findall(r"([\d.]+)% of pixels within (\S+)$", case["tolerance"]["note"])
    for run in each(case["runs"]):
        i = run["index"]
        names = sorted(name for name in inputs if name.startswith(f"{i}.draw"))
        assert [name.rsplit(".", 1)[1] for name in names] == run["tensor_draws"]
        tensors = [(kind, inputs[name]) for kind, name in zip(run["tensor_draws"], names, strict=True)]
        draws = Replayed(run["python_draws"], tensors, [])
        kernels = tuple(inputs[f"{i}.{name}"] for name in ("kernel1", "kernel2", "sinc_kernel"))
        low: list[Tensor] = []

        def recorded(*args: Any, low: list[Tensor] = low, **named: Any) -> Any:
            pair = paired_crop(*args, **named)
            low.append(pair[1])
            return pair

        with patch("diffrep.heads.restoration.degrade.paired_crop", recorded):
            originals, upscaled = degraded_pair(inputs[f"{i}.gt"], kernels, settings, draws, size=size)
        assert not draws.python, "draws are left over"
        assert not draws.tensors, "draws are left over"
        got = {"gt": originals * 2 - 1, "lq_upscaled": upscaled * 2 - 1, "lq": low[0]}
        for name, value in got.items():
            difference = (value - expected[f"{i}.{name}"]).abs()
            assert value.shape == expected[f"{i}.{name}"].shape
            share = float((difference <= float(limit)).double().mean())
            assert share >= float(percent) / 100, f"{i}.{name}: {share:.4f} of the pixels are near"
            assert float(difference.max()) <= case["tolerance"]["atol"], f"{i}.{name}: {float(difference.max())}"
