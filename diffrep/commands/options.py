"""Options that several commands share. A command inherits the groups that it needs."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, TypedDict

import tyro

from diffrep.commands.parsing import Command, options_of, value_of
from diffrep.files import check_folder, check_replaceable, check_writable, number_of, write_whole

if TYPE_CHECKING:
    import torch

    from diffrep.backbones import Backbone

__all__ = [
    "BackboneOptions",
    "Command",
    "DeviceOptions",
    "PrecisionOptions",
    "ReadingOptions",
    "ReportOptions",
    "WeightOptions",
    "numbers",
    "refuse_failed",
    "refuse_idle",
    "refuse_unused",
    "training_output",
]


_WRITTEN = ("output", "picture", "sheet", "plot")  # what commands call the files that they write


class DeviceAndType(TypedDict):
    """Two arguments that go together."""

    device: torch.device
    dtype: torch.dtype


@dataclass(frozen=True, kw_only=True)
class DeviceOptions(Command):
    """Where the networks run."""

    device: str = "auto"  # where the networks run: auto, cpu, cuda, cuda:N or mps


@dataclass(frozen=True, kw_only=True)
class PrecisionOptions(DeviceOptions):
    """Where the networks run, and in which numbers."""

    # floating point numbers of the networks; auto: bfloat16 on CUDA, float32 elsewhere; float16 is for GPUs
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"

    def placed(self) -> DeviceAndType:
        """`resolved`, as the arguments of what loads a network."""
        device, dtype = self.resolved()
        return {"device": device, "dtype": dtype}

    def resolved(self) -> tuple[torch.device, torch.dtype]:
        """The device and the floating point type, as `diffrep.devices` has them.

        Raises:
            DeviceError: this machine does not have the device; or it is the CPU, and the type one that it has no
                convolutions for: PyTorch computes them in float16 about a hundred times slower than in float32.
        """
        from diffrep.devices import DeviceError, resolve_device, resolve_dtype

        device = resolve_device(self.device)
        if self.precision == "float16" and device.type == "cpu":
            raise DeviceError(
                "--precision float16 is for GPUs: on the CPU it takes many times as long as float32; take bfloat16,"
                " which needs as little memory, or leave --precision out"
            )
        return device, resolve_dtype(self.precision, device)


@dataclass(frozen=True, kw_only=True)
class WeightOptions(Command):
    """Which files of a model are loaded."""

    variant: str | None = None  # of its weight files, for example fp16, where there are several
    revision: str | None = None  # of a model on the hub: branch, tag or commit


@dataclass(frozen=True, kw_only=True)
class BackboneOptions(WeightOptions):
    """What a backbone is loaded with."""

    lora: tyro.conf.UseAppendAction[tuple[str, ...]] = ()  # LoRA file to add to its weights, FILE or FILE:SCALE

    def named(self, backbone: str) -> str:
        """The backbone's name with these options, for `load_backbone`."""
        from diffrep.backbones.repositories import with_options

        return with_options(backbone, lora=self.lora, variant=self.variant, revision=self.revision)

    def named_alone(self, backbones: Sequence[str]) -> tuple[str, ...]:
        """Backbones' names with these options, which one alone takes.

        Raises:
            ValueError: there are options, but none or several backbones.
        """
        if (self.lora or self.variant or self.revision) and len(set(backbones)) != 1:
            raise ValueError(
                "--lora, --variant and --revision go with one --backbone; with several they stand behind a model's"
                " name: 'NAME?lora=FILE'"
            )
        return tuple(map(self.named, backbones))


@dataclass(frozen=True, kw_only=True)
class ReadingOptions(BackboneOptions):
    """A backbone, and where features are read in it."""

    schedule: Path | None = None  # what `search-schedule --fitness pck` (or probe) wrote: the tap and the timestep

    def place(self, typed: frozenset[str], backbone: Backbone | None = None) -> dict[str, Any]:
        """The tap and the timestep of a search, as settings of `ExtractConfig`; none where there is no file.

        Args:
            typed: the options on the command line.
            backbone: that is read, where it is known.

        Raises:
            ValueError: the file is of another search or another kind of backbone, this one has no noise, or a tap or
                timestep was typed too.
        """
        if self.schedule is None:
            return {}
        from diffrep.searched import read_place

        names = {option.rpartition(".")[2] for option in typed}
        if clash := sorted(names & {"taps", "timestep", "timesteps", "clean"}):
            raise ValueError(f"--schedule says the tap and the timestep: leave --{clash[0]} out")
        if backbone is not None and backbone.denoises is None:
            raise ValueError(f"--schedule is for diffusion models, {backbone.name} is none")
        place = read_place(self.schedule)
        if backbone is not None:
            from diffrep.painting import backbone_facts

            place.for_model(backbone.name, lambda: backbone_facts(backbone))
        return {"taps": place.taps, "timestep": int(place.timesteps[0])}


CONDITIONS = {  # settings of conditions -> what they are for
    **dict.fromkeys(("timestep", "clean", "ensemble"), "diffusion models"),
    "prompt": "models with a text encoder",
    "posterior": "diffusion models of latents",
    **dict.fromkeys(("noise", "inversion_steps", "freeu"), "U-Nets of latents"),
    "label": "class-conditional models",
    "discard": "diffusion transformers",
}


def typed_conditions(typed: frozenset[str]) -> list[str]:
    """The settings of conditions among the options that were typed, in the order of `CONDITIONS`."""
    names = {option.removeprefix("extract.").partition(".")[0] for option in typed if option.startswith("extract.")}
    return [name for name in CONDITIONS if name in names]


