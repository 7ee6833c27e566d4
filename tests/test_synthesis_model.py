"""Models for synthesis on disk: ours, embedded parts shared, the authors' checkpoints."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffrep.backbones import BackboneError
from diffrep.backbones.weight_files import read_weights
from diffrep.cli import main
from diffrep.synthesis import About, ConditionEmbedder, SynthesisModel, load_synthesis, sample_patches
from diffrep.synthesis.checkpoints import convert_official
from diffrep.synthesis.sampler import SynthesisSettings

OFFICIAL = {
    "linear_start": 0.0015,
    "linear_end": 0.0195,
    "timesteps": 1000,
    "unet_config": {
        "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
        "params": {
            "image_size": 8,
            "in_channels": 3,
            "out_channels": 3,
            "model_channels": 8,
            "attention_resolutions": [2],
            "num_res_blocks": 2,
            "channel_mult": [1, 2],
            "num_heads": 2,
            "use_spatial_transformer": True,
            "context_dim": 12,
        },
    },
    "first_stage_config": {
        "params": {
            "embed_dim": 3,
            "n_embed": 16,
            "ddconfig": {
                "z_channels": 3,
                "resolution": 16,
                "in_channels": 3,
                "out_ch": 3,
                "ch": 8,
                "ch_mult": [1, 2],
                "num_res_blocks": 1,
                "attn_resolutions": [8],
            },
        }
    },
    "cond_stage_config": {"params": {"patch_embed_dim": 5, "region_embed_dim": 4, "target_dim": 12}},
}


def small_model(about: About | None = None, *, channels: int = 3, dims: tuple[int, ...] = (5, 4)) -> SynthesisModel:
    """Random weights: one level of attention, VQ autoencoder of factor 2, two tokens."""
    from diffusers import UNet2DConditionModel, VQModel

    torch.manual_seed(0)  # the libraries draw initial weights from the global generator
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=12,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    autoencoder = VQModel(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=3,
        num_vq_embeddings=16,
        norm_num_groups=4,
        scaling_factor=0.7,
    )
    scheduler = {"beta_start": 0.0015, "beta_end": 0.0195, "beta_schedule": "scaled_linear"}
    return SynthesisModel(unet, ConditionEmbedder(dims, 12), autoencoder, scheduler, about=about).eval()


def test_a_folder_reads_back_as_it_was(tmp_path: Path) -> None:
    model = small_model(About(encoder="tiny-dino", pooling="mean", guidance=3.0))
    model.save(tmp_path / "model")
    other = load_synthesis(tmp_path / "model")
    assert other.checksum() == model.checksum()
    assert other.about == model.about
    assert (other.window, other.factor, other.channels) == (8, 2, 3)
    x, t = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([5.0, 900.0])
    embeddings = [torch.ones(2, 5), torch.ones(2, 4)]
    with torch.no_grad():
        assert torch.equal(other(x, t, other.context(*embeddings)), model(x, t, model.context(*embeddings)))
    other.save(tmp_path / "again")  # a network that was read from disk remembers where
    for part in ("unet", "vqvae"):
        again, first = (json.loads((tmp_path / f / part / "config.json").read_text()) for f in ("again", "model"))
        assert again == first
    assert not other.training
    assert not any(p.requires_grad for p in other.parameters())


def test_the_autoencoder_of_another_model(tmp_path: Path) -> None:
    small_model().save(tmp_path / "base")
    small_model(About(autoencoder="../base")).save(tmp_path / "head")
    assert not (tmp_path / "head" / "vqvae").exists()
    assert load_synthesis(tmp_path / "head").checksum() == small_model().checksum()
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(BackboneError, match=r"its autoencoder is that of \.\./base, which is no folder"):
        load_synthesis(tmp_path / "head")


def test_the_autoencoder_is_no_part_of_what_is_trained_but_moves_along() -> None:
    model = small_model()
    assert not any("autoencoder" in name for name in model.state_dict())
    model.double()
    assert next(model.autoencoder.parameters()).dtype == torch.float64
    images = torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(1))
    latents = model.encode(images)
    assert latents.shape == (1, 3, 8, 12)
    assert model.decode(latents).shape == images.shape
    plain = model.autoencoder.encode(images.double() * 2 - 1).latents
    torch.testing.assert_close(latents, plain * 0.7)


def test_embedder() -> None:
    embedder = ConditionEmbedder([5, 4], 12)
    embedding = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    # the length of an embedding does not matter, the null is the bias, tokens left out are null
    torch.testing.assert_close(embedder(embedding), embedder(10 * embedding))
    torch.testing.assert_close(embedder(torch.zeros(3, 5), torch.zeros(3, 4)), embedder.null(3))
    torch.testing.assert_close(embedder(embedding)[:, 1], embedder.null(3)[:, 1])
    with pytest.raises(ValueError, match=r"embedding 1 of this model is 4 wide: give \(B, 4\), got \(3, 5\)"):
        embedder(embedding, embedding)
    with pytest.raises(ValueError, match="takes 1 to 2 embeddings an image, got 3"):
        embedder(embedding, embedding, embedding)


def test_patches_do_not_depend_on_their_company() -> None:
    model, settings = small_model(), SynthesisSettings(steps=3, scheduler="dpmpp_2m_sde", guidance=2.0)
    embeddings = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    together = sample_patches(model, embeddings, settings)
    first = sample_patches(model, embeddings[:2], settings)
    torch.testing.assert_close(together[:2], first, atol=1e-4, rtol=1e-4)
    assert together.shape == (5, 3, 8, 8)
    assert not torch.allclose(together[0], together[1], atol=0.1)


def test_errors_of_folders(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match="no such folder; give a folder with unet and embedder"):
        load_synthesis(tmp_path / "nothing")
    with pytest.raises(BackboneError, match=r"unet/config\.json, scheduler/scheduler_config\.json missing"):
        load_synthesis(tmp_path)
    small_model().save(tmp_path / "model")
    (tmp_path / "model" / "synthesis.json").write_text('{"colour": 1}')
    with pytest.raises(BackboneError, match=r"synthesis.json: About has no colour; it has autoencoder, encoder"):
        load_synthesis(tmp_path / "model")
    (tmp_path / "model" / "synthesis.json").unlink()
    weights = load_file(tmp_path / "model" / "embedder" / "model.safetensors")
    weights["tokens.0.bias"][0] = float("nan")
    save_file(weights, tmp_path / "model" / "embedder" / "model.safetensors")
    with pytest.raises(BackboneError, match=r"weight tokens\.0\.bias has NaN"):
        load_synthesis(tmp_path / "model")
    with pytest.raises(ValueError, match="the U-Net takes 4 channels, the autoencoder gives 3"):
        small_model(channels=4)


# -- the authors' checkpoints -------------------------------------------------------------------------------


def official_weights(*, ema: bool) -> dict[str, Tensor]:
    """Random tensors under the official names, made by undoing the map."""
    from diffusers import UNet2DConditionModel, VQModel

    from diffrep.synthesis import checkpoints

    unet_config = checkpoints.official_unet_config(OFFICIAL["unet_config"]["params"], 4)  # type: ignore[index]
    coder_config = checkpoints.official_autoencoder_config(OFFICIAL["first_stage_config"]["params"], 4)  # type: ignore[index]
    generator = torch.Generator().manual_seed(2)
    names = official_names()
    shapes = {k: v.shape for k, v in UNet2DConditionModel(**unet_config).state_dict().items()}
    coder = {k: v.shape for k, v in VQModel(**coder_config).state_dict().items()}
    found: dict[str, Tensor] = {"betas": torch.ones(1000), "model_ema.decay": torch.tensor(0.9)}
    for name in names["unet"]:
        value = torch.randn(shapes[checkpoints.unet_name(name, 2, 2)], generator=generator)
        found[f"model.diffusion_model.{name}"] = value
        if ema:
            found["model_ema.diffusion_model" + name.replace(".", "")] = value + 1
    for name in names["autoencoder"]:
        shape = coder[checkpoints.autoencoder_name(name, 2)]
        square = ".attn" in name and len(shape) == 2
        found[f"first_stage_model.{name}"] = torch.randn(*shape, *((1, 1) if square else ()), generator=generator)
    found["first_stage_model.loss.logvar"] = torch.zeros(1)
    for token, dim in (("patch_fc", 5), ("region_fc", 4)):
        found[f"cond_stage_model.{token}.weight"] = torch.randn(12, dim, generator=generator)
        found[f"cond_stage_model.{token}.bias"] = torch.randn(12, generator=generator)
    return found


def official_names() -> dict[str, list[str]]:
    """The names of an official U-Net of two levels of two blocks and of an autoencoder with attention, written out."""
    pair = ("weight", "bias")
    res = ["in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3"]
    inner = [f"{a}.{p}" for a in ("attn1", "attn2") for p in ("to_q", "to_k", "to_v")]
    blocks = [f"transformer_blocks.0.{name}.weight" for name in inner]
    rest = ["attn1.to_out.0", "attn2.to_out.0", "ff.net.0.proj", "ff.net.2", "norm1", "norm2", "norm3"]
    blocks += [f"transformer_blocks.0.{name}.{k}" for name in rest for k in pair]
    blocks += [f"{name}.{k}" for name in ("norm", "proj_in", "proj_out") for k in pair]
    places = {  # res block -> has a skip; then the places of transformers and plain layers
        "input_blocks.1.0": False, "input_blocks.2.0": False, "input_blocks.4.0": True, "input_blocks.5.0": False,
        "middle_block.0": False, "middle_block.2": False,
        **{f"output_blocks.{k}.0": True for k in range(6)},
    }  # fmt: skip
    attention = ["input_blocks.4.1", "input_blocks.5.1", "middle_block.1", *(f"output_blocks.{k}.1" for k in range(3))]
    plain = ["time_embed.0", "time_embed.2", "input_blocks.0.0", "input_blocks.3.0.op", "out.0", "out.2"]
    unet = [f"{place}.{name}.{k}" for place in places for name in res for k in pair]
    unet += [f"{place}.skip_connection.{k}" for place, skip in places.items() if skip for k in pair]
    unet += [f"{place}.{name}" for place in attention for name in blocks]
    unet += [f"{name}.{k}" for name in [*plain, "output_blocks.2.2.conv"] for k in pair]

    block = ["norm1", "conv1", "norm2", "conv2"]
    coder = []
    for side, resolution in (("encoder", "down"), ("decoder", "up")):
        levels = {"0": 1 if side == "encoder" else 2, "1": 1 if side == "encoder" else 2}
        for level, count in levels.items():
            for k in range(count):
                coder += [f"{side}.{resolution}.{level}.block.{k}.{name}" for name in block]
                if level == "1":
                    coder += [f"{side}.{resolution}.1.attn.{k}.{name}" for name in ("norm", "q", "k", "v", "proj_out")]
        coder += [f"{side}.mid.block_{k}.{name}" for k in (1, 2) for name in block]
        coder += [f"{side}.mid.attn_1.{name}" for name in ("norm", "q", "k", "v", "proj_out")]
        coder += [f"{side}.{name}" for name in ("conv_in", "norm_out", "conv_out")]
    coder += ["encoder.down.0.downsample.conv", "decoder.up.1.upsample.conv", "quant_conv", "post_quant_conv"]
    coder += ["encoder.down.1.block.0.nin_shortcut", "decoder.up.0.block.0.nin_shortcut"]
    return {"unet": unet, "autoencoder": [f"{n}.{k}" for n in coder for k in pair] + ["quantize.embedding.weight"]}


def write_lightning(path: Path, weights: dict[str, Tensor]) -> None:
    """A checkpoint as Lightning 1.4 writes it: callbacks by their class, which nobody has who reads it."""
    module = types.ModuleType("some_lightning")

    class Saver:
        pass

    Saver.__module__, Saver.__qualname__ = module.__name__, "Saver"
    module.Saver = Saver  # type: ignore[attr-defined]
    sys.modules[module.__name__] = module
    state = Saver()
    state.best = 1.5  # type: ignore[attr-defined]
    try:
        torch.save({"state_dict": weights, "callbacks": {Saver: {"state": state}}, "epoch": 3}, path)
    finally:
        del sys.modules[module.__name__]


def test_lightning_checkpoints_are_read_without_lightning(tmp_path: Path) -> None:
    write_lightning(tmp_path / "last.ckpt", {"a.weight": torch.arange(6.0).reshape(2, 3)})
    weights = read_weights(tmp_path / "last.ckpt")
    assert torch.equal(weights["a.weight"], torch.arange(6.0).reshape(2, 3))


def test_nothing_that_a_checkpoint_names_is_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[object, ...]]:
            return (exec, (f"open({str(marker)!r}, 'w')",))

    torch.save({"state_dict": {"a": torch.zeros(1)}, "callbacks": Evil()}, tmp_path / "evil.ckpt")
    assert list(read_weights(tmp_path / "evil.ckpt")) == ["a"]
    assert not marker.exists()
    (tmp_path / "torn.ckpt").write_bytes((tmp_path / "evil.ckpt").read_bytes()[:300])
    with pytest.raises(BackboneError, match=r"torn\.ckpt: is no checkpoint that can be read safely"):
        read_weights(tmp_path / "torn.ckpt")


@pytest.mark.parametrize("ema", [False, True])
def test_conversion_moves_every_tensor(ema: bool) -> None:
    weights = official_weights(ema=ema)
    model = convert_official(weights, OFFICIAL, groups=4)
    resnet = model.unet.up_blocks[0].resnets[2]
    moved = weights["model.diffusion_model.output_blocks.2.0.in_layers.2.weight"]
    assert torch.equal(resnet.conv1.weight, moved + 1 if ema else moved)
    attention = weights["first_stage_model.decoder.up.1.attn.1.q.weight"]
    assert torch.equal(model.autoencoder.decoder.up_blocks[0].attentions[1].to_q.weight, attention[:, :, 0, 0])
    assert torch.equal(model.embedder.tokens[1].weight, weights["cond_stage_model.region_fc.weight"])
    assert model.unet.config.attention_head_dim == 2
    assert model.autoencoder.config.scaling_factor == 1.0
    scaled = convert_official(weights | {"scale_factor": torch.tensor(0.5)}, OFFICIAL, groups=4)
    assert scaled.autoencoder.config.scaling_factor == 0.5


def test_conversion_refuses_what_it_does_not_know() -> None:
    weights = official_weights(ema=False)
    key = "model.diffusion_model.middle_block.1.proj_in.weight"
    with pytest.raises(BackboneError, match=r"U-Net does not fit its configuration.*mid_block\.attentions\.0\.proj_in"):
        convert_official({k: v for k, v in weights.items() if k != key}, OFFICIAL, groups=4)
    with pytest.raises(BackboneError, match=r"middle_block\.7\.x, which is no part"):
        convert_official(weights | {"model.diffusion_model.middle_block.7.x": torch.zeros(1)}, OFFICIAL, groups=4)
    params = {k: v for k, v in OFFICIAL["unet_config"]["params"].items() if k != "num_heads"}  # type: ignore[index]
    with pytest.raises(BackboneError, match="neither num_heads nor num_head_channels"):
        convert_official(weights, {**OFFICIAL, "unet_config": params}, groups=4)
    with pytest.raises(BackboneError, match="has a moving average, but without"):
        convert_official(weights | {"model_ema.diffusion_modelout0weight": torch.zeros(1)}, OFFICIAL, groups=4)


def test_convert_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "brca"
    (source / "checkpoints").mkdir(parents=True)
    (source / "configs").mkdir()
    weights = official_weights(ema=True)
    write_lightning(source / "checkpoints" / "last.ckpt", weights)
    (source / "configs" / "2023-project.yaml").write_text(yaml.safe_dump({"model": {"params": OFFICIAL}}))
    output = tmp_path / "model"
    command = ["convert", str(source), "-o", str(output), "--groups", "4", "--encoder", "some/folder"]
    assert main(command) == 0
    assert "embeddings of (5, 4)" in capsys.readouterr().out
    assert load_synthesis(output).checksum() == convert_official(weights, OFFICIAL, groups=4).checksum()
    assert json.loads((output / "synthesis.json").read_text())["encoder"] == "some/folder"
    assert main(command) == 2
    assert "is already there" in capsys.readouterr().err
    assert main(["convert", str(source / "checkpoints" / "last.ckpt"), "-o", str(tmp_path / "b")]) == 2
    assert "name its configuration with --config" in capsys.readouterr().err
