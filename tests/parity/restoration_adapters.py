"""Checkers of system `restoration-and-few-step`: PiSA-SR, S3Diff and its estimator, loaded from files as published."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from diffrep.heads.loading import load_head
from diffrep.heads.restoration.adapters import DegradationEstimator, block_of
from diffrep.heads.restoration.restorer import RestoreConfig

from .cases import each, tensors_of
from .diffdis_unet import part, tolerances
from .restoration_processes import compare


def nested(flat: Mapping[str, Tensor]) -> dict[str, Any]:
    """The published pickle of a case's tensors ``a/b``."""
    stored: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, last = key.replace("state_embeddings.", "state_embeddings/").split("/")
        place = stored
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value.float()
    return stored


@torch.no_grad()
def check_degradation_estimator(folder: Path, case: dict[str, Any]) -> None:
    inputs, expected = tensors_of(folder)
    (count,) = map(int, re.findall(r"^num_degradation (\d+), sigmoid;", case["parameters"]))
    for run in each(case["runs"]):
        i = run["index"]
        network = DegradationEstimator(run["num_feats"], run["num_blocks"], run["downscales"], count)
        network.load_state_dict({k: v.float() for k, v in part(inputs, f"{i}.net.").items()})
        image = inputs[f"{i}.image"]
        got = {"score": network(image), "feature_of_first": network.pooled(image, 0)}
        compare(got, expected, case["tolerance"], f"{i}.")
    assert not expected


@torch.no_grad()
def check_pisa_sr(folder: Path, case: dict[str, Any]) -> None:
    from diffusers import AutoencoderKL, UNet2DConditionModel

    inputs, expected = tensors_of(folder)
    parameters = case["parameters"]
    assert parameters["lora_alpha"].startswith("8 ")
    parameters["unet"].read_all()
    stored = nested(part(inputs, "ckpt."))
    ranks = {key: parameters[key] for key in ("lora_rank_unet_pix", "lora_rank_unet_sem")}
    modules = {key: list(value) for key, value in parameters["modules"].items()}
    # both adapt the same layers unless the case says otherwise
    modules = {key.replace("_pix", "_sem"): value for key, value in modules.items()} | modules
    with tempfile.TemporaryDirectory() as text:
        base = Path(text)
        unet = UNet2DConditionModel(**parameters["unet"])
        unet.load_state_dict({k: v.float() for k, v in part(inputs, "unet.").items()})
        unet.save_pretrained(base / "unet")
        AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4).save_pretrained(base / "vae")
        (base / "scheduler").mkdir()
        (base / "scheduler" / "scheduler_config.json").write_text('{"beta_schedule": "scaled_linear"}')
        save_file({"context": inputs["context"][:1].clone()}, base / "context.safetensors")
        torch.save(stored | ranks | modules, base / "pisa_sr.pkl")
        heads = {
            adjustable: load_head(base / "pisa_sr.pkl", base=base, adjustable=adjustable, device="cpu", fold=False)
            for adjustable in (False, True)
        }
    latent = inputs["latent"].double()
    for run in each(case["runs"]):
        # a small ill-conditioned network: in double precision nothing is added to the rounding of the published numbers
        model = heads[not run["default"]].model.double()
        model.family = replace(model.family, timestep=parameters["timestep"])
        for network in filter(None, (model.network, model.pixel_network)):
            network.context = inputs["context"].double()  # of each row its own
        clean = model.clean(latent, RestoreConfig(pixel=run["lambda_pix"], semantic=run["lambda_sem"]))
        compare({"x0": clean, "residual": latent - clean}, expected, case["tolerance"], f"{run['index']}.")
    assert not expected


@torch.no_grad()
def check_s3diff(folder: Path, case: dict[str, Any]) -> None:
    inputs, expected = tensors_of(folder)
    p = case["parameters"]
    stored = nested(part(inputs, "ckpt."))
    ranks = {"rank_unet": p["lora_rank_unet"], "rank_vae": p["lora_rank_vae"]}
    targets = {f"{n}_lora_target_modules": p[f"{n}_lora_target_modules"] for n in ("unet", "vae")}
    assert p["lora_alpha"].startswith("8 ")
    assert p["num_embeddings"].startswith(f"{len(stored['w'])} ")
    assert stored["state_embeddings"]["state_dict_vae_block"]["weight"].shape[1] == p["block_embedding_dim"]
    assert all(
        re.fullmatch(targets["vae_lora_target_modules"], key.split(".lora_")[0]) for key in stored["state_dict_vae"]
    )
    layers = {k.split(".lora_")[0] for k in stored["state_dict_unet"] if ".lora_" in k}
    assert all(
        any(layer == end or layer.endswith(f".{end}") for end in targets["unet_lora_target_modules"])
        for layer in layers
    )
    with tempfile.TemporaryDirectory() as text:
        place = Path(text)
        shutil.copytree(folder / "model", place / "base")
        save_file({"context": inputs["0.context"][:1].clone()}, place / "base" / "context.safetensors")
        stored["w"] = torch.nn.Parameter(stored["w"])
        torch.save(stored | ranks | targets, place / "s3diff.pkl")
        torch.save(DegradationEstimator().state_dict(), place / "de_net.pth")
        head = load_head(place / "s3diff.pkl", base=place / "base", device="cpu")
    model = head.model
    model.family = replace(model.family, timestep=p["timestep"])
    assert model.estimator is not None
    for run in each(case["runs"]):
        i = run["index"]
        image, context = inputs[f"{i}.image"], inputs[f"{i}.context"]
        assert (len(image), *image.shape[-2:]) == (run["B"], run["h"], run["w"])
        encoder = [f"encoder.{layer}" for layer in ("down_blocks.0", "down_blocks.3", "mid_block", "conv_in")]
        shown = ("down_blocks.0", "mid_block", "up_blocks.3", "conv_out")
        pixels, rows = image.float() / 255, []
        for row in range(len(image)):
            model.modulate(inputs[f"{i}.score"][row : row + 1])
            model.network.context = context[row : row + 1]
            latent = model.encode(pixels[row : row + 1], inputs[f"{i}.posterior_eps"][row : row + 1])
            unet, vae = (modulation.current for modulation in model.modulations)
            clean = model.clean(latent, RestoreConfig(guidance=1.0))
            rows.append({
                "latent": latent,
                "unet_output": model.network(latent, p["timestep"]),
                "image": model.decode(clean).clamp(-1, 1),
                "vae_mod": vae[:, [*map(block_of, encoder)]],
                "unet_mod": unet[:, [*map(block_of, shown)]],
            })  # fmt: skip
        for name in rows[0]:
            limits = {key: case["tolerance"][key] for key in ("atol", "rtol")}
            tolerance = tolerances(case["tolerance"]["mod"]) if name.endswith("mod") else limits
            compare({f"{i}.{name}": torch.cat([row[name] for row in rows])}, expected, tolerance)
    assert not expected
