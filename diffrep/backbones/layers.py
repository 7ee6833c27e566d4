"""The layers of Stable Diffusion's networks without diffusers, whose import takes longer than most calls of them.

Modules, parameters, attributes and arguments have the names that diffusers gives them: configurations and weights of
its folders fit, taps are the same paths, and what wraps or replaces a module there does so here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffrep.files import save_weights, write_document


class Settings(dict[str, Any]):
    """A configuration, whose keys are attributes too."""

    def __getattr__(self, key: str) -> Any:
        if key not in self:
            raise AttributeError(key)
        return self[key]


class Configured(nn.Module):
    """A network with the configuration that it was built from.

    Attributes:
        READ, FIXED: the keys of a configuration, with the values that count where it lacks them. What it says of those
            that are not read here must be the fixed value.
    """

    READ: ClassVar[Mapping[str, Any]] = {}
    FIXED: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        stated = {key: value for key, value in config.items() if not key.startswith("_")}
        self.config = Settings({**self.FIXED, **self.READ, **stated})

    @classmethod
    def fits(cls, config: Mapping[str, Any]) -> bool:
        """Whether a network of this configuration is what is built here."""
        known = {key for key in config if not key.startswith("_")} <= {*cls.READ, *cls.FIXED}
        return known and all(config.get(key, value) == value for key, value in cls.FIXED.items())

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def save_pretrained(self, folder: Path) -> None:
        """Write configuration and weights as a part of a diffusers folder."""
        write_document(folder / "config.json", {"_class_name": type(self).__name__, **self.config})
        save_weights(folder / "diffusion_pytorch_model.safetensors", self.state_dict(), format="pt")


class Timesteps(nn.Module):
    """Timesteps (B,) -> cosines and sines (B, channels), of periods up to 10,000."""

    def __init__(self, channels: int, flip: bool, shift: float) -> None:
        super().__init__()
        self.num_channels, self.flip_sin_to_cos, self.downscale_freq_shift = channels, flip, shift

    def forward(self, timesteps: Tensor) -> Tensor:
        half = self.num_channels // 2
        exponents = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=timesteps.device)
        angles = timesteps[:, None].float() * torch.exp(exponents / (half - self.downscale_freq_shift))[None]
        waves = (angles.cos(), angles.sin()) if self.flip_sin_to_cos else (angles.sin(), angles.cos())
        return F.pad(torch.cat(waves, dim=-1), (0, self.num_channels % 2))


class TimestepEmbedding(nn.Module):
    """Two linear layers with SiLU between them."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.linear_1, self.act, self.linear_2 = nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width)

    def forward(self, sample: Tensor) -> Any:
        return self.linear_2(self.act(self.linear_1(sample)))


class ResnetBlock2D(nn.Module):
    """A residual block; the embedding of time is added between its convolutions."""

    time_embedding_norm, skip_time_act, output_scale_factor = "default", False, 1.0
    upsample = downsample = None

    def __init__(self, inputs: int, outputs: int, *, groups: int, eps: float, time: int | None = None) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.nonlinearity = inputs, outputs, nn.SiLU()
        self.norm1, self.conv1 = nn.GroupNorm(groups, inputs, eps=eps), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.time_emb_proj = None if time is None else nn.Linear(time, outputs)
        self.norm2, self.conv2 = nn.GroupNorm(groups, outputs, eps=eps), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.conv_shortcut = None if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, input_tensor: Tensor, temb: Tensor | None = None) -> Any:
        hidden = self.conv1(self.nonlinearity(self.norm1(input_tensor)))
        if self.time_emb_proj is not None and temb is not None:
            hidden = hidden + self.time_emb_proj(self.nonlinearity(temb))[:, :, None, None]
        hidden = self.conv2(self.nonlinearity(self.norm2(hidden)))
        return (input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)) + hidden


