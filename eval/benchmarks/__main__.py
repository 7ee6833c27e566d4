"""``python -m diffrep.eval.benchmarks NAME``: run one benchmark."""

from __future__ import annotations

import importlib
import sys

import tyro

BENCHMARKS = {  # name, which is also that of its module -> one line
    "features": "extraction against a plain full forward pass with hooks",
    "bulk": "images per second from files to a store, and indexes of up to a million vectors",
    "segmentation": "the official pass for mask and edge against ours, both maps and the mask alone",
    "matching": "matching and joint PCA against one product, loops and full-resolution features",
    "manifold": "heat-geodesic embedding against PHATE, UMAP and Isomap over n",
    "synthesis": "large images: speed and memory against area, the official loop against ours",
    "probes": "a cached grid of probes against the released loop; a grid on a million features in little memory",
    "depth": "one-step heads against the official sequence of calls",
}


def main(arguments: list[str]) -> int:
    """Run the benchmark that the first argument names; the others are its settings."""
    if not arguments or arguments[0] not in BENCHMARKS:
        lines = [f"  {name:<10} {text}" for name, text in BENCHMARKS.items()]
        print("\n".join(["usage: python -m diffrep.eval.benchmarks NAME [options]", *lines]), file=sys.stderr)
        return 2
    module = importlib.import_module(f"diffrep.eval.benchmarks.{arguments[0]}")
    kind = getattr(module, f"{arguments[0].capitalize()}Benchmark")
    tyro.cli(kind, args=arguments[1:], prog=f"diffrep.eval.benchmarks {arguments[0]}").run()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
