"""`load_head`: one name, folder or file in, one head out, which says what it is."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError
from torch import Tensor

from diffrep.backbones.base import check_weights
from diffrep.backbones.pipelines import load_component, network_class
from diffrep.backbones.repositories import expand, is_hub_id, repository, split_options, weight_files, with_options
from diffrep.backbones.weight_files import ENDINGS
from diffrep.devices import resolve_device, resolve_dtype
from diffrep.files import read_weights, weight_names, words_of
from diffrep.heads.decoder import DetailDecoder
from diffrep.heads.dense import DenseHead
from diffrep.heads.diffdis import DiffDisUNet, is_diffdis
from diffrep.heads.head import HeadError
from diffrep.heads.head_folders import (
    DIFFDIS,
    EMBEDDED_HEADS,
    HEAD_FILE,
    KNOWN,
    WEIGHTS,
    base_of,
    folder_of,
    head_path,
    json_of,
    named,
    save_head,
    stored_context,
    write_head,
)
from diffrep.heads.one_step import OneStep, Schedule
from diffrep.heads.recognition import (
    RESTORATION,
    Recognised,
    check_names,
    integer,
    recognise,
    spacing_note,
)
from diffrep.heads.restoration.families import RESTORATION_FAMILIES, TINY, RestorationFamily
from diffrep.heads.restoration.loading import checkpoint_in, load_restorer, make_ready, misfits, read_checkpoint
from diffrep.heads.restoration.restorer import RestorationHead, Restorer
from diffrep.heads.segmentation import DiffDis, SegmentationHead
from diffrep.tasks import embedded_head

__all__ = [
    "WEIGHTS",
    "HeadError",
    "diffdis_unet",
    "load_head",
    "load_segmentation",
    "recognise",
    "save_head",
    "write_head",
]


LoadedHead: TypeAlias = "DenseHead | SegmentationHead | RestorationHead"


@dataclass(frozen=True)
class _Wanted:
    """What the caller of `load_head` says beside the name."""

    task: str | None
    family: str | None
    base: str | None
    device: torch.device
    dtype: torch.dtype
    fold: bool
    prompt: str | None
    adjustable: bool


@dataclass(frozen=True)
class _Source:
    """Where a head lies: the embedded model's, a folder, a weight file or a hub id.

    Attributes:
        name: as it was asked for.
        path: of its own files, with variant and revision behind it.
        head: our own ``head.json``; empty where there is none.
        config: ``unet/config.json``, or ``config.json`` beside a U-Net alone.
        base: where VAE, scheduler and text encoder lie.
    """

    name: str
    path: str
    head: Mapping[str, Any]
    config: Mapping[str, Any]
    base: str

    @property
    def place(self) -> Path:
        """The folder or file; does not exist where it is a hub id."""
        return folder_of(self.path)


def load_head(
    name: str | os.PathLike[str],
    *,
    task: str | None = None,
    family: str | None = None,
    base: str | os.PathLike[str] | None = None,
    variant: str | None = None,
    revision: str | None = None,
    device: str | torch.device = "auto",
    dtype: torch.dtype | str | None = None,
    fold: bool = True,
    prompt: str | None = None,
    adjustable: bool = False,
) -> Any:
    """Load a head for depth, disparity, normals, segmentation or restoration.

    Args:
        name: an embedded head ("tiny-depth", "tiny-normals", "tiny-segmentation", "tiny-restore", or the task's name
            alone, see `diffrep.tasks.SYNONYMS`); a folder that `write_head` made; a local diffusers folder or hub id of
            Lotus, Marigold, E2E-FT or DiffDIS; a folder or safetensors file with the U-Net of a DiffDIS alone, which
            needs `base`; the file of a PiSA-SR, OSEDiff or S3Diff, or the folder that it lies in, which needs `base`
            too (S3Diff: with ``de_net.pth`` beside it).
        task: what it predicts; needed where the files do not say it.
        family: a name out of `diffrep.heads.families.FAMILIES`, for what the files do not say: an eight-channel U-Net
            without class embedding is "marigold" unless named "e2e-ft"; "marigold-diffusers" treats sizes as
            diffusers' pipelines do.
        base: where VAE, text encoder and scheduler come from, where `name` has none: an embedded model, a folder, a
            short name such as "sd-turbo", or a hub id.
        variant: of the weight files, for example "fp16"; None: the plain ones, or the only others. Variant and revision
            may stand behind `name` and `base` too: "prs-eth/marigold-depth-v1-1?variant=fp16".
        revision: of a head on the hub: a branch, a tag or a commit.
        dtype: float32, on CUDA bfloat16, where None.
        fold: compute once what depends on prompt, timestep and task alone.
        prompt: of a restorer; its family's where None, which is empty for PiSA-SR and OSEDiff.
        adjustable: load a PiSA-SR so that its two strengths can be set; takes the memory of a second U-Net.

    Returns:
        A `DenseHead`, a `SegmentationHead` or a `RestorationHead`.

    Raises:
        HeadError: no such head; the folder is of another kind; the task is neither named nor known; what is named
            contradicts the files; or weights are missing, left over, damaged, do not fit or are not finite.
        DeviceError: there is no such device.
    """
    if not isinstance(name, (str, os.PathLike)):
        raise HeadError(f"a head is named by text or a path, got {type(name).__name__}")
    place = resolve_device(device)
    numbers, base = resolve_dtype(dtype, place, option="dtype"), None if base is None else os.fspath(base)
    check_names(task, family)
    try:
        return _load(
            os.fspath(name), _Wanted(task, family, base, place, numbers, fold, prompt, adjustable), variant, revision
        )
    except HeadError:
        raise
    except SafetensorError as error:
        raise HeadError(f"{name}: a weight file is damaged ({error})") from None
    except (ValueError, OSError, RuntimeError, KeyError) as error:  # of the parts and the hub, in their own words
        raise HeadError(words_of(error)) from None


def _load(name: str, wanted: _Wanted, variant: str | None, revision: str | None) -> LoadedHead:
    """By what its files are: adapters of a restorer, or a folder of a restorer, of a DiffDIS, of depth or normals."""
    task, family = wanted.task, wanted.family
    load: Callable[[_Source, _Wanted], LoadedHead]
    fits: tuple[str | None, str | None]
    name, behind = split_options(expand(embedded_head(name)))
    if "lora" in behind:
        raise HeadError(f"{name}: is loaded as a head, which takes no LoRA files")
    files = {"variant": variant or behind.get("variant"), "revision": revision or behind.get("revision")}
    if (adapters := checkpoint_in(name)) is not None and _names_adapters(adapters):
        if any(files.values()):
            raise HeadError(f"{name}: is a file: variant and revision are of its base, 'BASE?variant=fp16'")
        return _load_adapters(adapters, name, wanted)
    if wanted.prompt is not None:
        raise HeadError(f"{name}: takes no prompt, as PiSA-SR, OSEDiff and S3Diff do")
    if wanted.adjustable:
        raise HeadError(f"{name}: has no adapters whose strengths (pixel, semantic) can be set, as PiSA-SR has")
    asked = RESTORATION if family in RESTORATION_FAMILIES else "segmentation" if family == DIFFDIS else task
    source = _find(name, wanted.base, asked, **files)
    if source.head.get("family") in RESTORATION_FAMILIES:
        what, load, fits = "a restorer", _load_restorer, (RESTORATION, source.head["family"])
    elif asked == RESTORATION:
        raise HeadError(f"{name}: is no restorer: neither a folder of `diffrep train restore` nor a file of adapters")
    elif _holds_diffdis(source):
        what, load, fits = "a DiffDIS, a head for segmentation", _load_segmentation, ("segmentation", DIFFDIS)
    elif asked == "segmentation":
        raise HeadError(f"{name}: {_why_no_diffdis(source)}")
    else:
        what, load, fits = "", _load_dense, (task, family)  # which looks for itself
    if task not in (None, fits[0]) or family not in (None, fits[1]):
        raise HeadError(f"{name}: is {what}, not {task or family}")
    head = load(source, wanted)
    head.name, head.base = with_options(name, variant=files["variant"], revision=files["revision"]), source.base
    return head


def _names_adapters(file: Path) -> bool:
    """A file of a restorer's adapters, unless it is the weight file of a DiffDIS."""
    if file.suffix != ".safetensors":
        try:
            return any(key.startswith("state_dict_unet") for key in read_checkpoint(file))
        except HeadError:  # damage, which the reader of the whole names
            return True
    return any(key.startswith("state_dict_unet") for key in weight_names(file, error=HeadError))


