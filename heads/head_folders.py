"""The folder of a head: what lies in it, where the rest lies, and how it is written.

A head that diffrep writes holds only what is new, the U-Net and the prompt's embedding, and names its base in
``head.json``; published ones hold everything.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffrep.backbones import weight_files as formats
from diffrep.backbones.repositories import (
    CLEANDIFT,
    EMBEDDED,
    HUB,
    MODELS,
    REPOSITORIES,
    TIMM,
    cached_snapshot,
    expand,
    is_hub_id,
    looks_like_path,
    repository,
    split_options,
    weight_files,
    with_options,
    without_fetching,
)
from diffrep.backbones.text import TextEncoders
from diffrep.files import (
    number_of,
    read_document,
    read_weights,
    save_weights,
    weight_names,
    write_document,
    write_whole,
)
from diffrep.heads.head import Head, HeadError

HEAD_FILE, CONTEXT_FILE, WEIGHTS = "head.json", "context.safetensors", "diffusion_pytorch_model.safetensors"
EMBEDDED_HEADS = ("tiny-depth", "tiny-normals", "tiny-segmentation", "tiny-restore")
MARIGOLD_KEYS = ("use_full_z_range", "shift_invariant")  # of its ``model_index.json``: z of normals, ensembles
DIFFDIS = "diffdis"  # what ``head.json`` calls the family of segmentation heads
KNOWN: dict[str, tuple[str, Any]] = {  # published checkpoints: family and task, which their files do not say
    name: (family, task)
    for family, tasks in read_document(Path(__file__).with_name("checkpoints.json")).items()
    for task, names in tasks.items()
    for name in names
}


def head_path(
    name: str, *, whole: bool, task: str | None = None, variant: str | None = None, revision: str | None = None
) -> str:
    """Where a head's files lie: a folder, a file, or a hub id, with the variant and revision behind it.

    Args:
        name: an embedded head, a path, a cache folder of the hub, or a hub id.
        whole: a U-Net alone stands for the diffusers folder that it lies in.
        task: what the head is wanted for, which the refusal of a file names.

    Raises:
        HeadError: there is nothing of that name, or no head; the message says what it is.
    """
    path = str(MODELS / name) if name in EMBEDDED_HEADS else expand(name)
    local = Path(path).exists()
    if not local and not is_hub_id(name):
        if name in {*EMBEDDED, *REPOSITORIES, *CLEANDIFT, *TIMM} or name.startswith(("timm:", "open_clip:")):
            raise HeadError(f"{name}: is a backbone and no head; `diffrep train` makes one of a diffusion model")
        if looks_like_path(name):
            raise HeadError(f"{path}: there is no such folder or file")
        raise HeadError(
            f"{name}: no such folder or file and no known head; give {', '.join(EMBEDDED_HEADS)}, a folder, or a hub id"
            f" such as {next(iter(KNOWN))}"
        )
    if Path(path).is_file():
        if variant or revision:
            raise HeadError(f"{path}: is a file, which has no variant and no revision")
        _check_file(Path(path), task)
    elif local:
        if (snapshot := cached_snapshot(Path(path), revision)) is not None:
            path, revision = str(snapshot), None
        if revision is not None:
            raise HeadError(f"{name}: is a folder, which has no revision {revision}")
        parent = Path(path).resolve().parent
        if whole and Path(path).name == "unet" and (parent / "model_index.json").is_file():
            path = str(parent)  # a U-Net stands for the folder around it
    return with_options(path, variant=variant, revision=revision)


def folder_of(source: str) -> Path:
    """The path in a name that variant and revision may stand behind."""
    return Path(split_options(source)[0])


def _check_file(path: Path, task: str | None) -> None:
    """Refuse a file that holds no DiffDIS.

    Raises:
        HeadError: saying what it is instead.
    """
    if path.suffix == ".safetensors":
        names = weight_names(path, error=HeadError)  # a file of gigabytes is read once, by what takes it
    else:
        names = set(formats.read_weights(path))
    if any(key.endswith("rgb_proj.0.weight") for key in names):
        return
    whole = "a backbone in one file, no head" if any(key.startswith("model.diffusion_model.") for key in names) else ""
    listed = f"no head, it holds {number_of(len(names), 'tensor')} ({', '.join(sorted(names)[:2])}, ...)"
    what = formats.describe_weights(names)[0] or whole or listed
    raise HeadError(f"{path}: is {what}; {_GIVEN_AS.get(str(task), _GIVEN_AS['depth'])}")


_GIVEN_AS = {  # task -> how its heads are given
    "depth": "a head for depth or normals is given as its whole diffusers folder or hub id",
    "segmentation": "a head for segmentation is given as the folder or the weight file of a DiffDIS U-Net",
    "restore": "a restorer is given as a folder of `diffrep train restore`, or as the file of a PiSA-SR, OSEDiff or"
    " S3Diff with its base",
}


def published(name: str) -> tuple[str | None, Any]:
    """Family and task of a published head: by its hub id, a folder of its name, or its folder in a cache of the hub."""
    named_so = {key.split("/")[1]: value for key, value in KNOWN.items()}
    cached = {f"models--{key.replace('/', '--')}": value for key, value in KNOWN.items()}
    parts = Path(os.path.abspath(os.path.expanduser(name))).parts
    in_cache = next((cached[part] for part in parts if part in cached), None)
    folder = parts[-2] if parts[-1] == "unet" and len(parts) > 1 else parts[-1]
    return KNOWN.get(name) or named_so.get(folder) or in_cache or (None, None)


def write_head(
    folder: Path,
    unet: Any,
    *,
    base: str,
    family: str,
    task: str,
    context: Tensor,
    working_size: int,
    extra: Mapping[str, object] | None = None,
    vae: Any = None,
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write a head as a folder that holds only what is new: the U-Net, the prompt's embedding, ``head.json``.

    Args:
        folder: made where it is missing; what is in it is replaced.
        unet: diffrep's or diffusers' `UNet2DConditionModel`; it is left as it is.
        base: where VAE and scheduler come from: an embedded model's name, a folder, or a hub id. A folder is noted
            relative to the head's where that is possible.
        family: a name out of `diffrep.heads.families.FAMILIES`, or "diffdis".
        task: "depth", "disparity", "normals" or "segmentation".
        context: (1, tokens, C), what the U-Net was trained to attend to.
        working_size: long side in pixels at which the head works by default.
        extra: further JSON values for ``head.json``: "frame", the camera axes of normals where they are not those of
            the family; and for example steps, seed, data, measured quality.
        vae: the `AutoencoderKL`, where it was trained too.
        dtype: of the weights on disk.
    """
    parts = {"unet": (unet, "UNet2DConditionModel")} | ({} if vae is None else {"vae": (vae, "AutoencoderKL")})
    for part, (network, kind) in parts.items():
        weights = {name: value.to(dtype).contiguous() for name, value in network.state_dict().items()}
        config = {k: v for k, v in dict(network.config).items() if not k.startswith("_")}
        write_document(folder / part / "config.json", config | {"_class_name": kind})
        save_weights(folder / part / WEIGHTS, weights, format="pt")
    save_weights(folder / CONTEXT_FILE, {"context": context.float()})
    if Path(base).is_dir():
        base = os.path.relpath(Path(base).resolve(), folder.resolve())
    values = {"base": base, "family": family, "task": task, "working_size": working_size}
    write_document(folder / HEAD_FILE, values | dict(extra or {}))


