"""Diffusion transformers as backbones: FLUX, Stable Diffusion 3, PixArt and DiT through diffusers.

======================  ===============================================================================
``block.12``            output of a block (image tokens only)
``block.12.input``      the residual stream at its entrance
``block.12.attn_in``    that stream normalised and modulated by the block's AdaLN: DiTF's feature
``block.12.mlp_in``     the input of the block's MLP (not in FLUX's single-stream blocks)
======================  ===============================================================================

Blocks count in the order in which they run; FLUX's single-stream blocks follow its double-stream ones, so that
DiTF's index k of FLUX.1-dev is ``block.k``. The residual stream of these networks holds a few channels that drown
all others: use ``attn_in``, and `Conditions.discard` to set such channels to 0 before the normalisation. Averages
over an ensemble are taken of the stream and of the modulation, not of the result, as DiTF does.

Source: "DiTF" (arXiv:2505.18584), ganchaofan0000/DiTF 08658e6.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffrep.backbones.base import BackboneError, Call, Conditions, Reader, Recommended, TapInfo, reading
from diffrep.backbones.diffusion import LatentBackbone, class_labels
from diffrep.backbones.text import PromptEncoder
from diffrep.images import Sizing

KINDS = ("FluxTransformer2DModel", "SD3Transformer2DModel", "PixArtTransformer2DModel", "DiTTransformer2DModel")
FORMER = {  # what diffusers' former `Transformer2DModel` is, by its normalisation; public files still name it
    "ada_norm_single": "PixArtTransformer2DModel",
    "ada_norm_zero": "DiTTransformer2DModel",
}
GUIDANCE = dict(zip(KINDS, (3.5, 7.0, 4.5, 4.0), strict=True))  # as the pipelines of diffusers
FLOW = KINDS[:2]  # trained by rectified flow: z_s = s noise + (1 - s) z
NORM_EPS = 1e-6


class DiffusionTransformer(LatentBackbone):
    """A frozen diffusion transformer with the encoder of its VAE.

    Args:
        transformer: one of diffusers' `KINDS`.
        vae: diffusers `AutoencoderKL`; its decoder is not used.
        alphas_cumprod: (T,) of the schedule; None for the models of rectified flow.
        text: encodes prompts; or None where `embed` is given prompt embeddings.

    Raises:
        BackboneError: another kind of transformer, or PixArt or DiT without a schedule.
    """

    def __init__(
        self,
        transformer: Any,
        vae: Any,
        alphas_cumprod: Tensor | None = None,
        *,
        text: PromptEncoder | None = None,
        name: str = "diffusion transformer",
        source: str = "random",
    ) -> None:
        self.kind = type(transformer).__name__
        if self.kind not in KINDS:
            raise BackboneError(f"{name}: a {self.kind} cannot be tapped; known are {', '.join(KINDS)}")
        if alphas_cumprod is None and self.kind not in FLOW:
            raise BackboneError(f"{name}: a {self.kind} needs the schedule it was trained with")
        alphas, self.flow = torch.ones(1000) if alphas_cumprod is None else alphas_cumprod, self.kind in FLOW
        super().__init__(transformer, vae, alphas, text, name=name, source=source)
        self.patch = 2 if self.kind == "FluxTransformer2DModel" else int(transformer.config.patch_size)
        self.multiple = self.stride * self.patch
        self.takes |= {"discard"}
        if self.kind == "DiTTransformer2DModel":
            self.takes = self.takes - {"prompt"} | {"label"}
        flux = self.kind == "FluxTransformer2DModel"
        self.guided = flux and bool(transformer.config.guidance_embeds)  # the scale of guidance, as FLUX.1-dev is
        self.guidance = 1.0 if flux and not self.guided else GUIDANCE[self.kind]
        double = list(transformer.transformer_blocks)
        single = list(getattr(transformer, "single_transformer_blocks", []))
        self._blocks: list[Any] = [*double, *single]
        self._width = int(transformer.config.num_attention_heads * transformer.config.attention_head_dim)
        self._taps = {}
        for i, block in enumerate(self._blocks):
            path = f"transformer_blocks.{i}" if i < len(double) else f"single_transformer_blocks.{i - len(double)}"
            for part in (".input", ".attn_in", *([".mlp_in"] if hasattr(block, "ff") else []), ""):
                self._taps[f"block.{i}{part}"] = TapInfo(f"block.{i}{part}", self._width, self.multiple, path)
        side = self.stride * int(getattr(transformer.config, "sample_size", None) or 64)
        self.recommended = Recommended(
            taps=(f"block.{len(self._blocks) // 2}.attn_in",),
            sizing=Sizing("squash", side, multiple=self.multiple),
            conditions=Conditions(timestep=260, posterior="sample"),
        )

    def add_noise(self, latents: Tensor, noise: Tensor, timestep: int) -> Tensor:
        """Noise scaled latents as the network was trained: by rectified flow or by the schedule of a DDPM."""
        if not self.flow:
            return super().add_noise(latents, noise, timestep)
        share = timestep / 1000
        return share * noise + (1 - share) * latents

    @torch.inference_mode()
    def maps(
        self, pixels: Tensor, taps: Sequence[str], conditions: Conditions, *, batch_size: int = 8, **draws: Any
    ) -> dict[str, Tensor]:
        """Read activations of images on the canvas; see `LatentBackbone.maps`."""
        for tap in taps:
            self.tap(tap)
        ingredients = {tap: _ingredients(tap) for tap in taps}
        plain = list(dict.fromkeys(part for parts in ingredients.values() for part in parts))
        maps = super().maps(pixels, plain, conditions, batch_size=batch_size, **draws)
        return {
            tap: maps[tap] if len(parts) == 1 else modulated(maps[parts[0]], maps[parts[1]], conditions.discard)
            for tap, parts in ingredients.items()
        }

    @torch.inference_mode()
    def network_maps(self, noisy: Tensor, taps: Sequence[str], conditions: Conditions) -> dict[str, Tensor]:
        """Run the transformer on (B, c, h, w) noisy latents, up to the deepest tap.

        Beside the taps, ``block.N.modulation`` is known: (B, 2 C, 1, 1), shift and scale of the block's entrance.
        ``attn_in`` is made by `maps` of the stream and this.
        """
        size = (int(noisy.shape[-2]) // self.patch, int(noisy.shape[-1]) // self.patch)
        with reading({tap: self._reader(tap, size) for tap in taps}) as maps:
            asked = (conditions.label,) if self.kind == "DiTTransformer2DModel" else (conditions.prompt,)
            times = float(max(conditions.timestep, 0))
            self.network(**self._inputs(noisy.to(self.device, self.dtype), times, asked, conditions.guidance))
        return dict(maps)

    def _reader(self, tap: str, size: tuple[int, int]) -> Reader:
        _, number, *part = tap.split(".")
        block = self._blocks[int(number)]
        if not part:
            return Reader(block, partial(_read_output, size))
        if part[0] == "modulation":
            if hasattr(block, "scale_shift_table"):  # PixArt: a table per block plus what all blocks share
                return Reader(block, partial(_read_table, block), before=True)
            norm = block.norm if hasattr(block, "norm") else block.norm1
            return Reader(norm.linear, partial(_read_modulation, self._width))
        return Reader(block if part[0] == "input" else block.ff, partial(_read_input, size), before=True)

    def painted_under(self, condition: Any, negative: str) -> tuple[list[Any], Any]:
        if self.kind != "DiTTransformer2DModel":
            return super().painted_under(condition, negative)
        classes = int(self.network.config.num_embeds_ada_norm)
        return class_labels(self.name, condition, classes, negative), classes

    def predicted(self, states: Tensor, timestep: float, conditions: Sequence[Any], *, guidance: float = 3.5) -> Tensor:
        """See `DiffusionBackbone.predicted`.

        Args:
            guidance: the scale that a network takes as an input, where it is `guided`.
        """
        inputs = self._inputs(states.to(self.device, self.dtype), timestep, conditions, guidance)
        output: Tensor = self.network(**inputs).sample
        return unpack(output, states.shape) if self.kind == "FluxTransformer2DModel" else output[:, : states.shape[1]]

    def _inputs(self, latents: Tensor, timestep: float, conditions: Sequence[Any], guidance: float) -> dict[str, Any]:
        """The arguments of the network, under one prompt or class for all or for each."""
        batch, times = len(latents), torch.full((len(latents),), timestep, device=self.device)
        if self.kind == "DiTTransformer2DModel":
            null = int(self.network.config.num_embeds_ada_norm)
            labels = torch.tensor([null if label is None else label for label in conditions], device=self.device)
            if not 0 <= int(labels.min()) <= int(labels.max()) <= null:
                got = ", ".join(map(str, conditions))
                raise ValueError(f"{self.name} has the classes 0..{null - 1} (and {null}: none), got {got}")
            return {"hidden_states": latents, "timestep": times, "class_labels": labels.expand(batch)}
        embeddings = [self.embed(prompt) for prompt in conditions]
        context = torch.cat([e.context for e in embeddings]).to(latents).expand(batch, -1, -1)
        inputs = {"hidden_states": latents, "timestep": times, "encoder_hidden_states": context}
        if self.kind == "PixArtTransformer2DModel":
            masks = [e.mask.to(self.device) for e in embeddings if e.mask is not None]
            mask = torch.cat(masks).expand(batch, -1) if masks else None
            return {**inputs, "encoder_attention_mask": mask, "added_cond_kwargs": self._sizes(latents)}
        if bare := [prompt for prompt, e in zip(conditions, embeddings, strict=True) if e.pooled is None]:
            raise ValueError(f"{self.name} needs a pooled embedding, that of {bare[0]!r} has none")
        pools = [e.pooled for e in embeddings if e.pooled is not None]
        inputs["pooled_projections"] = torch.cat(pools).to(latents).expand(batch, -1)
        if self.kind == "SD3Transformer2DModel":
            return inputs
        if self.network.config.guidance_embeds:
            inputs["guidance"] = torch.full((batch,), guidance, device=self.device)
        height, width = latents.shape[-2] // 2, latents.shape[-1] // 2
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        places = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1)
        return inputs | {
            "hidden_states": pack(latents),
            "timestep": times / 1000,
            "img_ids": places.to(latents),
            "txt_ids": torch.zeros(context.shape[1], 3).to(latents),
        }

    def _sizes(self, latents: Tensor) -> dict[str, Tensor | None]:
        """PixArt-alpha's size conditions, where the model was trained with them."""
        if not self.network.use_additional_conditions:
            return {"resolution": None, "aspect_ratio": None}
        height, width = (side * self.stride for side in latents.shape[-2:])
        resolution = torch.tensor([[float(height), float(width)]]).to(latents).expand(len(latents), -1)
        return {"resolution": resolution, "aspect_ratio": resolution[:, :1] / resolution[:, 1:]}