def _load_adapters(file: Path, name: str, wanted: _Wanted) -> RestorationHead:
    if (wanted.task or RESTORATION) != RESTORATION:
        raise HeadError(f"{name}: is a file of a restorer's adapters, not a head for {wanted.task}")
    if wanted.base is None:
        raise HeadError(
            f"{name}: holds adapters alone: say which base they adapt (base, a folder or hub id: Stable Diffusion"
            " 2.1-base for PiSA-SR and OSEDiff, SD-Turbo for S3Diff)"
        )
    options = {key: getattr(wanted, key) for key in ("device", "dtype", "fold", "prompt", "adjustable")}
    head = load_restorer(file, named(wanted.base), name=name, **options)
    if wanted.family not in (None, head.family.name):
        raise HeadError(f"{name}: is a {head.family.name}, not a {wanted.family}")
    return head


def _load_restorer(source: _Source, wanted: _Wanted) -> RestorationHead:
    """A folder that `diffrep train restore` wrote; its VAE is its own where it was trained too."""
    own = dataclasses.replace(source, base=source.path) if json_of(source.path, "vae/config.json") else source
    parts, decoder = _parts(own, _unet(source, wanted), wanted, scheduler=source.base), _decoder(source, wanted)
    size = integer(source.name, source.head, "working_size", TINY.working_size)
    family: RestorationFamily = dataclasses.replace(RESTORATION_FAMILIES[source.head["family"]], working_size=size)
    about = f"{family.name}, a restorer, said by {HEAD_FILE}"
    return RestorationHead(
        Restorer(*parts, family, fold=wanted.fold, decoder=decoder),
        name=source.name,
        recognised=about,
        source=source.path,
    )


