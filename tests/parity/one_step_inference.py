"""Checkers of system `one-step-depth-normals` for inference: pipelines and ensembles."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffrep.heads.dense import ENSEMBLES, PredictConfig
from diffrep.heads.families import Task, task_vector
from diffrep.heads.loading import load_head
from diffrep.heads.tiling import (
    DIFFUSERS_ENSEMBLE,
    E2E_ENSEMBLE,
    MARIGOLD_ENSEMBLE,
    DepthEnsemble,
    ensemble_depth,
    ensemble_normals,
    pad_to_multiple,
    to_image_size,
    to_working,
)

from .cases import assert_within, each, tensors_of

PRESETS = {"marigold": MARIGOLD_ENSEMBLE, "diffusers": DIFFUSERS_ENSEMBLE, "e2e": E2E_ENSEMBLE}


def published_or_official(
    got: tuple[Tensor, Tensor],
    expected: tuple[Tensor, Tensor],
    solved: tuple[Tensor, Tensor],
    members: Tensor,
    preset: DepthEnsemble,
    *,
    atol: float,
    what: str,
) -> None:
    """A depth ensemble is the published one within `atol`; Marigold's may be the official solver's on this machine.

    Marigold's solver takes differences of a float32 objective over steps of 1.5e-8: its path is made of the rounding of
    a sum, which changes from one build of torch to the next (the official function itself then misses the stored
    numbers; noise of 1e-7 on the members moves them by 0.03, at a correlation of 0.999). E2E-FT's solver works in
    float32 and takes wider steps, and scales without shifts come out to 1e-6: there is no such excuse for them.

    Args:
        got, expected: depth and uncertainty as they were published.
        solved: ours before they were resized, to compare with what the official solver makes of `members`.
    """
    from diffusers import MarigoldDepthPipeline

    pairs = [(a.nan_to_num(-1), b.reshape(a.shape).nan_to_num(-1)) for a, b in zip(got, expected, strict=True)]
    differences = [float((a - b).abs().max()) for a, b in pairs]  # the standard deviation of one member is NaN
    if max(differences) <= atol:
        return
    excused = preset.precision == "float64" and preset.shift
    assert excused, f"{what}: differs from the published ensemble by {max(differences):.2e}"
    official = MarigoldDepthPipeline.ensemble_depth(
        members[:, None],
        shift_invariant=preset.shift,
        output_uncertainty=True,
        reduction=preset.reduction,
        regularizer_strength=preset.regularizer,
        max_iter=preset.iterations,
        tol=preset.tolerance,
        max_res=preset.fit_size,
    )
    for a, b in zip(solved, official, strict=True):
        assert_within(a, b.reshape(a.shape), atol=1e-5, what=f"{what}, against the official solver")
    correlation = torch.corrcoef(torch.stack([got[0].flatten(), expected[0].flatten()]))[0, 1]
    assert correlation > 0.99, f"{what}: correlation {correlation:.6f} with the published ensemble"


def check_ensembles(folder: Path, case: dict[str, Any]) -> None:
    given, expected = tensors_of(folder)
    checked = 0
    for run in each(case["runs"], describing=("noise", "note", "defaults")):
        members, index = given[f"{run['index']}.pred"], run["index"]
        assert (len(members), *members.shape[-2:]) == (run["E"], run["h"], run["w"])
        if run["kind"] == "normals":
            results = {name: ensemble_normals(members, name) for name in ("closest", "mean")}  # type: ignore[arg-type]
            for name, (result, uncertainty) in results.items():
                atol = case["tolerance"]["normals"]["atol"]
                for key, got in ((name, result), (f"{name}.uncertainty", uncertainty)):
                    assert_within(got, expected[f"{index}.{key}"].reshape(got.shape), atol=atol, what=f"{index}.{key}")
                    checked += 1
            continue
        for code, reduction in itertools.product(PRESETS, ("median", "mean")):
            key = f"{index}.{code}.{reduction}"
            if key not in expected:
                continue
            preset = dataclasses.replace(PRESETS[code], reduction=reduction)  # type: ignore[arg-type]
            if code != "e2e":  # E2E-FT's function has no scale-only form, and was called without max_res
                preset = dataclasses.replace(preset, shift=run.get("shift", True))
                preset = dataclasses.replace(preset, fit_size=run.get("max_res", preset.fit_size))
            stored = expected[key], expected[f"{key}.uncertainty"]
            atol = case["tolerance"]["depth"]["atol"]
            found = ensemble_depth(members[:, 0], preset)
            published_or_official(found, stored, found, members[:, 0], preset, atol=atol, what=key)
            checked += 2
    assert checked == len(expected)


def check_lotus_pipeline(folder: Path, case: dict[str, Any]) -> None:
    given, expected = tensors_of(folder)
    head = load_head(folder / "model", task="normals")
    depth = load_head(folder / "model", task="depth")
    model, family, tolerance = head.model, head.family, case["tolerance"]
    assert family.name in ("lotus-g", "lotus-d")
    described = ("output_std", "decoded_fraction_outside_-1_1")
    for run in each(case["runs"], describing=described):
        i = run["index"]
        assert run["output_type"] in ("np", "pt"), "the stored outputs are arrays or tensors"
        pixels, noise, eps = given[f"{i}.image_uint8"], given.get(f"{i}.noise"), given[f"{i}.posterior_eps"]
        assert (len(pixels), *pixels.shape[-2:]) == (run["n"], run["h"], run["w"])
        switch = task_vector(run["task"])
        assert_within(torch.tensor([switch]), given[f"{i}.task_emb"][:1], atol=1e-6, what="task vector")
        assert_within(model.network.context, expected[f"{i}.context"][:1], atol=1e-5, what="context")
        canvas = to_working(pixels, family, run["processing_res"], run["resample_method"])
        latents = model.encode(canvas, eps)
        assert list(latents.shape[-2:]) == run["latent_hw"]
        assert_within(model.unet_input(latents, noise), expected[f"{i}.unet_input"], atol=1e-5, what="unet input")

        def near(got: Tensor, name: str, i: int = i) -> None:
            official = expected[f"{i}.{name}"]
            torch.testing.assert_close(
                got, official, atol=tolerance["atol"], rtol=tolerance["rtol"], msg=lambda m: f"{i}.{name}: {m}"
            )

        annotation = model.predict(latents, noise, timestep=run["timestep"], switch=switch)
        near(annotation, "x0_latent")
        decoded = model.decode(annotation)
        assert list(decoded.shape[-2:]) == run["decoded_hw"]
        if f"{i}.decoded" in expected:
            near(decoded, "decoded")
        size = tuple(run["output_hw"])
        image = to_image_size(head.read(decoded, unit=False), size, family)
        near(image / 2 + 0.5, "image")
        near(to_image_size(depth.read(decoded), size, family)[:, 0], "depth")
        assert size == (tuple(pixels.shape[-2:]) if run["match_input_res"] else tuple(run["decoded_hw"]))
        if run["task"] == [1, 0] and run["match_input_res"]:
            config = PredictConfig(
                size=run["processing_res"], resample=run["resample_method"], timestep=run["timestep"], official=True
            )
            for row in range(run["n"]):  # one image after the other gives what the batch gave
                draws = {
                    "noise": None if noise is None else noise[row : row + 1],
                    "posterior_noise": eps[row : row + 1],
                }
                image = pixels[row].permute(1, 2, 0).numpy()
                near_row = expected[f"{i}.depth"][row]
                got = depth.predict(image, config, **draws)
                torch.testing.assert_close(got.values, near_row, atol=tolerance["atol"], rtol=tolerance["rtol"])
                normals = head.predict(image, config, **draws).values
                official = expected[f"{i}.image"][row] * 2 - 1
                torch.testing.assert_close(normals, official, atol=2 * tolerance["atol"], rtol=tolerance["rtol"])


CODES = {"E2E": "e2e-ft", "prs-eth": "marigold", "diffusers": "marigold-diffusers"}


def check_marigold_e2e(folder: Path, case: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        _check_marigold_e2e(folder, case, Path(scratch))


def _check_marigold_e2e(folder: Path, case: dict[str, Any], scratch: Path) -> None:
    given, expected = tensors_of(folder)
    for run in each(case["runs"], describing=("output_std",)):
        i = run["index"]
        assert given[f"{i}.image_uint8"].shape[-2:] == (run["h"], run["w"])
        assert list(expected[f"{i}.output"].shape) == run["output_shape"]
        family = "e2e-ft" if "e2e-ft" in run["code"] else CODES[run["code"].split("/")[0].split()[0]]
        source = folder / "model"
        if family == "e2e-ft":  # these runs were made with the schedule of Stable Diffusion 2, see `model`
            source = scratch / "plain-schedule"
            if not source.exists():
                shutil.copytree(folder / "model", source)
                file = source / "scheduler" / "scheduler_config.json"
                file.write_text(json.dumps(json.loads(file.read_text()) | {"rescale_betas_zero_snr": False}))
        tasks: dict[str, Task] = {"depth": "depth", "normal": "normals"}
        task = tasks[run["task"]]
        head = load_head(source, task=task, family=family)
        model, noise, pixels = head.model, given[f"{i}.noise"], given[f"{i}.image_uint8"]
        assert len(noise) == run["ensemble_size"]
        config = PredictConfig(
            size=run["processing_res"],
            resample=run["resample_method"],
            steps=run["denoising_steps"],
            ensemble=run["ensemble_size"],
            official=True,
        )
        if family == "e2e-ft":
            assert "noise='zeros'" in run["code"], f"E2E-FT starts from zeros, not as in {run['code']!r}"
            assert not noise.any()
            (timestep,) = run["timesteps"]
            config = dataclasses.replace(config, timestep=timestep)
        elif model.schedule.stated == "leading":
            config = dataclasses.replace(config, spacing="leading")
        else:
            assert model.schedule.stated == "trailing", f"spacing {model.schedule.stated!r} is not described"
        assert config.timestep or model.schedule.timesteps(config.steps, config.spacing) == run["timesteps"]
        start = None if family == "e2e-ft" else noise

        canvas = to_working(pixels, head.family, run["processing_res"], run["resample_method"])
        latents = model.encode(pad_to_multiple(canvas, model.stride) if head.family.pad else canvas)
        atol = case["tolerance"]["latents"]["atol"]
        assert_within(latents, expected[f"{i}.rgb_latent"], atol=atol, what=f"{i}.rgb_latent")
        members = latents.expand(len(noise), -1, -1, -1)
        predicted = model.predict(members, start, steps=config.steps, timestep=config.timestep, spacing=config.spacing)
        assert_within(predicted, expected[f"{i}.pred_latent"], atol=atol, what=f"{i}.pred_latent")

        official, spread = expected[f"{i}.output"], expected.get(f"{i}.uncertainty")
        if task == "depth":  # diffusers lets bicubic resizing overshoot the range that a map has with us
            official = official.clamp(0, 1)
        alone = dataclasses.replace(config, ensemble=1)
        single = torch.cat(
            [head.maps(pixels, alone, noise=None if start is None else one)[0] for one in noise.split(1)]
        )
        if start is None and config.ensemble > 1:  # without noise its members are equal, which `predict` refuses
            maps, uncertainty = head.combine(single[None], config)
            size = pixels.shape[-2], pixels.shape[-1]
            result = head.wrap(to_image_size(maps, size, head.family, config.resample)[0], config)
        else:
            maps, uncertainty = head.maps(pixels, config, noise=start)
            result = head.predict(pixels[0].permute(1, 2, 0).numpy(), config, noise=start)
        values, atol, before = result.values.reshape(official.shape), case["tolerance"]["output"]["atol"], uncertainty
        if spread is not None and spread.shape[-2:] == values.shape[-2:]:  # diffusers gives it at the image's size
            uncertainty = uncertainty if result.uncertainty is None else result.uncertainty
        if task == "depth" and config.ensemble > 1:
            assert before is not None
            assert uncertainty is not None
            assert spread is not None
            preset = dataclasses.replace(ENSEMBLES.get(family, MARIGOLD_ENSEMBLE), shift=head.family.shift_invariant)
            atol = case["tolerance"]["output"]["depth ensembles"]["atol"]
            got, solved = (values, uncertainty), (maps[0, 0], before[0, 0])
            published_or_official(got, (official, spread), solved, single[:, 0], preset, atol=atol, what=f"{i}.output")
            continue
        if config.ensemble == 2 and single.shape[-2:] == official.shape[-2:]:  # equally near to their mean: by rounding
            values = torch.where(((single[0] - official).abs() <= atol).all(0), single[0], single[1])
        assert_within(values, official, atol=atol, what=f"{i}.output")
        if spread is not None:
            assert uncertainty is not None
            assert_within(uncertainty.reshape(spread.shape), spread, atol=atol, what=f"{i}.uncertainty")
