"""``diffrep eval``: matching, painting, and heads that predict depth, normals or masks, on scenes and benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
import torch
import tyro
from PIL import Image
from torch import Tensor

from diffrep.backbones.pipelines import load_parts
from diffrep.commands.options import PrecisionOptions, ReportOptions, refuse_unused
from diffrep.commands.train_heads import open_set
from diffrep.eval.cache import StoredType
from diffrep.eval.correspondence import CorrespondenceReport, Search, evaluate_pairs
from diffrep.eval.datasets.dense_images import DenseSet, open_benchmark
from diffrep.eval.datasets.pair_sets import (
    Ap10kSet,
    read_ap10k,
    read_pf_pascal,
    read_pf_willow,
    read_spair,
    read_spair_u,
)
from diffrep.eval.datasets.pairs import PairSet, read_keypoint_tables, read_tss
from diffrep.eval.flow import FlowSearch, evaluate_flow
from diffrep.eval.homography import HomographySettings, evaluate_homographies
from diffrep.eval.maps import DepthProtocol, NormalProtocol, Predict, evaluate_maps
from diffrep.eval.matchers import baselines, matchers_of
from diffrep.eval.one_step_ablation import AblationSettings, run_ablation
from diffrep.eval.protocols import PROTOCOLS, Protocol
from diffrep.eval.report import Report
from diffrep.eval.samplers import SamplersEvaluation, evaluate_samplers
from diffrep.eval.scene_maps import Method, SceneMapSettings, evaluate_scene_maps, maps_through_vae, no_look
from diffrep.eval.scenes import ScenesSettings, evaluate_scenes
from diffrep.eval.segmentation import (
    SPLITS,
    MaskProtocol,
    MaskReport,
    centred_guess,
    evaluate_dis,
    evaluate_scene_masks,
    masks_through_vae,
)
from diffrep.eval.synthesis import SynthesisEvaluation, evaluate_synthesis
from diffrep.files import check_folder, check_writable, number_of, write_whole
from diffrep.heads.dense import DenseHead, PredictConfig
from diffrep.heads.loading import load_head
from diffrep.heads.maps import NormalMap
from diffrep.heads.segmentation import SegmentationHead, SegmentConfig
from diffrep.recipes import Correspondence, recipe, with_backbones
from diffrep.scenes import Scene
from diffrep.synthesis import SynthesisSettings, load_synthesis


def compare(evaluate: Callable[..., Report], whole: Correspondence, *settings: object, box: bool) -> Report:
    """Evaluate a recipe's matchers beside those without a network; `box`: views show an object in a known box."""
    plain, ours = baselines(box=box), matchers_of(whole)
    return evaluate(plain[0] | ours[0], plain[1] | ours[1], *settings)


def correspondence(name: str, options: PrecisionOptions, models: Sequence[str] = ()) -> Correspondence:
    """A recipe's models where and as the options say; `models`: [ROLE=]MODEL in the place of its own."""
    chosen, backbones = with_backbones(recipe(name), models, **options.placed())
    return Correspondence(chosen, backbones=backbones, **options.placed())


@dataclass(frozen=True, kw_only=True)
class Scenes(ReportOptions, PrecisionOptions):
    """Match parts of rendered objects: held-out pairs of different instances, seen and unseen categories."""

    recipe: str = "tiny"  # each of its backbones alone and all of them fused are compared
    settings: Annotated[ScenesSettings, tyro.conf.OmitArgPrefixes] = field(default_factory=ScenesSettings)

    def run(self) -> None:
        self.check_output()
        whole = correspondence(self.recipe, self)
        self.show(compare(evaluate_scenes, whole, self.settings, box=True))


@dataclass(frozen=True, kw_only=True)
class Homography(ReportOptions, PrecisionOptions):
    """Match points of three sample photographs in views of them that a known homography gives."""

    recipe: str = "tiny-views"  # each of its backbones alone and all of them fused are compared
    settings: Annotated[HomographySettings, tyro.conf.OmitArgPrefixes] = field(default_factory=HomographySettings)

    def run(self) -> None:
        self.check_output()
        whole = correspondence(self.recipe, self)
        self.show(compare(evaluate_homographies, whole, self.settings, box=False))


