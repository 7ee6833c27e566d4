"""``python -m diffrep.eval.benchmarks NAME``: run one benchmark."""

from __future__ import annotations

import importlib
import sys

import tyro

BENCHMARKS = {  # name -> module, one line
    "features": ("networks", "extraction against a plain full forward pass with hooks"),
    "bulk": ("matching", "images per second from files to a store, and indexes of up to a million vectors"),
    "start": ("start", "from process start to picture against scripts that call the libraries: import, load, compute"),
    "segmentation": ("networks", "the official pass for mask and edge against ours, both maps and the mask alone"),
    "matching": ("matching", "matching and joint PCA against one product, loops and full-resolution features"),
    "manifold": ("manifold", "heat-geodesic embedding against PHATE, UMAP and Isomap over n"),
    "synthesis": ("synthesis", "large images: speed and memory against area, the official loop against ours"),
    "samplers": ("samplers", "steps of solvers against diffusers' schedulers, without a network"),
    "probes": ("probes", "a cached grid of probes against the released loop; a grid on a million features"),
    "gpu": ("gpu", "all of it at full size on a CUDA device, in bfloat16, and the tests that need one"),
    "peer": ("peer", "the real code of DIFT, Lotus or HeatGeo in a checkout of yours, --peer FOLDER, against ours"),
    "restoration": ("restoration", "the released one-step restoration against ours: time, tiles, memory against area"),
    "depth": ("networks", "one-step heads against the official sequence of calls"),
    "heads": ("heads", "a folder of photographs to maps on disk: share of the bare network's images per second"),
}


def main(arguments: list[str]) -> int:
    """Run the benchmark that the first argument names; the others are its settings."""
    if not arguments or arguments[0] not in BENCHMARKS:
        lines = [f"  {name:<12} {text}" for name, (_, text) in BENCHMARKS.items()]
        print("\n".join(["usage: python -m diffrep.eval.benchmarks NAME [options]", *lines]), file=sys.stderr)
        return 2
    name, *options = arguments
    module = importlib.import_module(f"diffrep.eval.benchmarks.{BENCHMARKS[name][0]}")
    chosen = tyro.cli(
        getattr(module, f"{name.capitalize()}Benchmark"), args=options, prog=f"diffrep.eval.benchmarks {name}"
    )
    try:
        chosen.run()
    except ValueError as error:
        print(f"diffrep.eval.benchmarks {name}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
