"""Prompts of transformer folders: T5 and CLIP through the pipeline that a folder names, small and offline."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from diffrep.backbones import BackboneError
from diffrep.backbones.text import PipelineText

from .conftest import CHARACTERS, save_text_encoder

CPU, T5_WIDTH, CLIP_WIDTH, TOKENS = torch.device("cpu"), 36, 16, 12


def save_t5(folder: Path, suffix: str = "") -> None:
    """A T5 encoder and its tokenizer with random weights; every character is a token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    config = T5Config(vocab_size=40, d_model=T5_WIDTH, d_kv=9, d_ff=24, num_layers=2, num_heads=4)
    T5EncoderModel(config).save_pretrained(folder / f"text_encoder{suffix}")
    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {c: i + 3 for i, c in enumerate(CHARACTERS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=TOKENS
    )
    fast.save_pretrained(folder / f"tokenizer{suffix}")


def save_pipeline(folder: Path, kind: str) -> PipelineText:
    """A folder with the text parts of a pipeline; transformer and VAE are only named, as nothing may read them."""
    torch.manual_seed(0)  # the libraries' initialisation takes its draws from the global generator
    clip, t5 = ("transformers", "CLIPTextModel"), ("transformers", "T5EncoderModel")
    names = {
        "FluxPipeline": {"text_encoder": clip, "text_encoder_2": t5},
        "StableDiffusion3Pipeline": {
            "text_encoder": ("transformers", "CLIPTextModelWithProjection"),
            "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
            "text_encoder_3": t5,
        },
        "PixArtAlphaPipeline": {"text_encoder": t5},
    }[kind]
    index: dict[str, object] = {"_class_name": kind, "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}
    for part, (library, model) in names.items():
        suffix = part.removeprefix("text_encoder")
        if model == "T5EncoderModel":
            save_t5(folder, suffix)
        else:
            save_text_encoder(folder, suffix, projection=model.endswith("Projection"))
        tokenizer = "PreTrainedTokenizerFast" if model == "T5EncoderModel" else "CLIPTokenizer"
        index |= {part: [library, model], f"tokenizer{suffix}": ["transformers", tokenizer]}
    index |= {"transformer": ["diffusers", "FluxTransformer2DModel"], "vae": ["diffusers", "AutoencoderKL"]}
    if kind == "PixArtAlphaPipeline":
        index["scheduler"] = ["diffusers", "DPMSolverMultistepScheduler"]
    (folder / "scheduler").mkdir()
    (folder / "scheduler/scheduler_config.json").write_text("{}")
    (folder / "model_index.json").write_text(json.dumps(index))
    return PipelineText(str(folder), kind, device=CPU, dtype=torch.float32)


def test_flux_gets_t5_tokens_and_the_pooled_clip(tmp_path: Path) -> None:
    text = save_pipeline(tmp_path, "FluxPipeline")
    found = text.encode(["a cat", "a dog"])
    for embedding in found.values():
        assert embedding.context.shape[::2] == (1, T5_WIDTH)
        assert embedding.pooled is not None
        assert embedding.pooled.shape == (1, CLIP_WIDTH)
        assert embedding.mask is None
    assert not torch.equal(found["a cat"].context, found["a dog"].context)
    assert not torch.equal(found["a cat"].pooled, found["a dog"].pooled)  # type: ignore[arg-type]  # both are there
    (alone,) = text.encode(["a dog"]).values()  # whatever else is encoded with it
    assert torch.equal(alone.context, found["a dog"].context)


def test_sd3_gets_both_clips_padded_before_t5(tmp_path: Path) -> None:
    (embedding,) = save_pipeline(tmp_path, "StableDiffusion3Pipeline").encode(["a cat"]).values()
    assert embedding.context.shape == (1, TOKENS + 256, T5_WIDTH)
    clip = embedding.context[0, :TOKENS]
    assert clip[:, : 2 * CLIP_WIDTH].abs().amax(1).min() > 0
    assert not clip[:, 2 * CLIP_WIDTH :].any()  # two CLIPs side by side, then zeros up to T5's width
    assert embedding.context[0, TOKENS:, 2 * CLIP_WIDTH :].any()
    assert embedding.pooled is not None
    assert embedding.pooled.shape == (1, 2 * CLIP_WIDTH)


@pytest.mark.parametrize("index_says", ["T5", "null", "nothing"])
def test_sd3_works_without_its_t5(index_says: str, tmp_path: Path) -> None:
    text = save_pipeline(tmp_path, "StableDiffusion3Pipeline")
    (whole,) = text.encode(["a cat"]).values()
    for part in ("text_encoder_3", "tokenizer_3"):
        shutil.rmtree(tmp_path / part)
        index = json.loads((tmp_path / "model_index.json").read_text())
        entries = {
            "T5": {part: index.pop(part)},
            "null": {part: [None, None]},
            "nothing": {},
        }  # as people's folders say it
        (tmp_path / "model_index.json").write_text(json.dumps(index | entries[index_says]))
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps({"joint_attention_dim": T5_WIDTH}))
    text = PipelineText(str(tmp_path), "StableDiffusion3Pipeline", device=CPU, dtype=torch.float32)
    adapted: list[str] = []
    text.adapters.append(lambda part, encoder: adapted.append(part))
    (embedding,) = text.encode(["a cat"]).values()
    assert adapted == ["text_encoder", "text_encoder_2"]  # a LoRA reaches those that are left
    assert torch.equal(embedding.context[:, :TOKENS], whole.context[:, :TOKENS])
    assert not embedding.context[:, TOKENS:].any()
    assert embedding.context.shape == whole.context.shape
    assert torch.equal(embedding.pooled, whole.pooled)  # type: ignore[arg-type]  # both are there
    shutil.rmtree(tmp_path / "text_encoder_2")
    with pytest.raises(BackboneError, match="text_encoder_2/ is missing"):
        PipelineText(str(tmp_path), "StableDiffusion3Pipeline", device=CPU, dtype=torch.float32).encode(["a cat"])


def test_pixart_gets_a_mask_of_the_tokens_that_count(tmp_path: Path) -> None:
    found = save_pipeline(tmp_path, "PixArtAlphaPipeline").encode(["a cat", ""])
    cat, none = found["a cat"], found[""]
    assert cat.pooled is None
    assert cat.mask is not None
    assert none.mask is not None
    assert cat.context.shape == (1, cat.mask.shape[1], T5_WIDTH)
    assert int(cat.mask.sum()) == len("a cat") + 1  # and the end of the sentence
    assert int(none.mask.sum()) < int(cat.mask.sum())


def test_a_pipeline_that_is_not_known_is_named(tmp_path: Path) -> None:
    save_pipeline(tmp_path, "FluxPipeline")
    text = PipelineText(str(tmp_path), "FluxPipeline", device=CPU, dtype=torch.float32)
    text.pipeline = "KandinskyPipeline"
    with pytest.raises(BackboneError, match="how a KandinskyPipeline encodes prompts is not known here"):
        text._embedding(None, "a cat")