@dataclass(frozen=True, kw_only=True)
class Synthesis(ReportOptions, PrecisionOptions):
    """Paint from embeddings of held-out scenes: FID, seams, embedding consistency, use as augmentation."""

    model: str = "tiny-synthesis"  # or the folder of one
    settings: Annotated[SynthesisEvaluation, tyro.conf.OmitArgPrefixes] = field(default_factory=SynthesisEvaluation)
    sampling: SynthesisSettings = field(default_factory=SynthesisSettings)

    def run(self) -> None:
        self.check_output()
        model = load_synthesis(self.model, **self.placed())
        self.show(evaluate_synthesis(model, self.settings, self.sampling))


@dataclass(frozen=True, kw_only=True)
class Samplers(ReportOptions, PrecisionOptions):
    """Compare samplers on one model at equal numbers of network calls: distance to a fine solution, with and without
    guidance.
    """

    model: str = "tiny-synthesis"  # or the folder of a synthesis model, a Stable Diffusion or an ADM
    prompt: tuple[str, ...] = ()  # of a model with a text encoder: what is painted, "a photograph" where left out
    # of a synthesis model: held-out scenes whose embeddings are painted; with --fid, images of any model; else 4
    count: int | None = None
    label: int | None = None  # of a class-conditional ADM
    guidance: float | None = None  # the second table's, the first has none; the model's own where left out
    picture: Path | None = None  # also write what they paint as this picture: rows are samplers, columns calls
    settings: Annotated[SamplersEvaluation, tyro.conf.OmitArgPrefixes] = field(default_factory=SamplersEvaluation)

    def run(self) -> None:
        from diffrep.eval.samplers import guided_models
        from diffrep.searched import as_candidate

        self.check_output()
        if self.picture is not None:
            check_writable(self.picture, (".png",))
        as_candidate(self.settings.schedule)  # refuses another kind of file before anything is loaded
        models = guided_models(
            self.model,
            self.guidance,
            prompts=self.prompt,
            label=self.label,
            count=self.count,
            repeated=bool(self.settings.fid),
            **self.placed(),
        )
        report = evaluate_samplers(models, self.settings)
        if self.picture is not None:
            picture = report.picture()
            write_whole(self.picture, lambda partial: picture.save(partial, "PNG"))
        self.show(report)


Benchmark = Literal["scenes", "spair", "spair-u", "pf-pascal", "pf-willow", "ap-10k", "tss"]
_USUAL = {  # benchmark -> protocol where the recipe has none of its own
    "spair": "spair-dift",
    "spair-u": "spair-u-geoaware",
    "pf-pascal": "pf-pascal-sd-dino",
    "pf-willow": "pf-willow",
    "ap-10k": "ap-10k-geoaware",
}
_READERS: dict[str, tuple[Callable[..., PairSet], tuple[str, ...]]] = {  # benchmark -> reader, its splits
    "spair": (read_spair, ("trn", "val", "test")),
    "spair-u": (read_spair_u, ("test",)),
    "pf-pascal": (read_pf_pascal, ("trn", "val", "test")),
    "pf-willow": (read_pf_willow, ("test",)),
    "ap-10k": (read_ap10k, get_args(Ap10kSet)),
}
# options that only data sets on disk have, and only data sets of pairs of images
_OF_DATA = frozenset({"data", "categories", "keep", "batch_size"})
_OF_PAIRS = frozenset({"protocol", "split", "pose", "keypoints", "failures"})