class Downsample2D(nn.Module):
    """A convolution of stride 2; without padding, one row and column of zeros is added behind."""

    def __init__(self, channels: int, padding: int) -> None:
        super().__init__()
        self.padding, self.conv = padding, nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, hidden_states: Tensor) -> Any:
        return self.conv(hidden_states if self.padding else F.pad(hidden_states, (0, 1, 0, 1)))


class Upsample2D(nn.Module):
    """Nearest neighbours, then a convolution."""

    use_conv, use_conv_transpose, interpolate, norm, name = True, False, True, None, "conv"

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, hidden_states: Tensor, output_size: Sequence[int] | None = None) -> Any:
        size = output_size or [2 * side for side in hidden_states.shape[-2:]]
        return self.conv(F.interpolate(hidden_states, size=list(size), mode="nearest"))


class Attention(nn.Module):
    """Multi-head attention of tokens (B, N, C), or of the places of maps (B, C, h, w), to themselves or to a context.

    Args:
        context: channels of the context; None: the tokens themselves.
        groups: of the group norm before it, and then a shortcut around it, as VAEs have them; None: neither.

    Attributes:
        fused: False writes the weights down, which training on a CPU gets back faster.
    """

    fused = True

    def __init__(self, channels: int, heads: int, context: int | None = None, groups: int | None = None) -> None:
        super().__init__()
        self.heads, self.scale = heads, (channels // heads) ** -0.5
        self.group_norm = None if groups is None else nn.GroupNorm(groups, channels, eps=1e-6)
        self.to_q, self.to_k, self.to_v = (
            nn.Linear(width, channels, bias=groups is not None) for width in (channels, *[context or channels] * 2)
        )
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None) -> Any:
        tokens = hidden_states if hidden_states.ndim == 3 else hidden_states.flatten(2).mT
        tokens = tokens if self.group_norm is None else self.group_norm(tokens.mT).mT
        seen = tokens if encoder_hidden_states is None else encoder_hidden_states
        projected = (self.to_q(tokens), self.to_k(seen), self.to_v(seen))
        q, k, v = (p.unflatten(2, (self.heads, -1)).transpose(1, 2) for p in projected)
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, v)
        else:
            mixed = (q @ k.mT * self.scale).softmax(-1) @ v
        output = self.to_out[0](mixed.transpose(1, 2).flatten(2))
        output = output if hidden_states.ndim == 3 else output.mT.reshape(hidden_states.shape)
        return output if self.group_norm is None else output + hidden_states


