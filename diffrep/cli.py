"""The command line: ``diffrep COMMAND``.

Each command is a frozen dataclass with a `run` method, in its own module under `diffrep.commands`; its fields
are the options. Only the module of the command that was asked for is imported.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Sequence

COMMANDS = {  # name -> (module:class, one line of help)
    "demo": ("diffrep.commands.demo:Demo", "run everything on bundled images and write one page with pictures"),
    "match": ("diffrep.commands.match:Match", "point at places in one image, get the same places in another"),
    "extract": ("diffrep.commands.extract:Extract", "extract a collection of images into a store of features"),
    "swap": ("diffrep.commands.swap:Swap", "give the object in one image the looks of another"),
    "index": ("diffrep.commands.index:Index", "make the features of stores searchable"),
    "query": ("diffrep.commands.query:Query", "find images, or places in them, that look like yours"),
    "synthesize": ("diffrep.commands.synthesize:Synthesize", "paint an image of any size that looks like a reference"),
    "convert": ("diffrep.commands.convert:Convert", "turn a published synthesis checkpoint into a diffusers folder"),
    "probe": ("diffrep.commands.probe:ProbeCommand", "train a head on frozen features, use it, or find the best block"),
    "depth": ("diffrep.commands.depth:Depth", "how far away everything in an image is: maps, point clouds"),
    "normals": ("diffrep.commands.normals:Normals", "how the surfaces in an image are turned"),
    "segment": ("diffrep.commands.segment:Segment", "cut the object out of an image: masks, edges, cut-outs"),
    "embed": ("diffrep.commands.embed:Embed", "draw a heat-geodesic map of high-dimensional data"),
    "eval": ("diffrep.commands.evaluate:Evaluate", "run a benchmark and print its table"),
    "train": ("diffrep.commands.train:Train", "train the embedded models again"),
    "info": ("diffrep.commands.info:Info", "list backbones, or the taps of one"),
}


def usage() -> str:
    """The text of ``diffrep --help``."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: diffrep COMMAND [options]",
            "",
            "Diffusion models as vision backbones.",
            "",
            *lines,
            "",
            "`diffrep COMMAND --help` explains a command, `diffrep --version` prints the version.",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, 2 on bad input (with one line on stderr), 130 on Ctrl-C."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        import diffrep

        print(f"diffrep {diffrep.__version__}")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=2) or list(COMMANDS)
        print(f"diffrep: there is no command {name!r}; near names: {', '.join(near)}", file=sys.stderr)
        return 2
    # read when torch is loaded: threads that spin while they wait make small networks ten times slower where other
    # processes want their cores
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    import tyro

    module, _, attribute = COMMANDS[name][0].partition(":")
    try:
        kind = getattr(importlib.import_module(module), attribute)
        command = tyro.cli(kind, args=rest, prog=f"diffrep {name}")
        command.run()
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, ImportError) as error:
        print(f"diffrep {name}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
