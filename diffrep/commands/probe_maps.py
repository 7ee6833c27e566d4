"""``diffrep probe pixels`` and ``diffrep probe dense``: probes that say something of every pixel."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from tqdm import tqdm

from diffrep.commands.probe import Extraction, NewProbe, WorkOptions
from diffrep.eval.probes import score_dense_probe, score_pixel_probe
from diffrep.eval.rendering import SceneFiles, What, annotated_scenes, scene_classes
from diffrep.files import number_of
from diffrep.heads.probes import (
    AnnotatedFiles,
    Annotation,
    DenseSettings,
    PixelClasses,
    PixelSettings,
    Resizing,
    find_classes,
    hold_out,
    pair_annotations,
    train_dense_probe,
    train_pixel_probe,
)
from diffrep.heads.probes.annotated import DenseTask

SCENES = "scenes"


@dataclass(frozen=True, kw_only=True)
class MapImages(WorkOptions):
    """Which annotated images, and which of them are held out."""

    held_out: float = 0.2  # share of a folder's images that the probe is measured on
    scenes: Annotated[SceneFiles, tyro.conf.OmitArgPrefixes] = field(default_factory=SceneFiles)

    def find(self, images: str, annotations: Path | None, what: What) -> tuple[AnnotatedFiles, AnnotatedFiles]:
        """Images to train on and images to measure on.

        Raises:
            ValueError: the folder of annotations is missing, or is named beside scenes.
        """
        if images == SCENES:
            if annotations is not None:
                raise ValueError(f"{SCENES} bring their own annotations, got {annotations}")
            chosen = self.scenes
            place = f"annotated-{chosen.scene_size}-{chosen.scenes}-{chosen.test_scenes}"
            return annotated_scenes(self.work / place, what, chosen, workers=max(self.workers, 1))
        if annotations is None:
            raise ValueError(f"{images}: say which folder holds the {what} of the images, files of the same names")
        return hold_out(pair_annotations(images, annotations), self.held_out, self.split_seed)


@dataclass(frozen=True, kw_only=True)
class TrainPixels(NewProbe):
    """Few-shot segmentation: labels of a few images teach the classes of pixels (DDPM-seg).

    For example: diffrep probe pixels photos/ labels/ --classes names.txt -o pixel-probe
    """

    images: Annotated[str, tyro.conf.Positional]  # folder; or scenes (classes of parts), scenes:categories
    labels: Annotated[Path | None, tyro.conf.Positional] = None  # folder of .png or .npy of the images' names
    classes: Path | None = None  # names: a text file, one a line, or JSON; by numbers where left out
    ignored: int = 255  # number of pixels that are not used
    backbone: str = "tiny"  # whose features are read
    taps: tuple[str, ...] | None = None  # as the backbone recommends where left out
    timesteps: tuple[int, ...] = (50, 150, 250)  # noise levels whose maps are put together
    pixels_per_image: int = 4096  # at most, drawn at random
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("pixel-probe")  # folder of the probe
    resizing: Annotated[Resizing, tyro.conf.OmitArgPrefixes] = field(default_factory=Resizing)
    data: Annotated[MapImages, tyro.conf.OmitArgPrefixes] = field(default_factory=MapImages)
    extraction: Annotated[Extraction, tyro.conf.OmitArgPrefixes] = field(default_factory=Extraction)
    fit: PixelSettings = field(default_factory=PixelSettings)

    def run(self) -> None:
        self.check_new("pixels")
        if not self.timesteps or self.taps == () or self.pixels_per_image < 1:
            raise ValueError("--timesteps, --taps and --pixels-per-image need at least one")
        train, test, labels = self._data()
        backbone = self.extraction.load_one(self.backbone)
        options: dict[str, Any] = {
            name: getattr(self, name) for name in ("taps", "timesteps", "pixels_per_image", "resizing")
        }
        if place := self.extraction.place(self.typed, backbone):
            options |= {"taps": place["taps"], "timesteps": (place["timestep"],)}
        examples = tqdm(labels.examples(train), desc="reading pixels", unit="image", total=len(train))
        config = self.extraction.config()
        probe = train_pixel_probe(examples, labels.names, backbone, extract=config, settings=self.fit, **options)
        scores = score_pixel_probe(probe, test, backbone, labels).document()
        about = {"data": train.name, "images": len(train), "test": {"images": len(test), **scores}}
        ordered = sorted(scores["iou"].items(), key=lambda item: -item[1])
        lines = [f"{name:<20} IoU {100 * value:5.1f} %" for name, value in ordered]
        lines.append(
            f"test  mIoU {100 * scores['mean_iou']:.1f} %  pixels {100 * scores['pixel_accuracy']:.1f} %"
            f"  {number_of(len(test), 'image')}, {len(train):,} to train on"
        )
        self.finish(replace(probe, about=about), lines)

    def _data(self) -> tuple[AnnotatedFiles, AnnotatedFiles, PixelClasses]:
        name, _, what = self.images.partition(":")
        if name != SCENES:
            train, test = self.data.find(self.images, self.labels, "parts")
            return train, test, find_classes([train, test], self.classes, self.ignored)
        if what not in ("", "parts", "categories"):
            raise ValueError(f"scenes have labels of parts and categories, got {self.images!r}")
        kind: What = "categories" if what == "categories" else "parts"
        train, test = self.data.find(SCENES, self.labels, kind)
        names = scene_classes(kind)
        return train, test, PixelClasses(names, tuple(range(len(names))))


@dataclass(frozen=True, kw_only=True)
class TrainDense(NewProbe):
    """Train a probe of depth or surface normals on frozen maps, with probe3d's recipe.

    For example: diffrep probe dense depth photos/ depths/ --taps up.1 up.2 -o depth-probe
    """

    task: Annotated[DenseTask, tyro.conf.Positional]  # depth or normals
    images: Annotated[str, tyro.conf.Positional]  # folder, or scenes
    annotations: Annotated[Path | None, tyro.conf.Positional] = None  # folder of .npy or .png of the images' names
    backbone: str = "tiny"  # whose features are read
    taps: tuple[str, ...] | None = None  # as the backbone recommends where left out; a dpt reader takes four
    timestep: int | None = None  # noise level 0..999
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("dense-probe")  # folder of the probe
    annotation: Annotated[Annotation, tyro.conf.OmitArgPrefixes] = field(default_factory=Annotation)
    data: Annotated[MapImages, tyro.conf.OmitArgPrefixes] = field(default_factory=MapImages)
    extraction: Annotated[Extraction, tyro.conf.OmitArgPrefixes] = field(default_factory=Extraction)
    fit: DenseSettings = field(default_factory=DenseSettings)

    def run(self) -> None:
        self.check_new("dense")
        if self.taps == ():
            raise ValueError("--taps needs at least one")
        train, test = self.data.find(self.images, self.annotations, self.task)
        annotation = Annotation() if self.images == SCENES else self.annotation
        backbone = self.extraction.load_one(self.backbone)
        options: dict[str, Any] = {"settings": self.fit, "annotation": annotation, "workers": self.data.workers}
        place = {"taps": self.taps, "timestep": self.timestep} | self.extraction.place(self.typed, backbone)
        config = self.extraction.config(**place)
        probe = train_dense_probe(train, self.task, backbone, self.data.work / "maps", extract=config, **options)
        scores = score_dense_probe(probe, test, backbone, annotation)
        self.finish(replace(probe, about={**probe.about, "test": scores}), _lines(scores))


def _lines(scores: dict[str, Any]) -> list[str]:
    if "metric" not in scores:
        return [
            f"test  mean angle {scores['mean']:.2f}, median {scores['median']:.2f}, under 11.25"
            f" {scores['under 11.25']:.1f} %, under 30 {scores['under 30']:.1f} %"
            f"  {number_of(scores['images'], 'image')}"
        ]
    return [
        f"test, {name:<7}  AbsRel {100 * scores[key]['abs_rel']:.2f} %  delta1 {100 * scores[key]['delta1']:.2f} %"
        f"  RMSE {scores[key]['rmse']:.3f} m  {number_of(scores['images'], 'image')}"
        for name, key in (("metric", "metric"), ("aligned", "aligned"))
    ]
