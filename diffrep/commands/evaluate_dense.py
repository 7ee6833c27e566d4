"""``diffrep eval depth`` and ``diffrep eval normals``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from torch import Tensor

from diffrep.commands.output import check_writable
from diffrep.commands.train_one_step import open_set
from diffrep.eval.datasets.depth_images import open_depth_set
from diffrep.eval.datasets.normal_images import open_normal_set
from diffrep.eval.depth import DepthProtocol, DepthReport, Predict, evaluate_depth
from diffrep.eval.normals import NormalProtocol, NormalReport, PredictNormals, evaluate_normals
from diffrep.eval.one_step_ablation import AblationSettings, run_ablation
from diffrep.eval.scene_maps import (
    Method,
    SceneMapReport,
    SceneMapSettings,
    evaluate_scene_maps,
    no_look,
    through_vae,
)
from diffrep.files import write_whole
from diffrep.heads.dense import DenseHead, PredictConfig
from diffrep.heads.loading import load_head
from diffrep.heads.maps import NormalMap
from diffrep.scenes import Scene


@dataclass(frozen=True, kw_only=True)
class DenseEvaluation:
    """What both commands take."""

    head: str  # embedded head, folder or hub id
    root: Path | None = None  # the benchmark's folder or tar archive; scenes need none
    listing: Path | None = None  # file that lists the samples; found by itself where it lies in the folder or beside it
    working_size: int | None = None  # long side that the network sees; the protocol's or the head's own if left out
    device: str = "cpu"
    work: Path | None = None  # numbers of each image; the same folder again goes on from what is there
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None  # also keep the report as this JSON file
    json: bool = False  # print JSON instead of the table
    scenes: Annotated[SceneMapSettings, tyro.conf.OmitArgPrefixes] = field(default_factory=SceneMapSettings)

    def _show(self, report: DepthReport | NormalReport | SceneMapReport) -> None:
        if self.output is not None:
            write_whole(self.output, report.to_json() + "\n")
        print(report.to_json() if self.json else report.table())
        problems = getattr(report, "problems", ())
        if problems:
            raise ValueError(f"{len(problems)} images were not counted, the first: {problems[0]}")

    def _folder(self) -> Path:
        if self.root is None:
            raise ValueError("this benchmark needs its folder or archive: --root PATH")
        return self.root

    def _scenes(self, head: DenseHead) -> None:
        config = PredictConfig(size=self.working_size, batch_size=self.scenes.batch_size)
        methods: dict[str, Method] = {"no look": no_look(head.task), self.head: head_method(head, config)}
        weights: dict[str, object] = {"no look": None, self.head: [head.found, head_fingerprint(head)]}
        methods["truth through the VAE"] = through_vae(head.model.vae, head.task)
        weights["truth through the VAE"] = None
        self._show(evaluate_scene_maps(methods, head.task, self.scenes, folder=self.work, weights=weights))


@dataclass(frozen=True, kw_only=True)
class EvalDepth(DenseEvaluation):
    """Depth or disparity of a head on a benchmark, with the papers' numbers beside it."""

    head: str = "tiny-depth"
    task: Literal["depth", "disparity"] | None = None  # where the head's files do not say it
    benchmark: Literal["scenes", "nyuv2", "kitti", "eth3d", "scannet", "diode"] = "scenes"
    protocol: Literal["lotus", "marigold"] = "lotus"  # whose working sizes are taken

    def run(self) -> None:
        if self.output is not None:
            check_writable(self.output, (".json",))
        head = load_head(self.head, task=self.task, device=self.device)
        if head.task == "normals":
            raise ValueError(f"{self.head} predicts normals: `diffrep eval normals` measures them")
        if self.benchmark == "scenes":
            self._scenes(head)
            return
        data = open_depth_set(self.benchmark, self._folder(), self.listing)
        # the harness resizes, the head does not; unless a size is asked for, or the head has its own
        own = self.working_size is not None or head.working_size < 256
        protocol = DepthProtocol(
            space="disparity" if head.task == "disparity" else "depth",
            side=None if own else data.benchmark.sides[self.protocol],
            fit_size=data.benchmark.fit_size,
        )
        config = PredictConfig(size=self.working_size if own else 0, official=not own)
        self._show(evaluate_depth(depth_predictor(head, config), data, protocol, method=self.head, folder=self.work))


