"""Backbones as `nn.Module`s: called, moved, trained on top of, printed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from diffrep.backbones import Backbone, BackboneError, Conditions, LatentDiffusion, VisionTransformer, load_backbone

PIXELS = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def test_a_call_reads_the_recommended_taps_with_the_recommended_conditions(sd_folder: Path) -> None:
    backbone = load_backbone(sd_folder)
    taps, conditions = backbone.recommended.taps, backbone.recommended.conditions
    for tap, value in backbone(PIXELS).items():
        assert torch.equal(value, backbone.maps(PIXELS, taps, conditions)[tap])
    assert set(backbone(PIXELS, ["mid", "up.0"], Conditions(timestep=0))) == {"mid", "up.0"}


def test_a_backbone_inside_a_module_moves_with_it_and_stays_frozen_in_evaluation_mode(sd_folder: Path) -> None:
    backbone = load_backbone(sd_folder)
    backbone.maps(PIXELS, ["mid"], Conditions(prompt="a cat"))  # keys and values of the prompt are kept in float32
    whole = nn.ModuleDict({"backbone": backbone, "head": nn.Linear(4, 2)}).train().to(torch.bfloat16)
    assert whole["head"].training
    assert not any(module.training for module in backbone.modules())
    assert [p for p in whole.parameters() if p.requires_grad] == list(whole["head"].parameters())
    assert backbone.dtype == torch.bfloat16
    assert backbone.maps(PIXELS, ["up.1"], Conditions(prompt="a cat"))["up.1"].dtype == torch.bfloat16


def test_loading_other_weights_forgets_what_was_computed_from_the_old_ones(sd_folder: Path) -> None:
    first, second = load_backbone(sd_folder), load_backbone(sd_folder)
    with torch.no_grad():
        for parameter in second.network.parameters():
            parameter += 0.01
    settings = Conditions(prompt="a cat")
    before = first.maps(PIXELS, ["up.1"], settings)["up.1"]
    first.load_state_dict(second.state_dict())
    after = first.maps(PIXELS, ["up.1"], settings)["up.1"]
    assert not torch.equal(before, after)
    assert torch.equal(after, second.maps(PIXELS, ["up.1"], settings)["up.1"])


def test_what_a_backbone_is_stands_in_its_attributes(sd_folder: Path, vit_folder: Path) -> None:
    diffusion, vit = load_backbone(sd_folder), load_backbone(vit_folder)
    assert (diffusion.denoises, diffusion.has_unet, diffusion.multiple) == ("latents", True, 8)
    assert (vit.denoises, vit.has_unet, vit.multiple) == (None, False, 8)
    assert list(diffusion.parts) == ["U-Net", "VAE encoder"]
    assert repr(diffusion).startswith("LatentDiffusion(")
    assert "\n" not in repr(diffusion)


def test_from_pretrained_is_load_backbone_with_a_check_of_the_class(sd_folder: Path) -> None:
    assert isinstance(Backbone.from_pretrained(sd_folder), LatentDiffusion)
    assert LatentDiffusion.from_pretrained(sd_folder, dtype=torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(BackboneError, match="is a LatentDiffusion, no VisionTransformer"):
        VisionTransformer.from_pretrained(sd_folder)
