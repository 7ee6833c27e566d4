"""``diffrep embed``: a heat-geodesic map of a table."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from diffrep.manifold.files import EmbedConfig, embed_file


@dataclass(frozen=True)
class Embed:
    """Draw a map of high-dimensional data that keeps its geodesic distances.

    Writes the picture and beside it the coordinates (.csv), the settings (.json) and a page to explore (.html).
    """

    file: Annotated[Path, tyro.conf.Positional]  # .npy, .npz, .csv, .tsv, .parquet, .h5ad, or a store of features
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("map.png")  # .png, .pdf or .svg
    json: bool = False  # print the settings and results as JSON
    config: Annotated[EmbedConfig, tyro.conf.OmitArgPrefixes] = field(default_factory=EmbedConfig)

    def run(self) -> None:
        result = embed_file(self.file, self.output, self.config, progress=not self.json)
        if self.json:
            print(json.dumps(result.settings, indent=2))
        else:
            print("\n".join(f"wrote {path}" for path in result.files))
