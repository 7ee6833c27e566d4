"""The U-Net of DiffDIS and its parts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.unets.unet_2d_blocks import UNetMidBlock2DCrossAttn
from safetensors.torch import load_file
from torch import Tensor

from diffrep.heads.diffdis import (
    DiffDisUNet,
    InteractiveAttention,
    InteractiveBlock,
    branch_vectors,
    embed_rows,
    inject,
    injection_parts,
    interact,
)
from diffrep.heads.loading import diffdis_unet
from diffrep.heads.one_step import Schedule

from .cases import each, tensors_of


def tolerances(text: str) -> dict[str, float]:
    """``atol 1e-4 rtol 1e-4`` -> {"atol": 1e-4, "rtol": 1e-4}; what is not named is 0."""
    found = {name: float(value) for name, value in re.findall(r"(atol|rtol) ([0-9.e+-]+)", text)}
    assert found, f"no tolerance in {text!r}"
    return {"atol": 0.0, "rtol": 0.0} | found


def assert_equal(got: Tensor, expected: Tensor, tolerance: str, what: str) -> None:
    torch.testing.assert_close(got, expected, **tolerances(tolerance), msg=lambda text: f"{what}: {text}")


def part(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    found = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    assert found, f"no weights below {prefix!r}"
    return found


@torch.no_grad()
def check_bde(folder: Path, case: dict[str, Any]) -> None:
    given, expected = tensors_of(folder)
    weights = load_file(folder / "model" / "weights.safetensors")
    for images in case["images"]:
        vectors = branch_vectors(images)
        torch.testing.assert_close(vectors[::images, :2], given["labels"].sin())
        assert_equal(vectors, expected[f"B{images}/bde"], case["tolerance"], f"B{images}/bde")
        for i, dims in enumerate(case["dims"]):
            project = Timesteps(dims["time_proj_channels"], True, 0)
            time = TimestepEmbedding(dims["time_proj_channels"], dims["time_embed_dim"])
            branch = TimestepEmbedding(vectors.shape[1], dims["time_embed_dim"])
            time.load_state_dict(part(weights, f"d{i}.time_embedding."))
            branch.load_state_dict(part(weights, f"d{i}.class_embedding."))
            for timestep in case["timesteps"]:
                name = f"d{i}/B{images}/t{timestep}"
                assert_equal(branch(vectors), expected[f"{name}/class_embedding"], case["tolerance"], name)
                embedded = embed_rows(project, time, branch, timestep, vectors)
                assert_equal(embedded, expected[f"{name}/emb"], case["tolerance"], name)


@torch.no_grad()
def check_dbia(folder: Path, case: dict[str, Any]) -> None:
    given, expected = tensors_of(folder)
    weights = load_file(folder / "model" / "weights.safetensors")
    channels, heads = case["channels"], case["heads"]
    attention = InteractiveAttention(channels, heads)
    attention.load_state_dict(part(weights, "attn3."))
    block = InteractiveBlock(
        BasicTransformerBlock(channels, heads, case["head_dim"], cross_attention_dim=case["cross_attention_dim"])
    )
    block.load_state_dict(part(weights, "block."))
    mid_block = UNetMidBlock2DCrossAttn(
        in_channels=channels,
        temb_channels=case["temb_channels"],
        num_attention_heads=heads,
        cross_attention_dim=case["cross_attention_dim"],
        resnet_groups=case["resnet_groups"],
        resnet_eps=case["resnet_eps"],
        use_linear_projection=True,
    )
    interact(mid_block)
    mid_block.load_state_dict(part(weights, "mid_block."))
    for module in (attention, block, mid_block):
        module.eval()
    plain, _, in_mid_block = case["tolerance"].partition("mid_block")
    described = ("rms_difference_from_plain_self_attention", "attn3_rms")
    for fields in each(case["variants"], describing=described):
        variant, (height, width) = fields["name"], fields["hw"]
        assert given[f"{variant}/tokens"].shape == (2 * fields["images"], height * width, channels)
        assert given[f"{variant}/text"].shape[1] == fields["text_tokens"]
        tokens, text = given[f"{variant}/tokens"], given[f"{variant}/text"]
        assert_equal(attention(tokens), expected[f"{variant}/attn3"], plain, f"{variant}/attn3")
        got = block(tokens, encoder_hidden_states=text)
        assert_equal(got, expected[f"{variant}/block"], plain, f"{variant}/block")
        got = mid_block(given[f"{variant}/feature"], given[f"{variant}/temb"], encoder_hidden_states=text)
        assert_equal(got, expected[f"{variant}/mid_block"], in_mid_block or plain, f"{variant}/mid_block")


@torch.no_grad()
def check_swci(folder: Path, case: dict[str, Any]) -> None:
    given, expected = tensors_of(folder)
    weights = load_file(folder / "model" / "weights.safetensors")
    for variant in each(case["variants"], describing=("rms_change", "main_path_unchanged")):
        name, (height, width) = variant["name"], variant["latent_hw"]
        assert given[f"{name}/token_0"].shape[-2:] == (height // 2, width // 2)
        assert len(given[f"{name}/token_0"]) == 2 * variant["images"]
        latent_channels = given[f"{name}/token_0"].shape[1]
        parts = torch.nn.ModuleDict(injection_parts(case["widths"], latent_channels))
        parts.load_state_dict(weights)
        parts.train(variant["training_mode"])
        for level in range(len(case["widths"])):
            modules = [parts[kind][level] for kind in ("rgb_conv", "rgb_proj", "rgb_proj1")]
            skip, token = given[f"{name}/skip_{level}"], given[f"{name}/token_{level}"]
            once = token[: variant["images"]]
            for tokens in (token, once) if not variant["training_mode"] else (once,):
                got = inject(skip, tokens, *modules)
                assert_equal(got, expected[f"{name}/skip_{level}"], case["tolerance"], f"{name}/skip_{level}")
            if variant["training_mode"]:
                norm = parts["rgb_conv"][level][1]
                for kind, value in (("mean", norm.running_mean), ("var", norm.running_var)):
                    key = f"{name}/running_{kind}_{level}"
                    assert_equal(value, expected[key], case["tolerance"], key)
                assert norm.num_batches_tracked == expected[f"{name}/num_batches_{level}"]


def load_unet(folder: Path) -> tuple[DiffDisUNet, Schedule]:
    """The U-Net and the schedule of a case's model folder."""
    weights = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    config = json.loads((folder / "unet" / "config.json").read_text())
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    return diffdis_unet(weights, config, name=str(folder)), Schedule.from_config(scheduler)


