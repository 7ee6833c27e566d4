"""DifFeed as a probe: trained through the U-Net, image by image, since its second pass depends on trained layers.

What does not depend on them is done once: images are decoded and encoded once, and their noise is that of the
cached probes.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from diffrep.backbones import Backbone, Conditions, PixelDiffusion, draw_noise
from diffrep.backbones.latents import LatentBackbone
from diffrep.features import ExtractConfig
from diffrep.files import save_weights, write_whole
from diffrep.heads.probes.attention import AttentionFusion, readout_string
from diffrep.heads.probes.cells import noisy_input
from diffrep.heads.probes.feedback import DifFeed
from diffrep.heads.probes.labelled import LabelledImages
from diffrep.heads.probes.probe import OneBackbone, Prediction, batches_of, check_weights_of, load_recorded
from diffrep.heads.probes.recipe import Recipe, train_recipe
from diffrep.heads.probes.scores import Scores, score
from diffrep.heads.probes.splits import Split
from diffrep.images import ImageLike, decode_image, fit_image, load_image, stack_pixels
from diffrep.store.manifest import extract_config, provenance

FORMAT, VERSION = "diffrep-diffeed", 1
ABOUT, _WEIGHTS = "diffeed.json", "diffeed.safetensors"


@dataclass(frozen=True, kw_only=True)
class FeedbackSettings:
    """What feeds back, what is read, and how it is trained.

    The published values on the 256-pixel ADM: t = 150, feedback blocks 21, 24, ..., 36, block 24 read at pool 16 by
    two transformer blocks of width 1024 with 8 heads; SGD at 1e-2, batch 4 on each of 4 devices.
    """

    timestep: int | None = None  # None: as the backbone recommends
    tap: str | None = None  # read in the second pass; None: as the backbone recommends
    blocks: tuple[int, ...] | None = None  # that feed back; None: every third of the decoder
    arch: str = "C_B_R"  # of the feedback layers
    pool: int = 16
    width: int = 128
    heads: int = 8
    depth: int = 2
    recipe: Recipe = Recipe(optimiser="adamw", learning_rate=2e-3, epochs=8, step=3, weight_decay=0.02)  # noqa: RUF009  # frozen
    batch_size: int = 16
    seed: int = 0


@dataclass(frozen=True)
class FeedbackProbe(OneBackbone):
    """A trained DifFeed with everything needed to use it on images."""

    model: DifFeed
    classes: tuple[str, ...]
    settings: FeedbackSettings
    features: Mapping[str, Any]  # provenance
    map_size: int  # cells a side of the map that is read
    about: Mapping[str, Any]

    def save(self, folder: str | Path) -> None:
        """Write ``diffeed.json`` and ``diffeed.safetensors``."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_weights(folder / _WEIGHTS, self.model.state_dict())
        document = {
            "format": FORMAT,
            "version": VERSION,
            "classes": list(self.classes),
            "settings": asdict(self.settings),
            "features": dict(self.features),
            "map_size": self.map_size,
            "about": dict(self.about),
        }
        write_whole(folder / ABOUT, json.dumps(document, indent=1).encode() + b"\n")

    @torch.no_grad()
    def predict(
        self,
        images: Iterable[ImageLike],
        *,
        backbone: Backbone | None = None,
        device: str = "cpu",
        batch_size: int = 16,
    ) -> Prediction:
        """Classify images of any size.

        Raises:
            ImageError: an image cannot be read.
            ValueError: no image is given, or the backbone is not the one it was trained on.
        """
        backbone = backbone or self.load_own(device)
        self.check(backbone)
        config = extract_config(self.features)
        assert config.sizing is not None  # resolved when it was trained
        logits = []
        for batch in batches_of(images, batch_size):
            noisy = _noisy(backbone, [fit_image(load_image(image), config.sizing)[0] for image in batch], config)
            logits.append(self.model(backbone, noisy, config.conditions()))
        if not logits:
            raise ValueError("predict needs at least one image")
        return Prediction(torch.cat(logits).softmax(1), self.classes)


def load_feedback_probe(folder: str | Path, backbone: Backbone | None = None) -> FeedbackProbe:
    """Read a probe that `FeedbackProbe.save` wrote; its backbone is loaded where none is given, for its channels.

    Raises:
        ValueError: the folder holds none, or one that is damaged, or the backbone is another.
    """
    folder = Path(folder)
    if not (folder / ABOUT).is_file():
        raise ValueError(f"{folder}: holds no DifFeed probe (no {ABOUT})")
    try:
        document = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        values = document["settings"]
        blocks = None if values["blocks"] is None else tuple(values["blocks"])
        settings = FeedbackSettings(**{**values, "blocks": blocks, "recipe": Recipe(**values["recipe"])})
        features = document["features"]
        backbone = backbone or load_recorded(features["backbone"], features)
        check_weights_of(features["backbone"], features, backbone)  # its channels may differ
        model = _model(backbone, settings, len(document["classes"]), document["map_size"])
        model.load_state_dict(load_file(folder / _WEIGHTS))
    except (KeyError, TypeError, RuntimeError, SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder}: the probe cannot be read ({' '.join(str(error).split())[:300]})") from None
    classes = tuple(document["classes"])
    return FeedbackProbe(model.eval(), classes, settings, document["features"], document["map_size"], document["about"])


