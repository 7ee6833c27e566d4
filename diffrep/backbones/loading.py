"""`load_backbone`: one name or path in, one backbone out.

Nothing is fetched unless the caller names something that lives on a hub. Only safetensors are read.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from diffrep.backbones.adm import load_adm
from diffrep.backbones.aggregation import AggregationNetwork
from diffrep.backbones.base import Backbone, BackboneError, Conditions, Recommended, check_weights, default_dtype
from diffrep.backbones.hyperfeatures import Hyperfeatures
from diffrep.backbones.latent_diffusion import LatentDiffusion
from diffrep.backbones.latents import LatentBackbone
from diffrep.backbones.text import PipelineText, TextEncoders
from diffrep.backbones.transformers import FLOW, KINDS, DiffusionTransformer
from diffrep.backbones.vit import PositionRule, VisionTransformer, dinov2_backbone, timm_backbone
from diffrep.images import Sizing

MODELS = Path(__file__).resolve().parent.parent / "models"

EMBEDDED = {  # trained by `diffrep train tiny`, part of the package
    "tiny": "the embedded latent diffusion model",
    "tiny-dino": "the embedded vision transformer",
}
HUB = {  # short name -> hub id of a diffusers folder
    "sd1.5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd2.1": "stabilityai/stable-diffusion-2-1",
    "sd2.1-base": "stabilityai/stable-diffusion-2-1-base",
    "sd-turbo": "stabilityai/sd-turbo",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "sdxl-turbo": "stabilityai/sdxl-turbo",
    "sd3.5-medium": "stabilityai/stable-diffusion-3.5-medium",
    "flux.1-dev": "black-forest-labs/FLUX.1-dev",
    "pixart-alpha": "PixArt-alpha/PixArt-XL-2-512x512",
    "dit": "facebook/DiT-XL-2-512",
}
CLEANDIFT = {  # short name -> the model whose U-Net it replaces, the file at CompVis/cleandift
    "cleandift-sd1.5": ("sd1.5", "cleandift_sd15_unet.safetensors"),
    "cleandift-sd2.1": ("sd2.1", "cleandift_sd21_unet.safetensors"),
}
TIMM = {  # short name -> timm architecture with its weights
    "dino-small": "vit_small_patch8_224.dino",
    "dino-base": "vit_base_patch8_224.dino",
    "dinov2-small": "vit_small_patch14_dinov2.lvd142m",
    "dinov2-base": "vit_base_patch14_dinov2.lvd142m",
    "dinov2-large": "vit_large_patch14_dinov2.lvd142m",
    "dinov2-base-reg": "vit_base_patch14_reg4_dinov2.lvd142m",
    "dinov2-large-reg": "vit_large_patch14_reg4_dinov2.lvd142m",
    "dinov3-base": "vit_base_patch16_dinov3.lvd1689m",
    "dinov3-large": "vit_large_patch16_dinov3.lvd1689m",
}


def load_backbone(
    name: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    stride: int | None = None,
    variant: str | None = None,
    channels_last: bool = False,
    compile: bool = False,
    adm: Mapping[str, Any] | None = None,
) -> Backbone:
    """Load a frozen backbone.

    Args:
        name: an embedded model ("tiny", "tiny-dino"); a local folder (diffusers layout, timm's hub layout, or
            a DINOv2 or guided-diffusion checkpoint with its config.json); a guided-diffusion (ADM) checkpoint,
            ``.pt`` or safetensors; a short name ("sd2.1", "dinov2-base", ...);
            "timm:ARCHITECTURE"; "open_clip:MODEL/PRETRAINED"; or the hub id of a diffusers or timm model.
        dtype: float32 on CPU and bfloat16 on CUDA where None.
        stride: vision transformers only: pixels between patches, smaller than the patch for a finer map.
        variant: of the weight files, for example "fp16"; found by itself in local folders.
        channels_last: keep convolution weights channels-last (faster on some devices, same numbers up to rounding).
        compile: compile the residual and transformer blocks with `torch.compile`.
        adm: ADM checkpoints only: flags of guided-diffusion for what the tensors' shapes do not tell, for example
            {"num_head_channels": 64, "noise_schedule": "linear"}.

    Raises:
        BackboneError: no such backbone, a component is missing, or weights are unreadable, do not fit or are
            not finite.
    """
    name = os.fspath(name)
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BackboneError(f"device {device} was asked for, but torch sees no CUDA device")
    dtype = dtype or default_dtype(device)
    try:
        backbone = _find(name, device=device, dtype=dtype, stride=stride, variant=variant, adm=adm)
    except SafetensorError as error:
        raise BackboneError(f"{name}: a weight file is damaged ({error})") from None
    except OSError as error:  # what the hub clients raise when something cannot be fetched
        raise BackboneError(f"{name}: cannot be loaded ({str(error).splitlines()[0]})") from None
    for part in backbone.parts.values():
        check_weights(part, name)
    backbone.to(device, dtype)
    if channels_last:
        backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stubs
    if compile:
        _compile_blocks(backbone)
    return backbone


def _find(
    name: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    stride: int | None,
    variant: str | None,
    adm: Mapping[str, Any] | None,
) -> Backbone:
    path = MODELS / name if name in EMBEDDED else Path(name)
    if path.is_dir():
        if (path / "model_index.json").is_file() or (path / "unet").is_dir() or (path / "transformer").is_dir():
            return _load_pipeline(str(path), device=device, dtype=dtype, variant=variant, name=name)
        if (path / "open_clip_config.json").is_file():
            return _load_open_clip(f"local-dir:{path}", None, name=name, stride=stride)
        if (path / "config.json").is_file():
            config = read_json(str(path), "config.json")
            if "num_res_blocks" in config:
                return load_adm(_only_weights(path), {**config, **(adm or {})}, name=name)
            return _load_vit_folder(path, config, name=name, stride=stride)
        raise BackboneError(
            f"{path}: is no backbone folder: expected model_index.json (diffusers) or config.json (a ViT), found"
            f" {', '.join(sorted(p.name for p in path.iterdir())[:5]) or 'nothing'}"
        )
    if name in EMBEDDED:
        raise BackboneError(f"{name}: the embedded weights are missing at {path}; reinstall, or `diffrep train tiny`")
    if path.is_file():
        if path.suffix not in (".pt", ".pth", ".safetensors"):
            raise BackboneError(f"{path}: is a file, but no checkpoint (.pt, .pth, .safetensors); give a folder")
        return load_adm(path, adm, name=name)
    if name in HUB:
        return _load_pipeline(HUB[name], device=device, dtype=dtype, variant=variant, name=name)
    if name in CLEANDIFT:
        from huggingface_hub import hf_hub_download

        base, file = CLEANDIFT[name]
        weights = Path(hf_hub_download("CompVis/cleandift", file))
        return load_cleandift(HUB[base], weights, device=device, dtype=dtype, name=name)
    kind, _, weights_file = name.partition(":")
    if kind == "hyperfeatures":
        if not Path(weights_file).is_file():
            raise BackboneError(
                f"{name}: needs the trained aggregation network: hyperfeatures:FILE, with weights for sd1.5"
                + (f"; there is no file {weights_file}" if weights_file else "")
            )
        aggregation = AggregationNetwork.load(Path(weights_file))
        base_model = load_diffusers(HUB["sd1.5"], device=device, dtype=dtype, variant=variant)
        return Hyperfeatures(base_model, aggregation, name=name)
    if path.suffix in (".pt", ".pth", ".safetensors"):
        raise BackboneError(
            f"{path}: there is no such file; openai/guided-diffusion's README has the links to its checkpoints"
        )
    if name in TIMM or name.startswith("timm:"):
        architecture = TIMM.get(name) or name.removeprefix("timm:")
        return _load_timm(architecture, name=name, stride=stride)
    if name.startswith("open_clip:"):
        model, _, pretrained = name.removeprefix("open_clip:").partition("/")
        return _load_open_clip(model, pretrained or None, name=name, stride=stride)
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return _load_hub_id(name, device=device, dtype=dtype, stride=stride, variant=variant)
    known = [*EMBEDDED, *HUB, *CLEANDIFT, *TIMM]
    near = difflib.get_close_matches(name, known, n=3) or known
    raise BackboneError(
        f"{name}: no such folder and no known backbone; near names: {', '.join(near)}; or give a folder, a hub id,"
        " timm:NAME or open_clip:MODEL/PRETRAINED"
    )


def _load_pipeline(
    source: str, *, device: torch.device, dtype: torch.dtype, variant: str | None, name: str
) -> LatentDiffusion | DiffusionTransformer:
    """A diffusers folder or hub id with a U-Net or a transformer."""
    index = read_json(source, "model_index.json", required=False)
    if "transformer" in index or (Path(source) / "transformer").is_dir():
        return load_transformer(source, device=device, dtype=dtype, variant=variant, name=name)
    return load_diffusers(source, device=device, dtype=dtype, variant=variant, name=name)


def load_transformer(
    source: str, *, device: torch.device, dtype: torch.dtype, variant: str | None = None, name: str | None = None
) -> DiffusionTransformer:
    """Load transformer, VAE encoder and schedule of a FLUX, SD3, PixArt or DiT folder or hub id.

    Raises:
        BackboneError: a component is missing or of an unknown kind, or its weights are no safetensors or do not fit.
    """
    import diffusers

    name = name or source
    index = read_json(source, "model_index.json", required=False)
    kind = read_json(source, "transformer/config.json").get("_class_name")
    if kind not in KINDS:
        raise BackboneError(f"{source}: a {kind} cannot be tapped; known are {', '.join(KINDS)}")
    transformer = load_component(getattr(diffusers, kind), source, "transformer", dtype, variant)
    vae = load_component(diffusers.AutoencoderKL, source, "vae", dtype, variant)
    vae.decoder = None  # extraction only encodes: give its memory back
    vae.post_quant_conv = None
    schedule = None if kind in FLOW else _alphas_cumprod(read_json(source, "scheduler/scheduler_config.json"))
    has_text = any(isinstance(c, list) and c[0] for p, c in index.items() if p.startswith("text_encoder"))
    text = PipelineText(source, str(index["_class_name"]), device=device, dtype=dtype) if has_text else None
    return DiffusionTransformer(transformer, vae, schedule, text=text, name=name, source=source)


def load_cleandift(
    base: str | os.PathLike[str],
    weights: Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    name: str = "cleandift",
) -> LatentDiffusion:
    """Stable Diffusion with CleanDIFT's U-Net, which wants the image without noise and t = 261.

    Args:
        base: folder or hub id of the model that was fine-tuned.
        weights: state dict of the U-Net, diffusers' names, safetensors.

    Raises:
        BackboneError: the weights do not fit the base's U-Net.
    """
    device = torch.device(device)
    backbone = load_diffusers(os.fspath(base), device=device, dtype=dtype or default_dtype(device), name=name)
    try:
        backbone.network.load_state_dict(load_file(weights))
    except RuntimeError as error:
        raise BackboneError(f"{weights}: does not fit the U-Net of {base} ({_one_line(error)})") from None
    check_weights(backbone.network, str(weights))
    backbone.network.to(device)
    backbone.vae.to(device)
    backbone.source = f"{backbone.source} with {weights.name}"
    backbone.recommended = Recommended(
        taps=backbone.recommended.taps,
        sizing=backbone.recommended.sizing,
        conditions=Conditions(timestep=261, clean=True, posterior="mean"),
    )
    return backbone


def load_diffusers(
    source: str, *, device: torch.device, dtype: torch.dtype, variant: str | None = None, name: str | None = None
) -> LatentDiffusion:
    """Load U-Net, VAE encoder and schedule of a Stable Diffusion folder or hub id; text encoders come later.

    Raises:
        BackboneError: a component is missing, or its weights are not safetensors or do not fit its config.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel

    name = name or source
    index = read_json(source, "model_index.json", required=False)
    if folder := (Path(source) if Path(source).is_dir() else None):
        missing = [
            str(Path(part) / file)
            for part, file in (("unet", "config.json"), ("vae", "config.json"), ("scheduler", "scheduler_config.json"))
            if not (folder / part / file).is_file()
        ]
        if missing:
            raise BackboneError(f"{folder}: is no complete diffusers folder: {', '.join(missing)} missing")
        variant = variant or local_variant(folder / "unet")
    unet = load_component(UNet2DConditionModel, source, "unet", dtype, variant)
    vae = load_component(AutoencoderKL, source, "vae", dtype, variant)
    if unet.config.in_channels != vae.config.latent_channels:
        raise BackboneError(
            f"{source}: the U-Net takes {unet.config.in_channels} channels but the VAE gives"
            f" {vae.config.latent_channels} (an inpainting or depth-conditioned U-Net cannot be tapped this way)"
        )
    vae.decoder = None  # extraction only encodes: give its memory back
    vae.post_quant_conv = None
    parts = {p: c[1] for p, c in index.items() if p.startswith("text_encoder") and isinstance(c, list) and c[0]}
    if not parts and (folder is None or (folder / "text_encoder").is_dir()):
        parts = {"text_encoder": "CLIPTextModel"}
    text = TextEncoders(source, parts, device=device, dtype=dtype, variant=variant) if parts else None
    scheduler = read_json(source, "scheduler/scheduler_config.json")
    backbone = LatentDiffusion(
        unet,
        vae,
        _alphas_cumprod(scheduler),
        text=text,
        predicts=scheduler.get("prediction_type", "epsilon"),
        name=name,
        source=source,
    )
    extra = read_json(source, "diffrep.json", required=False)  # our own folders say how they are best used
    if extra:
        backbone.recommended = _recommended(extra)
    return backbone


