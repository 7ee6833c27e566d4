"""Training a restorer: degraded images in, their originals out, in one pass; as Lotus-D is, with the rule "residual".

The processes of `diffrep.heads.restoration.residual` are trained in latents too, by their own losses; a ResShift is
distilled into one step by SinSR's losses, and TAD-SR's score (without its discriminator).

The scale distillation is YONOS-SR's (arXiv 2401.17258), in its certain parts: a restorer of half the scale, which sees
more, says what clean latent one of the whole scale should find; the decoder is tuned after the U-Net. Its weights by
noise level do not apply, since nothing here starts from noise.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from diffrep.backbones import draw_noise
from diffrep.backbones.pipelines import PipelineParts
from diffrep.files import read_weights, save_weights
from diffrep.heads.decoder import DetailDecoder
from diffrep.heads.one_step import LatentCodec, Schedule
from diffrep.heads.restoration.degrade import DEGRADATIONS, PUBLISHED_SIDE, Draws, degrade, draw_kernels
from diffrep.heads.restoration.families import RESTORATION_FAMILIES, TINY, RestorationFamily
from diffrep.heads.restoration.pixels import imresize
from diffrep.heads.restoration.residual import PROCESSES, hsd_gradient, sinsr_losses
from diffrep.heads.restoration.restorer import RestorationHead, Restorer
from diffrep.heads.training.dense import adapt_unet
from diffrep.heads.training.fit import Feed, HeadSettings, TrainingInputs, prepared
from diffrep.images import center_crop, load_image
from diffrep.processes import process_pool
from diffrep.scenes import SceneSet
from diffrep.settings import NOT_NEGATIVE, WORKERS, check
from diffrep.training.loop import Batch, FitSettings, step_generator

EMBEDDED_FIT = FitSettings(
    steps=40000, minutes=60, learning_rate=1e-3, warmup=100, weight_decay=0.01, ema_decay=0.998, seed=31
)
DETAIL: Mapping[str, Any] = {"widths": (128, 64, 48), "blocks": 2, "outputs": 3}  # of a decoder of its own


def scene_originals(scenes: SceneSet) -> Tensor:
    """The images of a rendered set, (N, 3, H, W) uint8."""
    return torch.from_numpy(np.array(scenes.image[: len(scenes)])).permute(0, 3, 1, 2)


def photo_originals(files: Sequence[Path], size: int) -> Tensor:
    """The middle squares of photographs, (N, 3, size, size) uint8."""
    crops = (center_crop(load_image(file), size).resize((size, size), Image.Resampling.BICUBIC) for file in files)
    return torch.stack([torch.from_numpy(np.array(crop)).permute(2, 0, 1) for crop in crops])


@dataclass(frozen=True, kw_only=True)
class PairSettings:
    """What originals are made into, once, before a training."""

    degradation: Literal["resshift", "s3diff"] = "resshift"  # the published draws that photographs are made worse by
    scale: int = 4  # sides of an original over those of what is made of it
    clean: float = 0.25  # share that is only made smaller
    versions: int = 2  # of each original, degraded once before the training

    def __post_init__(self) -> None:
        check(self, scale="2..16", clean="[0, 1]", versions="1..")


def degraded(pixels: Tensor, settings: PairSettings, number: int, *, seed: int = 0, half: bool = False) -> Tensor:
    """An image (3, H, W) uint8 made worse with the draws of a number: (3, H / scale, W / scale) uint8.

    Args:
        half: with the same draws, as a scale half as large would have left it.
    """
    draws, image = Draws(step_generator(seed, number)), pixels[None].float() / 255
    scale = settings.scale // 2 if half else settings.scale
    if draws.random() < settings.clean:
        low = imresize(image, 1 / scale).clamp(0, 1)
    else:
        whole = replace(DEGRADATIONS[settings.degradation], scale=scale, clean=0.0, rounds=True)
        low = degrade(image, draw_kernels(whole, draws), whole, draws)
    return (low[0] * 255).round().byte()


def degraded_pairs(
    originals: Tensor, settings: PairSettings, file: Path, *, seed: int = 0, half: bool = False, workers: int = 2,
    progress: bool = True,
) -> dict[str, Tensor]:  # fmt: skip
    """All versions of all originals (N, 3, H, W) uint8, degraded once, in several processes, and stored in a file.

    Args:
        half: also as half the scale would have left them.

    Returns:
        "low" (versions * N, 3, h, w) uint8, the versions of each original beside each other, and "half" where wanted.

    Raises:
        ValueError: the file holds pairs of something else.
    """
    made_with = json.dumps([len(originals), asdict(settings), seed, half])
    if not file.exists():
        chunks = [chunk.numpy() for chunk in originals.split(32)]
        chunk = partial(_chunk, settings, {"low": False} | ({"half": True} if half else {}), seed)
        with process_pool(workers) as pool:
            results = pool.map(chunk, range(0, len(originals), 32), chunks)
            parts = list(tqdm(results, desc="degrading", total=len(chunks), unit="batch", disable=not progress))
        save_weights(file, {name: torch.cat([part[name] for part in parts]) for name in parts[0]}, made_with=made_with)
    stored, metadata = read_weights(file)
    if metadata.get("made_with") != made_with:
        raise ValueError(
            f"{file}: holds pairs of {metadata.get('made_with')}, not of {made_with}; choose another folder"
        )
    return stored


def _chunk(
    settings: PairSettings, kinds: Mapping[str, bool], seed: int, first: int, originals: np.ndarray
) -> dict[str, Tensor]:
    torch.set_num_threads(1)
    copies = list(enumerate(torch.from_numpy(originals).repeat_interleave(settings.versions, 0)))
    return {
        name: torch.stack([
            degraded(image, settings, first * settings.versions + i, seed=seed, half=half) for i, image in copies
        ])
        for name, half in kinds.items()
    }  # fmt: skip


def enlarged(low: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, 3, h, w) uint8 -> (B, 3, H, W) in [0, 1], as a head enlarges photographs."""
    return F.interpolate(low.float() / 255, size, mode="bicubic", antialias=True).clamp(0, 1)