def load_segmentation(name: str | os.PathLike[str], **options: Any) -> SegmentationHead:
    """Load a segmentation head; see `load_head`."""
    return load_head(name, task="segmentation", **options)


def _find(name: str, base: str | None, task: str | None = None, **files: str | None) -> _Source:
    path = head_path(name, whole=base is None, task=task, **files)
    head = json_of(path, HEAD_FILE)
    config = json_of(path, "unet/config.json") or json_of(path, "config.json")
    if not config and not folder_of(path).exists():
        raise HeadError(f"{name}: no such folder, and the hub has no head of that name, or cannot be reached")
    return _Source(name, path, head, config, base_of(path, head) if base is None else named(base))


def _load_dense(source: _Source, wanted: _Wanted) -> DenseHead:
    recognised = _recognise(source, wanted.task, wanted.family)
    decoder = _decoder(source, wanted)
    parts = _parts(source, _unet(source, wanted), wanted)
    model = OneStep(*parts, recognised.family, fold=wanted.fold, decoder=decoder)
    about = f"{recognised.family.name}, {recognised.task} ({recognised.reason})"
    if decoder is not None:
        about += ", drawn by its own decoder"
    if note := spacing_note(recognised.family, model.schedule):
        about += f"; {note}"
    return DenseHead(model, recognised.task, name=source.name, recognised=about, source=source.path)


def _recognise(source: _Source, task: str | None, family: str | None = None) -> Recognised:
    """`recognise` with the configurations of a folder or hub id."""
    if not json_of(source.path, "unet/config.json"):
        raise HeadError(f"{source.name}: is no folder of a head, unet/config.json is missing")
    if not (vae := json_of(source.base, "vae/config.json")):
        raise HeadError(f"{source.name}: has no VAE, {source.base}/vae/config.json is missing")
    index = json_of(source.path, "model_index.json")
    return recognise(source.name, source.config, vae, source.head, index, task, family)


