"""The harness: one extraction per image, resuming after a kill, what the report says."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from diffrep.backbones import Backbone, Conditions, load_backbone
from diffrep.commands.evaluate import EvalCorrespondence
from diffrep.eval.cache import load_features, save_features
from diffrep.eval.correspondence import CorrespondenceReport, evaluate_pairs
from diffrep.eval.datasets.pair_sets import read_spair
from diffrep.eval.datasets.pairs import KeypointTable
from diffrep.eval.protocols import PROTOCOLS, CellSearch, Protocol
from diffrep.features import ExtractConfig, extract
from diffrep.fusion import Fusion, Part
from diffrep.images import Sizing
from diffrep.matching import MatchConfig
from diffrep.recipes import Correspondence, Reading, Recipe

from .benchmark_folders import write_ap10k_release, write_spair

TWO = ("bus", "cat")


class Counting(Backbone):
    """A backbone that counts the images it is given, and can be told to fail after some calls."""

    def __init__(self, inner: Backbone, calls: int | None = None) -> None:
        self.inner, self.calls, self.images, self.prompts = inner, calls, 0, set[str]()
        self.name, self.source, self.recommended = inner.name, inner.source, inner.recommended
        self.network = inner.network

    def taps(self):  # type: ignore[no-untyped-def]
        return self.inner.taps()

    def maps(
        self, pixels: Tensor, taps: Sequence[str], conditions: Conditions, *, batch_size: int = 8
    ) -> dict[str, Tensor]:
        if self.calls is not None and self.calls == 0:
            raise KeyboardInterrupt
        if self.calls is not None:
            self.calls -= 1
        self.images += len(pixels)
        self.prompts.add(conditions.prompt)
        return self.inner.maps(pixels, taps, conditions, batch_size=batch_size)


@pytest.fixture
def vit(vit_folder: Path) -> Backbone:
    return load_backbone(vit_folder)


def recipe(prompt: str = "") -> Recipe:
    return Recipe(
        name="small",
        readings=(
            Reading(
                backbone="vit",
                extract=ExtractConfig(taps=("layer.2",), sizing=Sizing("pad", 64), prompt=prompt),
            ),
        ),
        fusion=Fusion(parts=(Part(taps=("layer.2",)),)),
        matching=MatchConfig(mode="cell"),
    )


def run(root: Path, folder: Path, backbone: Backbone, **options: object) -> CorrespondenceReport:
    protocol = options.pop("protocol", PROTOCOLS["spair-dift"])
    assert isinstance(protocol, Protocol)
    pairs = read_spair(root, categories=TWO, keypoints=protocol.keypoints)
    whole = Correspondence(recipe(str(options.pop("prompt", ""))), backbones={"vit": backbone})
    settings = {"batch_size": 2, "pairs_per_file": 5, "progress": False, **options}
    return evaluate_pairs(pairs, protocol, whole, folder, **settings)  # type: ignore[arg-type]


def test_each_image_is_extracted_once_and_a_second_run_extracts_none(tmp_path: Path, vit: Backbone) -> None:
    root = write_spair(tmp_path)
    first = Counting(vit)
    report = run(root, tmp_path / "out", first)
    assert len(report.pck.pairs) == 12
    assert first.images == 6
    again = Counting(vit)
    assert run(root, tmp_path / "out", again).pck == report.pck
    assert again.images == 0


@pytest.mark.parametrize("calls", [0, 1, 2])
def test_a_killed_run_loses_a_batch_at_most_and_ends_with_the_same_numbers(
    tmp_path: Path, vit: Backbone, calls: int
) -> None:
    root = write_spair(tmp_path)
    whole = run(root, tmp_path / "whole", vit)
    first, second = Counting(vit, calls), Counting(vit)
    with pytest.raises(KeyboardInterrupt):
        run(root, tmp_path / "halves", first)
    report = run(root, tmp_path / "halves", second)
    assert first.images + second.images <= 6 + 2
    assert report.pck == whole.pck
    assert report.to_json() == whole.to_json()
    kept = sorted(p.name for p in (tmp_path / "halves").rglob("*") if p.is_file())
    assert kept == sorted(p.name for p in (tmp_path / "whole").rglob("*") if p.is_file())


def test_a_run_killed_while_matching_goes_on(tmp_path: Path, vit: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffrep.eval import correspondence

    root = write_spair(tmp_path)
    whole = run(root, tmp_path / "whole", vit)
    real, done = correspondence.predict, []

    def predict(*args: object, **kwargs: object) -> Tensor:
        if len(done) == 7:
            raise KeyboardInterrupt
        done.append(1)
        return real(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(correspondence, "predict", predict)
    with pytest.raises(KeyboardInterrupt):
        run(root, tmp_path / "halves", vit)
    monkeypatch.setattr(correspondence, "predict", lambda *a, **k: done.append(1) or real(*a, **k))
    assert run(root, tmp_path / "halves", vit).pck == whole.pck
    assert len(done) == 7 + 7  # five of the first seven were kept


def test_missing_and_unreadable_images_are_named_and_the_rest_counts(tmp_path: Path, vit: Backbone) -> None:
    root = write_spair(tmp_path)
    gone, broken = (sorted((root / "JPEGImages" / c).iterdir())[0] for c in TWO)
    gone.unlink()
    broken.write_bytes(b"no picture")
    report = run(root, tmp_path / "out", vit)
    assert len(report.pck.pairs) == 2 * 2  # one of three images of each category is out
    texts = [str(problem) for problem in report.problems]
    assert sum(gone.name in text and "missing" in text for text in texts) == 4
    assert sum(broken.name in text and "not an image" in text for text in texts) == 1
    assert "5 problems" in report.table()
    assert len(json.loads(report.to_json())["problems"]) == 5


def test_prompts_may_name_the_category(tmp_path: Path, vit: Backbone) -> None:
    root = write_spair(tmp_path)
    counting = Counting(vit)
    run(root, tmp_path / "out", counting, prompt="a photo of a {category}")
    assert counting.prompts == {"a photo of a bus", "a photo of a cat"}
    assert counting.images == 6


def test_other_settings_are_refused(tmp_path: Path, vit: Backbone) -> None:
    root = write_spair(tmp_path)
    run(root, tmp_path / "out", vit)
    with pytest.raises(ValueError, match="was made with kept_as = 'float32', this run has 'float16'"):
        run(root, tmp_path / "out", vit, keep="float16")
    (tmp_path / "SPair-71k/PairAnnotation/test").joinpath("x:cat.json").write_text("{}")
    next((root / "PairAnnotation/test").glob("*:bus.json")).unlink()
    with pytest.raises(ValueError, match="was made with pairs = "):
        run(root, tmp_path / "out", vit)


def test_the_protocols_own_search_is_used_where_it_fits(tmp_path: Path, vit: Backbone) -> None:
    root = write_spair(tmp_path)
    own = Protocol(
        name="cells", benchmark="spair", alphas=(0.1, 0.3), frame=64, inclusive=False, keypoints="image",
        search=CellSearch(cells=8, centre=3.5, metric="cosine"), by_part=True,
    )  # fmt: skip
    fitting = run(root, tmp_path / "out", vit, protocol=own)
    assert fitting.search == "protocol"
    assert fitting.by_part is not None
    assert 0 < fitting.by_part.points < fitting.pck.points
    all_alike = {category: KeypointTable({}, (frozenset(range(30)),)) for category in TWO}
    given = run(root, tmp_path / "out", vit, protocol=own, tables=all_alike)
    assert given.by_part is not None
    assert given.by_part.points == given.pck.points  # every target shows two or more keypoints
    other = run(root, tmp_path / "dino", vit, protocol=PROTOCOLS["spair-sd-dino"])
    assert other.search == "recipe"  # 8 x 8 cells, not 60 x 60
    with pytest.raises(ValueError, match=r"matches 60 x 60 cells of a padded square; small gives 8 x 8"):
        run(root, tmp_path / "dino", vit, protocol=PROTOCOLS["spair-sd-dino"], search="protocol")
    # both ways answer with cell centres; only the rounding of the padding differs
    recipes_way = run(root, tmp_path / "out", vit, protocol=own, search="recipe")
    assert recipes_way.pck.value()[1] == pytest.approx(fitting.pck.value()[1], abs=0.15)


def test_pose_alignment_finds_a_mirrored_source(tmp_path: Path, vit: Backbone) -> None:
    root = write_spair(tmp_path)
    own = replace(
        PROTOCOLS["spair-geoaware"], name="posed", frame=64,
        search=CellSearch(cells=8, centre=3.5, metric="cosine"),
    )  # fmt: skip
    counting = Counting(vit)
    posed = run(root, tmp_path / "out", counting, protocol=own, pose=True)
    assert counting.images == 2 * 6
    plain = run(root, tmp_path / "plain", vit, protocol=own)
    assert posed.pck.points == plain.pck.points
    pairs = zip(posed.matches, plain.matches, strict=True)
    assert any(not torch.equal(a.predicted, b.predicted) for a, b in pairs)
    with pytest.raises(ValueError, match="pose alignment goes with a protocol's search"):
        run(root, tmp_path / "other", vit, pose=True)
    swapped = {category: KeypointTable({0: 4, 4: 0}) for category in TWO}
    other = run(root, tmp_path / "tables", vit, protocol=own, pose=True, tables=swapped)
    assert any(not torch.equal(a.predicted, b.predicted) for a, b in zip(posed.matches, other.matches, strict=True))
    with pytest.raises(ValueError, match="was made with partners = "):
        run(root, tmp_path / "tables", vit, protocol=own, pose=True)


def test_the_report_shows_all_averages_beside_the_papers(tmp_path: Path, vit: Backbone) -> None:
    report = run(write_spair(tmp_path), tmp_path / "out", vit)
    text = report.table()
    for word in (
        "per image",
        "per point *",
        "category mean",
        "pair-weighted",
        "bus",
        "SD1.5 + DINOv2-B/14",
        "64.0",
    ):
        assert word in text
    ours = report.pck.value("per point")[0]
    assert f"64.0 ({100 * ours - 64:+.1f})" in text
    document = json.loads(report.to_json())
    assert document["pck"]["per point"]["0.1"] == ours
    assert document["categories"]["cat"]["pairs"] == 6
    assert document["settings"]["recipe"]["name"] == "small"


def test_features_come_back_as_they_were(tmp_path: Path, vit: Backbone) -> None:
    image = torch.rand(3, 40, 56, generator=torch.Generator().manual_seed(0))
    maps = extract(vit, [image], ExtractConfig(taps=("layer.1", "layer.2"), sizing=Sizing("pad", 64)))
    save_features(tmp_path / "1.safetensors", [maps], "float32", "")
    (back,) = load_features(tmp_path / "1.safetensors")
    assert back.placements == maps.placements
    assert back.grids == maps.grids
    assert all(torch.equal(back.maps[tap], maps.maps[tap]) for tap in maps.taps)
    save_features(tmp_path / "half.safetensors", [maps], "float16", "")
    (half,) = load_features(tmp_path / "half.safetensors")
    torch.testing.assert_close(half.maps["layer.2"], maps.maps["layer.2"], atol=2e-3, rtol=2e-3)
    (tmp_path / "2.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not a file of kept features"):
        load_features(tmp_path / "2.safetensors")


def test_the_command_writes_reports_and_pictures(
    tmp_path: Path, vit: Backbone, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from diffrep import recipes
    from diffrep.backbones import loading

    monkeypatch.setitem(recipes.RECIPES, "small", recipe())
    monkeypatch.setattr(recipes, "load_backbone", lambda name, **_: vit)
    assert loading.load_backbone is not recipes.load_backbone
    root = write_spair(tmp_path)
    command = EvalCorrespondence(
        benchmark="spair", data=root, recipe="small", categories=TWO, output=tmp_path / "out", failures=3
    )
    report = command.evaluate()
    assert isinstance(report, CorrespondenceReport)
    assert "small on SPair-71k test" in capsys.readouterr().out
    assert json.loads((tmp_path / "out/report.json").read_text())["pairs"] == 12
    pictures = sorted((tmp_path / "out/failures").iterdir())
    assert [p.name for p in pictures] == ["01.png", "02.png", "03.png"]
    shares = [float(report.protocol.hits(m.pair, m.predicted)[0].float().mean()) for m in report.failures(12)]
    assert shares == sorted(shares)
    with Image.open(pictures[0]) as picture:
        assert picture.width > 2 * 300


def test_a_model_takes_the_place_of_the_recipes_own(
    tmp_path: Path, vit: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffrep import recipes

    loaded: list[str] = []
    monkeypatch.setitem(recipes.RECIPES, "small", recipe())
    monkeypatch.setattr(recipes, "load_backbone", lambda name, **_: loaded.append(name) or vit)
    EvalCorrespondence(
        benchmark="spair", data=write_spair(tmp_path), recipe="small", backbone=("mine",), categories=TWO,
        output=tmp_path / "out", failures=0,
    ).run()  # fmt: skip
    assert loaded == ["mine"]


def test_a_set_stands_beside_the_papers_numbers_of_that_set(
    tmp_path: Path, vit: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffrep import recipes

    monkeypatch.setitem(recipes.RECIPES, "small", recipe())
    monkeypatch.setattr(recipes, "load_backbone", lambda name, **_: vit)

    def published(benchmark: str, data: Path, **options: object) -> set[tuple[str, float]]:
        command = EvalCorrespondence(
            benchmark=benchmark, data=data, recipe="small", failures=0,  # type: ignore[arg-type]
            output=tmp_path / f"out-{benchmark}{options.get('split', '')}", **options,  # type: ignore[arg-type]
        )  # fmt: skip
        report = command.evaluate()
        assert isinstance(report, CorrespondenceReport)
        return {(row.method, row.values[0.1]) for row in report.rows()}

    species = {("Canidae", "fox"): 4, ("Canidae", "wolf"): 24, ("Felidae", "cat"): 3}
    animals = write_ap10k_release(tmp_path, species)
    assert ("DIFT", 50.3) in published("ap-10k", animals)
    assert ("DIFT", 46.0) in published("ap-10k", animals, split="test_cross_species")
    assert ("DIFT", 35.0) in published("ap-10k", animals, split="test_cross_family")
    write_spair(tmp_path)
    unseen = write_spair(tmp_path / "other").rename(tmp_path / "SPair-U")
    assert published("spair-u", unseen, categories=TWO) == {("FLUX, one timestep", 53.4)}
    validation = write_spair(tmp_path / "validation", split="val")
    assert not published("spair", validation, categories=TWO, split="val")


def test_wrong_names_are_refused_before_any_work(tmp_path: Path) -> None:
    def command(**options: object) -> EvalCorrespondence:
        return EvalCorrespondence(**{"benchmark": "spair", "data": tmp_path, **options})  # type: ignore[arg-type]

    with pytest.raises(ValueError, match="spair needs --data"):
        command(data=None).run()
    with pytest.raises(ValueError, match="spair has no protocol 'pf-willow'; it has spair-dift"):
        command(protocol="pf-willow").run()
    with pytest.raises(ValueError, match="pf-pascal has no split 'large'; it has trn, val, test"):
        command(benchmark="pf-pascal", split="large").run()
    with pytest.raises(ValueError, match=r"report\.json: is called as a file; a folder goes there"):
        command(output=tmp_path / "report.json").run()
    assert command(recipe="sd-dino").chosen_protocol().name == "spair-sd-dino"
    assert command(recipe="hyperfeatures").chosen_protocol().name == "spair-dift"
    assert command(benchmark="ap-10k").chosen_protocol().name == "ap-10k-geoaware"