class RestorationModel(nn.Module):
    """A U-Net and its VAE in training; what of them learns is what requires gradients.

    Args:
        decoder: draws what is added to the enlarged image, in place of the VAE's decoder, which draws the image.
    """

    context: Tensor

    def __init__(
        self, unet: Any, vae: Any, context: Tensor, scheduler: Mapping[str, Any], decoder: DetailDecoder | None = None,
        family: RestorationFamily = TINY,
    ) -> None:  # fmt: skip
        super().__init__()
        self.unet, self.vae, self.decoder, self.scheduler = unet, vae, decoder, dict(scheduler)
        self.family, self.process = family, PROCESSES.get(family.process)
        self.register_buffer("context", context.detach().clone())

    def forward(
        self, images: Tensor, *, decoded: bool = True, terms: Callable[[RestorationModel], Any] | None = None
    ) -> Any:
        """Clean latents (B, c, h, w) and clean images in about [0, 1], of enlarged ones (B, 3, H, W) in [0, 1].

        Args:
            terms: computed instead, here so that several processes' gradients meet.
        """
        if terms is not None:
            return terms(self)
        clean = self.clean(encoded(self.vae, images))
        return clean, self.drawn(clean, images) if decoded else None

    def drawn(self, clean: Tensor, images: Tensor) -> Tensor:
        """Clean images of clean latents and enlarged images."""
        if self.decoder is not None:
            return images + self.decoder(clean, images)
        config = self.vae.config
        unscaled = clean / config.scaling_factor + (config.shift_factor or 0.0)
        return self.vae.decode(unscaled, return_dict=False)[0] / 2 + 0.5

    def asked(self, latents: Tensor, state: Tensor, t: int | Tensor) -> Tensor:
        """What the U-Net says of a process's state beside degraded latents, (B, c, h, w) both."""
        return self._output(torch.cat([latents, state.to(latents)], 1), torch.as_tensor(t, device=latents.device))

    def clean(self, latents: Tensor) -> Tensor:
        """Latents (B, c, h, w) of degraded images -> of clean ones, with one fixed noise where they need some."""
        if self.process is None:
            return latents - self._output(latents, TINY.timestep)
        noise = [draw_noise(latents.shape[1:], 0, 0, stream=2 + n).to(latents) for n in range(self.family.steps)]
        return self.process.restored(partial(self.asked, latents), latents, noise, self.family.steps)

    def _output(self, latents: Tensor, timestep: int | Tensor) -> Tensor:
        context = self.context.expand(len(latents), -1, -1)
        return self.unet(latents, timestep, encoder_hidden_states=context).sample


