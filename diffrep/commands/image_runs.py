"""Many images through one network, each into files of its own: `depth`, `normals`, `segment` and `probe predict`.

Whatever the inputs are called, every file lies below the output folder, no two images share one, an input is never
replaced, and what diffrep wrote is not taken for a photograph. What fails for one image is named, and the run goes on.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image
from tqdm import tqdm

from diffrep.commands.options import refuse_failed
from diffrep.files import (
    is_written_by_diffrep,
    number_of,
    printable,
    sweep_partials,
    words_of,
    write_document,
    write_image,
)
from diffrep.heads.maps import WRITERS, DepthMap, NormalMap, save_map
from diffrep.images import ImageError, find_images, frame_rate, is_video, load_image, read_frames, write_video

WRITERS_AT_ONCE = 4
ResultT = TypeVar("ResultT")
ValueT = TypeVar("ValueT")


@dataclass(frozen=True)
class Input:
    """One image or video.

    Attributes:
        path: as it was found.
        name: of its files below the output folder, without an ending.
        below: its path below the folder that was named on the command line, without the ending; the file's name where
            it was named itself.
    """

    path: Path
    name: str
    below: Path


def find_inputs(sources: Sequence[str], output: Path) -> list[Input]:
    """The images and videos that paths, folders and glob patterns name, each once.

    Args:
        output: what diffrep wrote below this folder is left out, unless a file is named itself.

    Raises:
        ImageError: a path does not exist, or there is no image.
    """
    named = {os.path.realpath(source) for source in sources if Path(source).is_file()}
    folders = [Path(os.path.abspath(source)) for source in sources if Path(source).is_dir()]
    place = os.path.realpath(output) + os.sep
    unique: dict[str, Path] = {}
    for path in find_images(sources):
        real = os.path.realpath(path)
        if real in named or not (real.startswith(place) and is_written_by_diffrep(path)):
            unique.setdefault(real, path)
    if not unique:
        raise ImageError(f"{', '.join(map(str, sources))}: no image found beside those that diffrep wrote")
    inputs = []
    for path, name in output_names(list(unique.values())).items():
        whole = Path(os.path.abspath(path))
        root = next((folder for folder in folders if whole.is_relative_to(folder)), whole.parent)
        inputs.append(Input(path, name, whole.relative_to(root).with_suffix("")))
    return inputs


def output_names(paths: Sequence[Path]) -> dict[Path, str]:
    """The name of each file among the outputs: its path below the deepest common folder, without the ending.

    Names that would be equal, also where upper and lower case do not differ, keep the ending; what is still equal
    gets a number.

    >>> output_names([Path("a/x.png"), Path("a/b/x.png"), Path("a/b/x.jpg"), Path("a/b/x.png.png")]).values()
    dict_values(['x', 'b/x.png', 'b/x.jpg', 'b/x.png.png'])
    """
    whole = {path: Path(os.path.abspath(path)) for path in paths}
    root = os.path.commonpath([path.parent for path in whole.values()]) if paths else ""
    relative = {path: value.relative_to(root) for path, value in whole.items()}
    names = {path: value.with_suffix("").as_posix() for path, value in relative.items()}
    for _ in range(2):  # an ending that is kept can meet another image's name
        counts = Counter(name.casefold() for name in names.values())
        names = {p: relative[p].as_posix() if counts[n.casefold()] > 1 else n for p, n in names.items()}
    used: set[str] = set()
    for path, name in names.items():
        number, unique = 1, name
        while unique.casefold() in used:
            number += 1
            unique = f"{name}-{number}"
        used.add(unique.casefold())
        names[path] = unique
    return names


@dataclass(frozen=True)
class OutputPlace:
    """Where the files of one image go.

    Attributes:
        folder: all outputs.
        name: of this image, see `output_names`.
        inputs: real paths that must not be replaced.
    """

    folder: Path
    name: str
    inputs: frozenset[str] = frozenset()

    def file(self, ending: str) -> Path:
        """``FOLDER/NAME_ENDING``.

        Raises:
            ValueError: an input lies there, or a link leads out of the folder.
        """
        path = self.folder / f"{self.name}_{ending}"
        real = os.path.realpath(path)
        if real in self.inputs:
            raise ValueError(f"{path} is an input and would be replaced: choose another -o")
        if not real.startswith(os.path.realpath(self.folder) + os.sep):
            raise ValueError(f"{path} lies outside {self.folder}, where a link leads: choose another -o")
        return path


def write_beside(
    place: OutputPlace, pictures: Mapping[str, Image.Image], kind: str, metadata: Mapping[str, object]
) -> list[Path]:
    """Write a map's pictures, NAME_PICTURE.png each, and at last its metadata, NAME_KIND.json; returns the files."""
    written = []
    for name, picture in pictures.items():
        written.append(place.file(f"{name}.png"))
        write_image(written[-1], picture)
    written.append(place.file(f"{kind}.json"))
    write_document(written[-1], metadata)
    return written


