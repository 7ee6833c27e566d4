"""Steps that run only a part of a U-Net and inherit the rest from an earlier one (DeepCache, Ma et al. 2024)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any

from torch import nn

from diffrep.sampling.schedules import SamplingError


class InheritedFeatures:
    """A diffusers U-Net whose deep units return what they gave at an earlier step. A context manager.

    A unit is a resnet or an attention of a block, its up- or downsampler, or the middle. At a whole step all of them
    run and are remembered; at the others only those that are as shallow as the branch. Samples of a batch, and the
    halves of guidance, share the steps; each image starts anew.

    Args:
        unet: a `UNet2DConditionModel`, or another with `down_blocks`, `mid_block` and `up_blocks`.
        interval: every how many steps all of it runs; 1: always.
        branch: how deep the other steps go: block times units a block, plus units of it (DeepCache's branch id).
        whole: the steps that run whole, in place of those that the interval says; the first always does.

    Raises:
        SamplingError: the network has no such blocks, or the interval or branch is not one of its.
    """

    def __init__(
        self, unet: nn.Module, *, interval: int = 3, branch: int = 0, whole: Sequence[int] | None = None
    ) -> None:
        if not all(hasattr(unet, name) for name in ("down_blocks", "mid_block", "up_blocks")):
            raise SamplingError(f"{type(unet).__name__} has no down_blocks, mid_block and up_blocks to inherit from")
        blocks: Any = unet
        units = len(blocks.down_blocks[0].resnets) + 1
        if interval < 1 or not 0 <= branch < units * len(blocks.down_blocks):
            raise SamplingError(
                f"interval must be at least 1 and branch in 0..{units * len(blocks.down_blocks) - 1}, "
                f"got {interval} and {branch}"
            )
        self.interval, self.whole = interval, None if whole is None else {0, *whole}
        self.block, self.layer = divmod(branch, units)
        self._step = 0
        self._memory: dict[nn.Module, Any] = {}
        self._units = list(self._deep_units(blocks))

    def _deep_units(self, unet: Any) -> Iterable[nn.Module]:
        """The units that inherit: deeper than the branch. Blocks and layers of the way up count from its end."""
        for number, block in enumerate(unet.down_blocks):
            count = len(block.resnets)
            for modules, first in (
                (block.resnets, 0),
                (getattr(block, "attentions", ()), 0),
                (block.downsamplers or (), count),
            ):
                for layer, module in enumerate(modules, first):
                    if number > self.block or (number == self.block and layer >= self.layer):
                        yield module
        yield unet.mid_block
        for number, block in enumerate(reversed(unet.up_blocks)):
            count = len(block.resnets)
            for modules, last in (
                (block.resnets, count - 1),
                (getattr(block, "attentions", ()), count - 1),
                (block.upsamplers or (), 0),
            ):
                for layer, module in enumerate(modules):
                    if number > self.block or (number == self.block and last - layer > self.layer):
                        yield module

    def at(self, step: int) -> None:
        """Say which step of an image comes next, from 0."""
        self._step = step
        if step == 0:
            self._memory.clear()

    @property
    def runs_whole(self) -> bool:
        """Whether the whole network runs at this step."""
        return self._step % self.interval == 0 if self.whole is None else self._step in self.whole

    def __enter__(self) -> InheritedFeatures:
        for module in self._units:
            module.forward = self._wrapped(module, module.forward)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for module in self._units:
            del module.forward  # the class's own is seen again
        self._memory.clear()

    def _wrapped(self, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def inheriting(*args: Any, **kwargs: Any) -> Any:
            if not self.runs_whole and module in self._memory:
                return self._memory[module]
            self._memory[module] = result = forward(*args, **kwargs)
            return result

        return inheriting
