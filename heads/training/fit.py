"""Training a head for depth, normals or segmentation: from a base model and data sets to the head's folder."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from diffrep.backbones.layers import Attention
from diffrep.backbones.pipelines import PipelineParts, load_parts
from diffrep.devices import initial_weights, resolve_device
from diffrep.files import claim_folder, read_weights, replace_folder, save_weights
from diffrep.heads.decoder import DetailDecoder
from diffrep.heads.dense import DenseHead
from diffrep.heads.diffdis import from_base
from diffrep.heads.families import LOTUS_D, Family, Task
from diffrep.heads.head_folders import write_head
from diffrep.heads.loading import load_head
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
from diffrep.heads.training.dense_data import (
    SampleSet,
    SceneSamples,
    cache_latents,
    latent_batches,
    sample_batches,
)
from diffrep.heads.training.detail import detail_batches, detail_losses, load_scenes
from diffrep.heads.training.masks import (
    PUBLISHED_FASTER,
    MaskedImage,
    SegmentationModel,
    cache_scenes,
    drawn_losses,
    held_scenes,
    image_batches,
    image_latents,
    scene_batches,
    scene_maps,
    segmentation_losses,
)
from diffrep.scenes import SceneSet
from diffrep.settings import NOT_NEGATIVE, check
from diffrep.training.loop import Batch, FitSettings, Loss, fit, step_generator

ModelT = TypeVar("ModelT", bound=nn.Module)
DataT = TypeVar("DataT")
Feed = tuple[Callable[[torch.Generator], Batch], Loss[Any], Callable[[Any], object] | None]
"""What makes batches, their loss, and what is done with the trained model."""


@dataclass(frozen=True)
class TrainingInputs:
    """What a training is fed from: parts of the base, data, and where to work; see `train_head`."""

    parts: PipelineParts
    data: Any
    folder: Path
    latents: Path | None
    progress: bool
    device: torch.device


class HeadSettings(ABC, Generic[ModelT, DataT]):
    """From which base a head is trained, and how: what all kinds of heads share."""

    base: str
    fit: FitSettings
    batch_size: int
    padded_context: ClassVar[bool] = False  # the empty prompt is padded to the tokenizer's length

    @abstractmethod
    def build(self, parts: PipelineParts) -> ModelT:
        """The model to train, from the base's U-Net or from random weights.

        Raises:
            ValueError: the base has no text encoder for the empty prompt, or a U-Net that does not fit.
        """

    @abstractmethod
    def feed(self, model: ModelT, inputs: TrainingInputs) -> Feed:
        """What the training of a model is made of."""

    @abstractmethod
    def about(self) -> dict[str, Any]:
        """What a trained head's ``head.json`` says, as `write_head` takes it."""

    def written_vae(self, model: ModelT) -> Any:
        """The VAE, where it was trained too; None where it is the base's."""
        return None

    def write(self, folder: Path, model: ModelT, **about: Any) -> None:
        """Write a trained head, all of it or nothing; what was in the folder is replaced.

        Args:
            about: values of `write_head` that the settings do not know.
        """
        values = {"base": self.base, "context": model.context, **self.about(), **about}

        def fill(partial: Path) -> None:
            write_head(partial, model.unet, vae=self.written_vae(model), **values)
            if isinstance(model.decoder, DetailDecoder):
                model.decoder.save(partial)

        replace_folder(folder, fill)


