"""The command line: ``diffrep COMMAND``.

Each command is a frozen dataclass with a `run` method, in its own module under `diffrep.commands`; its fields
are the options. Only the module of the command that was asked for is imported.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

COMMANDS = {  # name -> (module:class, one line of help); "eval depth" is the command `depth` of the group `eval`
    "demo": ("demo:Demo", "run everything on bundled images and write one page with pictures"),
    "app": ("app:App", "a page in the browser to click on: matches, depth, masks, search"),
    "match": ("match:Match", "point at places in one image, get the same places in another"),
    "extract": ("extract:Extract", "extract a collection of images into a store of features"),
    "swap": ("match:Swap", "give the object in one image the looks of another"),
    "index": ("extract:Index", "make the features of stores searchable"),
    "query": ("extract:Query", "find images, or places in them, that look like yours"),
    "search": ("extract:Search", "find images in a folder, or places in them, that look like yours, in one step"),
    "synthesize": ("synthesize:Synthesize", "paint an image of any size that looks like a reference"),
    "sample": ("sampling:Paint", "paint images of prompts with any model and sampler"),
    "search-schedule": ("sampling:SearchSchedule", "the best timesteps of a sampler on a model"),
    "likelihood": ("sampling:Likelihood", "how likely a diffusion model finds images, in bits"),
    "convert": ("convert:Convert", "turn a published synthesis checkpoint into a diffusers folder"),
    "probe": ("", "train a head on frozen features, use it, or find the best block"),
    "probe train": ("probe:Train", "a classifier of images on features of one block"),
    "probe feedback": ("probe:TrainFeedback", "a classifier on several blocks with feedback (DifFeed)"),
    "probe pixels": ("probe_maps:TrainPixels", "labels of pixels from a few annotated images (DDPM-seg)"),
    "probe dense": ("probe_maps:TrainDense", "depth or normals from frozen maps (probe3d)"),
    "probe predict": ("probe:Predict", "use a trained probe of any kind"),
    "probe sweep": ("probe:SweepCells", "which block, which timestep: a probe for every cell, a heat map"),
    "depth": ("predict:Depth", "how far away everything in an image is: maps, point clouds"),
    "normals": ("predict:Normals", "how the surfaces in an image are turned"),
    "segment": ("predict:Segment", "cut the object out of an image: masks, edges, cut-outs"),
    "restore": ("restore:Restore", "make photographs clean and large, in one step"),
    "embed": ("embed:Embed", "draw a heat-geodesic map of high-dimensional data"),
    "eval": ("", "run a benchmark and print its table"),
    "eval scenes": ("evaluate:Scenes", "parts of held-out rendered objects, matched"),
    "eval homography": ("evaluate:Homography", "points of photographs, matched in views of them"),
    "eval correspondence": ("evaluate:EvalCorrespondence", "SPair-71k, PF-PASCAL, TSS and others"),
    "eval guidance": ("evaluate_guidance:EvalGuidance", "posterior samplers on four measurements"),
    "eval completion": ("evaluate_guidance:EvalCompletion", "depth of scenes completed from some known depths"),
    "eval depth": ("evaluate:EvalDepth", "depth of a head on rendered scenes or a benchmark"),
    "eval normals": ("evaluate:EvalNormals", "surface normals of a head on rendered scenes or a benchmark"),
    "eval segmentation": ("evaluate:EvalSegmentation", "masks of a head on rendered scenes or DIS5K"),
    "eval restoration": ("restore:EvalRestoration", "restored test sets: PSNR, SSIM, measures of looks"),
    "eval depth-ablation": ("evaluate:EvalAblation", "Lotus's ablation in small: nine trainings compared"),
    "eval joint": ("evaluate_guidance:EvalJoint", "one U-Net for depth, normals and masks beside three"),
    "eval samplers": ("evaluate:Samplers", "solvers on one model at equal numbers of network calls"),
    "eval synthesis": ("evaluate:Synthesis", "painted images: FID, seams, embedding consistency"),
    "eval fewstep": ("sampling:FewStep", "distilled painters in 1, 2 and 4 steps beside their teacher"),
    "eval probes": ("probe:EvalProbes", "probes of frozen features beside the papers' numbers"),
    "eval manifold": ("embed:Manifold", "embeddings of toy data with known distances"),
    "eval interpolation": ("embed:Interpolation", "missing time points of a series, interpolated"),
    "train": ("", "train the embedded models again, or heads of your own"),
    "train tiny": ("train:TrainTiny", "the embedded backbones, from rendered scenes alone"),
    "train depth": ("train_heads:TrainDepth", "a one-step depth or disparity head"),
    "train normals": ("train_heads:TrainNormals", "a one-step head of surface normals"),
    "train segmentation": ("train_heads:TrainSegmentation", "a one-step head of masks and edges"),
    "train restore": ("train_heads:TrainRestore", "a one-step restorer of degraded images"),
    "train synthesis": ("train:TrainSynthesis", "a painter of patches from embeddings"),
    "train fewstep": ("train:TrainFewStep", "a painter that needs one to four steps"),
    "train early-exit": ("train:TrainEarlyExit", "a painter whose images leave the network early (DeeDiff)"),
    "train potential": ("sampling:TrainPotential", "a score of points in the plane, with Fokker-Planck regularisation"),
    "train prior": ("train:TrainPrior", "a model that draws embeddings from texts or labels"),
    "export": ("convert:Export", "write a backbone up to a tap, or a head, as ONNX or torch.export"),
    "info": ("info:Info", "list backbones, or the taps of one"),
}

_TERMINATED = 128 + signal.SIGTERM
_BROKEN_PIPE = 128 + 13  # as if the signal SIGPIPE had ended the program


def usage(group: str = "") -> str:
    """The text of ``diffrep --help``, or of ``diffrep GROUP --help``."""
    names = _members(group)
    width = max(map(len, names))
    program = f"diffrep {group}".strip()
    return "\n".join(
        [
            f"usage: {program} COMMAND [options]",
            "",
            f"{COMMANDS[group][1]}:" if group else "Diffusion models as vision backbones.",
            "",
            *(f"  {name:<{width}}  {COMMANDS[f'{group} {name}'.strip()][1]}" for name in names),
            "",
            f"`{program} COMMAND --help` explains a command"
            + ("." if group else ", `diffrep --version` prints the version.")
            + " With `--traceback` an error shows where it comes from.",
            "",
            "A command ends with 0; with 2 where an option is wrong or an input cannot be used (of many, after the",
            "others are done); with 1 where diffrep itself is at fault.",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code: 0; 2 on bad input, of many inputs after the others are done, and 1 on an unexpected error, each
        with one line on stderr; 130 on Ctrl-C, 143
        when terminated, 141 when nobody reads the output any more. ``--traceback`` shows where an error comes from.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):  # closed: no file shall take its number
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115  # for the whole process
    for stream in (sys.stdout, sys.stderr):  # a file's name may hold what the terminal's encoding does not
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    # read when torch is loaded: threads that spin while they wait make small networks ten times slower where other
    # processes want their cores
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    show_traceback = "--traceback" in arguments
    arguments = [argument for argument in arguments if argument != "--traceback"]
    name = " ".join(["diffrep", *arguments[: _depth(arguments)]])
    try:
        with _termination():
            code = _run(arguments)
            sys.stdout.flush()
            return code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # what is still buffered would raise again when Python flushes it at its end
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    except Exception as error:  # the last handler: no error of any kind may reach a user as a traceback
        if show_traceback:
            traceback.print_exc()
        print(f"{name}: {error_line(error)}", file=sys.stderr)
        return 2 if _expected(error) else 1


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "--help-all", "help"):
        print(usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        import diffrep

        print(f"diffrep {diffrep.__version__}")
        return 0
    depth = _depth(arguments)
    name, rest = " ".join(arguments[:depth]), arguments[depth:]
    if name not in COMMANDS or not COMMANDS[name][0]:  # a group without a command, or no command at all
        group = name if name in COMMANDS else ""
        if group and rest and rest[0] in ("-h", "--help", "--help-all"):
            print(usage(group))
            return 0
        if group and not rest:
            raise ValueError(f"say which: {', '.join(_members(group))}")
        word = rest[0] if group else arguments[0]
        from diffrep.settings import near_names

        names = near_names(word, _members(group)) or f"commands: {', '.join(_members(group))}"
        raise ValueError(f"there is no command {word!r}; {names}")
    from diffrep.commands.options import refuse_replaced
    from diffrep.commands.parsing import help_text, read_command, values_of
    from diffrep.commands.stand_ins import without_libraries

    upto = rest.index("--") if "--" in rest else len(rest)
    if {"-h", "--help", "--help-all"} & set(rest[:upto]):
        with without_libraries():
            print(help_text(command_kind(name), f"diffrep {name}", everything="--help-all" in rest))
        return 0
    command = read_command(command_kind(name), rest, f"diffrep {name}")
    if devices := values_of(command, "device") - {"auto"}:  # before `run`, which may render scenes first
        from diffrep.devices import resolve_device

        for device in devices:
            resolve_device(device)
    refuse_replaced(command)
    command.run()
    return 0


def command_kind(name: str) -> Any:
    """The class of a command of the table; its module is imported."""
    module, _, attribute = COMMANDS[name][0].partition(":")
    module = module if module.startswith("diffrep.") else f"diffrep.commands.{module}"
    return getattr(importlib.import_module(module), attribute)


def _members(group: str) -> list[str]:
    """The commands of a group, or all commands and groups."""
    if group:
        return [name.removeprefix(f"{group} ") for name in COMMANDS if name.startswith(f"{group} ")]
    return [name for name in COMMANDS if " " not in name]


def _depth(arguments: Sequence[str]) -> int:
    """How many words name the command: 2 for ``eval depth``, else 1; 0 where there is none."""
    if " ".join(arguments[:2]) in COMMANDS and len(arguments) > 1:
        return 2
    return 1 if arguments and arguments[0] in COMMANDS else 0


def _expected(error: Exception) -> bool:
    """The error is one of the input, not of the program."""
    return isinstance(error, (ValueError, OSError, ImportError)) and not isinstance(error, UnicodeError)


def error_line(error: Exception) -> str:
    """An error in one line."""
    if isinstance(error, MemoryError):
        return "out of memory"
    from diffrep.files import words_of

    text = words_of(error)
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        text = " ".join(f"{error.filename}: {error.strerror}".split())
    return (
        text
        if _expected(error) and text
        else f"{type(error).__name__}: {text or 'no message'}; --traceback shows where"
    )


@contextlib.contextmanager
def _termination() -> Iterator[None]:
    """Let SIGTERM end the command as Ctrl-C does, so that what is half written is removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    process = os.getpid()

    def terminate(number: int, frame: object) -> None:
        if os.getpid() != process:  # a worker that was forked from here
            os._exit(_TERMINATED)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise SystemExit(_TERMINATED)

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)


if __name__ == "__main__":
    sys.exit(main())
