"""Prompts of Stable Diffusion folders: encoded once each, with text encoders that do not stay in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from diffrep.backbones.base import BackboneError
from diffrep.backbones.repositories import Repository, repository
from diffrep.files import one_line


@dataclass(frozen=True)
class PromptEmbedding:
    """A prompt as the network attends to it.

    Attributes:
        context: (1, tokens, C), attended to.
        pooled: (1, C'), added to the time embedding (SDXL, SD3, FLUX), or None.
        mask: (1, tokens), 1 where a token counts (PixArt), or None: all do.
    """

    context: Tensor
    pooled: Tensor | None = None
    mask: Tensor | None = None


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep transformers and diffusers from drawing bars for milliseconds and warning of what is checked here."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries: tuple[Any, ...] = (diffusers_logging, transformers_logging)
    bars = [library.is_progress_bar_enabled() for library in libraries]
    levels = [library.get_verbosity() for library in libraries]
    try:
        for library in libraries:
            library.disable_progress_bar()
            library.set_verbosity_error()
        yield
    finally:
        for library, had_bar, level in zip(libraries, bars, levels, strict=True):
            library.set_verbosity(level)
            if had_bar:
                library.enable_progress_bar()


PROJECTION = "CLIPTextModelWithProjection"  # the second text encoder of SDXL, the only one of its refiner


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
        source: str | Repository,
        parts: Mapping[str, str],
        *,
        device: torch.device,
        dtype: torch.dtype,
        variant: str | None = None,
        pad: bool = True,
    ) -> None:
        self.source, self.parts, self.device, self.dtype = repository(source, variant=variant), parts, device, dtype
        self.pad, self.times_loaded = pad, 0
        self.adapters: list[Callable[[str, Any], None]] = []

    @torch.inference_mode()
    def encode(self, prompts: list[str]) -> dict[str, PromptEmbedding]:
        """Encode prompts, each on its own.

        Raises:
            ValueError: prompts of different numbers of tokens, which cannot share a batch without padding.
            BackboneError: a text encoder or tokenizer is missing, damaged, or of another kind.
        """
        self.times_loaded += 1
        return encode_prompts(self, sorted(self.parts), prompts, large=PROJECTION in self.parts.values(), pad=self.pad)

    def load(self, part: str) -> tuple[Any, Any]:
        """The tokenizer and the text encoder of a component."""
        from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

        kinds = {"CLIPTextModel": CLIPTextModel, "CLIPTextModelWithProjection": CLIPTextModelWithProjection}
        where, tokenizer = self.source.label, part.replace("text_encoder", "tokenizer")
        if self.parts[part] not in kinds:
            raise BackboneError(f"{where}: {part} is a {self.parts[part]}; prompts need a {' or '.join(kinds)}")
        for needed in (tokenizer, part):
            if not self.source.has(needed):
                raise BackboneError(f"{where}: the folder {needed}/ is missing, prompts cannot be encoded")
        vocabulary = self.source.fetch(f for f in self.source.files if f.startswith(f"{tokenizer}/"))
        folder, variant = self.source.part(part, need=False)
        try:
            with quiet_libraries():
                encoder: Any = kinds[self.parts[part]].from_pretrained(
                    str(folder), subfolder=part, use_safetensors=True, variant=variant
                )
            return CLIPTokenizer.from_pretrained(str(vocabulary), subfolder=tokenizer), encoder
        except Exception as error:  # damaged files and nonsense in the configuration: many kinds
            raise BackboneError(f"{where}: {part} cannot be loaded ({one_line(error)})") from None


class ClipEncoders(Protocol):
    """Where the one or two CLIP text encoders of a model come from."""

    device: torch.device
    dtype: torch.dtype
    adapters: list[Callable[[str, Any], None]]  # called with each component's name and encoder, after it is loaded

    def load(self, part: str) -> tuple[Any, Any]: ...


def encode_prompts(
    source: ClipEncoders, parts: Sequence[str], prompts: list[str], *, large: bool, pad: bool = True
) -> dict[str, PromptEmbedding]:
    """Encode prompts as Stable Diffusion does: the encoders are loaded one by one and freed.

    Args:
        parts: components in order.
        large: Stable Diffusion XL or its refiner, of which the penultimate layers and the last pooled output count.
    """
    states, pooled = [], torch.empty(0)
    for part in parts:
        tokenizer, encoder = source.load(part)
        for adapt in source.adapters:
            adapt(part, encoder)
        encoder = encoder.to(source.device, source.dtype).eval()
        length = tokenizer.model_max_length
        tokens = tokenizer(
            prompts, padding="max_length" if pad else False, max_length=length, truncation=True, return_tensors="pt"
        )
        mask = tokens.attention_mask.to(source.device) if getattr(encoder.config, "use_attention_mask", False) else None
        output = encoder(tokens.input_ids.to(source.device), attention_mask=mask, output_hidden_states=large)
        # the first output: last_hidden_state, or for a model with projection its text_embeds
        states.append(output.hidden_states[-2] if large else output[0])
        pooled = output[0]
    context = torch.cat(states, dim=-1)
    if not large:
        return {p: PromptEmbedding(context[i : i + 1]) for i, p in enumerate(prompts)}
    # SDXL: the penultimate layers of both encoders side by side, and the second one's pooled projection
    return {p: PromptEmbedding(context[i : i + 1], pooled[i : i + 1]) for i, p in enumerate(prompts)}


class PipelineText:
    """The text encoders of FLUX, SD3 and PixArt folders, through the pipeline that belongs to the folder.

    They are loaded when a new prompt comes and freed after.

    Args:
        source: local folder or hub id.
        pipeline: class of the pipeline, as in ``model_index.json``.
    """

    def __init__(self, source: str | Repository, pipeline: str, *, device: torch.device, dtype: torch.dtype) -> None:
        self.source, self.pipeline, self.device, self.dtype = repository(source), pipeline, device, dtype

    @torch.inference_mode()
    def encode(self, prompts: list[str]) -> dict[str, PromptEmbedding]:
        """Encode prompts, each on its own, as the pipeline does it for generation without guidance.

        Raises:
            BackboneError: a text encoder is missing or damaged, or the pipeline is none of those known here.
        """
        loaded = self._load()
        loaded.to(self.device)
        return {prompt: self._embedding(loaded, prompt) for prompt in prompts}

    def _load(self) -> Any:
        import diffusers

        source, index = self.source, self.source.json("model_index.json")
        parts = [part for part in index if part.startswith("text_encoder") and (index[part] or [None])[0]]
        absent: dict[str, None] = {"transformer": None, "vae": None}
        for part in [part for part in parts if not source.has(part)]:
            if part != "text_encoder_3":  # Stable Diffusion 3 works without its T5
                raise BackboneError(f"{source.label}: the folder {part}/ is missing, prompts cannot be encoded")
            absent |= {part: None, "tokenizer_3": None}
            parts.remove(part)
        variants = {part: source.part(part, need=False) for part in parts}
        starts = ("tokenizer", "scheduler", "model_index.json")
        folder = source.fetch(file for file in source.files if file.startswith(starts))
        variant = next((variant for _, variant in variants.values() if variant), None)
        try:
            with quiet_libraries():
                return getattr(diffusers, self.pipeline).from_pretrained(
                    str(folder), torch_dtype=self.dtype, use_safetensors=True, variant=variant, **absent
                )
        except Exception as error:  # damaged files and nonsense in the configurations: many kinds
            raise BackboneError(f"{source.label}: its text encoders cannot be loaded ({one_line(error)})") from None

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
        raise BackboneError(f"{self.source.label}: how a {self.pipeline} encodes prompts is not known here")
