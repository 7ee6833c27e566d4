"""The U-Net and the VAE of Stable Diffusion 1.x, 2.x, XL, and of heads that were made of them; see `layers`."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from diffrep.backbones.layers import (
    Attention,
    Configured,
    DownBlock,
    Downsample2D,
    MidBlock,
    ResnetBlock2D,
    TimestepEmbedding,
    Timesteps,
    Transformer2DModel,
    UpBlock,
    Upsample2D,
)


def _each(value: Any, count: int) -> list[Any]:
    """A setting of each level or layer, where one may stand for all."""
    return list(value) if isinstance(value, (list, tuple)) else [value] * count


class UNet2DConditionModel(Configured):
    """A U-Net that attends to a context; its class vector, or SDXL's sizes and pooled text, join the timestep."""

    READ: ClassVar = {
        "sample_size": None, "in_channels": 4, "out_channels": 4, "flip_sin_to_cos": True, "freq_shift": 0,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        "block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2, "downsample_padding": 1,
        "norm_num_groups": 32, "norm_eps": 1e-5, "cross_attention_dim": 1280, "transformer_layers_per_block": 1,
        "attention_head_dim": 8, "use_linear_projection": False, "addition_time_embed_dim": None,
        "projection_class_embeddings_input_dim": None, "reverse_transformer_layers_per_block": None,
        "class_embed_type": None, "addition_embed_type": None,
        # without effect when images are predicted
        "dropout": 0.0, "upcast_attention": False, "addition_embed_type_num_heads": 64,
        "mid_block_only_cross_attention": None,
    }  # fmt: skip
    FIXED: ClassVar = {
        "mid_block_type": "UNetMidBlock2DCrossAttn", "act_fn": "silu", "attention_type": "default",
        "time_embedding_type": "positional", "resnet_time_scale_shift": "default", "conv_in_kernel": 3,
        "conv_out_kernel": 3, "mid_block_scale_factor": 1, "resnet_out_scale_factor": 1.0,
        "center_input_sample": False, "only_cross_attention": False, "dual_cross_attention": False,
        "resnet_skip_time_act": False, "class_embeddings_concat": False, "encoder_hid_dim": None,
        "encoder_hid_dim_type": None, "num_attention_heads": None, "num_class_embeds": None,
        "time_embedding_dim": None, "time_embedding_act_fn": None, "timestep_post_act": None,
        "time_cond_proj_dim": None, "cross_attention_norm": None,
    }  # fmt: skip

    @classmethod
    def fits(cls, config: Mapping[str, Any]) -> bool:
        c = {**cls.READ, **config}
        blocks = {*c["down_block_types"], *c["up_block_types"]}
        plain = blocks <= {"DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"}
        added = c["class_embed_type"] in (None, "projection") and c["addition_embed_type"] in (None, "text_time")
        whole = isinstance(c["norm_num_groups"], int) and isinstance(c["cross_attention_dim"], int)
        return plain and added and whole and super().fits(config)

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        c, widths = self.config, list(self.config.block_out_channels)
        last, time, projected = len(widths) - 1, 4 * widths[0], self.config.projection_class_embeddings_input_dim
        settings = (c.attention_head_dim, c.transformer_layers_per_block, c.layers_per_block)
        heads, depths, layers = (_each(value, last + 1) for value in settings)
        up_depths = c.reverse_transformer_layers_per_block or depths[::-1]

        def resnets(inputs: list[int], width: int) -> list[nn.Module]:
            return [ResnetBlock2D(i, width, groups=c.norm_num_groups, eps=c.norm_eps, time=time) for i in inputs]

        def attentions(kind: str, level: int, depth: Any, count: int) -> list[nn.Module]:
            sizes = widths[level], heads[level], c.cross_attention_dim
            ends = c.norm_num_groups, c.use_linear_projection
            return [Transformer2DModel(*sizes, each, *ends) for each in _each(depth, count) if "CrossAttn" in kind]

        self.conv_in = nn.Conv2d(c.in_channels, widths[0], 3, padding=1)
        self.time_proj = Timesteps(widths[0], c.flip_sin_to_cos, c.freq_shift)
        self.time_embedding = TimestepEmbedding(widths[0], time)
        self.class_embedding = TimestepEmbedding(projected, time) if c.class_embed_type else None
        self.add_time_proj = self.add_embedding = None
        if c.addition_embed_type:
            self.add_time_proj = Timesteps(c.addition_time_embed_dim, c.flip_sin_to_cos, c.freq_shift)
            self.add_embedding = TimestepEmbedding(projected, time)
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        for i, kind in enumerate(c.down_block_types):
            body = resnets([widths[max(i - 1, 0)], *[widths[i]] * (layers[i] - 1)], widths[i])
            halving = Downsample2D(widths[i], c.downsample_padding) if i < last else None
            self.down_blocks.append(DownBlock(body, attentions(kind, i, depths[i], layers[i]), halving))
        middle = attentions(c.mid_block_type, last, _each(depths[-1], 1)[-1], 1)
        self.mid_block = MidBlock(resnets([widths[-1]] * 2, widths[-1]), middle)
        for i, kind, depth in zip(range(last, -1, -1), c.up_block_types, up_depths, strict=True):
            before = [widths[min(i + 1, last)], *[widths[i]] * layers[i]]
            skips = [*[widths[i]] * layers[i], widths[max(i - 1, 0)]]
            body = resnets([sum(pair) for pair in zip(before, skips, strict=True)], widths[i])
            doubling = Upsample2D(widths[i]) if i > 0 else None
            self.up_blocks.append(UpBlock(body, attentions(kind, i, depth, layers[i] + 1), doubling))
        self.conv_norm_out = nn.GroupNorm(c.norm_num_groups, widths[0], eps=c.norm_eps)
        self.conv_act, self.conv_out = nn.SiLU(), nn.Conv2d(widths[0], c.out_channels, 3, padding=1)

    def get_time_embed(self, sample: Tensor, timestep: Any) -> Any:
        """The waves of a timestep, or of one for each sample: (B, C)."""
        if not isinstance(timestep, Tensor):
            timestep = torch.full((1,), timestep, device=sample.device)
        return self.time_proj(timestep.reshape(-1).expand(len(sample))).to(sample.dtype)

    def forward(
        self,
        sample: Tensor,
        timestep: Any,
        encoder_hidden_states: Tensor,
        class_labels: Tensor | None = None,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
    ) -> Any:
        """What the network predicts for latents (B, c, h, w), as the attribute `sample`.

        Args:
            timestep: a number, or (B,).
            encoder_hidden_states: (B, tokens, C), attended to.
            class_labels: (B, n), of networks with a class vector.
            added_cond_kwargs: of SDXL, "text_embeds" (B, C') and "time_ids" (B, n).
        """
        temb = self.time_embedding(self.get_time_embed(sample, timestep))
        if self.class_embedding is not None:
            temb = temb + self.class_embedding(class_labels)
        if self.add_embedding is not None and self.add_time_proj is not None and added_cond_kwargs is not None:
            text, numbers = added_cond_kwargs["text_embeds"], added_cond_kwargs["time_ids"]
            sizes = self.add_time_proj(numbers.flatten()).reshape(len(text), -1)
            temb = temb + self.add_embedding(torch.cat([text, sizes], dim=-1).to(temb.dtype))
        hidden = self.conv_in(sample)
        skips = [hidden]
        for block in self.down_blocks:
            hidden, outputs = block(hidden, temb, encoder_hidden_states=encoder_hidden_states)
            skips += outputs
        hidden = self.mid_block(hidden, temb, encoder_hidden_states=encoder_hidden_states)
        up: Any
        for up in self.up_blocks:
            count = len(up.resnets)
            skips, taken = skips[:-count], tuple(skips[-count:])
            size = skips[-1].shape[2:] if skips else None  # of an odd side, the doubled half is too long
            hidden = up(hidden, temb, taken, encoder_hidden_states=encoder_hidden_states, upsample_size=size)
        return SimpleNamespace(sample=self.conv_out(self.conv_act(self.conv_norm_out(hidden))))