def write_map(
    place: OutputPlace, result: DepthMap | NormalMap, formats: Sequence[str], *, show: bool = True
) -> list[Path]:
    """Write a map in formats of `WRITERS`, its preview, an ensemble's spread, and at last what it measures."""
    written = []
    for name in dict.fromkeys(formats):
        written.append(place.file(f"{result.kind}{WRITERS[name][0]}"))
        save_map(written[-1], result)
    pictures = {f"{result.kind}_preview": result.picture()} if show else {}
    if result.uncertainty is not None:
        pictures["uncertainty"] = result.uncertainty_picture()
    return [*written, *write_beside(place, pictures, result.kind, result.metadata())]


def map_endings(kind: str, formats: Sequence[str], *, show: bool = True) -> list[str]:
    """The endings of the files that `write_map` writes of every image."""
    endings = [f"{kind}{WRITERS[name][0]}" for name in formats]
    return [*endings, *([f"{kind}_preview.png"] if show else []), f"{kind}.json"]


@dataclass(frozen=True)
class Item:
    """One image on its way: an image's own, or a frame of a video."""

    source: Input
    label: str  # its path, for messages; of a frame with its number
    place: OutputPlace
    number: int  # of the images that are read, in order


def run_images(
    head: Any,
    inputs: Sequence[Input],
    output: Path,
    config: Any,
    write: Callable[[Item, Any, ResultT], list[Path]],
    *,
    existing: Sequence[str] = (),
) -> list[dict[str, object]]:
    """Predict and write the maps of many images and videos; what fails is named on stderr, skipped and counted.

    A thread reads the next images and others write the last maps while the network computes (to pack a picture can take
    longer than to predict it), and images of one size share batches though others lie between them.

    Args:
        head: a head or a probe: `task`, `check(config)`, and `predict_each(images, config)` with one result each.
        config: as the head takes it; it has a `batch_size`.
        write: takes an image, which one it is and its map; returns the files it wrote.
        existing: endings of files; an image that has them all is left out.

    Returns:
        One entry for each image that succeeded, in the order of the inputs: its path and its files.

    Raises:
        ValueError: at the end, if an image failed: how many, and which.
    """
    head.check(config)
    run = ImageRun(len(inputs), head.task)
    sweep_partials(output)
    done: dict[int, dict[str, object]] = {}
    writing: deque[tuple[Item, Future[list[Path]]]] = deque()

    def settle(left: int) -> None:
        """Wait until no more than so many maps are still being written."""
        while len(writing) > left:
            item, future = writing.popleft()
            try:
                files = future.result()
            except Exception as error:
                run.fail(item.label, error)
                continue
            done[item.number] = {"image": item.label, "files": [str(file) for file in files]}
            run.bar.update(not is_video(item.source.path))

    with run.bar, ThreadPoolExecutor(min(WRITERS_AT_ONCE, os.cpu_count() or 1)) as writer:
        for item, image, result in _predictions(head, inputs, output, config, run, existing):
            writing.append((item, writer.submit(write, item, image, result)))
            settle(2 * config.batch_size)
        settle(0)
    if run.skipped:
        print(f"skipped {number_of(run.skipped, 'image')} whose files exist", file=sys.stderr)
    run.check()
    return [done[number] for number in sorted(done)]


def write_predicted_video(
    head: Any,
    inputs: Sequence[Input],
    output: Path,
    config: Any,
    picture: Callable[[Image.Image, ResultT], Image.Image],
) -> int:
    """Predict the frames of a video, or images in order, and write their pictures as one video.

    Returns:
        How many frames it has.

    Raises:
        ValueError: an image cannot be read; nothing is written then. One of another size than the first gets bars.
    """
    rate = frame_rate(inputs[0].path) if is_video(inputs[0].path) else 25
    head.check(config)
    run = ImageRun(len(inputs), head.task)

    def pictures() -> Iterator[Image.Image]:
        for item, image, result in _predictions(head, inputs, output.parent, config, run, ()):
            yield picture(image, result)
            run.bar.update(not is_video(item.source.path))
        run.check()

    with run.bar:
        return write_video(output, pictures(), rate)


