"""Few steps instead of many: consistency distillation of a latent diffusion model, and of its guidance.

Latent consistency models (arXiv 2310.04378) and their LoRA form (2311.05556); with noise in the teacher's step the
solver of SCott (2403.01505); the first stage of "On distillation of guided diffusion models" (2210.03142). BOOT
(2306.05544) is left out: of its loss neither the weight nor the form of the step is certain, and there is no code.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from diffrep.backbones.latent_diffusion import guidance_embedding
from diffrep.devices import resolve_device
from diffrep.files import claim_folder
from diffrep.sampling.core import PREDICTIONS
from diffrep.sampling.schedules import boundary
from diffrep.settings import NOT_NEGATIVE, POSITIVE, check
from diffrep.synthesis import SynthesisModel, load_synthesis
from diffrep.synthesis.grids import ImageEncoder
from diffrep.training.loop import Batch, FitSettings, fit
from diffrep.training.patches import PatchSource, encode_patches

Network: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""(latents, timesteps (B,), context, guidance scales minus one (B,) or None) -> the raw output."""


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """What a student learns of its teacher."""

    method: Literal["consistency", "guidance"] = "consistency"  # jumps along the path; or the guided estimate alone
    ddim_steps: int = 50  # of the teacher's path
    w_min: float = 5.0  # guidance scales that are drawn, minus one
    w_max: float = 15.0  # the largest of them
    eta: float = 0.0  # noise in the teacher's step: 0 is DDIM (LCM), 1 its most random form (SCott)
    loss: Literal["huber", "l2"] = "huber"  # of a student's estimate against its average's
    huber_c: float = 0.001  # where the Huber loss turns from square to linear
    raw_noise: bool = False  # take the raw output for the noise whatever it is, as the released script does

    def __post_init__(self) -> None:
        check(self, ddim_steps="2..1000", w_min=NOT_NEGATIVE, w_max=NOT_NEGATIVE, eta="[0, 1]", huber_c=POSITIVE)
        if self.w_min > self.w_max:
            raise ValueError(f"w_min must not be above w_max, got {self.w_min} and {self.w_max}")


