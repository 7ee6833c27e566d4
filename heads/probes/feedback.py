"""DifFeed: a U-Net's decoder feeds its own encoder, and a second pass is read (arXiv 2311.17921, section 4).

The first pass is frozen and needs no gradient. Each of some decoder blocks b then passes through a small trained
layer and is added to the output of the encoder block that mirrors it, N + 1 - b of N blocks, before that output
becomes a skip. The second pass sees the same noisy image; its blocks go to an attention head.

As a probe it is trained through the U-Net, image by image, since the second pass depends on trained layers. What does
not depend on them is done once: images are decoded and encoded once, and their noise is that of the cached probes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from diffrep.backbones import Backbone, Conditions
from diffrep.backbones.diffusion import DiffusionBackbone
from diffrep.devices import initial_weights
from diffrep.features import ExtractConfig
from diffrep.heads.probes.cells import noisy_input, numbered_taps
from diffrep.heads.probes.experiment import RowSplit, Scores, score
from diffrep.heads.probes.grid import SEED
from diffrep.heads.probes.labelled import LabelledImages
from diffrep.heads.probes.layouts import AttentionFusion, readout_string
from diffrep.heads.probes.probe import ClassProbe, SavedKind, load_recorded
from diffrep.heads.probes.training import ProbeRecipe, shuffled, train_recipe
from diffrep.images import decode_image, fit_image, stack_pixels
from diffrep.settings import POSITIVE, check
from diffrep.store.manifest import extract_config, provenance


def feedback_layer(channels: int, out: int, arch: str = "C_B_R") -> nn.Sequential:
    """The layer between a decoder block and an encoder block, written as the released letter string.

    The first C is a 1x1 convolution without bias, later ones are depthwise 3x3; B batch norm, R ReLU, S SiLU,
    G group norm of 32; ``_`` separates.

    Raises:
        ValueError: the string has another letter, or does not start with C.
    """
    if not arch.startswith("C"):
        raise ValueError(f"a feedback layer starts with C, the convolution to the encoder's channels, got {arch!r}")
    layers: list[nn.Module] = []
    makers: dict[str, Callable[[], nn.Module]] = {
        "C": lambda: nn.Conv2d(out, out, 3, padding=1, groups=out, bias=False),
        "B": lambda: nn.BatchNorm2d(out),
        "R": nn.ReLU,
        "S": nn.SiLU,
        "G": lambda: nn.GroupNorm(32, out),
    }
    for letter in arch.replace("_", ""):
        if letter not in makers:
            raise ValueError(f"feedback layer {arch!r}: no letter {letter!r}; there are {', '.join(makers)}")
        layers.append(makers[letter]() if layers else nn.Conv2d(channels, out, 1, bias=False))
    return nn.Sequential(*layers)


class DifFeed(nn.Module):
    """Feedback layers and the attention head that reads the second pass.

    Args:
        backbone: a diffusion U-Net, whose blocks' channels the layers are made for; it is not kept.
        head: reads taps of the second pass, by the backbone's names.
        blocks: numbers of the decoder blocks that feed back, ascending, see `numbered_taps`; None: every third from
            the second behind the middle, which are the paper's 21, 24, ..., 36 where there are 37.
    """

    def __init__(
        self,
        backbone: DiffusionBackbone,
        head: AttentionFusion,
        *,
        blocks: Sequence[int] | None = None,
        arch: str = "C_B_R",
    ) -> None:
        super().__init__()
        taps = numbered_taps(backbone)
        middle = next(number for number, tap in taps.items() if tap.module == "mid_block")
        self.blocks = tuple(range(middle + 2, len(taps), 3)) if blocks is None else tuple(blocks)
        if list(self.blocks) != sorted(set(self.blocks)) or not all(middle < b <= len(taps) for b in self.blocks):
            raise ValueError(
                f"feedback blocks are ascending numbers of decoder blocks, {middle + 1}..{len(taps)}, got {blocks}"
            )
        self.sources = {block: taps[block].name for block in self.blocks}
        self.targets = {block: taps[len(taps) + 1 - block] for block in self.blocks}
        self.feedback = nn.ModuleList(
            feedback_layer(taps[block].channels, target.channels, arch) for block, target in self.targets.items()
        )
        self.head = head

    def feedback_maps(self, first: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """First-pass maps by tap -> what is added to each encoder block, by the path of its module."""
        layers = zip(self.blocks, self.feedback, strict=True)
        return {self.targets[block].module: layer(first[self.sources[block]]) for block, layer in layers}

    @torch.no_grad()
    def first_pass(self, backbone: DiffusionBackbone, noisy: Tensor, conditions: Conditions) -> dict[str, Tensor]:
        """The maps that feed back. They depend on the image alone and can be kept."""
        return backbone.network_maps(noisy, list(self.sources.values()), conditions)

    def second_pass(
        self, backbone: DiffusionBackbone, noisy: Tensor, conditions: Conditions, first: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The taps that the head reads, with gradients for the feedback layers."""
        with adding(backbone.network, self.feedback_maps(first)):
            return backbone.network_maps(noisy, list(self.head.blocks), conditions)

    def forward(self, backbone: DiffusionBackbone, noisy: Tensor, conditions: Conditions) -> Tensor:
        """What the network is given at the conditions' timestep -> logits (B, K)."""
        first = self.first_pass(backbone, noisy, conditions)
        logits: Tensor = self.head([self.second_pass(backbone, noisy, conditions, first)])
        return logits


