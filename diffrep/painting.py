"""Models of the project as samplers see them: `sample` paints with any of them and any sampler."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffrep.backbones.base import BackboneError
from diffrep.backbones.diffusion import DiffusionBackbone, LatentBackbone, class_labels, draw_noise
from diffrep.backbones.early_exit import EarlyExitUViT, LayerOutputs, is_early_exit, load_early_exit
from diffrep.backbones.partial import PartialNetwork
from diffrep.devices import resolve_device
from diffrep.results import Result
from diffrep.sampling.core import run
from diffrep.sampling.samplers import build_table, model_schedule
from diffrep.sampling.schedules import Flow, NoiseSchedule, SamplingError, TableVP
from diffrep.searched import Candidate, as_candidate, model_facts

if TYPE_CHECKING:
    from PIL import Image

    from diffrep.synthesis.model import SynthesisModel


@dataclass(frozen=True, repr=False)
class Samples(Result):
    """What a sampler painted.

    Attributes:
        images: (B, 3, H, W) in [0, 1].
        latents: (B, c, h, w) before the decoder; of pixel models the pixels in -1..1.
        calls: how often the network ran for an image.
        flops: floating point operations of the network for all images, where they were counted.
    """

    MAIN = "images"

    images: Tensor
    latents: Tensor
    calls: int
    flops: int | None = None

    def picture(self) -> Image.Image:
        """The images side by side."""
        from PIL import Image

        pixels = torch.cat(list(self.images), dim=2).movedim(0, -1)
        return Image.fromarray((255 * pixels).round().byte().numpy())


@dataclass
class DiffusionModel:
    """A network with all that sampling needs of it.

    Attributes:
        name: for messages.
        network: the module, for steps that run a part of it.
        predict: from (state, timestep, rows of the batch) to its prediction, guidance included.
        prediction: what it predicts, see `to_forms`.
        schedule: of its noise.
        decode: from the final states to images (B, 3, H, W) in [0, 1].
        encode: from images to states.
        channels: of a state.
        factor: image pixels a pixel of the state.
        side: of the images it was trained on, in pixels.
        count: how many conditions it has; states are painted for each.
        multiple: what sides of images are multiples of; the factor where 0.
    """

    name: str
    network: torch.nn.Module
    predict: Callable[[Tensor, float, slice], Tensor]
    prediction: str
    schedule: NoiseSchedule
    decode: Callable[[Tensor], Tensor]
    encode: Callable[[Tensor], Tensor]
    channels: int
    factor: int
    side: int
    count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    multiple: int = 0

    def facts(self) -> dict[str, Any]:
        """Its `model_facts`."""
        side = self.side // self.factor
        return model_facts(self.network, self.schedule, self.prediction, (self.channels, side, side))

    def shape_of(self, size: tuple[int, int] | None) -> tuple[int, int, int]:
        """(c, h, w) of the states of images of (H, W); of the size it was trained on where None."""
        if size is not None and not (isinstance(size, Sequence) and [type(side) for side in size] == [int, int]):
            raise SamplingError(f"size must be (height, width) in pixels, got {size!r}")
        (height, width), multiple = size or (self.side, self.side), self.multiple or self.factor
        if height % multiple or width % multiple or min(height, width) < multiple:
            raise SamplingError(f"{self.name}: sides must be multiples of {multiple}, got {height} x {width}")
        return self.channels, height // self.factor, width // self.factor


def diffusion_model(
    model: Any,
    condition: str | Sequence[str] | Tensor | int | None = None,
    *,
    guidance: float | None = None,
    negative: str = "",
    device: str | torch.device = "auto",
    dtype: torch.dtype = torch.float32,
) -> DiffusionModel:
    """A model of the project, or one by its name, under a condition.

    Args:
        model: a synthesis model, a diffusion backbone, an `EarlyExitUViT`, or whatever `load_synthesis`,
            `load_backbone` and `load_early_exit` take: Stable Diffusion 1, 2, XL and 3, FLUX, PixArt, DiT, SiT, ADM.
        condition: one or several prompts; embeddings (B, dim) (synthesis); classes (ADM, DiT, SiT).
        guidance: scale of classifier-free guidance, or what FLUX.1-dev is told; 1: none. The model's own where
            left out.
        negative: prompt that is guided away from.
        device, dtype: of models that are loaded here.

    Raises:
        BackboneError: the model cannot be loaded.
        SamplingError: it cannot be sampled, or not under such a condition.
    """
    from diffrep.synthesis.model import SynthesisModel

    if isinstance(model, (str, os.PathLike)):
        model = load_model(os.fspath(model), device=device, dtype=dtype)
    if negative and not isinstance(model, DiffusionBackbone):
        raise SamplingError(f"{getattr(model, 'name', type(model).__name__)}: takes no negative prompt")
    if isinstance(model, EarlyExitUViT):
        return _of_early_exit(model, condition, guidance)
    if isinstance(model, SynthesisModel):
        if not isinstance(condition, Tensor) or condition.ndim != 2:
            raise SamplingError(f"{model.name}: is painted under embeddings (B, dim), as the condition")
        contexts = model.context(condition.to(model.device, model.dtype))

        def network(x: Tensor, t: float, rows: Sequence[Tensor]) -> Tensor:
            time = torch.tensor(t, device=model.device)
            return model(x.to(model.device, model.dtype), time, torch.stack(list(rows)))

        scale = model.about.guidance if guidance is None else guidance
        predict = _guided(network, list(contexts), model.null_context()[0], scale)
        return DiffusionModel(
            model.name, model.unet, predict, *model_schedule(model.scheduler), model.decode, model.encode,
            model.channels, model.factor, model.factor * model.window, len(contexts), model.device,
        )  # fmt: skip
    if not isinstance(model, DiffusionBackbone):
        raise SamplingError(
            f"{getattr(model, 'name', model)}: cannot be sampled; give a diffusion model with its VAE, a synthesis"
            " model or a pixel diffusion"
        )
    return _of_backbone(model, condition, guidance, negative)


def load_model(name: str, *, device: str | torch.device = "auto", dtype: torch.dtype = torch.float32) -> Any:
    """Whatever can be sampled, by its name: an early-exit network, a synthesis model (embedded, or a folder with an
    embedder), or a diffusion backbone with its decoder.

    Raises:
        BackboneError: it cannot be loaded.
    """
    from diffrep.backbones import load_backbone
    from diffrep.synthesis.model import is_synthesis, load_synthesis

    if is_early_exit(name):
        return load_early_exit(name).to(resolve_device(device), dtype)
    if is_synthesis(name):
        return load_synthesis(name, device=device, dtype=dtype)
    return load_backbone(name, decoder=True, device=device, dtype=dtype)


def _of_backbone(backbone: Any, condition: Any, guidance: float | None, negative: str) -> DiffusionModel:
    latent = isinstance(backbone, LatentBackbone)
    conditions, null = backbone.painted_under(condition, negative)
    scale, flow = backbone.guidance if guidance is None else guidance, getattr(backbone, "flow", False)
    if scale != 1 and not latent:
        raise SamplingError(f"{backbone.name}: a pixel diffusion has no classifier-free guidance")
    network = backbone.predicted
    if backbone.guided:
        network, scale = partial(network, guidance=scale), 1.0
    if negative and scale == 1:
        raise SamplingError(f"{backbone.name}: a negative prompt needs classifier-free guidance, a scale other than 1")
    if flow or (latent and backbone.scheduler):
        flows = {"prediction_type": "flow_prediction"} if flow else {}
        prediction, schedule = model_schedule({**(backbone.scheduler or {}), **flows})
    else:
        prediction, schedule = "epsilon", _table(backbone)
    channels, _, side = _latent_shape(backbone)
    encode = (lambda x: backbone.scale(backbone.encode(x)[0])) if latent else (lambda x: x.to(backbone.device) * 2 - 1)
    return DiffusionModel(
        backbone.name, backbone.network, _guided(network, conditions, null, scale), prediction, schedule,
        backbone.decode, encode, channels, backbone.stride, backbone.stride * side, len(conditions), backbone.device,
        backbone.multiple,
    )  # fmt: skip


def synthesis_facts(model: SynthesisModel) -> dict[str, Any]:
    """The `model_facts` of a synthesis model."""
    prediction, schedule = model_schedule(model.scheduler)
    return model_facts(model.unet, schedule, prediction, (model.channels, model.window, model.window))


def backbone_facts(backbone: Any) -> dict[str, Any]:
    """The `model_facts` of a diffusion backbone whose features are read, with or without what is needed to paint."""
    flow, scheduler = getattr(backbone, "flow", False), backbone.scheduler or {}
    prediction = "flow_prediction" if flow else str(scheduler.get("prediction_type") or "epsilon")
    return model_facts(backbone.network, Flow() if flow else _table(backbone), prediction, _latent_shape(backbone))


def _table(backbone: Any) -> TableVP:
    return TableVP(backbone.alphas_cumprod.double().cpu().numpy())


def _latent_shape(backbone: Any) -> tuple[int, int, int]:
    """(c, h, w) of what the network was trained on."""
    latent = isinstance(backbone, LatentBackbone)
    usual = 128 if getattr(backbone, "flow", False) else 64 if latent else 256
    side = int(getattr(backbone.network.config, "sample_size", None) or usual)
    return backbone.vae.config.latent_channels if latent else 3, side, side


def _of_early_exit(network: EarlyExitUViT, condition: Any, guidance: float | None) -> DiffusionModel:
    """A U-ViT of pixels or latents, which the reproduction of DeeDiff trains on the schedule of DDPM."""
    from diffrep.synthesis.model import load_synthesis

    about, name = network.about, type(network).__name__
    labels = class_labels(name, condition, about.num_classes if about.num_classes > 0 else None)
    if guidance not in (None, 1.0):
        raise SamplingError(f"{name}: has no classifier-free guidance")
    device = network.uvit.pos_embed.device

    def predict(x: Tensor, t: float, rows: slice) -> Tensor:
        if x.shape[-2:] != (about.img_size, about.img_size):
            height, width = (factor * int(n) for n in x.shape[-2:])
            raise SamplingError(f"{name}: paints {side} x {side}, got {height} x {width}")
        times = torch.full((len(x),), t, device=device)
        classes = torch.tensor(labels[rows], device=device) if labels else None
        output = network(x.to(network.uvit.pos_embed), times, classes)
        return (output.full if isinstance(output, LayerOutputs) else output).float().to(x)

    _, schedule = model_schedule({"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02})
    decode, encode, factor = (lambda x: x / 2 + 0.5), (lambda x: x.to(device) * 2 - 1), 1
    if network.autoencoder:
        coder = load_synthesis(network.autoencoder, device=device)
        if (coder.window, coder.channels) != (about.img_size, about.in_chans):
            raise BackboneError(f"{name}: its autoencoder {network.autoencoder} has latents of another size")
        decode, encode, factor = coder.decode, coder.encode, coder.factor
    side = factor * about.img_size
    return DiffusionModel(
        name, network, predict, "epsilon", schedule, decode, encode, about.in_chans, factor, side,
        max(len(labels), 1), device, side,
    )  # fmt: skip


def _guided(
    network: Callable[[Tensor, float, Sequence[Any]], Tensor], conditions: Sequence[Any], null: Any, scale: float
) -> Callable[[Tensor, float, slice], Tensor]:
    """A network that runs on both conditions at once where it is guided."""

    def predict(x: Tensor, t: float, rows: slice) -> Tensor:
        wanted = list(conditions[rows])
        if scale == 1:
            return network(x, t, wanted).float().to(x)
        away, towards = network(torch.cat([x, x]), t, [null] * len(wanted) + wanted).float().chunk(2)
        return (away + scale * (towards - away)).to(x)

    return predict


@torch.inference_mode()
def sample(
    model: Any,
    condition: str | Sequence[str] | Tensor | int | None = None,
    *,
    sampler: str = "unipc",
    steps: int = 20,
    seed: int = 0,
    guidance: float | None = None,
    negative: str = "",
    size: tuple[int, int] | None = None,
    spacing: str | None = None,
    timesteps: Sequence[float] | Candidate | str | Path | None = None,
    inherit: int = 1,
    branch: int = 0,
    depths: Sequence[int] = (),
    threshold: float | None = None,
    start: Tensor | None = None,
    count_flops: bool = False,
    batch_size: int = 8,
    device: str | torch.device = "auto",
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Samples:
    """Paint with a diffusion model.

    >>> sample("tiny", "a cat", sampler="ghvb", steps=8, order=1.8)  # doctest: +SKIP

    Args:
        model, condition, guidance, negative, device, dtype: see `diffusion_model`; a `DiffusionModel` as it is.
        sampler: a name of `SAMPLERS`.
        steps: how many.
        seed: of the first noise and of what steps add. No bit of the noise or of the solver depends on the batch; how
            the network rounds may.
        size: (H, W) of the images; as the model was trained where left out.
        spacing: where the timesteps lie, one of `GRIDS`; as the sampler wants them where left out.
        timesteps: these instead; or what a search found, with its orders and skipped units: a `Candidate` or its file.
        inherit, branch, depths, threshold: steps that run a part of the network, see `PartialNetwork`; inheritance
            distorts below about 50 steps.
        start: (1 or B, c, h, w) standard normal noise to begin with in place of the seed's.
        count_flops: count the network's floating point operations.
        batch_size: states that go through the network together.
        options: of the sampler.

    Raises:
        SamplingError: the sampler, its options or the size do not go with the model.
        BackboneError: the network cannot run by parts.
    """
    if not isinstance(model, DiffusionModel):
        model = diffusion_model(model, condition, guidance=guidance, negative=negative, device=device, dtype=dtype)
    shape = model.shape_of(size)
    if branch and inherit == 1:
        raise SamplingError("branch says how deep the steps go that inherit: it goes with inherit")
    searched = as_candidate(timesteps)
    if searched is not None:
        searched = searched.for_model(model.name, model.facts)
        steps, options = len(searched.timesteps), {**({"order": searched.orders} if searched.orders else {}), **options}
    for name, number in (("steps", steps), ("batch_size", batch_size), ("inherit", inherit)):
        if not isinstance(number, int) or number < 1:
            raise SamplingError(f"{name} must be a whole number of at least 1, got {number!r}")
    schedule = model.schedule
    if isinstance(schedule, Flow):
        schedule = schedule.of_tokens(shape[1] * shape[2] // 4)
    chosen = None if searched is None else searched.timesteps
    table = build_table(sampler, schedule, steps, spacing=spacing, timesteps=chosen, **options)
    skipped = () if searched is None else searched.skipped
    if any(len(rows) not in (0, table.grid.steps) for rows in (depths, skipped)):
        raise SamplingError(
            f"depths and skipped units have one entry for each of {table.grid.steps} calls of {sampler}"
        )
    calls, parts, flops = 0, list[Tensor](), 0
    with ExitStack() as stack:
        network = stack.enter_context(
            PartialNetwork(
                model.network, interval=inherit, branch=branch, depths=depths, skipped=skipped, threshold=threshold
            )
        )
        if count_flops:
            from torch.utils.flop_counter import FlopCounterMode

            counter = stack.enter_context(FlopCounterMode(display=False))
        for first in range(0, model.count, batch_size):
            rows, calls = slice(first, min(first + batch_size, model.count)), 0

            def predict(x: Tensor, t: float, rows: slice = rows) -> Tensor:
                nonlocal calls
                network.at(calls)
                calls += 1
                return model.predict(x, t, rows)

            draws = partial(_step_noise, seed, range(rows.start, rows.stop), shape, model.device)
            x = draws(-1) if start is None else start.to(model.device).expand(model.count, *shape)[rows]
            parts.append(run(table, predict, x, prediction=model.prediction, noise=draws))
        flops = counter.get_total_flops() if count_flops else 0
    latents = torch.cat(parts)
    images = torch.cat([model.decode(part).float() for part in latents.split(batch_size)]).clamp(0, 1).cpu()
    return Samples(images, latents.cpu(), calls, flops if count_flops else None)


def _step_noise(seed: int, numbers: Sequence[int], shape: Sequence[int], device: torch.device, step: int) -> Tensor:
    """Each sample's noise of a step, -1 for the first state: it depends on the seed, its number and the step alone."""
    return torch.cat([draw_noise(shape, seed, n, stream=step + 1) for n in numbers]).to(device)
