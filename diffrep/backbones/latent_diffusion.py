"""Stable Diffusion 1.x, 2.x, Turbo and XL as backbones: a U-Net in diffusers' folder layout.

The U-Net runs up to the deepest tap only, and the keys and values of cross-attention are computed once per prompt.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffrep.backbones.base import BackboneError, Conditions, Recommended
from diffrep.backbones.diffusion import LatentBackbone
from diffrep.backbones.fused import fused_blocks
from diffrep.backbones.text import PromptEmbedding, PromptEncoder
from diffrep.backbones.unet import cross_attentions, folded_upsampling, reading_taps, unet_taps, with_freeu
from diffrep.images import Sizing

AESTHETIC_SCORE = 6.0  # as SDXL's refiner is used for positive prompts


def guidance_embedding(w: Tensor, dim: int) -> Tensor:
    """Guidance scales minus one, (B,), as a U-Net with ``time_cond_proj_dim`` is told them (LCM): (B, dim) float32."""
    half = dim // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * (-math.log(10000.0) / (half - 1)))
    phases = (w.float() * 1000)[:, None] * frequencies.to(w.device)
    return F.pad(torch.cat([phases.sin(), phases.cos()], 1), (0, dim % 2))


class LatentDiffusion(LatentBackbone):
    """A frozen latent diffusion U-Net with the encoder of its VAE.

    Args:
        unet: diffusers `UNet2DConditionModel`.
        vae: diffusers `AutoencoderKL`; its decoder is not used.
        alphas_cumprod: (T,) the schedule's cumulative product, indexed by the timestep.
        text: encodes prompts; or None where `embed` is given prompt embeddings.
        predicts: what the network was trained to predict, "epsilon" or "v_prediction"; features do not depend on it.
    """

    has_unet, guidance = True, 7.5
    takes = LatentBackbone.takes | {"noise", "inversion_steps", "freeu"}

    def __init__(
        self,
        unet: Any,
        vae: Any,
        alphas_cumprod: Tensor,
        *,
        text: PromptEncoder | None = None,
        predicts: str = "epsilon",
        name: str = "latent diffusion",
        source: str = "random",
        recommended: Recommended | None = None,
    ) -> None:
        super().__init__(unet, vae, alphas_cumprod, text, name=name, source=source)
        self.predicts = predicts
        self.guided = bool(getattr(unet.config, "time_cond_proj_dim", None))  # as whole LCMs are
        self._taps = unet_taps(unet, self.stride)
        self._constants: dict[str, tuple[Tensor, dict[Any, Tensor]]] = {}
        default_tap = "up.1" if "up.1" in self._taps else "mid"
        side = self.stride * int(unet.config.sample_size or 64)
        self.recommended = recommended or Recommended(
            taps=(default_tap,),
            sizing=Sizing(mode="squash", size=side),
            conditions=Conditions(timestep=261, posterior="sample"),
        )

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._forget()  # constants lie on the device that the weights leave
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any) -> None:
        self._forget()
        super()._load_from_state_dict(*args)

    def _forget(self) -> None:
        self._constants.clear()
        self.graphs.clear()

    def embed(self, prompt: str, embedding: PromptEmbedding | None = None) -> PromptEmbedding:
        if embedding is not None:
            self._forget()
        return super().embed(prompt, embedding)

    def _context(self, prompt: str) -> tuple[Tensor, dict[Any, Tensor]]:
        """A prompt on the U-Net's device, (1, tokens, C), and the keys and values that cross-attention makes of it."""
        if prompt in self._constants:
            return self._constants[prompt]
        context = self.embed(prompt).context.to(self.device, self.dtype)
        if context.shape[-1] != (width := self.network.config.cross_attention_dim):
            raise BackboneError(
                f"{self.name}: a prompt's embedding has {context.shape[-1]} channels, the U-Net attends to {width}: a"
                " text encoder is missing, or belongs to another model"
            )
        projections = [p for a in cross_attentions(self.network) for p in (a.to_k, a.to_v)]
        # not as inference tensors: a trained part inside the U-Net needs its activations' gradients
        with torch.inference_mode(False), torch.no_grad():
            self._constants[prompt] = context, {p: p(context.clone()) for p in projections}
        return self._constants[prompt]

    @contextmanager
    def _constant_context(self, prompt: str) -> Iterator[Tensor]:
        """Run the U-Net with a prompt whose cross-attention keys and values are computed once and kept."""
        context, projected = self._context(prompt)

        def constant(value: Tensor) -> Any:
            return lambda tokens: value.expand(tokens.shape[0], -1, -1)

        try:
            for projection, value in projected.items():
                projection.forward = constant(value)
            yield context
        finally:
            for projection in projected:
                del projection.forward  # uncovers that of the class

    def network_maps(self, noisy: Tensor, taps: Sequence[str], conditions: Conditions) -> dict[str, Tensor]:
        """Run the U-Net on (B, c, h, w) latents, up to the deepest tap."""
        batch, prompt, freeu = len(noisy), conditions.prompt, conditions.freeu
        self._context(prompt)  # computed before anything is recorded
        added = self._added_conditions(self.embed(prompt).pooled, batch, noisy.shape[-2:])

        def run(latents: Tensor, timestep: Tensor, *conditioning: Tensor) -> dict[str, Tensor]:
            named = {"added_cond_kwargs": dict(zip(added, conditioning, strict=True))} if added else {}
            blocks = folded_upsampling(self.network), fused_blocks(self.network)
            with self._constant_context(prompt) as context, with_freeu(self.network, freeu), blocks[0], blocks[1]:
                return self._run(latents, taps, timestep, context.expand(batch, -1, -1), **named)

        timestep = torch.full((1,), max(conditions.timestep, 0), device=self.device)
        latents = noisy.to(self.device, self.dtype)
        return self.graphs((tuple(taps), prompt, freeu), run, latents, timestep, *added.values())

    @torch.inference_mode()
    def context_maps(self, latents: Tensor, taps: Sequence[str], timestep: int, context: Tensor) -> dict[str, Tensor]:
        """Run the U-Net on (B, c, h, w) latents with a context (B, tokens, C) of each, up to the deepest tap.

        Args:
            timestep: embedded as it is, -1 too, as Diffusion Hyperfeatures does.
        """

        def run(latents: Tensor, step: Tensor, context: Tensor) -> dict[str, Tensor]:
            with fused_blocks(self.network):
                return self._run(latents, taps, step, context)

        step = torch.full((1,), timestep, device=self.device)
        inputs = latents.to(self.device, self.dtype), step, context.to(self.device, self.dtype)
        return self.graphs(("context", *taps), run, *inputs)

    def _run(
        self, latents: Tensor, taps: Sequence[str], timestep: int | Tensor, context: Tensor, **added: Any
    ) -> dict[str, Tensor]:
        with reading_taps(self.network, [self.tap(tap) for tap in taps], latents.shape) as maps:
            self.network(latents.to(self.device, self.dtype), timestep, encoder_hidden_states=context, **added)
        return maps

    @torch.inference_mode()
    def inverted(self, clean: Tensor, conditions: Conditions) -> Tensor:
        """Latents at a timestep by even steps of DDIM inversion under the prompt alone.

        The network is called with the timestep that a step leads to, as prompt-to-prompt and diffusers have it.
        """
        latents, steps, before = clean.float(), min(conditions.inversion_steps, conditions.timestep), -1
        for step in range(1, steps + 1):
            after = round(conditions.timestep * step / steps)
            output = self.network_maps(latents, ["out"], replace(conditions, timestep=after))["out"].float()
            latents, _ = self.ddim_step(latents, self.as_noise(latents, output, before), before, after)
            before = after
        return latents.to(clean)

    @torch.inference_mode()
    def predict_noise(self, latents: Tensor, timestep: int, context: Tensor) -> Tensor:
        """The noise that the network sees in (B, c, h, w) latents, whatever it was trained to predict.

        Args:
            timestep: -1 is the clean latent.
            context: (B or 1, tokens, C) of the prompt.
        """
        expanded = context.expand(len(latents), -1, -1)
        return self.as_noise(latents, self.context_maps(latents, ["out"], timestep, expanded)["out"], timestep)

    def as_noise(self, latents: Tensor, output: Tensor, timestep: int) -> Tensor:
        """An output of the network for these latents as the noise in them."""
        alpha = self.alpha(timestep)
        return alpha**0.5 * output + (1 - alpha) ** 0.5 * latents if self.predicts == "v_prediction" else output

    def alpha(self, timestep: int) -> float:
        """The schedule's cumulative product at a timestep; 1 at -1, the clean latent."""
        return 1.0 if timestep < 0 else float(self.alphas_cumprod[timestep])

    def ddim_step(self, latents: Tensor, noise: Tensor, before: int, after: int) -> tuple[Tensor, Tensor]:
        """One deterministic DDIM step in either direction.

        Args:
            latents: (B, c, h, w) at timestep `before`.
            noise: that is seen in them.

        Returns:
            The latents at timestep `after`, and the clean latents that the noise predicts.
        """
        now, then = self.alpha(before), self.alpha(after)
        clean = (latents - noise * (1 - now) ** 0.5) / now**0.5
        return then**0.5 * clean + (1 - then) ** 0.5 * noise, clean

    def predicted(self, states: Tensor, timestep: float, conditions: Sequence[Any], *, guidance: float = 7.5) -> Tensor:
        embeddings = [self.embed(prompt) for prompt in conditions]
        context = torch.cat([e.context for e in embeddings]).to(self.device, self.dtype)
        pools = [e.pooled for e in embeddings if e.pooled is not None]
        added = self._added_conditions(torch.cat(pools) if pools else None, len(states), states.shape[-2:])
        extra = list(added.values())
        if self.guided:
            scales = torch.full((len(states),), guidance - 1.0)
            extra.append(guidance_embedding(scales, self.network.config.time_cond_proj_dim).to(self.device, self.dtype))

        def run(noisy: Tensor, step: Tensor, context: Tensor, *extra: Tensor) -> Tensor:
            named: dict[str, Any] = {"added_cond_kwargs": dict(zip(added, extra, strict=False))} if added else {}
            if self.guided:
                named["timestep_cond"] = extra[-1]
            with fused_blocks(self.network):
                return self.network(noisy, step, encoder_hidden_states=context, **named).sample

        step = torch.full((1,), timestep, device=self.device)
        return self.graphs("predicted", run, states.to(self.device, self.dtype), step, context, *extra)

    def _added_conditions(self, pooled: Tensor | None, batch: int, size: Sequence[int]) -> dict[str, Tensor]:
        """SDXL's pooled text and its original size, crop corner and target size, as diffusers names them."""
        config = self.network.config
        if config.addition_embed_type != "text_time":
            return {}
        if pooled is None:
            raise BackboneError(
                f"{self.name}: is a Stable Diffusion XL, which needs the pooled embedding of its second text encoder;"
                " text_encoder_2/ is missing"
            )
        height, width = size[0] * self.stride, size[1] * self.stride
        numbers = (config.projection_class_embeddings_input_dim - pooled.shape[-1]) // config.addition_time_embed_dim
        # the refiner is conditioned on an aesthetic score instead of a target size
        ends = [height, width] if numbers == 6 else [AESTHETIC_SCORE]
        ids = torch.tensor([[height, width, 0, 0, *ends]], device=self.device, dtype=self.dtype)
        text = pooled.to(self.device, self.dtype).expand(batch, -1)
        return {"text_embeds": text, "time_ids": ids.expand(batch, -1)}
