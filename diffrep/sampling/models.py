"""Models of the project as samplers see them: `sample` paints with any of them and any sampler."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffrep.backbones.diffusion import keyed_generator
from diffrep.devices import resolve_device
from diffrep.results import Result
from diffrep.sampling.caching import InheritedFeatures
from diffrep.sampling.core import run
from diffrep.sampling.evodiff import evodiff
from diffrep.sampling.samplers import build_table, model_schedule, table_times
from diffrep.sampling.schedules import NoiseSchedule, SamplingError, TableVP, TimeGrid

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True, repr=False)
class Samples(Result):
    """What a sampler painted.

    Attributes:
        images: (B, 3, H, W) in [0, 1].
        latents: (B, c, h, w) before the decoder; of pixel models the pixels in -1..1.
        calls: how often the network ran.
    """

    MAIN = "images"

    images: Tensor
    latents: Tensor
    calls: int

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
        network: the module, for features that are inherited from step to step.
        predict: from (state, timestep, rows of the batch) to its prediction, guidance included.
        prediction: what it predicts, see `to_forms`.
        schedule: of its noise.
        decode: from the final states to images (B, 3, H, W) in [0, 1].
        encode: from images to states.
        channels: of a state.
        factor: image pixels a pixel of the state.
        side: of the images it was trained on, in pixels.
        count: how many conditions it has; states are painted for each.
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
        model: a synthesis model, a pixel diffusion backbone, the name of an embedded model ("tiny",
            "tiny-synthesis"), or a folder: Stable Diffusion 1 or 2, a synthesis model, ADM.
        condition: one or several prompts (Stable Diffusion); embeddings (B, dim) (synthesis); a class (ADM).
        guidance: scale of classifier-free guidance; 1: none. The model's own where left out (7.5 for prompts).
        negative: prompt that is guided away from.
        device, dtype: of models that are loaded here.

    Raises:
        BackboneError: the model cannot be loaded.
        SamplingError: it cannot be sampled, or not under such a condition.
    """
    from diffrep.backbones import PixelDiffusion, load_backbone
    from diffrep.backbones.loading import MODELS
    from diffrep.synthesis.model import SynthesisModel, load_synthesis

    if isinstance(model, (str, os.PathLike)):
        name = os.fspath(model)
        folder = MODELS / name if (MODELS / name).is_dir() else Path(name)
        if is_synthesis(name):
            model = load_synthesis(name, device=device, dtype=dtype)
        elif (folder / "vae").is_dir() or not folder.exists():
            return _stable_diffusion(name, condition, guidance, negative, resolve_device(device), dtype)
        else:
            model = load_backbone(name, device=device, dtype=dtype)
    if isinstance(model, SynthesisModel):
        return _synthesis(model, condition, guidance)
    if isinstance(model, PixelDiffusion):
        return _pixels(model, condition, guidance)
    raise SamplingError(
        f"{getattr(model, 'name', model)}: cannot be sampled; give a Stable Diffusion folder by its name, a synthesis"
        " model or a pixel diffusion"
    )


def is_synthesis(name: str) -> bool:
    """Whether a name is that of a synthesis model: an embedded one, or a folder with an embedder."""
    from diffrep.synthesis.model import EMBEDDED

    return name in EMBEDDED or any((Path(name) / part).is_dir() for part in ("embedder", "cond_stage"))