class GEGLU(nn.Module):
    """A linear layer whose second half gates the first."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.proj = nn.Linear(inputs, 2 * outputs)

    def forward(self, hidden_states: Tensor) -> Any:
        values, gates = self.proj(hidden_states).chunk(2, dim=-1)
        return values * F.gelu(gates)


class FeedForward(nn.Module):
    """Four times as wide inside, gated."""

    def __init__(self, channels: int) -> None:
        super().__init__()  # diffusers has a dropout in the middle: the second layer is number 2
        self.net = nn.Sequential(GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels))

    def forward(self, hidden_states: Tensor) -> Any:
        return self.net(hidden_states)


class BasicTransformerBlock(nn.Module):
    """Attention to itself, attention to the prompt, a feed-forward network."""

    def __init__(self, channels: int, heads: int, context: int) -> None:
        super().__init__()
        self.norm1, self.attn1 = nn.LayerNorm(channels), Attention(channels, heads)
        self.norm2, self.attn2 = nn.LayerNorm(channels), Attention(channels, heads, context)
        self.norm3, self.ff = nn.LayerNorm(channels), FeedForward(channels)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None) -> Any:
        tokens = hidden_states + self.attn1(self.norm1(hidden_states))
        tokens = tokens + self.attn2(self.norm2(tokens), encoder_hidden_states=encoder_hidden_states)
        return tokens + self.ff(self.norm3(tokens))


class Transformer2DModel(nn.Module):
    """Transformer blocks over the places of maps (B, C, h, w), with a shortcut around them; the result in a tuple."""

    is_input_continuous = True

    def __init__(self, channels: int, heads: int, context: int, depth: int, groups: int, linear: bool) -> None:
        super().__init__()
        self.in_channels = self.out_channels = channels
        self.use_linear_projection, self.norm = linear, nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in, self.proj_out = (
            nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1) for _ in range(2)
        )
        self.transformer_blocks = nn.ModuleList(BasicTransformerBlock(channels, heads, context) for _ in range(depth))

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, return_dict: bool = False
    ) -> tuple[Any]:
        size, linear = hidden_states.shape[-2:], self.use_linear_projection
        tokens = self.norm(hidden_states) if linear else self.proj_in(self.norm(hidden_states))
        tokens = tokens.permute(0, 2, 3, 1).flatten(1, 2)
        tokens = self.proj_in(tokens) if linear else tokens
        for block in self.transformer_blocks:
            tokens = block(tokens, encoder_hidden_states=encoder_hidden_states)
        tokens = self.proj_out(tokens) if linear else tokens
        maps = tokens.unflatten(1, size).permute(0, 3, 1, 2).contiguous()
        return ((maps if linear else self.proj_out(maps)) + hidden_states,)


class UNetBlock(nn.Module):
    """Residual blocks, with attentions between or behind them, and a resampling at the end."""

    def __init__(self, resnets: Sequence[nn.Module], attentions: Sequence[nn.Module], resampler: Any = None) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        if attentions:
            self.attentions = nn.ModuleList(attentions)
        self.has_cross_attention = bool(attentions) and isinstance(attentions[0], Transformer2DModel)
        self.downsamplers = nn.ModuleList([resampler]) if isinstance(resampler, Downsample2D) else None
        self.upsamplers = nn.ModuleList([resampler]) if isinstance(resampler, Upsample2D) else None

    def attend(self, number: int, hidden: Tensor, context: Tensor | None) -> Any:
        attentions = getattr(self, "attentions", ())
        if not 0 <= number < len(attentions):
            return hidden
        if not self.has_cross_attention:
            return attentions[number](hidden)
        return attentions[number](hidden, encoder_hidden_states=context, return_dict=False)[0]


class DownBlock(UNetBlock):
    """Returns its output, and the skips: what each layer gave."""

    def forward(
        self, hidden_states: Tensor, temb: Tensor | None = None, encoder_hidden_states: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        skips: list[Tensor] = []
        for number, resnet in enumerate(self.resnets):
            skips.append(
                self.attend(number, resnet(skips[-1] if skips else hidden_states, temb), encoder_hidden_states)
            )
        skips += [resample(skips[-1]) for resample in self.downsamplers or ()]
        return skips[-1], tuple(skips)


class MidBlock(UNetBlock):
    """A residual block, then attentions with a residual block behind each."""

    def forward(
        self, hidden_states: Tensor, temb: Tensor | None = None, encoder_hidden_states: Tensor | None = None
    ) -> Tensor:
        for number, resnet in enumerate(self.resnets, -1):
            hidden_states = resnet(self.attend(number, hidden_states, encoder_hidden_states), temb)
        return hidden_states


class UpBlock(UNetBlock):
    """Takes one skip for each residual block, the last first; a VAE's has none."""

    def forward(
        self,
        hidden_states: Tensor,
        temb: Tensor | None = None,
        res_hidden_states_tuple: tuple[Tensor, ...] = (),
        encoder_hidden_states: Tensor | None = None,
        upsample_size: Sequence[int] | None = None,
    ) -> Tensor:
        skips = list(res_hidden_states_tuple)
        for number, resnet in enumerate(self.resnets):
            hidden_states = torch.cat([hidden_states, skips.pop()], dim=1) if skips else hidden_states
            hidden_states = self.attend(number, resnet(hidden_states, temb), encoder_hidden_states)
        for resample in self.upsamplers or ():
            hidden_states = resample(hidden_states, upsample_size)
        return hidden_states
