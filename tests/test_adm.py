"""ADM checkpoints: what is inferred, what is refused, and that extraction ends at its tap."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffrep.backbones import AdmArchitecture, BackboneError, Conditions, PixelDiffusion, TapError, load_backbone
from diffrep.backbones.pixel_diffusion import adm_backbone, convert

MODEL = Path(__file__).parent / "parity" / "data" / "features" / "dift-adm" / "model"
FLAGS = {"num_head_channels": 4, "norm_groups": 4, "image_size": 32}
PIXELS = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
TOLD = Conditions(timestep=90, ensemble=2)


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return load_file(MODEL / "adm_unet.safetensors")


@pytest.fixture(scope="module")
def adm(weights: dict[str, Tensor]) -> PixelDiffusion:
    return adm_backbone(weights, FLAGS, name="adm")


def test_a_published_file_is_read_as_it_is(weights: dict[str, Tensor], adm: PixelDiffusion, tmp_path: Path) -> None:
    torch.save(weights, tmp_path / "model.pt")
    save_file(weights, tmp_path / "model.safetensors")
    for file in ("model.pt", "model.safetensors"):
        again = load_backbone(tmp_path / file, adm=FLAGS)
        assert isinstance(again, PixelDiffusion)
        for key, value in again.network.state_dict().items():
            assert torch.equal(value, adm.network.state_dict()[key])


def test_a_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    torch.save({"weights": Path("anything")}, tmp_path / "model.pt")
    with pytest.raises(BackboneError, match="can be read safely"):
        load_backbone(tmp_path / "model.pt")
    torch.save({"state": {"a": torch.ones(1)}}, tmp_path / "nested.pt")
    with pytest.raises(BackboneError, match="no plain state dict"):
        load_backbone(tmp_path / "nested.pt")
    with pytest.raises(BackboneError, match="there is no such file"):
        load_backbone(tmp_path / "missing.pt")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({}, "do not split into 32 groups"),
        ({"norm_groups": 4}, "does not split by num_head_channels 64"),
        ({"norm_groups": 4, "num_head_channels": -1}, "needs num_heads"),
        ({**FLAGS, "noise_schedule": "square"}, "linear or cosine"),
        ({**FLAGS, "resblock_updown": False}, "size mismatch|Missing key"),
    ],
)
def test_flags_that_do_not_fit_are_named(weights: dict[str, Tensor], flags: dict[str, Any], message: str) -> None:
    with pytest.raises(BackboneError, match=message):
        adm_backbone(weights, flags, name="adm")


def test_other_tensors_are_no_adm(weights: dict[str, Tensor]) -> None:
    with pytest.raises(BackboneError, match="is no guided-diffusion U-Net"):
        adm_backbone({"conv_in.weight": torch.ones(1)}, name="x")
    with pytest.raises(BackboneError, match=r"the tensor extra\.weight has no place"):
        adm_backbone({**weights, "extra.weight": torch.ones(1)}, FLAGS, name="x")
    half = {**weights, "time_embed.0.weight": torch.ones(32, 16)}
    with pytest.raises(BackboneError, match="512 x 512 model is built so"):
        adm_backbone(half, FLAGS, name="x")


def test_a_fixed_number_of_heads_is_kept_on_every_level(weights: dict[str, Tensor]) -> None:
    shapes = {key: tuple(value.shape) for key, value in weights.items()}
    flags = {**FLAGS, "num_head_channels": -1, "num_heads": 2}
    architecture = AdmArchitecture.infer(shapes, flags)
    network = architecture.build()
    network.load_state_dict(convert(weights, architecture))
    attentions = [m for m in network.modules() if type(m).__name__ == "Attention"]
    assert attentions
    assert all(a.heads == 2 and a.scale == pytest.approx((a.to_q.out_features / 2) ** -0.5) for a in attentions)


def test_claimed_channels_and_strides_are_true(adm: PixelDiffusion) -> None:
    taps = adm.taps()
    maps = adm.maps(PIXELS, [tap.name for tap in taps], TOLD)
    for tap in taps:
        assert maps[tap.name].shape == (2, tap.channels, 32 // tap.stride, 48 // tap.stride), tap


@pytest.mark.parametrize("tap", ["block.1", "block.6", "mid", "block.13", "up.2"])
def test_nothing_runs_behind_the_deepest_tap(adm: PixelDiffusion, tap: str) -> None:
    path, ran = adm.tap(tap).module, []
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
        for name, module in adm.network.named_modules()
    ]
    early = adm.maps(PIXELS, [tap], TOLD)[tap]
    for handle in handles:
        handle.remove()
    assert ran[-1] == path or ran[-1].startswith(f"{path}.")
    assert torch.equal(early, adm.maps(PIXELS, [tap, "out"], TOLD)[tap])


def test_draws_do_not_depend_on_the_batch(adm: PixelDiffusion) -> None:
    together = adm.maps(PIXELS, ["block.10"], TOLD, batch_size=3)["block.10"]
    alone = torch.cat([adm.maps(p[None], ["block.10"], TOLD, batch_size=1)["block.10"] for p in PIXELS])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    members = adm.maps(PIXELS, ["block.10"], TOLD, average=False)["block.10"]
    torch.testing.assert_close(members.unflatten(0, (2, 2)).mean(1), together, rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_refused(adm: PixelDiffusion) -> None:
    assert adm.dift_tap(0) == "block.11"  # three levels of two layers: nine input blocks, then the middle
    with pytest.raises(TapError, match=r"output blocks 0\.\.8, got index 9"):
        adm.dift_tap(9)
    with pytest.raises(ValueError, match="multiples of 4"):
        adm.maps(PIXELS[..., :30], ["mid"], TOLD)
    with pytest.raises(ValueError, match="noise must be"):
        adm.maps(PIXELS, ["mid"], TOLD, noise=torch.zeros(1, 3, 32, 48))


def test_a_class_conditional_network_must_be_told_a_class() -> None:
    folder = MODEL.parents[2] / "classification-probes" / "adm_unet_classcond_conv_neworder" / "model"
    flags = {"num_head_channels": 4, "norm_groups": 4, "use_new_attention_order": True, "image_size": 16}
    backbone = adm_backbone(load_file(folder / "official_state_dict.safetensors"), flags, name="cond")
    pixels = PIXELS[:1, :, :16, :16]
    one, two = (backbone.maps(pixels, ["mid"], Conditions(timestep=9, label=label))["mid"] for label in (0, 1))
    assert not torch.allclose(one, two)
    with pytest.raises(ValueError, match=r"say a label, 0\.\.4"):
        backbone.maps(pixels, ["mid"], Conditions(timestep=9))
    with pytest.raises(ValueError, match=r"classes 0\.\.4, got \[5\]"):
        backbone.maps(pixels, ["mid"], Conditions(timestep=9, label=5))
