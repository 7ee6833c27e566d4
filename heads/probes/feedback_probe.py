"""DifFeed as a probe: trained through the U-Net, image by image, since its second pass depends on trained layers.

What does not depend on them is done once: images are decoded and encoded once, and their noise is that of the
cached probes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from torch import Tensor, nn

from diffrep.backbones import Backbone, Conditions, PixelDiffusion, draw_noise
from diffrep.backbones.diffusion import LatentBackbone
from diffrep.features import ExtractConfig
from diffrep.heads.probes.attention import AttentionFusion, readout_string
from diffrep.heads.probes.cells import noisy_input
from diffrep.heads.probes.feedback import DifFeed
from diffrep.heads.probes.labelled import LabelledImages
from diffrep.heads.probes.probe import Prediction
from diffrep.heads.probes.recipe import ProbeRecipe, check_settings, train_recipe
from diffrep.heads.probes.saved import OneBackboneProbe, SavedKind, batches_of, check_weights, load_recorded
from diffrep.heads.probes.scores import Scores, score
from diffrep.heads.probes.splits import RowSplit
from diffrep.images import ImageLike, decode_image, fit_image, load_image, stack_pixels
from diffrep.store.manifest import extract_config, provenance


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
    ratio: float = 4  # width of the transformer's inner layers over `width`
    depth: int = 2
    norm: Literal["layer", "batch"] = "layer"  # of the map that is read
    recipe: ProbeRecipe = ProbeRecipe(optimiser="adamw", learning_rate=2e-3, epochs=8, step=3, weight_decay=0.02)  # noqa: RUF009  # frozen
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        sizes = ("pool", "width", "heads", "ratio", "depth", "batch_size")
        check_settings(self, positive=(*sizes, "blocks") if self.blocks is not None else sizes, not_negative=("seed",))


@dataclass(frozen=True, repr=False)
class FeedbackProbe(OneBackboneProbe):
    """A trained DifFeed with everything needed to use it on images."""

    KIND: ClassVar[SavedKind] = "feedback"

    model: DifFeed
    classes: tuple[str, ...]
    settings: FeedbackSettings
    features: Mapping[str, Any]  # provenance
    map_size: int  # cells a side of the map that is read
    about: Mapping[str, Any]

    @property
    def network(self) -> nn.Module:
        """The same as `model`."""
        return self.model

    def document(self) -> dict[str, Any]:
        """Classes, settings, and the size of the map that is read."""
        return {"classes": list(self.classes), "settings": asdict(self.settings), "map_size": self.map_size}

    @classmethod
    def from_document(cls, document: Mapping[str, Any], backbone: Backbone | None) -> Self:
        """A DifFeed of the settings on the backbone, which is loaded where none is handed in: for its channels."""
        values, classes = document["settings"], tuple(map(str, document["classes"]))
        blocks = None if values["blocks"] is None else tuple(values["blocks"])
        settings = FeedbackSettings(**{**values, "blocks": blocks, "recipe": ProbeRecipe(**values["recipe"])})
        ((name, features),) = document["features"].items()
        side = int(document["map_size"])
        with torch.device("cpu"):
            backbone = backbone or load_recorded(name, features)
        check_weights(name, features, backbone)  # its channels may differ
        model = _model(backbone, settings, len(classes), side)
        return cls(model, classes, settings, features, side, document["about"])

    def summary(self) -> str:
        """Classes, and the score of test where it is known."""
        test = self.about.get("test", {}).get("top1")
        return f"{len(self.classes)} classes" + ("" if test is None else f", {100 * test:.1f} % of test,")

    @torch.no_grad()
    def predict(
        self,
        images: Iterable[ImageLike],
        *,
        backbone: Backbone | None = None,
        device: str = "auto",
        batch_size: int = 16,
    ) -> Prediction:
        """Classify images of any size.

        Raises:
            ImageError: an image cannot be read.
            ValueError: no image is given, or the backbone is not the one it was trained on.
        """
        backbone = self.usable(backbone, device)
        config = extract_config(self.features)
        assert config.sizing is not None  # resolved when it was trained
        logits = []
        for batch in batches_of(images, batch_size):
            noisy = _noisy(backbone, [fit_image(load_image(image), config.sizing)[0] for image in batch], config)
            logits.append(self.model(backbone, noisy, config.conditions()))
        if not logits:
            raise ValueError("predict needs at least one image")
        return Prediction(torch.cat(logits).softmax(1), self.classes)


def train_feedback(
    data: LabelledImages,
    split: RowSplit,
    backbone: Backbone,
    settings: FeedbackSettings | None = None,
    extract: ExtractConfig | None = None,
) -> tuple[FeedbackProbe, Scores]:
    """Train on train, with val left alone: there is nothing to choose; score test once.

    Raises:
        ImageError: an image cannot be read.
        ValueError: the images come to canvases of different sizes.
    """
    settings = settings or FeedbackSettings()
    tap = settings.tap or backbone.recommended.taps[0]
    config = dataclasses.replace(extract or ExtractConfig(), taps=(tap,), timestep=settings.timestep).resolve(backbone)
    settings = dataclasses.replace(settings, tap=tap, timestep=config.timestep)
    recipe, size = settings.recipe, settings.batch_size
    conditions, labels = config.conditions(), torch.tensor(data.labels)
    noisy = {part: _inputs(data, split.part(part), backbone, config, size) for part in ("train", "test")}  # type: ignore[arg-type]
    with torch.no_grad():
        side = backbone.network_maps(noisy["train"][:1], [tap], conditions)[tap].shape[-1]  # type: ignore[attr-defined, operator]
    model = _model(backbone, settings, len(data.classes), side)
    train = torch.tensor(split.train)

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = np.random.default_rng([settings.seed, epoch]).permutation(len(train))
        for start in range(0, len(order), size):
            some = torch.from_numpy(order[start : start + size])
            if len(some) > 1:  # batch norm has no statistics of one map of one cell
                yield noisy["train"][some], labels[train[some]]

    losses = train_recipe(model, batches, recipe, forward=lambda x: model(backbone, x, conditions))
    with torch.no_grad():
        chunks = noisy["test"].split(size)
        scores = torch.cat([model(backbone, chunk, conditions) for chunk in chunks])
    test = score(scores, labels[list(split.test)], data.classes)
    about = {"data": data.name, "test": test.document(), "last_loss": losses[-1] if losses else None}
    return FeedbackProbe(model, data.classes, settings, provenance(backbone, config), side, about), test


def _model(backbone: Backbone, settings: FeedbackSettings, classes: int, side: int) -> DifFeed:
    assert settings.tap is not None  # resolved
    readout = readout_string(settings.width, settings.heads, ratio=settings.ratio, depth=settings.depth)
    channels, sizes = {settings.tap: backbone.tap(settings.tap).channels}, {settings.tap: side}
    with torch.random.fork_rng(devices=[]):  # torch's initialisers draw from the global generator
        torch.manual_seed(settings.seed)
        head = AttentionFusion(channels, sizes, classes, readout=readout, pool=settings.pool, norm=settings.norm)
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
