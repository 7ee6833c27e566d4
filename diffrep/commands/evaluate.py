"""``diffrep eval``: matching and painting. Heads are evaluated in `evaluate_dense`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tyro

from diffrep.commands.options import PrecisionOptions, ReportOptions
from diffrep.eval.cache import StoredType
from diffrep.eval.correspondence import CorrespondenceReport, Search, evaluate_pairs
from diffrep.eval.datasets.ap10k_release import Ap10kSet
from diffrep.eval.datasets.pair_sets import read_ap10k, read_pf_pascal, read_pf_willow, read_spair, read_spair_u
from diffrep.eval.datasets.pairs import PairSet, read_keypoint_tables
from diffrep.eval.datasets.tss import read_tss
from diffrep.eval.flow import evaluate_flow
from diffrep.eval.homography import HomographySettings, evaluate_homographies
from diffrep.eval.matchers import baselines, matchers_of
from diffrep.eval.protocols import PROTOCOLS, Protocol
from diffrep.eval.report import Report
from diffrep.eval.samplers import SamplersEvaluation, evaluate_samplers
from diffrep.eval.scenes import ScenesSettings, evaluate_scenes
from diffrep.eval.synthesis import SynthesisEvaluation, evaluate_synthesis
from diffrep.files import write_whole
from diffrep.recipes import Correspondence
from diffrep.synthesis import SynthesisSettings, load_synthesis


def compare(evaluate: Callable[..., Report], whole: Correspondence, *settings: object, box: bool) -> Report:
    """Evaluate a recipe's matchers beside those without a network; `box`: views show an object in a known box."""
    plain, ours = baselines(box=box), matchers_of(whole)
    return evaluate(plain[0] | ours[0], plain[1] | ours[1], *settings)


def correspondence(recipe: str, options: PrecisionOptions) -> Correspondence:
    """A recipe's models where and as the options say."""
    device, dtype = options.resolved()
    return Correspondence(recipe, device=device, dtype=dtype)


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
    """Match points of real photographs in views of them that a known homography gives."""

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
        device, dtype = self.resolved()
        model = load_synthesis(self.model, device=device, dtype=dtype)
        self.show(evaluate_synthesis(model, self.settings, self.sampling))


@dataclass(frozen=True, kw_only=True)
class Samplers(ReportOptions, PrecisionOptions):
    """Compare samplers on one model at equal numbers of network calls: distance to a fine solution, with and without
    guidance.
    """

    model: str = "tiny-synthesis"  # or the folder of a synthesis model, a Stable Diffusion or an ADM
    prompt: tuple[str, ...] = ("a photograph",)  # of a Stable Diffusion: what is painted
    count: int = 4  # of a synthesis model: embeddings of held-out scenes that are painted
    label: int | None = None  # of a class-conditional ADM
    guidance: float | None = None  # the second table's, the first has none; the model's own where left out
    settings: Annotated[SamplersEvaluation, tyro.conf.OmitArgPrefixes] = field(default_factory=SamplersEvaluation)

    def run(self) -> None:
        from diffrep.eval.samplers import guided_models

        self.check_output()
        device, dtype = self.resolved()
        models = guided_models(
            self.model,
            self.guidance,
            prompts=self.prompt,
            label=self.label,
            count=self.count,
            device=device,
            dtype=dtype,
        )
        self.show(evaluate_samplers(models, self.settings))


Benchmark = Literal["scenes", "spair", "spair-u", "pf-pascal", "pf-willow", "ap-10k", "tss"]
_USUAL = {  # benchmark -> protocol where the recipe has none of its own
    "spair": "spair-dift",
    "spair-u": "spair-u-geoaware",
    "pf-pascal": "pf-pascal-sd-dino",
    "pf-willow": "pf-willow",
    "ap-10k": "ap-10k-geoaware",
}
# options that only data sets on disk have, and only data sets of pairs of images
_OF_DATA = frozenset({"data", "categories", "keep", "batch_size"})
_OF_PAIRS = frozenset({"protocol", "split", "pose", "keypoints", "failures"})


@dataclass(frozen=True, kw_only=True)
class EvalCorrespondence(PrecisionOptions):
    """Evaluate a recipe on a published correspondence benchmark, or on rendered scenes."""

    benchmark: Benchmark
    data: Path | None = None  # the data set's folder, in the layout in which it is released; scenes need none
    recipe: str = "tiny"
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
        if self.output.exists() and not self.output.is_dir():
            raise ValueError(f"{self.output}: the output is a folder, this is a file")
        kinds = {"scenes": (_OF_DATA | _OF_PAIRS), "tss": _OF_PAIRS}
        if unused := sorted(self.typed & kinds.get(self.benchmark, frozenset())):
            raise ValueError(f"benchmark {self.benchmark} takes no --{unused[0].replace('_', '-')}")

    def _evaluated(self) -> Report:
        if self.benchmark == "scenes":
            return compare(evaluate_scenes, correspondence(self.recipe, self), box=True)
        if self.data is None:
            raise ValueError(f"benchmark {self.benchmark} needs --data, the folder of the data set")
        if self.benchmark == "tss":
            flows = read_tss(self.data, subsets=self.categories or None)
            return evaluate_flow(
                flows,
                correspondence(self.recipe, self),
                self.output,
                search="sd-dino" if self.search == "protocol" else "recipe",
                keep=self.keep,
                batch_size=self.batch_size,
            )
        protocol = self.chosen_protocol()
        pairs = self.read(self.data, protocol)
        tables = None if self.keypoints is None else read_keypoint_tables(self.keypoints)
        return evaluate_pairs(
            pairs,
            protocol,
            correspondence(self.recipe, self),
            self.output,
            search=self.search,
            pose=self.pose,
            tables=tables,
            keep=self.keep,
            batch_size=self.batch_size,
        )

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
        special: dict[str, tuple[str, ...]] = {
            "ap-10k": get_args(Ap10kSet), "pf-willow": ("test",), "spair-u": ("test",)
        }  # fmt: skip
        splits = special.get(self.benchmark, ("trn", "val", "test"))
        if self.split not in splits:
            raise ValueError(f"{self.benchmark} has no split {self.split!r}; it has {', '.join(splits)}")
        categories = self.categories or None
        split: Any = self.split  # checked above
        if self.benchmark == "spair":
            return read_spair(data, split=split, categories=categories, keypoints=protocol.keypoints)
        if self.benchmark == "spair-u":
            return read_spair_u(data, categories=categories, keypoints=protocol.keypoints)
        if self.benchmark == "pf-pascal":
            return read_pf_pascal(data, split=split, categories=categories)
        if self.benchmark == "pf-willow":
            return read_pf_willow(data, categories=categories)
        return read_ap10k(data, split=split, categories=categories)