def modulated(stream: Tensor, modulation: Tensor, discard: Sequence[int] = ()) -> Tensor:
    """AdaLN at a block's entrance: (1 + scale) LayerNorm(x) + shift, with some channels of x set to 0 first.

    Set to 0 behind the LayerNorm instead, large channels would shrink all others.

    Args:
        stream: (B, C, h, w).
        modulation: (B, 2 C, 1, 1), shift and scale.

    Raises:
        ValueError: a discarded channel does not exist.
    """
    channels = stream.shape[1]
    if discard and not 0 <= min(discard) <= max(discard) < channels:
        raise ValueError(f"channels to discard must be in 0..{channels - 1}, got {tuple(discard)}")
    remaining = stream.float().clone()
    remaining[:, list(discard)] = 0
    normalised = F.layer_norm(remaining.movedim(1, -1), (channels,), eps=NORM_EPS).movedim(-1, 1)
    shift, scale = modulation.float().chunk(2, dim=1)
    return ((1 + scale) * normalised + shift).to(stream.dtype)


def pack(latents: Tensor) -> Tensor:
    """FLUX's tokens: (B, c, h, w) -> (B, h/2 * w/2, 4 c), 2 x 2 patches row by row, in them (c, row, column)."""
    batch, channels, height, width = latents.shape
    patches = latents.view(batch, channels, height // 2, 2, width // 2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, height * width // 4, channels * 4)


def unpack(tokens: Tensor, shape: Sequence[int]) -> Tensor:
    """`pack` undone: tokens (B, h/2 * w/2, 4 c) -> latents of the shape (B, c, h, w)."""
    batch, channels, height, width = shape
    patches = tokens.view(batch, height // 2, width // 2, channels, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, height, width)


def _ingredients(tap: str) -> tuple[str, ...]:
    block = tap.removesuffix(".attn_in")
    return (tap,) if block == tap else (f"{block}.input", f"{block}.modulation")


def _to_map(size: tuple[int, int], tokens: Tensor) -> Tensor:
    """The image's tokens, which stand behind those of the text, as (B, C, h, w)."""
    return tokens[:, -size[0] * size[1] :].mT.unflatten(2, size)


def _read_output(size: tuple[int, int], call: Call) -> Tensor:
    return _to_map(size, call.output if isinstance(call.output, Tensor) else call.output[-1])  # (text, image)


def _read_input(size: tuple[int, int], call: Call) -> Tensor:
    return _to_map(size, call.kwargs["hidden_states"] if "hidden_states" in call.kwargs else call.inputs[0])


def _read_modulation(width: int, call: Call) -> Tensor:
    modulation: Tensor = call.output
    return modulation[:, : 2 * width, None, None]  # shift, scale, gate, ... in all these networks


def _read_table(block: nn.Module, call: Call) -> Tensor:
    shared: Tensor = call.kwargs["timestep"]
    return (block.scale_shift_table + shared.unflatten(1, (6, -1)))[:, :2].flatten(1)[..., None, None]
