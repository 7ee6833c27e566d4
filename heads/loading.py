"""`load_head`: one name or folder in, one head out; it says what it recognised. `write_head` makes such folders."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from diffrep.backbones.base import check_weights, default_dtype
from diffrep.backbones.loading import EMBEDDED, HUB, MODELS, load_component, local_variant, read_json
from diffrep.backbones.text import TextEncoders
from diffrep.heads.dense import DenseHead
from diffrep.heads.families import E2E_FT, FAMILIES, LOTUS_D, LOTUS_G, MARIGOLD, Family, Frame, Task
from diffrep.heads.one_step import OneStep, Schedule

HEAD_FILE, CONTEXT_FILE = "head.json", "context.safetensors"

EMBEDDED_HEADS = ("tiny-depth", "tiny-normals")

KNOWN: dict[str, tuple[Family, Task]] = {  # published checkpoints: what their files do not say
    "jingheya/lotus-depth-g-v1-0": (LOTUS_G, "depth"),
    "jingheya/lotus-depth-d-v1-0": (LOTUS_D, "depth"),
    "jingheya/lotus-depth-g-v2-0-disparity": (LOTUS_G, "disparity"),
    "jingheya/lotus-depth-g-v2-1-disparity": (LOTUS_G, "disparity"),
    "jingheya/lotus-depth-d-v2-0-disparity": (LOTUS_D, "disparity"),
    "jingheya/lotus-normal-g-v1-0": (LOTUS_G, "normals"),
    "jingheya/lotus-normal-g-v1-1": (LOTUS_G, "normals"),
    "jingheya/lotus-normal-d-v1-0": (LOTUS_D, "normals"),
    "jingheya/lotus-normal-d-v1-1": (LOTUS_D, "normals"),
    "prs-eth/marigold-depth-v1-0": (MARIGOLD, "depth"),
    "prs-eth/marigold-depth-lcm-v1-0": (MARIGOLD, "depth"),
    "prs-eth/marigold-depth-v1-1": (MARIGOLD, "depth"),
    "prs-eth/marigold-normals-v0-1": (MARIGOLD, "normals"),
    "prs-eth/marigold-normals-lcm-v0-1": (MARIGOLD, "normals"),
    "prs-eth/marigold-normals-v1-1": (MARIGOLD, "normals"),
    "GonzaloMG/marigold-e2e-ft-depth": (E2E_FT, "depth"),
    "GonzaloMG/stable-diffusion-e2e-ft-depth": (E2E_FT, "depth"),
    "GonzaloMG/marigold-e2e-ft-normals": (E2E_FT, "normals"),
    "GonzaloMG/stable-diffusion-e2e-ft-normals": (E2E_FT, "normals"),
}


class HeadError(ValueError):
    """A head that cannot be found, recognised or loaded; the message names the folder and what is wrong."""


@dataclass(frozen=True)
class Recognised:
    """What a folder is, and which of its files said so."""

    family: Family
    task: Task
    reason: str


def load_head(
    name: str | os.PathLike[str],
    *,
    task: Task | None = None,
    family: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    fold: bool = True,
) -> DenseHead:
    """Load a one-step head for depth, disparity or normals.

    Args:
        name: an embedded head ("tiny-depth", "tiny-normals"); a folder that `write_head` made; a local diffusers
            folder or hub id of Lotus, Marigold or E2E-FT.
        task: what it predicts; needed where the files do not say it.
        family: a name out of `diffrep.heads.families.FAMILIES`, for what the files do not say: an eight-channel U-Net
            without class embedding is "marigold" unless named "e2e-ft"; "marigold-diffusers" treats sizes as
            diffusers' pipelines do.
        dtype: float32 on CPU and bfloat16 on CUDA where None.
        fold: compute once what depends on prompt, timestep and task alone.

    Raises:
        HeadError: no such head; the folder is of another kind; the task is neither given nor known; what is given
            contradicts the files; or weights are missing, damaged, do not fit or are not finite.
    """
    name = os.fspath(name)
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise HeadError(f"device {device} was asked for, but torch sees no CUDA device")
    dtype = dtype or default_dtype(device)
    source = str(MODELS / name) if name in EMBEDDED_HEADS else name
    if not Path(source).is_dir() and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
        raise HeadError(
            f"{name}: no such folder and no known head; give {', '.join(EMBEDDED_HEADS)}, a folder, or a hub id such as"
            f" {next(iter(KNOWN))}"
        )
    try:
        return _load(name, source, task, family, device, dtype, fold)
    except SafetensorError as error:
        raise HeadError(f"{name}: a weight file is damaged ({error})") from None
    except HeadError:
        raise
    except ValueError as error:  # of the parts, in their own words
        raise HeadError(str(error)) from None


def _load(
    name: str,
    source: str,
    task: Task | None,
    family: str | None,
    device: torch.device,
    dtype: torch.dtype,
    fold: bool,
) -> DenseHead:
    from diffusers import AutoencoderKL, UNet2DConditionModel

    config = _json(source, "unet/config.json")
    if config is None:
        reason = "is no folder of a head, unet/config.json is missing"
        if not Path(source).is_dir():
            reason = "no such folder, and the hub gave no unet/config.json of that name (not there, or not reachable)"
        raise HeadError(f"{name}: {reason}")
    own = _json(source, HEAD_FILE)
    base = base_of(source, own)
    vae_config = _json(base, "vae/config.json")
    if vae_config is None:
        raise HeadError(f"{name}: has no VAE, {base}/vae/config.json is missing")
    recognised = recognise(name, config, vae_config, own or {}, _json(source, "model_index.json") or {}, task, family)
    unet = load_component(UNet2DConditionModel, source, "unet", dtype, _variant(source, "unet"))
    vae = load_component(AutoencoderKL, base, "vae", dtype, _variant(base, "vae"))
    for module in (unet, vae):
        check_weights(module, name)
        module.to(device).eval().requires_grad_(False)
    if dtype == torch.float16 and vae.config.force_upcast:  # half precision overflows in this VAE
        vae.float()
    scheduler = _json(source, "scheduler/scheduler_config.json") or _json(base, "scheduler/scheduler_config.json")
    if scheduler is None:
        raise HeadError(f"{source}: scheduler/scheduler_config.json is missing")
    context = stored_context(source, base, device, dtype)
    if context.shape[-1] != unet.config.cross_attention_dim:
        raise HeadError(
            f"{source}: the prompt's embedding has {context.shape[-1]} channels, the U-Net attends to"
            f" {unet.config.cross_attention_dim}"
        )
    schedule = Schedule.from_config(scheduler)
    model = OneStep(unet, vae, context, schedule, recognised.family, fold=fold)
    found = f"{recognised.family.name}, {recognised.task} ({recognised.reason})"
    return DenseHead(model, recognised.task, name=name, found=found, working_size=recognised.family.working_size)


def recognise(
    name: str,
    unet: Mapping[str, Any],
    vae: Mapping[str, Any],
    head: Mapping[str, Any],
    index: Mapping[str, Any],
    task: Task | None = None,
    family: str | None = None,
) -> Recognised:
    """What a folder holds, from its configs.

    A class embedding of 4 numbers is Lotus': with the image's latent alone D, with noise beside it G. Without one, a
    U-Net that takes two latents is Marigold's or E2E-FT's, which the files do not tell apart.

    Args:
        unet, vae: ``unet/config.json``, ``vae/config.json``.
        head: our own ``head.json``; empty where there is none.
        index: ``model_index.json``; Marigold's says its task in newer releases.
        task, family: given by the caller, for what is not known.

    Raises:
        HeadError: another kind of network, a contradiction, or a task that nothing tells.
    """
    if family is not None and family not in FAMILIES:
        raise HeadError(f"there is no family {family!r}; known are {', '.join(FAMILIES)}")
    if task is not None and task not in get_args(Task):
        raise HeadError(f"there is no task {task!r} for these heads; known are {', '.join(get_args(Task))}")
    latent, inputs = int(vae.get("latent_channels", 4)), int(unet.get("in_channels", 0))
    width = unet.get("projection_class_embeddings_input_dim") if unet.get("class_embed_type") else None
    if width == 10:
        raise HeadError(f"{name}: is a GeoWizard, whose U-Net predicts depth and normals jointly; it is not supported")
    if unet.get("class_embed_type") not in (None, "projection") or width not in (None, 4) or inputs % latent:
        raise HeadError(
            f"{name}: is no one-step head: its U-Net takes {inputs} channels and a class embedding of {width} numbers"
        )
    count, known = inputs // latent, KNOWN.get(name) or _by_folder_name(name)
    shape = f"{inputs} input channels, {'task vector' if width else 'no task vector'}"
    if width == 4 and count in (1, 2):
        detected = LOTUS_D if count == 1 else LOTUS_G
    elif width is None and count == 2:
        named = family or head.get("family") or (known[0].name if known else MARIGOLD.name)
        detected = FAMILIES.get(str(named), MARIGOLD)
        if detected in (LOTUS_D, LOTUS_G):
            raise HeadError(f"{name}: is no {detected.name}: {shape}")
    elif width is None and count == 1:
        raise HeadError(
            f"{name}: is a plain diffusion model and no head: {shape}; `diffrep train depth` makes one of it"
        )
    else:
        raise HeadError(f"{name}: is no one-step head: {shape}")
    if family is not None and FAMILIES[family] != detected:
        raise HeadError(f"{name}: is no {family}: {shape}, which is {detected.name}")
    told: tuple[Task | None, str] = (None, "")
    if head.get("task"):
        told = head["task"], HEAD_FILE
    elif known:
        told = known[1], "a published checkpoint"
    elif index.get("prediction_type") in get_args(Task):
        told = index["prediction_type"], "model_index.json"
    if told[0] is not None and told[0] not in get_args(Task):
        raise HeadError(f"{name}: is a head for {told[0]}, not for {', '.join(get_args(Task))}")
    if task is not None and told[0] is not None and task != told[0]:
        raise HeadError(f"{name}: predicts {told[0]} (said by {told[1]}), but the task {task} was asked for")
    if task is None and told[0] is None:
        raise HeadError(
            f"{name}: is a {detected.name} ({shape}), but its files do not say what it predicts: give the task, one of"
            f" {', '.join(get_args(Task))}"
        )
    working = head.get("working_size") or index.get("default_processing_resolution")
    if working:
        detected = dataclasses.replace(detected, working_size=int(working))
    if head.get("frame") in get_args(Frame):
        detected = dataclasses.replace(detected, frame=head["frame"])
    by = "as given" if told[0] is None else f"told by {told[1]}"
    final: Task = told[0] if told[0] is not None else task  # type: ignore[assignment]  # one of both is set, see above
    return Recognised(detected, final, f"{shape}; task {by}")


def write_head(
    folder: Path,
    unet: Any,
    *,
    base: str,
    family: str,
    task: str,
    context: Tensor,
    working_size: int,
    frame: Frame | None = None,
    scheduler: Mapping[str, Any] | None = None,
    extra: Mapping[str, object] | None = None,
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write a head as a folder that holds only what is new: the U-Net, the prompt's embedding, ``head.json``.

    Args:
        folder: made where it is missing; what is there is replaced.
        unet: diffrep's or diffusers' `UNet2DConditionModel`; it is left as it is.
        base: where VAE and scheduler come from: an embedded model's name, a folder, or a hub id. A folder is kept
            relative to the head's where that is possible.
        family: a name out of `diffrep.heads.families.FAMILIES`.
        task: "depth", "disparity", "normals"; other heads write their own.
        context: (1, tokens, C), what the U-Net was trained to attend to.
        working_size: long side in pixels at which the head works by default.
        frame: camera axes of the normals, where they are not those of the family.
        scheduler: a diffusers scheduler config, where it is not that of the base.
        extra: further JSON values for ``head.json``, for example steps, seed, data, measured quality.
        dtype: of the weights on disk.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = {k: v.detach().to("cpu", dtype).contiguous() for k, v in unet.state_dict().items()}
    (folder / "unet").mkdir(exist_ok=True)
    config = {k: v for k, v in dict(unet.config).items() if not k.startswith("_")}
    config["_class_name"] = "UNet2DConditionModel"
    (folder / "unet" / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(save(weights, metadata={"format": "pt"}))
    (folder / CONTEXT_FILE).write_bytes(save({"context": context.detach().float().cpu().contiguous()}))
    if scheduler is not None:
        (folder / "scheduler").mkdir(exist_ok=True)
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(dict(scheduler), indent=2) + "\n")
    if Path(base).is_dir():
        base = os.path.relpath(Path(base).resolve(), folder.resolve())
    values = {"base": base, "family": family, "task": task, "working_size": working_size}
    values |= {"frame": frame} if frame else {}
    values |= dict(extra or {})
    (folder / HEAD_FILE).write_text(json.dumps(values, indent=2) + "\n")


def prompt_context(
    source: str | os.PathLike[str], *, device: torch.device | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The embedding (1, 2, C) of the empty prompt, tokenised without padding, by the text encoder of a folder.

    Raises:
        BackboneError: the folder has no text encoder or tokenizer.
    """
    source = os.fspath(source)
    source = str(MODELS / source) if source in EMBEDDED else HUB.get(source, source)
    parts = {"text_encoder": "CLIPTextModel"}
    text = TextEncoders(
        source,
        parts,
        device=device or torch.device("cpu"),
        dtype=dtype,
        variant=_variant(source, "text_encoder"),
        pad=False,
    )
    return text.encode([""])[""].context.clone()  # a tensor that training may use too


