"""Training a head for depth, normals or segmentation: from a base model and data sets to the head's folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffrep.backbones.pipelines import PipelineParts, load_parts
from diffrep.files import claim_folder, read_weights, replace_folder, save_weights
from diffrep.heads.diffdis import MaskDecoder, from_base
from diffrep.heads.families import LOTUS_D, Family, Task
from diffrep.heads.head_folders import write_head
from diffrep.heads.one_step import LatentCodec, Schedule
from diffrep.heads.segmentation import DiffDis
from diffrep.heads.training.dense import (
    OneStepModel,
    adapt_unet,
    decoded_losses,
    encode_rows,
    latent_losses,
    latent_mask,
)
from diffrep.heads.training.dense_data import SampleSet, cache_latents, latent_batches, sample_batches
from diffrep.heads.training.masks import (
    PUBLISHED_FASTER,
    MaskedImage,
    SegmentationModel,
    cache_scenes,
    drawn_losses,
    image_batches,
    image_latents,
    scene_batches,
    scene_maps,
    segmentation_losses,
)
from diffrep.scenes import SceneSet
from diffrep.settings import NOT_NEGATIVE, check
from diffrep.training.loop import Batch, FitSettings, Loss, fit, step_generator


def _starting_point(parts: PipelineParts, *modules: nn.Module | None) -> Tensor:
    """Make networks ready to be trained here, in place; the embedding of the empty prompt."""
    if parts.text is None:
        raise ValueError(f"{parts.source}: has no text encoder, which the empty prompt needs")
    if not torch.cuda.is_available():
        from diffusers.models.attention_processor import AttnProcessor

        unet: Any = modules[0]
        unet.set_attn_processor(AttnProcessor())  # faster on a CPU than its flash attention, and equal
        for module in filter(None, modules):
            module.to(memory_format=torch.channels_last)
    return parts.text.encode([""])[""].context


def _made_with(base: str, parts: PipelineParts) -> str:
    """Text that changes with the weights of the VAE's encoder, for caches of latents."""
    total = sum(float(p.detach().double().abs().sum()) for p in parts.vae.encoder.parameters())
    return f"{base} ({total:.6g})"


# -- depth and normals --------------------------------------------------------------------------------------

EMBEDDED_RECIPE = replace(LOTUS_D, posterior="mean")
EMBEDDED_FIT = FitSettings(
    steps=20000, minutes=12, learning_rate=1e-3, warmup=50, weight_decay=0.02, ema_decay=0.998, seed=11
)
PUBLISHED_BATCH: Mapping[str, int] = {"lotus-d": 16, "lotus-g": 16, "e2e-ft": 2, "marigold": 2}


def embedded(task: Task) -> tuple[Family, FitSettings]:
    """The settings that made the heads in the package."""
    if task != "normals":
        return EMBEDDED_RECIPE, EMBEDDED_FIT
    # half of the work would go to the detail preserver, which brings nothing here: `diffrep eval depth-ablation`
    return replace(EMBEDDED_RECIPE, preserve=0.0), replace(EMBEDDED_FIT, minutes=24)


def published_fit(recipe: str, task: Task) -> FitSettings:
    """The settings of the papers' scripts, but bfloat16 where they take half precision."""
    plain = FitSettings(
        steps=20000, learning_rate=3e-5, warmup=0, schedule="constant", weight_decay=1e-2, decay="all",
        betas=(0.9, 0.999), ema_decay=0.0, seed=42,
    )  # fmt: skip
    if recipe.startswith("lotus"):  # 16 images on each of 8 devices
        return plain
    falling = replace(plain, schedule="exponential", warmup=100, final_rate=0.01, bf16=False, accumulate=16)
    if recipe == "e2e-ft":
        return falling
    rate = 6e-5 if task == "normals" else 3e-5
    return replace(falling, steps=25000, learning_rate=rate, weight_decay=0.0, clip=float("inf"))


@dataclass(frozen=True, kw_only=True)
class OneStepTraining:
    """One head: what it predicts, from which base, and how it is trained."""

    task: Task = "disparity"
    base: str = "tiny"  # embedded model, diffusers folder or hub id
    recipe: Family = field(default_factory=lambda: EMBEDDED_RECIPE)
    fit: FitSettings = field(default_factory=lambda: EMBEDDED_FIT)
    batch_size: int = 16  # images of a batch; the detail preserver's rows come on top
    scratch: bool = False  # start from random weights instead of the base's U-Net
    cache: bool = False  # encode every image once and train on the latents' means
    gradient_checkpointing: bool = False  # less memory, more time

    def __post_init__(self) -> None:
        check(self, batch_size="1..")


