"""Measurement operators exactly as published codes have them, for their numbers alone.

What their authors call an adjoint is not always one: the blur of FlowChef and DPS goes back through the identity,
and RED-diff's "Deblurring" multiplies its coefficients by one another's singular values, which blurs nothing.
`diffrep.guidance.operators` has what is meant.

Sources: NVlabs/RED-diff 66482f2, FlowChef/FlowChef 9b705fc, LituRout/PSLD d734647 (the operators of DPS).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffrep.guidance.operators import Operator, averaging, bicubic, box

Shape = tuple[int, int, int]


def red_bicubic(shape: Shape, factor: int) -> Operator:
    """RED-diff's `bicubicR`: for odd factors half a pixel off centre."""
    return bicubic(shape, factor, cut=0.03, shift=-0.5 if factor % 2 else 0.0)


def red_deblurring(shape: Shape, kernel: Tensor) -> Operator:
    """RED-diff's `deblur_*` of square images and a 1-D kernel, whose last tap it does not reach."""
    channels, size, half = shape[0], shape[1], len(kernel) // 2
    matrix = torch.zeros(size, size)
    for i in range(size):
        for j in range(max(i - half, 0), min(i + half, size)):
            matrix[i, j] = kernel[j - i + half]
    u, s, vt = torch.linalg.svd(matrix)
    s = torch.where(s < 0.03, 0.0, s)
    singular, order = torch.outer(s, s).flatten().sort(descending=True)
    values = singular.repeat(channels)  # in another order than the coefficients below

    def product(left: Tensor, right: Tensor, factors: Tensor) -> Operator | object:
        def apply(x: Tensor) -> Tensor:
            coefficients = (right.T @ x @ right).flatten(2)[:, :, order].movedim(1, 2).flatten(1)
            scaled = (coefficients * factors).unflatten(1, (size * size, channels)).movedim(2, 1)
            back = torch.zeros_like(scaled)
            back[:, :, order] = scaled
            return left @ back.unflatten(2, (size, size)) @ left.T

        return apply

    inverse = torch.where(values > 0, 1 / values.clamp(min=1e-30), 0.0)
    v = vt.T
    return Operator("deblurring", shape, product(u, v, values), product(v, u, values), product(v, u, inverse))  # type: ignore[arg-type]


def red_deblurring_kernel(name: str) -> Tensor:
    """The kernel of `deblur_uni` or `deblur_gauss`."""
    if name == "uni":
        return torch.full((9,), 1 / 9)
    kernel = (-(torch.arange(-2, 3).float() ** 2) / (2 * 25**2)).exp()
    return kernel / kernel.sum()


def nearest_super_resolution(operator: Operator, factor: int) -> Operator:
    """A reduction that goes back by nearest upsampling, which is no adjoint (FlowChef, DPS)."""
    return dataclasses.replace(operator, transpose=lambda y: F.interpolate(y, scale_factor=factor))


def flowchef_super_resolution(shape: Shape, factor: int) -> Operator:
    """FlowChef's means of blocks."""
    return nearest_super_resolution(averaging(shape, factor), factor)


def dps_super_resolution(shape: Shape, factor: int) -> Operator:
    """DPS's antialiased bicubic reduction."""
    return nearest_super_resolution(bicubic(shape, factor, cut=0.0), factor)


def _convolution(name: str, shape: Shape, kernel: Tensor, mode: str) -> Operator:
    half = len(kernel) // 2

    def blurred(x: Tensor) -> Tensor:
        padded = F.pad(x, [half] * 4, mode=mode)
        return F.conv2d(padded, kernel.to(x).expand(x.shape[1], 1, -1, -1), groups=x.shape[1])

    return Operator(name, shape, blurred, lambda y: y)


def flowchef_operator(name: str, shape: Shape, run: Mapping[str, Any]) -> Operator:
    """FlowChef's measurement of a name, whose gradient is the true one."""
    if name == "box":
        return box(shape, run["box_size"])
    if name in ("sr", "super"):
        return averaging(shape, run["scale_factor"])
    assert name in ("gauss", "deblur"), f"FlowChef has no operator {name}"
    return dataclasses.replace(flowchef_blur(shape, run["kernel_size"], run["sigma"]), transpose=None)


def flowchef_blur(shape: Shape, kernel_size: int, sigma: float) -> Operator:
    """FlowChef's Gaussian, half a pixel off centre for odd sizes; even ones make the image a pixel larger."""
    places = torch.arange(kernel_size) - (kernel_size / 2 if kernel_size % 2 else (kernel_size - 1) / 2)
    line = (-(places**2) / (2 * sigma**2)).exp()
    kernel = torch.outer(line, line)
    return _convolution("FlowChef's blur", shape, kernel / kernel.sum(), "constant")


def dps_blur(shape: Shape, kernel_size: int, sigma: float) -> Operator:
    """DPS's Gaussian, mirrored inside its own window."""
    return _convolution("DPS's blur", shape, dps_kernel(kernel_size, sigma), "reflect")


def dps_kernel(kernel_size: int, sigma: float) -> Tensor:
    """The window of `dps_blur`."""
    from scipy.ndimage import gaussian_filter

    delta = torch.zeros(kernel_size, kernel_size)
    delta[kernel_size // 2, kernel_size // 2] = 1
    return torch.from_numpy(gaussian_filter(delta.numpy(), sigma=sigma))


# -- not linear -----------------------------------------------------------------------------------------------


def overexposed(shape: tuple[int, int, int]) -> Operator:
    """Twice the brightness, cut off: high dynamic range."""
    return Operator("HDR", shape, lambda x: (2 * x).clamp(-1, 1), None, lambda y: y / 2, linear=False)


def quantised(shape: tuple[int, int, int], bits: int) -> Operator:
    """Colours of so many bits."""
    levels = 2**bits - 1

    def rounded(x: Tensor) -> Tensor:
        return ((x + 1) / 2 * levels + 0.5).floor() / levels * 2 - 1

    return Operator(f"{bits} bits", shape, rounded, None, lambda y: y, linear=False)


def phaseless(shape: tuple[int, int, int], padding: int = 64) -> Operator:
    """Magnitudes of the centred orthonormal Fourier transform of the image inside `padding` zeros on every side."""

    def centred(transform: Callable[..., Tensor], x: Tensor) -> Tensor:
        inner = torch.fft.ifftshift(x, dim=(-2, -1))
        return torch.fft.fftshift(transform(inner, norm="ortho"), dim=(-2, -1)).abs()

    def cropped(y: Tensor) -> Tensor:
        image = centred(torch.fft.ifft2, y)
        return image[..., padding : padding + shape[1], padding : padding + shape[2]]

    return Operator(
        "phase retrieval",
        shape,
        lambda x: centred(torch.fft.fft2, F.pad(x, [padding] * 4)),
        None,
        cropped,
        linear=False,
    )
