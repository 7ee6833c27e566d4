"""The latent diffusion model: U-Net and text encoder by the diffusion loss, then jointly with dense labels.

The U-Net predicts v = sqrt(abar) noise - sqrt(1 - abar) latent. In the joint phase most images of a batch get
little noise, and the features of two places in its decoder are also trained by the labels; it goes on denoising.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from diffrep.backbones.repositories import MODELS
from diffrep.devices import initial_weights
from diffrep.files import read_weights, save_weights
from diffrep.scenes import SceneSet
from diffrep.settings import check
from diffrep.training.loop import Batch, FitSettings, step_generator
from diffrep.training.tiny.crops import (
    Crops,
    LabelSettings,
    dense_losses,
    draw_groups,
    draw_queries,
    fit_stages,
    gather,
    part_classifier,
)

TIMESTEPS = 1000
# CLIP's bytes, and one token for each word of the captions, whose merges build it from its left end
TOKENIZER = MODELS / "tiny" / "tokenizer"
LABEL_FREE = FitSettings(steps=30000, minutes=11, learning_rate=1.2e-3, seed=4)
JOINT = FitSettings(steps=60000, minutes=95, learning_rate=1e-3, seed=5)


@dataclass(frozen=True, kw_only=True)
class UNetSettings:
    """The U-Net, its text encoder and their training."""

    channels: tuple[int, ...] = (96, 80, 64)  # per level; each but the last halves the resolution
    attention: tuple[bool, ...] = (False, True, True)  # levels with self- and cross-attention
    heads: int = 4
    groups: int = 16  # of the group norms
    text_width: int = 64
    text_layers: int = 2
    null: float = 0.17  # share of images trained without their caption
    copies: int = 1  # encoded versions of each scene, each another crop, half of them mirrored
    sides: tuple[float, float] = (0.8, 1.0)  # of these crops, shares of the image's side
    taps: tuple[str, ...] = ("up_blocks.1", "up_blocks.2.resnets.0")  # modules whose output the labels train
    noisy: float = 0.25  # share of a joint batch that gets any amount of noise, and no dense loss
    dense_timestep: int = 300  # the others get less noise than at this timestep
    labels: LabelSettings = field(default_factory=lambda: LabelSettings(weight=0.25))
    batch_size: int = 32
    label_free: FitSettings = LABEL_FREE
    joint: FitSettings = JOINT

    def __post_init__(self) -> None:
        check(self)


def build_unet(settings: UNetSettings, latent_channels: int, latent_size: int) -> Any:
    """A stock `UNet2DConditionModel` with random weights."""
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import AttnProcessor

    down = tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in settings.attention)
    up = tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(settings.attention))
    unet: Any = UNet2DConditionModel(
        sample_size=latent_size,
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=settings.channels,
        layers_per_block=1,
        down_block_types=down,
        up_block_types=up,
        cross_attention_dim=settings.text_width,
        attention_head_dim=settings.heads,  # diffusers means the number of heads
        norm_num_groups=settings.groups,
    )
    unet.set_attn_processor(AttnProcessor())  # the plain product is faster than CPU flash attention, and equal
    return unet


def caption_tokenizer() -> Any:
    """The tokenizer of the embedded model, in which every word of a caption is one token."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(TOKENIZER)


def build_text_encoder(settings: UNetSettings, tokenizer: Any) -> Any:
    """A small stock `CLIPTextModel` with random weights."""
    from transformers import CLIPTextConfig, CLIPTextModel

    vocabulary = len(tokenizer)
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=settings.text_width,
            intermediate_size=4 * settings.text_width,
            projection_dim=settings.text_width,
            num_hidden_layers=settings.text_layers,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=vocabulary - 2,
            eos_token_id=vocabulary - 1,
            pad_token_id=vocabulary - 1,
        )
    )


def build_scheduler() -> Any:
    """The schedule: cosine, v-prediction, DDIM sampling from the last timestep on."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        num_train_timesteps=TIMESTEPS,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=0,
        timestep_spacing="trailing",
    )


@torch.no_grad()
def encode_scenes(
    vae: Any, scenes: SceneSet, settings: UNetSettings, *, seed: int, progress: bool = True
) -> dict[str, Tensor]:
    """Encode every one of N scenes V = `copies` times, as different crops and mirrors.

    Returns:
        "latents" (N, V, c, h, w) float16, scaled to unit variance, and the labels of their cells: "part" (N, V, h, w)
        uint8, "canonical" (N, V, h, w, 3) int8, round(127 * value).
    """
    side, latents, parts, canonicals = scenes.image.shape[1], [], [], []
    cells = side // 2 ** (len(vae.config.block_out_channels) - 1)
    for start in tqdm(range(0, len(scenes), 64), desc="encoding", unit="batch", disable=not progress):
        indices = torch.arange(start, min(start + 64, len(scenes)))
        generator = step_generator(seed, start)
        images, part, canonical = (gather(scenes, name, indices) for name in ("image", "part", "canonical"))
        versions = []
        for _ in range(settings.copies):
            crops = Crops.draw(len(indices), side, side, generator, sides=settings.sides)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                mean = vae.encode(crops.images(images) * 2 - 1).latent_dist.mean
            versions.append((mean.float() * vae.config.scaling_factor, *crops.labels(part, canonical, cells)))
        latents.append(torch.stack([v[0] for v in versions], 1).half())
        parts.append(torch.stack([v[1] for v in versions], 1).to(torch.uint8))
        canonicals.append(torch.stack([v[2] for v in versions], 1).mul(127).round().to(torch.int8))
    return {"latents": torch.cat(latents), "part": torch.cat(parts), "canonical": torch.cat(canonicals)}


def tokenize(tokenizer: Any, captions: Sequence[str]) -> Tensor:
    """(N, length) token ids, padded.

    Raises:
        ValueError: a caption has more tokens than fit.
    """
    ids = tokenizer(list(captions), padding="max_length", max_length=tokenizer.model_max_length).input_ids
    longest = max(map(len, ids))
    if longest > tokenizer.model_max_length:
        raise ValueError(f"a caption has {longest} tokens; at most {tokenizer.model_max_length} fit")
    return torch.tensor(ids)


class CaptionedDenoiser(nn.Module):
    """U-Net and text encoder, with the heads that only training needs."""

    def __init__(self, unet: Any, text_encoder: Any, settings: UNetSettings) -> None:
        super().__init__()
        self.unet, self.text_encoder, self.settings = unet, text_encoder, settings
        self.alphas_cumprod: Tensor
        self.register_buffer("alphas_cumprod", build_scheduler().alphas_cumprod.float())
        width = {"up_blocks.1": settings.channels[-2], "up_blocks.2.resnets.0": settings.channels[0]}
        self.classify = nn.ModuleList(part_classifier(width[tap]) for tap in settings.taps)

    def forward(self, noisy: Tensor, timesteps: Tensor, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Predicted v, (B, c, h, w), and the tapped maps."""
        maps: dict[nn.Module, Tensor] = {}
        modules = [self.unet.get_submodule(tap) for tap in self.settings.taps]
        handles = [m.register_forward_hook(lambda module, inputs, out: maps.update({module: out})) for m in modules]
        v = self.unet(noisy, timesteps, encoder_hidden_states=self.text_encoder(tokens)[0]).sample
        for handle in handles:
            handle.remove()
        return v, [maps[module] for module in modules]


