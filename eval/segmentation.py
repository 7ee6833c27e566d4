"""Masks of a head on benchmarks: DIS5K as it is released, and held-out rendered scenes, whose truth is exact.

Every number says its definition: "soft" maps by the DIS protocol (pysodmetrics), or maps thresholded at 0.5 as DiffDIS'
own script scores them, which is kinder to weighted F and MAE.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import starmap
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from diffrep.eval import segmentation_metrics
from diffrep.eval.borders import thin_places
from diffrep.eval.report import PUBLISHED_DIS, Section, bootstrap, with_interval
from diffrep.eval.scene_maps import (
    Interval,
    Method,
    MethodsReport,
    SceneMapSettings,
    predict_scenes,
    scene_groups,
    through_vae,
)
from diffrep.eval.segmentation_metrics import AUTHORS, DIS, ImageScores, together
from diffrep.files import number_of, write_whole
from diffrep.heads.training.masks import MaskedImage, read_dis
from diffrep.images import load_image
from diffrep.scenes import Scene

MaskProtocol = Literal["soft", "thresholded"]
Map = NDArray[np.uint8]

SPLITS = ("DIS-VD", "DIS-TE1", "DIS-TE2", "DIS-TE3", "DIS-TE4")
COLUMNS = {"maxf": "max F", "wfm": "weighted F", "mae": "MAE", "sm": "S", "em_mean": "mean E", "hce": "HCE"}
MORE = {"ber": "BER", "dice": "Dice", "iou": "IoU", "accuracy": "accuracy", "thin": "thin found"}
DEFINITIONS = {
    "soft": "soft maps, stretched to [0, 1] per image; truth above 128; definitions of pysodmetrics",
    "thresholded": "maps thresholded at 0.5 before every score; definitions of DiffDIS' test_score.py, but mean E",
}
RULES: Mapping[MaskProtocol, dict[str, Any]] = {
    "soft": {"definition": DIS, "binarize": False},
    "thresholded": {"definition": AUTHORS, "binarize": True},
}


def score_image(predicted: Map, truth: Map, *, protocol: MaskProtocol = "soft", hce: bool = False) -> ImageScores:
    """Scores of one 8-bit map (H, W) by a protocol of `DEFINITIONS`, see `segmentation_metrics.score_image`."""
    return segmentation_metrics.score_image(predicted, truth, **RULES[protocol], hce=hce)


def interval(images: Sequence[ImageScores], name: str, *, draws: int = 500) -> tuple[float, float]:
    """95 % interval of a score of the data set, a bootstrap over its images."""
    if name not in ("maxf", "em_mean"):
        values = np.array([image.values[name] for image in images])
        return bootstrap(lambda rows: np.nanmean(values[rows], axis=1), len(images), draws=draws)
    curves = np.stack([image.f if name == "maxf" else image.e for image in images])

    def of_mean_curve(rows: NDArray[np.int64]) -> NDArray[np.float64]:
        means = np.stack([curves[chosen].mean(0) for chosen in rows])
        return means.max(1) if name == "maxf" else means.mean(1)

    return bootstrap(of_mean_curve, len(images), draws=draws)


@dataclass(frozen=True)
class MaskReport(MethodsReport):
    """What every method got on every image.

    Attributes:
        rows: method -> image -> `ImageScores`.
        published: print the published figures of DIS5K too.
    """

    benchmark: str
    protocol: MaskProtocol
    settings: Mapping[str, object]
    published: bool = False

    def columns(self) -> dict[str, str]:
        """Score -> heading, of the scores that were counted."""
        counted = next(iter(next(iter(self.rows.values())).values())).values
        return {name: heading for name, heading in {**COLUMNS, **MORE}.items() if name in counted}

    def values(self, method: str, group: str) -> dict[str, Interval]:
        images = [self.rows[method][name] for name in self.groups[group]]
        scores = together(images)
        return {name: (scores[name], *interval(images, name)) for name in self.columns()}

    def document(self) -> Mapping[str, object]:
        about = {"benchmark": self.benchmark, "definition": DEFINITIONS[self.protocol], "settings": self.settings}
        papers = [{"method": r.method, "quoted in": r.quoted_in, **r.values} for r in PUBLISHED_DIS]
        published = {"published": papers} if self.published else {}
        return {**about, "rows": self.numbers(), "notes": list(map(str, self.problems)), **published}

    def sections(self) -> Iterator[Section]:
        yield Section(f"{self.benchmark}: {DEFINITIONS[self.protocol]}; 95 % interval over images")
        for group, names in self.groups.items():
            rows = [(method, *starmap(_cell, self.values(method, group).items())) for method in self.rows]
            yield Section(f"{group}: {number_of(len(names), 'image')}", tuple(self.columns().values()), rows)
        if self.published:
            papers = [
                (row.method, split, *(f"{values[n]:g}" if n in values else "-" for n in COLUMNS), row.quoted_in)
                for row in PUBLISHED_DIS
                for split, values in row.values.items()
            ]
            title = "Published, as quoted by others; sources disagree"
            yield Section(title, ("split", *COLUMNS.values(), "quoted in"), papers)


def _cell(name: str, numbers: Interval) -> str:
    return with_interval(*numbers, digits={"hce": 0, "mae": 4}.get(name, 3))


def evaluate_scene_masks(
    methods: Mapping[str, Method],
    settings: SceneMapSettings | None = None,
    *,
    protocol: MaskProtocol = "soft",
    hce: bool = False,
    progress: bool = True,
) -> MaskReport:
    """Measure methods on held-out scenes, all on the same ones, each rendered once.

    "thin found" is the share of an object's thin places (see `thin_places`) at which the mask is at least 0.5, mean
    over the scenes that have any.

    Raises:
        ValueError: a method gives maps that are not finite.
    """
    settings = settings or SceneMapSettings()
    rows: dict[str, dict[str, ImageScores]] = {method: {} for method in methods}
    slim: list[str] = []
    first = next(iter(methods))

    def count(method: str, name: str, values: Tensor, scene: Scene) -> None:
        scored = score_image(grey(values), scene.mask.astype(np.uint8) * 255, protocol=protocol, hce=hce)
        thin = thin_places(scene.mask)
        share = float((values.numpy() >= 0.5)[thin].mean()) if thin.any() else float("nan")
        rows[method][name] = ImageScores({**scored.values, "thin": share}, scored.f, scored.e)
        if method == first and thin.sum() >= 0.05 * scene.mask.sum():
            slim.append(name)

    predict_scenes(methods, settings.jobs(), settings, count, title="scenes, segmentation", progress=progress)
    groups = {**scene_groups(list(rows[first])), "thin (5 % or more of the object)": slim}
    title = settings.title
    chosen = {group: names for group, names in groups.items() if names}
    return MaskReport(rows, chosen, title, protocol, asdict(settings))


def grey(mask: Tensor) -> Map:
    """(H, W) in [0, 1] -> 8-bit, rounded."""
    return (mask.float() * 255).round().clamp(0, 255).to(torch.uint8).cpu().numpy()


def masks_through_vae(vae: Any) -> Method:
    """The truth, encoded and decoded again by a VAE: what no head that draws with it can beat by much."""
    decode = through_vae(vae, lambda scene: torch.from_numpy(scene.mask).float().expand(3, -1, -1) * 2 - 1)
    return lambda scenes: decode(scenes).mean(1).clamp(-1, 1) / 2 + 0.5


def centred_guess(scenes: Sequence[Scene]) -> Tensor:
    """A guess without the image: a soft disc in the middle."""
    height, width = scenes[0].mask.shape
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    return torch.exp(-2 * (x * x + y * y)).expand(len(scenes), -1, -1)


Predict = Callable[[list[Image.Image]], Iterator[Tensor]]
"""RGB images -> their masks (H, W) in [0, 1], at the images' sizes."""