def build_model(training: OneStepTraining, parts: PipelineParts) -> OneStepModel:
    """The model to train, from the base's U-Net or from random weights.

    Raises:
        ValueError: the base has no text encoder for the empty prompt, or channels that do not fit the recipe.
    """
    from diffusers import UNet2DConditionModel

    unet: Any = parts.unet
    if training.scratch:
        with torch.random.fork_rng():
            torch.manual_seed(training.fit.seed)  # diffusers draws initial weights from the global generator
            unet = UNet2DConditionModel.from_config(unet.config)
    unet = adapt_unet(unet, training.recipe, seed=training.fit.seed)
    if training.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    return OneStepModel(unet, _starting_point(parts, unet), parts.alphas_cumprod, training.recipe)


def train_one_step(
    training: OneStepTraining,
    sets: Sequence[SampleSet],
    shares: Sequence[float],
    folder: Path,
    *,
    latents: Path | None = None,
    **options: Any,
) -> OneStepModel:
    """Train a head. Called again with the same folder, it goes on where it was.

    Args:
        sets, shares: data sets, and how often a batch comes from each.
        folder: of checkpoint and log.
        latents: folder of cached latents, which heads of one base can share; `folder` where None.
        options: `validate`, `validate_every` and `progress` of `diffrep.training.loop.fit`.

    Returns:
        The moving average of the weights (the weights themselves where its decay is 0), in eval mode.

    Raises:
        ValueError: settings that do not go together, or a folder of another run.
    """
    settings = asdict(training)
    del settings["fit"]  # `fit` checks its own
    claim_folder(folder, settings, name="training.json")
    parts = load_parts(training.base, pad=training.recipe.padded_context)
    model = build_model(training, parts)
    vae, recipe, codec = parts.vae, training.recipe, LatentCodec(parts.vae)
    loss: Loss[Any] = latent_losses
    if training.cache:
        if len(sets) != 1:
            raise ValueError(f"latents are cached of one data set, not of {len(sets)}")
        vae.to(memory_format=torch.channels_last)
        made_with, progress = _made_with(training.base, parts), options.get("progress", True)
        cached = cache_latents(vae, sets[0], training.task, latents or folder, made_with=made_with, progress=progress)
        batches = latent_batches(cached, recipe, batch_size=training.batch_size)
    else:
        size, channels, stride = training.batch_size, codec.channels, codec.stride
        batches = sample_batches(sets, shares, recipe, batch_size=size, latent_channels=channels, stride=stride)
        loss = _encoding(vae, training, stride)
    return fit(model, batches, loss, training.fit, folder, **options)


def _encoding(vae: Any, training: OneStepTraining, stride: int) -> Loss[Any]:
    """The recipe's loss on batches of images, which are encoded first."""
    decoded = decoded_losses(vae, training.task) if training.recipe.loss == "decoded" else None

    def loss(module: nn.Module, ema: OneStepModel, batch: Batch) -> Mapping[str, Tensor]:
        vae.to(batch["pixels"].device)
        encoded = {**batch, **encode_rows(vae, batch["pixels"], batch["annotation"], batch)}
        if decoded is not None:
            return decoded(module, ema, {**encoded, "valid": batch["measured"]})
        return latent_losses(module, ema, {**encoded, "mask": latent_mask(batch["valid"], stride)})

    return loss


def write_dense_head(
    folder: Path, model: OneStepModel, training: OneStepTraining, family: str, working_size: int
) -> None:
    """Write a trained head, all of it or nothing; what was in the folder is replaced.

    Args:
        family: what `load_head` will treat it as.
        working_size: long side of the images that it was trained on, pixels.
    """
    about: Any = {"base": training.base, "family": family, "task": training.task, "working_size": working_size}
    frame = {"frame": "lub"} if training.task == "normals" else {}  # of all that we train on
    about["extra"] = {**frame, "training": json.loads(json.dumps(asdict(training), default=str))}
    replace_folder(folder, lambda partial: write_head(partial, model.unet, context=model.context, **about))


# -- segmentation -------------------------------------------------------------------------------------------

EMBEDDED_MASK_FIT = FitSettings(steps=20000, minutes=22, learning_rate=1e-3, warmup=50, ema_decay=0.998, seed=21)
EMBEDDED_SCENES = 10000
SHARPENING = FitSettings(steps=20000, learning_rate=2e-3, warmup=20, ema_decay=0.995, seed=22)
SHARPENING_BATCH = 16

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
    decoder: bool = True  # train a decoder for masks; False draws with the VAE's, as published
    fit: FitSettings = field(default_factory=lambda: EMBEDDED_MASK_FIT)
    batch_size: int = 16  # images
    size: int = 128  # pixels a side
    scenes: int = EMBEDDED_SCENES  # of a set of scenes, how many are encoded and trained on
    sharpen: float = 0.0  # minutes for the decoder alone behind that, on what the U-Net predicts for scenes

    def __post_init__(self) -> None:
        check(self, batch_size="1..", scenes="1..", size="8..", sharpen=NOT_NEGATIVE)


