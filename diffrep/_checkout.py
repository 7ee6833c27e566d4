"""Let a checkout import ``diffrep.heads`` and ``diffrep.eval`` from the folders beside ``diffrep/``.

The repository keeps ``heads/`` and ``eval/`` at its top level; a wheel or an editable install maps them
to sub-packages. Python started in the root of a checkout would otherwise find ``diffrep/`` there without
them. The finder knows these two names only, and comes last, so an installed package is asked first.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

_PACKAGE = Path(__file__).resolve().parent
_FOLDERS = {"diffrep.heads": _PACKAGE.parent / "heads", "diffrep.eval": _PACKAGE.parent / "eval"}


class CheckoutFinder:
    """A meta path finder for the two mapped sub-packages of a checkout."""

    @classmethod
    def find_spec(
        cls, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        folder = _FOLDERS.get(name)
        if folder is None or not (folder / "__init__.py").is_file():
            return None
        return importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )


def install() -> None:
    """Append the finder once, and only inside a checkout."""
    is_checkout = (_PACKAGE.parent / "pyproject.toml").is_file() and not (_PACKAGE / "heads").exists()
    if is_checkout and CheckoutFinder not in sys.meta_path:
        sys.meta_path.append(CheckoutFinder)  # type: ignore[arg-type]  # a class with find_spec is a finder