def _predictions(
    head: Any,
    inputs: Sequence[Input],
    output: Path,
    config: Any,
    run: ImageRun,
    existing: Sequence[str],
) -> Iterator[tuple[Item, Image.Image, Any]]:
    images = _images(inputs, output, run, existing, getattr(head, "opened", load_image))
    for group in _batches(_ahead(images, 2 * config.batch_size), config.batch_size):
        try:
            results = list(head.predict_each([image for _, image in group], config))
        except Exception as error:  # the images of a batch have one size: what fails for one fails for all
            for item, _ in group:
                run.fail(item.label, error)
            continue
        for (item, image), result in zip(group, results, strict=True):
            yield item, image, result


def _images(
    inputs: Sequence[Input], output: Path, run: ImageRun, existing: Sequence[str], read: Callable[[Path], Any]
) -> Iterator[tuple[Item, Any]]:
    """What can be read of the inputs, loaded."""
    numbers = itertools.count()
    protected = frozenset(os.path.realpath(source.path) for source in inputs)
    for source in inputs:
        try:
            if is_video(source.path):
                for number, frame in enumerate(read_frames(source.path)):
                    place = OutputPlace(output, f"{source.name}/{number:06d}", protected)
                    if not run.skips(place, existing):
                        yield Item(source, f"{source.path}, frame {number}", place, next(numbers)), frame
                run.bar.update()
                continue
            place = OutputPlace(output, source.name, protected)
            if run.skips(place, existing):
                run.bar.update()
                continue
            image = read(source.path)
        except Exception as error:  # whatever a decoder raises: the other images are still to be done
            run.fail(str(source.path), error)
            continue
        yield Item(source, str(source.path), place, next(numbers)), image


def _ahead(values: Iterator[ValueT], count: int) -> Iterator[ValueT]:
    """The values in order; a thread computes up to so many of them before they are asked for."""
    with ThreadPoolExecutor(1) as reader:
        ready: deque[Future[ValueT]] = deque()
        try:
            while True:
                while len(ready) < count:
                    ready.append(reader.submit(next, values))
                try:
                    value = ready.popleft().result()
                except StopIteration:
                    return
                yield value
        finally:
            for future in ready:
                future.cancel()


def _batches(images: Iterable[tuple[Item, Image.Image]], size: int) -> Iterator[list[tuple[Item, Image.Image]]]:
    """Images of one size, in order; up to four batches of other sizes wait meanwhile, the oldest goes first."""
    waiting: dict[tuple[int, int], list[tuple[Item, Image.Image]]] = {}
    for item, image in images:
        group = waiting.setdefault(image.size, [])
        group.append((item, image))
        if len(group) >= size:
            yield waiting.pop(image.size)
        elif sum(map(len, waiting.values())) > 4 * size:
            yield waiting.pop(next(iter(waiting)))
    yield from waiting.values()


class ImageRun:
    """The progress of a run, and what failed in it."""

    def __init__(self, count: int, task: str, *, unit: str = "image") -> None:
        self.count, self.unit, self.skipped = count, unit, 0
        self.failed: list[str] = []
        self.bar = tqdm(total=count, desc=task, unit=unit, disable=count < 2)

    def skips(self, place: OutputPlace, existing: Sequence[str]) -> bool:
        """Whether files of these endings are all there; counts it."""
        done = bool(existing) and all((place.folder / f"{place.name}_{ending}").is_file() for ending in existing)
        self.skipped += done
        return done

    def fail(self, label: str, error: Exception) -> None:
        label = printable(label)
        reason = words_of(error).removeprefix(f"{label}: ")
        if not isinstance(error, (ValueError, OSError)):
            reason = f"{type(error).__name__}: {reason}"
        self.failed.append(f"{label}: {reason}")
        if self.count > 1:
            self.bar.write(f"skipped {self.failed[-1]}", file=sys.stderr)
            self.bar.update()

    def check(self) -> None:
        refuse_failed(self.failed, self.count, self.unit)


def print_files(model: str, about: str, done: Sequence[Mapping[str, Any]], output: Path, *, as_json: bool) -> None:
    """Say what was written, as JSON or in two lines."""
    if as_json:
        print(json.dumps({"model": model, "found": about, "images": done}, indent=2))
        return
    files = sum(len(entry["files"]) for entry in done)
    print(f"{model}: {about}")
    print(f"wrote {number_of(files, 'file')} for {number_of(len(done), 'image')} into {output}")
