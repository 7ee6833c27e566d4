"""Small random models in the public folder layouts, built once per test run."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

# before torch is imported: threads that wait must not spin on a core that another process needs, which made the
# tests ten times slower wherever they shared their cores; the notebooks' kernels inherit it
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if "PYTEST_XDIST_WORKER" in os.environ:  # as many workers as cores: a thread each
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing in the tests may reach a hub
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch
from hypothesis import settings

CHARACTERS = "abcdefghijklmnopqrstuvwxyz "


def save_text_encoder(folder: Path, suffix: str = "", *, projection: bool = False) -> None:
    """A CLIP text encoder and its tokenizer with random weights; every character is a token."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    vocabulary = {c: i for i, c in enumerate(CHARACTERS)}
    vocabulary |= {f"{c}</w>": i + len(CHARACTERS) for i, c in enumerate(CHARACTERS)}
    vocabulary |= {"<|startoftext|>": len(vocabulary), "<|endoftext|>": len(vocabulary) + 1}
    config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=12,
        projection_dim=16,
        bos_token_id=len(vocabulary) - 2,
        eos_token_id=len(vocabulary) - 1,
    )
    kind = CLIPTextModelWithProjection if projection else CLIPTextModel
    kind(config).save_pretrained(folder / f"text_encoder{suffix}")
    tokenizer = folder / f"tokenizer{suffix}"
    tokenizer.mkdir()
    (tokenizer / "vocab.json").write_text(json.dumps(vocabulary))
    (tokenizer / "merges.txt").write_text("#version: 0.2\n")
    (tokenizer / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 12, "unk_token": "<|endoftext|>"})
    )


@pytest.fixture(scope="session")
def sd_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion folder with random weights: four levels, 8 px per latent cell."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

    folder = tmp_path_factory.mktemp("sd")
    torch.manual_seed(0)  # the libraries' initialisation takes its draws from the global generator
    UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 16, 32, 32),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
    ).save_pretrained(folder / "unet")
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        scaling_factor=0.18215,
    ).save_pretrained(folder / "vae")
    save_text_encoder(folder)
    DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).save_pretrained(
        folder / "scheduler"
    )
    (folder / "model_index.json").write_text(
        json.dumps(
            {
                "_class_name": "StableDiffusionPipeline",
                "unet": ["diffusers", "UNet2DConditionModel"],
                "vae": ["diffusers", "AutoencoderKL"],
                "text_encoder": ["transformers", "CLIPTextModel"],
                "tokenizer": ["transformers", "CLIPTokenizer"],
                "scheduler": ["diffusers", "DDIMScheduler"],
            }
        )
    )
    return folder


@pytest.fixture(scope="session")
def sdxl_folder(sd_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion XL folder with random weights: three levels, two text encoders, size conditions."""
    from diffusers import UNet2DConditionModel

    folder = tmp_path_factory.mktemp("sdxl")
    torch.manual_seed(1)
    UNet2DConditionModel(
        sample_size=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(16, 16, 32),
        layers_per_block=2,
        transformer_layers_per_block=(1, 1, 2),
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=4,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
    ).save_pretrained(folder / "unet")
    save_text_encoder(folder)
    save_text_encoder(folder, "_2", projection=True)
    for part in ("vae", "scheduler"):
        shutil.copytree(sd_folder / part, folder / part)
    (folder / "model_index.json").write_text(
        json.dumps(
            {
                "_class_name": "StableDiffusionXLPipeline",
                "unet": ["diffusers", "UNet2DConditionModel"],
                "vae": ["diffusers", "AutoencoderKL"],
                "text_encoder": ["transformers", "CLIPTextModel"],
                "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
                "tokenizer": ["transformers", "CLIPTokenizer"],
                "tokenizer_2": ["transformers", "CLIPTokenizer"],
                "scheduler": ["diffusers", "DDIMScheduler"],
            }
        )
    )
    return folder


@pytest.fixture(scope="session")
def vit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViT in timm's hub layout with random weights, patch 8, trained size 64."""
    import timm
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("vit")
    args = {"img_size": 64, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 0}
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **args)
    save_file(model.state_dict(), folder / "model.safetensors")
    config = {
        "architecture": "vit_tiny_patch16_224",
        "model_args": args,
        "pretrained_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "input_size": [3, 64, 64]},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


settings.register_profile("diffrep", deadline=None, derandomize=True)  # a busy machine is no failure
settings.load_profile("diffrep")
