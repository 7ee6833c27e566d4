"""Published models beside the plain ones, at small width: heads, fine-tuned U-Nets, transformers of old, ADM.

Heads lie over Stable Diffusion 2.1, whose configurations are `tests/layouts/sd2.1`. A folder is named as its
repository, by which a copy of it is known.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from . import T5_WIDTH, build, save_t5

ADM = Path(__file__).parent.parent / "parity" / "data" / "features" / "dift-adm" / "model"


@dataclass(frozen=True)
class Head:
    """A one-step head: what its U-Net takes, and what its repository says of it."""

    task: str
    latents: int  # that its U-Net takes
    vector: bool = False  # the task vector of Lotus
    pipeline: str = "StableDiffusionPipeline"
    index: dict[str, Any] = field(default_factory=dict)  # of model_index.json
    scheduler: dict[str, Any] = field(default_factory=dict)


_AFFINE = {"scale_invariant": True, "shift_invariant": True}
_STEPS = {"default_denoising_steps": 4, "default_processing_resolution": 64}
_TRAILING = {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
_LEADING = {"timestep_spacing": "leading"}
_LCM = {"_class_name": "LCMScheduler", "original_inference_steps": 50, "timestep_scaling": 10.0}
_SAMPLE = {"prediction_type": "sample"}
HEADS = {
    "lotus-depth-g-v1-0": Head("depth", 2, vector=True, pipeline="LotusGPipeline", scheduler=_SAMPLE),
    "lotus-depth-d-v1-0": Head("depth", 1, vector=True, pipeline="LotusDPipeline", scheduler=_SAMPLE),
    "lotus-depth-g-v2-0-disparity": Head("disparity", 2, vector=True, pipeline="LotusGPipeline", scheduler=_SAMPLE),
    "lotus-depth-d-v2-0-disparity": Head("disparity", 1, vector=True, pipeline="LotusDPipeline", scheduler=_SAMPLE),
    "lotus-depth-g-v2-1-disparity": Head("disparity", 2, vector=True, pipeline="LotusGPipeline", scheduler=_SAMPLE),
    "lotus-depth-d-v1-1": Head("depth", 1, vector=True, pipeline="LotusDPipeline", scheduler=_SAMPLE),
    "lotus-normal-g-v1-0": Head("normals", 2, vector=True, pipeline="LotusGPipeline", scheduler=_SAMPLE),
    "lotus-normal-d-v1-0": Head("normals", 1, vector=True, pipeline="LotusDPipeline", scheduler=_SAMPLE),
    "lotus-normal-g-v1-1": Head("normals", 2, vector=True, pipeline="LotusGPipeline", scheduler=_SAMPLE),
    "lotus-normal-d-v1-1": Head("normals", 1, vector=True, pipeline="LotusDPipeline", scheduler=_SAMPLE),
    "marigold-depth-v1-0": Head("depth", 2, pipeline="MarigoldPipeline", index=_AFFINE, scheduler=_LEADING),
    "marigold-v1-0": Head("depth", 2, pipeline="MarigoldPipeline", index=_AFFINE, scheduler=_LEADING),
    "marigold-depth-v1-1": Head(
        "depth",
        2,
        pipeline="MarigoldDepthPipeline",
        index=_AFFINE | _STEPS | {"prediction_type": "depth"},
        scheduler=_TRAILING,
    ),
    "marigold-depth-lcm-v1-0": Head(
        "depth",
        2,
        pipeline="MarigoldPipeline",
        index=_AFFINE | {"default_denoising_steps": 1},
        scheduler=_LCM,
    ),
    "marigold-normals-v1-1": Head(
        "normals",
        2,
        pipeline="MarigoldNormalsPipeline",
        index=_STEPS | {"prediction_type": "normals", "use_full_z_range": True},
        scheduler=_TRAILING,
    ),
    "marigold-normals-v0-1": Head(
        "normals", 2, pipeline="MarigoldNormalsPipeline", index={"use_full_z_range": True}, scheduler=_LEADING
    ),
    "marigold-normals-lcm-v0-1": Head(
        "normals",
        2,
        pipeline="MarigoldNormalsPipeline",
        index={"use_full_z_range": True, "default_denoising_steps": 1},
        scheduler=_LCM,
    ),
    "marigold-e2e-ft-depth": Head("depth", 2, pipeline="MarigoldPipeline", scheduler=_TRAILING),
    "marigold-e2e-ft-normals": Head("normals", 2, pipeline="MarigoldPipeline", scheduler=_TRAILING),
    "stable-diffusion-e2e-ft-depth": Head("depth", 2, pipeline="MarigoldPipeline", scheduler=_TRAILING),
    "stable-diffusion-e2e-ft-normals": Head("normals", 2, pipeline="MarigoldPipeline", scheduler=_TRAILING),
}


def build_head(name: str, parent: Path) -> Path:
    """The folder of a one-step head, named as its repository."""
    head = HEADS[name]
    folder = build("sd2.1", parent / name)
    sizes: dict[str, Any] = {"in_channels": 4 * head.latents}
    if head.vector:
        sizes |= {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 4}
    _new_unet(folder, sizes)
    _change(folder / "model_index.json", {"_class_name": head.pipeline, **head.index})
    _change(folder / "scheduler" / "scheduler_config.json", head.scheduler)
    return folder


def build_diffdis(parent: Path) -> Path:
    """DiffDIS as published: its weights beside the config of the base, which knows nothing of them."""
    from diffusers import UNet2DConditionModel

    from diffrep.heads.diffdis import from_base

    folder = build("sd2.1", parent / "diffdis")
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    network = from_base(unet)
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({key: value.contiguous() for key, value in network.state_dict().items()}, file)
    _change(folder / "scheduler" / "scheduler_config.json", {"prediction_type": "epsilon"})
    return folder


def build_cleandift(parent: Path) -> tuple[Path, Path]:
    """The base model, and the file of another U-Net's weights for it."""
    from diffusers import UNet2DConditionModel

    base = build("sd2.1", parent / "base")
    torch.manual_seed(1)
    unet = UNet2DConditionModel.from_config(json.loads((base / "unet" / "config.json").read_text()))
    save_file(dict(unet.state_dict()), parent / "cleandift_sd21_unet.safetensors")
    return base, parent / "cleandift_sd21_unet.safetensors"


