"""Depth from sparse known depths by guidance: the latent of a depth model follows the depths that are known.

Fewer than two different known depths, and a step that diverges, are a `SamplingError`.

Source: Marigold-DC, arXiv 2412.13389, prs-eth/Marigold-DC 77fa032.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diffrep.guidance.core import Between, Level, Network, guided
from diffrep.sampling.schedules import SamplingError, TimeGrid

Reader = Callable[[Tensor], Tensor]  # latent (1, c, h, w) -> depth (H, W) in [0, 1], differentiable


class Ruler:
    """Scale and shift between a relative and a metric map, with squares as factors so that neither changes its sign.

    Args:
        known: (H, W) metres; 0 where there is none.
        scale, shift: to begin with; the range of the known depths and their minimum where left out.
    """

    def __init__(self, known: Tensor, *, scale: float | None = None, shift: float | None = None) -> None:
        depths = known[known > 0]
        if not len(depths) or not float(depths.max()) > float(depths.min()):
            raise SamplingError(f"guided completion needs two different known depths, got {len(depths)}: fit instead")
        self.known, self.seen = known, known > 0
        self.scale = float(depths.max() - depths.min()) if scale is None else scale
        self.shift = float(depths.min()) if shift is None else shift
        self.parameters = [torch.ones((), device=known.device, requires_grad=True) for _ in range(2)]

    def metric(self, depth: Tensor) -> Tensor:
        """What values in [0, 1] measure."""
        scale, shift = self.parameters
        return scale**2 * self.scale * depth + shift**2 * self.shift

    def loss(self, depth: Tensor) -> Tensor:
        """Mean absolute plus mean squared distance from the known depths."""
        difference = (self.metric(depth) - self.known)[self.seen]
        return difference.abs().mean() + difference.square().mean()


def complete_by_diffusion(
    network: Network,
    read: Reader,
    known: Tensor,
    noise: Tensor,
    grid: TimeGrid,
    *,
    prediction: str = "v_prediction",
    lands: Sequence[Level] | None = None,
    lr: float = 0.05,
    lr_scale: float = 0.005,
) -> Tensor:
    """Marigold-DC: every step of the diffusion is preceded by one of Adam on the latent, scale and shift.

    Gradients run through the decoder and the network; its memory lasts over all steps.

    Args:
        network: of the depth latent alone, the image bound.
        read: the decoder, at the size of `known`.
        known: (H, W) metres; 0 where there is none.
        noise: (1, c, h, w) the first latent.
        grid: times of a sampler with trailing spacing; where its steps lead, `lands`, see `guided`.
        lr, lr_scale: of Adam, on the latent and on scale and shift.

    Returns:
        (H, W) metres.
    """
    ruler = Ruler(known)
    leaf = noise.detach().clone().requires_grad_()
    groups = [{"params": ruler.parameters, "lr": lr_scale}, {"params": [leaf], "lr": lr}]
    adam = torch.optim.Adam(groups)

    def guide(between: Between) -> Tensor:
        with torch.enable_grad():
            forms = between.forms()
            parameters = [between.x, *ruler.parameters]
            gradient, *others = torch.autograd.grad(ruler.loss(read(forms["data"])), parameters)
        # as long as the predicted noise, so that its weight does not depend on how many depths are known
        gradient = gradient * forms["noise"].detach().norm() / gradient.norm().clamp(min=1e-8)
        leaf.data, leaf.grad = between.x.detach().clone(), gradient
        for parameter, slope in zip(ruler.parameters, others, strict=True):
            parameter.grad = slope
        adam.step()
        return between.ahead(leaf.detach()).detach()

    latent = guided(
        network, noise, grid, guide, prediction=prediction, gradient=True, lands=lands, name="guided completion"
    )
    with torch.no_grad():
        return ruler.metric(read(latent))