def _recommended(values: Mapping[str, Any]) -> Recommended:
    return Recommended(
        taps=tuple(values["taps"]),
        sizing=Sizing(**values["sizing"]),
        conditions=Conditions(**values.get("conditions", {})),
    )


def _alphas_cumprod(config: Mapping[str, Any]) -> Tensor:
    """The schedule of a folder, whatever sampler it names."""
    from diffusers import DDIMScheduler

    keys = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
    scheduler: Any = DDIMScheduler(**{k: config[k] for k in keys if k in config})
    return scheduler.alphas_cumprod


def load_component(kind: Any, source: str, part: str, dtype: torch.dtype, variant: str | None) -> Any:
    """One part of a diffusers folder or hub id, for example its ``vae``; strictly, from safetensors only.

    Args:
        kind: the diffusers class.

    Raises:
        BackboneError: the weights are missing, no safetensors, or do not fit the part's config.
    """
    try:
        module, info = kind.from_pretrained(
            source,
            subfolder=part,
            torch_dtype=dtype,
            use_safetensors=True,
            variant=variant,
            low_cpu_mem_usage=False,
            output_loading_info=True,
        )
    except (ValueError, RuntimeError) as error:  # a size mismatch
        raise BackboneError(f"{source}: the weights of {part} do not fit its config ({_one_line(error)})") from None
    except OSError as error:
        raise BackboneError(f"{source}: {part} cannot be loaded as safetensors ({_one_line(error)})") from None
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(what):
            raise BackboneError(f"{source}: {part} has {what.replace('_', ' ')}: {sorted(info[what])[:3]}")
    return module


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:300]


