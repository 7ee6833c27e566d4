"""A small decoder for heads whose VAE, which has seen photographs alone, blurs what they draw."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffrep.devices import initial_weights
from diffrep.files import one_line, read_document, read_weights, save_weights, write_document

DECODER, DECODER_CONFIG = "decoder.safetensors", "decoder.json"
STRIP = 2**18  # pixels that are sharpened at once: those around each pixel of a large image need gigabytes


class DetailDecoder(nn.Module):
    """Latents and the image they belong to, at which it looks for where exactly an outline runs -> a map.

    Args:
        latent_channels: of the VAE.
        stride: image pixels per latent cell, a power of 2 of at least 4.
        widths: channels at the latent's resolution and at each doubling up to half of the image's.
        outputs: channels of the map.
        blocks: convolutions with a residual at each resolution; all but one of them also on the way down.
        coarse: a linear map of the latents, patch by patch, lies beneath what is drawn; `fit_coarse` makes it the best.
    """

    def __init__(
        self,
        latent_channels: int,
        *,
        stride: int = 8,
        widths: tuple[int, ...] = (64, 32, 16),
        outputs: int = 1,
        blocks: int = 1,
        coarse: bool = False,
    ) -> None:
        super().__init__()
        if 2 ** len(widths) != stride:
            raise ValueError(f"a stride of {stride} needs {stride.bit_length() - 1} widths, got {widths}")
        self.settings: dict[str, Any] = {
            "latent_channels": latent_channels, "stride": stride, "widths": list(widths), "outputs": outputs,
            "blocks": blocks, "coarse": coarse,
        }  # fmt: skip
        self.blocks = blocks
        looks = [nn.Conv2d(12, widths[-1], 3, padding=1)]  # from the half size, four pixels in each cell
        for wide, narrow in zip(widths[-2::-1], widths[:0:-1], strict=True):
            looks.append(nn.Conv2d(narrow, wide, 3, padding=1, stride=2))
        self.look = nn.ModuleList(looks)
        self.seek = nn.ModuleList(_same(width) for width in reversed(widths) for _ in range(blocks - 1))
        self.enter = nn.Conv2d(latent_channels, widths[0], 3, padding=1)
        self.refine = nn.ModuleList(_same(width) for width in widths for _ in range(blocks))
        self.narrow = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in itertools.pairwise(widths))
        self.leave = nn.Conv2d(widths[-1], 4 * outputs, 3, padding=1)
        self.coarse = nn.Conv2d(latent_channels, outputs * stride**2, 3, padding=1) if coarse else None

    def forward(self, latents: Tensor, pixels: Tensor) -> Tensor:
        """Draw.

        Args:
            latents: (B, c, h, w), scaled.
            pixels: (B, 3, H, W) in [0, 1], H = stride * h.

        Returns:
            (B, outputs, H, W): of masks the logits, of other maps their values.
        """
        seen: list[Tensor] = []
        hidden = F.pixel_unshuffle(pixels * 2 - 1, 2)
        for level, look in enumerate(self.look):
            hidden = F.silu(look(hidden))
            seen.append(_residuals(hidden, self.seek, level, self.blocks - 1))
            hidden = seen[-1]
        hidden = self.enter(latents)
        for level in range(len(self.look)):
            if level:
                hidden = self.narrow[level - 1](F.interpolate(hidden, scale_factor=2.0, mode="nearest"))
            hidden = _residuals(F.silu(hidden + seen[-1 - level]), self.refine, level, self.blocks)
        if self.training:  # under autocast, whose bfloat16 is too coarse for a map
            with torch.autocast(hidden.device.type, enabled=False):
                return self._drawn(hidden.float(), latents.float())
        return self._drawn(hidden, latents)

    def _drawn(self, hidden: Tensor, latents: Tensor) -> Tensor:
        fine = F.pixel_shuffle(self.leave(hidden), 2)
        if self.coarse is None:
            return fine
        return fine + F.pixel_shuffle(self.coarse(latents), self.settings["stride"])

    @classmethod
    def seeded(cls, seed: int, codec: Any, **settings: Any) -> DetailDecoder:
        """One for a codec's latents with initial weights of a seed."""
        with initial_weights(seed):
            return cls(codec.channels, stride=codec.stride, **settings)

    @torch.no_grad()
    def fit_coarse(self, latents: Tensor, maps: Tensor) -> None:
        """Make the coarse map the least squares' best for latents (B, c, h, w) and true maps (B, outputs, H, W), in
        place, and begin with nothing on top of it.
        """
        assert self.coarse is not None
        weight, bias = self.coarse.weight, self.coarse.bias
        assert bias is not None
        seen = F.unfold(latents.double(), 3, padding=1).mT.flatten(0, 1)
        seen = torch.cat([seen, torch.ones_like(seen[:, :1])], 1)
        wanted = F.pixel_unshuffle(maps.double(), self.settings["stride"]).flatten(2).mT.flatten(0, 1)
        ridge = 1e-4 * len(seen) * torch.eye(seen.shape[1], dtype=seen.dtype)
        solution = torch.linalg.solve(seen.mT @ seen + ridge, seen.mT @ wanted).mT
        weight.copy_(solution[:, :-1].view_as(weight))
        bias.copy_(solution[:, -1])
        for parameter in self.leave.parameters():
            parameter.zero_()

    def save(self, folder: Path, dtype: torch.dtype = torch.float16) -> None:
        """Write weights and settings into a head's folder."""
        save_weights(
            folder / DECODER, {name: value.to(dtype) for name, value in self.state_dict().items()}, format="pt"
        )
        write_document(folder / DECODER_CONFIG, self.settings)

    @classmethod
    def load(cls, folder: Path) -> DetailDecoder | None:
        """Read what `save` wrote; None where the folder has no decoder.

        Raises:
            ValueError: settings and weights do not belong together.
        """
        if not (folder / DECODER).is_file():
            return None
        settings, (weights, _) = read_document(folder / DECODER_CONFIG), read_weights(folder / DECODER)
        try:
            decoder = cls(**{**settings, "widths": tuple(settings["widths"])})
            decoder.load_state_dict({name: value.float() for name, value in weights.items()})
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{folder / DECODER}: does not fit {DECODER_CONFIG} ({one_line(error)})") from None
        return decoder.eval().requires_grad_(False)


