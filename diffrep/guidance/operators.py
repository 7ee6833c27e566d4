"""What a measurement does to an image, with its true adjoint and its pseudo-inverse.

An adjoint that is not written down is taken by automatic differentiation, which is exact; a pseudo-inverse that is not
written down by conjugate gradients from zero, which end at the solution of least squares and least norm. Sizes and
numbers that do not go together are a `SamplingError` that names them. Operators as
some published codes have them, with adjoints that are none, are in the parity tests.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from diffrep.guidance.core import squares
from diffrep.sampling.core import per_sample
from diffrep.sampling.schedules import SamplingError

Linear = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Operator:
    """A measurement of images (B, C, H, W) in -1..1; calling it measures.

    Attributes:
        name: for messages and tables.
        shape: (C, H, W) of the images.
        forward: from images to measurements (B, ...).
        transpose: the adjoint where it has a short form; None: by automatic differentiation.
        inverse: the pseudo-inverse where it has one; None: by conjugate gradients.
        linear: whether adjoint and pseudo-inverse mean something; others need `inverse`, and have a Jacobian J(x).
    """

    name: str
    shape: tuple[int, int, int]
    forward: Linear
    transpose: Linear | None = None
    inverse: Linear | None = None
    linear: bool = True

    def __call__(self, x: Tensor) -> Tensor:
        return self.forward(x)

    def _linear(self, what: str) -> None:
        if not self.linear:
            raise SamplingError(f"{self.name} is not linear: it has no {what}")

    def adjoint(self, y: Tensor) -> Tensor:
        """A^T y, images: `<A x, y> = <x, A^T y>` for all x."""
        self._linear("adjoint")
        return self.transpose(y) if self.transpose is not None else self.at(y.new_zeros(len(y), *self.shape))[1](y)

    def at(self, x: Tensor) -> tuple[Tensor, Linear, Linear]:
        """Around images x: their measurement, J(x)^T of measurements and J(x) of directions; A^T and A where linear."""
        if self.linear and self.transpose is not None:
            return self.forward(x), self.transpose, self.forward
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            measured = self.forward(leaf)

        def pull(y: Tensor) -> Tensor:
            return torch.autograd.grad(measured, leaf, y, retain_graph=True, create_graph=y.requires_grad)[0]

        def push(direction: Tensor) -> Tensor:  # the derivative of J^T y in y
            blank = torch.zeros_like(measured, requires_grad=True)
            return torch.autograd.grad(pull(blank), blank, direction)[0]

        return measured.detach(), pull, self.forward if self.linear else push

    def pinv(self, y: Tensor, *, rounds: int = 100) -> Tensor:
        """The image of least norm among those whose measurement is nearest to y.

        Args:
            rounds: of conjugate gradients, for operators without a closed form.
        """
        if self.inverse is not None:
            return self.inverse(y)
        self._linear("pseudo-inverse")
        x = y.new_zeros(len(y), *self.shape)
        residual = y
        gradient = direction = self.adjoint(residual)
        size, tiny = squares(gradient), torch.finfo(y.dtype).tiny
        first = size
        for _ in range(rounds):
            if bool((size <= 1e-12 * first).all()):
                break
            measured = self.forward(direction)
            length = size / squares(measured).clamp(min=tiny)
            x = x + per_sample(length, x) * direction
            residual = residual - per_sample(length, y) * measured
            gradient = self.adjoint(residual)
            size, before = squares(gradient), size
            direction = gradient + per_sample(size / before.clamp(min=tiny), x) * direction
        return x

    def trace(self) -> float:
        """tr(A^T A), the sum of the squares of all entries of A."""
        self._linear("trace")
        count = math.prod(self.shape)
        units = (F.one_hot(rows, count).float().view(-1, *self.shape) for rows in torch.arange(count).split(512))
        return float(sum(self.forward(unit).double().square().sum() for unit in units))

    def check(self, y: Tensor) -> Tensor:
        """A measurement, if it can be one."""
        wanted = tuple(self.forward(y.new_zeros(1, *self.shape)).shape[1:])
        if tuple(y.shape[1:]) != wanted:
            raise SamplingError(
                f"{self.name} of {_sized(self.shape)} images measures (B, {_sized(wanted, ', ')}), got {tuple(y.shape)}"
            )
        if not bool(torch.isfinite(y).all()):
            raise SamplingError(
                f"the measurement for {self.name} holds {int((~torch.isfinite(y)).sum())} values that are not finite"
            )
        return y


def _sized(shape: Sequence[int], between: str = " x ") -> str:
    return between.join(map(str, shape))


def inpainting(mask: Tensor, *, channels: int = 3, name: str = "inpainting") -> Operator:
    """Pixels under a mask (H, W), (C, H, W) or (B, C, H, W), 1 where they are seen."""
    seen = mask.expand(channels, *mask.shape) if mask.ndim == 2 else mask

    def masked(x: Tensor) -> Tensor:
        return x * seen.to(x)

    shape = (int(seen.shape[-3]), int(seen.shape[-2]), int(seen.shape[-1]))
    return Operator(name, shape, masked, masked, masked)


def box(shape: tuple[int, int, int], side: int) -> Operator:
    """Everything but a centred square."""
    _, height, width = shape
    if not 1 <= side <= min(height, width):
        raise SamplingError(f"a box must have a side of 1..{min(height, width)} pixels, got {side}")
    mask, top, left = torch.ones(shape), height // 2 - side // 2, width // 2 - side // 2
    mask[:, top : top + side, left : left + side] = 0
    return inpainting(mask, name="box")


def points(shape: tuple[int, int, int], places: Tensor) -> Operator:
    """Single pixels, (B, C, N).

    Args:
        places: (N, 2) integers (x, y), each pixel once.
    """
    height, width = shape[1:]
    x, y = places.unbind(-1)
    outside = ~((x >= 0) & (x < width) & (y >= 0) & (y < height))
    if bool(outside.any()):
        first = places[outside][0].tolist()
        raise SamplingError(f"the point {first[0]:g}, {first[1]:g} lies outside of an image of {width} x {height}")
    flat = y.long() * width + x.long()
    if len(flat.unique()) < len(flat):
        raise SamplingError("two points lie on one pixel: join them first")

    def scatter(values: Tensor) -> Tensor:
        image = values.new_zeros(*values.shape[:2], height * width)
        return image.index_copy(2, flat.to(values.device), values).unflatten(2, (height, width))

    return Operator("points", shape, lambda v: v.flatten(2)[:, :, flat.to(v.device)], scatter, scatter)


def colours(shape: tuple[int, int, int], weights: Sequence[float] | None = None) -> Operator:
    """A weighted sum of the channels, (B, 1, H, W), their mean where no weights are named: colourisation."""
    weights = [1 / shape[0]] * shape[0] if weights is None else weights
    if len(weights) != shape[0] or not any(weights):
        raise SamplingError(
            f"colours of {_sized(shape)} images need {shape[0]} weights, not all 0, got {list(weights)}"
        )
    w = torch.tensor(weights, dtype=torch.float64).view(1, -1, 1, 1)
    return Operator(
        "colourisation",
        shape,
        lambda x: (x * w.to(x)).sum(1, keepdim=True),
        lambda y: y * w.to(y),
        lambda y: y * w.to(y) / w.to(y).square().sum(),
    )


def separable(name: str, shape: tuple[int, int, int], down: Tensor, across: Tensor, *, cut: float = 0.0) -> Operator:
    """`down @ x @ across^T`, with matrices (h, H) and (w, W).

    Args:
        cut: singular values of the matrices below it are 0 in the operator itself, so that its pseudo-inverse does not
            blow up noise and stays one.
    """
    parts = []
    for matrix in (down, across):
        u, s, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
        s = torch.where(s < max(cut, 1e-10), 0.0, s)
        inverse = torch.where(s > 0, 1 / s.clamp(min=1e-12), 0.0)
        parts.append(((u * s) @ vt, (vt.T * inverse) @ u.T))
    (d, d_inverse), (a, a_inverse) = parts

    def product(left: Tensor, right: Tensor) -> Linear:
        return lambda x: left.to(x) @ x @ right.to(x).T

    return Operator(name, shape, product(d, a), product(d.T, a.T), product(d_inverse, a_inverse))


def tap_matrix(size: int, centres: Tensor, reach: float, weight: Callable[[Tensor], Tensor]) -> Tensor:
    """(len(centres), size): each row weighs the pixels around its centre, normalised, borders mirrored (-1 is 0).

    Args:
        reach: pixels to each side.
        weight: of distances from the centre, in pixels.
    """
    taps = torch.arange(math.floor(-reach), math.ceil(reach) + 1)
    places = centres.floor()[:, None].long() + taps
    weights = weight(places - centres[:, None].double())
    weights = weights / weights.sum(1, keepdim=True)
    folded = places.remainder(2 * size)
    folded = torch.where(folded < size, folded, 2 * size - 1 - folded)
    return torch.zeros(len(centres), size, dtype=torch.float64).scatter_add(1, folded, weights)


def cubic(x: Tensor) -> Tensor:
    """The cubic convolution kernel with a = -0.5."""
    x = x.abs()
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return torch.where(x <= 1, near, torch.where(x < 2, far, 0.0))


def _divided(shape: tuple[int, int, int], factor: int, what: str) -> None:
    if factor < 1 or shape[1] % factor or shape[2] % factor:
        raise SamplingError(f"{what} by {factor} needs sides that it divides, got {shape[1]} x {shape[2]}")


def averaging(shape: tuple[int, int, int], factor: int) -> Operator:
    """Means of blocks: super-resolution."""
    _divided(shape, factor, "super-resolution")

    def replicate(y: Tensor) -> Tensor:
        return y.repeat_interleave(factor, -1).repeat_interleave(factor, -2)

    def mean(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, factor)

    return Operator("super-resolution", shape, mean, lambda y: replicate(y) / factor**2, replicate)


def bicubic(shape: tuple[int, int, int], factor: int, *, cut: float = 0.03, shift: float = 0.0) -> Operator:
    """Antialiased bicubic reduction.

    Args:
        cut: see `separable`.
        shift: moves every centre, pixels.
    """
    _divided(shape, factor, "bicubic reduction")

    def matrix(size: int) -> Tensor:
        centres = (torch.arange(size // factor).double() + 0.5) * factor - 0.5 + shift
        return tap_matrix(size, centres, 2 * factor + 1, lambda d: cubic(d / factor))

    return separable("bicubic", shape, matrix(shape[1]), matrix(shape[2]), cut=cut)


def gaussian(shape: tuple[int, int, int], sigma: float, *, cut: float = 1e-3) -> Operator:
    """A Gaussian blur of `sigma` pixels, borders mirrored."""
    if not 0 < sigma < math.inf:
        raise SamplingError(f"a blur needs a sigma above 0, got {sigma}")

    def matrix(size: int) -> Tensor:
        return tap_matrix(size, torch.arange(size).double(), 4 * sigma, lambda d: (-((d / sigma) ** 2) / 2).exp())

    return separable("Gaussian blur", shape, matrix(shape[1]), matrix(shape[2]), cut=cut)


def motion(shape: tuple[int, int, int], length: float, angle: float = 0.0) -> Operator:
    """The blur of a straight movement, borders repeated.

    Args:
        length: pixels.
        angle: degrees from the rows, counter-clockwise.
    """
    if not 1 <= length < math.inf:
        raise SamplingError(f"a movement must be at least 1 pixel long, got {length}")
    half = math.ceil(length / 2)
    along = torch.linspace(-(length - 1) / 2, (length - 1) / 2, 16 * half + 1).double()
    turn = math.radians(angle)
    grid = torch.arange(-half, half + 1).double()
    horizontal = (1 - (grid - along[:, None] * math.cos(turn)).abs()).clamp(min=0)
    vertical = (1 - (grid + along[:, None] * math.sin(turn)).abs()).clamp(min=0)
    kernel = vertical.T @ horizontal / len(along)

    def blurred(x: Tensor) -> Tensor:
        weights = kernel.to(x).expand(x.shape[1], 1, -1, -1)
        return F.conv2d(F.pad(x, [half] * 4, mode="replicate"), weights, groups=x.shape[1])

    return Operator("motion blur", shape, blurred)


def projections(shape: tuple[int, int, int], angles: Sequence[float], *, scale: float = 1.0) -> Operator:
    """Sums along parallel rays, (B, C, views, side): tomography of square slices.

    Args:
        angles: degrees, 0 gives the sum of each column, from the left; -90 that of each row, from the top.
        scale: factor of the sums.
    """
    if shape[1] != shape[2] or not len(angles):
        raise SamplingError(
            f"projections need square slices and at least one angle, got {_sized(shape)}, {list(angles)}"
        )
    turns = torch.tensor([math.radians(angle) for angle in angles], dtype=torch.float64)
    rows = [torch.stack([turns.cos(), turns.sin()], -1), torch.stack([-turns.sin(), turns.cos()], -1)]
    matrices = F.pad(torch.stack(rows, 1), (0, 1))  # (views, 2, 3), without a movement

    def project(x: Tensor) -> Tensor:
        views = []
        for matrix in matrices:
            grid = F.affine_grid(matrix.to(x).expand(len(x), -1, -1), list(x.shape), align_corners=False)
            views.append(F.grid_sample(x, grid, align_corners=False).sum(-2))
        return scale * torch.stack(views, dim=2)

    return Operator("projections", shape, project)