def process_terms(
    model: RestorationModel, batch: Batch, images: Tensor, clean: Tensor, teacher: RestorationModel | None, score: float
) -> tuple[dict[str, Tensor], Tensor]:
    """Losses of a process on enlarged images and clean latents, and the clean images that the network estimates.

    Args:
        batch: "noise" of the latents, "step" (B,) and, for TAD-SR's `score`, "mixed", uniform noise.
        teacher: a ResShift, to be distilled into one step.
    """
    process, degraded, noise = model.process, encoded(model.vae, images).detach(), batch["noise"]
    assert process is not None
    t = batch["step"].cpu()  # as the tables that it indexes
    said: list[Tensor] = []

    def network(state: Tensor, step: int | Tensor) -> Tensor:
        said.append(model.asked(degraded, state, step).float())
        return said[-1]

    if teacher is None:
        noisy = process.noisy(clean, degraded, noise, t)
        if process.drawn:
            loss = process.losses(network, clean, degraded, noise, t).mean()
        else:
            loss = process.absolute_loss((network(noisy, t),), clean, degraded, noise)
        return {"latent": loss}, model.drawn(process.parts(said[0], noisy, degraded, t)[-1], images)
    asked = partial(teacher.asked, degraded)
    with torch.no_grad():
        *_, (taught, _) = process.sample(asked, degraded, noise)
    losses = [one.mean() for one in sinsr_losses(process, network, taught, clean, degraded, noise).values()]
    if score:  # of the student's answer to the prior, its second
        losses.append(score * hsd_gradient(process, asked, said[1], taught, degraded, batch["mixed"], t % 3)[1].mean())
    return {"latent": torch.stack(losses).sum()}, model.drawn(said[1], images)


