"""Stable Diffusion in one file, LoRA on top of it, and files that are something else."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from diffrep.backbones import BackboneError, Conditions, LatentDiffusion, draw_noise, load_backbone
from diffrep.cli import main

from .layouts import original

PIXELS = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
A_CAT = [49406, 320, 2368, 49407]  # in CLIP's vocabulary


@pytest.fixture(scope="module", params=["sd1", "sd2", "sdxl"])
def model(request: pytest.FixtureRequest) -> tuple[str, Any, Any, dict[str, Any]]:
    return (request.param, *original.parts(request.param))


def write(model: tuple[str, Any, Any, dict[str, Any]], file: Path) -> Path:
    weights = original.one_file(*model)
    if file.suffix == ".safetensors":
        save_file(weights, file)
    else:  # as Lightning writes it: beside objects of classes that nobody has here
        torch.save({"state_dict": weights, "callbacks": argparse.Namespace(best=1), "global_step": 7}, file)
    return file


@torch.inference_mode()
def expected_maps(model: tuple[str, Any, Any, dict[str, Any]], taps: list[str]) -> dict[str, Tensor]:
    family, unet, vae, encoders = model
    pads = {"text_encoder": 0 if family == "sd2" else 49407, "text_encoder_2": 0}
    states, pooled = [], torch.empty(0)
    for part, encoder in encoders.items():
        ids = torch.tensor([A_CAT + [pads[part]] * (77 - len(A_CAT))])
        output = encoder(ids, output_hidden_states=True)
        states.append(output.hidden_states[-2] if family == "sdxl" else output.last_hidden_state)
        pooled = output[0]
    added = {"text_embeds": pooled, "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]])} if family == "sdxl" else None
    factor = 0.13025 if family == "sdxl" else 0.18215
    alpha = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2).cumprod(0)[200]
    latents = alpha.sqrt() * vae.encode(PIXELS * 2 - 1).latent_dist.mean * factor
    latents = latents + (1 - alpha).sqrt() * draw_noise((4, 8, 8), 0)
    seen: dict[str, Tensor] = {}
    handles = [
        unet.get_submodule(path).register_forward_hook(
            lambda m, i, o, tap=tap: seen.update({tap: o if isinstance(o, Tensor) else o[0]})
        )
        for tap, path in (("mid", "mid_block"), ("up.1", "up_blocks.1"))
    ]
    unet(latents, 200, torch.cat(states, dim=-1), added_cond_kwargs=added)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("ending", [".safetensors", ".ckpt"])
def test_one_file_gives_the_features_of_its_networks(model: Any, ending: str, tmp_path: Path) -> None:
    backbone = load_backbone(write(model, tmp_path / f"model{ending}"))
    assert isinstance(backbone, LatentDiffusion)
    maps = backbone.maps(PIXELS, ["mid", "up.1"], Conditions(timestep=200, prompt="a cat"))
    for tap, value in expected_maps(model, ["mid", "up.1"]).items():
        torch.testing.assert_close(maps[tap], value, rtol=1e-3, atol=1e-4)


def kohya(unet: Any, alpha: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A LoRA of one attention layer in kohya's form, and what it adds to the weights."""
    generator = torch.Generator().manual_seed(5)
    weights, added = {}, {}
    for path in ("mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "mid_block.attentions.0.proj_in"):
        out, inner = unet.get_submodule(path).weight.shape[:2]
        shape = [1, 1] if unet.get_submodule(path).weight.ndim == 4 else []
        down, up = (torch.randn(s + shape, generator=generator) for s in ([4, inner], [out, 4]))
        name = f"lora_unet_{path.replace('.', '_')}"
        weights |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        weights[f"{name}.alpha"] = torch.tensor(alpha)
        product = up.flatten(1) @ down.flatten(1)
        added[path] = (alpha / 4) * product.reshape(unet.get_submodule(path).weight.shape)
    return weights, added


@pytest.mark.parametrize("scale", [1.0, -0.5])
def test_a_lora_is_added_to_the_weights(sd_folder: Path, scale: float, tmp_path: Path) -> None:
    plain = load_backbone(sd_folder)
    weights, added = kohya(plain.network, 2.0)
    save_file(weights, tmp_path / "style.safetensors")
    file = f"{tmp_path / 'style.safetensors'}" + ("" if scale == 1 else f":{scale}")
    backbone = load_backbone(sd_folder, lora=file)
    assert "style.safetensors" in backbone.source
    before = dict(plain.network.named_parameters())
    assert set(before) == {name for name, _ in backbone.network.named_parameters()}
    for name, ours in backbone.network.named_parameters():
        change = added.get(name.removesuffix(".weight"), torch.zeros(1)) * scale
        torch.testing.assert_close(ours, before[name] + change, rtol=1e-5, atol=1e-6)
    assert [tap.name for tap in backbone.taps()] == [tap.name for tap in plain.taps()]


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_the_part_of_a_lora_for_the_text_encoder_changes_prompts(sd_folder: Path, scale: float, tmp_path: Path) -> None:
    from transformers import CLIPTextModel

    plain = load_backbone(sd_folder)
    assert isinstance(plain, LatentDiffusion)
    weights, _ = kohya(plain.network, 4.0)
    down, up = torch.ones(4, 16), torch.linspace(-1, 1, 64).reshape(16, 4)
    for part in ("q", "k", "v", "out"):
        name = f"lora_te_text_model_encoder_layers_0_self_attn_{part}_proj"
        weights |= {f"{name}.lora_down.weight": down.clone(), f"{name}.lora_up.weight": up.clone()}
        weights[f"{name}.alpha"] = torch.tensor(4.0)
    save_file(weights, tmp_path / "style.safetensors")
    backbone = load_backbone(sd_folder, lora=f"{tmp_path / 'style.safetensors'}:{scale}")
    assert isinstance(backbone, LatentDiffusion)
    encoder: Any = CLIPTextModel.from_pretrained(sd_folder / "text_encoder")
    with torch.no_grad():
        for path, module in encoder.named_modules():
            if ".layers.0.self_attn." in f".{path}":
                module.weight += scale * (up @ down)
        tokens = backbone.text.load("text_encoder")[0]("a cat", padding="max_length", return_tensors="pt").input_ids
        expected = encoder(tokens)[0]
    context = backbone.embed("a cat").context
    torch.testing.assert_close(context, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(context, plain.embed("a cat").context, atol=1e-3)
    with pytest.raises(BackboneError, match="its LoRA changes the text encoders too"):
        backbone.save_pretrained(tmp_path / "saved")


def test_a_lora_of_another_model_is_refused(sd_folder: Path, vit_folder: Path, tmp_path: Path) -> None:
    weights, _ = kohya(load_backbone(sd_folder).network, 1.0)
    file = tmp_path / "style.safetensors"
    save_file({key: value.repeat_interleave(2, -1) if "down" in key else value for key, value in weights.items()}, file)
    with pytest.raises(BackboneError, match=r"style\.safetensors: does not fit .* another model"):
        load_backbone(sd_folder, lora=file)
    with pytest.raises(BackboneError, match="lora does not go with it"):
        load_backbone(vit_folder, lora=file)
    with pytest.raises(BackboneError, match="there is no such file"):
        load_backbone(sd_folder, lora=tmp_path / "missing.safetensors")
    with pytest.raises(BackboneError, match="scale of a LoRA must be a number, got 'much'"):
        load_backbone(sd_folder, lora=f"{file}:much")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["lora_unet_mid_block.lora_up.weight"], "is a LoRA"),
        (["unet.mid_block.attn.to_q.lora_A.weight"], "is a LoRA"),
        (["first_stage_model.encoder.conv_in.weight", "first_stage_model.decoder.conv_in.weight"], "is a VAE alone"),
        (["encoder.conv_in.weight", "decoder.conv_in.weight"], "is a VAE alone"),
        (["text_model.encoder.layers.0.mlp.fc1.weight"], "is a text encoder alone"),
        (["conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"], "is a U-Net alone"),
        (["double_blocks.0.img_attn.qkv.weight"], "is FLUX in one file"),
        (["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"], "is Stable Diffusion 3 in one file"),
        (["conv_first.weight", "body.0.rdb1.conv1.weight"], "is an upscaler"),
        (["control_model.input_blocks.0.0.weight"], "is a ControlNet"),
        (["model.diffusion_model.input_blocks.0.0.weight"], "holds a U-Net but no VAE"),
        (["something.else"], "of no known model"),
    ],
)
def test_files_that_are_something_else_are_named(
    names: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file.safetensors"
    save_file({name: torch.zeros(2, 2) for name in names}, file)
    assert main(["info", str(file)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "file.safetensors" in error
    assert error.count("\n") == 1


def test_quantised_and_damaged_files_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(40))
    (tmp_path / "empty.safetensors").write_bytes(b"")
    (tmp_path / "cut.safetensors").write_bytes(b"\xff" * 30)
    (tmp_path / "text.ckpt").write_text("not a checkpoint")
    for name, message in (
        ("model.gguf", "is a GGUF file"),
        ("empty.safetensors", "damaged"),
        ("cut.safetensors", "damaged"),
        ("text.ckpt", "can be read safely"),
    ):
        assert main(["info", str(tmp_path / name)]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert name in error
        assert error.count("\n") == 1


@pytest.mark.parametrize(("channels", "what"), [(9, "inpainting"), (8, "editing"), (7, "upscaler"), (5, "depth map")])
def test_networks_conditioned_on_more_than_the_image_are_named(channels: int, what: str, tmp_path: Path) -> None:
    family, unet, vae, encoders = "sd1", *original.parts("sd1")
    weights = original.one_file(family, unet, vae, encoders)
    weights["model.diffusion_model.input_blocks.0.0.weight"] = torch.zeros(32, channels, 3, 3)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(BackboneError, match=what):
        load_backbone(tmp_path / "model.safetensors")


FORMS = {  # how files name the two factors of a layer
    "diffusers": "unet.{}.lora_{}.weight",
    "peft": "base_model.model.{}.lora_{}.weight",
    "of a network alone": "{}.lora_{}.weight",
    "of processors": "unet.{}.lora_{}.weight",
    "of processors alone": "{}.lora_{}.weight",
}


@pytest.mark.parametrize("form", FORMS)
def test_loras_are_read_under_all_their_names(sd_folder: Path, form: str, tmp_path: Path) -> None:
    plain = load_backbone(sd_folder)
    before, generator = dict(plain.network.named_parameters()), torch.Generator().manual_seed(1)
    weights, added = {}, {}
    for layer in ("to_q", "to_out.0"):
        path = f"mid_block.attentions.0.transformer_blocks.0.attn1.{layer}"
        out, inner = before[f"{path}.weight"].shape
        down, up = torch.randn(4, inner, generator=generator), torch.randn(out, 4, generator=generator)
        added[f"{path}.weight"] = up @ down
        for letter, word, factor in (("A", "down", down), ("B", "up", up)):
            key = FORMS[form].format(path, letter)
            if "processors" in form:
                name = layer.removesuffix(".0")
                key = key.replace(f".{layer}.lora_{letter}", f".processor.{name}_lora.{word}")
            weights[key] = factor
    save_file(weights, tmp_path / "style.safetensors")
    backbone = load_backbone(sd_folder, lora=tmp_path / "style.safetensors")
    for name, ours in backbone.network.named_parameters():
        torch.testing.assert_close(ours, before[name] + added.get(name, 0), rtol=1e-5, atol=1e-5)
