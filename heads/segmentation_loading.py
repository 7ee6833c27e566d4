"""Loading DiffDIS: the authors' checkpoints, whatever their config says, and the embedded head.

The authors publish a U-Net beside the config of its base, which knows nothing of DiffDIS: what a folder holds is read
from the names and shapes of its weights.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from diffrep.backbones.base import check_weights, default_dtype
from diffrep.backbones.loading import EMBEDDED, HUB, MODELS, load_component, local_variant, read_json
from diffrep.heads.diffdis import DiffDisUNet, is_diffdis
from diffrep.heads.loading import CONTEXT_FILE, HEAD_FILE, HeadError, base_of, stored_context
from diffrep.heads.mask_decoder import MaskDecoder
from diffrep.heads.mask_prediction import SegmentationHead
from diffrep.heads.one_step import Schedule
from diffrep.heads.segmentation import DiffDis

EMBEDDED_SEGMENTATION = ("tiny-segmentation",)
PUBLISHED = "qianyu1217/diffdis"  # the authors' hub id
WEIGHTS = "diffusion_pytorch_model.safetensors"


def load_segmentation(
    name: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> SegmentationHead:
    """Load a segmentation head.

    Args:
        name: an embedded head ("tiny-segmentation"); a folder that `diffrep train segmentation` made; a local folder
            or hub id in the authors' layout; a folder or safetensors file with their U-Net alone, which needs `base`.
        base: where VAE, text encoder and scheduler come from, where `name` has none: an embedded model, a folder, a
            short name such as "sd-turbo", or a hub id.
        dtype: float32 on CPU and bfloat16 on CUDA where None.

    Raises:
        HeadError: no such head, or another kind of network; weights that are missing, left over, damaged or not finite,
            the message says which.
    """
    name, device = os.fspath(name), torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise HeadError(f"device {device} was asked for, but torch sees no CUDA device")
    dtype = dtype or default_dtype(device)
    source = str(MODELS / name) if name in EMBEDDED_SEGMENTATION else name
    local = Path(source).exists()
    if not local and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
        raise HeadError(
            f"{name}: no such folder or file and no known head; give {', '.join(EMBEDDED_SEGMENTATION)}, a folder, or a"
            f" hub id such as {PUBLISHED}"
        )
    try:
        return _load(name, source, None if base is None else os.fspath(base), device, dtype)
    except HeadError:
        raise
    except (ValueError, OSError) as error:  # of the parts, in their own words
        raise HeadError(" ".join(str(error).split())) from None


def _load(name: str, source: str, base: str | None, device: torch.device, dtype: torch.dtype) -> SegmentationHead:
    from diffusers import AutoencoderKL

    about: dict[str, Any] = {}
    if not Path(source).is_file():
        about = read_json(source, HEAD_FILE, required=False)
    if about.get("family", "diffdis") != "diffdis":
        raise HeadError(f"{name}: is a head for {about.get('task')} ({about['family']}), not for segmentation")
    weights, config = unet_files(source, name)
    if base is not None:
        parts = str(MODELS / base) if base in EMBEDDED else HUB.get(base, base)
    elif Path(source).is_file() or not (about or read_json(source, "vae/config.json", required=False)):
        raise HeadError(
            f"{name}: holds a U-Net alone: say where its VAE and text encoder are (base, for example sd-turbo)"
        )
    else:
        parts = base_of(source, about)
    config = config or read_json(parts, "unet/config.json")
    network = diffdis_unet(weights, config, name=name)
    vae = load_component(AutoencoderKL, parts, "vae", dtype, local_variant(Path(parts) / "vae"))
    decoder = MaskDecoder.load(Path(source)) if Path(source).is_dir() else None
    for module in (network, vae, decoder):
        if module is not None:
            check_weights(module, name)
            nn.Module.to(module, device, dtype)  # diffusers' own warns about a cast even when it is none
            module.eval().requires_grad_(False)
    if dtype == torch.float16 and vae.config.force_upcast:  # half precision overflows in this VAE
        vae.float()
    own = {} if Path(source).is_file() else read_json(source, "scheduler/scheduler_config.json", required=False)
    schedule = Schedule.from_config(own or read_json(parts, "scheduler/scheduler_config.json"))
    stored = (Path(source) / CONTEXT_FILE).is_file()
    context = stored_context(source if stored or base is None else parts, parts, device, dtype)
    if context.shape[-1] != network.config.cross_attention_dim:
        raise HeadError(
            f"{name}: the prompt's embedding has {context.shape[-1]} channels, the U-Net attends to"
            f" {network.config.cross_attention_dim}: it belongs to another base"
        )
    working = int(about.get("working_size") or 1024)
    model = DiffDis(network, vae, context, schedule, working_size=working, decoder=decoder, name=name)
    drawn = "its own decoder" if decoder is not None else "the VAE"
    found = f"DiffDIS (recognised by its weights), {network.levels} levels, masks drawn by {drawn}"
    return SegmentationHead(model, found=found)


def unet_files(source: str, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights of the U-Net of a folder, file or hub id, with the published names, and the config beside them, if any.

    A repacked file may have its names under a common prefix, which is taken off.

    Raises:
        HeadError: there is no U-Net, or its file is damaged.
    """
    path = Path(source)
    if path.is_file():
        weights = read_weights(path)
        marker = "rgb_proj.0.weight"
        prefix = next((key[: -len(marker)] for key in weights if key.endswith(marker)), "")
        return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}, {}
    if not path.is_dir():
        from huggingface_hub import hf_hub_download

        return read_weights(Path(hf_hub_download(source, f"unet/{WEIGHTS}"))), read_json(source, "unet/config.json")
    for folder in (path / "unet", path):
        for file in (folder / WEIGHTS, *sorted(folder.glob("diffusion_pytorch_model*.safetensors"))):
            if file.is_file():
                return read_weights(file), read_json(str(folder), "config.json", required=False)
    raise HeadError(f"{name}: is no folder of a head, unet/{WEIGHTS} is missing")


def diffdis_unet(weights: Mapping[str, Tensor], config: Mapping[str, Any], *, name: str) -> DiffDisUNet:
    """A DiffDIS U-Net from weights and any config of its base.

    Args:
        weights: state dict with the published names.
        config: of a U-Net with the same widths; its input channels and class embedding do not matter.
        name: of the folder or file, for messages.

    Raises:
        HeadError: these are no DiffDIS weights, or they do not fit the config; the message says which weights are
            missing, left over or of another shape.
    """
    if not is_diffdis(weights):
        raise HeadError(
            f"{name}: is no DiffDIS U-Net: its weights lack rgb_proj, attn3 or class_embedding;"
            " `diffrep train segmentation` makes one of a plain U-Net"
        )
    network = DiffDisUNet(config)
    own = network.state_dict()
    problems = {
        "missing": sorted(set(own) - set(weights)),
        "left over": sorted(set(weights) - set(own)),
        "of another shape": sorted(k for k in set(own) & set(weights) if own[k].shape != weights[k].shape),
    }
    if found := [f"{len(keys)} {what} ({', '.join(keys[:3])})" for what, keys in problems.items() if keys]:
        raise HeadError(f"{name}: the weights do not fit the config: {'; '.join(found)}")
    network.load_state_dict(dict(weights))
    network.eval().requires_grad_(False)
    return network


def read_weights(path: Path) -> dict[str, Tensor]:
    """A safetensors file.

    Raises:
        HeadError: it is damaged.
    """
    try:
        return load_file(path)
    except SafetensorError as error:
        raise HeadError(f"{path}: is damaged or no safetensors file ({error})") from None