class AutoencoderKL(Configured):
    """The VAE: images (B, 3, H, W) in [-1, 1] to a normal distribution of latents, latents to images."""

    READ: ClassVar = {
        "in_channels": 3, "out_channels": 3, "block_out_channels": [64], "layers_per_block": 1, "latent_channels": 4,
        "norm_num_groups": 32, "sample_size": 32, "scaling_factor": 0.18215, "shift_factor": None,
        "latents_mean": None, "latents_std": None, "force_upcast": True, "use_quant_conv": True,
        "use_post_quant_conv": True, "mid_block_add_attention": True,
        "down_block_types": ["DownEncoderBlock2D"], "up_block_types": ["UpDecoderBlock2D"],
    }  # fmt: skip
    FIXED: ClassVar = {"act_fn": "silu"}

    @classmethod
    def fits(cls, config: Mapping[str, Any]) -> bool:
        c = {**cls.READ, **config}
        plain = {*c["down_block_types"], *c["up_block_types"]} == {"DownEncoderBlock2D", "UpDecoderBlock2D"}
        return plain and super().fits(config)

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        c, latent = self.config, self.config.latent_channels
        self.encoder, self.decoder = _Coder(c, c.in_channels, 2 * latent), _Coder(c, latent, c.out_channels, up=True)
        self.quant_conv = nn.Conv2d(2 * latent, 2 * latent, 1) if c.use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(latent, latent, 1) if c.use_post_quant_conv else None

    def encode(self, images: Tensor) -> Any:
        """The distribution, `latent_dist`: its `mean` and `std`, each (B, c, h, w)."""
        moments = self.encoder(images)
        moments = moments if self.quant_conv is None else self.quant_conv(moments)
        mean, logarithm = moments.chunk(2, dim=1)
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean, std=(0.5 * logarithm.clamp(-30, 20)).exp()))

    def decode(self, latents: Tensor, return_dict: bool = True) -> Any:
        """The images, as the attribute `sample`; in a tuple without `return_dict`."""
        images = self.decoder(latents if self.post_quant_conv is None else self.post_quant_conv(latents))
        return SimpleNamespace(sample=images) if return_dict else (images,)