def _load_segmentation(source: _Source, wanted: _Wanted) -> SegmentationHead:
    path = source.place
    if wanted.base is None and not source.head and (path.is_file() or not json_of(source.path, "vae/config.json")):
        raise HeadError(
            f"{source.name}: holds a U-Net alone: say where its VAE and text encoder are (base, for example sd-turbo)"
        )
    config = source.config or json_of(source.base, "unet/config.json")
    unet = diffdis_unet(_read_diffdis(source), config, name=source.name)
    decoder = _decoder(source, wanted)
    size = integer(source.name, source.head, "working_size", 0) or 1024
    model = DiffDis(*_parts(source, unet, wanted), working_size=size, decoder=decoder)
    drawn = "its own decoder" if decoder is not None else "the VAE"
    about = f"DiffDIS (recognised by its weights), {unet.levels} levels, masks drawn by {drawn}"
    return SegmentationHead(model, name=source.name, recognised=about, source=source.path)


def _unet(source: _Source, wanted: _Wanted) -> Any:
    unet_class = network_class("UNet2DConditionModel", json_of(source.path, "unet/config.json"))
    return load_component(unet_class, source.path, "unet", wanted.dtype)


def _decoder(source: _Source, wanted: _Wanted) -> DetailDecoder | None:
    """The decoder of its own that a head's folder holds, ready to run."""
    path = source.place
    if (decoder := DetailDecoder.load(path) if path.is_dir() else None) is not None:
        check_weights(decoder, source.name)
        decoder.to(wanted.device, wanted.dtype)
    return decoder


def _parts(
    source: _Source, unet: Any, wanted: _Wanted, *, scheduler: str | None = None
) -> tuple[Any, Any, Tensor, Schedule]:
    """What every head has, ready to run: the U-Net, the VAE, the prompt's embedding, the schedule."""
    vae_class = network_class("AutoencoderKL", json_of(source.base, "vae/config.json"))
    vae = load_component(vae_class, source.base, "vae", wanted.dtype)
    make_ready(vae, unet, name=source.name, device=wanted.device, dtype=wanted.dtype)
    schedule = _schedule(source, scheduler or source.base)
    context = stored_context(source.path, source.base).to(wanted.device, wanted.dtype)
    if context.shape[-1] != unet.config.cross_attention_dim:
        raise HeadError(
            f"{source.name}: the prompt's embedding has {context.shape[-1]} channels, the U-Net attends to"
            f" {unet.config.cross_attention_dim}: it belongs to another base"
        )
    return unet, vae, context, schedule


def _schedule(source: _Source, base: str) -> Schedule:
    file = "scheduler/scheduler_config.json"
    if not (values := json_of(source.path, file) or json_of(base, file)):
        raise HeadError(f"{source.name}: {file} is missing")
    return Schedule.from_config(values)


# -- DiffDIS: its authors publish a U-Net beside the config of its base, which knows nothing of it -----------


def _holds_diffdis(source: _Source, *, fetch: bool = True) -> bool:
    """By ``head.json``, or else by the names of the weights; other heads are seen by their config alone.

    Without `fetch`, weights that lie on the hub are not looked at.
    """
    if source.head.get("family"):
        return bool(source.head["family"] == DIFFDIS)
    if source.place.is_file() or KNOWN.get(source.name, ("",))[0] == DIFFDIS:
        return True
    plain = source.config.get("class_embed_type") is None and source.config.get("in_channels") in (None, 4)
    stated = any(key in source.config for key in ("use_swci", "mid_extra_cross"))
    names: set[str] = set()
    for file in _unet_files(source) if (plain or stated) and (fetch or source.place.exists()) else ():
        names |= weight_names(file, error=HeadError)
    return is_diffdis(names)


NO_DIFFDIS = (
    "is no DiffDIS U-Net: its weights lack rgb_proj, attn3 or class_embedding; `diffrep train segmentation` makes one"
    " of a plain U-Net"
)


