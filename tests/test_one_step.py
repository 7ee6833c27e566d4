"""One-step heads: folding, families, loading, ensembles, tiles."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from diffrep.backbones.text import TextEncoders
from diffrep.heads.dense import DenseHead, PredictConfig
from diffrep.heads.families import E2E_FT, LOTUS_D, LOTUS_G, MARIGOLD, MARIGOLD_DIFFUSERS, task_vector
from diffrep.heads.loading import HeadError, load_head, recognise
from diffrep.heads.maps import DepthMap, NormalMap
from diffrep.heads.one_step import FoldedUNet, PlainUNet
from diffrep.heads.tiling import (
    E2E_ENSEMBLE,
    MARIGOLD_ENSEMBLE,
    DepthEnsemble,
    ensemble_depth,
    ensemble_normals,
    resize,
    tile_starts,
    to_working,
    working_size,
)

from .one_step_heads import random_head


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A smooth uint8 picture."""
    small = torch.rand(1, 3, 5, 6, generator=torch.Generator().manual_seed(seed))
    large = torch.nn.functional.interpolate(small, (height, width), mode="bicubic").clamp(0, 1)
    return (large[0].permute(1, 2, 0) * 255).round().byte().numpy()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("heads")
    wanted = [("lotus-d", "disparity"), ("lotus-g", "depth"), ("lotus-d", "normals"), ("marigold", "depth")]
    wanted += [("e2e-ft", "depth"), ("marigold", "normals"), ("lotus-g", "normals")]
    return {f"{f} {t}": random_head(folder / f"{f}-{t}", family=f, task=t) for f, t in wanted}


@pytest.fixture(scope="module")
def head(folders: dict[str, Path]) -> DenseHead:
    return load_head(folders["lotus-d disparity"])


