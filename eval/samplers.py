"""``diffrep eval samplers``: solvers on one model at equal numbers of network calls."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffrep.backbones.early_exit import EarlyExitUViT
from diffrep.eval.painted import frechet_distance, load_features
from diffrep.eval.report import Report, Section, read_tables
from diffrep.files import number_of
from diffrep.painting import DiffusionModel, Samples, diffusion_model, load_model, sample
from diffrep.sampling.samplers import ALIASES, SAMPLERS, build_table
from diffrep.sampling.schedules import Flow, SamplingError
from diffrep.searched import Candidate, as_candidate
from diffrep.settings import check
from diffrep.synthesis.grids import ImageEncoder
from diffrep.synthesis.model import SynthesisModel

if TYPE_CHECKING:
    from PIL import Image

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {  # further rows: sampler and options. LML's kappa 0 does nothing
    "dpm++ of order 3": ("dpm++", {"order": 3}),
    "lml, kappa 0.3": ("lml", {"kappa": 0.3}),
}


@dataclass(frozen=True)
class SamplersEvaluation:
    """What is compared.

    Attributes:
        calls: network calls of a sample, each a column.
        samplers: names, of `SAMPLERS` or `VARIANTS`; none: all deterministic ones that work with the model.
        spacing: where the timesteps lie.
        schedule: what a search wrote: its steps are a further column, empty for samplers that cannot take them.
        fid: feature spaces of FID, see `load_features`; it needs many images.
        reference: steps of UniPC that stand for the fine solution.
    """

    calls: tuple[int, ...] = (3, 5, 8, 12, 20)
    samplers: tuple[str, ...] = ()
    spacing: str = "trailing"
    reference: int = 125
    schedule: Path | None = None  # what `diffrep search-schedule` wrote: a further column, at its steps
    fid: tuple[str, ...] = ()  # FID to the fine images in these feature spaces: tiny-dino@class, inception:FILE
    seed: int = 0

    def __post_init__(self) -> None:
        check(self)
        if not self.calls or min(self.calls) < 1 or self.reference <= max(self.calls):
            raise ValueError(
                f"calls must be at least 1 and fewer than the reference's, got {self.calls} and {self.reference}"
            )
        known = {**SAMPLERS, **VARIANTS, **ALIASES}
        if unknown := [name for name in self.samplers if name not in known]:
            raise ValueError(f"there is no sampler {', '.join(unknown)}; known are {', '.join(known)}")


@dataclass(frozen=True)
class PublishedSampler:
    """FID of a sampler on a model, at the calls `PUBLISHED_CALLS`."""

    model: str
    sampler: str
    fid: tuple[float, ...]


PUBLISHED_CALLS = (3, 5, 7, 10)


@dataclass(frozen=True)
class SamplersReport(Report):
    """Root mean square distances to the fine solution, by (guidance, sampler) and calls; and why some have none."""

    model: str
    settings: SamplersEvaluation
    distances: Mapping[str, Mapping[str, Mapping[int, float]]]  # guidance -> sampler -> calls -> distance
    seconds: Mapping[str, float]  # of the machine alone at the most calls, without the network
    refused: Mapping[str, str]
    spread: float  # standard deviation of the fine solution's latents, which the distances are to be seen against
    fid: Mapping[str, Mapping[str, Mapping[str, Mapping[int, float]]]] = field(default_factory=dict)  # by feature space
    searched: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # guidance -> sampler -> distance
    pictures: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict, repr=False)  # guidance -> sampler -> row

    def sections(self) -> Iterable[Section]:
        fine = f"UniPC with {number_of(self.settings.reference, 'step')} (deviation {self.spread:.2f})"
        for guidance, rows in self.distances.items():
            ranked = sorted(rows, key=lambda name: rows[name].get(self.settings.calls[-1], float("inf")))
            yield Section(
                f"{self.model}, guidance {guidance}: distance of the latents to {fine}, by network calls",
                [*(str(n) for n in self.settings.calls), *(["searched"] if self.searched else []), "ms/step"],
                [
                    (name, *self._cells(rows[name]), *self._found(guidance, name), f"{1000 * self.seconds[name]:.2f}")
                    for name in ranked
                ],
            )
            for space, tables in self.fid.items():
                yield Section(
                    f"{self.model}, guidance {guidance}: FID to the images of {fine}, in {space}, by network calls",
                    [str(n) for n in self.settings.calls],
                    [(name, *self._cells(tables[guidance][name], 2)) for name in ranked],
                )
        yield Section("", notes=[f"  {name}: {why}" for name, why in self.refused.items()])
        yield Section(
            "published FID, other models, by network calls (README of USF)",
            [str(n) for n in PUBLISHED_CALLS],
            [
                (f"{row.model}, {row.sampler}", *(f"{value:g}" for value in row.fid))
                for row in read_tables("samplers", PublishedSampler)
            ],
        )

    def _cells(self, row: Mapping[int, float], digits: int = 3) -> list[str]:
        return [f"{row[n]:.{digits}f}" if n in row else "-" for n in self.settings.calls]

    def _found(self, guidance: str, name: str) -> list[str]:
        """The cell of the searched steps, where there are any."""
        if not self.searched:
            return []
        value = self.searched[guidance].get(name)
        return ["-" if value is None else f"{value:.3f}"]

    def picture(self) -> Image.Image:
        """The first image by each sampler (rows, as in the table; the last the fine solution) and calls (columns)."""
        from diffrep.pictures import image_grid

        rows = {
            f"{name}, guidance {guidance}": row
            for guidance, rows in self.pictures.items()
            for name, row in rows.items()
        }
        return image_grid([*rows.values()], captions=[*rows])

    def document(self) -> Mapping[str, object]:
        return {
            "model": self.model,
            "settings": {**vars(self.settings), "schedule": self.settings.schedule and str(self.settings.schedule)},
            "distances": self.distances,
            "seconds_per_step": self.seconds,
            "refused": self.refused,
            "spread": self.spread,
            "fid": self.fid,
            "searched": self.searched,
        }


def evaluate_samplers(
    models: Mapping[str, DiffusionModel], settings: SamplersEvaluation | None = None
) -> SamplersReport:
    """Compare samplers on a model.

    Args:
        models: by the guidance's name, the model under its conditions; all paint the same noise.
    """
    settings = settings or SamplersEvaluation()
    spaces = {name: load_features(name) for name in settings.fid}
    candidate = as_candidate(settings.schedule)
    distances: dict[str, dict[str, dict[int, float]]] = {}
    fid: dict[str, Any] = {space: {guidance: {} for guidance in models} for space in spaces}
    searched: dict[str, dict[str, float]] = {}
    pictures: dict[str, dict[str, Tensor]] = {}
    refused: dict[str, str] = {}
    seconds: dict[str, float] = {}
    spread = 0.0
    for guidance, model in models.items():
        fine = sample(model, sampler="unipc", steps=settings.reference, seed=settings.seed)
        spread, distances[guidance], shown = float(fine.latents.std()), {}, dict[str, Tensor]()
        searched |= {} if candidate is None else {guidance: {}}
        for name in settings.samplers or _usual(model):
            rows: dict[int, Samples] = {}
            for calls in settings.calls:
                try:
                    rows[calls] = _paint(model, name, calls, settings)
                except SamplingError as error:
                    refused[name] = str(error)
            if not rows:
                continue
            distances[guidance][name] = {calls: _distance(got, fine) for calls, got in rows.items()}
            seconds[name] = _overhead(model, name, max(rows), settings)
            for space, features in spaces.items():
                fid[space][guidance][name] = {
                    calls: frechet_distance(fine.images, got.images, features) for calls, got in rows.items()
                }
            blank = torch.ones_like(fine.images[0])
            shown[name] = torch.stack([rows[n].images[0] if n in rows else blank for n in settings.calls])
            if candidate is not None:
                candidate = candidate.for_model(model.name, model.facts)
                try:
                    sampler, options = VARIANTS.get(name, (name, {}))
                    got = sample(model, sampler=sampler, timesteps=candidate, seed=settings.seed, **options)
                    searched[guidance][name] = _distance(got, fine)
                except SamplingError as error:
                    refused[f"{name} at the searched steps"] = str(error)
        last = {name: row.get(settings.calls[-1], math.inf) for name, row in distances[guidance].items()}
        pictures[guidance] = {name: shown[name] for name in sorted(shown, key=lambda name: last[name])}
        pictures[guidance]["fine solution"] = fine.images[:1].expand(len(settings.calls), -1, -1, -1)
    name = next(iter(models.values())).name
    return SamplersReport(name, settings, distances, seconds, refused, spread, fid, searched, pictures)


def _distance(got: Samples, fine: Samples) -> float:
    return float((got.latents - fine.latents).square().mean().sqrt())


def distance_to_fine(
    model: DiffusionModel, sampler: str, steps: int, reference: int, *, seed: int = 0, cost: float = 0.0,
    features: str | None = None, real: Tensor | None = None,
) -> Callable[[Candidate | None], float]:  # fmt: skip
    """A fitness of timesteps for `search_steps`: the distance of what a sampler paints to a fine solution.

    Args:
        steps: how many even steps stand for None.
        reference: steps of UniPC that stand for the fine solution.
        cost: the distance counts times the share of the whole network's operations to this power.
        features: a space of `load_features`, in which the distance is FID; None: that of the latents.
        real: (N, 3, H, W) in [0, 1], what FID compares with in place of the fine solution's images.

    Raises:
        SamplingError: the model paints fewer than two images, which FID needs.
    """
    if features and model.count < 2:
        raise SamplingError(f"{model.name}: FID needs at least 2 images, got the conditions of {model.count}")
    space = load_features(features) if features else None
    fine = sample(model, sampler="unipc", steps=reference, seed=seed)
    whole = sample(model, sampler=sampler, steps=steps, seed=seed, count_flops=True).flops if cost else None

    def fitness(candidate: Candidate | None) -> float:
        try:
            got = sample(
                model, sampler=sampler, steps=steps, timesteps=candidate, seed=seed, count_flops=bool(whole)
            )  # fmt: skip
        except SamplingError:  # it diverges, or begins where no signal is left
            return math.inf
        share = (got.flops or 0) / whole if whole else 1.0
        if space is None:
            return _distance(got, fine) * share**cost
        return frechet_distance(fine.images if real is None else real, got.images, space) * share**cost

    return fitness


def _usual(model: DiffusionModel) -> Sequence[str]:
    flow = isinstance(model.schedule, Flow)
    usual = [name for name, s in SAMPLERS.items() if (s.flow if flow else s.table) and not _adds_noise(name)]
    return [*usual, *VARIANTS]


def _adds_noise(name: str) -> bool:
    options = SAMPLERS[name].options
    return name == "lcm" or bool(options.get("eta") or options.get("noisy") or {"norm", "noise_scale"} & set(options))


def _paint(model: DiffusionModel, name: str, calls: int, settings: SamplersEvaluation) -> Samples:
    """What is painted after as many network calls."""
    sampler, options = VARIANTS.get(name, (name, {}))
    options, steps = {"spacing": settings.spacing, **options}, calls
    while steps > 1 and build_table(sampler, model.schedule, steps, **options).grid.steps > calls:  # several a step
        steps -= 1
    return sample(model, sampler=sampler, steps=steps, seed=settings.seed, **options)


def _overhead(model: DiffusionModel, name: str, calls: int, settings: SamplersEvaluation) -> float:
    """Seconds of a step beside the network."""
    idle = replace(model, predict=lambda x, t, rows: 0.1 * x, decode=lambda x: x[:, :3])
    start = time.perf_counter()
    _paint(idle, name, calls, settings)
    return (time.perf_counter() - start) / calls


def guided_models(
    name: str,
    guidance: float | None,
    *,
    prompts: Sequence[str] = (),
    label: int | None = None,
    count: int | None = None,
    repeated: bool = False,
    device: str | torch.device = "auto",
    dtype: torch.dtype = torch.float32,
) -> dict[str, DiffusionModel]:
    """A model without and with guidance, by its words; pixel models have none.

    Args:
        guidance: scale of the second; the model's own, or 7.5, where None.
        prompts: of a model with a text encoder; "a photograph" where there are none.
        label: of a class-conditional model.
        count: of a synthesis model, how many embeddings of held-out scenes; 4 where None.
        repeated: prompts, the label, or no condition at all, again and again up to `count` images.

    Raises:
        BackboneError: the model cannot be loaded, or takes no such condition.
        SamplingError: it has no use for one of these.
    """
    from diffrep.backbones import PixelDiffusion
    from diffrep.eval.synthesis import held_out_images

    if count is not None and count < 1:
        raise SamplingError(f"count must be at least 1, got {count}")
    model = load_model(name, device=device, dtype=dtype)
    scenes, pixels = isinstance(model, SynthesisModel), isinstance(model, (PixelDiffusion, EarlyExitUViT))
    unused = {
        "prompts": bool(prompts) and (scenes or label is not None),
        "label": label is not None and scenes,
        "count": count is not None and not (scenes or repeated),
        "guidance": guidance not in (None, 1) and pixels,
    }
    if any(unused.values()):
        raise SamplingError(f"{name}: has no use for {next(word for word in unused if unused[word])} here")
    count = 4 if count is None else count
    condition: Any = None
    if isinstance(model, SynthesisModel):
        condition = ImageEncoder.of_model(model)(held_out_images(count, model.window * model.factor, first=0))
        guidance = model.about.guidance if guidance is None else guidance
    elif label is not None or prompts or "prompt" in getattr(model, "takes", ()):
        each = [label] if label is not None else list(prompts) or ["a photograph"]
        condition = [each[i % len(each)] for i in range(max(count if repeated else 1, len(each)))]
    models = {"1": diffusion_model(model, condition, guidance=1.0)}
    if condition is None:
        models["1"].count = count if repeated else 1
    if not pixels:
        scale = 7.5 if guidance is None else guidance
        models[f"{scale:g}"] = diffusion_model(model, condition, guidance=scale)
    return models
