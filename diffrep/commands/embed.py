"""``diffrep embed``: a heat-geodesic map of a table."""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from diffrep.commands.parsing import Command
from diffrep.manifold.files import EmbedConfig, embed_file


@dataclass(frozen=True)
class Embed(Command):
    """Draw a map of high-dimensional data that keeps its geodesic distances.

    Writes the picture and beside it the coordinates (.csv), the settings (.json) and a page to explore (.html); of an
    .h5ad file also its cells with the map in obsm["X_heat_geodesic"] (.h5ad).
    """

    file: Annotated[Path, tyro.conf.Positional]  # .npy, .npz, .csv, .tsv, .parquet, .h5ad, or a store of features
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("map.png")  # .png, .pdf or .svg
    json: bool = False  # print the settings and results as JSON
    config: Annotated[EmbedConfig, tyro.conf.OmitArgPrefixes] = field(default_factory=EmbedConfig)

    def run(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("always", UserWarning)
            warnings.showwarning = _one_line  # type: ignore[assignment]  # takes the place as it comes
            result = embed_file(self.file, self.output, self.config, progress=not self.json)
        if self.json:
            print(json.dumps(result.settings, indent=2))
        else:
            print("\n".join(f"wrote {path}" for path in result.files))


def _one_line(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
    """Show what was left out or guessed, without the place in our code."""
    print(f"diffrep embed: {message}", file=sys.stderr)
