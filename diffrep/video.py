"""Videos in and out, frame by frame, through PyAV (the extra ``video``)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

from PIL import Image

from diffrep.files import write_whole
from diffrep.images import ImageError

SUFFIXES = frozenset({".mp4", ".mov", ".mkv", ".avi", ".webm", ".m4v"})


def is_video(path: str | os.PathLike[str]) -> bool:
    """Whether a path ends as videos do.

    >>> is_video("clip.MP4"), is_video("photo.png")
    (True, False)
    """
    return Path(path).suffix.lower() in SUFFIXES


def read_frames(path: str | os.PathLike[str]) -> Iterator[Image.Image]:
    """The frames of a video, RGB, in order.

    Raises:
        ImageError: it cannot be decoded, or has no picture in it.
        ImportError: PyAV is not installed.
    """
    with _opened(path) as container:
        if not container.streams.video:
            raise ImageError(f"{path}: has no pictures in it")
        try:
            for frame in container.decode(container.streams.video[0]):
                yield frame.to_image()
        except _av().error.FFmpegError as error:
            raise ImageError(f"{path}: cannot be decoded ({error})") from None


def frame_rate(path: str | os.PathLike[str]) -> Fraction:
    """Frames per second; 25 where the file does not say.

    Raises:
        ImageError: it cannot be opened.
        ImportError: PyAV is not installed.
    """
    with _opened(path) as container:
        rates = [stream.average_rate for stream in container.streams.video]
        return Fraction(rates[0] or 25) if rates else Fraction(25)


def write_video(path: str | os.PathLike[str], frames: Iterable[Image.Image], rate: Fraction | int = 25) -> int:
    """Write a video, whole or not at all: H.264 (``.webm``: VP9).

    Args:
        frames: RGB, all of the size of the first; an odd side loses its last row or column, as the codecs want it.

    Returns:
        How many frames it has.

    Raises:
        ValueError: there is no frame, or one has another size.
        ImportError: PyAV is not installed.
    """
    count = 0

    def encode(partial: Path) -> None:
        nonlocal count
        with _av().open(os.fspath(partial), "w") as container:
            stream = container.add_stream("libvpx-vp9" if partial.suffix == ".webm" else "libx264", rate=rate)
            stream.pix_fmt = "yuv420p"
            size = None
            for image in frames:
                if size is None:
                    size = image.size
                    stream.width, stream.height = max(2, size[0] // 2 * 2), max(2, size[1] // 2 * 2)
                if image.size != size:
                    raise ValueError(f"{path}: frame {count} is {image.size}, the first is {size} pixels")
                even = image.convert("RGB").crop((0, 0, stream.width, stream.height))
                container.mux(stream.encode(_av().VideoFrame.from_image(even)))
                count += 1
            if not count:
                raise ValueError(f"{path}: there is no frame to write")
            container.mux(stream.encode())

    write_whole(path, encode)
    return count


def _opened(path: str | os.PathLike[str]) -> Any:
    av = _av()
    try:
        return av.open(os.fspath(path))
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise ImageError(f"{path}: is not a video that can be read ({error})") from None


def _av() -> Any:
    try:
        import av
    except ImportError:
        raise ImportError('videos need PyAV: pip install "diffrep[video]"') from None
    return av