def local_variant(folder: Path) -> str | None:
    """ "fp16" where a folder has only ``diffusion_pytorch_model.fp16.safetensors``."""
    names = [p.name for p in folder.glob("diffusion_pytorch_model*.safetensors*")]
    if any(n.startswith(("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model-")) for n in names):
        return None
    return "fp16" if any(".fp16." in n or ".fp16-" in n for n in names) else None


def read_json(source: str, file: str, *, required: bool = True) -> dict[str, Any]:
    folder = Path(source)
    if folder.is_dir():
        path = folder / file
        if not path.is_file():
            if required:
                raise BackboneError(f"{source}: {file} is missing")
            return {}
    else:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError

        try:
            path = Path(hf_hub_download(source, file))
        except EntryNotFoundError:
            if required:
                raise BackboneError(f"{source}: {file} is missing") from None
            return {}
    try:
        return dict(json.loads(path.read_text()))
    except ValueError as error:
        raise BackboneError(f"{path}: is no valid JSON ({error})") from None


def _only_weights(folder: Path) -> Path:
    files = sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        raise BackboneError(f"{folder}: expected one .safetensors file beside config.json, found {len(files)}")
    return files[0]


def _load_vit_folder(folder: Path, config: Mapping[str, Any], *, name: str, stride: int | None) -> VisionTransformer:
    """timm's hub layout (``architecture``, ``model_args``, ``pretrained_cfg``) or a DINOv2 checkpoint."""
    if config.get("time_embedding_type") == "adm":
        raise BackboneError(
            f"{folder}: is an ADM in the layout of a modified diffusers; give openai's original checkpoint instead"
        )
    weights = load_file(_only_weights(folder))
    if "architecture" in config:
        return timm_backbone(
            config["architecture"],
            model_args=config.get("model_args"),
            weights=weights,
            config=config.get("pretrained_cfg"),
            stride=stride,
            positions=PositionRule(**config["diffrep_positions"]) if "diffrep_positions" in config else None,
            name=name,
            source=str(folder),
        )
    needed = {"img_size", "patch_size", "embed_dim", "depth", "num_heads"}
    if missing := sorted(needed - set(config)):
        raise BackboneError(f"{folder / 'config.json'}: is neither timm's nor DINOv2's: {', '.join(missing)} missing")
    return dinov2_backbone(weights, dict(config), stride=stride, name=name, source=str(folder))


