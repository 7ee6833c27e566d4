"""What ``diffrep depth``, ``normals`` and ``segment`` share: many images through one head, each into its files."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from PIL import Image
from tqdm import tqdm

from diffrep.commands.output import write_image
from diffrep.files import write_whole
from diffrep.heads.map_files import WRITERS, preview, preview_of_uncertainty, save_map
from diffrep.heads.maps import DepthMap, NormalMap
from diffrep.images import load_image

Map = DepthMap | NormalMap
Result = TypeVar("Result")
Result_co = TypeVar("Result_co", covariant=True)


class Settings(Protocol):
    """How a head looks at an image."""

    @property
    def batch_size(self) -> int: ...


class Head(Protocol[Result_co]):
    """What turns images into results: `DenseHead`, `SegmentationHead`."""

    @property
    def task(self) -> str: ...

    def check(self, config: Any) -> None: ...

    def predict_each(self, images: list[Image.Image], config: Any) -> Iterator[Result_co]: ...


def write_beside(
    base: Path, pictures: Mapping[str, Image.Image], kind: str, metadata: Mapping[str, object]
) -> list[Path]:
    """Write a map's pictures, BASE_NAME.png each, and its metadata, BASE_KIND.json; returns the files."""
    written = []
    for name, picture in pictures.items():
        written.append(base.with_name(f"{base.name}_{name}.png"))
        write_image(written[-1], picture)
    written.append(base.with_name(f"{base.name}_{kind}.json"))
    write_whole(written[-1], json.dumps(metadata, indent=2) + "\n")
    return written


def write_map(base: Path, result: Map, formats: Sequence[str], *, show: bool = True) -> list[Path]:
    """Write a map in formats of `WRITERS`, its preview where it is shown, an ensemble's doubt, and what it measures."""
    kind = result.space if isinstance(result, DepthMap) else "normals"
    written = []
    for name in formats:
        written.append(base.with_name(f"{base.name}_{kind}{WRITERS[name][0]}"))
        save_map(written[-1], result)
    pictures = {f"{kind}_preview": preview(result)} if show else {}
    if result.uncertainty is not None:
        pictures["uncertainty"] = preview_of_uncertainty(result)
    return [*written, *write_beside(base, pictures, kind, result.metadata())]


def run_images(
    head: Head[Result],
    paths: Sequence[Path],
    config: Settings,
    write: Callable[[Path, str, Image.Image, Result], list[Path]],
) -> list[dict[str, object]]:
    """Predict and write the maps of many images; what fails is named on stderr, skipped and counted.

    Args:
        write: takes an image's path, its name among the outputs, the image and its map; returns the files it wrote.

    Returns:
        One entry for each image that succeeded: its path and its files.

    Raises:
        ValueError: at the end, if an image failed: how many, and which.
    """
    head.check(config)
    names = output_names(paths)
    failed: list[tuple[Path, str]] = []
    done: list[dict[str, object]] = []
    with tqdm(total=len(paths), desc=head.task, unit="image", disable=len(paths) < 2) as bar:
        for group in _batches(paths, config.batch_size, failed, bar):
            for path, image, result in _predicted(head, group, config, failed, bar):
                try:
                    files = write(path, names[path], image, result)
                except (ValueError, OSError) as error:
                    _fail(path, error, failed, bar)
                    continue
                done.append({"image": str(path), "files": [str(file) for file in files]})
                bar.update()
    if failed:
        reasons = "; ".join(f"{path}: {_without(reason, path)}" for path, reason in failed[:3])
        more = f"; and {len(failed) - 3} more, named above" if len(failed) > 3 else ""
        count = "" if len(paths) == 1 else f"{len(failed)} of {len(paths)} images failed: "
        raise ValueError(f"{count}{reasons}{more}")
    return done


def _batches(
    paths: Sequence[Path], size: int, failed: list[tuple[Path, str]], bar: tqdm
) -> Iterator[list[tuple[Path, Image.Image]]]:
    """Neighbouring images of one size, loaded."""
    waiting: list[tuple[Path, Image.Image]] = []
    for path in paths:
        try:
            image = load_image(path)
        except (ValueError, OSError) as error:
            _fail(path, error, failed, bar)
            continue
        if waiting and (waiting[0][1].size != image.size or len(waiting) >= size):
            yield waiting
            waiting = []
        waiting.append((path, image))
    if waiting:
        yield waiting


def _predicted(
    head: Head[Result],
    group: list[tuple[Path, Image.Image]],
    config: Settings,
    failed: list[tuple[Path, str]],
    bar: tqdm,
) -> Iterator[tuple[Path, Image.Image, Result]]:
    """The maps of a batch. Its images have one size, so that what fails for one fails for all of them."""
    try:
        maps = list(head.predict_each([image for _, image in group], config))
    except ValueError as error:
        for path, _ in group:
            _fail(path, error, failed, bar)
        return
    for (path, image), result in zip(group, maps, strict=True):
        yield path, image, result


def _fail(path: Path, error: Exception, failed: list[tuple[Path, str]], bar: tqdm) -> None:
    reason = " ".join(str(error).split())
    failed.append((path, reason))
    if bar.total > 1:
        bar.write(f"skipped {path}: {_without(reason, path)}", file=sys.stderr)
        bar.update()


def _without(reason: str, path: Path) -> str:
    """A message without the path that it begins with."""
    return reason.removeprefix(f"{path}: ")


def output_names(paths: Sequence[Path]) -> dict[Path, str]:
    """The name of each image among the outputs: its path below the deepest common folder, without the ending.

    Images that differ in their ending alone keep it.

    >>> output_names([Path("a/x.png"), Path("a/b/x.png"), Path("a/b/x.jpg")]).values()
    dict_values(['x', 'b/x.png', 'b/x.jpg'])
    """
    root = Path(os.path.commonpath([path.absolute().parent for path in paths]))
    relative = {path: path.absolute().relative_to(root) for path in paths}
    stems = [value.with_suffix("") for value in relative.values()]
    return {
        path: (value if stems.count(value.with_suffix("")) > 1 else value.with_suffix("")).as_posix()
        for path, value in relative.items()
    }


def check_folder(folder: Path) -> None:
    """Refuse an output folder before any work is done for it.

    Raises:
        ValueError: it is a file.
        OSError: it cannot be written to.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: is a file; the maps go into a folder")
    place = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    if not os.access(place, os.W_OK):
        raise OSError(f"{folder}: the folder {place} cannot be written to")
