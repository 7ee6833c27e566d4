"""Heads on the concatenated features of one or several cells, as one interface: (n, D) features to (n, K) scores.

The cells' vectors are (C, row, column) in the order of the cells. A layout holds everything that is needed to build
the head again before its weights are loaded. k-NN votes as in DINO (arXiv 2104.14294) and DINOv2 (arXiv 2304.07193).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffrep.devices import initial_weights
from diffrep.heads.probes.cells import Cell
from diffrep.index import Backend, Neighbours, build_index, search
from diffrep.settings import POSITIVE, check

# -- Transformer heads: tokens of one or several maps are read out by a CLS token or by their mean -----------
# Sources: "Diffusion Models Beat GANs on Image Classification" (arXiv 2307.08702), whose attention head is a layer
# string applied to one map, and "Do text-free diffusion models learn discriminative visual representations?" (arXiv
# 2311.17921), whose `AttentionFusion` brings the maps of several blocks to one width first: with one block it is
# that paper's Attention head, with several blocks and timesteps its DifFormer. State names are the released ones.


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
        return self.proj(mixed.transpose(1, 2).flatten(2))


class _Mlp(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(tokens)))


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
        return tokens + self.mlp(self.norm2(tokens))


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
        return self.head(torch.cat(read, dim=1))


def module_key(block: str) -> str:
    """A tap as a part of a state-dict name: the bare number of a numbered block, else without dots."""
    return block.removeprefix("block.") if block.startswith("block.") else block.replace(".", "_")


# ------------------------------------------------------------------------------------------------------------


Kind: TypeAlias = Literal["linear", "logistic", "mlp", "cnn", "attention", "knn"]
KINDS: tuple[Kind, ...] = ("linear", "logistic", "mlp", "cnn", "attention", "knn")


@dataclass(frozen=True, kw_only=True)
class HeadShape:
    """The sizes inside a head; each kind uses its own."""

    hidden: tuple[int, ...] = (256,)  # mlp: widths of the hidden layers
    width: int = 128  # cnn, attention: channels inside; the papers' attention has 1024
    heads: int = 8  # attention
    ratio: float = 4  # attention: width of the inner layers over `width`
    depth: int = 2  # attention: transformer blocks
    norm: Literal["layer", "batch"] = "layer"  # attention: of each map
    temperature: float = 0.07  # knn: of the votes' weights

    def __post_init__(self) -> None:
        check(self, width=POSITIVE, heads=POSITIVE, ratio=POSITIVE, depth=POSITIVE, temperature=POSITIVE)
        if any(width < 1 for width in self.hidden):
            raise ValueError(f"hidden must be finite and above 0, got {min(self.hidden)}")


@dataclass(frozen=True, kw_only=True)
class Layout(HeadShape):
    """What a head looks like.

    Attributes:
        kind: "attention" over the taps of one timestep is the papers' attention head, over several its DifFormer.
        cells: that it reads, in order.
        channels: of each cell's map.
    """

    kind: Kind
    cells: tuple[Cell, ...]
    channels: tuple[int, ...]
    classes: int
    k: int = 20  # knn: neighbours
    gallery: int = 0  # knn: training features; known after training

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.cells or len(self.channels) != len(self.cells):
            raise ValueError(f"a head reads at least one cell, each with its channels, got {len(self.cells)}")
        if self.kind == "cnn" and len(self.cells) != 1:
            raise ValueError(f"a cnn head reads one cell, got {len(self.cells)}")
        if self.kind == "attention":
            taps: dict[tuple[str, int], list[str]] = {}
            for cell in self.cells:
                taps.setdefault((cell.backbone, cell.timestep), []).append(cell.tap)
            if len({cell.backbone for cell in self.cells}) > 1 or len(set(map(tuple, taps.values()))) > 1:
                raise ValueError("an attention head reads the same taps of one backbone at every timestep")

    @property
    def widths(self) -> tuple[int, ...]:
        """Numbers per image of each cell."""
        return tuple(c * cell.pool**2 for c, cell in zip(self.channels, self.cells, strict=True))


class FeatureHead(nn.Module):
    """A head with the standardisation of its features: `mean` and `scale` are (D,), 0 and 1 where there is none."""

    mean: Tensor
    scale: Tensor

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout = layout
        width = sum(layout.widths)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))
        self.head = _inner(layout)

    def forward(self, x: Tensor) -> Tensor:
        """(n, D) -> (n, K) logits, or votes of k-NN."""
        return self.head((x - self.mean) * self.scale)


class _Flat(nn.Module):
    """A head for a map of one cell, given a vector."""

    def __init__(self, inner: nn.Module, channels: int, side: int) -> None:
        super().__init__()
        self.inner, self.shape = inner, (channels, side, side)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.unflatten(1, self.shape))


class _Fused(nn.Module):
    """`AttentionFusion` for the concatenated vectors of several cells."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout = layout
        cells = list(zip(layout.cells, layout.channels, strict=True))
        first = [(cell, count) for cell, count in cells if cell.timestep == layout.cells[0].timestep]
        self.fusion = AttentionFusion(
            {cell.tap: count for cell, count in first},
            {cell.tap: cell.pool for cell, _ in first},
            layout.classes,
            readout=readout_string(layout.width, layout.heads, ratio=layout.ratio, depth=layout.depth),
            norm=layout.norm,
            timesteps=len({cell.timestep for cell in layout.cells}),
        )

    def forward(self, x: Tensor) -> Tensor:
        maps: dict[int, dict[str, Tensor]] = {}
        for cell, part in zip(self.layout.cells, x.split(self.layout.widths, dim=1), strict=True):
            maps.setdefault(cell.timestep, {})[cell.tap] = part.unflatten(1, (-1, cell.pool, cell.pool))
        return self.fusion(list(maps.values()))


