"""Published restorers, which are adapters for a Stable Diffusion: recognised by their keys, merged into its weights."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffrep.backbones.base import check_weights
from diffrep.backbones.pipelines import load_component
from diffrep.backbones.text import TextEncoders
from diffrep.backbones.weight_files import unsafe
from diffrep.files import UNFETCHED, is_lfs_pointer, read_weights
from diffrep.heads.head import HeadError
from diffrep.heads.head_folders import CONTEXT_FILE, folder_of, json_of
from diffrep.heads.one_step import Schedule
from diffrep.heads.restoration.adapters import (
    DegradationEstimator,
    Factors,
    Modulation,
    merge,
    modulate,
    split_adapters,
)
from diffrep.heads.restoration.families import OSEDIFF, PISA_SR, S3DIFF, RestorationFamily
from diffrep.heads.restoration.restorer import RestorationHead, Restorer

ENDINGS = (".pkl", ".pt", ".pth", ".ckpt", ".bin", ".safetensors")
ESTIMATOR = "de_net.pth"
_KINDS = (  # a key that only this kind has, first match counts
    ("state_dict_unet_de_mlp/", S3DIFF),
    ("lora_rank_unet_pix", PISA_SR),
    ("unet_lora_encoder_modules_pix", PISA_SR),
    ("unet_lora_encoder_modules", OSEDIFF),
    ("state_dict_unet/", OSEDIFF),
)


def checkpoint_in(path: str) -> Path | None:
    """The file of a restorer's adapters that a path is, or that is the only one of its folder; None: none is there."""
    place = Path(path)
    if place.is_file() and place.suffix in ENDINGS:
        return place
    if not place.is_dir() or (place / "unet").exists() or (place / "model_index.json").exists():
        return None
    files = [file for file in sorted(place.glob("*.pkl")) if file.name != ESTIMATOR]
    return files[0] if len(files) == 1 else None


