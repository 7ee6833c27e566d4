"""FreeU, attention maps and the layer names of generic-diffusion-feature."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from diffrep.backbones import Conditions, FreeU, LatentDiffusion, TapError, gdf_tap, load_backbone
from diffrep.backbones.unet import damp_low_frequencies

LATENTS = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
PLAIN = Conditions(timestep=100, prompt="a cat")
NEUTRAL = FreeU(deep_input=1, next_input=1, deep_skip=1, next_skip=1)


@pytest.fixture(scope="module")
def sd(sd_folder: Path) -> LatentDiffusion:
    backbone = load_backbone(sd_folder)
    assert isinstance(backbone, LatentDiffusion)
    return backbone


def test_neutral_factors_of_freeu_change_nothing(sd: LatentDiffusion) -> None:
    taps = ["mid", "up.0", "up.2.attention.1", "out"]
    plain, neutral = (sd.network_maps(LATENTS, taps, replace(PLAIN, freeu=f)) for f in (None, NEUTRAL))
    for tap in taps:
        torch.testing.assert_close(plain[tap], neutral[tap], rtol=1e-4, atol=1e-5)


def test_freeu_scales_half_of_the_channels_of_the_tap_itself_and_leaves_no_trace(sd: LatentDiffusion) -> None:
    before = sd.network_maps(LATENTS, ["mid", "out"], PLAIN)
    after = sd.network_maps(LATENTS, ["mid", "out"], replace(PLAIN, freeu=FreeU()))
    torch.testing.assert_close(after["mid"][:, :16], before["mid"][:, :16] * 1.2)
    assert torch.equal(after["mid"][:, 16:], before["mid"][:, 16:])
    assert not torch.allclose(after["out"], before["out"])
    assert torch.equal(sd.network_maps(LATENTS, ["out"], PLAIN)["out"], before["out"])


def test_freeu_goes_by_the_channel_count(sd: LatentDiffusion) -> None:
    """16 channels are the next smaller count here: with only its factors on, the 32-channel taps stay."""
    only_next = replace(NEUTRAL, next_input=2.0)
    taps = ["up.1", "up.2.resnet.0"]
    plain, scaled = (sd.network_maps(LATENTS, taps, replace(PLAIN, freeu=f)) for f in (None, only_next))
    torch.testing.assert_close(scaled["up.1"], plain["up.1"], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(scaled["up.2.resnet.0"], plain["up.2.resnet.0"])


def test_only_low_frequencies_are_damped() -> None:
    columns = torch.arange(8.0)
    fine = torch.cos(torch.pi * columns).expand(1, 1, 8, 8)
    torch.testing.assert_close(damp_low_frequencies(fine, 0.5, 1), fine)
    flat = torch.ones(1, 1, 8, 8)
    torch.testing.assert_close(damp_low_frequencies(flat, 0.5, 1), flat * 0.5)
    torch.testing.assert_close(damp_low_frequencies(flat[..., :1, :1], 0.5, 1), flat[..., :1, :1] * 0.5)


def scores(attention: Any, places: Tensor, context: Tensor | None) -> Tensor:
    """What an attention of diffusers says: (B, heads, places, keys)."""
    queries = attention.head_to_batch_dim(attention.to_q(places))
    keys = attention.head_to_batch_dim(attention.to_k(places if context is None else context))
    return attention.get_attention_scores(queries, keys).unflatten(0, (-1, attention.heads))


@pytest.mark.parametrize("kind", ["self", "cross"])
@torch.no_grad()
def test_attention_maps_are_those_of_the_layer(sd: LatentDiffusion, sd_folder: Path, kind: str) -> None:
    block = sd.network.up_blocks[1].attentions[0].transformer_blocks[0]
    attention = block.attn1 if kind == "self" else block.attn2
    seen: list[Tensor] = []
    handle = attention.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0]))
    sd.network_maps(LATENTS, ["up.1.attention.0"], PLAIN)
    handle.remove()
    tap = f"up.1.attention.0.block.0.{kind}.map"
    got = sd.network_maps(LATENTS, [tap], PLAIN)[tap]
    context = sd.embed("a cat").context.expand(2, -1, -1) if kind == "cross" else None
    path = f"up_blocks.1.attentions.0.transformer_blocks.0.attn{1 if kind == 'self' else 2}"
    diffusers_own = UNet2DConditionModel.from_pretrained(sd_folder / "unet").get_submodule(path)
    expected = scores(diffusers_own, seen[0], context)
    heads = attention.heads
    assert got.shape == (2, heads * expected.shape[-1], 2, 2)
    torch.testing.assert_close(got.unflatten(1, (heads, -1)).flatten(3).mT, expected)


def test_a_map_is_read_before_its_attention_is_computed(sd: LatentDiffusion) -> None:
    ran: list[str] = []
    block = sd.network.up_blocks[1].attentions[0].transformer_blocks[0]
    handles = [
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
        for name, module in (("attn1", block.attn1), ("value", block.attn2.to_v), ("attn2", block.attn2))
    ]
    sd.network_maps(LATENTS, ["up.1.attention.0.block.0.cross.map"], PLAIN)
    for handle in handles:
        handle.remove()
    assert ran == ["attn1"]


def test_the_first_and_the_last_tap_are_the_networks_input_and_output(sd: LatentDiffusion) -> None:
    maps = sd.network_maps(LATENTS, ["in", "out"], PLAIN)
    assert torch.equal(maps["in"], LATENTS)
    assert torch.equal(maps["out"], sd.network(LATENTS, 100, sd.embed("a cat").context.expand(2, -1, -1)).sample)


def test_names_of_generic_diffusion_feature_find_their_taps(sd: LatentDiffusion) -> None:
    parts = ["res-increment", "res-out", "vit-out", "vit-block0-out", "vit-block0-ffn-inner"]
    parts += [f"vit-block0-self-{x}" for x in ("q", "k", "v", "map")]
    parts += [f"vit-block0-cross-{x}" for x in ("q", "map")]
    names = [f"{stage}-level2-repeat0-{part}" for stage in ("down", "up") for part in parts]
    names += [f"mid-{part}" if part.startswith("vit") else f"mid-repeat1-{part}" for part in parts]
    names += ["unet-in", "unet-after-conv-in", "down-level1-downsampler-out", "up-level2-upsampler-out", "unet-out"]
    taps = [sd.tap(gdf_tap(name)).name for name in names]
    assert len(set(taps)) == len(names)


@pytest.mark.parametrize(
    "name",
    ["up-level1", "up-1-res-out", "up-level1-res-out", "up-level1-repeat0-vit-block0-cross-k", "mid-repeat0-vit-out"],
)
def test_a_name_without_a_map_is_refused(name: str) -> None:
    with pytest.raises(TapError, match=name):
        gdf_tap(name)