def _load_timm(architecture: str, *, name: str, stride: int | None) -> VisionTransformer:
    import timm

    if architecture.split(".")[0] not in timm.list_models():
        near = difflib.get_close_matches(architecture, timm.list_models(pretrained=True), n=3)
        raise BackboneError(f"{name}: timm has no model {architecture}; near names: {', '.join(near) or 'none'}")
    try:
        return timm_backbone(architecture, pretrained=True, stride=stride, name=name, source=f"timm/{architecture}")
    except RuntimeError as error:
        raise BackboneError(f"{name}: {_one_line(error)}") from None


def _load_open_clip(model: str, pretrained: str | None, *, name: str, stride: int | None) -> VisionTransformer:
    import open_clip

    if not model.startswith(("local-dir:", "hf-hub:")) and model not in open_clip.list_models():
        near = difflib.get_close_matches(model, open_clip.list_models(), n=3)
        raise BackboneError(f"{name}: open_clip has no model {model}; near names: {', '.join(near) or 'none'}")
    if pretrained is None and not model.startswith(("local-dir:", "hf-hub:")):
        tags = open_clip.list_pretrained_tags_by_model(model)
        raise BackboneError(f"{name}: say which weights, open_clip:{model}/TAG; it has {', '.join(tags[:6])}")
    return open_clip_backbone(
        open_clip.create_model(model, pretrained=pretrained), name=name, source=f"open_clip/{model}", stride=stride
    )


