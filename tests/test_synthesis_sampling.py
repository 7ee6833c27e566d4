"""The large-image sampler: what must not matter does not, and an interrupted run ends as it would have."""

from __future__ import annotations

import errno
import inspect
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler
from PIL import Image
from torch import Tensor

from diffrep.sampling.samplers import ALIASES, SAMPLERS
from diffrep.synthesis import (
    EmbeddingGrid,
    GridError,
    SynthesisSettings,
    denoise_canvas,
    sample_patches,
    synthesize,
    synthesize_file,
)
from diffrep.synthesis.canvas import (
    ALIKE,
    BETWEEN,
    Lines,
    Position,
    RowSweep,
    Run,
    Weighting,
    WindowPlan,
    window_shares,
    window_weights,
)
from diffrep.synthesis.large import decode_lines, grid_shape, paint
from diffrep.synthesis.sampler import GivenNoise, KeyedNoise, predict
from diffrep.synthesis.schedulers import build_scheduler

from .synthetic_painter import Painter

FEW = SynthesisSettings(steps=4, seed=3, batch_size=5)


def grid_of(rows: int, columns: int, dim: int = 6) -> EmbeddingGrid:
    return EmbeddingGrid(torch.randn(rows, columns, dim, generator=torch.Generator().manual_seed(1)))


def whole(lines: Lines) -> np.ndarray:
    return lines.read(0, lines.shape[0])


def test_windows_cover_every_canvas() -> None:
    for size in ((8, 8), (8, 9), (23, 41)):
        for stride in (1, 3, 8):
            plan = WindowPlan(size, 8, stride)
            covered = np.zeros(size, int)
            for row in plan.rows:
                for column in plan.columns:
                    covered[row : row + 8, column : column + 8] += 1
            assert covered.min() >= 1
            assert len(plan) == len(plan.rows) * len(plan.columns)
    with pytest.raises(ValueError, match="smaller than one window of 8"):
        WindowPlan((7, 30), 8, 4)
    with pytest.raises(ValueError, match=r"must be in 1\.\.8, got 9"):
        WindowPlan((8, 30), 8, 9)


@pytest.mark.parametrize("weighting", ["cells", "hann", "gaussian", "uniform"])
@pytest.mark.parametrize("stride", [4, 5])
def test_sweep_is_the_weighted_average(weighting: Weighting, stride: int) -> None:
    plan, weights = WindowPlan((19, 13), 8, stride), window_weights(weighting, 8)
    draws = np.random.default_rng(0)
    values = draws.normal(size=(len(plan), 2, 8, 8)).astype(np.float32)
    factors = draws.uniform(0.1, 1, len(plan))
    sums, totals = np.zeros((2, 19, 13)), np.zeros((19, 13))
    sweep, found = RowSweep(plan, weights, 2), []
    places = [(r, c) for r in range(len(plan.rows)) for c in range(len(plan.columns))]
    for value, factor, (row, column) in zip(values, factors, places, strict=True):
        i, j = plan.rows[row], plan.columns[column]
        sums[:, i : i + 8, j : j + 8] += factor * weights.numpy() * value
        totals[i : i + 8, j : j + 8] += factor * weights.numpy()
        found += sweep.add(row, column, value, factor)
    found += list(sweep.end_row())
    starts = [start for start, _ in found]
    assert starts == sorted(starts)
    assert set(plan.rows) <= set(starts)
    np.testing.assert_allclose(np.concatenate([v for _, v in found]).swapaxes(0, 1), sums / totals, atol=2e-5)


def shares_of(plan: WindowPlan, grid: EmbeddingGrid, weighting: Weighting = "cells") -> tuple[np.ndarray, np.ndarray]:
    """Weight and guidance of every window, (rows, columns)."""
    corners = torch.tensor([(row, column) for row in plan.rows for column in plan.columns])
    weight, told = window_shares(weighting, plan, corners, grid, unrelated=0.6)
    shape = len(plan.rows), len(plan.columns)
    return weight.reshape(shape).numpy(), told.reshape(shape).numpy()


