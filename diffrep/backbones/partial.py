"""Steps of a diffusion network that run a part of it: features inherited from earlier steps, units left out.

Inheritance is DeepCache (Ma et al. 2024): at some steps only the shallow units of a U-Net run, and the deep ones give
what they gave at the last whole step. Units are left out as AutoDiffusion does (Li et al. 2023): a residual block by
its skip path, an attention or a block of a transformer by passing on its input. What runs at which step may follow an
interval, a fixed table of depths, or the lists of a search.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from diffrep.backbones.base import BackboneError
from diffrep.backbones.early_exit import EarlyExitUViT


def skippable_units(network: nn.Module) -> list[nn.Module]:
    """The units that a step may leave out, in the order of computation.

    The residual blocks and attentions of a diffusers U-Net, or the blocks of a diffusers transformer.

    Raises:
        BackboneError: another kind of network.
    """
    net: Any = network
    if hasattr(net, "transformer_blocks"):
        return [*net.transformer_blocks, *getattr(net, "single_transformer_blocks", [])]
    if not all(hasattr(net, name) for name in ("down_blocks", "mid_block", "up_blocks")):
        raise BackboneError(
            f"{type(network).__name__}: has neither U-Net nor transformer blocks that could be left out"
        )
    units = list[nn.Module]()
    for block in (*net.down_blocks, net.mid_block, *net.up_blocks):
        attentions = [a for a in getattr(block, "attentions", None) or () if a is not None]
        resnets = list(block.resnets)
        if block is net.mid_block:  # its first residual block comes before its attentions
            units.append(resnets.pop(0))
            resnets, attentions = attentions, resnets
        for i in range(max(len(resnets), len(attentions))):
            units += [*resnets[i : i + 1], *attentions[i : i + 1]]
    return units


def deep_units(unet: Any, branch: int) -> Iterator[nn.Module]:
    """The units of a U-Net that are deeper than DeepCache's branch id; on the way up, they count from the end."""
    block, layer = divmod(branch, len(unet.down_blocks[0].resnets) + 1)
    for way, samplers in ((unet.down_blocks, "downsamplers"), (unet.up_blocks[::-1], "upsamplers")):
        for number, part in enumerate(way):
            count, down = len(part.resnets), way is unet.down_blocks
            # a place is how many units of the block lie outside of it: downsamplers are innermost, upsamplers outermost
            for modules, places in (
                (part.resnets, range(count)),
                (getattr(part, "attentions", ()), range(count)),
                (getattr(part, samplers) or (), [count]),
            ):
                for module, index in zip(modules, places, strict=False):
                    place = index if down else max(count - 1 - index, 0)
                    if number > block or (number == block and (place >= layer if down else place > layer)):
                        yield module
    yield unet.mid_block


