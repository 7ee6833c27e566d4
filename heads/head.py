"""What all heads share: they are modules that take one image or many, and folders that can be saved and shared."""

from __future__ import annotations

import dataclasses
import os
from abc import abstractmethod
from collections.abc import Hashable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from PIL import Image
from torch import nn

from diffrep.files import replace_folder
from diffrep.images import ImageLike, load_image
from diffrep.settings import changed

if TYPE_CHECKING:
    from typing_extensions import Self

    ModelHubMixin: Any = object
else:
    from huggingface_hub import ModelHubMixin

ConfigT = TypeVar("ConfigT")
ResultT = TypeVar("ResultT")


class HeadError(ValueError):
    """A head that cannot be found, recognised or loaded; the message names the folder and what is wrong."""


class Head(nn.Module, ModelHubMixin, Generic[ConfigT, ResultT]):
    """A network that turns an image into a result, through a diffusion model.

    Attributes:
        model: the machine; training and tests call its parts.
        task: what it predicts.
        name: as `load_head` was asked for it.
        recognised: what it was recognised as, and by what, in one sentence.
        source: the folder or hub id that it came from; empty where it was made in memory.
        base: the folder or hub id that its VAE came from, likewise.
    """

    task: str
    base: str = ""
    opened = staticmethod(load_image)  # how it takes an image
    CONFIG: type[ConfigT]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        return object.__new__(cls)  # the mixin would write the arguments, paths among them, beside the weights

    def __init__(self, model: nn.Module, task: str, *, name: str, recognised: str = "", source: str = "") -> None:
        super().__init__()
        self.model: Any = model
        self.task, self.name, self.recognised, self.source = task, name, recognised, source

    @property
    def found(self) -> str:
        """The former name of `recognised`."""
        return self.recognised

    @property
    def family_name(self) -> str:
        """Its kind of checkpoints: a name out of `diffrep.heads.families.FAMILIES`, or "diffdis"."""
        return str(self.model.family_name)

    @property
    def working_size(self) -> int:
        """Side in pixels that the network sees by default; the long one where it keeps the image's shape."""
        return int(self.model.working_size)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    def __repr__(self) -> str:
        million = sum(p.numel() for p in self.parameters()) / 1e6
        return (
            f"{type(self).__name__}({self.name!r}, {self.task} by {self.family_name}, {self.working_size} px,"
            f" weights from {self.source or 'memory'}, {million:.1f} M parameters,"
            f" {str(self.dtype).removeprefix('torch.')} on {self.device})"
        )

    def settings(self, config: ConfigT, **about: object) -> dict[str, object]:
        """What made a result, for its record."""
        dtype = str(self.dtype).removeprefix("torch.")
        return {"head": self.name, **about, "dtype": dtype, **dataclasses.asdict(config)}  # type: ignore[call-overload]

    @abstractmethod
    def check(self, config: ConfigT) -> None:
        """Refuse settings that do not go together or with this head.

        Raises:
            ValueError: naming the setting.
        """

    @abstractmethod
    def group(self, image: Image.Image, config: ConfigT) -> Hashable:
        """What neighbouring images must have in common to go through the network together; None: goes alone."""

    @abstractmethod
    def predict_batch(self, images: list[Image.Image], config: ConfigT, **drawn: Any) -> Iterable[ResultT]:
        """The results of images of one group."""

    def forward(self, images: ImageLike | list[ImageLike], config: ConfigT | None = None, **settings: Any) -> Any:
        """Predict of one image, or of a list of images; keywords are settings of the configuration.

        Returns:
            A result, or a list of results.

        Raises:
            TypeError: there is no such setting; the message lists the near names.
        """
        config = changed(config or self.CONFIG(), settings, self.task)
        if isinstance(images, (list, tuple)):
            return list(self.predict_each(images, config))
        return self.predict(images, config)

    def predict(self, image: ImageLike, config: ConfigT | None = None, **drawn: Any) -> ResultT:
        """Predict of one image; see `predict_each`."""
        return next(iter(self.predict_each([image], config, **drawn)))

    @torch.no_grad()
    def predict_each(
        self, images: Iterable[ImageLike], config: ConfigT | None = None, **drawn: Any
    ) -> Iterator[ResultT]:
        """Predict of images of any sizes, in order; neighbours that the network sees alike share a batch.

        A result does not depend on the other images, their order or the batch size beyond float rounding. Frames of a
        video all see the same noise.

        Args:
            drawn: noise instead of drawn noise, as the head names it.

        Raises:
            ImageError: an image cannot be read.
            ValueError: a setting does not go with the head, for example an ensemble of a head without noise.
        """
        config = config or self.CONFIG()
        self.check(config)
        size: int = config.batch_size  # type: ignore[attr-defined]  # every configuration has it
        waiting: list[Image.Image] = []
        common: Hashable = None
        for image in map(self.opened, images):
            group = self.group(image, config)
            if waiting and (group is None or group != common or len(waiting) >= size):
                yield from self.predict_batch(waiting, config, **drawn)
                waiting = []
            waiting.append(image)
            common = group
        if waiting:
            yield from self.predict_batch(waiting, config, **drawn)

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], **options: Any) -> Self:
        """Load a head of this class; see `diffrep.heads.loading.load_head`.

        Raises:
            HeadError: it cannot be loaded, or is a head of another class.
        """
        from diffrep.heads.loading import load_head

        head = load_head(name, **options)
        if not isinstance(head, cls):
            raise HeadError(f"{name}: is a {type(head).__name__}, not a {cls.__name__}")
        return head

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write a folder that needs no other; see `diffrep.heads.head_folders.save_head`."""
        from diffrep.heads.head_folders import save_head

        replace_folder(save_directory, lambda partial: save_head(self, partial))