def test_windows_between_unrelated_cells_close_the_border_and_are_told_nothing() -> None:
    plan, grid = WindowPlan((16, 20), 8, 4), EmbeddingGrid(torch.eye(6).unflatten(0, (2, 3)))
    weight, told = shares_of(plan, grid)
    assert plan.columns == (0, 4, 8, 12)
    less, both = BETWEEN, BETWEEN**2
    np.testing.assert_allclose(weight, [[1, less, 1, less], [less, both, less, both], [1, less, 1, less]], rtol=1e-6)
    # the canvas ends within the third cell: 12..20 is all that it has
    assert told.tolist() == [[1, 0, 1, 1], [0, 0, 0, 0], [1, 0, 1, 1]]


def test_windows_between_alike_cells_are_like_those_of_cells() -> None:
    plan = WindowPlan((16, 24), 8, 4)
    for weighting, stride in (("hann", 4), ("uniform", 4), ("cells", 5)):
        shares = shares_of(WindowPlan((16, 24), 8, stride), EmbeddingGrid(torch.eye(6).unflatten(0, (2, 3))), weighting)
        assert all((share == 1).all() for share in shares)
    values = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]]).repeat(2, 1).unflatten(0, (2, 3))
    weight, told = shares_of(plan, EmbeddingGrid(values))
    assert (weight[:, :3] == 1).all()  # the first two columns of cells agree
    assert (told[:, :3] == 1).all()
    np.testing.assert_allclose(weight[:, 3], [BETWEEN, BETWEEN**2, BETWEEN], rtol=1e-6)
    middle = 0.6 + ALIKE * 0.4 / 2
    half = EmbeddingGrid(torch.tensor([[[1.0, 0.0], [middle, (1 - middle**2) ** 0.5]]]))
    weight, told = shares_of(WindowPlan((8, 16), 8, 4), half)
    np.testing.assert_allclose(told, [[1, 0.5, 1]], atol=1e-6)
    np.testing.assert_allclose(weight, [[1, (1 + BETWEEN) / 2, 1]], atol=1e-6)


@pytest.mark.parametrize("guidance", [0.0, 1.0, 3.0])
def test_guidance_is_as_strong_as_windows_are_told(guidance: float) -> None:
    model, settings = Painter(), SynthesisSettings(guidance=guidance)
    latents, embeddings = torch.randn(4, 3, 8, 8), torch.randn(4, 6)
    time, told = torch.tensor(500), torch.tensor([1.0, 0.0, 0.25, 1 / 3])
    null, conditional = model(latents, time, model.null_context(4)), model(latents, time, model.context(embeddings))
    scale = guidance * told[:, None, None, None]
    found = predict(model, latents, time, [embeddings], settings, shares=told)
    torch.testing.assert_close(found, null + scale * (conditional - null))
    everything = predict(model, latents, time, [embeddings], settings)
    torch.testing.assert_close(everything, null + guidance * (conditional - null))


