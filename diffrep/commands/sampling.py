"""``diffrep sample|search-schedule|likelihood``: images of prompts, the best timesteps, how likely images are."""

from __future__ import annotations

import ast
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from diffrep.commands.options import BackboneOptions, Command, PrecisionOptions, ReportOptions
from diffrep.files import check_writable, number_of
from diffrep.training.fokker_planck import PotentialTraining

if TYPE_CHECKING:
    from torch import Tensor

    from diffrep.eval.search import SearchSettings


@dataclass(frozen=True, kw_only=True)
class Paint(BackboneOptions, PrecisionOptions):
    """Paint images of prompts side by side, with any model and any sampler.

    For example, in four steps: diffrep sample "a red fox" --model sd1.5 --lora lcm-lora-sdv1-5.safetensors --sampler
    lcm --steps 4. A model that was distilled as a whole (LCM) needs no --lora.
    """

    FIRST = "output model sampler steps guidance negative size seed lora label"

    prompt: Annotated[tuple[str, ...], tyro.conf.Positional] = ()  # one image of each; none: of the empty prompt
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("sample.png")  # the picture
    model: str = "tiny"  # a diffusion model: embedded, short name, folder, file or hub id
    label: int | None = None  # of a class-conditional ADM, DiT or SiT
    sampler: str = "unipc"  # one of diffrep.sampling's, such as unipc, dpm++, ddim, lcm
    steps: int = 20
    guidance: float | None = None  # the model's own where left out, with lcm none; 1: none
    negative: str = ""  # prompt that is guided away from
    size: tuple[int, int] | None = None  # height and width in pixels; as the model was trained where left out
    spacing: str | None = None  # where the timesteps lie; as the sampler wants them where left out
    schedule: Path | None = None  # what `diffrep search-schedule` wrote, in place of steps and spacing
    seed: int = 0  # of all noise
    options: tuple[str, ...] = ()  # of the sampler, as NAME=VALUE: order=3, eta=0.5, method=4rk
    inherit: int = 1  # every how many steps all of a U-Net runs; the others inherit its deep features (DeepCache)
    branch: int = 0  # how deep these others go: block times units a block, plus units of it
    depths: tuple[int, ...] = ()  # for each step how deep it goes, such a number (early exit: blocks), or -1: whole
    threshold: float | None = None  # early-exit networks: the estimated uncertainty at which an image leaves (DeeDiff)

    def run(self) -> None:
        from diffrep.painting import load_model, sample

        check_writable(self.output, (".png", ".jpg", ".webp"))
        if self.prompt and self.label is not None:
            raise ValueError("prompts and --label are conditions of two kinds of models: give one")
        if self.schedule and {"steps", "spacing"} & self.typed:
            raise ValueError("--schedule says the steps: leave --steps and --spacing out")
        model = load_model(self.named(self.model), **self.placed())
        guided = getattr(model, "guided", False)
        guidance = 1.0 if self.guidance is None and self.sampler == "lcm" and not guided else self.guidance
        partial = bool(self.inherit != 1 or self.depths or self.threshold is not None or self.schedule)
        painted = sample(
            model, self.prompt or self.label, sampler=self.sampler, steps=self.steps,
            seed=self.seed, guidance=guidance, negative=self.negative, size=self.size, spacing=self.spacing,
            timesteps=self.schedule, inherit=self.inherit, branch=self.branch, depths=self.depths,
            threshold=self.threshold, count_flops=partial, **sampler_options(self.options),
        )  # fmt: skip
        painted.save(self.output)
        counted = f", {painted.flops / 1e9:.3g} G operations" if painted.flops is not None else ""
        print(f"{number_of(painted.calls, 'call')} of the network for an image{counted}; wrote {self.output}")


