"""``diffrep restore``: photographs made clean and large in one pass of a diffusion U-Net."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tyro
from PIL import Image

from diffrep.commands.image_runs import Item, print_files, run_images
from diffrep.commands.options import PrecisionOptions, ReportOptions
from diffrep.commands.predict import ImageCommand
from diffrep.files import printable, write_whole
from diffrep.heads.loading import load_head
from diffrep.heads.restoration.photograph import Photograph
from diffrep.heads.restoration.restorer import RestoreConfig
from diffrep.pictures import data_uri, render
from diffrep.settings import check_options

SHOWN = 2000  # pixels of the longer side of pictures in a comparison


@dataclass(frozen=True)
class Restore(ImageCommand):
    """Make photographs clean and large: blur, noise and JPEG go, four times the size unless --scale says otherwise.

    For example: diffrep restore old.jpg -o restored, or a folder: diffrep restore photos/ -o restored --keep-size
    --skip-existing

    Images of any size are restored tile by tile without seams. Transparency, 16 bits, EXIF tags and the colour profile
    stay. A restorer invents what it cannot see: what it draws is likely, not true.
    """

    FIRST = "output model base predict.scale predict.keep_size format compare skip_existing device json"
    JOB = "restore"
    NEEDS: ClassVar[Mapping[str, str]] = {"overlap": "overlap"}  # tiles are there without being asked for

    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("restored")  # folder of the files, or a video (.mp4)
    model: str = "tiny-restore"  # embedded head, folder of one, or the file of a PiSA-SR, OSEDiff or S3Diff
    base: str | None = None  # folder or hub id that such a file adapts: Stable Diffusion 2.1-base, SD-Turbo for S3Diff
    prompt: str | None = None  # of such a model; what its authors take where left out, without their image tagger
    format: Literal["png", "tif", "jpg", "webp"] = "png"  # of the files; png and tif hold 16 bits, jpg no transparency
    compare: bool = False  # also write a page with a slider between the enlarged and the restored image
    predict: Annotated[RestoreConfig, tyro.conf.OmitArgPrefixes] = field(default_factory=RestoreConfig)

    def run(self) -> None:
        inputs = self.inputs()
        if self.to_video and {"format", "compare"} & self.typed:
            raise ValueError(f"--format and --compare go with a folder, not with the video {self.output}")
        options: dict[str, Any] = {"adjustable": True} if (self.predict.pixel, self.predict.semantic) != (1, 1) else {}
        head = self.load(task="restore", base=self.base, prompt=self.prompt, **options)
        if self.to_video:
            return self.write_video(head, inputs, self.predict, lambda image, result: result.picture().convert("RGB"))

        def write(item: Item, image: Photograph, result: Photograph) -> list[Path]:
            files = [item.place.file(f"restored.{self.format}")]
            result.save(files[0])
            if self.compare:
                files.append(item.place.file("comparison.html"))
                write_whole(files[-1], comparison(item.label, image, result))
            return files

        endings = [f"restored.{self.format}", *(["comparison.html"] if self.compare else [])]
        done = run_images(
            head, inputs, self.output, self.predict, write, existing=endings if self.skip_existing else []
        )
        print_files(self.model, head.recognised, done, self.output, as_json=self.json)


def comparison(name: str, before: Photograph, after: Photograph) -> str:
    """A page with one image over the other and a slider between them."""
    pictures = []
    for photograph in (before, after):
        shown = photograph.picture().convert("RGB").resize(after.size, Image.Resampling.BICUBIC)
        shown.thumbnail((SHOWN, SHOWN))
        pictures.append(data_uri(shown, "JPEG", quality=90))
    lead = f"{before.size[0]} x {before.size[1]} pixels, restored to {after.size[0]} x {after.size[1]}."
    return render(
        "compare.html", title=printable(Path(name).name), style="compare.css", script="compare.js", lead=lead,
        before=pictures[0], after=pictures[1],
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class EvalRestoration(ReportOptions, PrecisionOptions):
    """Restore a published test set and measure it, beside a bicubic and the papers' numbers.

    For example: diffrep eval restoration --benchmark realsr --data RealSR/ --model pisa_sr.pkl --base sd21-base/

    --data has degraded images in test_LR or lq and originals in test_HR or gt. PSNR and SSIM are those of Y with
    no border cropped, as in the papers of diffusion models. --measures lpips dists needs torchmetrics, musiq, niqe,
    clipiqa and others pyiqa, which is free for non-commercial use alone; both fetch weights.
    """

    data: Path | None = None  # folder of the test set
    benchmark: Literal["realsr", "drealsr", "div2k", "imagenet"] = "realsr"  # whose published rows stand beside
    model: str = "tiny-restore"  # embedded head, folder, or file of a PiSA-SR, OSEDiff or S3Diff
    base: str | None = None  # folder or hub id that such a file adapts
    crop: int = 0  # pixels of the border that do not count
    measures: tuple[str, ...] = ()  # more measures, by their names in torchmetrics (lpips, dists) or pyiqa
    predict: Annotated[RestoreConfig, tyro.conf.OmitArgPrefixes] = field(default_factory=RestoreConfig)

    def run(self) -> None:
        from diffrep.eval.restoration import evaluate_restoration, paired_files

        check_options(self, crop="0..")
        self.check_output()
        if self.data is None:
            raise ValueError("say where the test set lies: --data FOLDER")
        pairs = paired_files(self.data)
        head = load_head(self.model, task="restore", base=self.base, **self.placed())
        options: dict[str, Any] = {"benchmark": self.benchmark, "crop": self.crop, "measures": self.measures}
        self.show(evaluate_restoration(head, pairs, self.predict, **options))