def sharp_at_edges(values: Tensor, pixels: Tensor, *, reach: int = 3, likeness: float = 0.06) -> Tensor:
    """Move the edges of maps to those of their images: the joint weighted median (Ma et al., ICCV 2013, eq. 1).

    Args:
        values: (B, 1, H, W).
        pixels: (B, 3, H, W) in [0, 1].
        reach: pixels that count, on each side.
        likeness: standard deviation of the Gaussian of the distance of two colours, which is a pixel's weight.

    Returns:
        (B, 1, H, W): of the values around each pixel the least whose weight, with that of all smaller ones, is half of
        the total.
    """
    side, (height, width) = 2 * reach + 1, values.shape[-2:]
    margins = (reach,) * 4
    values, pixels = (F.pad(maps, margins, mode="replicate") for maps in (values, pixels))
    strip = max(1, STRIP // width)

    def around(maps: Tensor, top: int) -> Tensor:
        return F.unfold(maps[:, :, top : top + strip + 2 * reach], side).view(maps.shape[1], side**2, -1)

    results = []
    for value, image in zip(values.split(1), pixels.split(1), strict=True):
        lines = []
        for top in range(0, height, strip):
            colours = around(image, top)
            away = (colours - colours[:, side**2 // 2, None]).square().sum(0)
            ordered, order = around(value, top)[0].sort(0)
            weight = torch.exp(-away / (2 * likeness**2)).gather(0, order).cumsum(0)
            middle = (weight < weight[-1:] / 2).sum(0, keepdim=True)
            lines.append(ordered.gather(0, middle).view(1, 1, -1, width))
        results.append(torch.cat(lines, dim=2))
    return torch.cat(results)


def _same(width: int) -> nn.Conv2d:
    return nn.Conv2d(width, width, 3, padding=1)


def _residuals(hidden: Tensor, layers: nn.ModuleList, level: int, count: int) -> Tensor:
    """The `count` convolutions of a level, each added to what it sees."""
    for layer in itertools.islice(layers, level * count, (level + 1) * count):
        hidden = hidden + F.silu(layer(hidden))
    return hidden