def _stable_diffusion(
    name: str, condition: Any, guidance: float | None, negative: str, device: torch.device, dtype: torch.dtype
) -> DiffusionModel:
    from diffrep.backbones.pipelines import load_parts
    from diffrep.backbones.text import quiet_libraries

    parts = load_parts(name)
    with quiet_libraries():
        parts.unet.eval().requires_grad_(False).to(device, dtype)
        parts.vae.eval().to(device, dtype)
    prompts = [condition] if isinstance(condition, str) else list(condition or [""])
    if parts.text is None or not all(isinstance(prompt, str) for prompt in prompts):
        raise SamplingError(f"{name}: is painted by prompts, and needs its text_encoder and tokenizer for them")
    if parts.unet.config.in_channels != parts.vae.config.latent_channels:
        raise SamplingError(
            f"{name}: its U-Net takes {parts.unet.config.in_channels} channels, more than a latent has: it is a model"
            " for inpainting or prediction, which needs an image beside the noise"
        )
    if parts.unet.config.addition_embed_type is not None:
        raise SamplingError(
            f"{name}: Stable Diffusion XL cannot be sampled here yet; use diffusers with TableScheduler"
        )
    scale = 7.5 if guidance is None else guidance
    embeddings = parts.text.encode([*dict.fromkeys([*prompts, negative])])
    contexts = torch.cat([embeddings[prompt].context for prompt in prompts]).to(device, dtype)
    null = embeddings[negative].context.to(device, dtype)

    def network(x: Tensor, t: float, rows: slice, context: Tensor) -> Tensor:
        return parts.unet(x.to(device, dtype), t, encoder_hidden_states=context[rows]).sample

    def decode(latents: Tensor) -> Tensor:
        vae, shift = parts.vae, getattr(parts.vae.config, "shift_factor", None) or 0.0
        return vae.decode(latents.to(device, dtype) / vae.config.scaling_factor + shift).sample / 2 + 0.5

    def encode(images: Tensor) -> Tensor:
        vae, shift = parts.vae, getattr(parts.vae.config, "shift_factor", None) or 0.0
        return (vae.encode(images.to(device, dtype) * 2 - 1).latent_dist.mean - shift) * vae.config.scaling_factor

    factor = 2 ** (len(parts.vae.config.block_out_channels) - 1)
    return _guided(
        name, parts.unet, network, contexts, null.expand(len(contexts), -1, -1), scale, parts.scheduler,
        decode=decode, encode=encode, channels=parts.vae.config.latent_channels, factor=factor,
        side=factor * int(parts.unet.config.sample_size or 64), device=device,
    )  # fmt: skip


def _synthesis(model: Any, condition: Any, guidance: float | None) -> DiffusionModel:
    if not isinstance(condition, Tensor) or condition.ndim != 2:
        raise SamplingError(f"{model.name}: is painted under embeddings (B, dim), as the condition")

    def network(x: Tensor, t: float, rows: slice, context: Tensor) -> Tensor:
        return model(x.to(model.device, model.dtype), torch.tensor(t, device=model.device), context[rows])

    contexts = model.context(condition.to(model.device, model.dtype))
    return _guided(
        model.name, model.unet, network, contexts, model.null_context(len(contexts)),
        model.about.guidance if guidance is None else guidance, model.scheduler,
        decode=model.decode, encode=model.encode, channels=model.channels, factor=model.factor,
        side=model.factor * model.window, device=model.device,
    )  # fmt: skip


def _pixels(model: Any, condition: Any, guidance: float | None) -> DiffusionModel:
    if guidance not in (None, 1, 1.0):
        raise SamplingError(f"{model.name}: a pixel diffusion has no classifier-free guidance")
    if (model.classes is None) != (condition is None):
        needs = "has no classes" if model.classes is None else f"needs a class, 0..{model.classes - 1}"
        raise SamplingError(f"{model.name} {needs}, got the condition {condition!r}")
    labels = torch.as_tensor([] if condition is None else condition, device=model.device).flatten()

    def network(x: Tensor, t: float, rows: slice, context: Tensor) -> Tensor:
        classes: dict[str, Any] = {} if condition is None else {"class_labels": context[rows]}
        return model.network(x.to(model.device, model.dtype), t, **classes).sample[:, : x.shape[1]]

    config: Mapping[str, Any] = model.scheduler or {}
    about = _guided(
        model.name, model.network, network, labels, labels, 1.0, config,
        decode=lambda x: x / 2 + 0.5, encode=lambda x: x * 2 - 1, channels=3, factor=1,
        side=int(model.network.config.sample_size or 256), device=model.device,
    )  # fmt: skip
    about.schedule = TableVP(model.alphas_cumprod.double().cpu().numpy())
    return about


