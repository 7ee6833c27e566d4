"""Early exit by estimated uncertainty (DeeDiff, Tang et al. 2023) on a U-ViT.

The authors published no code; keys and rules are those of the reproduction of Matisan et al. (DuoDiff, 2024), whose
authors could not reach the paper's trade of quality for time. A fixed depth for each timestep saves as much without
probes: `depths` of `forward`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffrep.backbones.base import BackboneError


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, mlp_ratio: float, *, bias: bool, skip: bool) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width, bias=bias), "proj": nn.Linear(width, width)})
        hidden = int(width * mlp_ratio)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, hidden), "fc2": nn.Linear(hidden, width)})
        self.skip_linear = nn.Linear(2 * width, width) if skip else None

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if self.skip_linear is not None and skip is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        qkv = self.attn["qkv"](self.norm1(x)).unflatten(-1, (3, self.heads, -1)).movedim(2, 0).transpose(2, 3)
        x = x + self.attn["proj"](F.scaled_dot_product_attention(*qkv).transpose(1, 2).flatten(2))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class _OutputHead(nn.Module):
    """Tokens to an image: what the network ends with, and each layer of an early exit."""

    def __init__(self, width: int, patch: int, channels: int, extra: int, side: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.decoder_pred = nn.Linear(width, patch**2 * channels)
        self.final_layer = nn.Conv2d(channels, channels, 3, padding=1)
        self.extra, self.patch, self.side = extra, patch, side

    def forward(self, x: Tensor) -> Tensor:
        patches = self.decoder_pred(self.norm(x))[:, self.extra :]
        grid = patches.unflatten(1, (self.side, self.side)).unflatten(-1, (self.patch, self.patch, -1))
        return self.final_layer(grid.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3))


class _UViT(_OutputHead):
    """U-ViT (Bao et al. 2023): its parts under the published names."""

    def __init__(self, about: UViTConfig) -> None:
        width, side = about.embed_dim, about.img_size // about.patch_size
        super().__init__(width, about.patch_size, about.in_chans, about.extras, side)
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(about.in_chans, width, about.patch_size, about.patch_size)})
        self.pos_embed = nn.Parameter(torch.zeros(1, about.extras + side**2, width))
        self.time_embed = nn.Identity() if not about.mlp_time_embed else nn.Sequential(
            nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width)
        )  # fmt: skip
        if about.num_classes > 0:
            self.label_emb = nn.Embedding(about.num_classes, width)

        def blocks(count: int, *, skip: bool) -> nn.ModuleList:
            return nn.ModuleList(
                _Block(width, about.num_heads, about.mlp_ratio, bias=about.qkv_bias, skip=skip) for _ in range(count)
            )

        self.in_blocks, self.out_blocks = blocks(about.depth // 2, skip=False), blocks(about.depth // 2, skip=True)
        self.mid_block = blocks(1, skip=False)[0]


@dataclass(frozen=True)
class UViTConfig:
    """Sizes of a U-ViT, by the names of its published configurations."""

    img_size: int = 32
    patch_size: int = 2
    in_chans: int = 3
    embed_dim: int = 512
    depth: int = 13
    num_heads: int = 8
    mlp_ratio: float = 4.0
    qkv_bias: bool = False
    mlp_time_embed: bool = False
    num_classes: int = -1
    normalize_timesteps: bool = False

    @property
    def extras(self) -> int:
        """Tokens before those of the image."""
        return 2 if self.num_classes > 0 else 1


@dataclass(frozen=True)
class LayerOutputs:
    """What every layer of an early-exit network gives.

    Attributes:
        full: (B, C, H, W) the network's own output.
        outputs: (depth, B, C, H, W) the output heads on the input of each block.
        uncertainty: (depth, B) in 0..1, what the probes say of them.
    """

    full: Tensor
    outputs: Tensor
    uncertainty: Tensor

    def exits(self, threshold: float) -> Tensor:
        """(B,) the first layer whose uncertainty is at most the threshold; `depth`: none, the full output."""
        sure = self.uncertainty <= threshold
        return torch.where(sure.any(0), sure.int().argmax(0), len(sure))

    def at(self, exits: Tensor) -> Tensor:
        """(B, C, H, W) the outputs at the given exits."""
        return torch.cat([self.outputs, self.full[None]])[exits, torch.arange(len(exits))]

    def losses(self, target: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The training losses for a target like `full`: of the network, of the probes, of the heads; and the true
        uncertainty (depth, B), the mean of `tanh |output - target|`.
        """
        error = self.outputs - target
        truth = error.abs().tanh().flatten(2).mean(2)
        weighted = (1 - truth) * error.square().flatten(2).mean(2)
        return (
            F.mse_loss(self.full, target), (self.uncertainty - truth).square().sum(), weighted.mean(1).sum(), truth
        )  # fmt: skip


