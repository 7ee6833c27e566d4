"""Checker for the kind `ditf` of system `features`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffrep.backbones import Conditions, DiffusionTransformer, PromptEmbedding
from diffrep.backbones.transformers import modulated

from .cases import assert_near, assert_within, number_in, tensors_of

OFFICIAL_DOUBLE = 19  # the official index of the first single-stream block, whatever the depth


class GivenMoments:
    """A VAE whose encoder's outputs are given; the rest of the path is ours."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = type("Config", (), {})()
        self.config.block_out_channels = (1,) * 4
        self.config.scaling_factor = config["vae_scaling_factor"]
        self.config.shift_factor = config["vae_shift_factor"]

    def eval(self) -> GivenMoments:
        return self

    def requires_grad_(self, _: bool) -> GivenMoments:
        return self


class FromMoments(DiffusionTransformer):
    mean: Tensor
    std: Tensor

    def encode(self, pixels: Tensor, *, batch_size: int = 8) -> tuple[Tensor, Tensor]:
        return self.mean, self.std


def block_of(k: int, depth: int) -> str:
    """Our block of the official index k, for a model with so many double-stream blocks."""
    return f"block.{k if k < OFFICIAL_DOUBLE else depth + k - OFFICIAL_DOUBLE}"


def block_named(name: str, depth: int) -> str:
    """Our block of a name such as ``single_transformer_blocks.2``."""
    kind, _, index = name.rpartition(".")
    assert kind in ("transformer_blocks", "single_transformer_blocks"), name
    return f"block.{int(index) + (depth if kind.startswith('single') else 0)}"


def discarded(run: dict[str, Any], massive: list[int]) -> tuple[int, ...]:
    """The channels that a run sets to 0: the massive ones, or none."""
    channels = tuple(run.get("discard_channels", ()))
    assert channels == (tuple(massive) if run.get("channel_discard", False) else ())
    return channels


def check_config(ours: Any, official: dict[str, Any]) -> None:
    """The transformer's folder is of the architecture that the case names."""
    assert ours.in_channels == official["in_channels"] == 4 * official["latent_channels"]
    assert ours.num_attention_heads == official["num_heads"]
    assert ours.num_attention_heads * ours.attention_head_dim == official["hidden_size"]
    assert (ours.num_layers, ours.num_single_layers) == (official["depth"], official["depth_single_blocks"])
    assert list(ours.axes_dims_rope) == official["axes_dim"]
    assert ours.joint_attention_dim == official["context_in_dim"]
    assert ours.pooled_projection_dim == official["vec_in_dim"]
    assert bool(ours.guidance_embeds) == official["guidance_embed"]
    # fixed in diffusers' class
    assert (official["mlp_ratio"], official["theta"], official["qkv_bias"]) == (4.0, 10000, True)


def check_ditf(folder: Path, case: dict[str, Any]) -> None:
    from diffusers import FluxTransformer2DModel

    given, expected = tensors_of(folder)
    transformer = FluxTransformer2DModel.from_pretrained(folder / "model" / "transformer")
    backbone = FromMoments(transformer, GivenMoments(case["config"]))  # type: ignore[arg-type]  # no module
    check_config(transformer.config, case["config"])
    tolerance = {key: number_in(text) for key, text in case["tolerance"].items()}
    for number, run in enumerate(case["runs"]):
        name = f"run{number}"
        assert given[f"{name}.prompt_embeds"].shape[1] == run["text_tokens"]
        backbone.mean = given[f"{name}.posterior_mean"]
        backbone.std = (given[f"{name}.posterior_logvar"] / 2).exp()
        prompt = PromptEmbedding(given[f"{name}.prompt_embeds"], given[f"{name}.pooled_prompt_embeds"])
        backbone.embed("", prompt)
        noise, draws = given[f"{name}.noise"], given.get(f"{name}.posterior_eps")
        spread = None if draws is None else backbone.std * draws
        noisy = backbone.noisy(backbone.mean, spread, noise, run["t"])
        assert_within(noisy, expected[f"{name}.noisy_latents"], atol=tolerance["noisy_latents"], what=f"{name} latents")
        conditions = Conditions(
            timestep=run["t"],
            ensemble=len(noise),
            posterior="mean" if draws is None else "sample",
            discard=discarded(run, case["massive_channels"]),
            **({} if run["guidance"] is None else {"guidance": run["guidance"]}),
        )
        canvas = torch.zeros(1, 3, *(8 * side for side in run["latent_hw"]))
        depth = len(transformer.transformer_blocks)
        blocks = run["k"] if isinstance(run["k"], list) else [run["k"]]
        named = run["block"] if isinstance(run["k"], list) else [run["block"]]
        assert [block_of(k, depth) for k in blocks] == [block_named(block, depth) for block in named]
        double = isinstance(run["k"], list)  # the lower-level call: per member, several blocks in one pass
        assert run["api"] == ("Flux.forward_feat" if double else "Featurizer4Eval.forward then extract_feature")
        assert len(noise) == run["batch" if double else "ensemble_size"]
        drawn = {"noise": noise, "posterior_noise": draws, "average": not double}
        if not double:
            assert run["tap"] == "block input, image tokens"
            block = block_of(run["k"], depth)
            found = backbone.maps(canvas, [f"{block}.input", f"{block}.attn_in"], conditions, **drawn)
            raw, features = found.values()
            assert_near(raw, expected[f"{name}.raw"], relative=tolerance["raw"], what=f"{name} raw")
            assert_near(features, expected[f"{name}.features"], relative=tolerance["features"], what=f"{name} features")
            modulation = expected[f"{name}.modulation"][:, :2].flatten(1)[..., None, None]
            (whole,) = backbone.network_maps(noisy, [f"{block}.modulation"], conditions).values()
            mean = whole.mean(0, keepdim=True)
            assert_within(mean, modulation, atol=tolerance["modulation"], what=f"{name} modulation")
            again = modulated(expected[f"{name}.raw"], modulation, conditions.discard)
            assert_near(again, expected[f"{name}.features"], relative=tolerance["features"], what=f"{name} AdaLN")
            continue
        taps = {k: f"{block_of(k, depth)}.{'mlp_in' if k < OFFICIAL_DOUBLE else 'input'}" for k in run["k"]}
        maps = backbone.maps(canvas, list(taps.values()), conditions, **drawn)
        for k, tap in taps.items():
            assert_near(maps[tap], expected[f"{name}.k{k}"], relative=tolerance["kK"], what=f"{name} k{k}")
            if k >= OFFICIAL_DOUBLE:
                (got,) = backbone.network_maps(noisy, [f"{block_of(k, depth)}.modulation"], conditions).values()
                official = expected[f"{name}.k{k}.modulation"][:, :2].flatten(1)[..., None, None]
                assert_within(got, official, atol=tolerance["kK.modulation"], what=f"{name} k{k} modulation")
