"""Ours against a peer's real code: a checkout that you have is imported, timed in turns with ours, and left as it is.

Nothing of a peer is in this package. These entry points are assumed, as of the public repositories in 2024 and 2025:

=========  ==========================  ============================================================================
DIFT       ``src/models/dift_sd.py``   ``SDFeaturizer(sd_id).forward(img, prompt, t, up_ft_index, ensemble_size)``
Lotus      ``pipeline.py``             ``LotusDPipeline.from_pretrained(folder)``, called with ``rgb_in``, ``task_emb``
HeatGeo    ``heatgeo/embedding.py``    ``HeatGeo(knn=5).fit_transform(points)``
=========  ==========================  ============================================================================

DIFT moves its networks to CUDA by itself, so it runs where there is one. sd-dino is recognised and refused: its
extractor runs inside ODISE (Detectron2, a compiled operator), which no checkout of it brings along, and reads ODISE's
checkpoint, of which no folder can be made that ours loads too. `matching` restates its loops and its joint PCA.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.spatial.distance import pdist, squareform
from torch import Tensor

from diffrep.eval.benchmarks.timing import Row, interleave, table
from diffrep.files import one_line
from diffrep.settings import check

TAP, TIMESTEP = 1, 261  # of DIFT's defaults


@dataclass(frozen=True)
class PeerBenchmark:
    """Time a peer's checkout in turns with ours, on the same weights and inputs."""

    peer: Path  # the checkout
    model: str = ""  # folder of the weights that both load: a diffusers folder for DIFT, a Lotus-D for Lotus
    sizes: tuple[int, ...] = (500, 1000)  # HeatGeo: numbers of points
    side: int = 512  # DIFT and Lotus: of the image, pixels
    ensemble: int = 8  # DIFT
    repeats: int = 5
    device: str = "cpu"

    def __post_init__(self) -> None:
        check(self)

    def run(self) -> list[Row]:
        """Time both sides, print the table and return its rows.

        Raises:
            ValueError: the folder is no checkout of a known peer, weights are missing, or its code fails.
        """
        torch.set_num_threads(1)
        name, claims = self._recognised()
        if name != "HeatGeo" and not self.model:
            raise ValueError(f"{name} needs the weights that both sides load: --model FOLDER")
        rows = []
        with importing_from(self.peer):
            try:
                for claim, theirs, ours, equality in claims():
                    times = interleave({"plain": theirs, "ours": ours}, repeats=self.repeats, device=self.device)
                    rows.append(Row(f"{name}, {claim}", times["plain"], times["ours"], equality()))
            except Exception as error:  # whatever their code raises, here or in the versions that are installed
                kind = type(error).__name__
                raise ValueError(f"{self.peer}: the checkout of {name} failed: {kind}: {one_line(error)}") from error
        print(table(rows))
        return rows

    def _recognised(self) -> tuple[str, Callable[[], Iterator[Any]]]:
        known = {
            "src/models/dift_sd.py": ("DIFT", self._dift),
            "heatgeo/embedding.py": ("HeatGeo", self._heatgeo),
            "pipeline.py": ("Lotus", self._lotus),
        }
        for file, found in known.items():
            if (self.peer / file).is_file():
                return found
        if (self.peer / "extractor_sd.py").is_file():
            raise ValueError(f"{self.peer}: is sd-dino, whose extractor needs ODISE: it cannot be timed here")
        raise ValueError(f"{self.peer}: is no checkout of a known peer: expected one of {', '.join(known)}")

    def _dift(self) -> Iterator[Any]:
        from diffrep.backbones import Conditions, load_backbone

        featurizer = importlib.import_module("src.models.dift_sd").SDFeaturizer(self.model)
        backbone = load_backbone(self.model, device=self.device, dtype=torch.float32)
        pixels = torch.rand(1, 3, self.side, self.side, generator=torch.Generator().manual_seed(0))
        conditions = Conditions(timestep=TIMESTEP, ensemble=self.ensemble, posterior="sample")
        named = {"prompt": "", "t": TIMESTEP, "up_ft_index": TAP, "ensemble_size": self.ensemble}

        def theirs() -> Tensor:
            return featurizer.forward(pixels[0] * 2 - 1, **named)

        def ours() -> Tensor:
            return backbone.maps(pixels, [f"up.{TAP}"], conditions)[f"up.{TAP}"]

        def equality() -> str:  # its noise is drawn from the global generator: the maps are alike, not equal
            one, other = (maps.float().cpu().flatten() for maps in (theirs(), ours()))
            return f"cosine of the maps, noise drawn anew: {float(torch.cosine_similarity(one, other, dim=0)):.3f}"

        yield f"up_ft_index {TAP}, ensemble of {self.ensemble}, {self.side} px", theirs, ours, equality

    def _lotus(self) -> Iterator[Any]:
        from diffrep.heads.loading import load_head

        pipe = importlib.import_module("pipeline").LotusDPipeline.from_pretrained(self.model).to(self.device)
        head = load_head(self.model, device=self.device, dtype=torch.float32)
        generator = torch.Generator().manual_seed(0)
        image = torch.randint(0, 256, (self.side, self.side, 3), generator=generator, dtype=torch.uint8).numpy()
        pixels = torch.from_numpy(image).permute(2, 0, 1)[None] / 127.5 - 1
        switch = torch.tensor([[1.0, 0.0]])
        task = torch.cat([torch.sin(switch), torch.cos(switch)], dim=-1).to(self.device)
        named = {"prompt": "", "num_inference_steps": 1, "timesteps": [999], "output_type": "np", "task_emb": task}

        def theirs() -> Any:
            return pipe(rgb_in=pixels.to(self.device), **named).images[0].mean(axis=-1)

        def ours() -> Any:
            return head(image, size=0, official=True).values.numpy()

        def equality() -> str:
            return f"largest difference of the maps in [0, 1] {np.abs(theirs() - ours()).max():.1e}"

        yield f"one image of {self.side} px", theirs, ours, equality

    def _heatgeo(self) -> Iterator[Any]:
        from diffrep.eval.manifold import row_spearman
        from diffrep.eval.toy_manifolds import swiss_roll
        from diffrep.manifold import HeatGeodesicEmbedding

        peer = importlib.import_module("heatgeo.embedding").HeatGeo
        for n in self.sizes:
            toy = swiss_roll(n, noise=0.5, dim=50, seed=47)
            truth = toy.geodesic(np.arange(n))

            def theirs(points: Any = toy.points) -> Any:
                return peer(knn=5).fit_transform(points)

            for preset in ("heat-geodesic", "reference"):

                def ours(points: Any = toy.points, preset: str = preset) -> Any:
                    return HeatGeodesicEmbedding.preset(preset, random_state=0).fit_transform(points)

                def equality(sides: Any = (theirs, ours), truth: Any = truth) -> str:
                    scores = [row_spearman(squareform(pdist(np.asarray(side()))), truth) for side in sides]
                    return "Spearman with the truth {:.3f} and {:.3f}".format(*scores)

                yield f"{n:,} points, against preset {preset!r}", theirs, ours, equality


@contextmanager
def importing_from(folder: Path) -> Iterator[None]:
    """Import modules of a checkout in the body, forget them after, and write nothing into it."""
    place, before, bytecode = str(folder.resolve()), set(sys.modules), sys.dont_write_bytecode
    sys.path.insert(0, place)
    sys.dont_write_bytecode = True
    try:
        yield
    finally:
        sys.path.remove(place)
        sys.dont_write_bytecode = bytecode
        theirs = []
        for name in set(sys.modules) - before:
            files = [getattr(sys.modules[name], "__file__", None), *getattr(sys.modules[name], "__path__", ())]
            theirs += [name] if any(str(file or "").startswith(place) for file in files) else []
        for name in theirs:  # not before: the path of a package without __init__ is looked up in its parent
            del sys.modules[name]
