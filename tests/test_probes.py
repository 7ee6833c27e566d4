"""Probes from images to predictions: cache, grid, heads, sweep, saving, the command line."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from diffrep.backbones import Backbone, load_backbone
from diffrep.cli import main
from diffrep.commands.probe import score_lines
from diffrep.eval.probes import compare_probes, rows_of
from diffrep.features import ExtractConfig
from diffrep.heads.probes import (
    Cell,
    DataError,
    GridSettings,
    HeldRows,
    MappedRows,
    ProbeData,
    ProbeFit,
    ProbeRecipe,
    ReadPlan,
    SideBySide,
    block_taps,
    draw_heat_map,
    fit_grid,
    load_probe,
    load_sweep,
    parse_cells,
    read_labelled,
    readings_of,
    score,
    sweep,
    train_probe,
)
from diffrep.heads.probes import grid as rows_module
from diffrep.heads.probes.layouts import KINDS
from diffrep.images import Sizing

from .probe_images import COLOURS, damage_of_every_kind, image_folder, refusal

SMALL = ExtractConfig(sizing=Sizing("squash", 32), batch_size=4)
QUICK = ProbeFit(
    grid=GridSettings(learning_rates=(1.0, 10.0), weight_decays=(0.0,), epochs=15, batch_size=16),
    inverse_penalties=(0.1, 1.0),
    learning_rates=(4e-3,),
    recipe=ProbeRecipe(epochs=4, optimiser="adamw"),
    batch_size=8,
    ks=(3, 5),
)


@pytest.fixture(scope="module")
def unet(sd_folder: Path) -> Backbone:
    return load_backbone(str(sd_folder))


@pytest.fixture(scope="module")
def vit(vit_folder: Path) -> Backbone:
    return load_backbone(str(vit_folder))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_folder(tmp_path_factory.mktemp("colours"), 10)


@pytest.fixture(scope="module")
def found(folder: Path, unet: Backbone, vit: Backbone, tmp_path_factory: pytest.TempPathFactory) -> ProbeData:
    """Colours, read at two taps, two timesteps and two pools of a U-Net, and by a ViT."""
    readings = [
        ReadPlan(unet.name, ("conv_in", "up.1"), (10, 200), (1, 2), SMALL),
        ReadPlan(vit.name, ("layer.1",), None, (1, 2), SMALL),
    ]
    backbones = {unet.name: unet, vit.name: vit}
    cache = tmp_path_factory.mktemp("cache")
    return ProbeData.read(read_labelled(folder), backbones, readings, cache, progress=False)


# -- features ---------------------------------------------------------------------------------------------------


def test_cached_features_are_those_of_extraction(found: ProbeData, unet: Backbone, folder: Path) -> None:
    from diffrep.features import extract

    files = [folder / image.name for image in found.data.images[:3]]
    config = replace(SMALL, taps=("up.1",), timestep=200)
    maps = extract(unet, files, config).maps["up.1"]
    for pool in (1, 2):
        expected = torch.nn.functional.adaptive_avg_pool2d(maps, pool).flatten(1)
        got = found.rows([Cell(unet.name, 200, "up.1", pool)]).read([0, 1, 2])
        assert torch.allclose(got, expected, atol=2e-3 * float(expected.abs().max()))


def test_reading_goes_on_where_it_was_killed_and_reads_nothing_twice(
    folder: Path, unet: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffrep.heads.probes import cells as cache

    monkeypatch.setattr(cache, "SHARD_IMAGES", 8)
    data = read_labelled(folder)
    reading = ReadPlan(unet.name, ("mid",), (10, 200), (1,), SMALL)
    whole = cache.read_features(data.images, unet, reading, tmp_path / "whole", progress=False)
    real, calls = cache.read_cells, []

    def counted(*arguments: object) -> object:
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(1)
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(cache, "read_cells", counted)
    with pytest.raises(KeyboardInterrupt):
        cache.read_features(data.images, unet, reading, tmp_path / "killed", progress=False)
    calls.clear()
    monkeypatch.setattr(cache, "read_cells", lambda *a: (calls.append(1), real(*a))[1])
    again = cache.read_features(data.images, unet, reading, tmp_path / "killed", progress=False)
    assert len(calls) == 2  # of four shards
    for cell in reading.resolve(unet).cells():
        assert torch.equal(again.rows(cell).read(range(30)), whole.rows(cell).read(range(30)))
    calls.clear()
    cache.read_features(data.images, unet, reading, tmp_path / "killed", progress=False)
    assert not calls
    other = cache.read_features(data.images, unet, replace(reading, pools=(2,)), tmp_path / "killed", progress=False)
    assert other.folder != again.folder
    calls.clear()
    narrow = replace(reading, timesteps=(200,))
    part = cache.read_features(data.images, unet, narrow, tmp_path / "killed", progress=False)
    assert not calls  # what a wider reading has is not read again
    (cell,) = part.reading.cells()
    assert torch.equal(part.rows(cell).read([3]), whole.rows(cell).read([3]))


def test_what_is_kept_is_known_by_the_images_contents(vit: Backbone, tmp_path: Path) -> None:
    """Other images of the same names, sizes and times of change are read again, whatever holds them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    reading = ReadPlan(vit.name, ("layer.1",), None, (1,), SMALL)

    def first(source: Path, cache: Path) -> torch.Tensor:
        found = ProbeData.read(read_labelled(source), {vit.name: vit}, [reading], cache, progress=False)
        return found.rows([Cell(vit.name, 0, "layer.1", 1)]).read([0])

    def write(place: Path, level: int) -> None:
        noise = np.random.default_rng(0).integers(0, 9, (12, 8, 8, 3))
        images = [Image.fromarray((level + 5 * n + noise[n]).astype(np.uint8)) for n in range(12)]
        folder, table = place / "folder", []
        for number, image in enumerate(images):
            file = folder / ("even", "odd")[number % 2] / f"{number:02d}.bmp"
            file.parent.mkdir(parents=True, exist_ok=True)
            image.save(file)
            table.append({"image": {"bytes": file.read_bytes(), "path": None}, "label": str(number % 2)})
            os.utime(file, (1e9, 1e9))
        pq.write_table(pa.Table.from_pylist(table), place / "set.parquet")
        with tarfile.open(place / "set.tar", "w") as archive:
            for number, file in enumerate(sorted(folder.rglob("*.bmp"))):
                archive.add(file, f"{number}.bmp")
                label = tarfile.TarInfo(f"{number}.cls")
                label.size = 1
                archive.addfile(label, io.BytesIO(str(number % 2).encode()))
        os.utime(place / "set.tar", (1e9, 1e9))

    for source in ("folder", "set.parquet", "set.tar"):
        write(tmp_path / "one", 10)
        write(tmp_path / "two", 100)
        before = first(tmp_path / "one" / source, tmp_path / "cache")
        assert not torch.equal(first(tmp_path / "two" / source, tmp_path / "cache"), before), source
        write(tmp_path / "one", 200)  # in place
        again = first(tmp_path / "one" / source, tmp_path / "cache")
        assert torch.equal(again, first(tmp_path / "one" / source, tmp_path / "fresh")), source
        assert not torch.equal(again, before), source