def save_head(head: Head[Any, Any], folder: Path) -> None:
    """Write the folder that a head was loaded from, with all that it needs of its base; published ones then say what
    they are.

    Raises:
        HeadError: the head was made in memory: `write_head` writes such.
    """
    if not head.source:
        raise HeadError(f"{head.name}: was made in memory and has no files to save; write_head writes such heads")
    place = _local(head.source)
    if place.is_file() and head.family_name != DIFFDIS:
        raise HeadError(f"{head.name}: is a file of adapters for {head.base}: copy it, there is no more to save")
    about = json_of(str(place), HEAD_FILE)
    base = head.base or base_of(head.source, about)
    files = {file.name: file for file in place.glob("decoder.*")}  # name in the new folder -> file
    for part in ("unet", "vae", "scheduler"):
        source = head.source if (place / part).is_dir() else base
        files |= {f"{part}/{file.name}": file for file in _local(source).glob(f"{part}/*.json")}
        if part != "scheduler":
            files |= {f"{part}/{file.name}": file for file in _weights_in(source, part)}
    if place.is_file() or not (place / "unet").is_dir():  # a U-Net alone, beside the configuration of its base
        files = {name: file for name, file in files.items() if not name.startswith("unet/diffusion_pytorch_model")}
        alone = [place] if place.is_file() else weight_files(place, split_options(head.source)[1].get("variant"))
        files |= {f"unet/{WEIGHTS if len(alone) == 1 else file.name}": file for file in alone}
        files |= {f"unet/{file.name}": file for file in place.glob("config.json")}
    for name, file in files.items():
        write_whole(folder / name, partial(shutil.copyfile, file))
    save_weights(folder / CONTEXT_FILE, {"context": stored_context(str(place), str(_local(base)))})
    index = json_of(head.source, "model_index.json")
    known: dict[str, Any] = {key: index[key] for key in MARIGOLD_KEYS if key in index}
    known |= {"working_size": head.working_size, "family": head.family_name, "task": head.task}
    write_document(folder / HEAD_FILE, known | about | {"base": "."})