# -- folding ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "padding", "size"), [(4, 0, (8, 8)), (8, 4, (7, 5)), (8, 0, (9, 6))])
def test_folding_changes_no_number(channels: int, padding: int, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        in_channels=channels, out_channels=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12, attention_head_dim=4,
        class_embed_type="projection", projection_class_embeddings_input_dim=4,
    ).eval()  # fmt: skip
    context = torch.randn(1, 2, 12)
    latents = torch.randn(2, channels - padding, *size)
    plain = PlainUNet(unet, context, padding_channels=padding)
    with torch.no_grad():
        calls = [(999, task_vector((1, 0))), (999, task_vector((0, 1))), (499, task_vector((1, 0)))]
        expected = [plain(latents, *call) for call in calls]
        folded = FoldedUNet(unet, context, padding_channels=padding)
        for call, value in zip([*calls, *calls], [*expected, *expected], strict=True):
            torch.testing.assert_close(folded(latents, *call), value, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(expected[0], expected[1])
    assert not torch.allclose(expected[0], expected[2])


def test_another_way_of_conditioning_is_not_folded() -> None:
    unet = UNet2DConditionModel(
        block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, cross_attention_dim=8, attention_head_dim=4,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, resnet_time_scale_shift="scale_shift",
    )  # fmt: skip
    with pytest.raises(ValueError, match="cannot be folded: its residual blocks"):
        FoldedUNet(unet, torch.zeros(1, 2, 8))


@pytest.mark.parametrize("name", ["lotus-g depth", "e2e-ft depth"])
def test_a_folded_head_agrees_with_the_plain_one_and_does_less(folders: dict[str, Path], name: str) -> None:
    counts, latents = [], []
    image = torch.randn(1, 8, 4, 6, generator=torch.Generator().manual_seed(0))
    for fold in (False, True):
        model = load_head(folders[name], fold=fold).model
        noise = None if name.startswith("e2e") else torch.ones(1, 8, 4, 6)
        model.predict(image, noise)  # constants are computed by the first call
        with FlopCounterMode(display=False) as counter:
            latents.append(model.predict(image, noise))
        counts.append(counter.get_total_flops())
    torch.testing.assert_close(latents[0], latents[1], atol=2e-4, rtol=1e-4)
    assert counts[1] < counts[0]


# -- sizes, batches, noise ----------------------------------------------------------------------------------


def test_working_size_truncates_as_the_official_code() -> None:
    assert working_size(370, 1226, 768, "truncate") == (231, 767)
    assert working_size(370, 1226, 768, "integer") == (231, 768)
    assert working_size(33, 20, 0, "truncate") == (33, 20)
    with pytest.raises(ValueError, match="no pixel left on its short side at size 64"):
        working_size(1, 900, 64, "truncate")


@pytest.mark.parametrize("name", ["lotus-g depth", "e2e-ft depth"])
def test_a_map_does_not_depend_on_its_company(folders: dict[str, Path], name: str) -> None:
    loaded = load_head(folders[name])
    images = [picture(40, 56, seed) for seed in range(3)] + [picture(30, 30, 3)]
    alone = [loaded.predict(image).values for image in images]
    for size in (2, 8):
        together = loaded.predict_each(images[::-1], PredictConfig(batch_size=size))
        for got, expected in zip(together, alone[::-1], strict=True):
            torch.testing.assert_close(got.values, expected, atol=2e-4, rtol=0)
    assert alone[0].shape[-2:] == (40, 56)
    assert alone[3].shape[-2:] == (30, 30)


def test_noise_comes_from_the_seed_and_never_from_the_global_generator(folders: dict[str, Path]) -> None:
    loaded = load_head(folders["lotus-g depth"])
    config = PredictConfig(posterior="sample")
    state = torch.random.get_rng_state()
    first = loaded.predict(picture(40, 40), config).values
    torch.rand(3)
    again = loaded.predict(picture(40, 40), config).values
    other = loaded.predict(picture(40, 40), dataclasses.replace(config, seed=1)).values
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=1e-2)
    torch.random.set_rng_state(state)
    loaded.predict(picture(40, 40), config)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_official_sizes_drop_what_fills_no_cell_and_ours_do_not(head: DenseHead) -> None:
    pixels = torch.from_numpy(picture(45, 61)).permute(2, 0, 1)[None]
    ours, _ = head.maps(pixels, PredictConfig(size=0))
    official, _ = head.maps(pixels, PredictConfig(size=0, official=True))
    assert ours.shape[-2:] == (45, 61)
    assert official.shape[-2:] == (40, 56)
    tiny = torch.zeros(1, 3, 6, 40, dtype=torch.uint8)
    with pytest.raises(ValueError, match="sees 40 x 6 pixels, it needs 8"):
        head.maps(tiny, PredictConfig(size=0, official=True))


def test_bfloat16_is_near(folders: dict[str, Path]) -> None:
    image = picture(64, 64)
    full = load_head(folders["lotus-d disparity"]).predict(image).values
    half = load_head(folders["lotus-d disparity"], dtype=torch.bfloat16).predict(image)
    assert half.values.dtype == torch.float32
    assert half.settings["dtype"] == "bfloat16"
    assert float((full - half.values).abs().mean()) < 0.05


def test_results_know_what_they_are(folders: dict[str, Path]) -> None:
    disparity = load_head(folders["lotus-d disparity"]).predict(picture(40, 40))
    depth = load_head(folders["e2e-ft depth"]).predict(picture(40, 40))
    normals = load_head(folders["marigold normals"]).predict(picture(40, 40))
    assert isinstance(disparity, DepthMap)
    assert isinstance(depth, DepthMap)
    assert isinstance(normals, NormalMap)
    assert (disparity.space, disparity.near_is_one, depth.space, depth.near_is_one) == (
        "disparity",
        True,
        "depth",
        False,
    )
    assert float(depth.values.min()) == 0
    assert normals.frame == "rub"
    lengths = normals.values.norm(dim=0)
    torch.testing.assert_close(lengths, torch.ones_like(lengths))
    json.dumps(disparity.metadata())
    assert disparity.metadata()["large_values_are"] == "near"