def open_dis(root: Path, splits: Sequence[str] = SPLITS) -> tuple[dict[str, list[MaskedImage]], list[str]]:
    """The splits that lie in a folder: ``ROOT/DIS-VD/im/*.jpg`` and ``gt/*.png``; `root` may be one of them.

    Returns:
        Split -> its pairs, and what was left out: truths without an image of their name and size.

    Raises:
        ValueError: none of the splits is there.
    """
    folders = {split: root / split for split in splits if (root / split).is_dir()}
    if not folders and (root / "gt").is_dir():
        folders = {root.name: root}
    if not folders:
        raise ValueError(f"{root}: none of {', '.join(splits)} is in this folder")
    pairs, problems = {}, []
    for split, folder in folders.items():
        pairs[split] = read_dis(folder)
        paired = {pair.mask.stem for pair in pairs[split]}
        lost = [p.name for p in sorted((folder / "gt").glob("*.png")) if p.stem not in paired]
        problems += [f"{split}/gt/{name}: no image of this name and size" for name in lost]
    return pairs, problems


def evaluate_dis(
    name: str,
    predict: Predict | None,
    root: Path,
    *,
    splits: Sequence[str] = SPLITS,
    protocol: MaskProtocol = "soft",
    hce: bool = True,
    folder: Path | None = None,
    progress: bool = True,
) -> MaskReport:
    """Score a head, or maps that already lie in a folder, on DIS5K at the truth's resolution.

    Args:
        name: of the method.
        predict: makes the maps; None scores those in `folder`.
        folder: keeps the maps as ``SPLIT/NAME.png``; those that are there are not made again.

    Raises:
        ValueError: neither a predictor nor a folder; a map is missing or of another size.
    """
    if predict is None and folder is None:
        raise ValueError("either a head or a folder of maps is needed")
    data, problems = open_dis(root, splits)
    images: dict[str, ImageScores] = {}
    groups: dict[str, list[str]] = {}
    with tqdm(total=sum(map(len, data.values())), desc="DIS5K", unit="image", disable=not progress) as bar:
        for split, pairs in data.items():
            groups[split] = [f"{split}/{pair.mask.stem}" for pair in pairs]
            for key, pair in zip(groups[split], pairs, strict=True):
                truth = np.asarray(load_image(pair.mask).convert("L"))
                predicted = _map(pair, predict, None if folder is None else folder / f"{key}.png")
                if predicted.shape != truth.shape:
                    raise ValueError(f"{key}: the map is {predicted.shape}, the truth {truth.shape} (height, width)")
                images[key] = score_image(predicted, truth, protocol=protocol, hce=hce)
                bar.update()
    if all(split in groups for split in SPLITS[1:]):
        groups["DIS-TE1-4"] = [key for split in SPLITS[1:] for key in groups[split]]
    settings = {"root": str(root), "hce": hce}
    return MaskReport({name: images}, groups, "DIS5K", protocol, settings, published=True, problems=tuple(problems))


def _map(pair: MaskedImage, predict: Predict | None, file: Path | None) -> Map:
    if file is not None and file.is_file():
        return np.asarray(load_image(file).convert("L"))
    if predict is None:
        raise ValueError(f"{file}: the map is missing")
    mask = grey(next(predict([load_image(pair.image)])))
    if file is not None:
        write_whole(file, Image.fromarray(mask).save)
    return mask
