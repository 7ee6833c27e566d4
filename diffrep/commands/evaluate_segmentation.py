"""``diffrep eval segmentation``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from PIL import Image
from torch import Tensor

from diffrep.commands.output import check_writable
from diffrep.eval.scene_maps import SceneMapSettings
from diffrep.eval.segmentation import (
    SPLITS,
    MaskReport,
    Protocol,
    SceneMethod,
    centred_guess,
    evaluate_dis,
    evaluate_scene_masks,
    masks_through_vae,
)
from diffrep.files import write_whole
from diffrep.heads.mask_prediction import SegmentationHead, SegmentConfig
from diffrep.heads.segmentation_loading import load_segmentation
from diffrep.scenes import Scene


@dataclass(frozen=True, kw_only=True)
class EvalSegmentation:
    """Masks of a head on held-out rendered scenes or on DIS5K, with the published numbers beside it.

    Scenes also show what the truth becomes when the VAE encodes and decodes it, and a guess without the image.
    """

    head: str = "tiny-segmentation"  # embedded head, folder or hub id
    base: str | None = None  # where its VAE and text encoder are, for a U-Net alone
    compare: tuple[str, ...] = ()  # further heads on the same scenes, for example one trained without edges
    benchmark: Literal["scenes", "dis"] = "scenes"
    data: Path | None = None  # dis: folder with DIS-VD, DIS-TE1, ..., each with im/ and gt/
    splits: tuple[str, ...] = SPLITS  # dis: which of them
    maps: Path | None = None  # dis: keep the maps here, SPLIT/NAME.png; what is there already is scored as it is
    protocol: Protocol = "soft"  # soft maps (DIS tables), or thresholded at 0.5 (DiffDIS' own script)
    hce: bool | None = None  # count human correction effort; needs pysodmetrics. Yes for dis, no for scenes
    device: str = "cpu"  # cpu or cuda
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None  # also keep the report as this JSON file
    json: bool = False  # print JSON instead of the table
    scenes: Annotated[SceneMapSettings, tyro.conf.OmitArgPrefixes] = field(default_factory=SceneMapSettings)
    predict: SegmentConfig = field(default_factory=SegmentConfig)

    def run(self) -> None:
        if self.output is not None:
            check_writable(self.output, (".json",))
        report = self._scenes() if self.benchmark == "scenes" else self._dis()
        if self.output is not None:
            write_whole(self.output, report.to_json() + "\n")
        print(report.to_json() if self.json else report.table())

    def _load(self, name: str) -> SegmentationHead:
        return load_segmentation(name, base=self.base, device=self.device)

    def _scenes(self) -> MaskReport:
        head = self._load(self.head)
        methods: dict[str, SceneMethod] = {"no look": centred_guess, self.head: scene_method(head, self.predict)}
        methods |= {name: scene_method(self._load(name), self.predict) for name in self.compare}
        methods["truth through the VAE"] = masks_through_vae(head.model.vae)
        return evaluate_scene_masks(methods, self.scenes, protocol=self.protocol, hce=bool(self.hce))

    def _dis(self) -> MaskReport:
        if self.data is None:
            raise ValueError("this benchmark needs its folder: --data PATH")
        head = self._load(self.head)

        def predict(images: list[Image.Image]) -> Iterator[Tensor]:
            for found in head.predict_each(images, self.predict):
                yield found.mask

        return evaluate_dis(
            self.head, predict, self.data,
            splits=self.splits, protocol=self.protocol, hce=self.hce is not False, folder=self.maps,
        )  # fmt: skip


def scene_method(head: SegmentationHead, config: SegmentConfig) -> SceneMethod:
    """A head as a method of the scenes benchmark."""

    def method(scenes: Sequence[Scene]) -> Tensor:
        return torch.stack([found.mask for found in head.predict_each([s.image for s in scenes], config)])

    return method
