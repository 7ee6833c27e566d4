"""Folded upsampling: the same map for less than half of the work."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from diffrep.backbones import Conditions, LatentDiffusion, load_backbone, unet
from diffrep.backbones.unet import upsample_and_convolve


@pytest.mark.parametrize("size", [(1, 1), (5, 8)])
@pytest.mark.parametrize("bias", [True, False])
def test_four_small_convolutions_are_the_large_one(size: tuple[int, int], bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    maps, weight = (torch.randn(s, generator=generator) for s in ((2, 6, *size), (4, 6, 3, 3)))
    offset = torch.randn(4, generator=generator) if bias else None
    with FlopCounterMode(display=False) as plain:
        expected = F.conv2d(F.interpolate(maps, scale_factor=2.0, mode="nearest"), weight, offset, padding=1)
    with FlopCounterMode(display=False) as folded:
        got = upsample_and_convolve(maps, weight, offset)
    torch.testing.assert_close(got, expected)
    assert 9 * folded.get_total_flops() == 4 * plain.get_total_flops()


def test_taps_behind_folded_upsamplers_keep_their_values(sd_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = load_backbone(sd_folder)
    assert isinstance(backbone, LatentDiffusion)
    pixels = torch.rand(1, 3, 64, 128, generator=torch.Generator().manual_seed(0))
    taps = ["up.0.upsampler", "up.0", "up.3"]
    plain = backbone.maps(pixels, taps, Conditions(timestep=50))
    calls = []
    monkeypatch.setattr(unet, "FOLDED_FROM", 1)
    real = unet.upsample_and_convolve
    monkeypatch.setattr(unet, "upsample_and_convolve", lambda *a: calls.append(1) or real(*a))
    folded = backbone.maps(pixels, taps, Conditions(timestep=50))
    assert len(calls) == 3
    for tap in taps:
        torch.testing.assert_close(folded[tap], plain[tap], rtol=1e-4, atol=1e-5)
    backbone.maps(pixels[..., :72], taps, Conditions(timestep=50))  # 9 columns come from 5: not doubled
    assert len(calls) == 3
    assert "forward" not in vars(backbone.network.up_blocks[0].upsamplers[0])
