"""Training of one-step heads: recipes, targets, data sets in their released layouts, runs that resume."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from diffrep.cli import main
from diffrep.commands.train_heads import TrainDepth, TrainNormals, open_set
from diffrep.eval.maps import angular_error
from diffrep.heads.decoder import sharp_at_edges
from diffrep.heads.families import E2E_FT, FAMILIES, LOTUS_D, LOTUS_G, MARIGOLD, Task, task_vector
from diffrep.heads.loading import load_head
from diffrep.heads.point_cloud import Intrinsics, unproject
from diffrep.heads.tiling import stretch
from diffrep.heads.training.datasets import Hypersim, VirtualKitti
from diffrep.heads.training.dense import (
    OneStepModel,
    angular_loss,
    dense_head_of,
    draw_rows,
    latent_loss,
    latent_mask,
    predict_maps,
    widen_conv_in,
)
from diffrep.heads.training.dense_data import (
    SceneSamples,
    cache_latents,
    distance_to_depth,
    face_camera,
    mirror_normals,
    normalize_depth,
    plane_normals,
    sample_batches,
)
from diffrep.heads.training.detail import (
    FAR,
    borders,
    change_looks,
    depth_pictures,
    depth_terms,
    detail_batches,
    load_scenes,
    normal_terms,
)
from diffrep.heads.training.fit import EMBEDDED_BATCH, EMBEDDED_FIT, EMBEDDED_RECIPE, OneStepTraining, train_head
from diffrep.scenes import SceneSet, render_scene, render_set, scene_seed
from diffrep.training.loop import FitSettings

from .one_step_heads import random_head

SHORT = FitSettings(steps=2, warmup=0, bf16=False, learning_rate=1e-4)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> SceneSet:
    return render_set(tmp_path_factory.mktemp("scenes"), "train", 6, size=64, workers=1, progress=False)


# -- recipes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"preserve": 1.5}, "preserve must be in"),
        ({"task_vector": None}, "task vector"),
        ({"predicts": "epsilon"}, "first_latent='noise'"),
        ({"timesteps": "all"}, "first_latent='noise'"),
        ({"loss": "decoded"}, "detail preserver"),
    ],
)
def test_recipes_that_contradict_themselves_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(LOTUS_D, **fields)


def test_task_vector_is_the_papers() -> None:
    torch.testing.assert_close(torch.tensor(task_vector()), torch.tensor([0.841471, 0, 0.540302, 1]))
    torch.testing.assert_close(torch.tensor(task_vector((0, 1))), torch.tensor([0, 0.841471, 1, 0.540302]))


def test_a_wider_convolution_gives_the_same_on_an_input_repeated() -> None:
    torch.manual_seed(0)
    conv, x = nn.Conv2d(4, 12, 3, padding=1), torch.randn(2, 4, 9, 7)
    torch.testing.assert_close(widen_conv_in(conv)(torch.cat([x, x], 1)), conv(x))


@pytest.mark.parametrize("predicts", ["sample", "epsilon", "v_prediction"])
def test_the_clean_latent_is_read_back_from_what_is_predicted(predicts: str) -> None:
    generator = torch.Generator().manual_seed(0)
    targets, noise = torch.randn(3, 4, 2, 2, generator=generator), torch.randn(3, 4, 2, 2, generator=generator)
    recipe = replace(LOTUS_G, predicts=predicts, timesteps="all")  # type: ignore[arg-type]
    model = OneStepModel(nn.Identity(), torch.zeros(1, 2, 8), torch.linspace(0.99, 0.01, 1000), recipe)
    timesteps = torch.tensor([0, 500, 999])
    noisy = model.noisy(targets, noise, timesteps)
    found = model.clean(model.target(targets, noise, timesteps), noisy, timesteps)
    torch.testing.assert_close(found, targets, atol=1e-4, rtol=0)


def test_e2e_ft_reads_the_clean_latent_from_v_at_zeros() -> None:
    model = OneStepModel(nn.Identity(), torch.zeros(1, 2, 8), torch.full((1000,), 0.0046601), E2E_FT)
    v, at = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([999])
    noisy = model.noisy(v, None, at)
    assert noisy is not None
    assert not noisy.any()
    torch.testing.assert_close(model.clean(v, noisy, at), -0.997667 * v, atol=1e-5, rtol=0)


def test_rows_first_annotate_then_rebuild() -> None:
    drawn = draw_rows(4, replace(LOTUS_G, preserve=0.5), (4, 2, 2), torch.Generator().manual_seed(0))
    assert drawn["timesteps"].tolist() == [999] * 6
    assert torch.equal(drawn["tasks"][:4], torch.tensor(task_vector()).expand(4, 4))
    assert torch.equal(drawn["tasks"][4:], torch.tensor(task_vector((0, 1))).expand(2, 4))
    assert drawn["noise"].shape == drawn["image_noise"].shape == (6, 4, 2, 2)
    every = draw_rows(64, MARIGOLD, (4, 2, 2), torch.Generator().manual_seed(0))
    assert set(every) == {"timesteps", "noise"}
    assert 0 <= every["timesteps"].min() < 100 < 900 < every["timesteps"].max() < 1000


# -- targets and losses -----------------------------------------------------------------------------------------


def test_disparity_is_one_where_near_and_minus_one_in_the_sky() -> None:
    depth = torch.linspace(1, 10, 100).view(1, 10, 10)
    depth[0, 0] = torch.inf
    picture = normalize_depth(depth, valid=torch.isfinite(depth))
    assert picture.min() == -1
    assert (picture[0, 0] == -1).all()
    assert picture[0, 1, 0] > 0.99
    with pytest.raises(ValueError, match="no valid pixel"):
        normalize_depth(depth, valid=torch.zeros_like(depth, dtype=torch.bool))


def test_distance_is_depth_on_the_axis_and_longer_beside_it() -> None:
    depth = distance_to_depth(torch.ones(5, 5), focal=2.0)
    assert depth[2, 2] == 1
    assert depth[2, 4].item() == pytest.approx(2 / 8**0.5)


def test_normals_of_a_slanted_plane_are_found_and_face_the_camera() -> None:
    intrinsics = Intrinsics(30.0, 30.0, 9.5, 7.5)
    rays = unproject(torch.ones(16, 20), intrinsics)
    normal = nn.functional.normalize(torch.tensor([0.3, -0.4, -1.0]), dim=0)  # RDF, towards the camera
    depth = -2.0 / torch.einsum("c,chw->hw", normal, rays)
    found, valid = plane_normals(depth, intrinsics)
    assert valid[0, 2:-2, 2:-2].all()
    expected = (-normal).double().view(3, 1, 1).expand_as(found)  # LUB
    torch.testing.assert_close(found[:, 3:-3, 3:-3], expected[:, 3:-3, 3:-3], atol=1e-4, rtol=0)
    away = -expected.float()
    assert torch.equal(face_camera(away, unproject(depth, intrinsics)), -away)


def test_mirrored_normals_point_to_the_other_side() -> None:
    normals = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))
    mirrored = mirror_normals(normals)
    assert torch.equal(mirror_normals(mirrored), normals)
    assert torch.equal(mirrored[0], -normals[0].flip(-1))
    assert torch.equal(mirrored[1:], normals[1:].flip(-1))


def test_a_latent_cell_counts_only_if_all_its_pixels_do() -> None:
    valid = torch.ones(1, 1, 16, 16, dtype=torch.bool)
    valid[0, 0, 3, 12] = False
    mask = latent_mask(valid)
    assert mask.tolist() == [[[[True, False], [True, True]]]]
    target = torch.zeros(1, 4, 2, 2)
    predicted = torch.zeros(1, 4, 2, 2)
    predicted[0, :, 0, 1] = 100
    assert latent_loss(predicted, target, mask) == 0
    assert latent_loss(predicted, target) > 0
    assert latent_loss(predicted, target, torch.zeros_like(mask)) == 0


def test_the_angular_loss_has_finite_gradients_at_the_truth() -> None:
    truth = torch.tensor([0.0, 0.0, 1.0]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    estimate = truth.clone().requires_grad_()
    angular_loss(estimate, truth, torch.ones(1, 1, 2, 2, dtype=torch.bool)).backward()
    assert estimate.grad is not None
    assert torch.isfinite(estimate.grad).all()


# -- data sets --------------------------------------------------------------------------------------------------


def test_scenes_face_the_camera_and_the_sky_is_far(scenes: SceneSet) -> None:
    sky = 0
    for index in range(len(scenes)):
        normals, disparity = (SceneSamples(scenes, task).sample(index) for task in ("normals", "disparity"))
        known = normals.measured[0]
        length = normals.annotation.norm(dim=0)
        torch.testing.assert_close(length[known], torch.ones_like(length[known]))
        depth = torch.from_numpy(np.array(scenes.depth[index])).float()
        points = unproject(depth.nan_to_num(posinf=0), Intrinsics(*map(float, scenes.intrinsics[index])))
        assert ((normals.annotation * points).sum(0)[known] > -1e-2 * depth[known]).all()
        assert (disparity.annotation[0][~known] == -1).all()
        assert disparity.annotation.shape == (1, 64, 64)
        sky += int((~known).sum())
    assert sky > 0
    once = SceneSamples(scenes, "normals").sample(0)
    twice = once.mirrored().mirrored()
    assert torch.equal(once.annotation, twice.annotation)
    assert torch.equal(once.pixels, twice.pixels)


def _write_vkitti(root: Path) -> None:
    for camera in (0, 1):
        frames = root / "Scene02" / "clone" / "frames"
        for part in ("rgb", "depth"):
            (frames / part / f"Camera_{camera}").mkdir(parents=True)
        depth = np.full((375, 1242), 2000, np.uint16)  # a wall 20 m away
        depth[:100] = 65535  # under the sky
        Image.fromarray(depth).save(frames / "depth" / f"Camera_{camera}" / "depth_00000.png")
        Image.new("RGB", (1242, 375), (255, 0, 0)).save(frames / "rgb" / f"Camera_{camera}" / "rgb_00000.jpg")


def test_virtual_kitti_as_released(tmp_path: Path) -> None:
    _write_vkitti(tmp_path)
    images = VirtualKitti(tmp_path, "disparity")
    assert len(images) == 2
    one = images.sample(1)
    assert one.pixels.shape == (3, 352, 1216)
    assert one.valid.all()  # the sky counts for depth
    assert one.measured.sum() == (375 - 100) * 1216
    assert one.reference[0, -1, 0] == 20
    with pytest.raises(ValueError, match="no image of Virtual KITTI 2"):
        VirtualKitti(tmp_path / "Scene02", "depth")


@pytest.mark.slow
def test_normals_of_virtual_kitti_are_fitted_to_its_depth(tmp_path: Path) -> None:
    _write_vkitti(tmp_path)
    facing = VirtualKitti(tmp_path, "normals").sample(0)
    assert not facing.valid[0, :70].any()
    wall = facing.annotation[:, 200, 600]
    torch.testing.assert_close(wall, torch.tensor([0.0, 0.0, 1.0]), atol=1e-3, rtol=0)


def _write_hypersim(root: Path, frame: int, distance: np.ndarray, normals: np.ndarray) -> None:
    h5py = pytest.importorskip("h5py")
    images = root / "ai_001_001" / "images"
    geometry, preview = images / "scene_cam_00_geometry_hdf5", images / "scene_cam_00_final_preview"
    for folder in (geometry, preview):
        folder.mkdir(parents=True, exist_ok=True)
    height, width = distance.shape
    Image.new("RGB", (width, height), (0, 128, 255)).save(preview / f"frame.{frame:04d}.tonemap.jpg")
    for what, values in (("depth_meters", distance), ("normal_cam", normals)):
        with h5py.File(geometry / f"frame.{frame:04d}.{what}.hdf5", "w") as file:
            file["dataset"] = values.astype(np.float16)


def test_hypersim_as_released(tmp_path: Path) -> None:
    normals = np.zeros((48, 64, 3), np.float32)
    normals[..., 0], normals[..., 2] = 0.6, -0.8  # RUB, looking away from the camera
    _write_hypersim(tmp_path, 0, np.full((48, 64), np.nan, np.float32), normals)  # Lotus leaves such frames out
    _write_hypersim(tmp_path, 3, np.full((48, 64), 5.0, np.float32), normals)
    rows = ["ai_001_001,cam_00,0,True,,train", "ai_001_001,cam_00,3,True,,train", "ai_001_001,cam_00,7,True,,train"]
    header = "scene_name,camera_name,frame_id,included_in_public_release,exclude_reason,split_partition_name"
    (tmp_path / "metadata_images_split_scene_v1.csv").write_text("\n".join([header, *rows]) + "\n")
    images = Hypersim(tmp_path, "normals", size=(24, 32))
    assert len(images) == 2  # frame 7 is listed but not there
    one = images.sample(0)
    assert one.pixels.shape == (3, 24, 32)
    # RUB (0.6, 0, -0.8) is LUB (-0.6, 0, -0.8), turned round (0.6, 0, 0.8)
    torch.testing.assert_close(one.annotation[:, 12, 16], torch.tensor([0.6, 0.0, 0.8]), atol=1e-3, rtol=0)
    raw = Hypersim(tmp_path, "normals", size=(24, 32), facing=False).sample(0)
    torch.testing.assert_close(raw.annotation, -one.annotation)
    depth = Hypersim(tmp_path, "depth", size=(24, 32), norm="perscene_norm").sample(0)
    assert depth.reference.max() <= 5
    with pytest.raises(ValueError, match="no frame of Hypersim"):
        Hypersim(tmp_path, "depth", split="test")


def test_data_sets_are_named_at_the_command_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no data set 'coco'"):
        open_set("coco=x", "depth", tmp_path, 1)
    with pytest.raises(ValueError, match="vkitti2=FOLDER"):
        open_set("vkitti2", "depth", tmp_path, 1)


def test_batches_depend_on_their_generator_alone(scenes: SceneSet) -> None:
    sets = [SceneSamples(scenes, "depth")] * 2
    batches = sample_batches(sets, (0.9, 0.1), LOTUS_G, batch_size=2, latent_channels=4, stride=8)
    first, again = (batches(torch.Generator().manual_seed(3)) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert first["noise"].shape == (4, 4, 8, 8)
    with pytest.raises(ValueError, match="needs a share"):
        sample_batches(sets, (1.0,), LOTUS_G, batch_size=2, latent_channels=4, stride=8)


# -- scenes with a decoder of its own ---------------------------------------------------------------------------


def test_drawn_depth_costs_what_its_logarithm_is_off_once_aligned_and_the_sky_is_infinitely_far() -> None:
    depth = torch.cat([torch.linspace(2, 60, 98), torch.tensor([100.0, torch.inf])]).view(1, 1, 10, 10)
    for task, power in (("disparity", -1), ("depth", 1)):
        picture, ends = depth_pictures(depth, task)  # type: ignore[arg-type]
        assert picture.flatten()[-1] == (0 if power == -1 else 1)
        assert picture[torch.isfinite(depth)].max() == pytest.approx(0.95)
        batch = {"truth": picture * 2 - 1, "ends": ends, "counted": depth < FAR, "border": torch.zeros_like(depth)}
        assert depth_terms(0.8 * batch["truth"] - 0.1, batch)["logs"] == pytest.approx(0, abs=1e-5)  # scale and shift
        off = picture.clone()
        off[..., 5, 5] *= 1.1
        cost, expected = depth_terms(off * 2 - 1, batch)["logs"], math.log(1.1) / 100
        assert expected / 2 < cost < 3 * expected  # one pixel, which moves the fit of the others a little
        batch["border"][..., 5, 5] = 1
        assert depth_terms(off * 2 - 1, batch)["logs"] > 1.5 * cost
    assert borders(torch.full((1, 1, 20, 20), 5.0)).sum() == 0
    step = torch.full((1, 1, 20, 20), 5.0)
    step[..., 10:] = torch.inf
    assert borders(step)[0, 0, 9].tolist() == [0.0] * 7 + [1.0] * 6 + [0.0] * 7


@pytest.mark.parametrize("task", ["disparity", "normals"])
def test_batches_of_scenes_are_their_step_s_and_their_truth_costs_nothing(task: Task, scenes: SceneSet) -> None:
    data = load_scenes(scenes, task, torch.device("cpu"))
    batches = detail_batches(data, task, EMBEDDED_RECIPE, batch_size=8, latent_shape=(4, 8, 8))
    batch, again, other = (batches(torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    assert not torch.equal(batch["pixels"], other["pixels"])
    plain, turned = (torch.from_numpy(scenes.image.copy()).permute(0, 3, 1, 2) / 255 for _ in range(2))
    both = torch.cat([plain, turned.flip(-1)])
    unchanged = [bool((both == image).flatten(1).all(1).any()) for image in batch["pixels"]]
    assert 0 < sum(unchanged) < 8  # half of them, mirrored or not, look as they were rendered
    if task == "normals":
        assert normal_terms(batch["truth"], batch)["angle"] < 0.02
        assert normal_terms(-batch["truth"], batch)["angle"] > 3
    else:
        assert all(term < 1e-5 for term in depth_terms(batch["truth"], batch).values())
        terms = depth_terms(0.8 * batch["truth"] - 0.1, batch)
        assert terms.pop("anchor") > 0.005  # only what is not aligned costs something
        assert all(term < 1e-3 for term in terms.values())


def test_looks_change_but_stay_colours() -> None:
    images = torch.rand(4, 3, 32, 32)
    looks = change_looks(images, torch.Generator().manual_seed(0))
    assert looks.shape == images.shape
    assert looks.min() >= 0
    assert looks.max() <= 1
    assert (looks - images).abs().mean((1, 2, 3)).min() > 0.01
    torch.testing.assert_close(looks, change_looks(images, torch.Generator().manual_seed(0)), rtol=0, atol=0)


# -- training ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lotus-d", "lotus-g", "e2e-ft", "marigold"])
def test_every_recipe_trains_and_predicts(name: str, sd_folder: Path, scenes: SceneSet, tmp_path: Path) -> None:
    recipe = FAMILIES[name]
    training = OneStepTraining(task="normals", base=str(sd_folder), recipe=recipe, fit=SHORT, batch_size=2)
    samples = SceneSamples(scenes, "normals")
    model = train_head(training, ([samples], [1.0]), tmp_path, progress=False)
    assert model.unet.config.in_channels == (4 if recipe.first_latent == "none" else 8)
    vae = AutoencoderKL.from_pretrained(sd_folder / "vae")
    pixels = torch.zeros(2, 3, 64, 64)
    found = predict_maps(model, vae, pixels, "normals", steps=2 if recipe.timesteps == "all" else 1)
    assert found.shape == (2, 3, 64, 64)
    assert torch.isfinite(found).all()
    if recipe.timesteps == "one":
        with pytest.raises(ValueError, match="predicts in one step"):
            predict_maps(model, vae, pixels, "normals", steps=2)


@pytest.mark.parametrize("decoder", [False, True])
def test_a_run_cut_in_two_ends_as_one_that_was_not(
    decoder: bool, sd_folder: Path, scenes: SceneSet, tmp_path: Path
) -> None:
    recipe = replace(LOTUS_D, posterior="mean", preserve=0.0 if decoder else 0.5)
    samples = SceneSamples(scenes, "disparity")

    def run(folder: Path, stop_at: int | None = None) -> OneStepModel:
        training = OneStepTraining(
            base=str(sd_folder), recipe=recipe, fit=replace(SHORT, steps=3, checkpoint_seconds=-1.0), batch_size=2,
            cache=not decoder, decoder=decoder,
        )  # fmt: skip

        def stop(model: OneStepModel, step: int) -> dict[str, float]:
            if step == stop_at:
                raise KeyboardInterrupt
            return {}

        return train_head(
            training, ([samples], [1.0]), folder, validate=stop, validate_every=1, latents=tmp_path / "latents",
            progress=False,
        )  # fmt: skip

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", stop_at=2)
    resumed = run(tmp_path / "cut")
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key
    other = OneStepTraining(base=str(sd_folder), recipe=replace(recipe, preserve=0.25), fit=SHORT, cache=True)
    with pytest.raises(ValueError, match="another folder"):
        train_head(other, ([samples], [1.0]), tmp_path / "cut", latents=tmp_path / "latents", progress=False)


def test_cached_latents_of_another_model_are_refused(sd_folder: Path, scenes: SceneSet, tmp_path: Path) -> None:
    vae = AutoencoderKL.from_pretrained(sd_folder / "vae")
    samples = SceneSamples(scenes, "disparity")
    kept = cache_latents(vae, samples, "disparity", tmp_path, made_with="one", progress=False)
    assert kept["images"].shape == kept["targets"].shape == (6, 4, 8, 8)
    with torch.no_grad():
        expected = vae.encode(samples.sample(4).pixels[None]).latent_dist.mean[0] * vae.config.scaling_factor
    torch.testing.assert_close(kept["images"][4].float(), expected, atol=0.05 * float(expected.abs().max()), rtol=0)
    with pytest.raises(ValueError, match="holds latents of one"):
        cache_latents(vae, samples, "disparity", tmp_path, made_with="two", progress=False)


@pytest.mark.parametrize("decoder", [False, True])
def test_a_trained_head_is_read_back_and_predicts_the_same(
    decoder: bool, sd_folder: Path, scenes: SceneSet, tmp_path: Path
) -> None:
    recipe = replace(LOTUS_D, posterior="mean", preserve=0.0)
    training = OneStepTraining(base=str(sd_folder), recipe=recipe, fit=SHORT, batch_size=2, decoder=decoder)
    samples = SceneSamples(scenes, "disparity")
    model = train_head(training, ([samples], [1.0]), tmp_path / "run", progress=False)
    training.write(tmp_path / "head", model, working_size=64)
    weights = load_file(tmp_path / "head/unet/diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float16}
    head = load_head(tmp_path / "head", dtype=torch.float32)
    image = np.array(scenes.image[0])
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 127.5 - 1
    vae = AutoencoderKL.from_pretrained(sd_folder / "vae")
    expected = predict_maps(model, vae, pixels, "disparity")
    if decoder:  # it draws at any scale, of the image and of its mirror image
        trained, looks = dense_head_of(model, vae, "disparity"), looks_of(image)
        with torch.no_grad():
            drawn = [trained.model.draw_maps(trained.model.predict(trained.model.encode(x), None), x) for x in looks]
        expected = stretch(trained.read((drawn[0] + drawn[1].flip(-1)) / 2, looks[0]))
    expected = expected[0, 0]
    torch.testing.assert_close(head.predict(image).values, expected, atol=5e-3, rtol=0)  # half precision
    assert (tmp_path / "head/decoder.safetensors").exists() == decoder == ("its own decoder" in head.recognised)


def test_a_decoder_is_trained_for_a_head_that_stays_as_it_is(
    sd_folder: Path, scenes: SceneSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    head = random_head(tmp_path / "head", task="normals", working_size=64)
    line = ["train", "normals", "--refine", str(head), "--data", f"scenes={scenes.folder}"]
    line += ["--work", str(tmp_path / "work")]
    assert main([*line, "--steps", "3", "--batch-size", "2", "--device", "cpu"]) == 0
    before, after = (load_head(folder, dtype=torch.float32, fold=False) for folder in (head, tmp_path / "work/head"))
    assert before.model.decoder is None
    assert after.model.decoder is not None
    for old, new in zip(before.model.network.parameters(), after.model.network.parameters(), strict=True):
        torch.testing.assert_close(old, new, rtol=1e-3, atol=1e-3)  # stored in half precision
    truth = torch.from_numpy(scenes.normals[0].astype(np.float32)).permute(2, 0, 1)
    surface = torch.from_numpy(np.isfinite(scenes.depth[0]))
    errors = [
        angular_error(one(np.array(scenes.image[0])).to_frame("rdf").values[None], truth[None])[0, 0][surface].mean()
        for one in (before, after)
    ]
    assert errors[1] < errors[0]  # a linear map of a random U-Net's latents is better than its VAE's
    assert main([*line[:1], "depth", *line[2:], "--device", "cpu"]) == 2
    assert "is a head for normals, not for disparity" in capsys.readouterr().err
    assert main([*line, "--scratch"]) == 2
    assert "goes without scratch" in capsys.readouterr().err


def test_options_mean_the_embedded_recipe_or_the_papers() -> None:
    ours = TrainDepth().training("disparity")
    assert (ours.decoder, ours.cache) == (True, False)
    assert (ours.recipe, ours.fit, ours.batch_size) == (EMBEDDED_RECIPE, EMBEDDED_FIT, EMBEDDED_BATCH)
    assert TrainNormals().training("normals") == replace(ours, task="normals")
    for options in ({"decoder": False}, {"preserve": 1.0}):  # the VAE draws, as published
        plain = TrainDepth(**options).training("disparity")
        assert (plain.decoder, plain.cache) == (False, True)
    with pytest.raises(ValueError, match="without the detail preserver"):
        TrainDepth(decoder=True, preserve=1.0).training("disparity")
    theirs = TrainDepth(base="some/folder", recipe="e2e-ft", data=("hypersim=x",)).training("depth")
    assert theirs.recipe == E2E_FT
    assert (theirs.fit.learning_rate, theirs.fit.accumulate, theirs.batch_size) == (3e-5, 16, 2)
    assert not theirs.cache
    short = TrainDepth(steps=7, preserve=0.0).training("disparity")
    assert (short.fit.steps, short.fit.minutes, short.recipe.preserve) == (7, None, 0.0)


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("depth", ["--base", "nonsense"], "nonsense"),
        ("depth", ["--latents", __file__], "is a file"),
        ("normals", ["--base", "nonsense"], "nonsense"),
        ("segmentation", ["--base", "nonsense"], "nonsense"),
        ("depth", ["--learning-rate", "nan"], "learning_rate must be finite and above 0, got nan"),
        ("segmentation", ["--learning-rate", "-1"], "learning_rate must be finite and above 0"),
        ("depth", ["--minutes", "nan"], "minutes must be finite and above 0"),
        ("depth", ["--shares", "0.5", "0.5"], "--shares needs a number above 0 for each of scenes"),
        ("depth", ["--data", "scenes", "hypersim=nowhere"], "nowhere"),
        ("normals", ["--scenes", "0"], "--scenes must be at least 1, got 0"),
        ("segmentation", ["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        ("depth", ["--preserve", "nan"], "preserve must be in [0, 1], got nan"),
        ("depth", ["--seed", "-1"], "--seed must be in"),
        ("segmentation", ["--sharpen", "nan"], "sharpen must be finite"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_a_scene_is_rendered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    command: str, options: list[str], message: str,
) -> None:  # fmt: skip
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("scenes were rendered")

    monkeypatch.setattr("diffrep.commands.train_heads.render_set", refuse)
    monkeypatch.chdir(tmp_path)
    assert main(["train", command, "--work", "w", *options]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_depth_from_a_decoder_of_its_own_has_any_scale_and_no_overshoot() -> None:
    head, drawn = load_head("tiny-depth"), torch.linspace(-3, 5, 10_000).view(1, 1, 100, 100)
    values = head.read(drawn).flatten()
    assert values[-1] == 3  # (5 + 1) / 2: not clamped to 1
    assert int((values == values[0]).sum()) == 51  # half a per cent is brought back to the farthest of the others
    assert bool((values.diff() >= 0).all())
    shown = head(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).values
    assert 0 <= float(shown.min()) < 0.1 < 0.9 < float(shown.max()) <= 1


def test_blurred_depth_is_sharp_where_the_image_has_an_edge() -> None:
    image = torch.zeros(2, 3, 12, 40)
    image[0, :, :, 20:] = 0.8
    ramp = ((torch.arange(40.0) - 17) / 6).clamp(0, 1).expand(2, 1, 12, 40)  # blurred from 17 to 23
    sharp = sharp_at_edges(ramp, image)
    assert sharp.shape == ramp.shape
    assert float(sharp[0, ..., 19].max()) < 0.1 < 0.6 < float(sharp[0, ..., 20].min())  # 0.33 and 0.5 before
    assert torch.equal(sharp[1, 0, :, 3:-3], ramp[1, 0, :, 3:-3])  # no edge in the image: a ramp is its own median
    assert torch.equal(sharp_at_edges(ramp[:1], image[:1]), sharp[:1])  # no image looks at another


def test_depth_is_sharpened_by_strips_as_it_would_be_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    depth, image = torch.rand(1, 1, 67, 50, generator=generator), torch.rand(1, 3, 67, 50, generator=generator)
    whole = sharp_at_edges(depth, image)
    monkeypatch.setattr("diffrep.heads.decoder.STRIP", 500)  # ten lines at once
    assert torch.equal(sharp_at_edges(depth, image), whole)


def test_depth_of_a_mirrored_image_is_the_mirrored_depth() -> None:
    head, image = load_head("tiny-depth", device="cpu"), render_scene(scene_seed("test", 3), category="chair").image
    shown = head(image).values
    assert torch.allclose(head(np.ascontiguousarray(image[:, ::-1])).values, shown.flip(-1), atol=1e-4)
    with torch.no_grad():  # one look alone is not
        plain = [head.model.draw_maps(head.model.predict(head.model.encode(x), None), x) for x in looks_of(image)]
    assert not torch.allclose(plain[0], plain[1].flip(-1), atol=1e-2)


def looks_of(image: np.ndarray) -> list[torch.Tensor]:
    """An image (H, W, 3) and its mirror image as (1, 3, H, W) in [0, 1]."""
    pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 255
    return [pixels, pixels.flip(-1)]
