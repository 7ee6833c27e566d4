"""Prompts: encoded once each, with text encoders that do not stay in memory."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from diffrep.backbones.base import BackboneError
from diffrep.backbones.repositories import Repository, repository
from diffrep.files import one_line, read_weights


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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of names of arguments, which both ends of our range know
            yield
    finally:
        for library, had_bar, level in zip(libraries, bars, levels, strict=True):
            library.set_verbosity(level)
            if had_bar:
                library.enable_progress_bar()


PROMPTS = "prompts.safetensors"  # of our folders: prompt -> (1, tokens, C), padded, of their one text encoder
PROJECTION = "CLIPTextModelWithProjection"  # the second text encoder of SDXL, the only one of its refiner


class PromptEncoder(ABC):
    """Text encoders that are loaded when a new prompt comes, and freed after.

    Attributes:
        adapters: called with each component's name and encoder, after it is loaded.
        times_loaded: how often prompts were encoded.
    """

    def __init__(self, *, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype, self.times_loaded = device, dtype, 0
        self.adapters: list[Callable[[str, Any], None]] = []

    def encode(self, prompts: list[str]) -> dict[str, PromptEmbedding]:
        """Encode prompts, each on its own.

        Raises:
            ValueError: prompts of different numbers of tokens, which cannot share a batch without padding.
            BackboneError: a text encoder or tokenizer is missing, damaged, or of another kind.
        """
        self.times_loaded += 1
        with torch.inference_mode():
            return self._encode(prompts)

    @abstractmethod
    def _encode(self, prompts: list[str]) -> dict[str, PromptEmbedding]: ...

    def _adapt(self, part: str, encoder: Any) -> None:
        for adapt in self.adapters:
            adapt(part, encoder)


class ClipEncoders(PromptEncoder):
    """The one or two CLIP text encoders of a Stable Diffusion.

    Args:
        parts: component -> class name, as in ``model_index.json``; of Stable Diffusion XL and its refiner, the one
            with `PROJECTION`, the penultimate layers and the last pooled output count.
        pad: to the tokenizer's length, as Stable Diffusion does; without, a prompt has its own tokens only, two for
            the empty one (Marigold, Lotus).
    """

    def __init__(self, parts: Mapping[str, str], *, device: torch.device, dtype: torch.dtype, pad: bool = True) -> None:
        super().__init__(device=device, dtype=dtype)
        self.parts, self.pad = parts, pad

    @abstractmethod
    def load(self, part: str) -> tuple[Any, Any]:
        """The tokenizer and the text encoder of a component."""

    def _encode(self, prompts: list[str]) -> dict[str, PromptEmbedding]:
        states, pooled, large = [], torch.empty(0), PROJECTION in self.parts.values()
        for part in sorted(self.parts):
            tokenizer, encoder = self.load(part)
            self._adapt(part, encoder)
            encoder = encoder.to(self.device, self.dtype).eval()
            padding = "max_length" if self.pad else False
            tokens = tokenizer(
                prompts, padding=padding, max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
            )
            masked = getattr(encoder.config, "use_attention_mask", False)
            mask = tokens.attention_mask.to(self.device) if masked else None
            output = encoder(tokens.input_ids.to(self.device), attention_mask=mask, output_hidden_states=large)
            # the first output: last_hidden_state, or for a model with projection its text_embeds
            states.append(output.hidden_states[-2] if large else output[0])
            pooled = output[0]
        contexts = torch.cat(states, dim=-1).split(1)
        pools = pooled.split(1) if large else [None] * len(prompts)
        return {prompt: PromptEmbedding(*both) for prompt, *both in zip(prompts, contexts, pools, strict=True)}


class TextEncoders(ClipEncoders):
    """The text encoders of a Stable Diffusion's folder or hub id, ``text_encoder/`` and ``tokenizer/`` (XL: also _2).

    Args:
        source: local folder or hub id.
        parts, pad: see `ClipEncoders`; the one of Stable Diffusion 1 and 2 where left out.
    """

    def __init__(
        self,
        source: str | Repository,
        parts: Mapping[str, str] | None = None,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        pad: bool = True,
    ) -> None:
        parts = {"text_encoder": "CLIPTextModel"} if parts is None else parts
        super().__init__(parts, device=torch.device(device), dtype=dtype, pad=pad)
        self.source = repository(source)

    def encode(self, prompts: list[str]) -> dict[str, PromptEmbedding]:
        """As `PromptEncoder.encode`; prompts that the folder holds (`PROMPTS`) need no text encoder."""
        stored = self._stored()
        known = {prompt: stored[prompt] for prompt in prompts if prompt in stored}
        rest = [prompt for prompt in prompts if prompt not in known]
        return known | (super().encode(rest) if rest else {})

    def _stored(self) -> dict[str, PromptEmbedding]:
        if PROMPTS not in self.source.files or self.adapters or not self.pad:
            return {}
        tensors, _ = read_weights(self.source.fetch([PROMPTS]) / PROMPTS, error=BackboneError)
        return {prompt: PromptEmbedding(context.to(self.device, self.dtype)) for prompt, context in tensors.items()}

    def load(self, part: str) -> tuple[Any, Any]:
        from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

        kinds = {"CLIPTextModel": CLIPTextModel, PROJECTION: CLIPTextModelWithProjection}
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


class PipelineText(PromptEncoder):
    """The text encoders of FLUX, SD3 and PixArt folders, through the pipeline that belongs to the folder.

    Prompts are encoded as the pipeline does it for generation without guidance.

    Args:
        source: local folder or hub id.
        pipeline: class of the pipeline, as in ``model_index.json``.
    """

    def __init__(self, source: str | Repository, pipeline: str, *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(device=device, dtype=dtype)
        self.source, self.pipeline = repository(source), pipeline

    def _encode(self, prompts: list[str]) -> dict[str, PromptEmbedding]:
        loaded = self._load().to(self.device)
        return {prompt: self._embedding(loaded, prompt) for prompt in prompts}

    def _load(self) -> Any:
        import diffusers

        source, index = self.source, self.source.json("model_index.json")
        parts = [part for part in index if part.startswith("text_encoder") and (index[part] or [None])[0]]
        absent: dict[str, None] = {"transformer": None, "vae": None}
        if self.pipeline.startswith("StableDiffusion3") and not (
            "text_encoder_3" in parts and source.has("text_encoder_3")
        ):  # it works without its T5, whether the folder lacks it or the index says so
            absent |= {"text_encoder_3": None, "tokenizer_3": None}
            parts = [part for part in parts if part != "text_encoder_3"]
        if missing := [part for part in parts if not source.has(part)]:
            raise BackboneError(f"{source.label}: the folder {missing[0]}/ is missing, prompts cannot be encoded")
        variants = {part: source.part(part, need=False) for part in parts}
        starts = ("tokenizer", "scheduler", "model_index.json")
        folder = source.fetch(file for file in source.files if file.startswith(starts))
        variant = next((variant for _, variant in variants.values() if variant), None)
        try:
            with quiet_libraries():
                loaded = getattr(diffusers, self.pipeline).from_pretrained(
                    str(folder), torch_dtype=self.dtype, use_safetensors=True, variant=variant, **absent
                )
        except Exception as error:  # damaged files and nonsense in the configurations: many kinds
            raise BackboneError(f"{source.label}: its text encoders cannot be loaded ({one_line(error)})") from None
        for part in parts:
            self._adapt(part, getattr(loaded, part))
        if "text_encoder_3" in absent:  # its zeros are as wide as the transformer's configuration says
            width = source.json("transformer/config.json").get("joint_attention_dim", 4096)
            loaded.transformer = SimpleNamespace(config=SimpleNamespace(joint_attention_dim=width))
        return loaded

    def _embedding(self, loaded: Any, prompt: str) -> PromptEmbedding:
        if self.pipeline.startswith("Flux"):
            context, pooled, _ = loaded.encode_prompt(prompt=prompt, prompt_2=None, device=self.device)
            return PromptEmbedding(context, pooled)
        unguided: dict[str, Any] = {"device": self.device, "do_classifier_free_guidance": False}
        if self.pipeline.startswith("StableDiffusion3"):
            context, _, pooled, _ = loaded.encode_prompt(prompt, prompt_2=None, prompt_3=None, **unguided)
            return PromptEmbedding(context, pooled)
        if self.pipeline.startswith("PixArt"):
            context, mask, _, _ = loaded.encode_prompt(prompt, **unguided)
            return PromptEmbedding(context, mask=mask)
        raise BackboneError(f"{self.source.label}: how a {self.pipeline} encodes prompts is not known here")