class _Coder(nn.Module):
    """The encoder, or (up) the decoder, whose blocks go the other way."""

    def __init__(self, c: Any, inputs: int, outputs: int, *, up: bool = False) -> None:
        super().__init__()
        widths = list(c.block_out_channels)[:: -1 if up else 1]
        last, middle = len(widths) - 1, c.block_out_channels[-1]

        def resnets(inner: int, width: int, count: int) -> list[nn.Module]:
            pairs = [(inner if j == 0 else width, width) for j in range(count)]
            return [ResnetBlock2D(*pair, groups=c.norm_num_groups, eps=1e-6) for pair in pairs]

        self.conv_in = nn.Conv2d(inputs, widths[0], 3, padding=1)
        blocks: list[nn.Module] = []
        for i, width in enumerate(widths):
            layers = resnets(widths[max(i - 1, 0)], width, c.layers_per_block + up)
            resampler: Any = None if i == last else Upsample2D(width) if up else Downsample2D(width, 0)
            blocks.append((UpBlock if up else DownBlock)(layers, [], resampler))
        self.add_module("up_blocks" if up else "down_blocks", nn.ModuleList(blocks))
        attention = Attention(middle, 1, groups=c.norm_num_groups)
        self.mid_block = MidBlock(resnets(middle, middle, 2), [attention] if c.mid_block_add_attention else [])
        self.conv_norm_out, self.conv_act = nn.GroupNorm(c.norm_num_groups, widths[-1], eps=1e-6), nn.SiLU()
        self.conv_out = nn.Conv2d(widths[-1], outputs, 3, padding=1)

    def forward(self, sample: Tensor) -> Any:
        hidden, here = self.conv_in(sample), dict(self.named_children())
        blocks: Any = here.get("up_blocks") or here["down_blocks"]
        for block in [self.mid_block, *blocks] if "up_blocks" in here else [*blocks, self.mid_block]:
            hidden = block(hidden)
            hidden = hidden[0] if isinstance(block, DownBlock) else hidden  # its skips are not used
        return self.conv_out(self.conv_act(self.conv_norm_out(hidden)))