def test_large_files_are_known_by_time_and_both_ends(tmp_path: Path) -> None:
    from diffrep.heads.probes.labelled import SAMPLED, image_file, images_sha256

    def known_by(content: bytes, time: float = 1e9) -> str:
        (tmp_path / "a.bin").write_bytes(content)
        os.utime(tmp_path / "a.bin", (time, time))
        return images_sha256([image_file(tmp_path / "a.bin", tmp_path)])

    zeros = bytes(10 * SAMPLED)
    assert known_by(zeros) == known_by(zeros)
    others = [known_by(zeros, 2e9), known_by(b"1" + zeros[1:]), known_by(zeros[1:] + b"1"), known_by(zeros + b"0")]
    assert known_by(zeros) not in others


def test_padding_is_not_pooled(unet: Backbone, tmp_path: Path) -> None:
    """A wide image that is padded to a square gives the features of its own part of the map."""
    from diffrep.heads.probes.cells import group_canvases, read_cells
    from diffrep.images import fit_image, stack_pixels

    wide = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 64, 3), dtype=np.uint8))
    (group,) = group_canvases([(0, *fit_image(wide, Sizing("pad", 64)))])
    reading = ReadPlan(unet.name, ("conv_in",), (10,), (1, 2), replace(SMALL, sizing=Sizing("pad", 64))).resolve(unet)
    ((_, vectors),) = read_cells(unet, [group], 1, reading, (10,))
    maps = unet.maps(stack_pixels(group[0].unbind()), ["conv_in"], reading.extract.conditions())["conv_in"]
    content = maps[:, :, 2:6]  # the middle half of eight rows
    assert torch.allclose(vectors[Cell(unet.name, 10, "conv_in", 1)], content.mean((2, 3)), atol=1e-6)
    expected = torch.nn.functional.adaptive_avg_pool2d(content, 2).flatten(1)
    assert torch.allclose(vectors[Cell(unet.name, 10, "conv_in", 2)], expected, atol=1e-6)


