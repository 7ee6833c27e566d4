"""Public repositories as they are, at small width: loaded, listed, used by the commands, equal to plain diffusers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from diffrep.backbones import Conditions, LatentDiffusion, draw_noise, load_backbone
from diffrep.cli import main

from . import layouts

PIXELS = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
PROMPT = "a cat"


@pytest.fixture(scope="module", params=(*layouts.UNETS, *layouts.TRANSFORMERS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return layouts.build(request.param, tmp_path_factory.mktemp("layouts") / request.param)


def test_every_command_that_takes_a_backbone_takes_it(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        Image.effect_noise((80, 64), 60).convert("RGB").save(tmp_path / f"{name}.png")
    assert main(["info", str(folder), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    loaded = load_backbone(folder)
    assert facts["taps"] == [vars(tap) for tap in loaded.taps()]
    assert facts["parameters"] == {
        name: sum(p.numel() for p in part.parameters()) for name, part in loaded.parts.items()
    }
    assert main(["extract", str(tmp_path), "-o", str(tmp_path / "store"), "--backbone", str(folder)]) == 0
    images = [str(tmp_path / "a.png"), str(tmp_path / "b.png")]
    options = ["--backbone", str(folder), "--points", "10,10", "-o", str(tmp_path / "match.png")]
    assert main(["match", *images, *options]) == 0
    assert (tmp_path / "match.png").is_file()
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("kind", layouts.UNETS)
def test_features_are_those_of_plain_diffusers(kind: str, tmp_path: Path) -> None:
    folder = layouts.build(kind, tmp_path / kind)
    backbone = load_backbone(folder)
    assert isinstance(backbone, LatentDiffusion)
    taps = ["down.1", "mid", "up.0", "up.1"]
    conditions = Conditions(timestep=261, prompt=PROMPT, seed=3)
    maps = backbone.maps(PIXELS, taps, conditions)
    for tap, expected in plain_features(folder, taps, 261, draw_noise((4, 8, 8), 3)).items():
        torch.testing.assert_close(maps[tap], expected, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def plain_features(folder: Path, taps: list[str], timestep: int, noise: Tensor) -> dict[str, Tensor]:
    """What plain diffusers and transformers compute of `PIXELS` and `PROMPT`."""
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(folder / "unet").float().eval()
    vae = AutoencoderKL.from_pretrained(folder / "vae").eval()
    scheduler = DDPMScheduler.from_pretrained(folder / "scheduler")
    latents = vae.encode(PIXELS * 2 - 1).latent_dist.mean * vae.config.scaling_factor
    noisy = scheduler.add_noise(latents, noise.expand_as(latents), torch.tensor([timestep]))
    context, added = prompt_embedding(folder)
    seen: dict[str, Tensor] = {}
    paths = {"down.1": "down_blocks.1", "mid": "mid_block", "up.0": "up_blocks.0", "up.1": "up_blocks.1"}
    for tap in taps:

        def record(module: Any, inputs: Any, output: Any, tap: str = tap) -> None:
            seen[tap] = output if isinstance(output, Tensor) else output[0]

        unet.get_submodule(paths[tap]).register_forward_hook(record)
    unet(noisy, timestep, context.expand(2, -1, -1), added_cond_kwargs=added)
    return seen


def prompt_embedding(folder: Path) -> tuple[Tensor, dict[str, Tensor] | None]:
    """The context of the prompt and, for Stable Diffusion XL and its refiner, pooled text and size conditions."""
    import transformers

    index = json.loads((folder / "model_index.json").read_text())
    parts = [part for part in ("text_encoder", "text_encoder_2") if part in index]
    large = any(index[part][1] == "CLIPTextModelWithProjection" for part in parts)
    states, pooled = [], torch.empty(0)
    for part in parts:
        tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / part.replace("text_encoder", "tokenizer"))
        encoder = getattr(transformers, index[part][1]).from_pretrained(folder / part).float().eval()
        ids = tokenizer(PROMPT, padding="max_length", max_length=layouts.TOKENS, return_tensors="pt").input_ids
        output = encoder(ids, output_hidden_states=True)
        states.append(output.hidden_states[-2] if large else output.last_hidden_state)
        pooled = output[0]
    if not large:
        return states[0], None
    ends = [64, 64] if len(parts) == 2 else [6.0]  # the refiner's aesthetic score
    ids = torch.tensor([[64, 64, 0, 0, *ends]]).float().expand(2, -1)
    return torch.cat(states, dim=-1), {"text_embeds": pooled.expand(2, -1), "time_ids": ids}