def _weights_in(source: str, part: str) -> list[Path]:
    """The weight files of a component, in the variant that was asked for."""
    folder, variant = repository(source).part(part, need=False)
    return weight_files(folder / part, variant)


def _local(source: str) -> Path:
    """The folder or file of a head, or the folder of a hub id that has been fetched."""
    name, options = split_options(source)
    if Path(name).exists():
        return Path(name)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, revision=options.get("revision"), local_files_only=True))


def stored_context(source: str, base: str) -> Tensor:
    """The embedding (1, tokens, C) of the empty prompt that a head's folder or its base holds.

    Where none is stored, the text encoder computes it: two tokens, without padding.

    Raises:
        HeadError: the file holds something else.
        BackboneError: there is no text encoder or tokenizer either.
    """
    files = (folder_of(place) / CONTEXT_FILE for place in (source, base))
    if file := next((file for file in files if file.is_file()), None):
        stored, _ = read_weights(file, error=HeadError)
        if "context" not in stored:
            raise HeadError(f"{file}: holds {', '.join(sorted(stored))}, not the prompt's embedding, context")
        return stored["context"]
    place = source if (folder_of(source) / "text_encoder").is_dir() else base
    return TextEncoders(named(place), pad=False).encode([""])[""].context.clone()  # a tensor that training may use too


def base_of(source: str, head: Mapping[str, Any]) -> str:
    """Where VAE and scheduler lie.

    Raises:
        HeadError: that is nowhere, or would have to be fetched.
    """
    if not head.get("base"):
        return source
    base = str(head["base"])
    if base in EMBEDDED:
        return named(base)
    if (relative := folder_of(source) / base).is_dir():
        return str(relative)
    if base not in HUB and not is_hub_id(base):
        raise HeadError(f"{source}: {HEAD_FILE} names the base {base}, which is no folder and no known model")
    if (local := without_fetching(base)) is not None:
        return local
    raise HeadError(
        f"{source}: {HEAD_FILE} names the base {base}, which would have to be fetched: nothing is fetched because a"
        f" file says so; to have it fetched name it as the base: --base {base}, or base={base!r} in Python"
    )


def named(base: str) -> str:
    """The folder or hub id that a name stands for."""
    name, options = split_options(expand(base))
    return with_options(MODELS / name if name in EMBEDDED else HUB.get(name, name), **options)


def json_of(source: str, file: str) -> dict[str, Any]:
    """A JSON file of a folder or hub id; empty where there is none, or where the source is a file."""
    return {} if folder_of(source).is_file() else repository(source).json(file, required=False)