@dataclass(frozen=True, kw_only=True)
class EvalCorrespondence(PrecisionOptions):
    """Evaluate a recipe on a published correspondence benchmark, or on rendered scenes."""

    benchmark: Benchmark
    data: Path | None = None  # the data set's folder, in the layout in which it is released; scenes need none
    recipe: str = "tiny"  # how features are read, fused and matched, by name or from a .toml or .yaml file
    backbone: tuple[str, ...] = ()  # [ROLE=]MODEL: a model in the place of the recipe's own
    protocol: str | None = None  # how it is counted; none: that of the recipe's paper, or the usual one
    split: str = "test"  # of spair, pf-pascal (trn, val, test) and ap-10k (also test_cross_species, ..._family)
    categories: tuple[str, ...] = ()  # or, for tss, subsets; none: all
    search: Search = "auto"  # whose way from keypoints to matches: the protocol's, the recipe's, or what fits
    pose: bool = False  # adaptive pose alignment: match from the source's mirror image where that is nearer
    keypoints: Path | None = None  # TOML or JSON with left-right pairs and parts of the keypoints, by category
    keep: StoredType = "float32"  # in which features are kept on disk
    batch_size: int = 8  # images extracted together
    failures: int = 12  # pictures of the worst pairs
    # features, matches, report.json, report.txt and failures/ go here; the same folder again goes on
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("correspondence")

    def run(self) -> None:
        self.evaluate()

    def evaluate(self) -> Report:
        """Evaluate, print the tables, write the files and return the report.

        Raises:
            DatasetError: the folder is not that data set.
            ValueError: an unknown protocol, recipe, split or category, an option that the benchmark does not have, or
                a folder with other settings.
        """
        self._check()
        report = self._evaluated()
        if isinstance(report, CorrespondenceReport):
            report.save_failures(self.failures, self.output / "failures")
        print(report.table())
        write_whole(self.output / "report.json", report.to_json())
        write_whole(self.output / "report.txt", report.table() + "\n")
        return report

    def _check(self) -> None:
        if self.batch_size < 1 or self.failures < 0:
            raise ValueError(
                f"--batch-size must be at least 1 and --failures at least 0, got {self.batch_size} and {self.failures}"
            )
        check_folder(self.output)
        refuse_unused(self.typed, self.benchmark, {"scenes": (_OF_DATA | _OF_PAIRS), "tss": _OF_PAIRS})

    def _models(self) -> Correspondence:
        return correspondence(self.recipe, self, self.backbone)

    def _evaluated(self) -> Report:
        if self.benchmark == "scenes":
            return compare(evaluate_scenes, self._models(), box=True)
        if self.data is None:
            raise ValueError(f"benchmark {self.benchmark} needs --data, the folder of the data set")
        storage: dict[str, Any] = {"keep": self.keep, "batch_size": self.batch_size}
        if self.benchmark == "tss":
            flows = read_tss(self.data, subsets=self.categories or None)
            rule: FlowSearch = "sd-dino" if self.search == "protocol" else "recipe"
            return evaluate_flow(flows, self._models(), self.output, search=rule, **storage)
        protocol = self.chosen_protocol()
        pairs = self.read(self.data, protocol)
        tables = None if self.keypoints is None else read_keypoint_tables(self.keypoints)
        options = {"search": self.search, "pose": self.pose, "tables": tables, **storage}
        return evaluate_pairs(pairs, protocol, self._models(), self.output, **options)

    def chosen_protocol(self) -> Protocol:
        """The protocol that is asked for, or that goes with benchmark and recipe.

        Raises:
            ValueError: there is none of that name for the benchmark.
        """
        fitting = [name for name, protocol in PROTOCOLS.items() if protocol.benchmark == self.benchmark]
        of_recipe = f"{self.benchmark}-{self.recipe.partition(':')[0]}"
        name = self.protocol or (of_recipe if of_recipe in fitting else _USUAL[self.benchmark])
        if name not in fitting:
            raise ValueError(f"{self.benchmark} has no protocol {name!r}; it has {', '.join(fitting)}")
        return PROTOCOLS[name]

    def read(self, data: Path, protocol: Protocol) -> PairSet:
        """The data set's pairs.

        Raises:
            DatasetError: the folder is not that data set.
            ValueError: the benchmark has no such split or category.
        """
        read, splits = _READERS[self.benchmark]
        if self.split not in splits:
            raise ValueError(f"{self.benchmark} has no split {self.split!r}; it has {', '.join(splits)}")
        options: dict[str, Any] = {"categories": self.categories or None}
        if len(splits) > 1:
            options["split"] = self.split
        if self.benchmark in ("spair", "spair-u"):
            options["keypoints"] = protocol.keypoints
        return read(data, **options)


ScenesOption = Annotated[SceneMapSettings, tyro.conf.OmitArgPrefixes]


