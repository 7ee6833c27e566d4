"""Cases of composition, completion and SaRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from torch import Tensor

from diffrep.guidance.composition import Prompts, cycle, superpose
from diffrep.guidance.inversion import leading_grid
from diffrep.heads.completion import complete_by_diffusion
from diffrep.sampling.schedules import TableVP, TimeGrid
from diffrep.training.sara import SaRA

from .cases import each, tensors_of
from .guidance_networks import SD, load_unet, load_vae, run_tensors, stable_diffusion_schedule
from .sampling_mixture import assert_like

SCALE = 0.18215


def check_superdiff(folder: Path, case: dict[str, Any]) -> None:
    inputs, expected = tensors_of(folder)
    unet = load_unet(folder, case)
    for k, run in enumerate(each(case["runs"])):
        given, wanted = run_tensors(inputs, k), run_tensors(expected, k)
        scheduler: Any = EulerDiscreteScheduler(
            beta_schedule="scaled_linear", timestep_spacing=run["timestep_spacing"],
            steps_offset=run.get("steps_offset", 1), **SD,
        )  # fmt: skip
        scheduler.set_timesteps(run["steps"])
        assert_like(scheduler.sigmas, wanted["sigmas"], atol=1e-5, rtol=1e-5, what="sigmas")
        assert_like(scheduler.timesteps, wanted["timesteps"], atol=1e-3, what="timesteps")
        networks = [lambda x, t, c=given[name]: unet(x, t, c) for name in ("a", "b", "uncond")]
        options = {
            ours: run[theirs]
            for ours, theirs, methods in (
                ("temperature", "T", ("or",)),
                ("bias", "logp", ("or",)),
                ("lift", "lift", ("and", "and_ode")),
            )
            if run.get(theirs) is not None and run["method"] in methods  # the released loop reads them there alone
        }
        x, record = superpose(
            *networks, given["start"] * float(scheduler.init_noise_sigma), scheduler.sigmas.tolist(),
            scheduler.timesteps.tolist(), given["probe" if run["method"] == "and_ode" else "noise"],
            method=run["method"], guidance=run["guidance"], official=True, **options,
        )  # fmt: skip
        std = float(wanted["latents"].std())
        assert_like(x, wanted["latents"], atol=2e-3 * std, rtol=2e-4, what=f"run {k}: latents")
        kappas, densities = torch.stack(record[0]).flatten(1), torch.stack(record[1], dim=1).flatten(2)
        # sums of squares that cancel: of their size, not of the result's
        assert_like(
            densities,
            wanted["log_density"],
            atol=1e-3 * float(wanted["log_density"].std()),
            rtol=1e-3,
            what=f"run {k}: densities",
        )
        if "kappa" in wanted:
            assert_like(kappas, wanted["kappa"], atol=1e-3, rtol=1e-3, what=f"run {k}: kappa")


def check_cow(folder: Path, case: dict[str, Any]) -> None:
    inputs, expected = tensors_of(folder)
    unet = load_unet(folder, case)
    for k, run in enumerate(each(case["runs"])):
        given, wanted = run_tensors(inputs, k), run_tensors(expected, k)
        assert list(given["seed_latent"].shape[-2:]) == list(run["seed_size"])
        names = ("empty", "prompt", "negative", "suppress", "diverse")
        prompts = Prompts(*(lambda x, t, c=given[name]: unet(x, t, c) for name in names))
        noise = iter(given["noise"])
        row, column = run["offset"]
        cycles = cycle(
            prompts, given["seed_latent"], given["background_latent"], given["seed_mask"], (row, column),
            leading_grid(stable_diffusion_schedule(), run["steps"], offset=1), lambda n=noise: next(n),
            cycles=run["cycles"],
        )  # fmt: skip
        got = {
            "seed_back_to_replace": torch.cat(cycles.upper),
            "seed_replace_to_clean": torch.cat(cycles.lower),
            "background_inverted": cycles.inverted,
            "after_cycle": torch.cat(cycles.after_cycle),
            "result": cycles.result,
        }
        for name in ("seed_back_to_replace", "seed_replace_to_clean", "background_inverted", "after_cycle", "result"):
            value = wanted[name]
            assert_like(got[name], value, atol=1e-3 * float(value.std()), rtol=1e-3, what=f"run {k}: {name}")
        assert next(noise, None) is None


def check_completion(folder: Path, case: dict[str, Any]) -> None:
    inputs, expected = tensors_of(folder)
    unet, vae = load_unet(folder, case), load_vae(folder, case)
    for k, run in enumerate(each(case["runs"])):
        given, wanted = run_tensors(inputs, k), run_tensors(expected, k)
        height, width = run["size"]
        assert int((given["sparse"] > 0).sum()) == run["points"]
        image = given["image_uint8"][None].float() / 255 * 2 - 1
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        canvas = F.pad(image, (0, -width % factor, 0, -height % factor), mode="replicate")
        latent = vae.encode(canvas).latent_dist.mean * SCALE
        assert_like(latent, wanted["image_latent"], atol=1e-5, what="image latent")
        scheduler: Any = DDIMScheduler(
            beta_schedule="scaled_linear", prediction_type="v_prediction", set_alpha_to_one=False,
            rescale_betas_zero_snr=run["zero_snr"], timestep_spacing="trailing", **SD,
        )  # fmt: skip
        scheduler.set_timesteps(run["steps"])
        times = scheduler.timesteps.tolist()
        assert times == wanted["timesteps"].tolist()
        grid = TimeGrid.of(TableVP(scheduler.alphas_cumprod.double().numpy()), [*times, -1])
        # diffusers' DDIM goes on from t - 1000 // N, which is not always the next timestep
        ends = [float(scheduler.alphas_cumprod[max(int(t) - 1000 // run["steps"], 0)]) for t in times]

        def read(depth: Tensor, height: int = height, width: int = width) -> Tensor:
            decoded = vae.decode(depth / SCALE).sample.mean(1)[0, :height, :width]
            return (decoded.clamp(-1, 1) + 1) / 2

        depth = complete_by_diffusion(
            lambda x, t, i=latent, c=given["context"]: unet(torch.cat([i, x], 1), t, c), read, given["sparse"],
            given["noise"], grid, lands=[(a**0.5, (1 - a) ** 0.5) for a in ends],
        )  # fmt: skip
        assert_like(depth, wanted["depth"], atol=5e-3, rtol=5e-3, what=f"run {k}")


def check_sara(folder: Path, case: dict[str, Any]) -> None:
    inputs, expected = tensors_of(folder)
    p = case["parameters"]
    assert p["network"].startswith("b(relu(a(x)))")
    width, outputs = p["width"], len(inputs["weight.b.bias"])
    network = torch.nn.ModuleDict({"a": torch.nn.Linear(width, width), "b": torch.nn.Linear(width, outputs)})
    network.load_state_dict({n.removeprefix("weight."): v for n, v in inputs.items() if n.startswith("weight.")})
    optimiser = SaRA(
        network.parameters(), p["threshold"], lr=p.get("lr"), betas=tuple(p["betas"]), eps=p["eps"],
        weight_decay=p["weight_decay"], reselect=p["progressive_iter"], lambda_rank=p["lambda_rank"], official=True,
    )  # fmt: skip

    def compare(prefix: str) -> None:
        for name, value in network.state_dict().items():
            if (key := f"{prefix}.{name}") in expected:
                assert_like(value, expected[key], atol=1e-6, rtol=1e-4, what=key)

    compare("start")
    losses = []
    for i in range(p["steps"]):
        optimiser.zero_grad()
        out = network["b"](torch.relu(network["a"](inputs["x"][i])))
        loss = (out - inputs["target"][i]).square().mean()
        loss.backward()
        losses.append(float(loss.detach()))
        optimiser.step()
        compare(f"step{i}")
    assert_like(torch.tensor(losses), expected["losses"], atol=1e-6, rtol=1e-4, what="losses")