def test_a_prediction_that_cancels_is_not_made() -> None:
    sizes: list[int] = []

    class Counting(Painter):
        def __call__(self, latents: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
            sizes.append(len(latents))
            return super().__call__(latents, timesteps, context)

    for guidance, told, expected in ((3.0, [1, 0, 0.5, 1 / 3], 3 + 3), (1.0, [1, 1, 1, 1], 4), (0.0, [1, 1, 1, 1], 4)):
        settings = SynthesisSettings(guidance=guidance)
        predict(Counting(), torch.randn(4, 3, 8, 8), torch.tensor(5), [torch.randn(4, 6)], settings,
                shares=torch.tensor(told))  # fmt: skip
        assert sizes.pop() == expected


def test_every_visible_cell_is_painted_by_its_embedding() -> None:
    """Also one that the canvas ends within: its windows begin between cells."""
    grid, size = EmbeddingGrid(torch.full((2, 3, 6), 3.0)), (12, 20)
    painted = whole(denoise_canvas(Painter(), grid, size, replace(FEW, steps=12)))
    assert painted[2:-2, :, 2:-2].mean() > 0.05  # the painter's clean value is 0.1 tanh(3); 0 without a condition


@pytest.mark.parametrize("scheduler", [*sorted({*SAMPLERS} - {"evodiff", "lml", "sit-sde"}), *ALIASES])
def test_lines_are_stepped_as_the_whole_canvas_would_be(scheduler: str) -> None:
    """Against the scheduler itself, which is given all rows of the canvas as one batch."""
    model, grid, steps = Painter(window=16), grid_of(2, 1), 6
    settings = replace(FEW, scheduler=scheduler, steps=steps, stride=16)
    found = whole(denoise_canvas(model, grid, (32, 16), settings))

    plain, rows = build_scheduler(scheduler, model.scheduler, steps), range(32)
    takes_noise = "generator" in inspect.signature(plain.step).parameters
    noise = KeyedNoise(settings.seed)
    latents = noise.start(rows, (3, 1, 16)) * float(plain.init_noise_sigma)
    context = model.context(grid.embeddings[:, 0])
    for number, timestep in enumerate(plain.timesteps):
        scaled = plain.scale_model_input(latents, timestep)[:, :, 0].movedim(0, 1).unflatten(1, (2, 16)).movedim(1, 0)
        predicted = model(scaled, timestep.float(), context).movedim(0, 1).flatten(1, 2).movedim(1, 0)[:, :, None]
        extra = dict(noise.arguments(number, rows)) if takes_noise else {}
        latents = plain.step(predicted, timestep, latents, **extra).prev_sample
    np.testing.assert_allclose(found, latents[:, :, 0].numpy(), rtol=1e-5, atol=1e-5)
    assert np.isfinite(found).all()


@pytest.mark.parametrize("scheduler", ["dpmpp_2m", "dpmpp_2m_sde", "heun", "ghvb", "unipc-hb"])
def test_neither_batch_size_nor_band_matters(scheduler: str) -> None:
    model, grid, size = Painter(), grid_of(4, 5), (27, 39)
    settings = replace(FEW, scheduler=scheduler)
    expected = whole(denoise_canvas(model, grid, size, settings))
    for batch_size, band in ((1, None), (7, 2), (64, 100), (3, 1)):
        other = replace(settings, batch_size=batch_size, band=band)
        assert np.array_equal(whole(denoise_canvas(model, grid, size, other)), expected)
    assert not np.array_equal(whole(denoise_canvas(model, grid, size, replace(settings, seed=4))), expected)


def test_noise_of_a_place_does_not_know_the_height() -> None:
    noise = KeyedNoise(5)
    assert torch.equal(noise.start(range(10), (3, 1, 20))[4:6], noise.start([4, 5], (3, 1, 20)))


def test_an_image_of_any_size(tmp_path: Path) -> None:
    model = Painter()
    for size in ((32, 32), (33, 51), (70, 40)):
        grid = grid_of(*grid_shape(model, size))
        image = synthesize(model, grid, size, FEW)
        assert image.shape == (*size, 3)
        assert image.dtype == np.uint8
    # the same pixels whether they are kept in memory or in files
    run = Run(tmp_path / "run", {})
    assert np.array_equal(whole(paint(model, grid, size, FEW, run)), image)


def test_strips_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    grid, size = grid_of(2, 5), (40, 150)
    expected = synthesize(Painter(), grid, size, FEW)
    monkeypatch.setattr("diffrep.synthesis.large.STRIP", 0)
    monkeypatch.setattr("diffrep.synthesis.large.WINDOWS", 1)
    assert np.array_equal(synthesize(Painter(), grid, size, FEW), expected)


def test_an_interrupted_run_ends_as_it_would_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut after any number of calls, again and again."""
    monkeypatch.setattr("diffrep.synthesis.large.STRIP", 0)
    monkeypatch.setattr("diffrep.synthesis.large.WINDOWS", 1)
    grid, size = grid_of(2, 3), (60, 85)
    for scheduler in ("dpmpp_2m_sde", "pndm", "rho-rk", "unipc-hb"):
        settings = replace(FEW, scheduler=scheduler, batch_size=4)
        expected = whole(paint(Painter(), grid, size, settings, Run(None, {})))
        for cut in (1, 3, 17):
            interruptions = 0
            while True:
                run = Run(tmp_path / f"{scheduler}-{cut}", {"a": 1}, seconds=0)
                try:
                    found = whole(paint(Painter(calls_left=cut), grid, size, settings, run))
                    break
                except KeyboardInterrupt:
                    interruptions += 1
                    run.close()
                if cut == 1:  # not a single band can be finished: go on without interruption
                    cut = 10**9
            assert interruptions >= 1
            assert np.array_equal(found, expected)
            run.close(delete=True)
            assert not (tmp_path / f"{scheduler}-{cut}").exists()


KILLED = """
import sys, time
from pathlib import Path
import torch
sys.path.insert(0, {root!r})
from tests.synthetic_painter import Painter
from tests.test_synthesis_sampling import FEW, grid_of
from diffrep.synthesis.large import synthesize_file
class Slow(Painter):
    def __call__(self, *arguments):
        time.sleep(0.02)
        return super().__call__(*arguments)
print("ready", flush=True)
synthesize_file(Slow(), grid_of(3, 4), Path({path!r}), (90, 117), FEW)
"""


@pytest.mark.slow
def test_a_killed_process_goes_on(tmp_path: Path) -> None:
    root, path = str(Path(__file__).resolve().parent.parent), tmp_path / "a.png"
    expected = synthesize(Painter(), grid_of(3, 4), (90, 117), FEW)  # type: ignore[arg-type]
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED.format(root=root, path=str(path))], stdout=subprocess.PIPE, cwd=root
    )
    assert process.stdout is not None
    process.stdout.readline()
    progress = tmp_path / ".a.png.run" / "progress.json"
    while not progress.exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert progress.exists()
    assert not path.exists()
    synthesize_file(Painter(), grid_of(3, 4), path, (90, 117), FEW)  # type: ignore[arg-type]
    assert np.array_equal(np.asarray(Image.open(path)), expected)
    assert not progress.parent.exists()


def test_a_folder_is_taken_up_for_the_same_run_only(tmp_path: Path) -> None:
    grid, path = grid_of(2, 2), tmp_path / "a.png"
    with pytest.raises(KeyboardInterrupt):
        synthesize_file(Painter(calls_left=3), grid, path, settings=FEW)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unfinished run with another grid, settings"):
        synthesize_file(Painter(dim=7), grid_of(2, 2, 7), path, settings=replace(FEW, steps=5))  # type: ignore[arg-type]
    synthesize_file(Painter(), grid, path, settings=FEW)  # type: ignore[arg-type]
    assert np.array_equal(np.asarray(Image.open(path)), synthesize(Painter(), grid, settings=FEW))


def test_a_full_disk_leaves_nothing_behind_but_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid, path, write = grid_of(2, 2), tmp_path / "a.png", os.pwrite
    room = [40_000]

    def limited(file: int, buffer: bytes, place: int) -> int:
        room[0] -= len(buffer)
        if room[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, buffer, place)

    monkeypatch.setattr(os, "pwrite", limited)
    with pytest.raises(OSError, match="the disk is full; nothing is lost"):
        synthesize_file(Painter(), grid, path, settings=FEW)  # type: ignore[arg-type]
    assert [p.name for p in tmp_path.iterdir()] == [".a.png.run"]
    room[0] = 10**9
    synthesize_file(Painter(), grid, path, settings=FEW)  # type: ignore[arg-type]
    assert np.array_equal(np.asarray(Image.open(path)), synthesize(Painter(), grid, settings=FEW))
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_too_little_room_is_said_before_any_work(tmp_path: Path) -> None:
    size = (3_200_000, 3_200_000)
    grid = EmbeddingGrid(torch.ones(1, 1, 6).expand(*grid_shape(Painter(), size), 6)[:, :1].clone())
    with pytest.raises(GridError, match="100000 x 100000 embeddings"):
        synthesize_file(Painter(), grid, tmp_path / "a.tiff", size, FEW)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_bad_arguments_are_refused() -> None:
    model = Painter()
    with pytest.raises(GridError, match=r"needs 3 x 2 embeddings, one for each 32 pixels, the grid has 2 x 2"):
        synthesize(model, grid_of(2, 2), (80, 64), FEW)
    with pytest.raises(ValueError, match="at least 32 x 32 pixels, not 31 x 40"):
        synthesize(model, grid_of(1, 2), (31, 40), FEW)
    with pytest.raises(ValueError, match="stride must be in"):
        synthesize(model, grid_of(2, 2), (64, 64), replace(FEW, stride=9))
    with pytest.raises(ValueError, match="sampler unipc has no option eta"):
        synthesize(model, grid_of(2, 2), (64, 64), replace(FEW, eta=1.0))
    with pytest.raises(ValueError, match="no sampler 'magic'; known are euler"):
        synthesize(model, grid_of(2, 2), (64, 64), replace(FEW, scheduler="magic"))
    for bad in ({"steps": 0}, {"batch_size": 0}, {"eta": 2.0}, {"guidance": float("nan")}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))} must be"):
            SynthesisSettings(**bad)
    noise = GivenNoise.of_canvas(torch.zeros(3, 8, 8), torch.zeros(4, 3, 8, 8))
    theirs: Any = EulerAncestralDiscreteScheduler(timestep_spacing="trailing")
    theirs.set_timesteps(4)
    with pytest.raises(ValueError, match="draws its own noise"):
        denoise_canvas(model, grid_of(1, 1), (8, 8), FEW, scheduler=theirs, noise=noise)


def test_grids_are_checked() -> None:
    with pytest.raises(GridError, match=r"\(rows, columns, dim\), got \(4, 6\)"):
        EmbeddingGrid(torch.ones(4, 6))
    values = torch.ones(2, 3, 4)
    values[1, 2] = 0
    with pytest.raises(GridError, match=r"cell \(1, 2\) has length 0"):
        EmbeddingGrid(values)
    values[0, 1, 3] = float("nan")
    with pytest.raises(GridError, match=r"cell \(0, 1\) has NaN"):
        EmbeddingGrid(values)


def test_cells_that_a_window_touches_agree_as_their_embeddings_do() -> None:
    values = torch.tensor([[[3.0, 0.0], [1.0, 1.0]], [[0.0, 2.0], [-1.0, 0.0]]])
    offsets = torch.tensor([[0, 0], [0, 3], [5, 0], [8, 4], [4, 4], [0, 8], [8, 12]])
    expected = torch.tensor([1, 0.5**0.5, 0, 0, -1, 1, 1])  # beyond the border the last cell goes on
    torch.testing.assert_close(EmbeddingGrid(values).agreement(offsets, 8), expected)


def test_grid_between_cells() -> None:
    grid = grid_of(3, 4)
    corners = torch.tensor([[8 * r, 8 * c] for r in range(3) for c in range(4)])
    torch.testing.assert_close(grid.at(corners, 8), grid.embeddings.flatten(0, 1))
    # the same place in other units; a stretched grid keeps its cells' centres
    torch.testing.assert_close(grid.at(torch.tensor([[5, 9]]), 8), grid.at(torch.tensor([[50, 90]]), 80))
    assert grid.resized((3, 4)).checksum() == grid.checksum()
    assert grid.resized((9, 12)).shape == (9, 12)
    torch.testing.assert_close(grid.resized((9, 12)).embeddings[1::3, 1::3], grid.embeddings, rtol=1e-4, atol=1e-4)


def test_patches_have_any_size_and_are_those_of_their_own_noise() -> None:
    model, embeddings = Painter(), torch.randn(2, 6, generator=torch.Generator().manual_seed(2))
    patches = sample_patches(model, embeddings, FEW, size=(12, 20))
    assert patches.shape == (2, 3, 12, 20)
    assert torch.equal(sample_patches(model, embeddings[:1], FEW, size=(12, 20)), patches[:1])
    assert sample_patches(model, embeddings, FEW).shape == (2, 3, 8, 8)
    with pytest.raises(ValueError, match="size must be positive, got 0 x 20"):
        sample_patches(model, embeddings, FEW, size=(0, 20))


def test_the_width_of_the_decoding_weights_is_that_of_the_settings() -> None:
    latents = Lines((16, 3, 16), "float32")
    latents.write(0, np.random.default_rng(0).normal(size=(16, 3, 16)).astype(np.float32))

    def image(**settings: float) -> np.ndarray:
        how = SynthesisSettings(decode_weights="official", decode_stride=4, **settings)  # type: ignore[arg-type]
        return np.concatenate([rows for _, _, rows in decode_lines(Painter(), latents, how)])

    assert np.array_equal(image(), image(decode_sigma=0.8))
    wide = SynthesisSettings(decode_weights="official", decode_stride=4, decode_sigma=1e6)
    plan, sums, totals = WindowPlan((64, 64), 32, 16), np.zeros((64, 3, 64)), np.zeros((64, 1, 64))
    for i in plan.rows:  # a Gaussian without an end is the plain mean
        for j in plan.columns:
            window = latents.tensor(i // 4, i // 4 + 8)[:, :, j // 4 : j // 4 + 8].movedim(1, 0)
            sums[i : i + 32, :, j : j + 32] += Painter().decode(window[None])[0].movedim(0, 1).numpy()
            totals[i : i + 32, :, j : j + 32] += 1
    decoded = np.concatenate([rows for _, _, rows in decode_lines(Painter(), latents, wide)])
    np.testing.assert_allclose(decoded, sums / totals, atol=1e-5)
    assert np.abs(image(decode_sigma=0.3) - image()).max() > 1e-3
    for value in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="decode_sigma must be finite and above 0"):
            image(decode_sigma=value)


def test_a_run_whose_solver_carried_less_is_not_taken_up(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", {"a": 1})
    run.lines("0-canvas", (4, 4)).write(0, np.ones((4, 4), np.float32))
    run.checkpoint(Position("denoise", 1, 0), None, force=True)
    run.close()
    again = Run(tmp_path / "run", {"a": 1})
    assert again.written("0-canvas", (4, 4)).read(0, 4).all()
    with pytest.raises(ValueError, match=r"run: the unfinished run carries no 0-kept-x: delete the folder"):
        again.written("0-kept-x", (4, 4))
    again.close()
    with pytest.raises(ValueError, match=r"its 0-canvas has 64 bytes, not 80"):
        Run(tmp_path / "run", {"a": 1}).lines("0-canvas", (5, 4))
    (tmp_path / "run" / "0-canvas.raw").write_bytes(b"")
    with pytest.raises(ValueError, match=r"progress\.json: is damaged \(0-canvas\.raw has 0 bytes, not 64\)"):
        Run(tmp_path / "run", {"a": 1})


def test_a_run_folder_of_somebody_else_is_refused_and_nothing_outside_it_is_touched(tmp_path: Path) -> None:
    outside = tmp_path / "precious.raw"
    outside.write_bytes(b"precious")
    folder = tmp_path / "run"
    Run(folder, {"a": 1})
    (folder / "0-canvas.raw").symlink_to(outside)
    with pytest.raises(ValueError, match=r"0-canvas\.raw: is a link"):
        Run(folder, {"a": 1}).lines("0-canvas", (4, 4))
    assert outside.read_bytes() == b"precious"
    good = {"stage": "denoise", "step": 1, "row": 0, "carry": None, "arrays": {}}
    damages: list[dict[str, object]] = [
        {"carry": "../precious.raw"},
        {"carry": "carry-1.npy"},
        {"row": -1},
        {"step": []},
        {"arrays": {"0-gone": 64}},
        {"arrays": ["0-canvas"]},
    ]
    for damage in [*damages, {"stage": "x"}]:
        (folder / "progress.json").write_text(json.dumps(good | damage))
        with pytest.raises(ValueError, match=r"progress\.json: is damaged"):
            Run(folder, {"a": 1})
    for text in ("[" * 100_000, "null", "{"):
        (folder / "run.json").write_text(text)
        with pytest.raises(ValueError, match=r"run\.json: "):
            Run(folder, {"a": 1})