def test_corrupt_images_are_left_out_and_reported(folder: Path, vit: Backbone, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(folder, tmp_path / "broken"))
    (broken / "red" / "03.png").write_bytes(b"no image")
    (broken / "blue" / "05.png").write_bytes((broken / "blue" / "05.png").read_bytes()[:60])
    reading = ReadPlan(vit.name, ("layer.1",), None, (1,), SMALL)
    found = ProbeData.read(read_labelled(broken), {vit.name: vit}, [reading], tmp_path / "cache", progress=False)
    assert [line.split(":")[0] for line in found.unreadable()] == ["blue/05.png", "red/03.png"]
    kept = {*found.split.train, *found.split.val, *found.split.test}
    names = {image.name for row, image in enumerate(found.data.images) if row not in kept}
    assert names == {"red/03.png", "blue/05.png"}
    assert train_probe(found, found.layout("linear", [Cell(vit.name, 0, "layer.1", 1)]), QUICK).test.n <= 6
    for file in broken.rglob("*.png"):
        file.write_bytes(b"no image")
    with pytest.raises(DataError, match="none of the 30 images can be read"):
        ProbeData.read(read_labelled(broken), {vit.name: vit}, [reading], tmp_path / "other", progress=False)


def test_cells_are_read_from_text(unet: Backbone, vit: Backbone) -> None:
    backbones = {"u": unet, "v": vit}
    cells = parse_cells(["u,mid,90,4", "v", "u,up.1"], backbones)
    assert cells[0] == Cell("u", 90, "mid", 4)
    assert cells[1] == Cell("v", vit.recommended.conditions.timestep, vit.recommended.taps[0], 1)
    assert [r.backbone for r in readings_of(cells, SMALL)] == ["u", "v"]
    with pytest.raises(ValueError, match="write BACKBONE"):
        parse_cells(["u,mid,high"], backbones)
    with pytest.raises(ValueError, match="a cell is named twice"):
        parse_cells(["u,mid,90", "u,mid,90,1"], backbones)
    with pytest.raises(ValueError, match="has no timesteps, got 10"):
        ReadPlan("v", None, (10,), (1,)).resolve(vit)
    assert block_taps(vit) == ("layer.0", "layer.1", "layer.2")
    blocks = block_taps(unet)
    assert (blocks[0], len(blocks)) == ("conv_in", 4 * 2 * 2 + 1)
    assert "mid" in blocks


# -- the grid ---------------------------------------------------------------------------------------------------