@contextmanager
def watching(unet: DiffDisUNet) -> Iterator[dict[str, Tensor]]:
    """Fill a dict with what the parts of a U-Net give, under the names of the case."""
    seen: dict[str, Tensor] = {}

    def leave(key: str) -> Callable[[torch.nn.Module, Any, Tensor], None]:
        return lambda module, inputs, output: seen.__setitem__(key, output)

    def enter(key: str) -> Callable[[torch.nn.Module, Any, dict[str, Any]], None]:
        return lambda module, inputs, named: seen.__setitem__(key, named["res_hidden_states_tuple"][-1])

    parts = {"conv_in": unet.conv_in, "mid_out": unet.mid_block}
    parts |= {name: getattr(unet, name) for name in ("time_embedding", "class_embedding")}
    handles = [module.register_forward_hook(leave(key)) for key, module in parts.items()]
    for number, block in enumerate(unet.up_blocks):
        key = f"skip_into_up{number}_{len(block.resnets) - 1}"
        handles.append(block.register_forward_pre_hook(enter(key), with_kwargs=True))
    yield seen
    for handle in handles:
        handle.remove()


@torch.no_grad()
def check_unet_step(folder: Path, case: dict[str, Any]) -> None:
    given, expected = tensors_of(folder)
    unet, schedule = load_unet(folder / "model")
    for variant in each(case["variants"], describing=("unet_out_std", "x0_std")):
        assert list(given[f"{variant['name']}/noise"].shape[-2:]) == variant["latent_hw"]
        assert given[f"{variant['name']}/text"].shape[1] == variant["text_tokens"]
        name, images, timestep = variant["name"], variant["images"], variant["timestep"]
        latents = [given[f"{name}/rgb_latent_{2**k}"] for k in range(unet.levels + 1)]
        noise, text = given[f"{name}/noise"], given[f"{name}/text"]
        with watching(unet) as seen:
            output = unet(latents, noise, text, timestep=timestep)
        for key, value in seen.items():
            if f"{name}/{key}" in expected:
                value = value.expand_as(expected[f"{name}/{key}"])  # the time is embedded once for all rows
                assert_equal(value, expected[f"{name}/{key}"], case["tolerance"]["others"], f"{name}/{key}")
        compared = {key for key in expected if key.startswith(f"{name}/")} - {f"{name}/unet_out", f"{name}/x0"}
        assert {f"{name}/{key}" for key in seen} >= compared
        assert_equal(output, expected[f"{name}/unet_out"], case["tolerance"]["unet_out"], f"{name}/unet_out")
        clean = schedule.clean(output, noise, timestep)
        assert_equal(clean, expected[f"{name}/x0"], case["tolerance"]["x0"], f"{name}/x0")
        masks = unet(latents, noise, text, timestep=timestep, edges=False)
        torch.testing.assert_close(masks, output[:images], atol=1e-5, rtol=1e-5)
