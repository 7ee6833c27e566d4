"""Models in folders of diffrep's that go to the hub and come back: `save_pretrained`, `from_pretrained`, `push_to_hub`.

Backbones and heads have names of many kinds, which `load_backbone` and `load_head` know; what is here has a folder.
"""

from __future__ import annotations

import os
from abc import abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffrep.backbones.repositories import expand, is_hub_id, repository
from diffrep.files import replace_folder

if TYPE_CHECKING:
    from typing_extensions import Self

    ModelHubMixin: Any = object
else:
    from huggingface_hub import ModelHubMixin


class HubFolder(ModelHubMixin):
    """Base of models that `save_folder` writes and `open_folder` reads."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        return object.__new__(cls)  # the mixin would write the arguments, paths among them, beside the weights

    @classmethod
    @abstractmethod
    def open_folder(cls, folder: Path, **options: Any) -> Any:
        """The model in a folder."""

    @abstractmethod
    def save_folder(self, folder: Path) -> None:
        """Write a folder that needs no other."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], *, revision: str | None = None, **options: Any
    ) -> Self:
        """Load a model of this class from a folder or a hub id.

        Args:
            revision: of a model on the hub: branch, tag or commit.
            options: as the function that loads such folders has them.

        Raises:
            ValueError: there is no such model, or it is one of another class.
        """
        name = expand(pretrained_model_name_or_path)
        if not Path(name).exists() and is_hub_id(name):
            on_hub = repository(name, revision=revision)
            loaded = cls.open_folder(on_hub.fetch(on_hub.files), **options)
        elif revision is not None and Path(name).exists():
            raise ValueError(f"{name}: is a folder, which has no revision {revision}")
        else:
            loaded = cls.open_folder(Path(name), **options)
        if not isinstance(loaded, cls):
            raise ValueError(f"{name}: is a {type(loaded).__name__}, no {cls.__name__}")
        return loaded

    def _save_pretrained(self, save_directory: Path) -> None:
        """The hook of `save_pretrained` and `push_to_hub`."""
        replace_folder(save_directory, self.save_folder)