def clusters(rows: int = 600, width: int = 40, classes: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Overlapping clusters whose channels differ by orders of magnitude."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, classes, (rows,), generator=generator)
    centres = torch.randn(classes, width, generator=generator)
    noisy = 0.45 * centres[labels] + torch.randn(rows, width, generator=generator)
    return noisy * torch.logspace(-3, 3, width) + 5, labels


def test_the_grid_is_as_good_as_a_converged_solver() -> None:
    x, labels = clusters()
    train, val = np.arange(400), np.arange(400, 600)
    grid = fit_grid(HeldRows(x), labels, train, 5)
    best = float(grid.accuracies(HeldRows(x), labels, val).max())
    scaler = StandardScaler().fit(x[:400])
    solvers = [LogisticRegression(C=c, max_iter=1000).fit(scaler.transform(x[:400]), labels[:400]) for c in (0.01, 1)]
    reference = max(s.score(scaler.transform(x[400:]), labels[400:]) for s in solvers)
    assert best >= reference - 0.03
    assert best > 0.6
    weight, bias = grid.linear(3)
    folded = x[val] @ weight.T + bias
    assert torch.allclose(folded, grid.logits(HeldRows(x), val)[3], atol=1e-3)


def test_features_on_disk_train_the_same_heads_whatever_memory_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import save_file

    x, labels = clusters()
    for number, piece in enumerate(x.split(250)):
        save_file({"f": piece.contiguous()}, tmp_path / f"{number}.safetensors")
    mapped = MappedRows([rows_module.map_tensor(tmp_path / f"{n}.safetensors", "f") for n in range(3)])
    order = np.random.default_rng(0).permutation(600)
    assert torch.equal(mapped.read(order), x[torch.from_numpy(order)])
    both = SideBySide([mapped, mapped])
    assert both.width == 80
    assert torch.equal(both.read([3, 1]), torch.cat([x[[3, 1]], x[[3, 1]]], dim=1))
    one = GridSettings(learning_rates=(3.0,), weight_decays=(0.0,), epochs=3)
    held = fit_grid(HeldRows(x), labels, np.arange(500), 5, one)
    monkeypatch.setattr("diffrep.heads.probes.grid.HELD_BYTES", 0)
    streamed = fit_grid(mapped, labels, np.arange(500), 5, one)
    assert torch.allclose(streamed.weights, held.weights, atol=1e-5)
    monkeypatch.setattr(rows_module, "BLOCK_BYTES", 4 * 40 * 64)  # eight blocks: another order, as good
    blocks = fit_grid(mapped, labels, np.arange(500), 5, replace(one, epochs=20))
    whole = fit_grid(HeldRows(x), labels, np.arange(500), 5, replace(one, epochs=20))
    rest = np.arange(500, 600)
    gap = blocks.accuracies(mapped, labels, rest) - whole.accuracies(mapped, labels, rest)
    assert abs(float(gap)) <= 0.05


def test_balanced_training_raises_the_rare_class() -> None:
    x, labels = clusters(1200, classes=2)
    rare = (labels == 0).nonzero()[:, 0][20:]
    rows = np.setdiff1d(np.arange(1200), rare.numpy())
    setting = GridSettings(learning_rates=(3.0,), weight_decays=(1e-3,))
    recalls = []
    for balanced in (False, True):
        grid = fit_grid(HeldRows(x), labels, rows, 2, replace(setting, balanced=balanced))
        recalls.append(float((grid.logits(HeldRows(x), rare.numpy())[0].argmax(1) == 0).float().mean()))
    assert recalls[1] > recalls[0]


# -- heads and probes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_head_learns_saves_and_predicts_alone(
    kind: str, found: ProbeData, unet: Backbone, vit: Backbone, folder: Path, tmp_path: Path
) -> None:
    cells = [Cell(unet.name, 10, "conv_in", 2)]
    if kind in ("linear", "logistic", "mlp", "knn"):
        cells.append(Cell(vit.name, 0, "layer.1", 1))
    elif kind == "attention":  # DifFormer: two blocks at two timesteps
        cells = [Cell(unet.name, t, tap, 2) for t in (10, 200) for tap in ("conv_in", "up.1")]
    options = {"width": 16, "heads": 2, "depth": 1} if kind in ("cnn", "attention") else {}
    fit = replace(QUICK, recipe=ProbeRecipe(epochs=30, step=15, optimiser="adamw"))
    result = train_probe(found, found.layout(kind, cells, **options), fit)  # type: ignore[arg-type]
    assert result.test.top1 > 0.6  # chance is a third
    result.probe.save(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"probe.json", "probe.safetensors"}
    loaded = load_probe(tmp_path)
    files = [folder / found.data.images[row].name for row in found.split.test]
    given = {name: {unet.name: unet, vit.name: vit}[name] for name in loaded.features}
    prediction = loaded.predict(files, backbones=given, batch_size=4)
    scores = result.scores
    expected = scores / scores.sum(1, keepdim=True) if kind == "knn" else scores.softmax(1)
    # the cache rounds features to half precision
    assert torch.allclose(prediction.probabilities, expected, atol=0.02)
    assert set(prediction.labels()) <= set(COLOURS)
    assert loaded.about["test"]["top1"] == result.test.top1


