"""Few steps: LoRAs and models that were distilled by LCM, painted with its sampler."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from diffrep import load_backbone, sample
from diffrep.backbones.diffusion import keyed_generator
from diffrep.backbones.latent_diffusion import guidance_embedding
from diffrep.cli import main
from diffrep.images import load_image
from diffrep.sampling.samplers import build_table
from diffrep.sampling.schedules import SamplingError, TableVP

TARGETS = (  # of the published LCM-LoRAs
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2",
    "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
)  # fmt: skip


def lcm_lora(unet: Any, rank: int = 2, alpha: float = 1.0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A random LoRA in the form in which LCM-LoRAs are published, and the weights that it makes of a U-Net's."""
    generator, tensors, merged = torch.Generator().manual_seed(0), {}, {}
    for name, weight in unet.state_dict().items():
        layer = name.removesuffix(".weight")
        if not (name.endswith(".weight") and layer.endswith(TARGETS)):
            continue
        down = 0.3 * torch.randn(rank, *weight.shape[1:], generator=generator)
        up = 0.3 * torch.randn(len(weight), rank, *[1] * (weight.ndim - 2), generator=generator)
        key = f"lora_unet_{layer.replace('.', '_')}"
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(alpha)}
        added = torch.einsum("or,r...->o...", up.flatten(1), down)
        merged[name] = weight + alpha / rank * added
    return tensors, merged


@pytest.fixture(scope="module")
def lora(sd_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    tensors, merged = lcm_lora(load_backbone(sd_folder, device="cpu").network)
    file = tmp_path_factory.mktemp("lora") / "lcm-lora.safetensors"
    save_file(tensors, file)
    return file, merged


def test_an_lcm_lora_changes_every_layer_that_it_names(sd_folder: Path, lora: tuple[Path, dict[str, Tensor]]) -> None:
    file, merged = lora
    assert {target for target in TARGETS if any(f".{target}.weight" in f".{name}" for name in merged)} == {*TARGETS}
    weights = load_backbone(f"{sd_folder}?lora={file}", device="cpu").network.state_dict()
    for name, weight in merged.items():
        torch.testing.assert_close(weights[name], weight, atol=1e-5, rtol=1e-5)


def test_four_steps_with_an_lcm_lora_are_those_of_diffusers(
    sd_folder: Path, lora: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    from diffusers import LCMScheduler

    backbone = load_backbone(f"{sd_folder}?lora={lora[0]}", decoder=True, device="cpu")
    painted = sample(backbone, "a fox", sampler="lcm", steps=4, guidance=1.0, seed=3)
    scheduler = LCMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    scheduler.set_timesteps(4)
    assert painted.calls == len(scheduler.timesteps) == 4
    x, context = torch.randn(1, 4, 16, 16, generator=keyed_generator(3, 0)), backbone.embed("a fox").context
    with torch.inference_mode():
        for step, t in enumerate(scheduler.timesteps):
            output = backbone.network(x, t, encoder_hidden_states=context).sample
            clean = scheduler.step(output, t, x).denoised
            if step == 3:
                break
            after = scheduler.alphas_cumprod[scheduler.timesteps[step + 1]]
            noise = torch.randn(4, 16, 16, generator=keyed_generator(3, 0, stream=step + 1))
            x = after.sqrt() * clean + (1 - after).sqrt() * noise
    torch.testing.assert_close(painted.latents, clean, atol=1e-3, rtol=1e-3)
    options = ["--model", str(sd_folder), "--sampler", "lcm", "--steps", "4", "--seed", "3", "--device", "cpu"]
    for name, more in (("lora.png", ["--lora", str(lora[0])]), ("plain.png", [])):
        assert main(["sample", "a fox", *options, *more, "-o", str(tmp_path / name)]) == 0
    pictures = [load_image(tmp_path / name) for name in ("lora.png", "plain.png")]
    assert pictures[0].size == (128, 128)
    assert pictures[0].tobytes() == painted.picture().tobytes()
    assert pictures[0].tobytes() != pictures[1].tobytes()


def test_a_model_that_is_told_its_guidance_hears_it(sd_folder: Path, tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    folder = tmp_path / "lcm"
    shutil.copytree(sd_folder, folder)
    unet: Any = UNet2DConditionModel.from_pretrained(sd_folder / "unet")
    torch.manual_seed(0)  # the new layer's weights take their draws from the global generator
    told: Any = UNet2DConditionModel.from_config(unet.config, time_cond_proj_dim=32)
    told.load_state_dict(unet.state_dict(), strict=False)
    told.save_pretrained(folder / "unet")
    backbone = load_backbone(folder, decoder=True, device="cpu")
    painted = {w: sample(backbone, "a fox", sampler="lcm", steps=1, guidance=w).latents for w in (2.0, 8.0)}
    assert (painted[2.0] - painted[8.0]).abs().max() > 1e-3
    x = torch.randn(1, 4, 16, 16, generator=keyed_generator(0, 0))
    with torch.inference_mode():
        condition, context = guidance_embedding(torch.tensor([7.0]), 32), backbone.embed("a fox").context
        output = told(x, 999, encoder_hidden_states=context, timestep_cond=condition).sample
    alpha = backbone.alphas_cumprod[999]
    clean = (x - (1 - alpha).sqrt() * output) / alpha.sqrt()
    torch.testing.assert_close(painted[8.0], clean, atol=1e-3, rtol=1e-3)


def test_the_steps_of_lcm_are_picked_from_those_it_was_distilled_on() -> None:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    schedule = TableVP((1 - betas).cumprod(0).numpy())
    picked = {1: [999], 2: [999, 499], 4: [999, 759, 499, 259], 8: [999, 879, 759, 639, 499, 379, 259, 139]}
    for steps, timesteps in picked.items():
        assert build_table("lcm", schedule, steps).grid.labels.tolist() == timesteps
    assert build_table("lcm", schedule, 4, spacing="trailing").grid.labels.tolist() == [999, 749, 499, 249]
    with pytest.raises(SamplingError, match="twice"):
        build_table("lcm", schedule, 60)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["a fox", "--label", "3"], "give one"),
        (["--schedule", "missing.json", "--steps", "4"], "leave --steps"),
        (["--sampler", "golden"], "no sampler 'golden'"),
        (["-o", "a.txt"], "a.txt"),
    ],
)
def test_what_cannot_be_painted_is_one_line(
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["sample", *options]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