def encoded(vae: Any, images: Tensor) -> Tensor:
    """Scaled means of latents of images (B, 3, H, W) in [0, 1], with a gradient where one is asked for."""
    latents: Tensor = vae.encode(images * 2 - 1).latent_dist.mean
    return (latents - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor


def restorer_of(model: RestorationModel) -> RestorationHead:
    """The head that a model in training is; they share their weights."""
    parts = model.unet, model.vae, model.context, Schedule.from_config(model.scheduler), model.family
    return RestorationHead(Restorer(*parts, fold=False, decoder=model.decoder))


@dataclass(frozen=True, kw_only=True)
class RestorationTraining(HeadSettings[RestorationModel, Tensor]):
    """One restorer: from which base, on which degradation, and how it is trained."""

    base: str = "tiny"  # embedded model, diffusers folder or hub id whose U-Net is trained
    start: str = ""  # folder of a restorer to train on, for example its decoder alone
    teacher: str = ""  # folder of a restorer of half the scale, whose clean latents are the targets; sinsr: a resshift
    family: Literal["restore", "resshift", "resshift-4", "sinsr", "rddm"] = "restore"  # one step, or by a process
    score: float = 0.0  # sinsr: weight of TAD-SR's distilled score
    pairs: PairSettings = field(default_factory=PairSettings)
    fit: FitSettings = field(default_factory=lambda: EMBEDDED_FIT)
    batch_size: int = 32
    size: int = 128  # pixels a side of the originals; photographs are cropped to their middle square and resized
    detail: bool = True  # a decoder of its own that looks at the image and adds to it; with base tiny, else the VAE's
    learns: Literal["unet", "decoder", "all"] = "unet"  # U-Net and a decoder of its own; a decoder alone; VAE too
    latent: float = 0.1  # weight of the squared error of the clean latent; 1 without a decoder of its own
    pixel: float = 1.0  # weight of the mean absolute error behind the decoder
    workers: int = 2  # processes that degrade images

    def __post_init__(self) -> None:
        check(self, batch_size="1..", workers=WORKERS, latent=NOT_NEGATIVE, pixel=NOT_NEGATIVE)
        shrunk = min(1 / self.pairs.scale, DEGRADATIONS[self.pairs.degradation].first.resize[0])
        if self.size < (least := math.ceil((PUBLISHED_SIDE // 2 + 1) / shrunk)):
            raise ValueError(f"size must be at least {least}, so that blurs fit into what is left, got {self.size}")
        plain = self.family == "restore"
        if not plain and (self.learns != "unet" or not self.latent or not self.pixel or self.start):
            raise ValueError(f"a {self.family} learns its U-Net from latents and pixels: learns='unet', both above 0")
        if (bool(self.teacher) != (self.family == "sinsr") and not plain) or (self.score and self.family != "sinsr"):
            raise ValueError(
                "a sinsr learns from a resshift (teacher), with score if wanted; other processes from data"
            )
        if plain and self.teacher and (self.learns != "unet" or not self.latent):
            raise ValueError("a teacher's latents need learns='unet' and latent above 0")
        if (self.learns != "unet" or self.detail) and not self.pixel:
            raise ValueError("a decoder learns from pixels: set pixel above 0")

    def build(self, parts: PipelineParts) -> RestorationModel:
        unet, vae, decoder = parts.unet, parts.vae, None
        family = RESTORATION_FAMILIES[self.family]
        if place := self.start or self.teacher:
            machine = _restorer_in(place)
            if machine.family.name != {"sinsr": "resshift"}.get(self.family, self.family):
                raise ValueError(f"{place}: is a {machine.family.name}, which a {self.family} does not learn from")
            unet, vae, decoder = machine.network.unet, machine.vae, machine.decoder
        channels = (unet.config.in_channels, unet.config.out_channels)
        if channels[1] != vae.config.latent_channels:
            raise ValueError(f"a restorer needs a U-Net from the VAE's latents to them, not one of {channels} channels")
        unet = adapt_unet(unet, family)
        if self.detail and decoder is None:
            decoder = DetailDecoder.seeded(self.fit.seed, LatentCodec(vae), **DETAIL)
            nn.init.zeros_(decoder.leave.weight)  # it starts from the enlarged image
            nn.init.zeros_(decoder.leave.bias)  # type: ignore[arg-type]
        context = prepared(parts, unet, vae, decoder)
        model = RestorationModel(unet, vae, context, parts.scheduler, decoder if self.detail else None, family)
        model.requires_grad_(False)
        draws = [decoder] if self.detail else [vae.decoder, vae.post_quant_conv]
        taught = {"unet": [unet, decoder if self.detail else None], "decoder": draws, "all": [unet, vae, decoder]}
        for module in filter(None, taught[self.learns]):
            module.requires_grad_(True)
        return model

    def written_vae(self, model: RestorationModel) -> Any:
        return model.vae if self.learns == "all" or not self.detail or self.start or self.teacher else None

    def feed(self, model: RestorationModel, inputs: TrainingInputs) -> Feed:
        data, device = inputs.data, inputs.device
        if data.shape[-2:] != (self.size, self.size):
            raise ValueError(
                f"size must be that of the originals, {data.shape[-2]} x {data.shape[-1]}, got {self.size}"
            )
        pairs = degraded_pairs(
            data, self.pairs, inputs.latents or inputs.folder / "pairs.safetensors", seed=self.fit.seed,
            half=bool(self.teacher) and model.process is None, workers=self.workers, progress=inputs.progress,
        )  # fmt: skip
        size, versions = (self.size, self.size), self.pairs.versions
        teacher = None
        if self.teacher:
            machine = _restorer_in(self.teacher)
            networks = machine.network.unet, machine.vae, machine.network.context
            teacher = RestorationModel(*networks, inputs.parts.scheduler, family=machine.family)
            teacher.to(device).requires_grad_(False).eval()
        frozen = copy.deepcopy(model.vae).to(device).requires_grad_(False).eval()
        data, pairs = data.to(device), {name: low.to(device) for name, low in pairs.items()}

        def batches(generator: torch.Generator) -> Batch:
            rows = torch.randint(len(pairs["low"]), (self.batch_size,), generator=generator).to(device)
            flips = (torch.rand(self.batch_size, 1, 1, 1, generator=generator) < 0.5).to(device)
            batch = {"originals": data[rows // versions], **{name: low[rows] for name, low in pairs.items()}}
            batch = {name: torch.where(flips, value.flip(-1), value) for name, value in batch.items()}
            if model.process is not None:
                codec, count = LatentCodec(frozen), self.batch_size
                shape = (count, codec.channels, *(side // codec.stride for side in batch["originals"].shape[-2:]))
                batch["noise"] = torch.randn(shape, generator=generator)
                batch["mixed"] = torch.rand(shape, generator=generator)
                batch["step"] = torch.randint(len(model.process), (count,), generator=generator)
            return batch

        @torch.no_grad()
        def wanted(batch: Batch) -> Tensor:
            """Clean latents to learn: the originals', or what the teacher of half the scale makes of what it sees."""
            if teacher is None or model.process is not None:
                return encoded(frozen, batch["originals"].float() / 255).float()
            return teacher.clean(encoded(teacher.vae, enlarged(batch["half"], size))).float()

        def losses(module: nn.Module, ema: RestorationModel, batch: Batch) -> dict[str, Tensor]:
            originals, images = batch["originals"].float() / 255, enlarged(batch["low"], size)
            terms: dict[str, Tensor] = {}
            if model.process is not None:
                values: dict[str, Any] = {"batch": batch, "images": images, "clean": wanted(batch), "teacher": teacher}
                terms, decoded = module(images, terms=partial(process_terms, **values, score=self.score))
            else:
                clean, decoded = module(images, decoded=bool(self.pixel))
                if self.latent:  # a VAE in training has no fixed latent space: that of its base counts
                    clean = encoded(frozen, decoded) if self.learns == "all" else clean
                    terms["latent"] = F.mse_loss(clean.float(), wanted(batch))
            if decoded is not None:
                terms["pixel"] = F.l1_loss(decoded.float(), originals)
            weights = {"pixel": self.pixel, "latent": self.latent}
            return {"loss": torch.stack([weights[name] * term for name, term in terms.items()]).sum(), **terms}

        return batches, losses, None

    def about(self) -> dict[str, Any]:
        extra = {"training": json.loads(json.dumps(asdict(self), default=str))}
        return {"family": self.family, "task": "restore", "working_size": self.size, "extra": extra}


def _restorer_in(folder: str) -> Any:
    from diffrep.heads.loading import load_head  # which imports what trains nothing

    head = load_head(folder, task="restore", device="cpu", dtype=torch.float32, fold=False)
    return head.model


def enlargements(originals: Tensor, settings: PairSettings, *, seed: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
    """Originals (N, 3, H, W) uint8 beside their enlarged versions in [0, 1], "degraded" and "clean"."""
    result = {}
    for name, share in (("degraded", 0.0), ("clean", 1.0)):
        one = replace(settings, clean=share)
        low = torch.stack([degraded(image, one, number, seed=seed) for number, image in enumerate(originals)])
        result[name] = originals, enlarged(low, (originals.shape[-2], originals.shape[-1]))
    return result
