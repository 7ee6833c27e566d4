"""Checkers for the kinds of system `classification-probes` that are about training, k-NN, pixels and dense maps."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

from diffrep.backbones import Conditions
from diffrep.heads.probes import (
    DepthProbe,
    NearestNeighbours,
    NormalsProbe,
    PixelEnsemble,
    PooledHead,
    ProbeRecipe,
    numbered_taps,
    pixel_features,
    top_accuracy,
    train_recipe,
)
from diffrep.heads.probes.pixels import Resizing
from diffrep.images import center_crop, random_crop

from .cases import assert_near, assert_within, number_in, tensors_of
from .probes_heads import assert_all, heads_of, the_backbone, tolerance, under


def check_ddpm_seg_pixel_features(folder: Path, case: dict[str, Any]) -> None:
    given, expected = tensors_of(folder)
    backbone = the_backbone(folder, case)
    taps = [numbered_taps(backbone)[b].name for b in case["b_numbers"]]
    assert taps == [backbone.dift_tap(index) for index in case["blocks"]]
    maps = []
    for step in case["steps"]:
        noisy = backbone.noisy_pixels((given["image"] + 1) / 2, given["noise"], step)
        found = backbone.network_maps(noisy, taps, Conditions(timestep=step))
        maps += [found[tap] for tap in taps]
    size = (given["image"].shape[-2], given["image"].shape[-1])
    resizing = Resizing(upsampling=case["upsample_mode"], align_corners=bool(case["align_corners"]))
    features = pixel_features(maps, size, resizing)[0]
    chosen = features.flatten(1).T[expected["pixel_index"]]
    state = heads_of(folder, "pixel_classifiers")
    ensemble = PixelEnsemble.untrained(len(features), case["num_classes"], members=case["ensemble"])
    tracked = {key for key in ensemble.state_dict() if key.endswith("num_batches_tracked")}
    ensemble.load_state_dict(state | {key: torch.tensor(0) for key in tracked})
    result = ensemble.eval().segment(features)

    got = {"pixel_features": chosen, "logits": ensemble.logits(chosen).detach()}
    got["uncertainty"] = torch.tensor([result.uncertainty])
    got |= {f"activation_{i}.pool2x2": F.adaptive_avg_pool2d(m, 2) for i, m in enumerate(maps)}
    for name, value in got.items():
        assert_near(value, expected[name], relative=tolerance(case), what=name)
    agreement = (result.labels == expected["segmentation"]).float().mean()
    assert agreement >= number_in(case["tolerance"].split("at least")[1]) / 100
    assert set(expected) == {*got, "pixel_index", "segmentation"}


def check_knn(folder: Path, case: dict[str, Any]) -> None:
    given, expected = tensors_of(folder)
    classes, ks, truth = case["num_classes"], case["ks"], given["test_labels"]
    compared = set()
    for backend in ("faiss", "torch"):
        voters = NearestNeighbours(
            given["train_features"],
            given["train_labels"],
            classes,
            temperature=case["temperature"],
            backend=backend,
        )
        neighbours = voters.neighbours(given["test_features"], max(ks))
        shown = expected["neighbour_index"].shape[1]
        assert torch.equal(neighbours.indices[:, :shown], expected["neighbour_index"])
        similarity = neighbours.scores[:, :shown]
        assert_within(similarity, expected["neighbour_similarity"], atol=1e-5, what="neighbour_similarity")
        for i, (k, votes) in enumerate(voters.votes(given["test_features"], ks).items()):
            limit = number_in(case["tolerance"].replace("max |diff|", ""))
            assert_within(votes, expected[f"dinov2.proba.k{k}"], atol=limit, what=f"probabilities of k={k}")
            assert torch.equal(votes.argmax(1), expected[f"pred.k{k}"]), f"predictions of k={k}"
            first = 100 * top_accuracy(votes, truth, 1)
            assert abs(first - expected["dino.top1"][i]) < 1e-3
            fifth = 100 * top_accuracy(votes, truth, 5, voted_only=True)
            below = float(expected["dino.top5"][i]) - fifth
            assert abs(below) < 1e-3 if k >= 20 else -1e-3 < below <= 1
            assert abs(first - case["accuracy_percent"][str(k)]["top1"]) < 1e-3
            assert abs(float(expected["dino.top5"][i]) - case["accuracy_percent"][str(k)]["top5"]) < 1e-3
            compared |= {f"dinov2.proba.k{k}", f"pred.k{k}"}
    assert set(expected) == compared | {"neighbour_index", "neighbour_similarity", "dino.top1", "dino.top5"}


def check_preprocess(folder: Path, case: dict[str, Any]) -> None:
    given, expected = tensors_of(folder)
    size = case["image_size"]
    assert [[given[f"image_{i}"].shape[1], given[f"image_{i}"].shape[0]] for i in range(len(given))] == case["sizes_wh"]
    for name, value in expected.items():
        kind, _, rest = name.partition("_")
        number, _, detail = rest.partition(".")
        image = Image.fromarray(given[f"image_{number}"].numpy())
        if kind == "random":
            crop = random_crop(image, size, Random(int(detail.removeprefix("seed"))))
        else:
            crop = center_crop(image, size)
        got, levels = torch.from_numpy(np.array(crop)), float(Image.__version__ != case["pillow"])
        if detail == "tensor":
            pixels = got.permute(2, 0, 1).float() / 127.5 - 1
            assert_within(pixels, value, atol=levels / 127.5 + 1e-6, what=name)
        else:
            assert_within(got, value, atol=levels, what=name)


def check_train_recipe(folder: Path, case: dict[str, Any]) -> None:
    given, weights, got = load_file(folder / "inputs.safetensors"), heads_of(folder, "initial_heads"), {}
    features, targets = given["features"], given["targets"]
    for name, variant in case["variants"].items():
        state = under(name, weights)
        classes = len(state[max(state)])  # of the last layer
        head = PooledHead(features.shape[2], classes, pool=variant["pool"], hidden=variant["hidden"])
        head.load_state_dict(state)
        others = {key: variant[key] for key in ("momentum", "weight_decay", "gamma", "step") if key in variant}
        recipe = ProbeRecipe(learning_rate=variant["lr"], epochs=variant["epochs"], **others)
        losses = train_recipe(head, lambda epoch: zip(features, targets, strict=True), recipe)
        got |= {f"{name}.final.{key}": value for key, value in head.state_dict().items()}
        got[f"{name}.losses"] = torch.tensor(losses)
        ends = torch.tensor([variant["first_loss"], variant["last_loss"]])
        assert_near(torch.tensor([losses[0], losses[-1]]), ends, relative=tolerance(case), what=f"{name} losses")
    assert_all(load_file(folder / "expected.safetensors"), got, case)


def check_probe3d_heads(folder: Path, case: dict[str, Any]) -> None:
    given, weights, got = load_file(folder / "inputs.safetensors"), heads_of(folder), {}
    maps = [given[f"feature_{i}"] for i in range(len(given))]
    for name, variant in case["variants"].items():
        several = isinstance(variant["feat_dim"], list)
        channels = variant["feat_dim"] if several else [variant["feat_dim"]]
        layout = {"reader": variant["head_type"], "hidden": variant["hidden_dim"], "kernel": variant["kernel_size"]}
        probe: DepthProbe | NormalsProbe
        if variant["class"] == "DepthHead":
            predicts = {"bindepth": "bins", "sigdepth": "sigmoid"}[variant["prediction_type"]]
            limits = (variant["min_depth"], variant["max_depth"])
            probe = DepthProbe(channels, predicts=predicts, limits=limits, **layout)  # type: ignore[arg-type]
        else:
            assert variant["class"] == "SurfaceNormalHead"
            probe = NormalsProbe(channels, uncertainty=variant["uncertainty_aware"], **layout)
        probe.load_state_dict(under(name, weights))
        got[f"{name}.out"] = probe(maps[: len(channels)]).detach()
    assert_all(load_file(folder / "expected.safetensors"), got, case)
