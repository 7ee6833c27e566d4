"""A U-Net whose prompt, timestep and task never change: what depends on them alone is computed once.

Keys and values of cross-attention become constants, the embedding of timestep and task becomes part of the biases of
the residual blocks. No number changes beyond float rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from diffrep.backbones.unet_taps import cross_attentions


class PlainUNet(nn.Module):
    """A diffusers `UNet2DConditionModel` with its context, called as it is.

    Args:
        context: (1, tokens, C), the prompt's embedding.
        padding_channels: zeros that are appended to the latents (E2E-FT's first latent).
    """

    def __init__(self, unet: Any, context: Tensor, *, padding_channels: int = 0) -> None:
        super().__init__()
        self.unet, self.padding_channels = unet, padding_channels
        self.register_buffer("context", context, persistent=False)

    context: Tensor

    def forward(self, latents: Tensor, timestep: int, task: tuple[float, ...] | None = None) -> Tensor:
        """One pass.

        Args:
            latents: (B, c, h, w), everything that goes into the first convolution.
            task: class vector, the same for all rows.

        Returns:
            (B, c', h, w), what the network predicts.
        """
        if self.padding_channels:
            zeros = latents.new_zeros(latents.shape[0], self.padding_channels, *latents.shape[2:])
            latents = torch.cat([latents, zeros], dim=1)
        labels = None if task is None else latents.new_tensor([task]).expand(latents.shape[0], -1)
        context = self.context.expand(latents.shape[0], -1, -1)
        predicted: Tensor = self.unet(latents, timestep, encoder_hidden_states=context, class_labels=labels).sample
        return predicted


class _Constant(nn.Module):
    """A projection of the constant context."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value, persistent=False)

    value: Tensor

    def forward(self, given: Tensor) -> Tensor:
        return self.value.expand(given.shape[0], -1, -1)


class FoldedUNet(nn.Module):
    """A diffusers `UNet2DConditionModel` with everything constant folded; it is taken over and changed.

    The first call with a timestep and task computes their biases, which are kept. Arguments as of `PlainUNet`; the
    channels that would only see zeros are cut from the first convolution.

    Raises:
        ValueError: the U-Net conditions its blocks in another way than by adding an embedding.
    """

    def __init__(self, unet: Any, context: Tensor, *, padding_channels: int = 0) -> None:
        super().__init__()
        if reason := _not_foldable(unet):
            raise ValueError(f"this U-Net cannot be folded: {reason}")
        self.unet = unet
        self.register_buffer("context", context, persistent=False)
        with torch.no_grad():
            for attention in cross_attentions(unet):
                attention.to_k = _Constant(attention.to_k(context))
                attention.to_v = _Constant(attention.to_v(context))
            if padding_channels:
                unet.conv_in = _first_inputs(unet.conv_in, unet.conv_in.in_channels - padding_channels)
        self._resnets = [m for m in unet.modules() if type(m).__name__ == "ResnetBlock2D"]
        self._projections = nn.ModuleList(resnet.time_emb_proj for resnet in self._resnets)
        self._own_biases = [resnet.conv1.bias.detach().clone() for resnet in self._resnets]
        self._biases: dict[object, list[Tensor]] = {}
        self._set: object = None
        for resnet in self._resnets:
            resnet.time_emb_proj = None  # with no embedding given, the block adds none

    context: Tensor

    def _set_biases(self, timestep: int, task: tuple[float, ...] | None, like: Tensor) -> None:
        key = (timestep, task, like.dtype, like.device)
        if self._set == key:
            return
        if key not in self._biases:
            unet = self.unet
            embedding = unet.time_embedding(unet.get_time_embed(sample=like[:1], timestep=timestep))
            if task is not None:
                embedding = embedding + unet.get_class_embed(sample=like[:1], class_labels=like.new_tensor([task]))
            active = nn.functional.silu(embedding)
            self._biases[key] = [
                own.to(like) + projection(active)[0]
                for own, projection in zip(self._own_biases, self._projections, strict=True)
            ]
        for resnet, bias in zip(self._resnets, self._biases[key], strict=True):
            resnet.conv1.bias.data = bias
        self._set = key

    @torch.no_grad()
    def forward(self, latents: Tensor, timestep: int, task: tuple[float, ...] | None = None) -> Tensor:
        """One pass; see `PlainUNet.forward`."""
        unet = self.unet
        self._set_biases(timestep, task, latents)
        context = self.context.expand(latents.shape[0], -1, -1)
        told = {"encoder_hidden_states": context}
        # sides that the U-Net cannot halve evenly: each up block is told the size of the skip that it meets
        uneven = any(side % 2**unet.num_upsamplers for side in latents.shape[-2:])
        x = unet.conv_in(latents)
        skips = [x]
        for block in unet.down_blocks:
            x, states = block(x, None, **(told if getattr(block, "has_cross_attention", False) else {}))
            skips += states
        if unet.mid_block is not None:
            x = unet.mid_block(x, None, **(told if getattr(unet.mid_block, "has_cross_attention", False) else {}))
        for block in unet.up_blocks:
            count = len(block.resnets)
            met, skips = tuple(skips[-count:]), skips[:-count]
            size = skips[-1].shape[2:] if uneven and skips else None
            arguments = told if getattr(block, "has_cross_attention", False) else {}
            x = block(x, temb=None, res_hidden_states_tuple=met, upsample_size=size, **arguments)
        if unet.conv_norm_out:
            x = unet.conv_act(unet.conv_norm_out(x))
        predicted: Tensor = unet.conv_out(x)
        return predicted


def _not_foldable(unet: Any) -> str:
    """Why a U-Net cannot be folded; empty where it can."""
    config = unet.config
    if config.resnet_time_scale_shift != "default" or config.resnet_skip_time_act or config.time_embedding_act_fn:
        return "its residual blocks do not add their time embedding"
    if config.class_embed_type not in (None, "projection") or config.class_embeddings_concat:
        return f"its class embedding is of type {config.class_embed_type!r}"
    if config.addition_embed_type or config.encoder_hid_dim_type or config.cross_attention_norm:
        return "it has more conditions than a timestep, a class vector and a context"
    if config.center_input_sample or config.act_fn != "silu":
        return "it centres its input or activates by another function than SiLU"
    return ""


def _first_inputs(conv: nn.Conv2d, channels: int) -> nn.Conv2d:
    """The same convolution for inputs whose later channels are zero."""
    narrow = nn.Conv2d(channels, conv.out_channels, 3, padding=1, device=conv.weight.device, dtype=conv.weight.dtype)
    narrow.weight.data = conv.weight.data[:, :channels].clone()
    if conv.bias is not None and narrow.bias is not None:
        narrow.bias.data = conv.bias.data
    return narrow.requires_grad_(False)
