"""Weight files of others, read without running anything that is in them, and what they are by their tensors' names."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffrep import files
from diffrep.backbones.base import BackboneError
from diffrep.files import one_line

ENDINGS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf")
_INSIDE = (
    "state_dict",
    "aggregation_network",
    "params_ema",
    "params",
    "model_state_dict",
    "model_ema",
    "model",
    "teacher",
)  # where training programs put weights


class _Inert:
    """Stands for every class that a checkpoint names and that is no tensor: takes anything, does nothing."""

    def __new__(cls, *args: object, **kwargs: object) -> _Inert:
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        pass

    def __setitem__(self, key: object, value: object) -> None:
        pass


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint: safetensors, or what `torch.save` writes (``.ckpt``, ``.pt``, ``.pth``, ``.bin``).

    Checkpoints of training programs name classes of those programs. Neither is needed or run: only tensors are read,
    everything else becomes an inert object.

    Raises:
        BackboneError: the file is missing, damaged, a Git LFS pointer, of another format, or holds no state dict.
    """
    if not path.is_file():
        raise BackboneError(f"{path}: there is no such file")
    with path.open("rb") as opened:
        start = opened.read(4)
    if start == b"GGUF":
        raise BackboneError(f"{path}: is a GGUF file, whose weights are quantised; give the model as safetensors")
    if files.is_lfs_pointer(path):
        raise BackboneError(f"{path}: {files.UNFETCHED}")
    if path.suffix == ".safetensors":
        return files.read_weights(path, error=BackboneError)[0]
    try:
        loaded = _read_pickle(path)
    except Exception as error:  # torch raises several kinds for files that are damaged or forbidden
        if "TorchScript" in str(error):
            raise BackboneError(
                f"{path}: is a program (TorchScript) and no weights, as OpenAI's CLIP comes; that is"
                " open_clip:MODEL/openai, for example open_clip:ViT-B-32/openai"
            ) from None
        raise BackboneError(f"{path}: {unsafe(error)}") from None
    for name in _INSIDE:
        if isinstance(loaded, dict) and isinstance(loaded.get(name), Mapping):
            loaded = loaded[name]
            break
    weights = (
        {key: value for key, value in loaded.items() if isinstance(value, Tensor)}
        if isinstance(loaded, Mapping)
        else {}
    )
    if not weights or not all(isinstance(key, str) for key in weights):
        raise BackboneError(f"{path}: holds no plain state dict (name -> tensor) that can be read safely")
    return weights


def unsafe(error: Exception) -> str:
    """What is wrong with a file that `torch.load` has refused; its own words are about an option of Python's."""
    reason = "torch.save did not write it, or it is damaged" if "weights_only" in str(error) else one_line(error)
    return f"is no checkpoint that can be read safely ({reason})"


def _read_pickle(path: Path) -> Any:
    try:
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except ValueError:  # the format before torch 1.6, or a program: plain tensors only
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, weights_only=True, map_location="cpu")
    inert: list[Any] = [(_Inert, name) for name in foreign]
    with torch.serialization.safe_globals(inert), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.load(path, weights_only=True, map_location="cpu", mmap=True)


# Parts of names that only such files have (a leading ^: how a name begins; all of a row's groups must be met), what the
# file is, and what to give instead; the first row that fits counts
_SIGNS: tuple[tuple[tuple[tuple[str, ...], ...], str, str], ...] = (
    (
        (("lora_unet_", "lora_te", ".lora_A.", ".lora_B.", ".lora_down.", ".lora_up.", ".lora.down.", ".lora.up."),),
        "a LoRA, small changes to the weights of a model",
        "give that model as the backbone and this file beside it: --lora FILE, or load_backbone(MODEL, lora=FILE)",
    ),
    ((("control_model.", "controlnet_cond_embedding."),), "a ControlNet", "give the model that it steers"),
    (
        (("rgb_proj.0.",), (".attn3.to_q.",)),
        "a segmentation head (DiffDIS)",
        "`diffrep segment --model` uses it, and load_head; give the model that it was fine-tuned from",
    ),
    ((("joint_blocks.0.",),), "Stable Diffusion 3 in one file", "give its diffusers folder, or sd3.5-medium"),
    ((("double_blocks.0.",),), "FLUX in one file", "give its diffusers folder, or flux.1-dev"),
    ((("emb_params", "string_to_param"),), "a textual inversion, one word", "give the model it belongs to"),
    (
        (("RRDB_trunk.", "conv_first.", "model.1.sub.", "upsampler.", "up.0.residual_group."),),
        "an upscaler of images",
        "no features for matching can be read from it; give a diffusion model",
    ),
    ((("mixing_weights",),), "an aggregation network", "give hyperfeatures:FILE"),
    ((("^encoder.", "^first_stage_model."), ("decoder.",)), "a VAE alone", "give the model that it belongs to"),
    (
        (("embeddings.patch_embedding",),),
        "a vision transformer of transformers",
        "give the folder that it lies in, with its config.json",
    ),
    ((("^text_model.",),), "a text encoder alone", "give the model that it belongs to"),
    (
        (("^conv_in.",), ("^down_blocks.",)),
        "a U-Net alone, without VAE and schedule",
        "give its whole diffusers folder",
    ),
    (
        (("^input_blocks.",), (".transformer_blocks.",)),
        "a U-Net alone, without VAE",
        "give the whole checkpoint, or a diffusers folder",
    ),
    (
        (("^transformer_blocks.", "^single_transformer_blocks."),),
        "a diffusion transformer alone, without VAE",
        "give its whole diffusers folder",
    ),
)


def describe_weights(names: Iterable[str]) -> tuple[str, str]:
    """What a file is, and what to give instead, where it is no backbone by itself; ("", "") where it may be one.

    Args:
        names: of its tensors.

    >>> describe_weights(["lora_unet_mid_block_attentions_0_proj_in.lora_up.weight"])[0]
    'a LoRA, small changes to the weights of a model'
    """
    marked = [f"^{name}" for name in names]
    if any(name.startswith("^model.diffusion_model.input_blocks.") for name in marked):  # a whole checkpoint
        return "", ""
    for groups, what, instead in _SIGNS:
        if all(any(sign in name for sign in group for name in marked) for group in groups):
            return what, instead
    return "", ""
