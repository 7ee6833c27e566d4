"""What every backbone is: a frozen network whose activations have names."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from huggingface_hub import ModelHubMixin
from torch import Tensor, nn

from diffrep.graphs import Graphs
from diffrep.settings import Conditions, Sizing, near_names

if TYPE_CHECKING:
    from typing_extensions import Self


class TapError(ValueError):
    """A tap that this backbone does not have."""


class BackboneError(ValueError):
    """A backbone that cannot be found or loaded; the message names the file and what is wrong."""


@dataclass(frozen=True)
class TapInfo:
    """One activation of a backbone.

    Attributes:
        name: in the tap grammar, for example ``up.1`` or ``layer.11.key``.
        channels: of its map; 0 where they follow from the canvas or the prompt (attention maps).
        stride: canvas pixels per cell.
        module: path of the submodule whose output (or input) it is, for reading in the network's own code.
    """

    name: str
    channels: int
    stride: int
    module: str


@dataclass(frozen=True)
class Grid:
    """Where the cells of a map lie on the canvas, in canvas pixels, (x, y)."""

    origin: tuple[float, float]  # the centre of cell (0, 0)
    stride: tuple[float, float]  # between the centres of neighbouring cells

    @classmethod
    def covering(cls, canvas_size: Sequence[int], map_size: Sequence[int]) -> Grid:
        """The cells tile the canvas: cell (0, 0) is its top left H/h by W/w pixels."""
        x, y = canvas_size[1] / map_size[1], canvas_size[0] / map_size[0]
        return cls(origin=((x - 1) / 2, (y - 1) / 2), stride=(x, y))


@dataclass(frozen=True, kw_only=True)
class Recommended:
    """The settings with which a backbone is used when none are given."""

    taps: tuple[str, ...]
    sizing: Sizing
    conditions: Conditions = field(default_factory=Conditions)


class Backbone(nn.Module, ModelHubMixin, ABC):
    """A frozen network that turns a batch of images into feature maps; an `nn.Module` that stays in evaluation mode.

    Attributes:
        name: as `load_backbone` was asked for it.
        source: where the weights came from: a folder, a hub id, or "random".
        recommended: the settings used where the caller chooses none.
        network: the module that is tapped.
        multiple: the sides of a canvas are multiples of it.
        denoises: what a diffusion network takes noise from, "latents" of a VAE or "pixels"; its features depend on a
            timestep. None: no timestep.
        guided: the scale of guidance is an input of `network`, as in the distilled FLUX.1-dev.
        has_unet: `network` is a U-Net of diffusers with down blocks, a mid block and up blocks.
        takes: the settings of `Conditions` that its maps depend on, but for the seed.
    """

    name: str
    source: str
    recommended: Recommended
    network: Any  # an nn.Module; Any, for its libraries declare no types of its parts
    multiple: int = 1
    denoises: Literal["latents", "pixels"] | None = None
    guided: bool = False
    has_unet: bool = False
    takes: frozenset[str] = frozenset()

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        instance = super().__new__(cls, *args, **kwargs)
        instance._hub_mixin_config = None  # the mixin would write the arguments, paths among them, beside the weights
        nn.Module.__init__(instance)  # so that a subclass without super().__init__() can hold modules too
        return instance

    @cached_property
    def graphs(self) -> Graphs:
        """The recorded calls of `network` on CUDA."""
        return Graphs(self.network)

    @property
    def parts(self) -> dict[str, nn.Module]:
        """The networks that an image goes through, by what they are called in print."""
        return {"network": self.network}

    @abstractmethod
    def taps(self) -> tuple[TapInfo, ...]:
        """All taps in the order in which the network computes them."""

    @abstractmethod
    def maps(
        self, pixels: Tensor, taps: Sequence[str], conditions: Conditions, *, batch_size: int = 8
    ) -> dict[str, Tensor]:
        """Read activations of images that already lie on the network's canvas.

        Args:
            pixels: (B, 3, H, W), RGB in [0, 1].
            taps: names from `taps()`; the forward pass ends right after the deepest of them.
            batch_size: images, or images x noise draws, that go through the network together.

        Returns:
            tap -> (B, C, h, w), in the backbone's dtype on its device; the same in every batch, up
            to rounding.
        """

    def forward(
        self,
        pixels: Tensor,
        taps: Sequence[str] | None = None,
        conditions: Conditions | None = None,
        *,
        batch_size: int = 8,
    ) -> dict[str, Tensor]:
        """`maps`, with the recommended taps and conditions where None."""
        chosen, settings = taps or self.recommended.taps, conditions or self.recommended.conditions
        return self.maps(pixels, chosen, settings, batch_size=batch_size)

    def grid(self, tap: str, canvas_size: Sequence[int], map_size: Sequence[int]) -> Grid:
        """Where the cells of a tap's map lie on a canvas of (H, W) pixels."""
        return Grid.covering(canvas_size, map_size)

    def tap(self, name: str) -> TapInfo:
        """Look one tap up.

        Raises:
            TapError: there is no such tap; the message lists the near names.
        """
        known = {tap.name: tap for tap in self.taps()}
        if name not in known:
            named = near_names(name, known, cutoff=0.5) or f"names are such as {', '.join(list(known)[:4])}"
            raise TapError(f"{self.name} has no tap {name!r}; {named} (`taps()` lists all)")
        return known[name]

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.network.parameters()).dtype

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode: what trains on top of a backbone may call `train` on the whole."""
        return super().train(False)

    def __repr__(self) -> str:
        million = sum(p.numel() for part in self.parts.values() for p in part.parameters()) / 1e6
        taps = self.taps()
        return (
            f"{type(self).__name__}({self.name!r}, weights from {self.source}, {million:.1f} M parameters,"
            f" {len(taps)} taps {taps[0].name} .. {taps[-1].name}, default {', '.join(self.recommended.taps)},"
            f" {str(self.dtype).removeprefix('torch.')} on {self.device})"
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> Self:
        """`load_backbone`, and a check that what it loads is of this class.

        Raises:
            BackboneError: as `load_backbone`, or it is another kind of backbone.
        """
        from diffrep.backbones.loading import load_backbone

        backbone = load_backbone(pretrained_model_name_or_path, **options)
        if not isinstance(backbone, cls):
            raise BackboneError(f"{pretrained_model_name_or_path}: is a {type(backbone).__name__}, no {cls.__name__}")
        return backbone

    def _save_pretrained(self, save_directory: Path) -> None:
        """The hook of `save_pretrained` and `push_to_hub`: diffusion backbones become diffusers folders."""
        if self.denoises is not None:
            from diffrep.backbones.pipelines import save_backbone

            save_backbone(self, save_directory)
            return
        raise BackboneError(
            f"{self.name}: a {type(self).__name__} cannot be saved; keep the folder or file it came from"
        )


class _Reached(Exception):
    """Every tap has been read: the rest of the forward pass is not needed."""


class Call(NamedTuple):
    """One call of a module."""

    inputs: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any = None


def read_output(call: Call) -> Tensor:
    """The output, or the first of several (the down blocks of a U-Net also return their skips)."""
    output = call.output.sample if hasattr(call.output, "sample") else call.output
    return output[0] if isinstance(output, tuple) else output


def read_input(call: Call) -> Tensor:
    """The first input."""
    return call.inputs[0]


@dataclass(frozen=True)
class Reader:
    """Where a tap is read.

    Attributes:
        module: the one that is watched.
        read: from its call to the tapped tensor.
        before: read when the module is about to run; there is no output then.
    """

    module: nn.Module
    read: Callable[[Call], Tensor] = read_output
    before: bool = False


@contextmanager
def reading(readers: Mapping[str, Reader]) -> Iterator[dict[str, Tensor]]:
    """Fill a dict with activations while the network runs in the body, and end the run after the last one.

    The body is left right behind the deepest of the modules, however deep inside the call it is: what lies
    behind it is never computed.
    """
    activations: dict[str, Tensor] = {}
    handles = []

    def record(tap: str, module: nn.Module, *call: Any) -> None:
        activations[tap] = readers[tap].read(Call(*call))
        if len(activations) == len(readers) and not torch.compiler.is_compiling():  # an exported graph is pruned later
            raise _Reached

    try:
        for tap, reader in readers.items():
            watch = reader.module.register_forward_pre_hook if reader.before else reader.module.register_forward_hook
            handles.append(watch(partial(record, tap), with_kwargs=True))
        yield activations
    except _Reached:
        return
    finally:
        for handle in handles:
            handle.remove()
    if missing := sorted(set(readers) - set(activations)):
        raise TapError(f"the network ended without computing {', '.join(missing)}")


def check_weights(module: nn.Module, name: str) -> None:
    """Refuse weights that are not finite.

    Raises:
        BackboneError: naming the first tensor with NaN or infinite values.
    """
    for key, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise BackboneError(f"{name}: weight {key} has NaN or infinite values")
