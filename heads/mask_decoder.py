"""A small decoder that draws masks and edges, for models whose VAE cannot draw them sharply.

A VAE that has only seen photographs blurs binary pictures. This decoder takes the same latents, and looks at the image
for where exactly an outline runs.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from diffrep.files import read_document, save_weights, write_document

FILE, CONFIG = "decoder.safetensors", "decoder.json"


class MaskDecoder(nn.Module):
    """Latents and the image they belong to -> logits of a mask, at the image's size.

    Args:
        latent_channels: of the VAE.
        stride: image pixels per latent cell, a power of 2 of at least 4.
        widths: channels at the latent's resolution and at each doubling up to half of the image's.
    """

    def __init__(self, latent_channels: int, *, stride: int = 8, widths: tuple[int, ...] = (64, 32, 16)) -> None:
        super().__init__()
        if 2 ** len(widths) != stride:
            raise ValueError(f"a stride of {stride} needs {stride.bit_length() - 1} widths, got {widths}")
        self.settings = {"latent_channels": latent_channels, "stride": stride, "widths": list(widths)}
        looks = [nn.Conv2d(12, widths[-1], 3, padding=1)]  # from the half size, four pixels in each cell
        for wide, narrow in zip(widths[-2::-1], widths[:0:-1], strict=True):
            looks.append(nn.Conv2d(narrow, wide, 3, padding=1, stride=2))
        self.look = nn.ModuleList(looks)
        self.enter = nn.Conv2d(latent_channels, widths[0], 3, padding=1)
        self.refine = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for width in widths)
        self.narrow = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in itertools.pairwise(widths))
        self.leave = nn.Conv2d(widths[-1], 4, 3, padding=1)

    def forward(self, latents: Tensor, pixels: Tensor) -> Tensor:
        """Draw.

        Args:
            latents: (B, c, h, w), scaled.
            pixels: (B, 3, H, W) in [0, 1], H = stride * h.

        Returns:
            (B, 1, H, W) logits.
        """
        seen = [F.silu(self.look[0](F.pixel_unshuffle(pixels * 2 - 1, 2)))]
        for look in self.look[1:]:
            seen.append(F.silu(look(seen[-1])))
        hidden = self.enter(latents)
        for level, refine in enumerate(self.refine):
            if level:
                hidden = self.narrow[level - 1](F.interpolate(hidden, scale_factor=2.0, mode="nearest"))
            hidden = F.silu(hidden + seen[-1 - level])
            hidden = hidden + F.silu(refine(hidden))
        return F.pixel_shuffle(self.leave(hidden), 2)

    def save(self, folder: Path, dtype: torch.dtype = torch.float16) -> None:
        """Write weights and settings into a head's folder."""
        save_weights(folder / FILE, {name: value.to(dtype) for name, value in self.state_dict().items()}, format="pt")
        write_document(folder / CONFIG, self.settings)

    @classmethod
    def load(cls, folder: Path) -> MaskDecoder | None:
        """Read what `save` wrote; None where the folder has no decoder of its own.

        Raises:
            ValueError: settings and weights do not belong together.
        """
        if not (folder / FILE).is_file():
            return None
        settings = read_document(folder / CONFIG)
        try:
            decoder = cls(settings["latent_channels"], stride=settings["stride"], widths=tuple(settings["widths"]))
            decoder.load_state_dict({k: v.float() for k, v in load_file(folder / FILE).items()})
        except (KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"{folder / FILE}: does not fit {CONFIG} ({' '.join(str(error).split())[:200]})") from None
        return decoder.eval().requires_grad_(False)
