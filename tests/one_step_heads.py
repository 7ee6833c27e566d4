"""One-step heads with random weights, as folders, for the tests."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from diffrep.heads.loading import write_head


def random_head(folder: Path, *, family: str = "lotus-d", task: str = "disparity", working_size: int = 64) -> Path:
    """A small head on the embedded VAE that draws something else for every image."""
    torch.manual_seed(0)  # diffusers' initialisation draws from the global generator
    unet = UNet2DConditionModel(
        in_channels=8 if family == "lotus-d" else 16,
        out_channels=8,
        sample_size=16,
        block_out_channels=(16, 16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        cross_attention_dim=24,
        norm_num_groups=4,
        class_embed_type="projection" if family.startswith("lotus") else None,
        projection_class_embeddings_input_dim=4 if family.startswith("lotus") else None,
    )
    with torch.no_grad():
        unet.conv_out.weight.mul_(30)  # of a size that the decoder turns into a picture
    context = torch.randn(1, 2, 24, generator=torch.Generator().manual_seed(1))
    write_head(
        folder,
        unet,
        base="tiny",
        family=family,
        task=task,
        context=context,
        working_size=working_size,
        dtype=torch.float32,
    )
    return folder