@dataclass(frozen=True, kw_only=True)
class EvalNormals(DenseEvaluation):
    """Surface normals of a head on a benchmark, with the papers' numbers beside it."""

    head: str = "tiny-normals"
    benchmark: Literal["scenes", "nyuv2", "scannet", "ibims", "sintel", "oasis"] = "scenes"
    protocol: Literal["lotus", "e2e-ft"] = "lotus"  # padding and stretching of images
    average: Literal["pixels", "images"] = "pixels"  # over all pixels together (DSINE), or over images (Marigold)

    def run(self) -> None:
        if self.output is not None:
            check_writable(self.output, (".json",))
        head = load_head(self.head, task="normals", device=self.device)
        if self.benchmark == "scenes":
            self._scenes(head)
            return
        data = open_normal_set(self.benchmark, self._folder(), self.listing)
        small = head.working_size if head.working_size < 256 else None
        own = small if self.working_size is None else self.working_size
        lotus = self.protocol == "lotus"
        protocol = NormalProtocol(pad="lotus" if lotus else "none", stretch=not lotus, side=own, average=self.average)
        self._show(evaluate_normals(normal_predictor(head), data, protocol, method=self.head, folder=self.work))


@dataclass(frozen=True, kw_only=True)
class EvalAblation:
    """Lotus's ablation in small: noise or clean target, many steps or one, detail preserver, pretrained or not.

    Nine trainings of equal length from one base, each measured on the same held-out scenes.
    """

    task: Literal["disparity", "depth", "normals"] = "disparity"
    base: str = "tiny"
    data: str = "scenes"  # scenes to train on: rendered into WORK/scenes, or scenes=FOLDER
    scenes_to_render: int = 24000  # where --data names no folder
    work: Path = Path("runs/ablation")  # trainings; the same folder again goes on where it was
    latents: Path | None = None  # encoded scenes, shared with `diffrep train depth`; WORK
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None  # also keep the report as this JSON file
    json: bool = False  # print JSON instead of the table
    settings: Annotated[AblationSettings, tyro.conf.OmitArgPrefixes] = field(default_factory=AblationSettings)

    def run(self) -> None:
        if self.output is not None:
            check_writable(self.output, (".json",))
        samples = open_set(self.data, self.task, self.work, self.scenes_to_render)
        report = run_ablation(samples, self.task, self.work, self.settings, base=self.base, latents=self.latents)
        if self.output is not None:
            write_whole(self.output, report.to_json() + "\n")
        print(report.to_json() if self.json else report.table())


def head_method(head: DenseHead, config: PredictConfig) -> Method:
    """A head as a method of the scenes benchmark."""

    def method(scenes: Sequence[Scene]) -> Tensor:
        maps = []
        for found in head.predict_each([scene.image for scene in scenes], config):
            normals = isinstance(found, NormalMap)
            maps.append(found.to_frame("lub").values if normals else found.values[None])  # type: ignore[union-attr]
        return torch.stack(maps)

    return method


def depth_predictor(head: DenseHead, config: PredictConfig) -> Predict:
    """A head as a predictor of the depth harness."""

    def predict(image: Tensor) -> Tensor:
        return head.predict(image.permute(1, 2, 0).numpy().astype(np.uint8), config).values

    return predict


def normal_predictor(head: DenseHead) -> PredictNormals:
    """A head as a predictor of the normal harness, which pads images with values that no image has."""

    @torch.inference_mode()
    def predict(image: Tensor) -> Tensor:
        model = head.model
        latents = model.encode((image[None].to(model.device) + 1) / 2)
        noise = None
        if head.family.first_latent == "noise":
            noise = model.draw((int(latents.shape[-2]), int(latents.shape[-1])), 0, 0)
        normals = head.read(model.decode(model.predict(latents, noise)))
        return NormalMap(normals[0].cpu(), head.family.frame).to_frame("lub").values

    return predict


def head_fingerprint(head: DenseHead) -> float:
    """A number that changes with the weights."""
    return round(sum(float(p.detach().double().abs().sum()) for p in head.model.network.parameters()), 4)
