"""What people write first in Python works, and what comes back shows and saves itself."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import diffrep
from diffrep import Correspondence, ExtractConfig, extract, extract_each, load_backbone, pipeline
from diffrep.backbones import Backbone, TapError
from diffrep.tasks import SYNONYMS, TASKS, task_named

PIXELS = (np.random.default_rng(0).random((48, 64, 3)) * 255).astype(np.uint8)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.fromarray(PIXELS).save(tmp_path / "cat.png")
    return tmp_path / "cat.png"


@pytest.fixture(scope="module")
def vit() -> Backbone:
    return load_backbone("tiny-dino")


def test_one_image_and_one_tap_are_no_lists(vit: Backbone, picture: Path) -> None:
    expected = extract(vit, [picture], ExtractConfig(taps=("layer.4",)))
    tensor = torch.from_numpy(PIXELS).movedim(-1, 0)
    for image in (picture, str(picture), Image.open(picture), PIXELS, tensor, PIXELS[None], tensor[None], [PIXELS]):
        maps = extract(vit, image, taps="layer.4")
        assert maps.taps == ("layer.4",)
        assert torch.equal(maps["layer.4"], expected["layer.4"])
    assert len(extract(vit, [picture, picture], taps=["layer.1", "layer.4"])["layer.1"]) == 2
    assert next(extract_each(vit, picture, taps="layer.1")).taps == ("layer.1",)
    grey = extract(vit, PIXELS[..., 0], taps="layer.1")
    assert len(grey) == 1


def test_keywords_change_a_configuration(vit: Backbone, picture: Path) -> None:
    maps = extract(vit, picture, ExtractConfig(taps=("layer.1",), batch_size=3), taps="layer.2")
    assert maps.taps == ("layer.2",)
    assert maps.settings["batch_size"] == 3
    with pytest.raises(TypeError, match="no setting 'timestop'; near names: timestep"):
        extract(vit, picture, timestop=3)
    with pytest.raises(TapError, match=r"no tap 'layer\.99'"):
        extract_each(vit, picture, taps="layer.99")  # at once, not when the first image is asked for
    with pytest.raises(ValueError, match="taps is empty"):
        extract(vit, picture, taps=())
    with pytest.raises(ValueError, match="posterior must be one of mean, sample"):
        ExtractConfig(posterior="mode")  # type: ignore[arg-type]  # wrong on purpose


def test_features_show_and_save_themselves(vit: Backbone, picture: Path, tmp_path: Path) -> None:
    maps = extract(vit, [picture, picture], taps=("layer.1", "layer.4"))
    said = repr(maps)
    assert said.startswith("FeatureMaps(layer.1 float32 (2, ")
    assert len(said) < 300
    assert maps.numpy()["layer.4"].shape == tuple(maps["layer.4"].shape)
    assert [len(image) for image in maps] == [1, 1]
    with pytest.raises(KeyError, match=r"'layer\.3'; near names: layer\.4, layer\.1"):
        maps["layer.3"]
    maps.save(tmp_path / "maps.png")
    assert np.load(maps.save(tmp_path / "maps.npz"))["layer.1"].shape == tuple(maps["layer.1"].shape)
    with Image.open(tmp_path / "maps.png") as shown:
        assert shown.width > 400
        assert shown.height > 480


def test_matches_show_and_save_themselves(picture: Path, tmp_path: Path) -> None:
    correspondence = Correspondence("tiny")
    matches = correspondence(picture, picture, [(10, 12), (40, 30)])
    assert repr(matches).startswith("Matches(points float32 (2, 2) in")
    assert matches._repr_png_()
    assert list(matches.to_pandas().columns) == ["source_x", "source_y", "x", "y", "score"]
    assert matches.numpy().shape == (2, 2)
    for name in ("m.png", "m.csv", "m.npy", "m.npz"):
        assert matches.save(tmp_path / name).stat().st_size > 50
    dense = correspondence.match_dense(picture, picture)
    assert len(dense.to_pandas()) == int(dense.valid.sum())
    assert dense.save(tmp_path / "d.png").is_file()


def test_a_task_is_one_line(picture: Path) -> None:
    found = pipeline("correspondence", device="cpu")(picture, picture, [(10, 12)])
    assert found.points.shape == (1, 2)
    features = pipeline("features", "tiny-dino", device="cpu")
    assert repr(features) == "pipeline('features', 'tiny-dino')"
    assert features(picture, taps="layer.1").taps == ("layer.1",)
    for task in ("depth", "normals", "segmentation"):
        assert pipeline(task, device="cpu")(picture) is not None
    with pytest.raises(ValueError, match="no task 'deep'; near names: depth"):
        pipeline("deep")
    with pytest.raises(ValueError, match=r"tiny-normals: predicts normals .*depth was asked for"):
        pipeline("depth", "tiny-normals")
    for inputs, message in (((picture,), "takes two images and points"), ((picture, picture), "say which points")):
        with pytest.raises(ValueError, match=message):
            pipeline("correspondence", device="cpu")(*inputs)


def test_models_of_ones_own_come_by_keyword(picture: Path) -> None:
    embedded = Path(diffrep.__file__).parent / "models"
    correspondence = Correspondence("tiny", diffusion=embedded / "tiny", vit="tiny-dino")
    assert correspondence.backbones[0].source == str(embedded / "tiny")
    assert correspondence.match(picture, picture, [(10, 12)]).points.shape == (1, 2)
    with pytest.raises(ValueError, match="no role 'painter'; it has diffusion, tiny, vit, tiny-dino"):
        Correspondence("tiny", painter="tiny")


def test_public_names_exist_and_cost_nothing_before_they_are_used() -> None:
    for name in diffrep.__all__:
        assert getattr(diffrep, name) is not None, name
    heavy = "import sys, diffrep; print([m for m in ('torch', 'numpy', 'PIL', 'diffusers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True).stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("diffrep.eval.benchmarks.segmentation", "SegmentationBenchmark"),
        ("diffrep.heads.map_files", "preview save_map WRITERS array_of"),
        ("diffrep.heads.mask_prediction", "SegmentConfig ObjectMask SegmentationHead"),
        ("diffrep.heads.segmentation_loading", "load_segmentation"),
        ("diffrep.synthesis.conditions", "ImageEncoder load_grid interpolate_grids vary_grid"),
    ],
)
def test_former_modules_that_notebooks_imported_are_what_they_are_now(module: str, names: str) -> None:
    former = importlib.import_module(module)
    for name in names.split():
        now = importlib.import_module(getattr(former, name).__module__) if name != "WRITERS" else former
        assert getattr(former, name) is getattr(now, name)
    assert importlib.import_module(module) is sys.modules[former.__name__]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"timestep": "a"}, "timestep must be a whole number, got 'a'"),
        ({"ensemble": "8"}, "ensemble must be a whole number, got '8'"),
        ({"taps": 3}, "taps must be a tuple (text, ...), got 3"),
        ({"prompt": 3}, "prompt must be text, got 3"),
        ({"seed": 1.5}, "seed must be a whole number, got 1.5"),
        ({"batch_size": True}, "batch_size must be a whole number, got True"),
        ({"sizing": "big"}, "sizing must be Sizing, got 'big'"),
    ],
)
def test_settings_of_another_type_are_refused_in_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ExtractConfig(**settings)
    assert ExtractConfig(timestep=np.int64(3), taps=("up.1",)).timestep == 3


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: extract("tiny", 3), "an image must be a path, .* got int"),
        (lambda: extract("tiny", None), "an image must be a path, .* got NoneType"),
        (lambda: extract("tiny", b"GIF"), "an image must be a path, .* got bytes"),
        (lambda: diffrep.load_image(3), "an image must be a path, .* got int"),
        (lambda: load_backbone(3), "a backbone is named by text or a path, got int"),
        (lambda: load_backbone(None), "a backbone is named by text or a path, got NoneType"),
        (lambda: diffrep.load_head(3), "a head is named by text or a path, got int"),
        (lambda: pipeline(3), "there is no task 3; near names: depth"),
        (lambda: Correspondence(3), "a recipe is named by text, got int"),
        (lambda: diffrep.recipe(3), "a recipe is named by text, got int"),
    ],
)
def test_what_is_of_no_use_is_named_with_what_would_be(call: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        call()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda maps: diffrep.match_points(1, 2, 3), "source must be the Descriptors of an image, .* got int"),
        (lambda maps: diffrep.match_dense(maps.layer("layer.4"), 2), "target must be the Descriptors .* got int"),
        (lambda maps: diffrep.swap_appearance(1, 2, 3, 4), "pose must be the Descriptors of an image, .* got int"),
        (lambda maps: diffrep.refine(PIXELS, 2), "refine needs a latent diffusion model with a U-Net, got int"),
        (lambda maps: maps.at("layer.4", 3), r"points must be \(1, N, 2\) as \(x, y\), got \(\)"),
        (lambda maps: maps.at("layer.4", [["x"]]), r"points must be \(1, N, 2\) as \(x, y\), got"),
        (lambda maps: maps.at("layer.3", [[(1, 2)]]), "no features of the tap 'layer.3'; near names: layer.4"),
        (lambda maps: diffrep.draw_matches(1, 2, 3, 4), "an image must be a path, .* got int"),
        (lambda maps: diffrep.draw_matches(PIXELS, PIXELS, [(1, 2)], 4), "1 points are drawn with as many Matches"),
        (lambda maps: diffrep.draw_field(PIXELS, PIXELS, 3), "a field is drawn of DenseMatches, .* got int"),
        (lambda maps: diffrep.draw_components([PIXELS], [3]), r"descriptors\[0\] must be the Descriptors"),
        (lambda maps: diffrep.HeatGeodesicEmbedding().fit(3), "X: Expected 2D array, got scalar array instead"),
        (lambda maps: diffrep.HeatGeodesicEmbedding().fit([[1, 2], [3, np.nan]]), r"X: Input X contains NaN\.$"),
        (lambda maps: diffrep.sample("tiny", "a cat", steps="x"), "steps must be a whole number .* got 'x'"),
        (lambda maps: diffrep.sample("tiny", "a cat", size="x"), r"size must be \(height, width\) in pixels, got 'x'"),
        (lambda maps: pipeline("depth")(PIXELS, step=1), "disparity has no setting 'step'; near names: steps"),
    ],
)
def test_arguments_of_another_kind_are_named_in_one_line(vit: Backbone, call: Any, says: str) -> None:
    with pytest.raises((TypeError, ValueError, KeyError), match=says) as caught:
        call(extract(vit, PIXELS, taps="layer.4"))
    assert "\n" not in str(caught.value)


def test_points_and_images_come_as_people_write_them(vit: Backbone, picture: Path) -> None:
    maps = extract(vit, picture, taps="layer.4")
    points = [(10, 12), (40, 30)]
    assert torch.equal(maps.at("layer.4", [points]), maps.at("layer.4", torch.tensor([points], dtype=torch.float32)))
    described = maps.layer("layer.4")
    matches = diffrep.match_points(described, described, points)
    assert diffrep.draw_matches(picture, picture, points, matches).width > 100
    assert diffrep.draw_components([picture], [described]).width > 100
    assert diffrep.swap_appearance(picture, picture, described, described).size == diffrep.load_image(picture).size


def test_tasks_have_the_names_that_people_use(picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for word, task in {**SYNONYMS, **{name: name for name in TASKS}}.items():
        assert task_named(word) == task
    monkeypatch.chdir(tmp_path)
    assert repr(pipeline("segment", device="cpu")) == "pipeline('segmentation', 'tiny-segmentation')"
    for name in ("segment", "tiny-segment", "segmentation", "tiny-segmentation"):
        assert diffrep.load_head(name).name == "tiny-segmentation"
    for name in ("restoration", "tiny-restoration"):
        assert diffrep.load_head(name).task == "restore"
    diffrep.load_head("tiny-depth").save_pretrained(tmp_path / "normals")  # a folder of one's own goes first
    assert diffrep.load_head("normals").task == "disparity"
    assert pipeline("depth", "normals")(picture).kind == "disparity"  # which is depth, too
    (tmp_path / "depth").mkdir()  # the output of an earlier command is no head
    assert diffrep.load_head("depth").name == "tiny-depth"
    with pytest.raises(ValueError, match="predicts disparity"):
        pipeline("normals", "normals")