def test_settings_that_do_not_fit_are_refused(folders: dict[str, Path], head: DenseHead) -> None:
    for config, message in [
        (PredictConfig(ensemble=3), "ensemble of 3 needs noise, and a lotus-d head has none"),
        (PredictConfig(steps=2), "predicts in one step"),
        (PredictConfig(reduction="closest"), "reduction of disparity must be median or mean"),
        (PredictConfig(tile=64, ensemble=2, posterior="sample"), "do not go together"),
    ]:
        with pytest.raises(ValueError, match=message):
            head.predict(picture(40, 40), config)
    for settings, message in [
        ({"size": -1}, "size must be"),
        ({"ensemble": 0}, "ensemble must be at least 1"),
        ({"tile": 8}, "tile must be at least 64"),
        ({"overlap": 0.7}, "overlap must be in"),
    ]:
        with pytest.raises(ValueError, match=message):
            PredictConfig(**settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="starts from noise: give it"):
        load_head(folders["lotus-g depth"]).model.predict(torch.zeros(1, 8, 4, 4))
    with pytest.raises(ValueError, match="starts from no noise"):
        head.model.predict(torch.zeros(1, 8, 4, 4), torch.zeros(1, 8, 4, 4))


# -- ensembles ----------------------------------------------------------------------------------------------


def test_least_squares_ensemble_undoes_scale_and_shift() -> None:
    truth = torch.rand(30, 40, generator=torch.Generator().manual_seed(0))
    truth = (truth - truth.min()) / (truth.max() - truth.min())
    members = torch.stack([truth * s + t for s, t in ((1, 0), (0.3, 0.5), (2, -0.4), (0.7, 0.1), (1.1, 0))])
    result, uncertainty = ensemble_depth(members)
    torch.testing.assert_close(result, truth, atol=1e-5, rtol=0)
    assert float(uncertainty.max()) < 1e-5
    scaled = torch.stack([truth * s for s in (1.0, 0.4, 2.0)])
    torch.testing.assert_close(ensemble_depth(scaled, DepthEnsemble(shift=False))[0], truth, atol=1e-5, rtol=0)


def test_uncertainty_is_where_members_disagree() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.linspace(0, 1, 40).expand(30, 40)
    members = truth + torch.zeros(7, 30, 40)
    members[:, 10:20] += 0.1 * torch.randn(7, 10, 40, generator=generator)
    for reduction in ("median", "mean"):
        _, uncertainty = ensemble_depth(members, DepthEnsemble(reduction=reduction))  # type: ignore[arg-type]
        assert float(uncertainty[10:20].mean()) > 5 * float(uncertainty[:10].mean())
    normals = torch.nn.functional.normalize(torch.randn(5, 3, 8, 8, generator=generator), dim=1)
    normals[..., :4] = normals[:1, ..., :4]
    closest, spread = ensemble_normals(normals)
    assert float(spread[:, :4].max()) < 1e-3 < float(spread[:, 4:].min())
    distances = (closest - normals).norm(dim=1).min(0).values
    assert float(distances.max()) == 0  # each is one of the members


def test_an_ensemble_of_a_head(folders: dict[str, Path]) -> None:
    loaded = load_head(folders["lotus-g depth"])
    single = loaded.predict(picture(40, 40))
    several = loaded.predict(picture(40, 40), PredictConfig(ensemble=3))
    assert single.uncertainty is None
    assert several.uncertainty is not None
    assert several.uncertainty.shape == (40, 40)
    assert float(several.uncertainty.max()) > 0