def stored_context(source: str, base: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The stored embedding of the prompt; the text encoder is only loaded where there is none."""
    if (file := Path(source) / CONTEXT_FILE).is_file():
        return load_file(file)["context"].to(device, dtype)
    return prompt_context(source if _json(source, "model_index.json") else base, device=device, dtype=dtype)


def base_of(source: str, head: Mapping[str, Any] | None) -> str:
    """Where VAE and scheduler lie."""
    if not head or not head.get("base"):
        return source
    base = str(head["base"])
    if base in EMBEDDED:
        return str(MODELS / base)
    if base in HUB:
        return HUB[base]
    if (relative := Path(source) / base).is_dir():
        return str(relative)
    if base.count("/") == 1 and not base.startswith("."):
        return base  # a hub id
    raise HeadError(f"{source}: {HEAD_FILE} names the base {base}, which is no folder and no known model")


def _by_folder_name(name: str) -> tuple[Family, Task] | None:
    """A copy of a published checkpoint in a folder of the same name."""
    last = Path(name).name
    return next((value for key, value in KNOWN.items() if key.split("/")[1] == last), None)


def _variant(source: str, part: str) -> str | None:
    folder = Path(source) / part
    return local_variant(folder) if folder.is_dir() else None


def _json(source: str, file: str) -> dict[str, Any] | None:
    return read_json(source, file, required=False) or None
