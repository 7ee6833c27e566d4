"""Training a segmentation head: from a base model and masks to a DiffDIS U-Net, and a decoder where one is wanted."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from diffrep.backbones.pipelines import PipelineParts, load_parts
from diffrep.files import save_weights
from diffrep.heads.diffdis import DiffDisUNet, from_base
from diffrep.heads.loading import write_head
from diffrep.heads.mask_decoder import MaskDecoder
from diffrep.heads.one_step import LatentCodec, Schedule
from diffrep.heads.segmentation import DiffDis
from diffrep.heads.training.dense_fit import parts_fingerprint
from diffrep.heads.training.masks import (
    PUBLISHED_FASTER,
    TIMESTEP,
    SegmentationModel,
    drawn_losses,
    segmentation_losses,
)
from diffrep.heads.training.masks_data import (
    MaskedImage,
    cache_scenes,
    image_batches,
    scene_batches,
    scene_maps,
)
from diffrep.scenes import SceneSet
from diffrep.training.loop import Batch, FitSettings, fit, step_generator

EMBEDDED_FIT = FitSettings(steps=20000, minutes=22, learning_rate=1e-3, warmup=50, ema_decay=0.998, seed=21)
EMBEDDED_SCENES = 10000
SHARPENING = FitSettings(steps=20000, learning_rate=2e-3, warmup=20, ema_decay=0.995, seed=22)

PUBLISHED_EPOCHS = 100
PUBLISHED_MASK_BATCH = 4


def published_mask_fit(
    images: int, *, batch_size: int = PUBLISHED_MASK_BATCH, epochs: int = PUBLISHED_EPOCHS
) -> FitSettings:
    """The settings of the authors' script for that many training images: Adam without decay, in float32."""
    return FitSettings(
        steps=max(1, images // batch_size) * epochs, learning_rate=3e-5, faster=PUBLISHED_FASTER, warmup=0,
        schedule="diffdis", epochs=epochs, weight_decay=0.0, betas=(0.9, 0.999), clip=float("inf"), ema_decay=0.0,
        bf16=False,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SegmentationTraining:
    """One segmentation head: from which base, and how it is trained."""

    base: str = "tiny"  # embedded model, diffusers folder or hub id
    edges: bool = True  # train the edges too: the published task; False for a comparison
    decoder: bool = True  # train a decoder of its own; False draws with the VAE's, as published
    fit: FitSettings = field(default_factory=lambda: EMBEDDED_FIT)
    batch_size: int = 16  # images
    size: int = 128  # pixels a side
    scenes: int = EMBEDDED_SCENES  # of a set of scenes, how many are encoded and trained on
    sharpen: float = 0.0  # minutes for the decoder alone behind that, on what the U-Net predicts for scenes

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.scenes < 1:
            raise ValueError(f"batch_size and scenes must be at least 1, got {self.batch_size} and {self.scenes}")
        if self.size < 8 or not 0 <= self.sharpen < math.inf:
            raise ValueError(f"size must be at least 8 and sharpen finite, got {self.size} and {self.sharpen}")


def build_segmentation_model(training: SegmentationTraining, parts: PipelineParts) -> SegmentationModel:
    """The model to train, started from the base's U-Net.

    Raises:
        ValueError: the base has no text encoder for the empty prompt, or a U-Net that takes more than latents.
    """
    if parts.text is None:
        raise ValueError(f"{parts.source}: has no text encoder, which the empty prompt needs")
    unet = from_base(parts.unet, seed=training.fit.seed)
    decoder = None
    if training.decoder:
        codec = LatentCodec(parts.vae)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(training.fit.seed)
            decoder = MaskDecoder(codec.channels, stride=codec.stride)
    if not torch.cuda.is_available():
        from diffusers.models.attention_processor import AttnProcessor

        unet.set_attn_processor(AttnProcessor())  # faster on a CPU than its flash attention, and equal
        for module in (unet, decoder):
            if module is not None:
                module.to(memory_format=torch.channels_last)
    context = parts.text.encode([""])[""].context
    return SegmentationModel(unet, context, Schedule.from_config(parts.scheduler), decoder)


def head_of(model: SegmentationModel, vae: Any, training: SegmentationTraining) -> DiffDis:
    """The head that a trained model is; they share their weights."""
    unet = model.unet
    assert isinstance(unet, DiffDisUNet)
    assert isinstance(model.schedule, Schedule)
    return DiffDis(unet, vae, model.context, model.schedule, working_size=training.size, decoder=model.decoder)


def train_segmentation(
    training: SegmentationTraining,
    data: SceneSet | list[MaskedImage],
    folder: Path,
    *,
    latents: Path | None = None,
    validate: Callable[[nn.Module, int], Mapping[str, float]] | None = None,
    validate_every: int = 500,
    progress: bool = True,
) -> SegmentationModel:
    """Train a head. Called again with the same folder, it goes on where it was.

    Args:
        data: rendered scenes, whose latents are encoded once, or images that are augmented and encoded each time.
        folder: of checkpoint and log.
        latents: file of cached latents, which heads of one base share; in `folder` where None.
        validate: given the moving average of the `SegmentationModel` and the step.

    Returns:
        The moving average of the weights, in eval mode.

    Raises:
        ValueError: settings that do not go together, or a folder of another run.
    """
    parts = load_parts(training.base, pad=False)
    model = build_segmentation_model(training, parts)
    vae = parts.vae.eval().to(memory_format=torch.channels_last)
    codec = LatentCodec(vae)
    levels: Any = model.unet.levels  # an int, which torch's modules cannot say
    if isinstance(data, SceneSet):
        cached = cache_scenes(
            codec.encode, data, min(training.scenes, len(data)), levels, latents or folder / "latents.safetensors",
            made_with=f"{training.base} ({parts_fingerprint(parts)})", progress=progress,
        )  # fmt: skip
        batches = scene_batches(
            data, cached, batch_size=training.batch_size, edges=training.edges, pixels=training.decoder
        )
    else:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        vae.to(device)
        batches = image_batches(
            data, codec.encode, size=training.size, batch_size=training.batch_size, levels=levels,
            edges=training.edges, decoder=training.decoder,
        )  # fmt: skip
    trained = fit(
        model, batches, segmentation_losses, training.fit, folder,
        validate=validate, validate_every=validate_every, progress=progress,
    )  # fmt: skip
    if training.sharpen and isinstance(data, SceneSet):
        sharpen_decoder(trained, data, cached, training, folder, progress=progress)
    return trained


@torch.no_grad()
def predicted_latents(
    model: SegmentationModel, cached: Mapping[str, torch.Tensor], training: SegmentationTraining, count: int
) -> torch.Tensor:
    """What the U-Net predicts for the first `count` scenes, (count or 2 count, c, h, w): masks, then edges."""
    parts: list[torch.Tensor] = []
    latents = [cached[f"image {level}"] for level in range(len([n for n in cached if n.startswith("image ")]))]
    for start in range(0, count, 32):
        rows = [part[start : min(start + 32, count)].float() for part in latents]
        shape = (len(rows[0]) * (2 if training.edges else 1), *rows[0].shape[1:])
        noise = torch.randn(shape, generator=step_generator(SHARPENING.seed, start))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model.unet(rows, noise, model.context, timestep=TIMESTEP, edges=training.edges)
        parts.append(model.schedule.clean(output.float(), noise, TIMESTEP))
    halves = [part.chunk(2) if training.edges else (part,) for part in parts]
    return torch.cat([half[kind] for kind in range(len(halves[0])) for half in halves])


def sharpen_decoder(
    model: SegmentationModel,
    data: SceneSet,
    cached: Mapping[str, torch.Tensor],
    training: SegmentationTraining,
    folder: Path,
    *,
    count: int = 4000,
    progress: bool = True,
) -> None:
    """Train the decoder on, alone, on latents that the finished U-Net predicts; in place."""
    assert model.decoder is not None
    file, count = folder / "predicted.safetensors", min(count, len(cached["mask"]))
    if not file.exists():
        save_weights(file, {"latents": predicted_latents(model, cached, training, count).half()})
    latents = load_file(file)["latents"]

    def batches(generator: torch.Generator) -> Batch:
        rows = torch.randint(count, (16,), generator=generator)
        images, masks, edges = scene_maps(data, rows.numpy())
        edged = torch.rand(16, generator=generator) < (0.25 if training.edges else 0.0)
        return {
            "latents": latents[rows + edged * count].float(),
            "pixels": images.to(memory_format=torch.channels_last),
            "maps": torch.where(edged[:, None, None, None], edges, masks),
        }

    decoder = model.decoder.requires_grad_(True)
    settings = replace(SHARPENING, minutes=training.sharpen)
    sharper = fit(decoder, batches, drawn_losses, settings, folder / "decoder", progress=progress)
    model.decoder.load_state_dict(sharper.state_dict())
    model.eval()


def write_segmentation_head(
    folder: Path, model: SegmentationModel, training: SegmentationTraining, **about: object
) -> None:
    """Write a head as a folder that holds only what is new: U-Net, decoder, the prompt's embedding, ``head.json``."""
    write_head(
        folder, model.unet, base=training.base, family="diffdis", task="segmentation", context=model.context,
        working_size=training.size, extra={"edges": training.edges, **about},
    )  # fmt: skip
    if isinstance(model.decoder, MaskDecoder):
        model.decoder.save(folder)
