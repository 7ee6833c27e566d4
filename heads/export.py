"""One-step heads as ONNX or `torch.export` files."""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn

from diffrep.backbones import draw_noise
from diffrep.backbones.export import export_module
from diffrep.heads.dense import DenseHead


class ExportedHead(nn.Module):
    """A one-step head as a function of pixels alone: (B, 3, H, W), RGB in [0, 1] -> (B, 3, H, W), about [-1, 1].

    What the values mean is the family's, as in `OneStep.decode`: depth or disparity in three equal channels up to
    scale and shift, or the components of normals.
    """

    def __init__(self, head: DenseHead, size: tuple[int, int], seed: int = 0) -> None:
        super().__init__()
        model = head.model
        self.model, self.network, self.vae = model, model.network, model.vae
        shape = (model.channels, size[0] // model.stride, size[1] // model.stride)
        self.noise = draw_noise(shape, seed) if model.family.first_latent == "noise" else None

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        latents = self.model.encode(pixels)
        return (self.model.decode(self.model.predict(latents, self.noise)).clone(),)


def export_head(
    head: DenseHead, path: str | os.PathLike[str], *, size: int | None = None, batch_size: int = 1
) -> float:
    """Write a one-step head as a file that runs without diffrep, for square images of one size.

    Args:
        path: ``.onnx``, or ``.pt2`` for `torch.export.load`; its input is called ``pixels``, its output ``map``.
        size: pixels of a side; the head's working size where None.

    Returns:
        The largest difference between what the file computes and the head, relative to the largest value.

    Raises:
        BackboneError: the ending is another one, or torch cannot export the networks.
        ValueError: the size is no multiple of the VAE's stride.
    """
    side = size or head.working_size
    if side % head.model.stride:
        raise ValueError(f"{head.name}: the size must be a multiple of {head.model.stride}, got {side}")
    pixels = torch.rand(batch_size, 3, side, side, generator=torch.Generator().manual_seed(0))
    return export_module(
        ExportedHead(head, (side, side)), pixels.to(head.model.device, head.model.dtype), path, outputs=["map"]
    )