def build_adm(parent: Path) -> Path:
    """A checkpoint of guided-diffusion, ``.pt``, and its flags as JSON."""
    folder = parent / "adm"
    folder.mkdir()
    torch.save(load_file(ADM / "adm_unet.safetensors"), folder / "256x256_diffusion_uncond.pt")
    shutil.copy(ADM / "config.json", folder)
    return folder


def build_transformer(kind: str, parent: Path) -> Path:
    """PixArt or DiT: configurations and weights of a diffusers that had one class for both, `Transformer2DModel`."""
    import diffusers

    folder = parent / kind
    shutil.copytree(build("sd2.1", parent / f"parts of {kind}"), folder)
    for part in ("unet", "text_encoder", "tokenizer"):
        shutil.rmtree(folder / part)
    sizes: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "sample_size": 16}
    sizes |= {"in_channels": 4, "out_channels": 8, "patch_size": 2, "norm_num_groups": 4, "num_embeds_ada_norm": 1000}
    index: dict[str, Any] = {"transformer": ["diffusers", "Transformer2DModel"], "vae": ["diffusers", "AutoencoderKL"]}
    index["scheduler"] = ["diffusers", "DDIMScheduler"]
    if kind == "dit":
        torch.manual_seed(0)
        model = diffusers.DiTTransformer2DModel(**sizes)
        index["_class_name"] = "DiTPipeline"
        config = sizes | {"norm_type": "ada_norm_zero", "cross_attention_dim": None}
    else:
        torch.manual_seed(0)
        sizes |= {"caption_channels": T5_WIDTH, "cross_attention_dim": 32}
        model = diffusers.PixArtTransformer2DModel(**sizes)
        index["_class_name"] = "PixArtAlphaPipeline"
        index |= {"text_encoder": ["transformers", "T5EncoderModel"]}
        index |= {"tokenizer": ["transformers", "PreTrainedTokenizerFast"]}
        config = sizes | {"norm_type": "ada_norm_single"}
        save_t5(folder, "")
    model.save_pretrained(folder / "transformer")
    config |= {"activation_fn": "gelu-approximate", "attention_bias": True, "norm_elementwise_affine": False}
    config |= {"double_self_attention": False, "num_vector_embeds": None, "only_cross_attention": False}
    config |= {"_class_name": "Transformer2DModel", "_diffusers_version": "0.22.0.dev0", "dropout": 0.0}
    (folder / "transformer" / "config.json").write_text(json.dumps(config))
    (folder / "model_index.json").write_text(json.dumps(index))
    _change(folder / "scheduler" / "scheduler_config.json", {"prediction_type": "epsilon"})
    return folder


def _new_unet(folder: Path, sizes: dict[str, Any]) -> None:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(2)
    config = json.loads((folder / "unet" / "config.json").read_text())
    unet = UNet2DConditionModel.from_config(config | sizes)
    with torch.no_grad():
        unet.conv_out.weight.mul_(30)  # of a size that the decoder turns into a picture
    unet.save_pretrained(folder / "unet")


def _change(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