def head_in(name: str) -> dict[str, Any] | None:
    """What head lies in a folder or on the hub, or is embedded under a name, by its configurations; None: no head.

    Of a hub id only the configurations are fetched.

    Returns:
        JSON-ready: ``family``, ``task`` (None where the files do not say it), ``command`` that uses it, ``reason`` and
        ``timesteps``, a note where they are not those of its scheduler. Weights that cannot be read say nothing:
        whoever loads them is told.

    Raises:
        BackboneError: the hub has no such repository, or cannot be reached.
        HeadError: the folder of a head is incomplete.
    """
    folder, options = split_options(expand(name))
    on_hub = is_hub_id(folder) and not Path(folder).exists() and Path(folder).suffix not in ENDINGS
    if not on_hub and not Path(folder).is_dir() and folder not in EMBEDDED_HEADS:
        return None
    options.pop("lora", None)
    try:
        source = _find(folder, None, **options)
    except HeadError:
        if not on_hub:
            raise
        return None
    head = {"family": str(source.head.get("family")), "reason": f"said by {HEAD_FILE}", "timesteps": ""}
    with suppress(HeadError, OSError):
        if _holds_diffdis(source, fetch=False):
            return head | {"family": DIFFDIS, "task": "segmentation", "command": "segment"}
        if head["family"] in RESTORATION_FAMILIES:
            return head | {"task": RESTORATION, "command": RESTORATION}
        return _dense_head_in(source)
    return None


def _dense_head_in(source: _Source) -> dict[str, Any]:
    """`head_in`, of depth and normals.

    Raises:
        HeadError: the files say neither a task nor a pipeline of such heads.
    """
    task: str | None
    try:
        found = _recognise(source, None)
        task = found.task
    except HeadError:
        if not str(json_of(source.path, "model_index.json").get("_class_name")).startswith(("Marigold", "Lotus")):
            raise
        found, task = _recognise(source, "depth"), None  # a head, but the files do not say of what
    note = spacing_note(found.family, _schedule(source, source.base))
    about = {"family": found.family.name, "reason": found.reason, "timesteps": note}
    return about | {"task": task, "command": "normals" if found.task == "normals" else "depth"}


def _why_no_diffdis(source: _Source) -> str:
    if source.head.get("family"):
        return f"is a head for {source.head.get('task')} ({source.head['family']}), not for segmentation"
    empty = source.place.is_dir() and not _unet_files(source)
    return f"is no folder of a head, unet/{WEIGHTS} is missing" if empty else NO_DIFFDIS


def _unet_files(source: _Source) -> list[Path]:
    """The safetensors of a U-Net: its file, or those of a folder or hub id in one variant."""
    if source.place.is_file():
        return [source.place]
    if not source.place.exists() or (source.place / "unet").is_dir():
        files = repository(source.path)
        if source.place.exists() and not any(source.place.glob("unet/*.safetensors")):
            return []
        folder, variant = files.part("unet")
        return weight_files(folder / "unet", variant)
    return weight_files(source.place, split_options(source.path)[1].get("variant"))


def _read_diffdis(source: _Source) -> dict[str, Tensor]:
    """Weights of the U-Net of a folder, file or hub id; a common prefix, as repacked files have, is taken off."""
    if not (files := _unet_files(source)):
        raise HeadError(f"{source.name}: {_why_no_diffdis(source)}")
    weights = {key: value for file in files for key, value in read_weights(file, error=HeadError)[0].items()}
    marker = "rgb_proj.0.weight"
    prefix = next((key.removesuffix(marker) for key in weights if key.endswith(marker)), "")
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}


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
        raise HeadError(f"{name}: {NO_DIFFDIS}")
    network = DiffDisUNet(config)
    expected = network.state_dict()
    other = [key for key in set(expected) & set(weights) if expected[key].shape != weights[key].shape]
    if listed := misfits(set(expected) - set(weights), set(weights) - set(expected), other):
        raise HeadError(f"{name}: the weights do not fit the config: {'; '.join(listed)}")
    network.load_state_dict(dict(weights))
    return network.eval().requires_grad_(False)