def sampler_options(texts: Sequence[str]) -> dict[str, Any]:
    """NAME=VALUE as arguments: numbers and words.

    Raises:
        ValueError: one is not of that form.

    >>> sampler_options(["order=1.8", "method=4rk"])
    {'order': 1.8, 'method': '4rk'}
    """
    values = dict[str, Any]()
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise ValueError(f"an option of a sampler is written NAME=VALUE, for example order=3, got {text!r}")
        try:
            values[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            values[name] = value
    return values


@dataclass(frozen=True, kw_only=True)
class SearchSchedule(PrecisionOptions):
    """Find the timesteps at which a sampler comes nearest to a fine solution, by an evolutionary search.

    For example: diffrep search-schedule --model tiny-synthesis --steps 5 -o steps.json

    Orders of the solver and units of the network that a step leaves out are searched for where asked. Commands that
    paint take the result with --schedule, and those that read features what --fitness pck or probe finds. An
    interrupted search goes on when the same command is run again.
    """

    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("steps.json")  # the result, and what was evaluated
    model: str = "tiny-synthesis"  # or the folder of a synthesis model, a Stable Diffusion, a flow or an ADM
    sampler: str = "unipc"  # whose steps they are
    steps: int = 5  # timesteps to find
    prompt: tuple[str, ...] = ()  # of a model with a text encoder; "a photograph" where left out
    label: int | None = None  # of a class-conditional ADM
    # of a synthesis model: held-out scenes whose embeddings are painted; with fid, images of any model; else 4
    count: int | None = None
    guidance: float | None = None  # the model's own where left out; 1: none
    # what is made smaller: the distance to a fine solution; FID to its images, which takes a --count of hundreds; or,
    # of one tap and timestep of a backbone, its wrong keypoints or classes times the share of operations
    fitness: Literal["distance", "fid", "pck", "probe"] = "distance"
    features: str = "tiny-dino@class"  # fid: its feature space; inception:FILE and open_clip models too
    real: Path | None = None  # fid: a folder of images to compare with in place of the fine solution's
    per_category: int = 2  # pck, probe: rendered pairs, or scenes, of each category
    orders: int = 0  # highest order of the solver's steps to search for; 0: the sampler's own
    skip: float = 0.0  # largest share of the network's units that a step may leave out; 0: none are
    cost: float = 0.5  # with --skip, pck and probe: the fitness counts times the share of operations to this power
    reference: int = 50  # steps of UniPC that stand for the fine solution
    population: int = 20  # candidates of a generation
    epochs: int = 5  # generations
    seed: int = 0  # of the search and of the noise

    def run(self) -> None:
        from diffrep.backbones.partial import skippable_units
        from diffrep.eval.samplers import distance_to_fine, guided_models
        from diffrep.eval.search import search_steps
        from diffrep.sampling.samplers import build_table, named_sampler, sampling_grid
        from diffrep.sampling.schedules import Flow, TableVP
        from diffrep.searched import Candidate

        check_writable(self.output, (".json",))
        if self.fitness != "fid" and (clash := sorted(self.typed & {"features", "real"})):
            raise ValueError(f"--{clash[0]} goes with --fitness fid")
        if self.fitness in ("pck", "probe"):
            return self._features()
        named_sampler(self.sampler)
        if self.steps < 1 or self.reference <= self.steps:
            raise ValueError(
                f"steps must be at least 1 and fewer than the reference's {self.reference}, got {self.steps}"
            )
        settings, fid = self._settings(orders=self.orders, skip_share=self.skip), self.fitness == "fid"
        models = guided_models(
            self.model, self.guidance, prompts=self.prompt, label=self.label, count=self.count, repeated=fid,
            **self.placed(),
        )  # fmt: skip
        model = models["1"] if self.guidance == 1 else list(models.values())[-1]
        schedule, total = model.schedule, 1001  # timesteps of flows are 1000 sigma
        if isinstance(schedule, Flow):
            schedule = schedule.of_tokens((model.side // model.factor) ** 2 // 4)
        elif isinstance(schedule, TableVP):
            total = len(schedule.table)
        # a sampler may be refused where a schedule has little signal; one that cannot take steps below has none at all
        order: dict[str, Any] = {"order": (self.orders,) * self.steps} if self.orders else {}
        below = [0.6 * (total - 1) * (1 - i / self.steps) for i in range(self.steps)]
        build_table(self.sampler, schedule, self.steps, timesteps=below, **order)
        if self.skip:
            settings = replace(settings, layers=len(skippable_units(model.network)), skip_after=0)
        cost = self.cost if self.skip else 0.0
        fitness = distance_to_fine(
            model, self.sampler, self.steps, self.reference, seed=self.seed, cost=cost,
            features=self.features if fid else None, real=self._real(model.side),
        )  # fmt: skip
        usual = Candidate(tuple(int(t) for t in sampling_grid(schedule, self.steps).labels))
        of = {
            "fitness": self.fitness, "sampler": self.sampler, "model": self.model, "prompt": self.prompt,
            "label": self.label, "count": self.count or 4, "guidance": self.guidance, "reference": self.reference,
            "cost": cost, **({"features": self.features, "real": self.real and str(self.real)} if fid else {}),
        }  # fmt: skip
        least, found = search_steps(
            fitness, self.steps, total=total, settings=settings, file=self.output, first=[usual],
            of=of, facts=model.facts(), progress=_print_generation,
        )[0]  # fmt: skip
        if math.isinf(least):
            raise ValueError(f"{self.sampler} works at none of the steps that were tried: give a larger --population")
        even = fitness(None)
        orders = f", orders {', '.join(map(str, found.orders))}" if found.orders else ""
        skipped = f", {number_of(sum(map(len, found.skipped)), 'unit')} left out" if found.skipped else ""
        timesteps = ", ".join(map(str, found.timesteps)) + orders + skipped
        print(
            f"{number_of(self.steps, 'step')} of {self.sampler}: {least:.4f} at {timesteps}; {even:.4f} at even steps"
        )
        print(f"wrote {self.output}")

    def _settings(self, **more: Any) -> SearchSettings:
        from diffrep.eval.search import SearchSettings

        return SearchSettings(
            population=self.population, parents=max(self.population // 5, 1), mutations=self.population // 2,
            crossovers=self.population // 4, epochs=self.epochs, seed=self.seed, **more,
        )  # fmt: skip

    def _real(self, side: int) -> Tensor | None:
        """The images that FID compares with, squashed to squares of a side."""
        if self.real is None:
            return None
        import torch

        from diffrep.images import Sizing, find_images, fit_image, load_image

        files = find_images([self.real])
        return torch.stack([fit_image(load_image(file), Sizing("squash", side))[0] for file in files])

    def _features(self) -> None:
        from diffrep.backbones import load_backbone
        from diffrep.backbones.diffusion import DiffusionBackbone
        from diffrep.eval.search import extraction_fitness, search_steps
        from diffrep.painting import backbone_facts
        from diffrep.searched import Candidate

        if clash := sorted(self.typed & {"sampler", "steps", "prompt", "label", "count", "guidance", "orders", "skip"}):
            raise ValueError(
                f"--fitness {self.fitness} searches one tap and timestep; --{clash[0]} does not go with it"
            )
        model = "tiny" if "model" not in self.typed else self.model
        backbone = load_backbone(model, **self.placed())
        if not isinstance(backbone, DiffusionBackbone):
            raise ValueError(f"{self.model}: has no timesteps to search; give a diffusion backbone")
        settings = self._settings(taps=tuple(tap.name for tap in backbone.taps()))
        measure: Any = self.fitness
        fitness = extraction_fitness(backbone, measure, count=self.per_category, cost=self.cost, seed=self.seed)
        usual = Candidate((backbone.recommended.conditions.timestep,), taps=backbone.recommended.taps[:1])
        of = {"fitness": self.fitness, "model": model, "cost": self.cost, "per_category": self.per_category}
        least, found = search_steps(
            fitness, 1, total=len(backbone.alphas_cumprod), settings=settings, file=self.output, first=[usual], of=of,
            facts=backbone_facts(backbone), progress=_print_generation,
        )[0]  # fmt: skip
        (tap,), (timestep,) = found.taps, found.timesteps
        print(
            f"{backbone.name}: {least:.4f} at tap {tap}, timestep {timestep}; {fitness(usual):.4f} at the"
            f" recommended {usual.taps[0]}, {usual.timesteps[0]}"
        )
        print(f"wrote {self.output}")


def _print_generation(epoch: int, value: float) -> None:
    print(f"generation {epoch + 1}: {value:.4f}")


@dataclass(frozen=True, kw_only=True)
class Likelihood(PrecisionOptions):
    """How likely a diffusion model finds images, in bits per dimension: high ones are unusual to it, or damaged.

    For example: diffrep likelihood photos/ --backbone tiny -o bits.csv

    By the probability-flow ODE with Hutchinson's estimate of the divergence. Of latent models it is the density of the
    latents, which compares images with each other and is no code length.
    """

    images: Annotated[tuple[Path, ...], tyro.conf.Positional]  # images, or folders of them
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("likelihood.csv")  # a table of file and bits
    backbone: str = "tiny"  # a Stable Diffusion 1 or 2, or an ADM: name, folder or file
    size: int | None = None  # side of the square canvas in pixels; that of the model's training where left out
    prompt: str = ""  # of a Stable Diffusion
    label: int | None = None  # of a class-conditional ADM
    tolerance: float = 1e-3  # of the ODE solver, relative and absolute
    schedule: Path | None = None  # what `diffrep search-schedule` wrote: Heun's steps there, in place of adaptive ones
    probes: int = 1  # random probes of the divergence; their mean is taken
    seed: int = 0  # of the probes

    def run(self) -> None:
        import sys

        from diffrep.commands.image_runs import ImageRun
        from diffrep.eval.likelihood import image_likelihood
        from diffrep.files import printable, write_whole
        from diffrep.images import find_images
        from diffrep.results import csv_text

        check_writable(self.output, (".csv",))
        if not 0 < self.tolerance < 1 or self.probes < 1 or (self.size is not None and self.size < 1):
            raise ValueError("tolerance must be between 0 and 1, probes and size at least 1")
        if self.schedule is not None and "tolerance" in self.typed:
            raise ValueError("--schedule says the solver's steps: leave --tolerance out")
        files = find_images(self.images)
        run = ImageRun(len(files), "likelihood")
        bits = image_likelihood(
            files, self.backbone, prompt=self.prompt, label=self.label, size=self.size, tolerance=self.tolerance,
            probes=self.probes, seed=self.seed, timesteps=self.schedule, **self.placed(),
            skip=lambda file, error: run.fail(str(file), error),
        )  # fmt: skip
        rows = [("image", "bits_per_dimension")]
        with run.bar:
            for file, value in bits:
                rows.append((printable(file), f"{value:.5f}"))
                run.bar.write(f"{value:9.4f}  {printable(file)}", file=sys.stdout)
                run.bar.update()
        if len(run.failed) < len(files):
            write_whole(self.output, csv_text(rows))
            print(f"wrote {self.output}")
        run.check()


@dataclass(frozen=True, kw_only=True)
class FewStep(ReportOptions):
    """Paint the same patches with a teacher in 20, 4, 2 and 1 steps and with distilled models in 4, 2 and 1.

    For example: diffrep eval fewstep runs/fewstep/model
    """

    models: Annotated[tuple[str, ...], tyro.conf.Positional] = ()  # folders of `diffrep train fewstep`
    teacher: str = "tiny-synthesis"  # embedded model or folder
    patches: int = 256  # painted by each
    seed: int = 0

    def run(self) -> None:
        from diffrep.eval.few_step import compare_few_step
        from diffrep.settings import check_options
        from diffrep.synthesis import load_synthesis

        check_options(self, patches="2..", seed="[0, 2^20)")
        self.check_output()
        students = {name: load_synthesis(name) for name in self.models}
        self.show(compare_few_step(load_synthesis(self.teacher), students, patches=self.patches, seed=self.seed))


@dataclass(frozen=True, kw_only=True)
class TrainPotential(Command):
    """Train a small score model of two-dimensional data with Fokker-Planck regularisation, and print its ablation.

    For example: diffrep train potential --weight 0.001 --steps 2000 -o potential.safetensors

    A small residual bounds how far samples of the ODE and of the SDE are apart (Deveney et al. 2023). A search over
    weights of 1e-4 to 0.1 found none that brings them nearer on every seed; from 0.01 on both leave the data. The
    ablation that is printed shows it. No gain for images is known.
    """

    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("potential.safetensors")  # the trained weights
    training: Annotated[PotentialTraining, tyro.conf.OmitArgPrefixes] = field(default_factory=PotentialTraining)

    def run(self) -> None:
        from diffrep.files import save_weights
        from diffrep.training.fokker_planck import ablation, train_potential

        check_writable(self.output, (".safetensors",))
        print(f"{'':12}{'residual':>10}{'ODE-SDE':>10}{'ODE-data':>10}{'SDE-data':>10}   (W2)")
        for name, *values in ablation(self.training):
            print(f"{name:12}" + "".join(f"{value:10.4f}" for value in values))
        weights = train_potential(self.training).state_dict()
        save_weights(self.output, weights)
        print(f"wrote {self.output}")
