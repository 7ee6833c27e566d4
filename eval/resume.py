"""Numbers per image in files that a killed run goes on from, and the loop over the images that they lack."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from diffrep.eval.datasets.pairs import Problem

Sample = TypeVar("Sample", bound="Named", covariant=True)


class Named(Protocol):
    """Something with a name."""

    @property
    def name(self) -> str: ...


class SampleSet(Protocol[Sample]):
    """Images of a benchmark, read one by one."""

    def __len__(self) -> int: ...

    def samples(self, skip: frozenset[str]) -> Iterator[Sample | Problem]: ...


def count_images(
    data: SampleSet[Sample], done: frozenset[str], count: Callable[[Sample], None], *, title: str, progress: bool
) -> list[Problem]:
    """Call `count` with every image that is not done; what could not be read or raised ValueError comes back."""
    problems = []
    with tqdm(total=len(data), initial=len(done), desc=title, unit="image", disable=not progress) as bar:
        for sample in data.samples(done):
            bar.update(1)
            if isinstance(sample, Problem):
                problems.append(sample)
                continue
            try:
                count(sample)
            except ValueError as error:
                problems.append(Problem(sample.name, str(error)))
    return problems


class ResultFile:
    """One JSON object a line: an image's name and its numbers. A line that was cut off is dropped.

    Args:
        path: None keeps them in memory only.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.rows: dict[str, Mapping[str, float]] = {}
        if path is None or not path.is_file():
            return
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                row = json.loads(line)
                self.rows[row.pop("image")] = row
        path.write_text("".join(json.dumps({"image": name, **row}) + "\n" for name, row in self.rows.items()))

    def add(self, image: str, values: Mapping[str, float]) -> None:
        """Keep the numbers of one image."""
        self.rows[image] = dict(values)
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps({"image": image, **values}) + "\n")


class AngleFiles:
    """Angular errors of every image, one .npy file each.

    Args:
        folder: None keeps them in memory.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder / "angles" if folder is not None else None
        self.kept: dict[str, Tensor] = {}

    def _file(self, image: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{image}.npy"

    def __contains__(self, image: str) -> bool:
        return image in self.kept if self.folder is None else self._file(image).is_file()

    def add(self, image: str, errors: Tensor) -> None:
        """Keep the errors of one image: (N,) degrees."""
        if self.folder is None:
            self.kept[image] = errors
            return
        file = self._file(image)
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".{file.name}.partial.npy")
        np.save(partial, errors.numpy())
        partial.replace(file)

    def errors(self, image: str) -> Tensor:
        """What was kept: (N,) degrees."""
        return self.kept[image] if self.folder is None else torch.from_numpy(np.load(self._file(image)))