@pytest.mark.parametrize("settings", [DepthEnsemble(), MARIGOLD_ENSEMBLE, E2E_ENSEMBLE])
def test_an_ensemble_of_one_is_its_member(settings: DepthEnsemble) -> None:
    member = torch.rand(1, 20, 24, generator=torch.Generator().manual_seed(0))
    result, uncertainty = ensemble_depth(member, settings)
    torch.testing.assert_close(result, (member[0] - member.min()) / (member.max() - member.min()), atol=1e-5, rtol=0)
    assert float(uncertainty.max()) == 0
    assert ensemble_depth(member, dataclasses.replace(settings, reduction="mean"))[1].isnan().all()
    normals = torch.nn.functional.normalize(torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    for reduction in ("closest", "mean"):
        got, spread = ensemble_normals(normals, reduction)  # type: ignore[arg-type]
        torch.testing.assert_close(got, normals[0])
        assert float(spread.max()) < 1e-3
    with pytest.raises(ValueError, match="at least one member"):
        ensemble_depth(torch.zeros(0, 4, 4))


# -- loading ------------------------------------------------------------------------------------------------


def test_loading_says_what_it_found_and_reads_no_text_encoder(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("the text encoder was loaded")

    monkeypatch.setattr(TextEncoders, "encode", refuse)
    loaded = load_head(folders["lotus-d normals"])
    assert loaded.recognised == "lotus-d, normals (8 input channels, task vector; task said by head.json)"
    assert (loaded.task, loaded.family.frame, loaded.working_size) == ("normals", "lub", 64)


def test_a_head_survives_writing(folders: dict[str, Path], tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(folders["lotus-d disparity"], moved)
    assert sorted(p.name for p in moved.iterdir()) == ["context.safetensors", "head.json", "unet"]
    image = picture(40, 56)
    expected = load_head(folders["lotus-d disparity"]).predict(image).values
    assert torch.equal(load_head(moved).predict(image).values, expected)


def unet_config(channels: int, classes: int | None) -> dict[str, object]:
    kind = "projection" if classes else None
    return {"in_channels": channels, "class_embed_type": kind, "projection_class_embeddings_input_dim": classes}


def test_families_are_recognised_from_their_configs() -> None:
    vae = {"latent_channels": 4}
    for channels, classes, family in [(4, 4, LOTUS_D), (8, 4, LOTUS_G), (8, None, MARIGOLD)]:
        found = recognise("x", unet_config(channels, classes), vae, {}, {}, task="depth")
        assert found.family == family
    assert recognise("x", unet_config(8, None), vae, {}, {}, task="depth", family="e2e-ft").family == E2E_FT
    wide = {"latent_channels": 16}
    assert recognise("x", unet_config(16, 4), wide, {}, {}, task="normals").family == LOTUS_D
    assert recognise("jingheya/lotus-normal-g-v1-1", unet_config(8, 4), vae, {}, {}).task == "normals"
    assert recognise("/copies/stable-diffusion-e2e-ft-depth", unet_config(8, None), vae, {}, {}).family == E2E_FT
    index = {"prediction_type": "normals", "default_processing_resolution": 512}
    told = recognise("x", unet_config(8, None), vae, {}, index)
    assert (told.task, told.family.working_size) == ("normals", 512)


def test_wrong_folders_are_refused_in_one_line() -> None:
    vae = {"latent_channels": 4}
    for config, options, message in [
        (unet_config(8, 4), {}, "do not say what it predicts: name the task, one of depth, disparity, normals"),
        (unet_config(8, 10), {"task": "depth"}, "is a GeoWizard"),
        (unet_config(4, None), {"task": "depth"}, "is a plain diffusion model and no head"),
        (unet_config(9, None), {"task": "depth"}, "is no one-step head: its U-Net takes 9 channels"),
        (unet_config(8, 4), {"task": "depth", "family": "marigold"}, "is no marigold: 8 input channels, task vector"),
        (unet_config(8, None), {"task": "depth", "family": "lotus-g"}, "is no lotus-g"),
        (unet_config(8, 4), {"task": "flow"}, "there is no task 'flow'"),
        (unet_config(8, 4), {"task": "depth", "family": "dpt"}, "there is no family 'dpt'"),
    ]:
        with pytest.raises(HeadError, match=message) as caught:
            recognise("x", config, vae, {}, {}, **options)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
    with pytest.raises(HeadError, match=r"predicts normals \(said by head.json\), but the task depth"):
        recognise("x", unet_config(8, 4), vae, {"task": "normals"}, {}, task="depth")
    with pytest.raises(HeadError, match="is a head for segmentation"):
        recognise("x", unet_config(8, 4), vae, {"task": "segmentation"}, {})


def test_broken_folders_are_refused_in_one_line(folders: dict[str, Path], tmp_path: Path) -> None:
    def broken(change: str) -> Path:
        copy = tmp_path / change
        shutil.copytree(folders["lotus-d disparity"], copy)
        return copy

    weights = "unet/diffusion_pytorch_model.safetensors"
    cut = broken("cut")
    (cut / weights).write_bytes((cut / weights).read_bytes()[:-1000])
    infinite = broken("infinite")
    tensors = load_file(infinite / weights)
    tensors["conv_in.weight"][0, 0, 0, 0] = torch.inf
    save_file(tensors, infinite / weights, metadata={"format": "pt"})
    homeless = broken("homeless")
    (homeless / "head.json").write_text(json.dumps({"base": "nowhere", "task": "depth"}))
    (tmp_path / "empty").mkdir()
    garbled = broken("garbled")
    (garbled / "head.json").write_text("{")
    narrow = broken("narrow")
    save_file({"context": torch.zeros(1, 2, 9)}, narrow / "context.safetensors")
    for folder, message in [
        (cut, "damaged|cannot be loaded|do not fit"),
        (infinite, "conv_in.weight has NaN or infinite values"),
        (homeless, "names the base nowhere"),
        (tmp_path / "empty", "unet/config.json is missing"),
        (garbled, "cannot be read as JSON"),
        (narrow, "embedding has 9 channels, the U-Net attends to 24"),
        (tmp_path / "nothing", "there is no such folder or file"),
    ]:
        with pytest.raises(HeadError, match=message) as caught:
            load_head(folder)
        assert "\n" not in str(caught.value)


# -- tiles --------------------------------------------------------------------------------------------------


def test_tiles_cover_a_side_with_their_overlap() -> None:
    for side, tile, overlap in [(1000, 512, 128), (64, 64, 16), (65, 64, 16), (5000, 256, 64), (30, 64, 16)]:
        starts = tile_starts(side, tile, overlap)
        assert starts[0] == 0
        assert starts[-1] + tile >= side
        for a, b in itertools.pairwise(starts):
            assert a < b <= a + tile - overlap + 8


class _Smooth(DenseHead):
    """A head whose map is a picture's red channel with a scale and shift that every call draws anew."""

    def maps(
        self,
        pixels: Tensor,
        config: PredictConfig,
        *,
        noise: Tensor | None = None,
        posterior_noise: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        red = pixels[:, :1].float() / 255
        low, high = red.amin((1, 2, 3), keepdim=True), red.amax((1, 2, 3), keepdim=True)
        return (red - low) / (high - low), None


def test_tiles_are_brought_to_one_scale_and_show_no_seam(head: DenseHead) -> None:
    smooth = _Smooth(head.model, "depth")
    image = picture(300, 420)
    whole = smooth.maps(torch.from_numpy(image).permute(2, 0, 1)[None], PredictConfig())[0][0, 0]
    tiled = smooth.predict(image, PredictConfig(tile=128)).values
    assert float((tiled - whole).abs().max()) < 0.01

    columns = tile_starts(420, 128, 32)
    across = (tiled[:, 1:] - tiled[:, :-1]).abs().mean(0)
    borders = [c - 1 for c in columns[1:]] + [c + 127 for c in columns[:-1]]
    inside = torch.ones(len(across), dtype=torch.bool)
    inside[borders] = False
    reference = (whole[:, 1:] - whole[:, :-1]).abs().mean(0)
    excess = (across / reference)[borders].mean() / (across / reference)[inside].mean()
    assert abs(float(excess) - 1) < 0.05


@pytest.mark.parametrize("name", ["lotus-d normals", "lotus-g depth"])
def test_tiled_maps_have_the_image_size_and_do_not_depend_on_the_batch(folders: dict[str, Path], name: str) -> None:
    loaded = load_head(folders[name])
    image = picture(150, 200)
    maps = [loaded.predict(image, PredictConfig(tile=64, batch_size=size)).values for size in (1, 5)]
    torch.testing.assert_close(maps[0], maps[1], atol=5e-4, rtol=0)
    assert maps[0].shape[-2:] == (150, 200)
    assert maps[0].isfinite().all()
    assert loaded.predict(picture(60, 64), PredictConfig(tile=64)).values.shape[-2:] == (60, 64)  # fits one tile


def test_tiles_write_into_a_file_map(folders: dict[str, Path], tmp_path: Path) -> None:
    from diffrep.heads.tiling import predict_tiled

    loaded = load_head(folders["lotus-d disparity"])
    image = picture(100, 150)
    expected = loaded.predict(image, PredictConfig(tile=64)).values
    into = np.lib.format.open_memmap(tmp_path / "map.npy", mode="w+", dtype=np.float32, shape=(100, 150))
    predict_tiled(loaded, torch.from_numpy(image).permute(2, 0, 1), PredictConfig(tile=64), into=into)
    into.flush()
    np.testing.assert_array_equal(np.load(tmp_path / "map.npy"), expected.numpy())


@pytest.mark.slow
def test_memory_of_tiles_does_not_grow_with_the_area(folders: dict[str, Path]) -> None:
    from torch.profiler import ProfilerActivity, profile

    loaded = load_head(folders["lotus-d normals"])
    peaks = []
    for side in (256, 512):
        image = picture(side, side)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            loaded.predict(image, PredictConfig(tile=64, batch_size=1))
        level, peak = 0, 0
        for event in record.profiler.kineto_results.events():
            if event.name() == "[memory]":
                level += event.nbytes()
                peak = max(peak, level)
        peaks.append(peak - 3 * side * side)  # the image itself; the map is numpy's
    assert peaks[1] < 1.5 * peaks[0] + 64 * 512 * 4 * 8  # a band of the width, never the area


@pytest.mark.slow
def test_the_benchmark_compares_equal_results() -> None:
    from diffrep.eval.benchmarks.networks import DepthBenchmark

    threads = torch.get_num_threads()
    rows = DepthBenchmark(side=64, images=2, families=("lotus-g", "e2e-ft"), repeats=1).run()
    torch.set_num_threads(threads)  # the benchmark takes one
    assert len(rows) == 6
    for row in rows:
        assert float(row.equality.split()[2]) < 1e-4
        plain, ours = (float(word) for word in row.flops.split()[1:4:2])
        assert plain >= ours


def test_resampling_goes_by_the_names_of_the_official_programs() -> None:
    values = torch.arange(24.0).reshape(1, 1, 4, 6)
    assert torch.equal(resize(values, (2, 3), "nearest"), resize(values, (2, 3), "nearest-exact"))
    with pytest.raises(ValueError, match="resample must be bilinear, bicubic, nearest, nearest-exact, got 'lanczos'"):
        resize(values, (2, 3), "lanczos")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="resample must be"):
        PredictConfig(resample="area")  # type: ignore[arg-type]


def test_the_timestep_of_the_single_pass_is_an_option(tmp_path: Path) -> None:
    head = load_head(random_head(tmp_path / "head"))
    image = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    plain, last = (head.predict(image, PredictConfig(timestep=t)).values for t in (None, 999))
    assert torch.equal(plain, last)
    assert not torch.allclose(plain, head.predict(image, PredictConfig(timestep=500)).values)
    with pytest.raises(ValueError, match=r"timestep must be in 0..999, got 1000"):
        PredictConfig(timestep=1000)
    with pytest.raises(ValueError, match=r"seed must be in"):
        PredictConfig(seed=2**80)


def test_bicubic_normals_of_e2e_ft_stay_in_range(tmp_path: Path) -> None:
    head = load_head(random_head(tmp_path / "head", family="e2e-ft", task="normals"))
    image = np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8)
    normals = head.predict(image, PredictConfig(size=32, resample="bicubic", official=True)).values
    assert float(normals.abs().max()) == 1.0  # clipped behind the resize, which overshoots


@pytest.mark.parametrize("spacing", ["trailing", "leading"])
@pytest.mark.parametrize("steps", [1, 4])
@torch.no_grad()
def test_spacings_are_those_of_diffusers_sampler(spacing: str, steps: int, tmp_path: Path) -> None:
    folder = random_head(tmp_path / "head", family="marigold", task="depth")
    about = {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "prediction_type": "v_prediction",
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "timestep_spacing": "leading",
        "clip_sample": False,
    }
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(about))
    head = load_head(folder)
    assert "its scheduler says leading timesteps" in head.found
    model, sampler = head.model, DDIMScheduler(**{**about, "timestep_spacing": spacing})
    sampler.set_timesteps(steps)
    assert model.schedule.timesteps(steps, spacing) == sampler.timesteps.tolist()  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(3)
    latents, noise = (torch.randn(1, 8, 8, 8, generator=generator) for _ in range(2))
    current = noise
    for timestep in sampler.timesteps:
        output = model.network(torch.cat([latents, current], dim=1), int(timestep))
        current = sampler.step(output, timestep, current).prev_sample
    got = model.predict(latents, noise, steps=steps, spacing=spacing)  # type: ignore[arg-type]
    torch.testing.assert_close(got, current, rtol=1e-4, atol=1e-4)


def test_what_a_marigold_says_of_its_range_is_followed_and_saved(folders: dict[str, Path], tmp_path: Path) -> None:
    for task in ("normals", "depth"):
        folder = shutil.copytree(folders[f"marigold {task}"], tmp_path / task)
        (folder / "model_index.json").write_text(json.dumps({"use_full_z_range": False, "shift_invariant": False}))
        load_head(folder).save_pretrained(tmp_path / f"saved-{task}")
    normals, depth = (load_head(tmp_path / f"saved-{task}") for task in ("normals", "depth"))
    away = torch.tensor([0.6, 0.0, -2.0]).view(1, 3, 1, 1)  # clamped to -1, which is sideways in half a range
    torch.testing.assert_close(normals.read(away).flatten(), torch.tensor([1.0, 0.0, 0.0]))
    torch.testing.assert_close(load_head(folders["marigold normals"]).read(away).flatten()[2], torch.tensor(-0.8575))
    members = (torch.rand(1, 1, 1, 8, 8) + 0.5) * torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1, 1)
    maps, _ = depth.combine(members, PredictConfig(ensemble=3))  # differ by a scale: nothing else is taken off
    torch.testing.assert_close(maps[0], members[0, 0] / members[0, 0].max(), rtol=1e-4, atol=1e-4)


