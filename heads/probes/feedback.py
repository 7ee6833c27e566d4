"""DifFeed: a U-Net's decoder feeds its own encoder, and a second pass is read (arXiv 2311.17921, section 4).

The first pass is frozen and needs no gradient. Each of some decoder blocks b then passes through a small trained
layer and is added to the output of the encoder block that mirrors it, N + 1 - b of N blocks, before that output
becomes a skip. The second pass sees the same noisy image; its blocks go to an attention head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffrep.backbones import Conditions, TapInfo
from diffrep.backbones.pixel_diffusion import numbered_blocks
from diffrep.heads.probes.attention import AttentionFusion

FEEDBACK_BLOCKS = (21, 24, 27, 30, 33, 36)  # of the 37 of the 256-pixel ADM network


class DiffusionUNet(Protocol):
    """A diffusion U-Net as a backbone: `PixelDiffusion`, `LatentDiffusion`."""

    name: str
    network: Any

    def taps(self) -> tuple[TapInfo, ...]: ...

    def network_maps(self, noisy: Tensor, taps: Sequence[str], conditions: Conditions) -> dict[str, Tensor]: ...


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
        backbone: its blocks' channels are what the layers are made for; it is not kept.
        head: reads taps of the second pass, by the backbone's names.
        blocks: numbers of the decoder blocks that feed back, ascending, see `numbered_taps`; None: every third from
            the second behind the middle, which are the paper's `FEEDBACK_BLOCKS` where there are 37.
    """

    def __init__(
        self,
        backbone: DiffusionUNet,
        head: AttentionFusion,
        *,
        blocks: Sequence[int] | None = None,
        arch: str = "C_B_R",
    ) -> None:
        super().__init__()
        taps = numbered_taps(backbone)
        middle = next(number for number, tap in taps.items() if tap.module == "mid_block")
        self.blocks = tuple(range(middle + 2, len(taps), 3)) if blocks is None else tuple(blocks)
        if list(self.blocks) != sorted(set(self.blocks)) or not all(middle < b < len(taps) for b in self.blocks):
            raise ValueError(
                f"feedback blocks are ascending numbers of decoder blocks, {middle + 1}..{len(taps) - 1}, got {blocks}"
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
    def first_pass(self, backbone: DiffusionUNet, noisy: Tensor, conditions: Conditions) -> dict[str, Tensor]:
        """The maps that feed back. They depend on the image alone and can be kept."""
        return backbone.network_maps(noisy, list(self.sources.values()), conditions)

    def second_pass(
        self, backbone: DiffusionUNet, noisy: Tensor, conditions: Conditions, first: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The taps that the head reads, with gradients for the feedback layers."""
        with adding(backbone.network, self.feedback_maps(first)):
            return backbone.network_maps(noisy, list(self.head.blocks), conditions)

    def forward(self, backbone: DiffusionUNet, noisy: Tensor, conditions: Conditions) -> Tensor:
        """What the network is given at the conditions' timestep -> logits (B, K)."""
        first = self.first_pass(backbone, noisy, conditions)
        logits: Tensor = self.head([self.second_pass(backbone, noisy, conditions, first)])
        return logits


def numbered_taps(backbone: DiffusionUNet) -> dict[int, TapInfo]:
    """The blocks of a U-Net as guided-diffusion numbers them: 1, 2, ... in the order of execution.

    The input blocks, the middle block, the output blocks, each behind its attention and its resampling, whatever
    library the U-Net is from.
    """
    by_path: dict[str, TapInfo] = {}
    for tap in backbone.taps():
        if tap.name != "in":
            by_path[tap.module] = tap  # a numbered name, where there is one, comes after the plain one
    return {number: by_path[path] for number, path in enumerate(numbered_blocks(backbone.network), 1)}


@contextmanager
def adding(network: nn.Module, maps: Mapping[str, Tensor]) -> Iterator[None]:
    """While the body runs, add a map to the output of each named module, resized to it bilinearly."""

    def hook(added: Tensor) -> Callable[[nn.Module, Any, Any], Any]:
        def add(module: nn.Module, inputs: Any, output: Any) -> Any:
            out = output if isinstance(output, Tensor) else output[0]
            resized = (
                added
                if added.shape[-2:] == out.shape[-2:]
                else F.interpolate(added, size=out.shape[-2:], mode="bilinear", align_corners=False)
            )
            changed = out + resized.to(out.dtype)
            return changed if isinstance(output, Tensor) else (changed, *output[1:])

        return add

    handles = [network.get_submodule(path).register_forward_hook(hook(added)) for path, added in maps.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