@contextmanager
def adding(network: nn.Module, maps: Mapping[str, Tensor]) -> Iterator[None]:
    """While the body runs, add a map to the output of each named module, resized to it bilinearly."""
    with ExitStack() as hooks:
        for path, added in maps.items():
            hooks.enter_context(network.get_submodule(path).register_forward_hook(partial(_add, added)))
        yield


def _add(added: Tensor, module: nn.Module, inputs: Any, output: Any) -> Any:
    out = output if isinstance(output, Tensor) else output[0]
    if added.shape[-2:] != out.shape[-2:]:
        added = F.interpolate(added, size=out.shape[-2:], mode="bilinear", align_corners=False)
    changed = out + added.to(out.dtype)
    return changed if isinstance(output, Tensor) else (changed, *output[1:])


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
        sizes = ("pool", "width", "heads", "ratio", "depth", "batch_size", "blocks")
        check(self, **dict.fromkeys(sizes, POSITIVE), seed=SEED)


@dataclass(frozen=True, repr=False, kw_only=True)
class FeedbackProbe(ClassProbe):
    """A trained `DifFeed`.

    Attributes:
        map_size: cells a side of the map that is read.
    """

    KIND: ClassVar[SavedKind] = "feedback"

    settings: FeedbackSettings
    map_size: int

    def untrained(self, backbone: Backbone | None = None) -> nn.Module:
        """A DifFeed on the backbone, which is loaded where none is handed in: for its channels."""
        with torch.device("cpu"):
            backbone = backbone or load_recorded(self.backbone, self.features[self.backbone])
        self.check(backbone)  # another one's channels may differ
        return _model(backbone, self.settings, len(self.classes), self.map_size)

    def probabilities(self, images: Sequence[Image.Image], backbones: Mapping[str, Backbone]) -> Tensor:
        """(B, K) of images that come to one canvas size."""
        (backbone,) = backbones.values()
        config = extract_config(self.features[self.backbone])
        logits: Tensor = self.network(backbone, _noisy(backbone, images, config), config.conditions())
        return logits.softmax(1)


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
        ValueError: the images come to canvases of different sizes, or the backbone is no diffusion U-Net.
    """
    settings, unet = settings or FeedbackSettings(), _unet(backbone)
    tap = settings.tap or backbone.recommended.taps[0]
    config = dataclasses.replace(extract or ExtractConfig(), taps=(tap,), timestep=settings.timestep).resolve(backbone)
    settings = dataclasses.replace(settings, tap=tap, timestep=config.timestep)
    size, conditions, labels = settings.batch_size, config.conditions(), torch.tensor(data.labels)

    def inputs(rows: Sequence[int]) -> Tensor:
        pieces = []
        for start in range(0, len(rows), size):
            images = [data.images[row] for row in rows[start : start + size]]
            pieces.append(_noisy(backbone, [decode_image(image.read(), image.name) for image in images], config))
        return torch.cat(pieces)

    train, test = inputs(split.train), inputs(split.test)
    with torch.no_grad():
        side = unet.network_maps(train[:1], [tap], conditions)[tap].shape[-1]
    model, targets = _model(backbone, settings, len(data.classes), side), labels[list(split.train)]

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        for some in shuffled(range(len(train)), size, settings.seed, epoch):
            if len(some) > 1:  # batch norm has no statistics of one map of one cell
                yield train[some], targets[some]

    losses = train_recipe(model, batches, settings.recipe, forward=lambda x: model(unet, x, conditions))
    with torch.no_grad():
        scores = torch.cat([model(unet, chunk, conditions) for chunk in test.split(size)])
    scored = score(scores, labels[list(split.test)], data.classes)
    about = {"data": data.name, "test": scored.document(), "last_loss": losses[-1] if losses else None}
    probe = FeedbackProbe(
        network=model,
        features={backbone.name: provenance(backbone, config)},
        about=about,
        classes=data.classes,
        settings=settings,
        map_size=side,
    )
    return probe, scored


def _unet(backbone: Backbone) -> DiffusionBackbone:
    if not isinstance(backbone, DiffusionBackbone) or not backbone.has_unet:
        raise ValueError(f"DifFeed needs a diffusion U-Net, {backbone.name} is none")
    return backbone


def _model(backbone: Backbone, settings: FeedbackSettings, classes: int, side: int) -> DifFeed:
    assert settings.tap is not None  # resolved
    readout = readout_string(settings.width, settings.heads, ratio=settings.ratio, depth=settings.depth)
    channels, sizes = {settings.tap: backbone.tap(settings.tap).channels}, {settings.tap: side}
    with initial_weights(settings.seed):
        head = AttentionFusion(channels, sizes, classes, readout=readout, pool=settings.pool, norm=settings.norm)
        return DifFeed(_unet(backbone), head, blocks=settings.blocks, arch=settings.arch)


@torch.no_grad()
def _noisy(backbone: Backbone, images: Sequence[Image.Image], config: ExtractConfig) -> Tensor:
    """The network's input for some images; normal tensors, which autograd accepts."""
    assert config.sizing is not None  # resolved
    canvases, unet = [fit_image(image, config.sizing)[0] for image in images], _unet(backbone)
    if len({canvas.shape for canvas in canvases}) > 1:
        raise ValueError("DifFeed reads images of one canvas size: choose a Sizing with 'squash' or 'pad'")
    return noisy_input(unet, *unet.encode(stack_pixels(canvases)), config.conditions()).clone()
