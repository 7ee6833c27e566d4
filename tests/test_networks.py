"""Our networks are diffusers' and timm's, number for number, and starting loads neither of the two."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffrep import load_backbone
from diffrep.backbones import BackboneError, Conditions, networks
from diffrep.backbones.base import Reader, reading
from diffrep.backbones.pipelines import alphas_cumprod, load_component, network_class
from diffrep.backbones.repositories import MODELS
from diffrep.backbones.text import PROMPTS, TextEncoders
from diffrep.backbones.vit_loading import timm_backbone
from diffrep.features import extract

SMALL: dict[str, Any] = {
    "block_out_channels": [16, 32, 32, 32],
    "norm_num_groups": 8,
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "linear projections, heads by level": {"use_linear_projection": True, "attention_head_dim": [2, 4, 4, 8]},
    "depths of layers and levels": {
        "layers_per_block": [1, 2, 2, 1],
        "transformer_layers_per_block": [1, 2, 1, 3],
        "upcast_attention": True,
    },
    "sines first, shifted": {"flip_sin_to_cos": False, "freq_shift": 1, "norm_eps": 1e-3},
    "task vector": {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 4, "in_channels": 8},
    "sizes and pooled text": {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 6,
        "projection_class_embeddings_input_dim": 6 * 6 + 10,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    },
}
FAR = {  # what ours is not built for
    "attention_type": "gated",
    "class_embed_type": "timestep",
    "resnet_time_scale_shift": "scale_shift",
    "mid_block_type": "UNetMidBlock2D",
    "down_block_types": ["AttnDownBlock2D"] * 4,
    "an option of tomorrow": True,
}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_the_unet_is_diffusers(name: str) -> None:
    config = {**SMALL, **VARIANTS[name]}
    torch.manual_seed(0)
    theirs = UNet2DConditionModel(**config).eval()
    assert networks.UNet2DConditionModel.fits(config)
    assert networks.UNet2DConditionModel.fits(dict(theirs.config))
    ours = networks.UNet2DConditionModel(config).eval()
    ours.load_state_dict(theirs.state_dict())
    named: dict[str, Any] = {"encoder_hidden_states": noise(2, 5, 24)}
    if "task" in name:
        named["class_labels"] = noise(2, 4)
    if "pooled" in name:
        named["added_cond_kwargs"] = {"text_embeds": noise(2, 10), "time_ids": noise(2, 6) * 100}
    for size, timestep in (((16, 24), 261), ((13, 10), torch.tensor([3, 999]))):  # odd sides are not halved evenly
        latents = noise(2, config.get("in_channels", 4), *size)
        expected = theirs(latents, timestep, **named).sample
        torch.testing.assert_close(ours(latents, timestep, **named).sample, expected, rtol=1e-5, atol=1e-5)
    places = {name for name, _ in theirs.named_modules() if "dropout" not in name and not name.endswith("to_out.1")}
    assert places == {name for name, _ in ours.named_modules()}


@pytest.mark.parametrize("attention", [True, False])
@torch.no_grad()
def test_the_vae_is_diffusers(attention: bool) -> None:
    config = {
        "block_out_channels": [8, 16, 16],
        "down_block_types": ["DownEncoderBlock2D"] * 3,
        "up_block_types": ["UpDecoderBlock2D"] * 3,
        "layers_per_block": 2,
        "norm_num_groups": 4,
        "mid_block_add_attention": attention,
        "use_quant_conv": attention,
        "use_post_quant_conv": attention,
    }
    torch.manual_seed(0)
    theirs = AutoencoderKL(**config).eval()
    ours = networks.AutoencoderKL(config).eval()
    assert networks.AutoencoderKL.fits(config)
    ours.load_state_dict(theirs.state_dict())
    images = noise(2, 3, 36, 44)
    expected, got = theirs.encode(images).latent_dist, ours.encode(images).latent_dist
    for a, b in ((expected.mean, got.mean), (expected.std, got.std)):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)
    drawn = theirs.decode(expected.mean).sample
    torch.testing.assert_close(ours.decode(expected.mean).sample, drawn, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.decode(expected.mean, return_dict=False)[0], drawn, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_an_attention_that_writes_its_weights_down_is_the_same() -> None:
    attention = networks.Attention(32, 4, 24)
    places, context = noise(2, 7, 32), noise(2, 5, 24)
    fused = attention(places, context)
    attention.fused = False
    torch.testing.assert_close(attention(places, context), fused)


@pytest.mark.parametrize("key", FAR)
def test_other_configurations_are_left_to_diffusers(key: str) -> None:
    assert network_class("UNet2DConditionModel", SMALL) is networks.UNet2DConditionModel
    assert network_class("UNet2DConditionModel", {**SMALL, key: FAR[key]}) is UNet2DConditionModel
    assert network_class("UNet2DConditionModel", {**SMALL, "down_block_types": [{}]}) is UNet2DConditionModel


@torch.no_grad()
def test_weights_are_read_in_shards_in_half_precision_and_under_former_names(tmp_path: Path) -> None:
    config = {
        "block_out_channels": [8, 8],
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "norm_num_groups": 4,
    }
    torch.manual_seed(0)
    theirs = AutoencoderKL(**config).half().eval()
    former = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = {}
    for key, value in theirs.state_dict().items():
        for new, old in former.items():
            key = key.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        weights[key] = value
    assert any(".query." in key for key in weights)
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL", **config}))
    names = sorted(weights)
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = tmp_path / "vae" / f"diffusion_pytorch_model-0000{number}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, file)
    read = load_component(networks.AutoencoderKL, tmp_path, "vae", torch.float32)
    assert read.dtype == torch.float32
    images = noise(1, 3, 16, 16)
    expected = theirs.float().encode(images).latent_dist.mean
    torch.testing.assert_close(read.encode(images).latent_dist.mean, expected)

    (tmp_path / "vae" / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(BackboneError, match="vae has missing keys"):
        load_component(networks.AutoencoderKL, tmp_path, "vae", torch.float32)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 900},
        {"beta_schedule": "squaredcos_cap_v2", "rescale_betas_zero_snr": True},
        {"trained_betas": [0.1, 0.2, 0.3]},
    ],
)
def test_schedules_are_diffusers(config: dict[str, Any]) -> None:
    from diffusers import DDIMScheduler

    assert torch.equal(alphas_cumprod(config), DDIMScheduler(**config).alphas_cumprod)


@pytest.mark.parametrize("count", [-1, 0, 10**9, "1000", 1.5])
def test_a_schedule_of_any_other_length_is_refused_before_it_is_made(count: Any) -> None:
    with pytest.raises(BackboneError, match=r"num_train_timesteps must lie in 1..100,000, got"):
        alphas_cumprod({"num_train_timesteps": count})


def test_the_embedded_vit_is_timms() -> None:
    ours, folder = load_backbone("tiny-dino"), MODELS / "tiny-dino"
    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    theirs = timm_backbone(
        config["architecture"], model_args=config["model_args"], weights=weights, config=config["pretrained_cfg"],
        name="theirs", source="test",
    )  # fmt: skip
    for sides in ((128, 128), (120, 96)):
        pixels = torch.rand(2, 3, *sides, generator=torch.Generator().manual_seed(1))
        taps = ["layer.0", "layer.4", "layer.3.key"]
        expected, got = theirs.maps(pixels, taps), ours.maps(pixels, taps)
        for tap in taps:
            torch.testing.assert_close(got[tap], expected[tap], rtol=1e-5, atol=1e-5)
    with reading({"end": Reader(ours.network)}) as end, torch.inference_mode():
        ours.network(pixels)
    with torch.inference_mode():
        torch.testing.assert_close(end["end"], theirs.network.forward_features(pixels), rtol=1e-5, atol=1e-5)


def test_stored_prompts_are_the_text_encoders() -> None:
    text = TextEncoders(str(MODELS / "tiny"))
    stored = text.encode([""])[""].context
    assert text.times_loaded == 0
    assert (MODELS / "tiny" / PROMPTS).is_file()
    text.adapters.append(lambda part, encoder: None)  # as a LoRA does: what is stored may no longer be true
    torch.testing.assert_close(text.encode([""])[""].context, stored, rtol=1e-5, atol=1e-5)
    assert text.times_loaded == 1
    text.adapters.clear()
    both = text.encode(["", "a cat"])
    assert text.times_loaded == 2
    assert list(both) == ["", "a cat"]


def test_features_of_a_folder_are_those_of_diffusers_network(sd_folder: Path) -> None:
    backbone = load_backbone(sd_folder)
    assert type(backbone.network) is networks.UNet2DConditionModel
    image = Image.new("RGB", (64, 64), (200, 120, 40))
    clean = Conditions(timestep=50, clean=True, posterior="mean")
    got = extract(backbone, image, taps=["up.1"], timestep=clean.timestep, clean=True, posterior="mean")
    backbone.network = UNet2DConditionModel.from_pretrained(sd_folder / "unet").eval().requires_grad_(False)
    backbone.vae.encoder = AutoencoderKL.from_pretrained(sd_folder / "vae").eval().encoder
    expected = extract(backbone, image, taps=["up.1"], timestep=clean.timestep, clean=True, posterior="mean")
    torch.testing.assert_close(got.maps["up.1"], expected.maps["up.1"], rtol=1e-5, atol=1e-5)


# -- what starts --------------------------------------------------------------------------------------------

HEAVY = ["diffusers", "transformers", "timm", "torchvision", "scipy", "sklearn", "pandas", "torch._dynamo", "peft"]


@pytest.mark.parametrize(
    ("command", "also"),
    [
        (["match", "a.png", "b.png", "--points", "10,10", "-o", "match.png"], ["matplotlib"]),
        (["depth", "a.png", "-o", "depth"], []),
        (["segment", "a.png", "-o", "mask"], ["matplotlib"]),
    ],
)
def test_embedded_models_answer_without_the_large_libraries(
    tmp_path: Path, command: list[str], also: list[str]
) -> None:
    for name in ("a", "b"):
        Image.effect_noise((96, 64), 80).convert("RGB").save(tmp_path / f"{name}.png")
    names = [*HEAVY, *also]
    program = f"import sys; from diffrep.cli import main; code = main({command!r})\n" + (
        f"print('LOADED', *[name for name in {names!r} if name in sys.modules]); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "LOADED"