@dataclass(frozen=True)
class DiffusionPath:
    """A noise schedule (T,), and what the network predicts on it: a name of `PREDICTIONS`."""

    alphas_cumprod: Tensor
    predicts: str

    def teacher_steps(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """(count,) each: timesteps of even DDIM steps, the signal (alphas_cumprod) at them and one step before."""
        timesteps = torch.arange(1, count + 1) * (len(self.alphas_cumprod) // count) - 1
        alphas = self.alphas_cumprod[timesteps.to(self.alphas_cumprod.device)]
        return timesteps, alphas, torch.cat([self.alphas_cumprod[:1], alphas[:-1]])

    def levels(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Shares of signal and noise, (B, 1, 1, 1)."""
        alphas = self.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        return alphas.sqrt(), (1 - alphas).sqrt()

    def forms(self, output: Tensor, noisy: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """The noise in z_t and x0."""
        return PREDICTIONS[self.predicts](output, noisy, *self.levels(timesteps))  # type: ignore[arg-type]

    def consistent(
        self, network: Network, noisy: Tensor, timesteps: Tensor, context: Tensor, w: Tensor | None
    ) -> Tensor:
        """f(z, t): the end of the path through z."""
        skip, out = (c.view(-1, 1, 1, 1).to(noisy) for c in boundary(timesteps))
        return skip * noisy + out * self.forms(network(noisy, timesteps, context, w), noisy, timesteps)[1]


def distillation_terms(
    path: DiffusionPath,
    student: Network,
    target: Network,
    teacher: Network,
    batch: tuple[Tensor, Tensor, Tensor],
    draws: tuple[Tensor, Tensor, Tensor],
    settings: Distillation,
    *,
    conditioned: bool,
    more: Tensor | None = None,
) -> dict[str, Tensor]:
    """One step of distillation: the loss, and what it compares.

    Args:
        target: the student's moving average, or the student itself.
        batch: clean latents (B, c, h, w), their context, and the null context.
        draws: indices of the teacher's steps (B,), uniform numbers (B,) for the guidance, noise (B, c, h, w).
        conditioned: the student is told the guidance scale.
        more: normal noise of the teacher's step, where eta is above 0.

    Returns:
        "noisy", "w" (B, 1, 1, 1), "model_pred", "x_prev", "target", and "loss".
    """
    (latents, context, null), (index, uniform, noise) = batch, draws
    timesteps, *alphas = path.teacher_steps(settings.ddim_steps)
    start = timesteps.to(latents.device)[index]
    end = (start - len(path.alphas_cumprod) // settings.ddim_steps).clamp(min=0)
    now, before = (values.to(latents)[index].view(-1, 1, 1, 1) for values in alphas)
    signal, spread = path.levels(start)
    noisy = signal * latents + spread * noise
    w = settings.w_min + (settings.w_max - settings.w_min) * uniform
    scales, column = (w if conditioned else None), w.view(-1, 1, 1, 1)
    with torch.no_grad():
        outputs = [teacher(noisy, start, text, None) for text in (context, null)]
        forms = [path.forms(output, noisy, start) for output in outputs]
        read = outputs if settings.raw_noise else [noise for noise, _ in forms]
        epsilon, guided = (a + column * (a - b) for a, b in (read, [clean for _, clean in forms]))
        sigma = settings.eta * ((1 - before) / (1 - now)).sqrt() * (1 - now / before).clamp(min=0).sqrt()
        previous = before.sqrt() * guided + (1 - before - sigma**2).sqrt() * epsilon
        previous = previous if more is None else previous + sigma * more
        jumps = settings.method == "consistency"
        wanted = path.consistent(target, previous, end, context, scales) if jumps else guided
    if jumps:
        predicted = path.consistent(student, noisy, start, context, scales)
        off, c = (predicted.float() - wanted.float()).square(), settings.huber_c
        loss = off.mean() if settings.loss == "l2" else ((off + c**2).sqrt() - c).mean()
    else:  # weighted as in section 3 of the paper: by the ratio of signal to noise, at least 1
        _, predicted = path.forms(student(noisy, start, context, scales), noisy, start)
        loss = ((now / (1 - now)).clamp(min=1) * (predicted.float() - wanted.float()).square()).mean()
    return {"noisy": noisy, "w": column, "model_pred": predicted, "x_prev": previous, "target": wanted, "loss": loss}


COND_DIM = 256  # numbers that a U-Net is told a guidance scale by


@dataclass(frozen=True, kw_only=True)
class FewStepTraining:
    """A synthesis model that paints in a few steps, from one that paints in many."""

    base: str = "tiny-synthesis"  # embedded model or folder: the teacher, and where the student starts
    distillation: Distillation = field(default_factory=lambda: Distillation(w_min=3.0, w_max=3.0))
    conditioned: bool = False  # the student is told the guidance scale; it is written with `guidance`
    guidance: float = 2.0  # of the model that is written, where it was told scales
    batch_size: int = 64
    fit: FitSettings = field(
        default_factory=lambda: FitSettings(steps=4000, learning_rate=2e-4, weight_decay=0.0, ema_decay=0.95, seed=41)
    )

    def __post_init__(self) -> None:
        check(self, batch_size="1..", guidance="[1, 20]")
        if not self.conditioned and self.distillation.w_min != self.distillation.w_max:
            raise ValueError("a student that is not told the guidance scale learns one: set w_min and w_max to it")


class FewStepUNet(nn.Module):
    """A U-Net in distillation."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, latents: Tensor, timesteps: Tensor, context: Tensor, w: Tensor | None = None) -> Tensor:
        scales = None if w is None else guidance_embedding(w, self.unet.config.time_cond_proj_dim).to(latents)
        return self.unet(latents, timesteps, encoder_hidden_states=context, timestep_cond=scales).sample


def told_guidance(unet: Any) -> Any:
    """A copy of a U-Net with an input for the guidance scale, which changes nothing yet."""
    wider = type(unet).from_config(unet.config, time_cond_proj_dim=COND_DIM).to(unet.device)
    wider.load_state_dict(unet.state_dict(), strict=False)
    nn.init.zeros_(wider.time_embedding.cond_proj.weight)
    return wider


@torch.no_grad()
def fold_guidance(unet: Any, w: float) -> Any:
    """A U-Net that is told a guidance scale -> a plain one that always has heard `w`."""
    plain = type(unet).from_config({**unet.config, "time_cond_proj_dim": None}).to(unet.device)
    weights = unet.state_dict()
    projection = weights.pop("time_embedding.cond_proj.weight")
    heard = projection @ guidance_embedding(torch.tensor([w]), projection.shape[1])[0].to(projection)
    weights["time_embedding.linear_1.bias"] += weights["time_embedding.linear_1.weight"] @ heard
    plain.load_state_dict(weights)
    return plain


def train_few_step(
    training: FewStepTraining, patches: PatchSource, folder: Path, *, device: str = "auto", progress: bool = True
) -> SynthesisModel:
    """Distil a synthesis model. Called again with the same folder, it goes on where it was.

    Returns:
        A model of the base's kind that needs no guidance; sample it with the scheduler "lcm" and guidance 1 (after the
        method "guidance" with any scheduler).

    Raises:
        ValueError: settings that do not go together, or a folder of another run.
    """
    settings = {key: value for key, value in asdict(training).items() if key != "fit"}  # `fit` checks its own
    place = resolve_device(device)
    model = load_synthesis(training.base).to(place)
    claim_folder(folder, settings, name="training.json")
    latents, embeddings = encode_patches(
        patches, model, ImageEncoder.of_model(model), folder / "patches.safetensors", seed=training.fit.seed,
        progress=progress,
    )  # fmt: skip
    latents, embeddings = latents.to(place), embeddings.to(place)
    model.requires_grad_(False)
    path = DiffusionPath(model.alphas_cumprod.to(place), model.scheduler.get("prediction_type", "epsilon"))
    teacher = FewStepUNet(copy.deepcopy(model.unet)).eval()
    unet = told_guidance(model.unet) if training.conditioned else copy.deepcopy(model.unet)
    student = FewStepUNet(unet.float()).requires_grad_(True)

    def batches(generator: torch.Generator) -> Batch:
        count = training.batch_size
        rows = torch.randint(len(latents), (count,), generator=generator).to(place)
        batch = {
            "latents": latents[rows].float(),
            "embeddings": embeddings[rows].float(),
            "index": torch.randint(training.distillation.ddim_steps, (count,), generator=generator),
            "uniform": torch.rand(count, generator=generator),
            "noise": torch.randn(count, *latents.shape[1:], generator=generator),
        }
        if training.distillation.eta:
            batch["more"] = torch.randn(count, *latents.shape[1:], generator=generator)
        return batch

    def losses(module: nn.Module, ema: FewStepUNet, batch: Batch) -> Mapping[str, Tensor]:
        with torch.no_grad():
            context = model.context(batch["embeddings"])
            null = model.null_context(len(context))
        terms = distillation_terms(
            path, module, ema if training.fit.ema_decay else module, teacher,
            (batch["latents"], context, null), (batch["index"], batch["uniform"], batch["noise"]),
            training.distillation, conditioned=training.conditioned, more=batch.get("more"),
        )  # fmt: skip
        return {"loss": terms["loss"]}

    average = fit(student, batches, losses, training.fit, folder, device=place, progress=progress)
    trained = (average if training.fit.ema_decay else student).unet
    if training.conditioned:
        trained = fold_guidance(trained, training.guidance - 1)
    model.unet = trained
    model.about = replace(model.about, guidance=1.0)
    return model.eval().requires_grad_(False)
