"""Probes of depth and surface normals on frozen maps, as probe3d has them (arXiv 2404.08636).

Three readers of the maps: linear (one convolution after resizing to four times the grid), multiscale (convolutions
before and after, eight times) and DPT (residual units from the last map back to the first, sixteen times); every
resizing is bilinear with aligned corners.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Reader = Literal["linear", "multiscale", "dpt"]


class LinearReader(nn.Module):
    """All maps side by side, resized to four times the grid, one convolution."""

    def __init__(self, channels: Sequence[int], out: int, *, kernel: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(sum(channels), out, kernel, padding=kernel // 2)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps (B, C_i, h, w) -> (B, out, 4h, 4w)."""
        read = torch.cat(list(maps), dim=1)
        if self.conv.kernel_size == (1, 1):  # the same before resizing, where there are sixteen times fewer cells
            return _resize(self.conv(read), 4)
        out: Tensor = self.conv(_resize(read, 4))
        return out


def _convolutions(channels: int, out: int, count: int, kernel: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for number in range(count):
        last = number == count - 1
        layers.append(nn.Conv2d(channels, out, kernel, padding=kernel // 2))
        if not last:
            layers.append(nn.ReLU())
        channels = out
    return nn.Sequential(*layers)


class MultiscaleReader(nn.Module):
    """A convolution per map, resized to the last map's grid; three more at twice the grid, two at eight times."""

    def __init__(self, channels: Sequence[int], out: int, *, hidden: int = 512, kernel: int = 1) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(c, hidden, kernel, padding=kernel // 2) for c in channels)
        self.conv_mid = _convolutions(hidden * len(channels), hidden, 3, kernel)
        first, last = (nn.Conv2d(hidden, width, kernel, padding=kernel // 2) for width in (hidden, out))
        self.conv_out = nn.Sequential(first, nn.ReLU(), last)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps (B, C_i, h_i, w_i) -> (B, out, 8h, 8w), (h, w) of the last map."""
        size = maps[-1].shape[-2:]
        read = [conv(m) for conv, m in zip(self.convs, maps, strict=True)]
        x = torch.cat([F.interpolate(m, size=size, mode="bilinear", align_corners=True) for m in read], dim=1).relu()
        x = self.conv_mid(_resize(x, 2)).relu()
        out: Tensor = self.conv_out(_resize(x, 4))
        return out


class _ResidualUnit(nn.Module):
    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        first, second = (nn.Conv2d(width, width, kernel, padding=kernel // 2) for _ in range(2))
        self.conv = nn.Sequential(first, nn.ReLU(), second, nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x) + x
        return out


class _Fusion(nn.Module):
    def __init__(self, width: int, kernel: int, *, skip: bool) -> None:
        super().__init__()
        if skip:
            self.resConfUnit1 = _ResidualUnit(width, kernel)
        self.resConfUnit2 = _ResidualUnit(width, kernel)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if skip is not None:
            x = x + self.resConfUnit1(skip)
        out: Tensor = self.resConfUnit2(x)
        return out


class DptReader(nn.Module):
    """Four maps, each through a 1x1 convolution and doubled, fused from the last back; then four times, then two.

    The caller's list of maps is left as it is (the released code overwrites it).
    """

    def __init__(self, channels: Sequence[int], out: int, *, hidden: int = 512, kernel: int = 3) -> None:
        super().__init__()
        if len(channels) != 4:
            raise ValueError(f"a DPT reader takes four maps, got {len(channels)}")
        for number, count in enumerate(channels):
            self.add_module(f"conv_{number}", nn.Conv2d(count, hidden, 1))
            self.add_module(f"ref_{number}", _Fusion(hidden, kernel, skip=number < 3))
        self.out_conv = _convolutions(hidden, hidden, 1, 3).append(nn.ReLU())
        self.out_conv.append(nn.Conv2d(hidden, out, 3, padding=1))

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Four maps (B, C_i, h, w) -> (B, out, 16h, 16w)."""
        read = [_resize(getattr(self, f"conv_{number}")(m), 2) for number, m in enumerate(maps)]
        fuse = [getattr(self, f"ref_{number}") for number in range(4)]
        x = fuse[3](read[3])
        for number in (2, 1, 0):
            x = fuse[number](x, read[number])
        out: Tensor = _resize(self.out_conv(_resize(x, 4)), 2)
        return out


def _resize(maps: Tensor, factor: int) -> Tensor:
    return F.interpolate(maps, scale_factor=factor, mode="bilinear", align_corners=True)


def _reader(
    kind: Reader, channels: Sequence[int], out: int, hidden: int, kernel: int
) -> LinearReader | MultiscaleReader | DptReader:
    if kind == "linear":
        return LinearReader(channels, out, kernel=kernel)
    if kind not in ("multiscale", "dpt"):
        raise ValueError(f"reader must be 'linear', 'multiscale' or 'dpt', got {kind!r}")
    chosen = MultiscaleReader if kind == "multiscale" else DptReader
    return chosen(channels, out, hidden=hidden, kernel=kernel)


class DepthProbe(nn.Module):
    """Depth between two limits, as the mean of 256 bins or through a sigmoid.

    Args:
        limits: lowest and highest depth, metres.
        predicts: "bins" weighs uniform bins by relu(logit) + 0.1; "sigmoid" has one output.
    """

    def __init__(
        self,
        channels: Sequence[int],
        *,
        reader: Reader = "linear",
        predicts: Literal["bins", "sigmoid"] = "bins",
        limits: tuple[float, float] = (0.001, 10.0),
        hidden: int = 512,
        kernel: int = 1,
        bins: int = 256,
    ) -> None:
        super().__init__()
        self.limits, self.predicts = limits, predicts
        self.head = _reader(reader, channels, bins if predicts == "bins" else 1, hidden, kernel)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps (B, C_i, h, w) -> depth (B, 1, H, W), metres."""
        x, (low, high) = self.head(maps), self.limits
        if self.predicts == "sigmoid":
            return low + (high - low) * x.sigmoid()
        weights = x.relu() + 0.1
        centres = torch.linspace(low, high, x.shape[1], device=x.device, dtype=x.dtype)
        return torch.einsum("bkhw,k->bhw", weights, centres)[:, None] / weights.sum(1, keepdim=True)


class NormalsProbe(nn.Module):
    """Surface normals, three channels; with `uncertainty` a fourth."""

    def __init__(
        self,
        channels: Sequence[int],
        *,
        reader: Reader = "linear",
        uncertainty: bool = False,
        hidden: int = 512,
        kernel: int = 1,
    ) -> None:
        super().__init__()
        self.head = _reader(reader, channels, 4 if uncertainty else 3, hidden, kernel)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps (B, C_i, h, w) -> (B, 3 or 4, H, W); not of unit length."""
        out: Tensor = self.head(maps)
        return out


def scale_invariant_loss(depth: Tensor, reference: Tensor, valid: Tensor, *, invariance: float = 0.85) -> Tensor:
    """sqrt(mean(g^2) - invariance mean(g)^2) over the valid pixels of a batch, g = log depth - log reference.

    Eigen et al. 2014 (arXiv 1406.2283), with the weight and the root of AdaBins (arXiv 2011.14141, equation 5).

    Args:
        depth, reference: (B, 1, H, W) metres, positive where valid.
        valid: (B, 1, H, W) bool. Zero where there is none.
    """
    g = depth[valid].log() - reference[valid].log()
    if not len(g):
        return depth.sum() * 0
    return (g.square().mean() - invariance * g.mean().square()).clamp(min=1e-12).sqrt()


def gradient_loss(depth: Tensor, reference: Tensor, valid: Tensor, *, scales: int = 4) -> Tensor:
    """Mean absolute gradient of log depth - log reference, summed over every, every second, fourth, ... pixel.

    MegaDepth (arXiv 1804.00607, equation 4); gradients whose two pixels are valid count.

    Args:
        depth, reference, valid: as of `scale_invariant_loss`.
    """
    difference = torch.where(valid, depth, 1.0).log() - torch.where(valid, reference, 1.0).log()
    total = difference.sum() * 0
    for scale in range(scales):
        part, known = difference[..., :: 2**scale, :: 2**scale], valid[..., :: 2**scale, :: 2**scale]
        for axis in (-2, -1):
            both = known.narrow(axis, 1, known.shape[axis] - 1) & known.narrow(axis, 0, known.shape[axis] - 1)
            total = total + (part.diff(dim=axis).abs() * both).sum() / known.sum().clamp(min=1)
    return total


def depth_loss(depth: Tensor, reference: Tensor, valid: Tensor) -> Tensor:
    """probe3d's loss (arXiv 2404.08636): 10 times the scale-invariant one, 0.5 times that of the gradients.

    The weights are published; the forms of the two are the ones their papers give, see above.
    """
    return 10 * scale_invariant_loss(depth, reference, valid) + 0.5 * gradient_loss(depth, reference, valid)