@dataclass(frozen=True, kw_only=True)
class DenseEvaluation(ReportOptions, PrecisionOptions):
    """What depth and normals take."""

    head: str  # embedded head, folder or hub id
    root: Path | None = None  # the benchmark's folder or tar archive; scenes need none
    listing: Path | None = None  # file that lists the samples; looked for in the folder and beside it if left out
    working_size: int | None = None  # long side that the network sees; the protocol's or the head's own if left out
    work: Path | None = None  # numbers of each image; the same folder again goes on from what is in it
    scenes: ScenesOption = field(default_factory=SceneMapSettings)

    def _finish(self, report: Report) -> None:
        self.show(report)
        if report.problems:
            raise ValueError(
                f"not counted: {number_of(len(report.problems), 'image')}, the first: {report.problems[0]}"
            )

    def _open(self, kind: Literal["depth", "normals"], benchmark: str) -> DenseSet:
        if self.root is None:
            raise ValueError("this benchmark needs its folder or archive: --root PATH")
        return open_benchmark(kind, benchmark, self.root, self.listing)

    def _scenes(self, head: DenseHead) -> Report:
        config = PredictConfig(size=self.working_size, batch_size=self.scenes.batch_size)
        methods: dict[str, Method] = {"no look": no_look(head.task), self.head: head_method(head, config)}
        methods["truth through the VAE"] = maps_through_vae(head.model.vae, head.task)
        weights: dict[str, object] = dict.fromkeys(methods)
        weights[self.head] = [head.recognised, head_fingerprint(head)]
        return evaluate_scene_maps(methods, head.task, self.scenes, folder=self.work, weights=weights)


@dataclass(frozen=True, kw_only=True)
class EvalDepth(DenseEvaluation):
    """Depth or disparity of a head on a benchmark, with the papers' numbers beside it."""

    head: str = "tiny-depth"
    task: Literal["depth", "disparity"] | None = None  # where the head's files do not say it
    benchmark: Literal["scenes", "nyuv2", "kitti", "eth3d", "scannet", "diode"] = "scenes"
    protocol: Literal["lotus", "marigold"] = "lotus"  # whose working sizes are taken

    def run(self) -> None:
        self.check_output()
        refuse_unused(self.typed, self.benchmark, {"scenes": frozenset({"root", "listing", "protocol"})})
        head = load_head(self.head, task=self.task, **self.placed())
        if head.task == "normals":
            raise ValueError(f"{self.head} predicts normals: `diffrep eval normals` measures them")
        if self.benchmark == "scenes":
            self._finish(self._scenes(head))
            return
        data = self._open("depth", self.benchmark)
        # the harness resizes, the head does not; unless a size is asked for, or the head has its own
        by_head = self.working_size is not None or head.working_size < 256
        protocol = DepthProtocol(
            space="disparity" if head.task == "disparity" else "depth",
            side=None if by_head else data.layout.sides.get(self.protocol),
            fit_size=data.layout.fit_size,
        )
        config = PredictConfig(size=self.working_size if by_head else 0, official=not by_head)
        predict, weights = depth_predictor(head, config), [head.recognised, head_fingerprint(head), self.working_size]
        self._finish(evaluate_maps(predict, data, protocol, method=self.head, weights=weights, folder=self.work))


@dataclass(frozen=True, kw_only=True)
class EvalNormals(DenseEvaluation):
    """Surface normals of a head on a benchmark, with the papers' numbers beside it."""

    head: str = "tiny-normals"
    benchmark: Literal["scenes", "nyuv2", "scannet", "ibims", "sintel", "oasis"] = "scenes"
    protocol: Literal["lotus", "e2e-ft"] = "lotus"  # padding and stretching of images
    average: Literal["pixels", "images"] = "pixels"  # over all pixels together (DSINE), or over images (Marigold)

    def run(self) -> None:
        self.check_output()
        refuse_unused(self.typed, self.benchmark, {"scenes": frozenset({"root", "listing", "protocol", "average"})})
        head = load_head(self.head, task="normals", **self.placed())
        if self.benchmark == "scenes":
            self._finish(self._scenes(head))
            return
        data = self._open("normals", self.benchmark)
        small = head.working_size if head.working_size < 256 else None
        side = small if self.working_size is None else self.working_size
        lotus = self.protocol == "lotus"
        protocol = NormalProtocol(pad="lotus" if lotus else "none", stretch=not lotus, side=side, average=self.average)
        predict, weights = normal_predictor(head), [head.recognised, head_fingerprint(head)]
        self._finish(evaluate_maps(predict, data, protocol, method=self.head, weights=weights, folder=self.work))