def test_a_probe_is_refused_another_backbone_and_damaged_files(
    found: ProbeData, unet: Backbone, vit: Backbone, folder: Path, tmp_path: Path
) -> None:
    cell = Cell(vit.name, 0, "layer.1", 1)
    probe = train_probe(found, found.layout("linear", [cell]), QUICK).probe
    image = folder / "red" / "00.png"
    with pytest.raises(ValueError, match=r"the probe was trained on the features of .*; .* has other weights"):
        probe.predict([image], backbones={vit.name: unet})
    with pytest.raises(ValueError, match="predict needs at least one image"):
        probe.predict([], backbones={vit.name: vit})
    probe.save(tmp_path)
    (tmp_path / "probe.safetensors").write_bytes(b"\0" * 10)
    with pytest.raises(ValueError, match="the probe cannot be read"):
        load_probe(tmp_path)
    with pytest.raises(ValueError, match="holds no probe"):
        load_probe(tmp_path / "nowhere")
    probe.save(tmp_path)
    document = json.loads((tmp_path / "probe.json").read_text())
    (tmp_path / "probe.json").write_text(json.dumps({**document, "version": 1}))
    assert repr(load_probe(tmp_path)) == repr(probe)
    damage_of_every_kind(tmp_path / "probe.json", document, load_probe)
    for key in document["layout"]:
        layout = {**document["layout"], key: 10**12}
        (tmp_path / "probe.json").write_text(json.dumps({**document, "layout": layout}))
        refusal(load_probe, tmp_path)


def test_fused_probes_are_compared_with_their_parts(found: ProbeData, unet: Backbone, vit: Backbone) -> None:
    cells = [Cell(unet.name, 10, "conv_in", 1), Cell(vit.name, 0, "layer.1", 1)]
    report = compare_probes(found, rows_of(cells), fit=QUICK, benchmark="cub")
    fused = f"{unet.name} + {vit.name}"
    assert list(report.rows) == [unet.name, vit.name, fused]
    assert set(report.gains) == {(fused, unet.name), (fused, vit.name)}
    value, low, high = report.gains[fused, vit.name]
    assert low <= value <= high
    assert value == pytest.approx(report.rows[fused].test.top1 - report.rows[vit.name].test.top1)
    assert "63.84  SwAV linear" in report.table()
    assert json.loads(report.to_json())["rows"][fused]["selection"].startswith("hyperparameters chosen on val")


def test_scores() -> None:
    labels = torch.tensor([0, 0, 0, 1])
    given = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.4, 0.6]])
    found = score(given, labels, ("a", "b"))
    assert (found.top1, found.mean_per_class, found.top5) == (0.75, pytest.approx((2 / 3 + 1) / 2), 1.0)
    assert found.low <= 0.75 <= found.high
    (line,) = score_lines("abcdef", {"test": score(torch.cat([given, torch.zeros(4, 4)], 1), labels, "abcdef")})
    assert "top-5 100.0 %" in line  # of six classes, two of which have images


# -- sweeps -----------------------------------------------------------------------------------------------------