def _guided(
    name: str,
    module: torch.nn.Module,
    network: Callable[[Tensor, float, slice, Tensor], Tensor],
    contexts: Tensor,
    null: Tensor,
    scale: float,
    config: Mapping[str, Any],
    **about: Any,
) -> DiffusionModel:
    """A model whose network runs on both conditions at once where it is guided."""

    def predict(x: Tensor, t: float, rows: slice) -> Tensor:
        if scale == 1 or not len(contexts):
            return network(x, t, rows, contexts).float().to(x)
        both = torch.cat([null[rows], contexts[rows]])
        away, towards = network(torch.cat([x, x]), t, slice(None), both).float().chunk(2)
        return (away + scale * (towards - away)).to(x)

    prediction, schedule = model_schedule(config)
    return DiffusionModel(name, module, predict, prediction, schedule, count=max(len(contexts), 1), **about)


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
    spacing: str = "trailing",
    timesteps: Sequence[int] | None = None,
    inherit: int = 1,
    branch: int = 0,
    batch_size: int = 8,
    device: str | torch.device = "auto",
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Samples:
    """Paint with a diffusion model.

    >>> sample("tiny", "a cat", sampler="ghvb", steps=8, order=1.8)  # doctest: +SKIP

    Args:
        model, condition, guidance, negative, device, dtype: see `diffusion_model`; a `DiffusionModel` as it is.
        sampler: a name of `SAMPLERS`, or "evodiff".
        steps: how many.
        seed: of the first noise and of what steps add; a sample does not depend on its batch.
        size: (H, W) of the images; as the model was trained where left out.
        spacing: where the timesteps lie, one of `GRIDS`.
        timesteps: these instead, of a search for example.
        inherit: every how many steps the whole U-Net runs (DeepCache); 1: always. It distorts below about 50 steps.
        branch: how deep the other steps go, see `InheritedFeatures`.
        batch_size: states that go through the network together.
        options: of the sampler.

    Raises:
        SamplingError: the sampler, its options or the size do not go with the model.
    """
    if not isinstance(model, DiffusionModel):
        model = diffusion_model(model, condition, guidance=guidance, negative=negative, device=device, dtype=dtype)
    if size is not None and not (isinstance(size, Sequence) and [type(side) for side in size] == [int, int]):
        raise SamplingError(f"size must be (height, width) in pixels, got {size!r}")
    height, width = size or (model.side, model.side)
    if height % model.factor or width % model.factor or min(height, width) < model.factor:
        raise SamplingError(f"{model.name}: sides must be multiples of {model.factor}, got {height} x {width}")
    if timesteps is not None:
        steps = len(timesteps)
    for name, number in (("steps", steps), ("batch_size", batch_size), ("inherit", inherit)):
        if not isinstance(number, int) or number < 1:
            raise SamplingError(f"{name} must be a whole number of at least 1, got {number!r}")
    table, shape = None, (model.channels, height // model.factor, width // model.factor)
    if sampler != "evodiff":
        table = build_table(sampler, model.schedule, steps, spacing=spacing, timesteps=timesteps, **options)
    elif options or not isinstance(model.schedule, TableVP):
        raise SamplingError("evodiff has no options, and works on tables of noise")
    calls, parts = 0, []
    for first in range(0, model.count, batch_size):
        rows = slice(first, min(first + batch_size, model.count))
        numbers = range(rows.start, rows.stop)
        with ExitStack() as stack:
            cache = None
            if inherit > 1:
                cache = stack.enter_context(InheritedFeatures(model.network, interval=inherit, branch=branch))

            network = _Counted(model, rows, cache)
            x = _step_noise(seed, numbers, shape, model.device, -1)
            if table is None:
                parts.append(_evodiff(model, network, x, steps, spacing, timesteps))
            else:
                draws = partial(_step_noise, seed, numbers, shape, model.device)
                parts.append(run(table, network, x, prediction=model.prediction, noise=draws))
            calls = network.calls
    latents = torch.cat(parts)
    images = torch.cat([model.decode(part).float() for part in latents.split(batch_size)]).clamp(0, 1).cpu()
    return Samples(images, latents.cpu(), calls)


class _Counted:
    """A model on some rows of its conditions; counts the steps of an image, which inherited features need."""

    def __init__(self, model: DiffusionModel, rows: slice, cache: InheritedFeatures | None) -> None:
        self.model, self.rows, self.cache, self.calls = model, rows, cache, 0

    def __call__(self, x: Tensor, t: float) -> Tensor:
        if self.cache is not None:
            self.cache.at(self.calls)
        self.calls += 1
        return self.model.predict(x, t, self.rows)


def _evodiff(
    model: DiffusionModel, network: Callable[..., Tensor], x: Tensor, steps: int, spacing: str, timesteps: Any
) -> Tensor:
    from diffrep.sampling.core import to_forms

    assert isinstance(model.schedule, TableVP)
    times = table_times(model.schedule, steps + 1, spacing) if timesteps is None else timesteps
    grid = TimeGrid.of(model.schedule, times)

    def clean(y: Tensor, t: float) -> Tensor:
        alpha, sigma = float(model.schedule.alpha(t)), float(model.schedule.sigma(t))
        return to_forms(model.prediction, network(y, t), y, alpha, sigma)["data"]

    return evodiff(clean, x, grid, denoise=True)


def _step_noise(seed: int, numbers: Sequence[int], shape: Sequence[int], device: torch.device, step: int) -> Tensor:
    """Each sample's noise of a step, -1 for the first state: it depends on the seed, its number and the step alone."""
    draws = [torch.randn(*shape, generator=keyed_generator(seed, n, stream=step + 1)) for n in numbers]
    return torch.stack(draws).to(device)