class PartialNetwork:
    """A network that runs a part of itself at some steps. A context manager.

    The samples of a batch, and the halves of guidance, share the steps; each image starts anew at step 0.

    Args:
        network: a diffusers U-Net (inheritance, skipping), a diffusers transformer (skipping), or an `EarlyExitUViT`
            (depths, its number of blocks; threshold).
        interval: every how many steps all of it runs; 1: always.
        branch: how deep the other steps go: block times units a block, plus units of it (DeepCache's branch id).
        depths: for each step how deep it goes, a branch, or -1: whole; in place of interval and branch. The first step
            is whole. Of early exits: how many blocks run.
        skipped: for each step the numbers of the `skippable_units` that are left out.
        threshold: of early exits: the estimated uncertainty at which a sample leaves.

    Attributes:
        carried: branch -> (B, C, h, w), what its deep units gave at the last whole step. Of all of them only the last
            one's output is read again. A caller whose batches are not the same from step to step sets it.

    Raises:
        BackboneError: the network has no such units, or the interval or branch is not one of its.
    """

    def __init__(
        self, network: Any, *, interval: int = 1, branch: int = 0, depths: Sequence[int] = (),
        skipped: Sequence[Sequence[int]] = (), threshold: float | None = None,
    ) -> None:  # fmt: skip
        name = type(network).__name__
        self.network, self.interval, self.branch, self.threshold = network, interval, branch, threshold
        self.depths, self.skipped = tuple(depths), [set(units) for units in skipped]
        inherits = interval != 1 or any(depth >= 0 for depth in depths)
        self.carried: dict[int, Tensor] = {}
        self._deep: dict[int, set[nn.Module]] = {}
        self._last: dict[int, nn.Module] = {}  # of each branch's deep units, the one that runs last
        self._numbers: dict[nn.Module, int] = {}
        if isinstance(network, EarlyExitUViT):
            if interval != 1 or any(self.skipped) or any(not -1 <= d <= network.about.depth for d in depths):
                blocks = network.about.depth
                raise BackboneError(f"{name}: takes depths of 0..{blocks} blocks (-1: all of them) and a threshold")
        elif threshold is not None:
            raise BackboneError(f"{name}: estimates no uncertainty, so that no threshold goes with it")
        elif inherits:
            if not all(hasattr(network, part) for part in ("down_blocks", "mid_block", "up_blocks")):
                raise BackboneError(f"{name} has no down_blocks, mid_block and up_blocks to inherit from")
            net: Any = network
            most = (len(net.down_blocks[0].resnets) + 1) * len(net.down_blocks) - 1
            branches = ({*depths} if depths else {branch}) - {-1}
            if interval < 1 or not all(0 <= b <= most for b in branches):
                raise BackboneError(
                    f"interval must be at least 1, branch and depths in 0..{most} (-1: whole), got {interval},"
                    f" {', '.join(map(str, sorted(branches)))}"
                )
            self._deep = {b: set(deep_units(net, b)) for b in branches}
        if any(self.skipped):
            self._numbers = {module: i for i, module in enumerate(skippable_units(network))}
            if unknown := sorted(set().union(*self.skipped) - set(self._numbers.values())):
                raise BackboneError(f"{name} has the units 0..{len(self._numbers) - 1} to leave out, got {unknown}")
        self._step = 0
        self._shapes: dict[nn.Module, Sequence[int]] = {}  # of what deep units gave
        self._wrapped_modules: set[nn.Module] = {*self._numbers}.union(*self._deep.values())

    @property
    def whole(self) -> bool:
        """Whether all of the network runs at all steps."""
        early = isinstance(self.network, EarlyExitUViT) and any(depth >= 0 for depth in self.depths)
        return not (self._deep or self._numbers or self.threshold is not None or early)

    def at(self, step: int) -> None:
        """Say which step of an image comes next, from 0.

        Raises:
            BackboneError: the tables have fewer steps.
        """
        for table in (self.depths, self.skipped):
            if table and step >= len(table):
                raise BackboneError(f"depths and skipped units have {len(table)} steps, asked for step {step + 1}")
        self._step = step
        if isinstance(self.network, EarlyExitUViT):
            self.network.limit = self.depths[step] if self.depths and self.depths[step] >= 0 else None

    @property
    def depth(self) -> int:
        """How deep this step goes; -1: the whole network."""
        if self._step == 0:
            return -1
        if self.depths:
            return self.depths[self._step]
        return -1 if self._step % self.interval == 0 else self.branch

    @property
    def running(self) -> tuple[int, frozenset[int]]:
        """What runs at this step: its depth, and the units that are left out."""
        return self.depth, frozenset(self.skipped[self._step] if self.skipped else ())

    def __enter__(self) -> PartialNetwork:
        for module in self._wrapped_modules:
            module.forward = self._wrapped(module, module.forward)
        if isinstance(self.network, EarlyExitUViT):
            self.network.threshold = self.threshold
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for module in self._wrapped_modules:
            del module.forward  # that of the class is seen again
        if isinstance(self.network, EarlyExitUViT):
            self.network.limit = self.network.threshold = None
        self.carried.clear()

    def _wrapped(self, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def partial(*args: Any, **kwargs: Any) -> Any:
            depth = self.depth
            if depth >= 0 and module in self._deep[depth]:
                return self._inherited(module, depth, args[0] if args else kwargs["hidden_states"], kwargs)
            if self.skipped and self._numbers.get(module) in self.skipped[self._step]:
                result = passed(module, args, kwargs)
            else:
                result = forward(*args, **kwargs)
            if depth < 0:
                value = result[0] if isinstance(result, tuple) else result
                for branch, units in self._deep.items():
                    if module in units:
                        self._shapes[module], self._last[branch], self.carried[branch] = value.shape[1:], module, value
            return result

        return partial

    def _inherited(self, module: nn.Module, branch: int, x: Tensor, kwargs: dict[str, Any]) -> Any:
        """What a deep unit gives: of the last one what is carried, of the others zeros, which nothing reads."""
        value = self.carried[branch] if module is self._last[branch] else None
        if value is None:
            value = x.new_zeros(()).expand(len(x), *self._shapes[module])
        return (value,) if kwargs.get("return_dict") is False else value


def passed(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What goes on where a unit is left out: the skip path of a residual block, else the input."""
    x = args[0] if args else kwargs["hidden_states"]
    if hasattr(module, "conv_shortcut"):
        for resample in (module.upsample, module.downsample):
            x = x if resample is None else resample(x)
        return (x if module.conv_shortcut is None else module.conv_shortcut(x)) / module.output_scale_factor
    if hasattr(module, "context_pre_only"):  # Stable Diffusion 3
        return None if module.context_pre_only else kwargs["encoder_hidden_states"], x
    if type(module).__name__.startswith("Flux"):
        return kwargs["encoder_hidden_states"], x
    return (x,) if kwargs.get("return_dict") is False else x
