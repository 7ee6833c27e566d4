"""Kind `ldm_unet`: embedder, U-Net and autoencoder, as loaded and as converted from the authors' checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffrep.backbones.base import Reader, reading
from diffrep.synthesis import SynthesisModel, load_synthesis

from .cases import assert_within, number_in


def model_of(folder: Path, case: dict[str, Any]) -> SynthesisModel:
    """The model that a case names, beside it or in it."""
    place = folder / "model" if (folder / "model").is_dir() else folder / case["model_dir"]
    return load_synthesis(place)


def embeddings_of(inputs: dict[str, Tensor]) -> list[Tensor]:
    """The embeddings of a case in the order of the model's tokens."""
    return [inputs[k] for k in ("patch_embedding", "region_embedding") if k in inputs]


def tolerances_of(case: dict[str, Any]) -> dict[str, float]:
    """name -> tolerance, of texts such as {"eps*, mid*": "atol 3e-5", "code_indices": "equal"}."""
    texts = {names: text for names, text in case["tolerance"].items() if text != "equal"}
    return {name.strip("* "): number_in(text) for names, text in texts.items() for name in names.split(",")}


def check_ldm_unet(folder: Path, case: dict[str, Any], given: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    model = model_of(folder, case)
    allowed = tolerances_of(case)
    check_network(model, given, expected, allowed)
    check_autoencoder(model, given, expected, allowed)


@torch.no_grad()
def check_network(
    model: SynthesisModel,
    given: dict[str, Tensor],
    expected: dict[str, Tensor],
    allowed: dict[str, float],
    *,
    weights: str = "",
) -> None:
    """Contexts and all predictions; `weights` "raw_" picks those of the weights that are no moving average."""
    embeddings = embeddings_of(given)
    contexts = {"": model.context(*embeddings), "null_": model.null_context(len(embeddings[0]))}
    assert_within(contexts[""], expected["context"], atol=allowed["context"], what="context")
    assert_within(contexts["null_"], expected["null_context"], atol=allowed["context"], what="null context")
    if "context_region_zero" in expected:
        contexts["region_zero_"] = model.context(embeddings[0])
        assert_within(
            contexts["region_zero_"], expected["context_region_zero"], atol=allowed["context"], what="region zero"
        )
    compared = 0
    for size in (k.removeprefix("latent_") for k in given if k.startswith("latent_")):
        for name, context in contexts.items():
            key = f"{name}{weights}{size}"
            if f"eps_{key}" not in expected:
                continue
            if (middle := f"mid_{key}") in expected:
                reader = Reader(model.unet.mid_block)
                with reading({"mid": reader}) as found:
                    model(given[f"latent_{size}"], given["timesteps"], context)
                assert_within(found["mid"], expected[middle], atol=allowed["mid"], what=middle)
            predicted = model(given[f"latent_{size}"], given["timesteps"], context)
            assert_within(predicted, expected[f"eps_{key}"], atol=allowed["eps"], what=f"eps_{key}")
            compared += 1
    assert compared == len([k for k in expected if k.startswith("eps_") and ("_raw_" in k) == bool(weights)])


@torch.no_grad()
def check_autoencoder(
    model: SynthesisModel, given: dict[str, Tensor], expected: dict[str, Tensor], allowed: dict[str, float]
) -> None:
    """Our images lie in [0, 1], the official ones in [-1, 1]."""
    encoded = model.encode((given["image"] + 1) / 2)
    assert_within(encoded, expected["encoded"], atol=allowed["encoded"], what="encoded")
    for key, quantize in (("decoded", True), ("decoded_not_quantized", False)):
        decoded = model.decode(expected["encoded"], quantize=quantize) * 2 - 1
        assert_within(decoded, expected[key], atol=allowed["decoded"], what=key)
    codes = model.code_indices(expected["encoded"])
    assert torch.equal(codes, expected["code_indices"].to(codes)), "code indices"