def test_a_sweep_goes_on_after_a_kill_and_touches_test_once(
    found: ProbeData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffrep.heads.probes import sweeps

    whole = sweep(found, tmp_path / "whole", fit=QUICK, progress=False)
    assert len(whole.cells) == 2 * 2 * 2 + 2
    assert whole.best == max(whole.cells, key=lambda s: s.val).cell
    alike = replace(whole, cells=tuple(replace(s, val=0.5) for s in whole.cells))
    shown = [line.split("  ")[-1].strip() for line in alike.summary().splitlines()[1:6]]
    assert shown == [str(s.cell) for s in whole.cells[:5]]
    real, scored = sweeps._score, []

    def killed(*arguments: object) -> object:
        if len(scored) == 4:
            raise KeyboardInterrupt
        scored.append(arguments[1])
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(sweeps, "_score", killed)
    with pytest.raises(KeyboardInterrupt):
        sweep(found, tmp_path / "killed", fit=QUICK, progress=False)
    with (tmp_path / "killed" / "cells.jsonl").open("a") as log:
        log.write('{"cell": {"backb')  # half a line
    before = list(scored)
    scored.clear()
    monkeypatch.setattr(sweeps, "_score", lambda *a: (scored.append(a[1]), real(*a))[1])
    again = sweep(found, tmp_path / "killed", fit=QUICK, progress=False)
    assert not set(before) & set(scored)
    assert len(scored) == len(whole.cells) - 4
    assert [(s.cell, s.val) for s in again.cells] == [(s.cell, s.val) for s in whole.cells]
    monkeypatch.setattr(sweeps, "train_probe", lambda *a, **k: pytest.fail("test was scored again"))
    third = sweep(found, tmp_path / "killed", fit=QUICK, progress=False)
    assert third.result["test"] == again.result["test"]
    assert load_sweep(tmp_path / "killed").best == whole.best
    files = sorted(p.relative_to(tmp_path / "whole") for p in (tmp_path / "whole").rglob("*") if p.is_file())
    different = [f for f in files if (tmp_path / "whole" / f).read_bytes() != (tmp_path / "killed" / f).read_bytes()]
    assert [str(f) for f in different] in ([], ["timing.json"])
    assert again.seconds is not None
    assert (tmp_path / "killed" / "cells.csv").read_text().count("\n") == len(whole.cells) + 1
    with pytest.raises(ValueError, match="holds a sweep with another kind"):
        sweep(found, tmp_path / "killed", kind="knn", fit=QUICK, progress=False)


def test_pruning_looks_closer_at_the_better_cells_only(found: ProbeData, tmp_path: Path) -> None:
    done = sweep(found, tmp_path, fit=QUICK, prune=0.5, progress=False)
    assert sum(s.pruned for s in done.cells) == len(done.cells) // 2
    assert not next(s for s in done.cells if s.cell == done.best).pruned
    picture = draw_heat_map(done.cells, title="colours")
    assert picture.width > 300
    assert len(picture.getcolors(2**24) or []) > 20
    with pytest.raises(ValueError, match="prune is a share"):
        sweep(found, tmp_path / "other", prune=1.0)


# -- the command line -------------------------------------------------------------------------------------------


def test_a_sweep_does_not_load_the_renderer() -> None:
    code = "import sys, diffrep.commands.probe; print([m for m in sys.modules if m.startswith('diffrep.scenes')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--fit.grid.learning-rates", "nan"], "learning_rates must be finite and above 0, got nan"),
        (["--fit.grid.learning-rates"], "learning_rates needs at least one value"),
        (["--fit.grid.weight-decays", "inf"], "weight_decays must be finite and at least 0, got inf"),
        (["--fit.grid.epochs", "0"], "epochs must be finite and above 0, got 0"),
        (["--fit.ks", "--head", "knn"], "ks needs at least one value"),
        (["--fit.recipe.learning-rate", "nan", "--head", "mlp"], "learning_rate must be finite and above 0, got nan"),
        (["--shape.temperature", "0", "--head", "knn"], "temperature must be finite and above 0, got 0"),
        (["--fit.ks", "3"], "--head linear takes no --fit.ks"),
        (["--fit.grid.epochs", "3", "--head", "knn"], "--head knn takes no --fit.grid.epochs"),
        (["--balanced", "--head", "knn"], "--head knn takes no --balanced"),
        (["--shape.depth", "3", "--head", "cnn"], "--head cnn takes no --shape.depth"),
        (["--fit.grid.seed", "3"], "--fit.grid.seed is --seed here"),
        (["--seed", "-1"], "seed must be in [0, 2^32), got -1"),
        (["--seed", "4294967296"], "seed must be in [0, 2^32)"),
        (["--split-seed", "-1"], "split_seed must be in [0, 2^32)"),
        (["--shares", "nan", "0.5", "0.5"], "shares must be a number, got (nan, 0.5, 0.5)"),
        (["--batch-size", "0"], "batch_size"),
        (["--size", "0"], "size"),
        (["--device", "nonsense"], "device must be auto, cpu"),
        (["--cells"], "at least one"),
        (["--head", "mlp", "--fit.learning-rates", "1e30"], "diverged"),
    ],
)
def test_what_means_nothing_is_refused_in_a_line(
    options: list[str],
    message: str,
    folder: Path,
    vit_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
) -> None:
    work = tmp_path_factory.getbasetemp() / "shared-work"  # read once for all of these
    out = tmp_path_factory.mktemp("refused") / "probe"
    where = ["--work", str(work), "-o", str(out), "--size", "32", "--cells", f"{vit_folder},layer.1"]
    assert main(["probe", "train", str(folder), *where, *options]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not out.exists()


@pytest.mark.parametrize("arguments", [["--backbones"], ["--timesteps"], ["--pool"], ["--taps"], ["--prune", "nan"]])
def test_a_sweep_without_anything_to_sweep_is_refused(
    arguments: list[str], folder: Path, vit_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--work", str(tmp_path / "work"), "-o", str(tmp_path / "sweep"), "--size", "32"]
    assert main(["probe", "sweep", str(folder), "--backbones", str(vit_folder), *where, *arguments]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not (tmp_path / "sweep").exists()


def test_commands_from_training_to_prediction(
    folder: Path, vit_folder: Path, sd_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--work", str(tmp_path / "work"), "--size", "32", "--fit.grid.epochs", "5"]
    probe = tmp_path / "probe"
    train = ["probe", "train", str(folder), "--cells", f"{vit_folder},layer.1", "-o", str(probe), *where]
    assert main(train) == 0
    out = capsys.readouterr().out
    assert "3 classes; smallest in train" in out
    assert "test  top-1" in out
    assert main(train) == 2
    assert "holds a probe already; name another folder, or say --overwrite" in capsys.readouterr().err
    table = tmp_path / "found.csv"
    assert main(["probe", "predict", str(probe), str(folder / "red"), "--top", "2", "-o", str(table)]) == 0
    assert len(table.read_text().splitlines()) == 1 + 2 * 10
    assert capsys.readouterr().out.splitlines()[-1] == f"wrote {table}"
    (tmp_path / "broken.png").write_bytes(b"no image")
    some = [str(tmp_path / "broken.png"), str(folder / "red")]
    assert main(["probe", "predict", str(probe), *some, "-o", str(table)]) == 2
    assert "1 of 11 images failed" in capsys.readouterr().err
    assert len(table.read_text().splitlines()) == 1 + 10
    assert main(["probe", "predict", str(probe), str(folder / "red"), "--formats", "npy"]) == 2
    assert "a probe of this kind takes no --formats" in capsys.readouterr().err
    assert main(["probe", "predict", str(probe), str(folder / "red"), "--backbone", str(sd_folder)]) == 2
    assert "has other weights" in capsys.readouterr().err
    swept = ["probe", "sweep", str(folder), "--backbones", str(vit_folder), "--pool", "1", "-o", str(tmp_path / "s")]
    assert main([*swept, *where, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert len(result["cells"]) == 3
    with Image.open(tmp_path / "s" / "heatmap.png") as picture:
        assert picture.width > 300
    assert main(["probe", "predict", str(tmp_path / "s" / "probe"), str(folder / "blue" / "00.png")]) == 0
    assert main(["eval", "probes", str(folder), "--cells", f"{vit_folder},layer.1", *where]) == 0
    assert main(["eval", "probes", "cub", "--cells", str(vit_folder)]) == 2
    assert "cub needs its folder: --root" in capsys.readouterr().err