@dataclass(frozen=True, kw_only=True)
class EvalSegmentation(ReportOptions, PrecisionOptions):
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
    protocol: MaskProtocol = "soft"  # soft maps (DIS tables), or thresholded at 0.5 (DiffDIS' own script)
    hce: bool | None = None  # count human correction effort; needs pysodmetrics. Yes for dis, no for scenes
    scenes: ScenesOption = field(default_factory=SceneMapSettings)
    predict: SegmentConfig = field(default_factory=SegmentConfig)

    def run(self) -> None:
        self.check_output()
        unused = {"scenes": frozenset({"data", "splits", "maps"}), "dis": frozenset({"compare"})}
        refuse_unused(self.typed, self.benchmark, unused)
        self.show(self._scenes() if self.benchmark == "scenes" else self._dis())

    def _load(self, name: str) -> SegmentationHead:
        return load_head(name, task="segmentation", base=self.base, **self.placed())

    def _scenes(self) -> MaskReport:
        head = self._load(self.head)
        methods: dict[str, Method] = {"no look": centred_guess, self.head: mask_method(head, self.predict)}
        methods |= {name: mask_method(self._load(name), self.predict) for name in self.compare}
        methods["truth through the VAE"] = masks_through_vae(head.model.vae)
        return evaluate_scene_masks(methods, self.scenes, protocol=self.protocol, hce=bool(self.hce))

    def _dis(self) -> MaskReport:
        if self.data is None:
            raise ValueError("this benchmark needs its folder: --data PATH")
        head = self._load(self.head)

        def predict(images: list[Image.Image]) -> Iterator[Tensor]:
            return (prediction.mask for prediction in head.predict_each(images, self.predict))

        return evaluate_dis(
            self.head, predict, self.data,
            splits=self.splits, protocol=self.protocol, hce=self.hce is not False, folder=self.maps,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class EvalAblation(ReportOptions):
    """Lotus's ablation in small: noise or clean target, many steps or one, detail preserver, pretrained or not.

    Nine trainings of equal length from one base, each measured on the same held-out scenes.
    """

    task: Literal["disparity", "depth", "normals"] = "disparity"
    base: str = "tiny"  # embedded model, diffusers folder or hub id that each training starts from
    data: str = "scenes"  # scenes to train on: rendered into WORK/scenes, or scenes=FOLDER
    scenes_to_render: int = 24000  # where --data names no folder
    work: Path = Path("runs/ablation")  # trainings; the same folder again goes on where it was
    latents: Path | None = None  # encoded scenes, shared with `diffrep train depth`; WORK
    settings: Annotated[AblationSettings, tyro.conf.OmitArgPrefixes] = field(default_factory=AblationSettings)

    def run(self) -> None:
        self.check_output()
        for folder in filter(None, (self.work, self.latents)):
            check_folder(folder)
        load_parts(self.base)  # a base that cannot be loaded is refused before scenes are rendered for it
        samples = open_set(self.data, self.task, self.work, self.scenes_to_render)()
        self.show(run_ablation(samples, self.task, self.work, self.settings, base=self.base, latents=self.latents))


def head_method(head: DenseHead, config: PredictConfig) -> Method:
    """A head as a method of the scenes benchmark."""

    def method(scenes: Sequence[Scene]) -> Tensor:
        maps = []
        for one in head.predict_each([scene.image for scene in scenes], config):
            maps.append(one.to_frame("lub").values if isinstance(one, NormalMap) else one.values[None])
        return torch.stack(maps)

    return method


def depth_predictor(head: DenseHead, config: PredictConfig) -> Predict:
    """A head as a predictor of the depth harness."""

    def predict(image: Tensor) -> Tensor:
        return head.predict(image.permute(1, 2, 0).numpy().astype(np.uint8), config).values

    return predict


def normal_predictor(head: DenseHead) -> Predict:
    """A head as a predictor of the normal harness, which pads images with values that no image has."""

    @torch.inference_mode()
    def predict(image: Tensor) -> Tensor:
        model = head.model
        pixels = (image[None].to(model.device) + 1) / 2
        latents = model.encode(pixels)
        noise = None
        if head.family.first_latent == "noise":
            noise = model.draw((int(latents.shape[-2]), int(latents.shape[-1])), 0, 0)
        normals = head.read(model.draw_maps(model.predict(latents, noise), pixels))
        return NormalMap(normals[0].cpu(), head.family.frame).to_frame("lub").values

    return predict


def head_fingerprint(head: DenseHead) -> float:
    """A number that changes with the weights."""
    parts = [head.model.network, *([head.model.decoder] if head.model.decoder is not None else [])]
    return round(sum(float(p.detach().double().abs().sum()) for part in parts for p in part.parameters()), 4)


def mask_method(head: SegmentationHead, config: SegmentConfig) -> Method:
    """A head of masks as a method of the scenes benchmark."""

    def method(scenes: Sequence[Scene]) -> Tensor:
        return torch.stack([one.mask for one in head.predict_each([s.image for s in scenes], config)])

    return method
