"""One-step heads as ONNX or `torch.export` files, for programs without diffrep."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from diffrep.backbones.export import export_module
from diffrep.heads.head import Head, HeadError
from diffrep.heads.restoration.restorer import RestoreConfig
from diffrep.heads.segmentation import finish

OUTPUTS = {"segmentation": "mask", "restore": "restored"}  # task -> the output's name; "map" of the others


class ExportedHead(nn.Module):
    """A head in one pass as a function of pixels alone, (B, 3, H, W), RGB in [0, 1].

    Depth, disparity, normals: (B, 3, H, W), about [-1, 1], which mean what they do in `OneStep.decode`: depth or
    disparity in three equal channels up to scale and shift, or the components of normals. Segmentation: the mask,
    (B, 1, H, W) in [0, 1]. Restoration: the image, (B, 3, H, W) in [0, 1], of one that has been enlarged to the size
    of the result; its colours are not yet corrected.

    Args:
        size: (H, W) of the pixels.

    Raises:
        HeadError: the head is no function of pixels of one size.
    """

    def __init__(self, head: Head[Any, Any], size: tuple[int, int]) -> None:
        super().__init__()
        self.task, self.model = head.task, head.model
        multiple = max(int(getattr(self.model, "multiple", 0)), self.model.stride)
        if any(side % multiple for side in size):
            raise HeadError(f"{head.name}: the size must be a multiple of {multiple}, got {size[0]} x {size[1]}")
        if self.task == "restore" and (self.model.modulations or self.model.process is not None):
            raise HeadError(f"{head.name}: a {self.model.family.name} is not exported: more than pixels go into it")
        latent = (size[0] // self.model.stride, size[1] // self.model.stride)
        self.noise: Tensor | None = None
        if self.task == "segmentation":
            self.noise = self.model.draw(size, 0)
        elif self.task != "restore" and self.model.family.first_latent == "noise":
            self.noise = self.model.draw(latent, 0, 0)

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        model = self.model
        if self.task == "segmentation":
            return (finish(model(pixels, self.noise)[0], stretch=model.decoder is None).clone(),)
        latents = model.encode(pixels)
        if self.task != "restore":
            maps = model.draw_maps(model.predict(latents, self.noise), pixels)
            return (maps.expand(-1, 3, -1, -1).clone(),)
        clean = model.clean(latents, RestoreConfig())
        if model.decoder is None:
            return ((model.decode(clean).float() / 2 + 0.5).clamp(0, 1),)
        return ((pixels + model.decoder(clean, pixels)).clamp(0, 1),)


def export_head(
    head: Head[Any, Any],
    path: str | os.PathLike[str],
    *,
    size: int | None = None,
    batch_size: int = 1,
    progress: bool = False,
) -> float:
    """Write a one-step head as a file that runs without diffrep, for square images of one size.

    Args:
        path: ``.onnx``, or ``.pt2`` for `torch.export.load`; its input is called ``pixels``, its output ``map``,
            ``mask`` or ``restored``, see `ExportedHead`.
        size: pixels of a side; the head's working size where None.
        progress: say on stderr what is being done.

    Returns:
        The largest difference between what the file computes and the head, relative to the largest value.

    Raises:
        BackboneError: the ending is another one, or torch cannot export the networks.
        HeadError: the size is no multiple of the head's, or the head takes more than pixels.
    """
    side = size or head.working_size
    pixels = torch.rand(batch_size, 3, side, side, generator=torch.Generator().manual_seed(0))
    pixels = pixels.to(head.device, head.dtype)
    outputs = [OUTPUTS.get(head.task, "map")]
    return export_module(ExportedHead(head, (side, side)), pixels, path, outputs=outputs, progress=progress)