def train_head(
    training: HeadSettings[ModelT, DataT],
    data: DataT,
    folder: Path,
    *,
    latents: Path | None = None,
    device: str | torch.device = "auto",
    **options: Any,
) -> ModelT:
    """Train a head. Called again with the same folder, it goes on where it was.

    Args:
        data: of `OneStepTraining` data sets and how often a batch comes from each; of `SegmentationTraining` rendered
            scenes, whose latents are encoded once, or images that are augmented and encoded each time.
        folder: of checkpoint and log.
        latents: where cached latents are, which heads of one base can share: of `OneStepTraining` a folder, of
            `SegmentationTraining` a file; in `folder` where None.
        device: where; a head with a decoder of its own for depth or normals keeps its scenes there.
        options: `validate`, `validate_every` and `progress` of `diffrep.training.loop.fit`.

    Returns:
        The moving average of the weights (the weights themselves where its decay is 0), in eval mode.

    Raises:
        ValueError: settings that do not go together, or a folder of another run.
    """
    settings: dict[str, Any] = asdict(training)  # type: ignore[call-overload]  # all kinds are dataclasses
    del settings["fit"]  # `fit` checks its own
    claim_folder(folder, settings, name="training.json")
    parts, place = load_parts(training.base, pad=training.padded_context), resolve_device(device)
    model = training.build(parts)
    inputs = TrainingInputs(parts, data, folder, latents, options.get("progress", True), place)
    batches, loss, finish = training.feed(model, inputs)
    trained = fit(model, batches, loss, training.fit, folder, device=place, **options)
    if finish is not None:
        finish(trained)
    return trained


def prepared(parts: PipelineParts, *modules: nn.Module | None) -> Tensor:
    """Make networks ready to be trained here, in place; the embedding of the empty prompt."""
    if parts.text is None:
        raise ValueError(f"{parts.source}: has no text encoder, which the empty prompt needs")
    if not torch.cuda.is_available():
        unet: Any = modules[0]
        for attention in (module for module in unet.modules() if isinstance(module, Attention)):
            attention.fused = False  # faster on a CPU than its flash attention, and equal
        if hasattr(unet, "set_attn_processor"):  # diffusers' way of saying so
            from diffusers.models.attention_processor import AttnProcessor

            unet.set_attn_processor(AttnProcessor())
    for module in filter(None, modules):
        module.to(memory_format=torch.channels_last)
    return parts.text.encode([""])[""].context


def _made_with(base: str, parts: PipelineParts) -> str:
    """Text that changes with the weights of the VAE's encoder, for caches of latents."""
    total = sum(float(p.detach().double().abs().sum()) for p in parts.vae.encoder.parameters())
    return f"{base} ({total:.6g})"