def read_checkpoint(file: Path) -> dict[str, Any]:
    """A checkpoint with its dictionaries joined by "/": tensors, lists of names, ranks.

    Raises:
        HeadError: it is damaged, or holds what cannot be read safely.
    """
    if file.suffix == ".safetensors":
        return dict(read_weights(file, error=HeadError)[0])
    if is_lfs_pointer(file):
        raise HeadError(f"{file}: {UNFETCHED}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            stored = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises several kinds for files that are damaged or forbidden
        raise HeadError(f"{file}: {unsafe(error)}") from None
    if not isinstance(stored, Mapping):
        raise HeadError(f"{file}: holds a {type(stored).__name__}, not a dictionary of weights")

    def joined(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
        for key, value in values.items():
            at = f"{prefix}{key}"
            yield from joined(value, f"{at}/") if isinstance(value, Mapping) else [(at, value)]

    return {key.replace("state_embeddings.", "state_embeddings/"): value for key, value in joined(stored)}


def recognise_restorer(checkpoint: Mapping[str, Any], *, name: str) -> RestorationFamily:
    """Which family a checkpoint is of, by its keys.

    Raises:
        HeadError: none that can be run here.
    """
    if any("relative_position_bias_table" in key for key in checkpoint) and any(
        "input_blocks" in k for k in checkpoint
    ):
        raise HeadError(
            f"{name}: is a ResShift, SinSR or TAD-SR, whose U-Net with Swin layers and VQ autoencoder are not built"
            " here; PiSA-SR, OSEDiff and S3Diff are"
        )
    for mark, family in _KINDS:
        if any(key == mark or (mark.endswith("/") and key.startswith(mark)) for key in checkpoint):
            pisa = family is OSEDIFF and any(".default_encoder_pix." in key for key in checkpoint)
            return PISA_SR if pisa else family
    raise HeadError(
        f"{name}: is no checkpoint of a restorer (PiSA-SR, OSEDiff, S3Diff): it holds {', '.join(list(checkpoint)[:3])}"
    )


def part(checkpoint: Mapping[str, Any], name: str) -> dict[str, Tensor]:
    """The weights of one of its dictionaries."""
    return {
        k.removeprefix(f"{name}/"): v
        for k, v in checkpoint.items()
        if k.startswith(f"{name}/") and isinstance(v, Tensor)
    }


def load_restorer(
    file: Path,
    base: str,
    *,
    name: str,
    prompt: str | None,
    adjustable: bool,
    device: torch.device,
    dtype: torch.dtype,
    fold: bool,
) -> RestorationHead:
    """Load a published restorer on its base; see `diffrep.heads.loading.load_head`.

    Raises:
        HeadError: it is of another kind, belongs to another base, or has weights missing or left over.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel

    checkpoint = read_checkpoint(file)
    family = recognise_restorer(checkpoint, name=name)
    if adjustable and family is not PISA_SR:
        raise HeadError(f"{name}: is a {family.name}: only a PiSA-SR has two adapters to be adjusted")
    unet = load_component(UNet2DConditionModel, base, "unet", torch.float32)
    vae = load_component(AutoencoderKL, base, "vae", torch.float32)
    if not (scheduler := json_of(base, "scheduler/scheduler_config.json")):
        raise HeadError(f"{name}: {base}/scheduler/scheduler_config.json is missing")
    pixel_unet, estimator = None, None
    modulations: tuple[Modulation, ...] = ()
    if family is S3DIFF:
        estimator = _estimator(file.with_name(ESTIMATOR), name=name)
        modulations = _modulated(checkpoint, unet, vae, name=name)
    else:
        adapters = _adapters(checkpoint, "unet", unet, name=name)
        if adjustable:
            pixel_unet = copy.deepcopy(unet)
            merge(pixel_unet, [adapters[key] for key in adapters if key.endswith("_pix")], name=name)
        merge(unet, list(adapters.values()), name=name)
        merge(vae, list(_adapters(checkpoint, "vae", vae, name=name).values()), name=name)
    context, negative = _contexts(base, family, prompt)
    make_ready(vae, unet, pixel_unet, estimator, *modulations, name=name, device=device, dtype=dtype)
    for module in (*modulations, *filter(None, [estimator])):
        module.float()
    model = Restorer(
        unet, vae, context.to(device, dtype), Schedule.from_config(scheduler), family, pixel_unet=pixel_unet,
        negative=None if negative is None else negative.to(device, dtype),
        modulations=modulations, estimator=estimator, fold=fold,
    )  # fmt: skip
    about = f"{family.name} (recognised by its keys) on {base}"
    head = RestorationHead(model, name=name, recognised=about, source=str(file))
    head.base = base
    return head


def _adapters(
    checkpoint: Mapping[str, Any], network: str, module: nn.Module, *, name: str
) -> dict[str, dict[str, Factors]]:
    """The adapters of U-Net or VAE; what is stored beside them is copied into the network.

    Raises:
        HeadError: layers or ranks that the checkpoint itself names are missing, or weights are left over.
    """
    adapters, others = split_adapters(part(checkpoint, f"state_dict_{network}"), name=name)
    stored = {layer for adapter in adapters.values() for layer in adapter}
    listed = _listed(checkpoint, network, module)
    own = dict(module.named_parameters())
    copied = {key.replace(".base_layer.", "."): value for key, value in others.items()}
    left = (stored - listed if listed else set()) | (set(copied) - set(own))
    _report(name, f"{network}'s adapters", listed - stored, left)
    for key, rank in checkpoint.items():
        if "rank" in key and network in key and isinstance(rank, int):
            suffix = key.rsplit("_", 1)[1] if key.endswith(("_pix", "_sem")) else ""
            of_this = (layers for adapter, layers in adapters.items() if adapter.endswith(suffix))
            if (ranks := {len(first) for layers in of_this for first, _ in layers.values()}) - {rank}:
                raise HeadError(f"{name}: {key} is {rank}, the adapters have {', '.join(map(str, sorted(ranks)))}")
    with torch.no_grad():
        for key, value in copied.items():
            if own[key].shape != value.shape:
                raise HeadError(f"{name}: {key} is {tuple(value.shape)}, the base has {tuple(own[key].shape)}")
            own[key].copy_(value)
    return adapters


def _listed(checkpoint: Mapping[str, Any], network: str, module: nn.Module) -> set[str]:
    """The layers that a checkpoint says it adapts: by their names, or by peft's endings or pattern of names."""
    layers = [layer for layer, kind in module.named_modules() if isinstance(kind, (nn.Linear, nn.Conv2d))]
    listed: set[str] = set()
    for key, names in checkpoint.items():
        if key.startswith(f"{network}_lora_"):
            if "target" in key:
                pattern = names if isinstance(names, str) else rf"(.*\.)?({'|'.join(map(re.escape, names))})"
                names = [layer for layer in layers if re.fullmatch(pattern, layer)]
            listed |= set(names)
    return listed


def make_ready(vae: Any, *others: nn.Module | None, name: str, device: torch.device, dtype: torch.dtype) -> None:
    """Put networks of finite weights where they run, in place, to be used and not trained."""
    for module in filter(None, (vae, *others)):
        check_weights(module, name)
        nn.Module.to(module, device, dtype)  # diffusers' own warns about a cast even when it is none
        module.eval().requires_grad_(False)
    if dtype == torch.float16 and vae.config.force_upcast:  # half precision overflows in this VAE
        vae.float()


def misfits(missing: Collection[str], left: Collection[str], other: Collection[str] = ()) -> list[str]:
    """What is wrong with weights by their names, "3 missing (a, b, c)" for each kind; none where all fit."""
    problems = {"missing": missing, "left over": left, "of another shape": other}
    return [f"{len(keys)} {what} ({', '.join(sorted(keys)[:3])})" for what, keys in problems.items() if keys]


def _report(name: str, what: str, missing: Collection[str], left: Collection[str]) -> None:
    if said := misfits(missing, left):
        raise HeadError(f"{name}: of the {what} {' and '.join(said)}")


def _modulated(checkpoint: Mapping[str, Any], unet: nn.Module, vae: nn.Module, *, name: str) -> tuple[Modulation, ...]:
    """Put S3Diff's adapters into both networks; what drives them."""
    places = [f"{piece}{end}" for piece in ("de_mlp/0.", "block_mlp/0.", "fuse_mlp/") for end in ("weight", "bias")]
    expected = {f"state_dict_{network}_{place}" for network in ("unet", "vae") for place in places}
    expected |= {"w", *(f"state_embeddings/state_dict_{network}_block/weight" for network in ("unet", "vae"))}
    _report(name, "modulation's weights", expected - set(checkpoint), ())
    modulations = []
    for network, module in (("unet", unet), ("vae", vae)):
        layers = {
            f"{piece}.{key}": value
            for piece in ("de_mlp", "block_mlp", "fuse_mlp")
            for key, value in part(checkpoint, f"state_dict_{network}_{piece}").items()
        }
        blocks = checkpoint[f"state_embeddings/state_dict_{network}_block/weight"]
        modulation = Modulation(checkpoint["w"].detach(), blocks, layers)
        for adapter in _adapters(checkpoint, network, module, name=name).values():
            modulate(module, adapter, modulation, name=name)
        modulations.append(modulation)
    return tuple(modulations)


def _estimator(file: Path, *, name: str) -> DegradationEstimator:
    if not file.is_file():
        raise HeadError(f"{name}: {file} is missing, by which a S3Diff sees how blurred and noisy a photograph is")
    weights = read_checkpoint(file)
    for key in ("params_ema/", "params/", "state_dict/"):
        if any(k.startswith(key) for k in weights):
            weights = part(weights, key[:-1])
    estimator = DegradationEstimator()
    expected = set(estimator.state_dict())
    _report(name, f"weights in {file.name}", expected - set(weights), set(weights) - expected)
    estimator.load_state_dict(weights)
    return estimator


def _contexts(base: str, family: RestorationFamily, prompt: str | None) -> tuple[Tensor, Tensor | None]:
    """Embeddings of the prompt and, where the family has one, the negative prompt: stored in the base, or encoded."""
    stored = folder_of(base) / CONTEXT_FILE
    if prompt is None and stored.is_file() and not (folder_of(base) / "text_encoder").is_dir():
        tensors = read_weights(stored, error=HeadError)[0]
        if "context" not in tensors:
            raise HeadError(f"{stored}: holds {', '.join(sorted(tensors))}, not the prompt's embedding, context")
        return tensors["context"], tensors.get("negative")
    texts = [family.prompt if prompt is None else prompt, *([family.negative] if family.negative else [])]
    encoded = TextEncoders(base).encode(texts)
    contexts = [encoded[text].context.clone() for text in texts]
    return contexts[0], contexts[1] if len(contexts) > 1 else None