class EarlyExitUViT(nn.Module):
    """A U-ViT with a probe and an output head for each layer.

    Attributes:
        limit: how many blocks run, by a fixed table of a sampler (`PartialNetwork`); None: all.

    Raises:
        BackboneError: the sizes do not fit.
    """

    def __init__(self, about: UViTConfig) -> None:
        super().__init__()
        if about.img_size % about.patch_size or about.embed_dim % about.num_heads or about.depth % 2 == 0:
            raise BackboneError(f"a U-ViT has whole patches and heads and an odd depth, got {about}")
        self.about, side = about, about.img_size // about.patch_size
        self.limit: int | None = None

        def head() -> _OutputHead:
            return _OutputHead(about.embed_dim, about.patch_size, about.in_chans, about.extras, side)

        self.uvit = _UViT(about)
        self.matrix = nn.ModuleList(
            nn.ModuleDict({"classifier": nn.Sequential(nn.Linear(about.embed_dim, 1), nn.Sigmoid())})
            for _ in range(about.depth)
        )
        self.in_blocks_heads = nn.ModuleList(head() for _ in range(about.depth // 2))
        self.mid_block_head = head()
        self.out_blocks_heads = nn.ModuleList(head() for _ in range(about.depth // 2))

    def forward(
        self, x: Tensor, t: Tensor, labels: Tensor | None = None, *, threshold: float | None = None,
        depths: Sequence[int] | None = None,
    ) -> LayerOutputs | Tensor:  # fmt: skip
        """All layers' outputs; or, where one of the options is given, (B, C, H, W) after leaving early.

        Args:
            x: (B, C, H, W); t: (B,) timesteps.
            labels: (B,) classes, of class-conditional networks.
            threshold: leave at the first layer at which every sample's uncertainty is at most this.
            depths: for each timestep how many blocks run, one batch having one timestep; where left out, `limit` do.
        """
        net, about = self.uvit, self.about
        time = net.time_embed(timestep_embedding(t / 1000 if about.normalize_timesteps else t, about.embed_dim))
        tokens = [time[:, None]]
        if about.num_classes > 0:
            if labels is None:
                raise BackboneError("this network is class-conditional: labels are needed")
            tokens.insert(0, net.label_emb(labels)[:, None])
        patches = net.patch_embed["proj"](x).flatten(2).transpose(1, 2)
        h = torch.cat([*tokens, patches], dim=1) + net.pos_embed
        skips: list[Tensor] = []
        outputs, uncertainty = [], []
        limit = self.limit if depths is None else depths[int(t[0])]
        heads = [*self.in_blocks_heads, self.mid_block_head, *self.out_blocks_heads]
        for layer, block in enumerate([*net.in_blocks, net.mid_block, *net.out_blocks]):
            if limit is not None or threshold is not None:
                sure = threshold is not None and bool((self._uncertainty(layer, h) <= threshold).all())
                if layer == limit or sure:
                    return heads[layer](h)
            else:
                outputs.append(heads[layer](h))
                uncertainty.append(self._uncertainty(layer, h))
            if layer < len(net.in_blocks):
                h = block(h)
                skips.append(h)
            else:
                h = block(h, skips.pop()) if layer > len(net.in_blocks) else block(h)
        full = _OutputHead.forward(net, h)
        return full if outputs == [] else LayerOutputs(full, torch.stack(outputs), torch.stack(uncertainty))

    def _uncertainty(self, layer: int, h: Tensor) -> Tensor:
        return self.matrix[layer]["classifier"](h).flatten(1).mean(1)  # type: ignore[index]


def timestep_embedding(t: Tensor, width: int) -> Tensor:
    """(B, width) cosines and sines of the timesteps, with periods up to 10,000."""
    half = width // 2
    rates = torch.exp(-math.log(10000) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
    angles = t[:, None].float() * rates
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, width % 2))