def build_segmentation_model(training: SegmentationTraining, parts: PipelineParts) -> SegmentationModel:
    """The model to train, started from the base's U-Net.

    Raises:
        ValueError: the base has no text encoder for the empty prompt, or a U-Net that takes more than latents.
    """
    codec, unet = LatentCodec(parts.vae), from_base(parts.unet, seed=training.fit.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.fit.seed)  # torch draws initial weights from the global generator
        decoder = MaskDecoder(codec.channels, stride=codec.stride) if training.decoder else None
    context = _starting_point(parts, unet, decoder)
    return SegmentationModel(unet, context, Schedule.from_config(parts.scheduler), decoder)


def head_of(model: SegmentationModel, vae: Any, training: SegmentationTraining) -> DiffDis:
    """The head that a trained model is; they share their weights."""
    unet: Any = model.unet
    return DiffDis(unet, vae, model.context, model.schedule, working_size=training.size, decoder=model.decoder)


def train_segmentation(
    training: SegmentationTraining,
    data: SceneSet | list[MaskedImage],
    folder: Path,
    *,
    latents: Path | None = None,
    **options: Any,
) -> SegmentationModel:
    """Train a head. Called again with the same folder, it goes on where it was.

    Args:
        data: rendered scenes, whose latents are encoded once, or images that are augmented and encoded each time.
        folder: of checkpoint and log.
        latents: file of cached latents, which heads of one base share; in `folder` where None.
        options: `validate`, `validate_every` and `progress` of `diffrep.training.loop.fit`.

    Returns:
        The moving average of the weights, in eval mode.

    Raises:
        ValueError: settings that do not go together, or a folder of another run.
    """
    parts = load_parts(training.base, pad=False)
    model = build_segmentation_model(training, parts)
    codec = LatentCodec(parts.vae.eval().to(memory_format=torch.channels_last))
    levels: Any = model.unet.levels  # an int, which torch's modules cannot say
    shape: dict[str, Any] = {"batch_size": training.batch_size, "edges": training.edges}
    if isinstance(data, SceneSet):
        cached = cache_scenes(
            codec.encode, data, min(training.scenes, len(data)), levels, latents or folder / "latents.safetensors",
            made_with=_made_with(training.base, parts), progress=options.get("progress", True),
        )  # fmt: skip
        batches = scene_batches(data, cached, pixels=training.decoder, **shape)
    else:
        codec.to("cuda" if torch.cuda.is_available() else "cpu")
        batches = image_batches(
            data, codec.encode, size=training.size, levels=levels, decoder=training.decoder, **shape
        )
    trained = fit(model, batches, segmentation_losses, training.fit, folder, **options)
    if training.sharpen and isinstance(data, SceneSet):
        sharpen_decoder(trained, data, cached, training, folder, progress=options.get("progress", True))
    return trained


@torch.no_grad()
def predicted_latents(
    model: SegmentationModel, cached: Mapping[str, Tensor], training: SegmentationTraining, count: int
) -> Tensor:
    """What the U-Net predicts for the first `count` scenes, (count or 2 count, c, h, w): masks, then edges."""
    kinds: tuple[list[Tensor], ...] = ([], []) if training.edges else ([],)
    for start in range(0, count, 32):
        rows = [part[start : min(start + 32, count)].float() for part in image_latents(cached)]
        shape = (len(rows[0]) * len(kinds), *rows[0].shape[1:])
        noise = torch.randn(shape, generator=step_generator(SHARPENING.seed, start))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            _, clean = model.predict(rows, noise)
        for kind, part in zip(kinds, clean.split(len(rows[0])), strict=True):
            kind.append(part)
    return torch.cat([part for kind in kinds for part in kind])


def sharpen_decoder(
    model: SegmentationModel,
    data: SceneSet,
    cached: Mapping[str, Tensor],
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
    latents = read_weights(file)[0]["latents"]

    def batches(generator: torch.Generator) -> Batch:
        rows = torch.randint(count, (SHARPENING_BATCH,), generator=generator)
        images, masks, edges = scene_maps(data, rows.numpy())
        edged = torch.rand(SHARPENING_BATCH, generator=generator) < (0.25 if training.edges else 0.0)
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