def test_nearest_is_that_of_the_family() -> None:
    values = torch.arange(0, 240, 10, dtype=torch.uint8).reshape(1, 1, 4, 6)
    official, diffusers = (to_working(values, family, 3, "nearest") for family in (MARIGOLD, MARIGOLD_DIFFUSERS))
    torch.testing.assert_close(official * 255, values[..., 1::2, 1::2].float())
    torch.testing.assert_close(diffusers * 255, values[..., ::2, ::2].float())


def test_spacing_goes_with_marigold_alone(folders: dict[str, Path], head: DenseHead, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="goes with Marigold"):
        head(picture(40, 40), spacing="leading")
    with pytest.raises(ValueError, match="timestep 5 is the single step"):
        PredictConfig(timestep=5, spacing="leading")
    marigold = load_head(random_head(tmp_path / "m", family="marigold", task="depth"))
    maps = [marigold(picture(40, 40), spacing=spacing).values for spacing in ("trailing", "leading")]
    assert not torch.allclose(*maps)


@pytest.mark.parametrize("task", ["depth", "disparity"])
def test_what_lies_beyond_almost_all_is_drawn_back(task: str, head: DenseHead, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder of its own overshoots: the farthest half percent of an image, whatever is near, becomes as the next."""
    monkeypatch.setattr(head, "task", task)
    monkeypatch.setattr(head.model, "decoder", torch.nn.Identity())
    decoded = torch.randn(2, 1, 40, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    values, order = decoded.float() / 2 + 0.5, (decoded.float() / 2 + 0.5).flatten(1).sort(1).values
    low, high = (order[:, 10], order[:, -1]) if task == "disparity" else (order[:, 0], order[:, -11])
    expected = torch.stack([v.clamp(a, b) for v, a, b in zip(values, low, high, strict=True)])
    assert torch.equal(head.read(decoded), expected)
