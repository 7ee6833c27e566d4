"""Public repositories at small width: their own configuration files, random weights, the key names of their files.

The JSON files beside this module are those of the repositories; `build` cuts the widths and writes weights. Those of
VAEs carry the attention names of diffusers before 0.12, those of text encoders the prefix and the buffer of older
versions of transformers.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
UNETS = ("sd1.5", "sd2.1", "sdxl", "sdxl-refiner")
TRANSFORMERS = ("sd3", "flux.1-dev", "flux.1-schnell")
CHARACTERS = "abcdefghijklmnopqrstuvwxyz "
WIDTH, T5_WIDTH, TOKENS = 32, 72, 12  # of the text encoders
_OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def build(kind: str, folder: Path) -> Path:
    """Write a small model of a public repository into a folder."""
    import diffusers

    torch.manual_seed(0)  # the libraries' initialisation takes its draws from the global generator
    shutil.copytree(HERE / kind, folder, dirs_exist_ok=True)
    for part in ("unet", "transformer", "vae"):
        if (folder / part).is_dir():
            config = _read(folder / part / "config.json")
            cut = {"unet": _cut_unet, "transformer": _cut_transformer, "vae": _cut_vae}[part](config)
            module = getattr(diffusers, config["_class_name"]).from_config(config | cut)
            for parameter in module.parameters():  # what starts at zero would hide what goes through it
                if not parameter.any():
                    torch.nn.init.normal_(parameter, std=0.05)
            module.save_pretrained(folder / part)
            if part == "vae":
                rename(folder / part / "diffusion_pytorch_model.safetensors", _old_vae_name)
    index = _read(folder / "model_index.json")
    for part in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        if (folder / part).is_dir():
            suffix = part.removeprefix("text_encoder")
            if index[part][1] == "T5EncoderModel":
                save_t5(folder, suffix)
                index[f"tokenizer{suffix}"] = ["transformers", "PreTrainedTokenizerFast"]
            else:
                save_clip(folder, suffix, _read(folder / part / "config.json"), index[part][1])
    if "safety_checker" in index:
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def rename(file: Path, name: Callable[[str], str]) -> None:
    """Give the tensors of a safetensors file other names."""
    weights = load_file(file)
    save_file({name(key): value for key, value in weights.items()}, file, metadata={"format": "pt"})


def _old_vae_name(key: str) -> str:
    if ".attentions." in key:
        for new, old in _OLD_ATTENTION.items():
            key = key.replace(f".{new}.", f".{old}.")
    return key


def _cut_unet(config: dict[str, Any]) -> dict[str, Any]:
    widths = (32, 32, 64, 64)[: len(config["block_out_channels"])]
    sizes: dict[str, Any] = {"block_out_channels": widths, "norm_num_groups": 8, "sample_size": 16}
    heads = config["attention_head_dim"]
    sizes["attention_head_dim"] = [w // 16 for w in widths] if isinstance(heads, list) else heads // 2
    sizes["cross_attention_dim"] = 2 * WIDTH if config["cross_attention_dim"] == 2048 else WIDTH
    if isinstance(depths := config.get("transformer_layers_per_block"), list):
        sizes["transformer_layers_per_block"] = [min(depth, 2) for depth in depths]
    elif depths:
        sizes["transformer_layers_per_block"] = 1
    if config.get("addition_embed_type"):
        numbers = (config["projection_class_embeddings_input_dim"] - 1280) // config["addition_time_embed_dim"]
        sizes |= {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": WIDTH + 8 * numbers}
    return sizes


def _cut_vae(config: dict[str, Any]) -> dict[str, Any]:
    return {"block_out_channels": (16, 16, 32, 32), "layers_per_block": 1, "norm_num_groups": 8}


def _cut_transformer(config: dict[str, Any]) -> dict[str, Any]:
    if config["_class_name"] == "FluxTransformer2DModel":  # the rotary embedding fixes the width of its heads
        sizes = {"num_layers": 1, "num_single_layers": 2, "num_attention_heads": 1, "pooled_projection_dim": WIDTH}
    else:
        sizes = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "caption_projection_dim": 32}
        sizes |= {"pooled_projection_dim": 2 * WIDTH, "pos_embed_max_size": 24, "sample_size": 16}
    return sizes | {"joint_attention_dim": T5_WIDTH}


def save_clip(folder: Path, suffix: str, config: dict[str, Any], kind: str) -> None:
    """A CLIP text encoder and its tokenizer; every character is a token."""
    import transformers

    vocabulary = {c: i for i, c in enumerate(CHARACTERS)}
    vocabulary |= {f"{c}</w>": i + len(CHARACTERS) for i, c in enumerate(CHARACTERS)}
    vocabulary |= {"<|startoftext|>": len(vocabulary), "<|endoftext|>": len(vocabulary) + 1}
    sizes = {"vocab_size": len(vocabulary), "hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 3}
    sizes |= {"num_attention_heads": 2, "max_position_embeddings": TOKENS, "projection_dim": WIDTH}
    model = getattr(transformers, kind)(transformers.CLIPTextConfig(**(config | sizes)))
    model.save_pretrained(folder / f"text_encoder{suffix}")
    file = folder / f"text_encoder{suffix}" / "model.safetensors"
    rename(file, lambda key: key if key.startswith(("text_model.", "text_projection")) else f"text_model.{key}")
    weights = load_file(file) | {"text_model.embeddings.position_ids": torch.arange(TOKENS)[None]}
    save_file(weights, file, metadata={"format": "pt"})
    tokenizer = folder / f"tokenizer{suffix}"
    tokenizer.mkdir()
    (tokenizer / "vocab.json").write_text(json.dumps(vocabulary))
    (tokenizer / "merges.txt").write_text("#version: 0.2\n")
    (tokenizer / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": TOKENS, "unk_token": "<|endoftext|>"})
    )


def save_t5(folder: Path, suffix: str) -> None:
    """A T5 encoder and its tokenizer; every character is a token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    config = T5Config(vocab_size=40, d_model=T5_WIDTH, d_kv=9, d_ff=24, num_layers=2, num_heads=4)
    T5EncoderModel(config).save_pretrained(folder / f"text_encoder{suffix}")
    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {c: i + 3 for i, c in enumerate(CHARACTERS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=TOKENS
    )
    fast.save_pretrained(folder / f"tokenizer{suffix}")


def _read(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text()))