# half of the work would go to the detail preserver, which brings nothing here: `diffrep eval depth-ablation`
EMBEDDED_RECIPE = replace(LOTUS_D, posterior="mean", preserve=0.0)
EMBEDDED_FIT = FitSettings(steps=7000, learning_rate=1e-3, warmup=200, weight_decay=0.02, ema_decay=0.998, seed=11)
EMBEDDED_BATCH = 128
DETAIL_WIDTHS, DETAIL_BLOCKS = (128, 96, 64), 3  # of the decoder: as long on a CPU as the VAE's
PUBLISHED_BATCH: Mapping[str, int] = {"lotus-d": 16, "lotus-g": 16, "e2e-ft": 2, "marigold": 2}


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
class OneStepTraining(HeadSettings[OneStepModel, tuple[Sequence[SampleSet], Sequence[float]]]):
    """One head: what it predicts, from which base, and how it is trained."""

    task: Task = "disparity"
    base: str = "tiny"  # embedded model, diffusers folder or hub id
    recipe: Family = field(default_factory=lambda: EMBEDDED_RECIPE)
    fit: FitSettings = field(default_factory=lambda: EMBEDDED_FIT)
    batch_size: int = 16  # images of a batch; the detail preserver's rows come on top
    start: str = ""  # an embedded head or a folder of the same recipe: start from its U-Net, and a decoder like ours
    scratch: bool = False  # start from random weights instead of the base's U-Net
    cache: bool = False  # encode every image once and train on the latents' means
    decoder: bool = False  # train a decoder for the maps on scenes; False draws with the VAE's, as published
    gradient_checkpointing: bool = False  # less memory, more time

    def __post_init__(self) -> None:
        check(self, batch_size="1..")
        if self.decoder and (self.cache or self.recipe.loss != "latent" or self.recipe.preserve):
            raise ValueError(
                "a decoder of its own (decoder) is trained without cached latents (cache=False), beside the loss of"
                " latents, and without the detail preserver (preserve=0)"
            )

    @property
    def padded_context(self) -> bool:  # type: ignore[override]
        return self.recipe.padded_context

    def build(self, parts: PipelineParts) -> OneStepModel:
        from diffusers import UNet2DConditionModel

        unet: Any = parts.unet
        started = load_head(self.start, fold=False, device="cpu", dtype=torch.float32) if self.start else None
        if started is not None:
            if not isinstance(started, DenseHead) or started.task != self.task:
                raise ValueError(f"{self.start}: is a head for {started.task}, not for {self.task}")
            unet = started.model.network.unet.requires_grad_(True)
        elif self.scratch:
            with initial_weights(self.fit.seed):
                unet = UNet2DConditionModel.from_config(unet.config)
        unet = adapt_unet(unet, self.recipe, seed=self.fit.seed)
        if self.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        decoder = None
        if self.decoder:
            codec, outputs = LatentCodec(parts.vae), 3 if self.task == "normals" else 1
            shape: dict[str, Any] = {"widths": DETAIL_WIDTHS, "blocks": DETAIL_BLOCKS, "outputs": outputs}
            decoder = DetailDecoder.seeded(self.fit.seed, codec, **shape)
            known = None if started is None else started.model.decoder
            if known is not None and known.settings == decoder.settings:
                decoder = known.requires_grad_(True)
        context = prepared(parts, unet, decoder)
        return OneStepModel(unet, context, parts.alphas_cumprod, self.recipe, decoder)

    def feed(self, model: OneStepModel, inputs: TrainingInputs) -> Feed:
        (sets, shares), parts, device, size = inputs.data, inputs.parts, inputs.device, self.batch_size
        codec = LatentCodec(parts.vae)
        if self.decoder:
            if len(sets) != 1 or not isinstance(sets[0], SceneSamples):
                raise ValueError("a decoder of its own is trained on one set of rendered scenes (--data scenes)")
            scenes = load_scenes(sets[0].scenes, self.task, device)
            cells = tuple(side // codec.stride for side in scenes["depth"].shape[1:])
            batches = detail_batches(
                scenes, self.task, self.recipe, batch_size=size, latent_shape=(codec.channels, *cells)
            )
            vae = parts.vae.to(device, memory_format=torch.channels_last).requires_grad_(False)
            return batches, detail_losses(vae, self.task), None
        if not self.cache:
            channels, stride = codec.channels, codec.stride
            batches = sample_batches(
                sets, shares, self.recipe, batch_size=size, latent_channels=channels, stride=stride
            )
            return batches, _encoding(parts.vae, self, stride), None
        if len(sets) != 1:
            raise ValueError(f"latents are cached of one data set, not of {len(sets)}")
        vae, made_with = parts.vae.to(memory_format=torch.channels_last), _made_with(self.base, parts)
        place: Any = (vae, sets[0], self.task, inputs.latents or inputs.folder)
        cached = cache_latents(*place, made_with=made_with, progress=inputs.progress)
        return latent_batches(_moved(cached, device), self.recipe, batch_size=size), latent_losses, None

    def about(self) -> dict[str, Any]:
        frame = {"frame": "lub"} if self.task == "normals" else {}  # of all that we train on
        extra = {**frame, "training": json.loads(json.dumps(asdict(self), default=str))}
        return {"family": self.recipe.name, "task": self.task, "extra": extra}


def _moved(latents: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Cached latents on the device that trains, which draws its batches there."""
    return {name: values.to(device) for name, values in latents.items()}


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
class SegmentationTraining(HeadSettings[SegmentationModel, SceneSet | list[MaskedImage]]):
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
        if self.sharpen and not self.decoder:
            raise ValueError(f"sharpen is of the decoder, which decoder=False leaves out, got {self.sharpen:g}")

    def build(self, parts: PipelineParts) -> SegmentationModel:
        codec, unet = LatentCodec(parts.vae), from_base(parts.unet, seed=self.fit.seed)
        decoder = DetailDecoder.seeded(self.fit.seed, codec) if self.decoder else None
        context = prepared(parts, unet, decoder)
        return SegmentationModel(unet, context, Schedule.from_config(parts.scheduler), decoder)

    def feed(self, model: SegmentationModel, inputs: TrainingInputs) -> Feed:
        parts, data, device = inputs.parts, inputs.data, inputs.device
        folder, progress = inputs.folder, inputs.progress
        codec = LatentCodec(parts.vae.eval().to(memory_format=torch.channels_last))
        levels: Any = model.unet.levels  # an int, which torch's modules cannot say
        shape: dict[str, Any] = {"batch_size": self.batch_size, "edges": self.edges}
        if not isinstance(data, SceneSet):
            codec.to(device)
            batches = image_batches(data, codec.encode, size=self.size, levels=levels, decoder=self.decoder, **shape)
            return batches, segmentation_losses, None
        count, file = min(self.scenes, len(data)), inputs.latents or folder / "latents.safetensors"
        made_with = _made_with(self.base, parts)
        cached = cache_scenes(codec.encode, data, count, levels, file, made_with=made_with, progress=progress)
        cached, held = _moved(cached, device), held_scenes(data, slice(count), device) if self.decoder else None
        batches = scene_batches(cached, held, **shape)
        if held is None or not self.sharpen:
            return batches, segmentation_losses, None
        finish = partial(sharpen_decoder, held=held, cached=cached, training=self, folder=folder, progress=progress)
        return batches, segmentation_losses, finish

    def about(self) -> dict[str, Any]:
        extra = {"edges": self.edges, "seed": self.fit.seed}
        return {"family": "diffdis", "task": "segmentation", "working_size": self.size, "extra": extra}


def head_of(model: SegmentationModel, vae: Any, training: SegmentationTraining) -> DiffDis:
    """The head that a trained model is; they share their weights."""
    unet: Any = model.unet
    return DiffDis(unet, vae, model.context, model.schedule, working_size=training.size, decoder=model.decoder)


@torch.no_grad()
def predicted_latents(
    model: SegmentationModel, cached: Mapping[str, Tensor], training: SegmentationTraining, count: int
) -> Tensor:
    """What the U-Net predicts for the first `count` scenes, (count or 2 count, c, h, w): masks, then edges."""
    kinds: tuple[list[Tensor], ...] = ([], []) if training.edges else ([],)
    device = model.context.device
    for start in range(0, count, 32):
        rows = [part[start : min(start + 32, count)].float().to(device) for part in image_latents(cached)]
        shape = (len(rows[0]) * len(kinds), *rows[0].shape[1:])
        noise = torch.randn(shape, generator=step_generator(SHARPENING.seed, start)).to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            _, clean = model.predict(rows, noise)
        for kind, part in zip(kinds, clean.cpu().split(len(rows[0])), strict=True):
            kind.append(part)
    return torch.cat([part for kind in kinds for part in kind])


def sharpen_decoder(
    model: SegmentationModel,
    held: tuple[Tensor, Tensor],
    cached: Mapping[str, Tensor],
    training: SegmentationTraining,
    folder: Path,
    *,
    count: int = 4000,
    progress: bool = True,
) -> None:
    """Train the decoder on, alone, on latents that the finished U-Net predicts; in place.

    Args:
        held: scenes as `held_scenes` gives them, on the model's device.
        cached: latents of `cache_scenes`.
    """
    assert model.decoder is not None
    file, count = folder / "predicted.safetensors", min(count, len(cached["mask"]))
    if not file.exists():
        save_weights(file, {"latents": predicted_latents(model, cached, training, count).half()})
    device = model.context.device
    latents = read_weights(file)[0]["latents"].to(device)

    def batches(generator: torch.Generator) -> Batch:
        rows = torch.randint(count, (SHARPENING_BATCH,), generator=generator).to(device)
        images, masks, edges = scene_maps(held[0][rows], held[1][rows])
        edged = (torch.rand(SHARPENING_BATCH, generator=generator) < (0.25 if training.edges else 0.0)).to(device)
        return {
            "latents": latents[rows + edged * count].float(),
            "pixels": images.to(memory_format=torch.channels_last),
            "maps": torch.where(edged[:, None, None, None], edges, masks),
        }

    decoder = model.decoder.requires_grad_(True)
    settings = replace(SHARPENING, minutes=training.sharpen)
    sharper = fit(decoder, batches, drawn_losses, settings, folder / "decoder", device=device, progress=progress)
    model.decoder.load_state_dict(sharper.state_dict())
    model.eval()
