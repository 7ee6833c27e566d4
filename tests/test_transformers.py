"""Diffusion transformers: taps, modulation and what runs, on small random FLUX, SD3, PixArt and DiT models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from diffrep.backbones import (
    BackboneError,
    Conditions,
    DiffusionTransformer,
    PromptEmbedding,
    TapError,
    load_backbone,
)
from diffrep.backbones.transformers import FLOW, modulated

KINDS = ("flux", "sd3", "pixart", "dit")
PIXELS = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
NOISY = Conditions(timestep=260, posterior="sample")


def small_transformer(kind: str) -> torch.nn.Module:
    from diffusers import (
        DiTTransformer2DModel,
        FluxTransformer2DModel,
        PixArtTransformer2DModel,
        SD3Transformer2DModel,
    )

    sizes: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16}
    if kind == "flux":
        return FluxTransformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=2, joint_attention_dim=12, pooled_projection_dim=8,
            guidance_embeds=True, axes_dims_rope=(4, 6, 6), **sizes,
        )  # fmt: skip
    sizes |= {"sample_size": 16, "patch_size": 2, "in_channels": 4}
    if kind == "sd3":
        return SD3Transformer2DModel(
            num_layers=3, joint_attention_dim=12, caption_projection_dim=32, pooled_projection_dim=8,
            out_channels=4, pos_embed_max_size=16, dual_attention_layers=(0,), qk_norm="rms_norm", **sizes,
        )  # fmt: skip
    if kind == "pixart":
        return PixArtTransformer2DModel(
            num_layers=3, cross_attention_dim=32, caption_channels=12, out_channels=8, **sizes
        )
    return DiTTransformer2DModel(num_layers=3, num_embeds_ada_norm=10, out_channels=8, norm_num_groups=4, **sizes)


def make(kind: str) -> DiffusionTransformer:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)  # the libraries' initialisation takes its draws from the global generator
    transformer = small_transformer(kind)
    for name, parameter in transformer.named_parameters():  # AdaLN starts at zero in some of them
        if "norm" in name or "emb" in name or "table" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16),
        layers_per_block=1,
        norm_num_groups=4,
    )
    schedule = None if type(transformer).__name__ in FLOW else torch.linspace(0.999, 0.005, 1000)
    backbone = DiffusionTransformer(transformer, vae, schedule, name=kind)
    context = torch.randn(1, 5, 12, generator=torch.Generator().manual_seed(1))
    backbone.embed("", PromptEmbedding(context, context[:, 0, :8]))
    return backbone


@pytest.fixture(scope="module", params=KINDS)
def backbone(request: pytest.FixtureRequest) -> DiffusionTransformer:
    return make(request.param)


def square(backbone: DiffusionTransformer) -> torch.Tensor:
    """DiT's own output layer knows squares only."""
    return PIXELS[..., :32] if backbone.name == "dit" else PIXELS