def train_feedback(
    data: LabelledImages,
    split: Split,
    backbone: Backbone,
    settings: FeedbackSettings | None = None,
    extract: ExtractConfig | None = None,
) -> tuple[FeedbackProbe, Scores]:
    """Train on train, with val left alone: there is nothing to choose; score test once.

    Raises:
        ImageError: an image cannot be read.
        ValueError: the images come to canvases of different sizes.
    """
    given = settings or FeedbackSettings()
    tap = given.tap or backbone.recommended.taps[0]
    config = dataclasses.replace(extract or ExtractConfig(), taps=(tap,), timestep=given.timestep).resolve(backbone)
    settings = dataclasses.replace(given, tap=tap, timestep=config.timestep)
    conditions, labels = config.conditions(), torch.tensor(data.labels)
    noisy = {part: _inputs(data, split.part(part), backbone, config, given.batch_size) for part in ("train", "test")}  # type: ignore[arg-type]
    with torch.no_grad():
        side = backbone.network_maps(noisy["train"][:1], [tap], conditions)[tap].shape[-1]  # type: ignore[attr-defined]
    model = _model(backbone, settings, len(data.classes), side)
    train = torch.tensor(split.train)

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = np.random.default_rng([given.seed, epoch]).permutation(len(train))
        for start in range(0, len(order), given.batch_size):
            some = torch.from_numpy(order[start : start + given.batch_size])
            if len(some) > 1:  # batch norm has no statistics of one map of one cell
                yield noisy["train"][some], labels[train[some]]

    losses = train_recipe(model, batches, given.recipe, forward=lambda x: model(backbone, x, conditions))
    with torch.no_grad():
        chunks = noisy["test"].split(given.batch_size)
        scores = torch.cat([model(backbone, chunk, conditions) for chunk in chunks])
    test = score(scores, labels[list(split.test)], data.classes)
    about = {"data": data.name, "test": test.document(), "last_loss": losses[-1] if losses else None}
    made = provenance(backbone, config)
    return FeedbackProbe(model, data.classes, settings, made, side, about), test


def _model(backbone: Backbone, settings: FeedbackSettings, classes: int, side: int) -> DifFeed:
    assert settings.tap is not None  # resolved
    readout = readout_string(settings.width, settings.heads, depth=settings.depth)
    channels = {settings.tap: backbone.tap(settings.tap).channels}
    with torch.random.fork_rng(devices=[]):  # torch's initialisers draw from the global generator
        torch.manual_seed(settings.seed)
        head = AttentionFusion(channels, {settings.tap: side}, classes, readout=readout, pool=settings.pool)
        return DifFeed(backbone, head, blocks=settings.blocks, arch=settings.arch)  # type: ignore[arg-type]  # a U-Net


def _inputs(
    data: LabelledImages, rows: Sequence[int], backbone: Backbone, config: ExtractConfig, batch_size: int
) -> Tensor:
    assert config.sizing is not None  # resolved
    pieces = []
    for start in range(0, len(rows), batch_size):
        images = [data.images[row] for row in rows[start : start + batch_size]]
        canvases = [fit_image(decode_image(image.read(), image.name), config.sizing)[0] for image in images]
        pieces.append(_noisy(backbone, canvases, config))
    return torch.cat(pieces)


@torch.no_grad()
def _noisy(backbone: Backbone, canvases: Sequence[Tensor], config: ExtractConfig) -> Tensor:
    """What the network is given for some canvases; normal tensors, which autograd accepts."""
    conditions: Conditions = config.conditions()
    if len({canvas.shape for canvas in canvases}) > 1:
        raise ValueError("DifFeed reads images of one canvas size: choose a Sizing with 'squash' or 'pad'")
    pixels = stack_pixels(canvases)
    if isinstance(backbone, LatentBackbone):
        return noisy_input(backbone, *backbone.encode(pixels), conditions).clone()
    if not isinstance(backbone, PixelDiffusion):
        raise ValueError(f"DifFeed needs a diffusion U-Net, {backbone.name} is none")
    noise = draw_noise(tuple(pixels.shape[1:]), conditions.seed)
    return backbone.noisy_pixels(pixels, noise, max(conditions.timestep, 0))
