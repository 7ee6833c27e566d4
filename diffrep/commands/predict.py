"""``diffrep depth``, ``normals`` and ``segment``: images and videos through a head, each into its files."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
import tyro
from PIL import Image

from diffrep.commands.image_runs import (
    Input,
    Item,
    find_inputs,
    map_endings,
    print_files,
    run_images,
    write_map,
    write_predicted_video,
)
from diffrep.commands.options import PrecisionOptions, WeightOptions, numbers
from diffrep.files import (
    check_folder,
    check_writable,
    number_of,
    printable,
    read_document,
    write_document,
    write_image,
    write_whole,
)
from diffrep.heads.completion import (
    CompletionConfig,
    complete_depth,
    fill_holes,
    fill_mask,
    guidance_of,
    read_known_mask,
)
from diffrep.heads.dense import DenseHead, PredictConfig
from diffrep.heads.families import Frame
from diffrep.heads.loading import load_head
from diffrep.heads.maps import AXES, DepthMap, NormalMap, known_files, read_known_depths
from diffrep.heads.point_cloud import Intrinsics, normals_from_depth, ply_bytes, unproject
from diffrep.heads.segmentation import ObjectMask, SegmentConfig, backdrop, composite, cut_out, grey_image
from diffrep.images import VIDEO_SUFFIXES, is_video
from diffrep.tasks import Job, note_embedded

SUMMARY = "summary.json"
_PLY = {"intrinsics", "field_of_view", "normals_model", "nearest", "farthest", "frame"}  # options of point clouds


@dataclass(frozen=True)
class ImageCommand(WeightOptions, PrecisionOptions):
    """What the commands share that predict something of images."""

    JOB: ClassVar[Job]
    NEEDS: ClassVar[Mapping[str, str]] = {}  # option -> the one without which it changes nothing

    images: Annotated[tuple[str, ...], tyro.conf.Positional]  # files, folders, glob patterns; videos
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("maps")  # folder of the files, or a video (.mp4)
    model: str = ""  # embedded head, folder or hub id
    skip_existing: bool = False  # leave images out whose files exist, whatever settings made them
    json: bool = False  # print what was written as JSON

    def inputs(self) -> list[Input]:
        """The images, after the options have been checked and before any model is loaded.

        Raises:
            ValueError: options that do not go together.
        """
        if not self.images:
            raise ValueError(f"say which images: diffrep {_command_of(self.JOB)} IMAGES -o FOLDER")
        ignored = {"overlap": "tile", "reduction": "ensemble", **self.NEEDS}
        for name, needed in ignored.items():
            if {name, f"predict.{name}"} & self.typed and not {needed, f"predict.{needed}"} & self.typed:
                option, other = (text.replace("_", "-") for text in (name, needed))
                raise ValueError(f"--{option} says how --{other} works, which is not asked for")
        if self.to_video:
            check_writable(self.output, tuple(sorted(VIDEO_SUFFIXES)))
            if self.skip_existing or self.json:
                raise ValueError(f"--skip-existing and --json go with a folder, not with the video {self.output}")
        else:
            check_folder(self.output)
        return find_inputs(self.images, self.output)

    @property
    def to_video(self) -> bool:
        """The output is a video of the pictures."""
        return is_video(self.output) and not self.output.is_dir()

    def load(self, **options: Any) -> Any:
        """The head that `model` names; says once where it is a small one of ours.

        Raises:
            ValueError: it predicts something else.
        """
        options |= {"variant": self.variant, "revision": self.revision}
        head = load_head(self.model, **self.placed(), **options)
        if _command_of(head.task) != _command_of(self.JOB):
            raise ValueError(f"{self.model}: predicts {head.task}; use diffrep {_command_of(head.task)}")
        note_embedded(self.JOB, head.name)
        return head

    def write_video(
        self, head: Any, inputs: list[Input], config: Any, picture: Callable[[Image.Image, Any], Image.Image]
    ) -> None:
        """Predict all frames and write their pictures as one video."""
        count = write_predicted_video(head, inputs, self.output, config, picture)
        print(f"{self.model}: {head.recognised}")
        print(f"wrote {number_of(count, 'frame')} into {self.output}")


@dataclass(frozen=True)
class Depth(ImageCommand):
    """Predict the depth of images in one pass of a diffusion U-Net.

    For example: diffrep depth photo.jpg -o maps, a folder: diffrep depth photos/ -o maps --formats png npy, or a video:
    diffrep depth clip.mp4 -o depth.mp4

    Every image gets the files that --formats names, a coloured preview and a JSON file that says whether large values
    are near (disparity) or far (depth). Depth is relative, up to an unknown scale and shift, unless --known names some
    depths in metres. All frames of a video see the same noise.
    """

    FIRST = "output model formats predict.size predict.steps predict.ensemble known skip_existing device json"
    JOB = "depth"
    NEEDS: ClassVar[Mapping[str, str]] = {"fit": "known", "known_per_metre": "known", "fill": "known"}

    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("depth")  # folder of the files, or a video (.mp4)
    model: str = "tiny-depth"  # embedded head, folder or hub id: Lotus, Marigold, E2E-FT
    formats: tuple[Literal["png", "npy", "tiff", "ply"], ...] = ("png",)  # 16 bits; float32; float32; point cloud
    # known depths in metres: a .npy map with 0 or nan elsewhere, a 16-bit .png in millimetres, a .csv with lines
    # x,y,metres, or a folder of such files laid out as the images are; they make the depth metric
    known: Path | None = None
    preview: bool = True  # also write a coloured picture
    task: Literal["depth", "disparity"] | None = None  # what the model predicts, where its files do not say it
    family: str | None = None  # what the model is, where its files do not say it, for example e2e-ft
    base: str | None = None  # where VAE and text encoder are, for a model that names others than you have
    # how the known depths are met: a scale and shift; guided: the prediction follows them, which takes many passes
    # (Marigold-DC with a Marigold, our own way with one-step heads; diffrep eval completion measures it)
    fit: Literal["robust", "least-squares", "guided"] = "robust"
    fill: bool = False  # keep the known depths as they are and fill what is missing between them
    known_per_metre: float = 1000.0  # counts of a .png of known depths that make a metre
    intrinsics: str | None = None  # ply: fx,fy,cx,cy of the camera in pixels
    field_of_view: float | None = None  # ply: degrees along the longer side, where the camera is not known
    normals_model: str | None = None  # ply: head whose normals the points get; else they come from the depth
    nearest: float = 1.0  # ply: distance that relative depth is assumed to start at
    farthest: float = 10.0  # ply: and to end at
    frame: Frame = "rub"  # ply: axes of the point cloud
    predict: Annotated[PredictConfig, tyro.conf.OmitArgPrefixes] = field(default_factory=PredictConfig)
    guidance: CompletionConfig = field(default_factory=CompletionConfig)  # of --fit guided

    def run(self) -> None:
        self._check()
        inputs = self.inputs()
        known = {} if self.known is None else known_files(self.known, {i.path: (i.below, Path(i.name)) for i in inputs})
        head = self.load(task=self.task, family=self.family, base=self.base)
        if self.to_video:
            return self.write_video(head, inputs, self.predict, lambda image, result: result.picture())
        about = head.recognised
        if self.fit == "guided":
            guidance = guidance_of(head, self.guidance, self.predict.ensemble)
            about += f"; {guidance['guidance']}; for an image, {guidance['cost']}"
            typed = {option.removeprefix("guidance.") for option in self.typed if option.startswith("guidance.")}
            if unused := sorted(typed - guidance.keys()):
                raise ValueError(f"{self.model}: is guided by {guidance['guidance']}, without --guidance.{unused[0]}")
        normals = None
        if self.normals_model is not None:
            normals = load_head(self.normals_model, **self.placed())
            if normals.task != "normals":
                raise ValueError(f"{self.normals_model}: predicts {normals.task}, not normals")

        def write(item: Item, image: Image.Image, result: DepthMap) -> list[Path]:
            if self.known is not None:
                source = known.get(item.source.path, self.known)
                depths = read_known_depths(source, item.source.path, image.size, per_metre=self.known_per_metre)
                if self.fit == "guided":
                    result = complete_depth(head, image, depths, self.predict, self.guidance)
                else:
                    result = result.align(depths, method="robust" if self.fit == "robust" else "least squares")
                result = fill_holes(result, depths) if self.fill else result
            written = []
            if "ply" in self.formats:
                written.append(item.place.file("points.ply"))
                write_whole(written[0], self._points(image, result, normals))
            maps = [kind for kind in self.formats if kind != "ply"]
            return [*written, *write_map(item.place, result, maps, show=self.preview)]

        existing: list[str] = []
        if self.skip_existing:
            kind = "depth" if self.known is not None else head.task
            existing = ["points.ply"] if "ply" in self.formats else []
            existing += map_endings(kind, [k for k in self.formats if k != "ply"], show=self.preview)
        done = run_images(head, inputs, self.output, self.predict, write, existing=existing)
        print_files(self.model, about, done, self.output, as_json=self.json)

    def _check(self) -> None:
        """Refuse options that do not go together before any work.

        Raises:
            ValueError: naming them.
        """
        if not self.formats and not self.preview:
            raise ValueError("nothing would be written: name --formats, or leave the preview on")
        if self.to_video and {"formats", "known", "preview"} & self.typed:
            raise ValueError(f"--formats, --known and --preview go with a folder, not with the video {self.output}")
        if "ply" in self.formats:
            if self.intrinsics is None and self.field_of_view is None:
                raise ValueError(
                    "a point cloud needs the camera: --intrinsics fx,fy,cx,cy, or --field-of-view DEGREES to assume one"
                )
            if self.intrinsics is not None and self.field_of_view is not None:
                raise ValueError("--intrinsics and --field-of-view do not go together")
            if not 0 < self.nearest < self.farthest < float("inf"):
                raise ValueError(f"nearest must be above 0 and below farthest, got {self.nearest} and {self.farthest}")
            self._camera(2, 2)
        elif typed := sorted(_PLY & self.typed):
            names = ", ".join(f"--{name.replace('_', '-')}" for name in typed)
            raise ValueError(f"point clouds alone take {names}: they belong to --formats ply")
        if self.known is not None and not self.known.exists():
            raise ValueError(f"{self.known}: no such file or folder of known depths")
        if self.fit != "guided" and (typed := sorted(t for t in self.typed if t.startswith("guidance."))):
            raise ValueError(f"--{typed[0].replace('_', '-')} says how --fit guided works, which is not asked for")
        one_file = self.known if self.known is not None and self.known.is_file() else None
        if "known_per_metre" in self.typed and one_file and one_file.suffix.lower() != ".png":
            raise ValueError(f"--known-per-metre is of .png files, {one_file} is none")
        if not 0 < self.known_per_metre < float("inf"):
            raise ValueError(f"--known-per-metre must be above 0, got {self.known_per_metre}")

    def _camera(self, height: int, width: int) -> Intrinsics:
        if self.intrinsics is None:
            assert self.field_of_view is not None
            return Intrinsics.assumed(height, width, self.field_of_view)
        return Intrinsics(*numbers(self.intrinsics, "intrinsics"))

    def _points(self, image: Image.Image, result: DepthMap, head: DenseHead | None) -> bytes:
        camera = self._camera(image.height, image.width)
        depth = result.relative_depth(self.nearest, self.farthest)
        if head is None:
            normals = normals_from_depth(depth, camera)
        else:
            predicted = head.predict(image, self.predict)
            assert isinstance(predicted, NormalMap)
            normals = predicted.to_frame("rdf").values
        colours = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        unit = "metres" if result.metric else f"assumed, {self.nearest:g} to {self.farthest:g}"
        comment = f"unit: {unit}; axes: {AXES[self.frame]}; camera at 0, fx {camera.fx:.4g} fy {camera.fy:.4g}"
        return ply_bytes(unproject(depth, camera), colours, normals, frame=self.frame, comment=comment)


@dataclass(frozen=True)
class Normals(ImageCommand):
    """Predict the surface normals of images in one pass of a diffusion U-Net.

    For example: diffrep normals photo.jpg -o maps, or a video: diffrep normals clip.mp4 -o normals.mp4

    Every image gets the files that --formats names, a coloured preview and a JSON file that says what the camera axes
    are. Normals have unit length; what has no surface, such as the sky, faces the camera. All frames of a video see the
    same noise.
    """

    FIRST = "output model formats frame predict.size predict.steps predict.ensemble skip_existing device json"
    JOB = "normals"

    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("normals")  # folder of the files, or a video (.mp4)
    model: str = "tiny-normals"  # embedded head, folder or hub id: Lotus, Marigold, E2E-FT
    formats: tuple[Literal["png", "npy", "tiff"], ...] = ("png",)  # png: 16 bits; npy, tiff: float32
    frame: Frame | None = None  # camera axes of the files: lub (Lotus), rub (Marigold), rdf (OpenCV); else the model's
    preview: bool = True  # also write a coloured picture, always with x right and y up
    task: Literal["normals"] | None = None  # say it where the model's files do not
    family: str | None = None  # what the model is, where its files do not say it, for example e2e-ft
    base: str | None = None  # where VAE and text encoder are, for a model that names others than you have
    predict: Annotated[PredictConfig, tyro.conf.OmitArgPrefixes] = field(default_factory=PredictConfig)

    def run(self) -> None:
        if not self.formats and not self.preview:
            raise ValueError("nothing would be written: name --formats, or leave the preview on")
        if self.to_video and {"formats", "frame", "preview"} & self.typed:
            raise ValueError(f"--formats, --frame and --preview go with a folder, not with the video {self.output}")
        inputs = self.inputs()
        head = self.load(task=self.task, family=self.family, base=self.base)
        if self.to_video:
            return self.write_video(head, inputs, self.predict, lambda image, result: result.picture())

        def write(item: Item, image: Image.Image, result: NormalMap) -> list[Path]:
            result = result if self.frame is None else result.to_frame(self.frame)
            return write_map(item.place, result, self.formats, show=self.preview)

        existing = map_endings("normals", self.formats, show=self.preview) if self.skip_existing else []
        done = run_images(head, inputs, self.output, self.predict, write, existing=existing)
        print_files(self.model, head.recognised, done, self.output, as_json=self.json)


@dataclass(frozen=True)
class Segment(ImageCommand):
    """Find the object in images, in one pass of a diffusion U-Net, and cut it out.

    For example: diffrep segment photo.jpg -o out, a folder before white: diffrep segment photos/ -o out --outputs
    composite --background white, or a video: diffrep segment clip.mp4 -o object.mp4 --outputs composite

    The mask is soft along outlines, but no alpha matte: glass and smoke do not become transparent. Every run writes
    summary.json into the output folder.
    """

    FIRST = "output model outputs background threshold predict.size base skip_existing device json"
    JOB = "segmentation"

    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("segments")  # folder of the files, or a video (.mp4)
    model: str = "tiny-segmentation"  # embedded head, folder, hub id or weight file of a DiffDIS
    # soft mask; mask at the threshold; edges; RGBA; on the background. A video has one of them
    outputs: tuple[Literal["mask", "binary", "edge", "cutout", "composite"], ...] = ("mask", "cutout")
    background: str = "white"  # of the composite: a colour such as white or #20c040, or an image file
    threshold: float = 0.5  # of the binary mask
    base: str | None = None  # where VAE and text encoder are, for a U-Net alone, for example sd-turbo
    # what is known of the mask, grey and transparent (or .npy and nan) where it is not, or a folder of such files
    known: Path | None = None
    fill: bool = False  # keep what is known of the mask as it is and fill what is missing
    foreground: bool = True  # estimate the object's own colour along outlines, against halos
    predict: Annotated[SegmentConfig, tyro.conf.OmitArgPrefixes] = field(default_factory=SegmentConfig)

    def run(self) -> None:
        outputs = self._outputs()
        if self.fill != (self.known is not None):
            raise ValueError("--known and --fill go together: a mask with holes, and that they are filled")
        inputs = self.inputs()
        known = {} if self.known is None else known_files(self.known, {i.path: (i.below, Path(i.name)) for i in inputs})
        head = self.load(task="segmentation", base=self.base)
        config = replace(self.predict, edges="edge" in outputs)
        if self.to_video:
            return self.write_video(head, inputs, config, lambda image, r: self._picture(outputs[0], image, r))
        earlier = self._earlier()
        about: dict[str, dict[str, object]] = {}

        numbers: dict[str, int] = {}

        def write(item: Item, image: Image.Image, result: ObjectMask) -> list[Path]:
            if self.known is not None:
                if item.source.path not in known:
                    raise ValueError(f"{self.known}: has no known mask for {item.source.path.name}")
                result = fill_mask(result, read_known_mask(known[item.source.path]))
            about[item.label], numbers[item.label] = result.metadata(self.threshold), item.number
            files = {kind: item.place.file(f"{kind}.png") for kind in outputs}
            for kind, file in files.items():
                write_image(file, self._picture(kind, image, result))
            return list(files.values())

        summary: dict[str, Any] = {"model": self.model, "found": head.recognised, "images": []}
        existing = [f"{kind}.png" for kind in outputs] if self.skip_existing else []
        try:
            done = run_images(head, inputs, self.output, config, write, existing=existing)
        finally:  # also where images failed, for those that did not
            about = {path: about[path] for path in sorted(about, key=numbers.__getitem__)}
            summary["images"] = [{"image": path, **values} for path, values in {**earlier, **about}.items()]
            if about:
                write_document(self.output / SUMMARY, summary)
        if self.json:
            print(json.dumps(summary, indent=2))
            return
        print(f"{self.model}: {head.recognised}")
        for entry in done:
            print(f"{printable(str(entry['image']))}: the object covers {about[str(entry['image'])]['object']:.1%}")
        print(f"wrote {number_of(len(done) * len(outputs), 'file')} and {SUMMARY} into {self.output}")

    def _earlier(self) -> dict[str, dict[str, object]]:
        """What an earlier run wrote about the images that are skipped now."""
        if not self.skip_existing or not (self.output / SUMMARY).is_file():
            return {}
        entries = read_document(self.output / SUMMARY).get("images")
        entries = entries if isinstance(entries, list) else []
        return {str(e["image"]): {k: v for k, v in e.items() if k != "image"} for e in entries if "image" in e}

    def _outputs(self) -> list[str]:
        """What is written; refuses options that do not go together before any work.

        Raises:
            ValueError: naming them.
        """
        outputs: list[str] = list(dict.fromkeys(self.outputs))
        if self.to_video and self.known is not None:
            raise ValueError(f"--known goes with a folder, not with the video {self.output}")
        if self.to_video and "outputs" not in self.typed:
            outputs = ["mask"]
        if not outputs:
            raise ValueError("nothing would be written: name --outputs")
        if self.to_video and (len(outputs) > 1 or outputs == ["cutout"]):
            raise ValueError(f"{self.output}: a video holds one of mask, binary, edge, composite: name it --outputs")
        if not 0 < self.threshold < 1:
            raise ValueError(f"threshold must be between 0 and 1, got {self.threshold}")
        if self.predict.edges and "edge" not in outputs:
            raise ValueError("--edges predicts what nothing writes: name edge among --outputs")
        if "composite" in outputs:
            backdrop(self.background, (8, 8))
        elif "background" in self.typed:
            raise ValueError("--background is of the composite: name composite among --outputs")
        return outputs

    def _picture(self, kind: str, image: Image.Image, result: ObjectMask) -> Image.Image:
        if kind == "cutout":
            return cut_out(image, result.mask, estimate=self.foreground)
        if kind == "composite":
            return composite(image, result.mask, self.background, estimate=self.foreground)
        values = {"mask": result.mask, "binary": result.binary(self.threshold).float(), "edge": result.edge}[kind]
        assert values is not None
        return grey_image(values)


def _command_of(task: str) -> str:
    """The command that uses heads of a task."""
    return {"disparity": "depth", "segmentation": "segment"}.get(task, task)
