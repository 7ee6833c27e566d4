"""Prompts of Stable Diffusion folders: encoded once each, with text encoders that do not stay in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffrep.backbones.base import BackboneError


@dataclass(frozen=True)
class PromptEmbedding:
    """What the U-Net is told of a prompt.

    Attributes:
        context: (1, tokens, C), attended to.
        pooled: (1, C'), added to the time embedding (SDXL, SD3, FLUX), or None.
        mask: (1, tokens), 1 where a token counts (PixArt), or None: all do.
    """

    context: Tensor
    pooled: Tensor | None = None
    mask: Tensor | None = None


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Keep transformers from drawing a bar for the milliseconds of loading a text encoder."""
    from transformers.utils import logging

    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()


class TextEncoders:
    """The one or two CLIP text encoders of a diffusers folder, loaded when a new prompt comes and freed after.

    Args:
        source: local folder or hub id with ``text_encoder/`` and ``tokenizer/`` (SDXL: also ``_2``).
        parts: component folder -> class name, as in ``model_index.json``.
        pad: to the tokenizer's length, as Stable Diffusion does; without, a prompt has its own tokens only, two for
            the empty one (Marigold, Lotus).
    """

    def __init__(
        self,
        source: str,
        parts: Mapping[str, str],
        *,
        device: torch.device,
        dtype: torch.dtype,
        variant: str | None = None,
        pad: bool = True,
    ) -> None:
        self.source, self.parts, self.device, self.dtype, self.variant = source, parts, device, dtype, variant
        self.pad = pad
        self.times_loaded = 0

    @torch.inference_mode()
    def encode(self, prompts: list[str]) -> dict[str, PromptEmbedding]:
        """Encode prompts, each on its own.

        Raises:
            ValueError: prompts of different numbers of tokens, which cannot share a batch without padding.
        """
        self.times_loaded += 1
        if "text_encoder_2" not in self.parts:
            states, _ = self._run("tokenizer", "text_encoder", prompts, penultimate=False)
            return {p: PromptEmbedding(s[None]) for p, s in zip(prompts, states, strict=True)}
        # SDXL: the penultimate layers of both encoders side by side, and the second one's pooled projection
        contexts, pooled = [], torch.empty(0)
        for tokenizer, encoder in (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")):
            states, pooled = self._run(tokenizer, encoder, prompts, penultimate=True)
            contexts.append(states)
        context = torch.cat(contexts, dim=-1)
        return {p: PromptEmbedding(context[i : i + 1], pooled[i : i + 1]) for i, p in enumerate(prompts)}

    def _run(
        self, tokenizer_part: str, encoder_part: str, prompts: list[str], *, penultimate: bool
    ) -> tuple[Tensor, Tensor]:
        from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

        kind = {"CLIPTextModel": CLIPTextModel, "CLIPTextModelWithProjection": CLIPTextModelWithProjection}
        if self.parts[encoder_part] not in kind:
            raise BackboneError(
                f"{self.source}: {encoder_part} is a {self.parts[encoder_part]}; prompts need a {' or '.join(kind)}"
            )
        if (folder := Path(self.source)).is_dir():
            for part in (tokenizer_part, encoder_part):
                if not (folder / part).is_dir():
                    raise BackboneError(f"{folder}: the folder {part}/ is missing, prompts cannot be encoded")
        tokenizer = CLIPTokenizer.from_pretrained(self.source, subfolder=tokenizer_part)
        with _no_progress_bar():
            encoder: Any = kind[self.parts[encoder_part]].from_pretrained(
                self.source, subfolder=encoder_part, use_safetensors=True, variant=self.variant
            )
        encoder = encoder.to(self.device, self.dtype).eval()
        tokens = tokenizer(
            prompts,
            padding="max_length" if self.pad else False,
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        mask = tokens.attention_mask.to(self.device) if getattr(encoder.config, "use_attention_mask", False) else None
        output = encoder(tokens.input_ids.to(self.device), attention_mask=mask, output_hidden_states=penultimate)
        # the first output: last_hidden_state, or for a model with projection its text_embeds
        return (output.hidden_states[-2] if penultimate else output[0]), output[0]


class PipelineText:
    """The text encoders of FLUX, SD3 and PixArt folders, through the pipeline that belongs to the folder.

    They are loaded when a new prompt comes and freed after.

    Args:
        source: local folder or hub id.
        pipeline: class of the pipeline, as in ``model_index.json``.
    """

    def __init__(self, source: str, pipeline: str, *, device: torch.device, dtype: torch.dtype) -> None:
        self.source, self.pipeline, self.device, self.dtype = source, pipeline, device, dtype

    @torch.inference_mode()
    def encode(self, prompts: list[str]) -> dict[str, PromptEmbedding]:
        """Encode prompts, each on its own, as the pipeline does it for generation without guidance."""
        import diffusers

        with _no_progress_bar():
            loaded = getattr(diffusers, self.pipeline).from_pretrained(
                self.source, transformer=None, vae=None, torch_dtype=self.dtype, use_safetensors=True
            )
        loaded.to(self.device)
        return {prompt: self._embedding(loaded, prompt) for prompt in prompts}

    def _embedding(self, loaded: Any, prompt: str) -> PromptEmbedding:
        if self.pipeline.startswith("Flux"):
            context, pooled, _ = loaded.encode_prompt(prompt=prompt, prompt_2=None, device=self.device)
            return PromptEmbedding(context, pooled)
        if self.pipeline.startswith("StableDiffusion3"):
            context, _, pooled, _ = loaded.encode_prompt(
                prompt=prompt, prompt_2=None, prompt_3=None, device=self.device, do_classifier_free_guidance=False
            )
            return PromptEmbedding(context, pooled)
        if self.pipeline.startswith("PixArt"):
            context, mask, _, _ = loaded.encode_prompt(prompt, device=self.device, do_classifier_free_guidance=False)
            return PromptEmbedding(context, mask=mask)
        raise BackboneError(f"{self.source}: how a {self.pipeline} encodes prompts is not known here")