def test_claimed_channels_and_strides_are_true(backbone: DiffusionTransformer) -> None:
    taps, pixels = backbone.taps(), square(backbone)
    maps = backbone.maps(pixels, [tap.name for tap in taps], NOISY)
    for tap in taps:
        shape = (2, tap.channels, pixels.shape[-2] // tap.stride, pixels.shape[-1] // tap.stride)
        assert maps[tap.name].shape == shape, tap
        assert maps[tap.name].isfinite().all()


def test_a_block_begins_with_what_the_one_before_it_gave(backbone: DiffusionTransformer) -> None:
    maps = backbone.maps(PIXELS, ["block.0", "block.1.input", "block.1", "block.2.input"], NOISY)
    assert torch.equal(maps["block.0"], maps["block.1.input"])
    assert torch.equal(maps["block.1"], maps["block.2.input"])


def test_attn_in_is_what_the_block_itself_attends_with(backbone: DiffusionTransformer) -> None:
    block, seen = backbone._blocks[1], []
    attention = block.attn if hasattr(block, "attn") else block.attn1

    def keep(module: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        seen.append(named["hidden_states"] if "hidden_states" in named else inputs[0])

    handle = attention.register_forward_pre_hook(keep, with_kwargs=True)
    maps = backbone.maps(PIXELS, ["block.1.attn_in", "block.1"], NOISY)
    handle.remove()
    cells = maps["block.1"].shape[-2:]
    own = seen[0][:, -cells.numel() :].mT.unflatten(2, cells)  # FLUX's single blocks attend with text in front
    torch.testing.assert_close(maps["block.1.attn_in"], own, rtol=1e-4, atol=1e-4)


def test_only_the_blocks_before_the_tap_run(backbone: DiffusionTransformer) -> None:
    ran: list[int] = []
    attentions = [b.attn if hasattr(b, "attn") else b.attn1 for b in backbone._blocks]
    handles = [a.register_forward_pre_hook(lambda *_, i=i: ran.append(i)) for i, a in enumerate(attentions)]
    backbone.maps(PIXELS, ["block.1.attn_in"], NOISY)
    for handle in handles:
        handle.remove()
    assert ran == [0]


def test_an_ensemble_is_averaged_before_the_norm(backbone: DiffusionTransformer) -> None:
    told = Conditions(timestep=260, ensemble=3, posterior="sample")
    stream = backbone.maps(PIXELS, ["block.1.input"], told)["block.1.input"]
    averaged = backbone.maps(PIXELS, ["block.1.attn_in"], told)["block.1.attn_in"]
    members = backbone.maps(PIXELS, ["block.1.attn_in"], told, average=False)["block.1.attn_in"]
    assert stream.shape == averaged.shape
    assert members.shape[0] == 6
    assert not torch.allclose(averaged, members.unflatten(0, (2, 3)).mean(1), rtol=1e-4, atol=1e-5)


def test_discarded_channels_end_as_constants_and_do_not_reach_the_others() -> None:
    stream = torch.randn(1, 8, 3, 4, generator=torch.Generator().manual_seed(2))
    loud = stream.clone()
    loud[:, 5] += 1000
    modulation = torch.randn(1, 16, 1, 1, generator=torch.Generator().manual_seed(3))
    quiet = modulated(loud, modulation, discard=(5,))
    torch.testing.assert_close(quiet, modulated(stream, modulation, discard=(5,)))
    shift, scale = modulation.chunk(2, dim=1)
    plain = F.layer_norm(stream.movedim(1, -1), (8,), eps=1e-6).movedim(-1, 1) * (1 + scale) + shift
    torch.testing.assert_close(modulated(stream, modulation), plain)
    with pytest.raises(ValueError, match=r"in 0\.\.7, got \(8,\)"):
        modulated(stream, modulation, discard=(8,))


def test_flow_models_mix_linearly() -> None:
    latents, noise = torch.ones(1, 4, 2, 2), torch.full((1, 4, 2, 2), 3.0)
    torch.testing.assert_close(make("sd3").add_noise(latents, noise, 250), torch.full((1, 4, 2, 2), 1.5))
    alpha = torch.linspace(0.999, 0.005, 1000)[250]
    expected = alpha.sqrt() + 3 * (1 - alpha).sqrt()
    torch.testing.assert_close(make("dit").add_noise(latents, noise, 250), expected.expand(1, 4, 2, 2))


def test_a_dit_is_told_its_class() -> None:
    dit = make("dit")
    none, null, other = (
        dit.maps(PIXELS, ["block.1"], Conditions(timestep=260, label=label))["block.1"] for label in (None, 10, 3)
    )
    assert torch.equal(none, null)
    assert not torch.allclose(none, other)
    with pytest.raises(ValueError, match=r"classes 0\.\.9"):
        dit.maps(PIXELS, ["block.1"], Conditions(timestep=260, label=11))


def test_what_is_not_there_is_named() -> None:
    flux = make("flux")
    assert {t.name for t in flux.taps()} >= {"block.0.mlp_in", "block.2.attn_in"}
    with pytest.raises(TapError, match=r"no tap 'block\.2\.mlp_in'"):
        flux.maps(PIXELS, ["block.2.mlp_in"], NOISY)
    with pytest.raises(ValueError, match="multiples of 8"):
        flux.maps(PIXELS[..., :44], ["block.1"], NOISY)
    with pytest.raises(ValueError, match="has no text encoder"):
        flux.maps(PIXELS, ["block.1"], Conditions(timestep=260, prompt="a cat"))
    with pytest.raises(BackboneError, match="a Linear cannot be tapped"):
        DiffusionTransformer(torch.nn.Linear(1, 1), flux.vae)


def test_a_folder_is_loaded_by_what_it_holds(tmp_path: Path) -> None:
    from diffusers import DDIMScheduler

    dit = make("dit")
    dit.network.save_pretrained(tmp_path / "transformer")
    dit.vae.save_pretrained(tmp_path / "vae")
    DDIMScheduler().save_pretrained(tmp_path / "scheduler")
    (tmp_path / "model_index.json").write_text(
        json.dumps({"_class_name": "DiTPipeline", "transformer": ["diffusers", "DiTTransformer2DModel"]})
    )
    loaded = load_backbone(tmp_path)
    assert isinstance(loaded, DiffusionTransformer)
    assert loaded.vae.decoder is None
    told = Conditions(timestep=-1)
    ours, theirs = (b.maps(PIXELS, ["block.2"], told)["block.2"] for b in (dit, loaded))
    assert torch.equal(ours, theirs)
    config = json.loads((tmp_path / "transformer" / "config.json").read_text())
    (tmp_path / "transformer" / "config.json").write_text(json.dumps({**config, "_class_name": "OtherModel"}))
    with pytest.raises(BackboneError, match="a OtherModel cannot be tapped"):
        load_backbone(tmp_path)
