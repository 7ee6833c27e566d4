"""The embedded ViT without timm, whose import takes longer than a call: a convolutional stem, then plain blocks.

Modules and parameters have timm's names (`vit_tiny_r_s16_p8_224` and its `model_args`), and the numbers are timm's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

ARCHITECTURE = "vit_tiny_r_s16_p8_224"


def fits(architecture: str, arguments: Mapping[str, Any]) -> bool:
    """Whether timm would build what is built here."""
    plain = arguments.get("num_classes", 0) == 0 and arguments.get("dynamic_img_size", False)
    sizes = {"img_size", "patch_size", "embed_dim", "depth", "num_heads"}
    return (
        architecture == ARCHITECTURE and bool(plain) and sizes == set(arguments) - {"num_classes", "dynamic_img_size"}
    )


def _pad_same(maps: Tensor, kernel: int, stride: int, value: float = 0.0) -> Tensor:
    """TensorFlow's padding: as many cells come out as strides begin in the map; an odd rest lies behind."""
    rests = [max((-(-side // stride) - 1) * stride + kernel - side, 0) for side in maps.shape[:-3:-1]]
    return F.pad(maps, [part for rest in rests for part in (rest // 2, rest - rest // 2)], value=value)


class StandardizedConv(nn.Conv2d):
    """A convolution whose filters have mean 0 and variance 1 (arXiv 1903.10520)."""

    def forward(self, maps: Tensor) -> Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(flat, None, None, training=True, momentum=0.0, eps=1e-8).reshape_as(self.weight)
        return F.conv2d(_pad_same(maps, self.kernel_size[0], self.stride[0]), weight, self.bias, self.stride)


class ActivatedNorm(nn.GroupNorm):
    """Group norm, then ReLU."""

    def forward(self, maps: Tensor) -> Tensor:
        return F.relu(super().forward(maps))


class SamePool(nn.Module):
    """The largest of 3 x 3 cells at every second."""

    def forward(self, maps: Tensor) -> Tensor:
        return F.max_pool2d(_pad_same(maps, 3, 2, float("-inf")), 3, 2)


class HybridEmbed(nn.Module):
    """The stem, whose map has a fourth of the sides, then patches of it: (B, 3, H, W) -> (B, h, w, C)."""

    feature_ratio = (4, 4)

    def __init__(self, patch: int, width: int) -> None:
        super().__init__()
        self.backbone = nn.Sequential()
        self.backbone.add_module("conv", StandardizedConv(3, 64, 7, stride=2, bias=False))
        self.backbone.add_module("norm", ActivatedNorm(32, 64, eps=1e-5))
        self.backbone.add_module("pool", SamePool())
        self.proj = nn.Conv2d(64, width, patch, stride=patch)

    def forward(self, images: Tensor) -> Any:
        return self.proj(self.backbone(images)).permute(0, 2, 3, 1)


class JointAttention(nn.Module):
    """Self-attention with one projection for queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Any:
        q, k, v = self.qkv(tokens).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class PlainBlock(nn.Module):
    """Attention and a four times wider layer, each behind its norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = JointAttention(width, heads)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})

    def forward(self, tokens: Tensor) -> Any:
        tokens = tokens + self.attn(self.norm1(tokens))
        return tokens + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(tokens))))


class HybridVit(nn.Module):
    """A class token and the patches of an image, (B, 1 + h * w, C), behind all blocks and the last norm."""

    num_prefix_tokens, reg_token, no_embed_class, rope = 1, None, False, None

    def __init__(self, *, img_size: int, patch_size: int, embed_dim: int, depth: int, num_heads: int) -> None:
        super().__init__()
        self.embed_dim, self.patch_embed = embed_dim, HybridEmbed(patch_size, embed_dim)
        places = (img_size // (self.patch_embed.feature_ratio[0] * patch_size)) ** 2
        self.cls_token = nn.Parameter(self.patch_embed.proj.weight.new_zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(self.cls_token.new_zeros(1, 1 + places, embed_dim))
        self.pos_drop = nn.Identity()
        self.blocks = nn.ModuleList(PlainBlock(embed_dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)

    _pos_embed: Any  # which `VisionTransformer` puts there

    def forward(self, images: Tensor) -> Any:
        tokens = self._pos_embed(self.patch_embed(images))
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)
