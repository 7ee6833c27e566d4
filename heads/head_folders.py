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
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from diffrep.backbones.pipelines import local_variant, read_json
from diffrep.backbones.repositories import EMBEDDED, HUB, MODELS, is_hub_id, without_fetching
from diffrep.backbones.text import TextEncoders
from diffrep.files import save_weights, write_document, write_whole
from diffrep.heads.families import Frame
from diffrep.heads.head import Head

HEAD_FILE, CONTEXT_FILE, WEIGHTS = "head.json", "context.safetensors", "diffusion_pytorch_model.safetensors"
DIFFDIS = "diffdis"  # what ``head.json`` calls the family of segmentation heads


class HeadError(ValueError):
    """A head that cannot be found, recognised or loaded; the message names the folder and what is wrong."""


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
        folder: made where it is missing; what is in it is replaced.
        unet: diffrep's or diffusers' `UNet2DConditionModel`; it is left as it is.
        base: where VAE and scheduler come from: an embedded model's name, a folder, or a hub id. A folder is noted
            relative to the head's where that is possible.
        family: a name out of `diffrep.heads.families.FAMILIES`, or "diffdis".
        task: "depth", "disparity", "normals" or "segmentation".
        context: (1, tokens, C), what the U-Net was trained to attend to.
        working_size: long side in pixels at which the head works by default.
        frame: camera axes of the normals, where they are not those of the family.
        scheduler: a diffusers scheduler config, where it is not that of the base.
        extra: further JSON values for ``head.json``, for example steps, seed, data, measured quality.
        dtype: of the weights on disk.
    """
    weights = {name: value.to(dtype) for name, value in unet.state_dict().items()}
    config = {k: v for k, v in dict(unet.config).items() if not k.startswith("_")}
    write_document(folder / "unet" / "config.json", config | {"_class_name": "UNet2DConditionModel"})
    save_weights(folder / "unet" / WEIGHTS, weights, format="pt")
    save_weights(folder / CONTEXT_FILE, {"context": context.float()})
    if scheduler is not None:
        write_document(folder / "scheduler" / "scheduler_config.json", scheduler)
    if Path(base).is_dir():
        base = os.path.relpath(Path(base).resolve(), folder.resolve())
    values = {"base": base, "family": family, "task": task, "working_size": working_size}
    write_document(folder / HEAD_FILE, values | ({"frame": frame} if frame else {}) | dict(extra or {}))


def save_head(head: Head[Any, Any], folder: Path) -> None:
    """Write the folder that a head was loaded from, with all that it needs of its base; published ones then say what
    they are.

    Raises:
        HeadError: the head was made in memory: `write_head` writes such.
    """
    if not head.source:
        raise HeadError(f"{head.name}: was made in memory and has no files to save; write_head writes such heads")
    place = _local(head.source)
    about = json_of(str(place), HEAD_FILE)
    base = _local(head.base or base_of(head.source, about))
    for part in ("unet", "vae", "scheduler"):
        for file in sorted((place if (place / part).is_dir() else base).glob(f"{part}/*")):
            if file.suffix in (".json", ".safetensors"):
                write_whole(folder / part / file.name, partial(shutil.copyfile, file))
    for file in place.glob("decoder.*"):
        write_whole(folder / file.name, partial(shutil.copyfile, file))
    context = stored_context(str(place), str(base), torch.device("cpu"), torch.float32)
    save_weights(folder / CONTEXT_FILE, {"context": context})
    known = {"family": (getattr(head.model, "family", None) and head.model.family.name) or DIFFDIS, "task": head.task}
    about = {"working_size": getattr(head, "working_size", None) or head.model.working_size, **known, **about}
    write_document(folder / HEAD_FILE, about | {"base": "."})


def _local(source: str) -> Path:
    """The folder of a head, or of a hub id that has been fetched."""
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(source, local_files_only=True))


def prompt_context(
    source: str | os.PathLike[str], *, device: torch.device | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The embedding (1, 2, C) of the empty prompt, tokenised without padding, by the text encoder of a folder.

    Raises:
        BackboneError: the folder has no text encoder or tokenizer.
    """
    path = named(os.fspath(source))
    text = TextEncoders(
        path,
        {"text_encoder": "CLIPTextModel"},
        device=device or torch.device("cpu"),
        dtype=dtype,
        variant=variant_of(path, "text_encoder"),
        pad=False,
    )
    return text.encode([""])[""].context.clone()  # a tensor that training may use too


def stored_context(source: str, base: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The stored embedding of the prompt; the text encoder is only loaded where there is none."""
    files = (Path(place) / CONTEXT_FILE for place in (source, base))
    if file := next((file for file in files if file.is_file()), None):
        stored = read_weights(file)
        if "context" not in stored:
            raise HeadError(f"{file}: holds {', '.join(sorted(stored))}, not the prompt's embedding, context")
        return stored["context"].to(device, dtype)
    own = Path(source).is_dir() and (Path(source) / "text_encoder").is_dir()
    hub = not Path(source).exists() and base == source
    return prompt_context(source if own or hub else base, device=device, dtype=dtype)


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
    if (relative := Path(source) / base).is_dir():
        return str(relative)
    if base in HUB or is_hub_id(base):
        if (local := without_fetching(base)) is not None:
            return local
        raise HeadError(
            f"{source}: {HEAD_FILE} names the base {base}, which would have to be fetched: nothing is fetched because a"
            f" file says so; to have it fetched name it as the base: --base {base}, or base={base!r} in Python"
        )
    raise HeadError(f"{source}: {HEAD_FILE} names the base {base}, which is no folder and no known model")


def named(base: str) -> str:
    """The folder or hub id that a name stands for."""
    return str(MODELS / base) if base in EMBEDDED else HUB.get(base, os.path.expanduser(base))


def variant_of(source: str, part: str) -> str | None:
    """The variant of the weight files of a part of a folder; None: the plain ones, or a hub id."""
    folder = Path(source) / part
    return local_variant(folder) if folder.is_dir() else None


def json_of(source: str, file: str) -> dict[str, Any]:
    """A JSON file of a folder or hub id; empty where there is none, or where the source is a file."""
    return {} if Path(source).is_file() else read_json(source, file, required=False)


def read_weights(path: Path) -> dict[str, Tensor]:
    """A safetensors file.

    Raises:
        HeadError: it is damaged.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise HeadError(f"{path}: is damaged or no safetensors file ({error})") from None