def refuse_conditions(typed: frozenset[str], backbones: Sequence[Backbone]) -> None:
    """Refuse settings of conditions that none of the networks takes.

    Raises:
        ValueError: the message names the option and the backbones.
    """
    for name in typed_conditions(typed):
        if not any(name in backbone.takes for backbone in backbones):
            names = " and ".join(backbone.name for backbone in backbones)
            raise ValueError(f"--{name.replace('_', '-')} is for {CONDITIONS[name]}, not for {names}")


FORMS = {  # what numbers stand for -> how they are written
    "point": "x,y in pixels, for example 120,80",
    "box": "x0,y0,x1,y1 in pixels, for example 20,20,90,80",
    "intrinsics": "fx,fy,cx,cy in pixels",
}


def numbers(text: str, what: str) -> tuple[float, ...]:
    """The numbers of one of `FORMS`.

    Raises:
        ValueError: they are not written so.
    """
    form = FORMS[what]
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) != form.partition(" ")[0].count(",") + 1:
        raise ValueError(f"cannot read the {what} {text!r}: write {form}")
    return values


class Printable(Protocol):
    """A report of an evaluation or a benchmark."""

    def table(self) -> str: ...

    def to_json(self) -> str: ...


@dataclass(frozen=True, kw_only=True)
class ReportOptions(Command):
    """Where a report goes."""

    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None  # also write the report as this JSON file
    json: bool = False  # print JSON instead of the table

    def check_output(self) -> None:
        """Refuse an output that cannot be written, before any work is done for it.

        Raises:
            ValueError: its ending is not .json, or it is a folder.
            OSError: its folder cannot be written to.
        """
        if self.output is not None:
            check_writable(self.output, (".json",))

    def show(self, report: Printable) -> None:
        """Print a report and write it where it was asked for."""
        if self.output is not None:
            write_whole(self.output, report.to_json() + "\n")
        print(report.to_json() if self.json else report.table())


def training_output(work: Path, output: Path | None, name: str = "model") -> Path:
    """Where a training's result goes, WORK/NAME where no output is named, after both folders have been checked.

    Raises:
        ValueError, OSError: one is a file, cannot be written to, or holds what must not be replaced.
    """
    output = output or work / name
    check_folder(work)
    check_replaceable(output)
    return output


def refuse_replaced(command: Command) -> None:
    """Refuse to write over a file that the same command line names to be read.

    Raises:
        ValueError: naming the file.
    """
    values = [value_of(command, option) for option in options_of(type(command)) if option.field not in _WRITTEN]
    words = [word for value in values for word in (value if isinstance(value, tuple) else (value,))]
    read = [word for word in words if isinstance(word, (str, Path)) and os.path.isfile(word)]
    refuse_same_files(read, [path for name in _WRITTEN if (path := getattr(command, name, None)) is not None])


def refuse_same_files(paths: Iterable[str | Path], others: Iterable[str | Path]) -> None:
    """Refuse that one file is among both, those that are read and those that are written, whichever they are.

    Raises:
        ValueError: naming the file as it is in `paths`.
    """
    taken = {os.path.realpath(path) for path in others}
    for path in paths:
        if os.path.realpath(path) in taken:
            raise ValueError(f"{path}: is a file to be read, which would be written over: choose another -o")


def refuse_failed(failed: Sequence[str], count: int, unit: str = "image") -> None:
    """End a command in which some of many inputs failed, after all that is left has been done.

    Args:
        failed: what failed and why, each in one line.
        count: of all inputs.

    Raises:
        ValueError: one failed; the message names the first three.
    """
    if failed:
        more = f"; and {len(failed) - 3} more, named above" if len(failed) > 3 else ""
        share = "" if count == 1 else f"{len(failed)} of {number_of(count, unit)} failed: "
        raise ValueError(f"{share}{'; '.join(failed[:3])}{more}")


def refuse_unused(typed: frozenset[str], benchmark: str, unused: Mapping[str, frozenset[str]]) -> None:
    """Refuse options that were typed and that a benchmark does not take.

    Args:
        unused: benchmark -> such options; those of rendered scenes belong to the benchmark "scenes" alone.

    Raises:
        ValueError: naming one.
    """
    names = typed & unused.get(benchmark, frozenset())
    if benchmark != "scenes":
        names |= {name for name in typed if name.startswith("scenes.")}
    if names:
        name = min(names).removeprefix("scenes.").replace("_", "-")
        raise ValueError(f"benchmark {benchmark} takes no --{name}")


_BATCHES = ("balanced", "fit.learning_rates", "fit.recipe.", "fit.batch_size")
_TAKEN_BY: dict[str, tuple[str, ...]] = {  # head -> how the options of training and shape begin that it has a use for
    "linear": ("balanced", "fit.grid."),
    "logistic": ("balanced", "fit.inverse_penalties"),
    "mlp": (*_BATCHES, "shape.hidden"),
    "cnn": (*_BATCHES, "shape.width"),
    "attention": (*_BATCHES, "shape.width", "shape.heads", "shape.ratio", "shape.depth", "shape.norm"),
    "knn": ("fit.ks", "shape.temperature"),
}
_ELSEWHERE = {  # option that another one sets
    "fit.grid.seed": "seed",
    "fit.grid.balanced": "balanced",
    "fit.recipe.learning_rate": "fit.learning-rates",
}


def refuse_idle(typed: frozenset[str], head: str) -> None:
    """Refuse options of a probe that were typed and that its head has no use for.

    Raises:
        ValueError: naming one, and the option that takes its place where there is one.
    """
    for option in sorted(typed):
        name = option.replace("_", "-")
        if option in _ELSEWHERE:
            raise ValueError(f"--{name} is --{_ELSEWHERE[option]} here")
        ours = option.startswith(("fit.", "shape.")) or option == "balanced"
        if ours and not option.startswith(_TAKEN_BY[head]):
            raise ValueError(f"--head {head} takes no --{name}")