def latent_batch(data: Mapping[str, Tensor], settings: UNetSettings, labels: bool, generator: torch.Generator) -> Batch:
    """Noisy latents, timesteps and captions; in the joint phase groups of one category with their labels.

    Args:
        data: of `encode_scenes`, with "tokens" (N, length) of the captions, "null" (length,) of the empty one, and
            "category" (N,).
    """
    members, count = settings.labels.members, settings.batch_size
    if labels:
        rows = draw_groups(data["category"].numpy(), count // members, members, generator)
    else:
        rows = torch.randint(len(data["latents"]), (count,), generator=generator)
    version = torch.randint(data["latents"].shape[1], (count,), generator=generator)
    latents = data["latents"][rows, version].float()
    timesteps = torch.randint(TIMESTEPS, (count,), generator=generator)
    null = torch.rand(count, generator=generator) < settings.null
    batch = {"latents": latents, "noise": torch.randn(latents.shape, generator=generator), "timesteps": timesteps}
    if labels:
        dense = count - int(count * settings.noisy) // members * members
        batch["timesteps"][:dense] = timesteps[:dense] * settings.dense_timestep // TIMESTEPS
        null[:dense] |= torch.rand(dense, generator=generator) < 0.5  # features are read without a caption
        batch["part"] = data["part"][rows, version][:dense].long()
        batch["canonical"] = data["canonical"][rows, version][:dense].float() / 127
        batch["queries"] = draw_queries(batch["part"], settings.labels, generator)
    return batch | {"tokens": torch.where(null[:, None], data["null"], data["tokens"][rows])}


def unet_loss(module: CaptionedDenoiser, ema: CaptionedDenoiser, batch: Batch) -> Mapping[str, Tensor]:
    """Losses of a `CaptionedDenoiser`; see `fit`."""
    settings = ema.settings
    latents, noise = batch["latents"], batch["noise"]
    alpha = ema.alphas_cumprod[batch["timesteps"]].view(-1, 1, 1, 1)
    noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
    target = alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
    noisy = noisy.to(memory_format=torch.channels_last)
    v, maps = module(noisy, batch["timesteps"], batch["tokens"])
    error = (v.float() - target).square().mean()
    losses = {"loss": error, "v": error}
    if "part" not in batch:
        return losses
    for tap, classify, features in zip(settings.taps, module.classify, maps, strict=True):
        terms = dense_losses(features[: len(batch["part"])], classify, batch, settings.labels)
        losses["loss"] = losses["loss"] + terms["dense"]
        losses |= {f"{name} {tap}": terms[name] for name in ("match", "parts", "place", "right")}
    return losses


def train_unet(
    vae: Any, scenes: SceneSet, settings: UNetSettings, folder: Path, *, progress: bool = True
) -> list[CaptionedDenoiser]:
    """Train label-free, then jointly with labels. Returns both models; it resumes from `folder`."""
    cache, tokenizer = folder / "latents.safetensors", caption_tokenizer()
    if not cache.exists():
        save_weights(cache, encode_scenes(vae, scenes, settings, seed=settings.label_free.seed, progress=progress))
    data = read_weights(cache)[0] | {
        "tokens": tokenize(tokenizer, scenes.captions),
        "null": tokenize(tokenizer, [""])[0],
        "category": torch.as_tensor(scenes.category),
    }
    with initial_weights(settings.label_free.seed):
        unet = build_unet(settings, data["latents"].shape[2], data["latents"].shape[-1])
        module = CaptionedDenoiser(unet, build_text_encoder(settings, tokenizer), settings)
    module.unet.to(memory_format=torch.channels_last)
    stages = {
        "unet-label-free": (settings.label_free, partial(latent_batch, data, settings, False)),
        "unet-joint": (settings.joint, partial(latent_batch, data, settings, True)),
    }
    return fit_stages(module, stages, unet_loss, folder, progress=progress)
