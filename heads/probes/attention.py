"""Transformer heads: tokens of one or several maps are read out by a CLS token or by their mean.

Sources: "Diffusion Models Beat GANs on Image Classification" (arXiv 2307.08702), whose attention head is a layer
string applied to one map, and "Do text-free diffusion models learn discriminative visual representations?" (arXiv
2311.17921), whose `AttentionFusion` brings the maps of several blocks to one width first: with one block it is
that paper's Attention head, with several blocks and timesteps its DifFormer. State names are the released ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"relu": nn.ReLU, "identity": nn.Identity}

MOST_BLOCKS = 1000  # of a transformer


class _SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        split = self.qkv(tokens).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        queries, keys, values = split.unbind(0)
        mixed = F.scaled_dot_product_attention(queries, keys, values)
        projected: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return projected


class _Mlp(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(tokens)))
        return out


class TransformerBlock(nn.Module):
    """x += attention(norm(x)); x += mlp(norm(x)). Queries, keys and values have no bias; exact GELU; no dropout."""

    def __init__(self, width: int, heads: int, ratio: float = 4) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"an attention of width {width} cannot be split into {heads} heads")
        self.norm1, self.attn = nn.LayerNorm(width), _SelfAttention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width), _Mlp(width, int(width * ratio))

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        tokens = tokens + self.attn(self.norm1(tokens))
        out: Tensor = tokens + self.mlp(self.norm2(tokens))
        return out


_STEPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # (map or tokens, class token) -> tokens or vector
    "Reshape": lambda maps, _: maps.flatten(2).mT,
    "Insert_CLS_Token": lambda tokens, token: torch.cat([token.expand(len(tokens), -1, -1), tokens], dim=1),
    "Extract_CLS_Token": lambda tokens, _: tokens[:, 0],
    "FullyPool": lambda tokens, _: tokens.mean(1),
}


class _Step(nn.Module):
    """A place in the list of layers for what has no weights."""

    def __init__(self, word: str) -> None:
        super().__init__()
        self.run = _STEPS[word]


class TokenReadout(nn.Module):
    """A head written as the released layer string.

    The words, separated by commas: ``Use_CLS_Token:True:D`` (first), ``Pool:k:s``, ``Reshape`` (map to tokens, row
    by row), ``Insert_CLS_Token``, ``Attention:D:heads:ratio:n``, ``Extract_CLS_Token`` or ``FullyPool`` (mean over
    tokens), ``Dense:in:out:activation`` (relu or identity).

    >>> TokenReadout("Use_CLS_Token:True:8,Insert_CLS_Token,Attention:8:2:4:1,Extract_CLS_Token").width
    8

    Raises:
        ValueError: a word is unknown or lacks a number (the released code ignores unknown words).
    """

    def __init__(self, layers: str) -> None:
        super().__init__()
        first, *words = layers.split(",")
        name, *numbers = first.split(":")
        if name != "Use_CLS_Token" or len(numbers) != 2:
            raise ValueError(f"a layer string starts with Use_CLS_Token:True:WIDTH, got {first!r}")
        self.width = int(numbers[1])
        self.cls_token = nn.Parameter(torch.zeros(1, 1, self.width))
        self.layers = nn.ModuleList(layer for word in words for layer in _layers_of(word))

    def forward(self, x: Tensor) -> Tensor:
        """A map (B, C, h, w) or tokens (B, N, C), as the first layer wants them -> (B, D)."""
        for layer in self.layers:
            x = layer.run(x, self.cls_token) if isinstance(layer, _Step) else layer(x)
        return x


def _layers_of(word: str) -> list[nn.Module]:
    name, *numbers = word.split(":")
    try:
        if name == "Attention":
            width, heads, ratio, count = numbers
            if not 1 <= int(count) <= MOST_BLOCKS:
                raise TypeError(f"1 to {MOST_BLOCKS} blocks, got {count}")
            return [TransformerBlock(int(width), int(heads), float(ratio)) for _ in range(int(count))]
        if name == "Pool":
            return [nn.AvgPool2d(int(numbers[0]), int(numbers[1]))]
        if name == "Dense":
            return [nn.Linear(int(numbers[0]), int(numbers[1])), _ACTIVATIONS[numbers[2]]()]
        return [_Step(word)]
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"cannot read {word!r} in a layer string ({error})") from None


def readout_string(width: int, heads: int, *, ratio: float = 4, depth: int = 2) -> str:
    """The layer string of a CLS readout; the papers' has width 1024, 8 heads, ratio 4, depth 2."""
    return f"Use_CLS_Token:True:{width},Insert_CLS_Token,Attention:{width}:{heads}:{ratio:g}:{depth},Extract_CLS_Token"


class AttentionFusion(nn.Module):
    """Maps of several blocks at several timesteps -> logits (arXiv 2311.17921, section 4: DifFormer).

    Each block's map is pooled to s = min(its size, `pool`) cells a side, normalised and brought to the readout's
    width by a 1x1 convolution; these layers are shared by all timesteps. The tokens of all blocks of a timestep are
    concatenated and read out by one transformer; the results of all timesteps are concatenated and classified.

    Args:
        channels: block -> channels of its map; the order is that of the tokens.
        sizes: block -> side of its map, in cells.
        readout: layer string that gives one vector per image, see `readout_string`.
        norm: "layer" over all of (C, s, s), or "batch".
        timesteps: how many are concatenated.
    """

    def __init__(
        self,
        channels: Mapping[str, int],
        sizes: Mapping[str, int],
        classes: int,
        *,
        readout: str,
        pool: int = 16,
        norm: Literal["layer", "batch"] = "layer",
        timesteps: int = 1,
    ) -> None:
        super().__init__()
        if norm not in ("layer", "batch"):
            raise ValueError(f"norm must be 'layer' or 'batch', got {norm!r}")
        self.blocks, self.timesteps = tuple(channels), timesteps
        self.intra_inter_block_attention = TokenReadout(readout)
        width = self.intra_inter_block_attention.width
        self.pre_layer = nn.ModuleDict()
        for block, depth in channels.items():
            side = min(sizes[block], pool)
            normalise = nn.LayerNorm([depth, side, side]) if norm == "layer" else nn.BatchNorm2d(depth)
            layers = nn.Sequential(nn.AdaptiveAvgPool2d(side), normalise, nn.Conv2d(depth, width, 1))
            self.pre_layer[module_key(block)] = layers
        self.head = nn.Linear(width * timesteps, classes)

    def forward(self, maps: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """Maps of each timestep by block, (B, C, h, w) each -> logits (B, K).

        Raises:
            ValueError: another number of timesteps than the head was made for.
        """
        if len(maps) != self.timesteps:
            raise ValueError(f"the head was made for {self.timesteps} timesteps, got {len(maps)}")
        read = []
        for of_timestep in maps:
            layers = ((self.pre_layer[module_key(block)], of_timestep[block]) for block in self.blocks)
            tokens = torch.cat([layer(block_map).flatten(2).mT for layer, block_map in layers], dim=1)
            read.append(self.intra_inter_block_attention(tokens))
        logits: Tensor = self.head(torch.cat(read, dim=1))
        return logits


def module_key(block: str) -> str:
    """A tap as a part of a state-dict name: the bare number of a numbered block, else without dots."""
    return block.removeprefix("block.") if block.startswith("block.") else block.replace(".", "_")