def open_clip_backbone(model: Any, *, name: str, source: str, stride: int | None = None) -> VisionTransformer:
    """The image tower of an open_clip model.

    Raises:
        BackboneError: the tower is no ViT.
    """
    tower = model.visual
    network = getattr(tower, "trunk", tower)
    if not (hasattr(network, "transformer") or hasattr(network, "patch_embed")):
        raise BackboneError(f"{name}: its image tower is a {type(network).__name__}; only ViTs can be tapped here")
    if hasattr(network, "patch_embed"):  # a timm tower: let it take any size
        network.dynamic_img_size = True
        network.patch_embed.strict_img_size = False
        network.patch_embed.flatten = False
        network.patch_embed.output_fmt = type(network.patch_embed.output_fmt)("NHWC")
    size = tower.image_size if hasattr(tower, "image_size") else 224
    return VisionTransformer(
        network,
        mean=tower.image_mean or (0.48145466, 0.4578275, 0.40821073),
        std=tower.image_std or (0.26862954, 0.26130258, 0.27577711),
        stride=stride,
        name=name,
        source=source,
        size=int(size[0] if isinstance(size, tuple | list) else size),
    )


def _load_hub_id(
    name: str, *, device: torch.device, dtype: torch.dtype, stride: int | None, variant: str | None
) -> Backbone:
    """A hub id: a diffusers folder if it has an index, else whatever its config says."""
    if read_json(name, "model_index.json", required=False):
        return _load_pipeline(name, device=device, dtype=dtype, variant=variant, name=name)
    if read_json(name, "open_clip_config.json", required=False):
        return _load_open_clip(f"hf-hub:{name}", None, name=name, stride=stride)
    config = read_json(name, "config.json")
    if "architecture" not in config:
        raise BackboneError(f"{name}: is neither a diffusers folder nor a timm or open_clip model")
    return timm_backbone(f"hf-hub:{name}", pretrained=True, stride=stride, name=name, source=name)


def _compile_blocks(backbone: Backbone) -> None:
    """Compile what is called often and holds no tap inside: residual blocks, transformer blocks, the encoder.

    The tap hooks sit on the modules, outside of what is compiled.
    """
    kinds = {"ResnetBlock2D", "BasicTransformerBlock", "Block", "EvaBlock", "ResidualAttentionBlock"}
    modules = [m for m in backbone.network.modules() if type(m).__name__ in kinds]
    if isinstance(backbone, LatentBackbone):
        modules.append(backbone.vae.encoder)
    for module in modules:
        module.forward = torch.compile(module.forward, dynamic=True)
