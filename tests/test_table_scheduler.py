"""`TableScheduler` in diffusers' own pipelines: every sampler paints, or says in one line why it cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffrep import TableScheduler
from diffrep.sampling.samplers import SAMPLERS
from diffrep.sampling.schedules import SamplingError

from . import layouts

OPTIONS: dict[str, dict[str, Any]] = {"rho-rk": {"method": "2heun"}}
CALL: dict[str, Any] = {"prompt": "a cat", "num_inference_steps": 6, "output_type": "np"}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Any:
    import diffusers

    folder = layouts.build("sd1.5", tmp_path_factory.mktemp("sd"))
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def refused(name: str, config: Any) -> bool:
    """Whether a sampler says in one line that it cannot work with a model."""
    try:
        TableScheduler.from_config(config, sampler=name)
    except SamplingError as error:
        message = str(error)
    else:
        return False
    assert "\n" not in message
    assert name in message
    return True


@pytest.mark.parametrize("name", SAMPLERS)
def test_stable_diffusion_paints_with_every_sampler(name: str, pipeline: Any) -> None:
    import diffusers

    config = pipeline.scheduler.config
    if refused(name, config):
        assert not SAMPLERS[name].table
        return
    assert SAMPLERS[name].table
    scheduler = TableScheduler.from_config(config, sampler=name, **OPTIONS.get(name, {}))
    parts = {**pipeline.components, "scheduler": scheduler}
    painted = diffusers.StableDiffusionPipeline(**parts)
    again = diffusers.StableDiffusionImg2ImgPipeline(**parts)
    for pipe in (painted, again):
        pipe.set_progress_bar_config(disable=True)
    images = [painted(height=64, width=64, generator=generator(), **CALL).images for _ in range(2)]
    assert images[0].shape == (1, 64, 64, 3)
    assert np.isfinite(images[0]).all()
    np.testing.assert_array_equal(*images)
    later = again(image=images[0], strength=0.5, generator=generator(), **CALL).images
    assert scheduler.table.grid.labels[0] == scheduler.timesteps[3 * scheduler.order]
    assert np.isfinite(later).all()


@pytest.mark.parametrize("name", SAMPLERS)
def test_flux_paints_with_the_samplers_of_flows(name: str, flux: Any) -> None:
    if refused(name, flux.scheduler.config):
        assert not SAMPLERS[name].flow
        return
    assert SAMPLERS[name].flow
    flux.scheduler = TableScheduler.from_config(flux.scheduler.config, sampler=name)
    images = flux(height=32, width=32, generator=generator(), max_sequence_length=12, **CALL).images
    assert np.isfinite(images).all()


@pytest.fixture
def flux(tmp_path_factory: pytest.TempPathFactory) -> Any:
    import diffusers

    folder = tmp_path_factory.getbasetemp() / "flux"
    if not folder.is_dir():
        layouts.build("flux.1-dev", folder)
    pipe = diffusers.FluxPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_euler_in_flux_is_the_pipelines_own(flux: Any) -> None:
    call = {**CALL, "height": 32, "width": 32, "max_sequence_length": 12}
    theirs = flux(generator=generator(), **call).images
    flux.scheduler = TableScheduler.from_config(flux.scheduler.config, sampler="euler")
    np.testing.assert_allclose(flux(generator=generator(), **call).images, theirs, atol=2e-4)


def test_a_pipeline_is_saved_and_loaded_with_it(pipeline: Any, tmp_path: Path) -> None:
    import diffusers

    scheduler = TableScheduler.from_config(pipeline.scheduler.config, sampler="ghvb", order=2.5, spacing="leading")
    pipe = diffusers.StableDiffusionPipeline(**{**pipeline.components, "scheduler": scheduler})
    pipe.save_pretrained(tmp_path)
    loaded = TableScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    assert (loaded.sampler, loaded.options, loaded.spacing) == ("ghvb", {"order": 2.5}, "leading")
    given = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path, scheduler=loaded)
    assert given.scheduler is loaded
    other = TableScheduler.from_config(loaded.config, sampler="unipc")
    assert (other.sampler, other.options) == ("unipc", {})


def test_half_precision_is_stepped_in_float32() -> None:
    config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    x, states = torch.randn(1, 4, 4, 4, generator=generator()).half(), []
    for dtype in (torch.float16, torch.float32):
        scheduler, state = TableScheduler.from_config(config), x.to(dtype)
        scheduler.set_timesteps(5)
        for t in scheduler.timesteps:
            state = scheduler.step(0.5 * state, t, state).prev_sample
            assert state.dtype == dtype
        states.append(state.float())
    torch.testing.assert_close(*states, atol=2e-2, rtol=2e-2)


def test_what_does_not_follow_the_timesteps_is_one_line() -> None:
    scheduler = TableScheduler.from_config({"beta_schedule": "linear"}, sampler="rho-rk")
    scheduler.set_timesteps(3)
    x = torch.zeros(1, 1, 2, 2)
    for match, call in (
        ("timestep 12 is not among", lambda: scheduler.step(x, 12, x)),
        ("2 calls a step; it cannot begin at 1", lambda: scheduler.set_begin_index(1)),
        ("sigmas are of flows", lambda: scheduler.set_timesteps(sigmas=[1.0, 0.5])),
    ):
        with pytest.raises(SamplingError, match=match):
            call()
    for t in scheduler.timesteps:
        x = scheduler.step(x, t, x).prev_sample
    with pytest.raises(SamplingError, match="call set_timesteps again"):
        scheduler.step(x, t, x)


def test_a_configuration_that_does_not_say_its_class_is_read_by_what_it_holds() -> None:
    import diffusers

    for name in ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler"):
        config = getattr(diffusers, name)(shift=3.0).config  # made, not loaded: without `_class_name`
        scheduler = TableScheduler.from_config(config, sampler="euler")
        assert scheduler.prediction == "flow_prediction"
        scheduler.set_timesteps(2)
        assert scheduler.timesteps.tolist() == [1000, 750]
    config = diffusers.DDIMScheduler(beta_schedule="scaled_linear").config
    assert TableScheduler.from_config(config).prediction == "epsilon"
    for name in ("EDMEulerScheduler", "CMStochasticIterativeScheduler", "ScoreSdeVeScheduler"):
        with pytest.raises(SamplingError, match="in sigmas"):
            TableScheduler.from_config(getattr(diffusers, name)().config)
    for options in ({"shift_terminal": 0.1}, {"time_shift_type": "linear"}):
        with pytest.raises(SamplingError, match="are shifted exponentially here"):
            TableScheduler.from_config(diffusers.FlowMatchEulerDiscreteScheduler(**options).config)