class _Voters(nn.Module):
    """k-NN: each cell's vector is brought to unit length, so that all of them count alike."""

    gallery: Tensor
    labels: Tensor

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout = layout
        self.register_buffer("gallery", torch.zeros(layout.gallery, sum(layout.widths)))
        self.register_buffer("labels", torch.zeros(layout.gallery, dtype=torch.int64))

    def unit(self, x: Tensor) -> Tensor:
        parts = x.float().split(self.layout.widths, dim=1)
        return torch.cat([F.normalize(part, dim=1) for part in parts], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        k = min(self.layout.k, len(self.gallery))
        return self.voters.votes(self.unit(x), [k])[k]

    @cached_property
    def voters(self) -> NearestNeighbours:
        """With the index over the gallery, made when it is first asked."""
        layout = self.layout
        return NearestNeighbours(self.gallery, self.labels, layout.classes, temperature=layout.temperature)


def _inner(layout: Layout) -> nn.Module:
    width, side = sum(layout.widths), layout.cells[0].pool
    if layout.kind in ("linear", "logistic"):
        return nn.Linear(width, layout.classes)
    if layout.kind == "mlp":
        return _Flat(PooledHead(width, layout.classes, hidden=layout.hidden), width, 1)
    if layout.kind == "cnn":
        channels = layout.channels[0]
        return _Flat(CnnHead(channels, layout.classes, pool=side, width=layout.width), channels, side)
    return _Fused(layout) if layout.kind == "attention" else _Voters(layout)


def build_head(layout: Layout, *, seed: int = 0) -> FeatureHead:
    """A head with initial weights that depend on the seed only."""
    with initial_weights(seed):
        return FeatureHead(layout)


def gallery_head(layout: Layout, features: Tensor, labels: Tensor) -> FeatureHead:
    """A k-NN head from (N, D) features and (N,) labels."""
    head = FeatureHead(layout)
    voters = head.head
    assert isinstance(voters, _Voters)
    voters.gallery.copy_(voters.unit(features))
    voters.labels.copy_(labels)
    return head


class PooledHead(nn.Module):
    """Average pool to `pool` x `pool` cells, then a linear layer, or linear layers with ReLU between them.

    Args:
        channels: of the map.
        hidden: widths of the hidden layers; none for the linear head.

    State: ``fcs.N.weight`` and ``fcs.N.bias``, the released names.
    """

    def __init__(self, channels: int, classes: int, *, pool: int = 1, hidden: Sequence[int] = ()) -> None:
        super().__init__()
        self.pool = pool
        widths = [channels * pool * pool, *hidden, classes]
        self.fcs = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(widths))

    def forward(self, maps: Tensor) -> Tensor:
        """(B, C, h, w) -> logits (B, K)."""
        x = F.adaptive_avg_pool2d(maps, self.pool).flatten(1)
        for layer in self.fcs[:-1]:
            x = layer(x).relu()
        return self.fcs[-1](x)


class CnnHead(nn.Module):
    """Average pool to `pool` x `pool` cells, two 3x3 convolutions with batch norm and ReLU, mean, linear layer.

    Not the paper's: of its CNN head no layer is published.
    """

    def __init__(self, channels: int, classes: int, *, pool: int = 8, width: int = 128) -> None:
        super().__init__()
        self.pool = pool
        layers: list[nn.Module] = []
        for before in (channels, width):
            layers += [nn.Conv2d(before, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        self.convolutions = nn.Sequential(*layers)
        self.classifier = nn.Linear(width, classes)

    def forward(self, maps: Tensor) -> Tensor:
        """(B, C, h, w) -> logits (B, K)."""
        x = self.convolutions(F.adaptive_avg_pool2d(maps, self.pool))
        return self.classifier(x.mean((2, 3)))


class NearestNeighbours:
    """A gallery of labelled features that votes.

    Args:
        features: (N, D), of any length but zero.
        labels: (N,) int64, 0..classes - 1.
        backend: see `diffrep.index.build_index`; "faiss" is FAISS's flat index.

    Raises:
        ValueError: features and labels differ in number.
    """

    def __init__(
        self,
        features: Tensor,
        labels: Tensor,
        classes: int,
        *,
        temperature: float = HeadShape.temperature,
        backend: Backend = "faiss",
    ) -> None:
        if len(features) != len(labels):
            raise ValueError(f"{len(features)} features but {len(labels)} labels")
        self.labels, self.classes, self.temperature = labels, classes, temperature
        self.index = build_index(F.normalize(features.float(), dim=1), backend)

    def neighbours(self, features: Tensor, k: int, *, batch_size: int = 4096) -> Neighbours:
        """The nearest training features by cosine of (Q, D) features; k is limited to their number."""
        k = min(k, len(self.labels))
        parts = [search(self.index, F.normalize(chunk.float(), dim=1), k) for chunk in features.split(batch_size)]
        return Neighbours(torch.cat([n.indices for n in parts]), torch.cat([n.scores for n in parts]))

    def votes(self, features: Tensor, ks: Sequence[int]) -> dict[int, Tensor]:
        """Votes (Q, K) for each k, from one search; a neighbour's weight is exp(cosine / temperature).

        The weights are the softmax over the neighbours of the largest k, of which the first k are summed, as DINOv2
        has it: for smaller k they do not sum to 1. Their order is that of DINO's unnormalised sums.
        """
        neighbours = self.neighbours(features, max(ks))
        weights = (neighbours.scores / self.temperature).softmax(1)
        classes, none = self.labels[neighbours.indices], torch.zeros(len(weights), self.classes)
        return {k: none.scatter_add(1, classes[:, :k], weights[:, :k]) for k in ks}
