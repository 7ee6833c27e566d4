"""Heads: what the parity cases do not say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diffrep.backbones import Backbone, Conditions, load_backbone
from diffrep.features import ExtractConfig
from diffrep.heads.probes import (
    AttentionFusion,
    DepthProbe,
    DifFeed,
    NearestNeighbours,
    PixelSettings,
    ProbeRecipe,
    Resizing,
    TokenReadout,
    feedback_layer,
    fit_pixels,
    load_feedback_probe,
    load_pixel_probe,
    numbered_taps,
    pixel_features,
    read_labelled,
    readout_string,
    split_rows,
    top_accuracy,
)
from diffrep.heads.probes.annotated import IGNORED
from diffrep.heads.probes.feedback import FeedbackSettings, train_feedback
from diffrep.heads.probes.pixels import train_pixel_probe
from diffrep.images import Sizing

from .probe_images import image_folder


@pytest.fixture(scope="module")
def unet(sd_folder: Path) -> Backbone:
    return load_backbone(str(sd_folder))


def test_published_sizes() -> None:
    """The papers' heads have as many parameters as they say: 13.6 M with one block, 27.8 M for the fused one."""
    words = "Use_CLS_Token:True:1024,Pool:2:2,Reshape,Insert_CLS_Token,Attention:1024:8:4:{n},Extract_CLS_Token"
    with torch.device("meta"):
        for blocks, millions in ((1, 13.6), (5, 64.0)):
            head = TokenReadout(words.format(n=blocks) + ",Dense:1024:1000:identity")
            assert sum(p.numel() for p in head.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)
        fused = AttentionFusion({"block.24": 1024}, {"block.24": 16}, 1000, readout=readout_string(1024, 8))
        assert sum(p.numel() for p in fused.parameters()) / 1e6 == pytest.approx(27.8, abs=0.05)
        blocks = {"block.19": 1024, "block.24": 1024, "block.30": 512}
        sizes = {"block.19": 8, "block.24": 16, "block.30": 64}
        difformer = AttentionFusion(blocks, sizes, 1000, readout=readout_string(1024, 8), timesteps=3)
        assert sum(p.numel() for p in difformer.parameters()) / 1e6 == pytest.approx(31.8, abs=0.05)


def test_layer_strings_are_checked() -> None:
    with pytest.raises(ValueError, match="cannot read 'Atention:8:2:4:1' in a layer string"):
        TokenReadout("Use_CLS_Token:True:8,Atention:8:2:4:1")
    with pytest.raises(ValueError, match="starts with Use_CLS_Token:True:WIDTH"):
        TokenReadout("Insert_CLS_Token")
    with pytest.raises(ValueError, match="width 9 cannot be split into 2 heads"):
        TokenReadout("Use_CLS_Token:True:9,Attention:9:2:4:1")
    with pytest.raises(ValueError, match="made for 1 timesteps, got 2"):
        AttentionFusion({"mid": 4}, {"mid": 2}, 3, readout=readout_string(8, 2))([{}, {}])
    with pytest.raises(ValueError, match="no letter 'X'"):
        feedback_layer(4, 4, "C_X")
    kinds = [type(layer).__name__ for layer in feedback_layer(8, 64, "C_GSC")]
    assert kinds == ["Conv2d", "GroupNorm", "SiLU", "Conv2d"]


def test_feedback_without_weights_changes_nothing(unet: Backbone) -> None:
    """Layers that give zero leave the second pass as the first, and the network as it was."""
    taps = numbered_taps(unet)  # type: ignore[arg-type]
    last = taps[len(taps)]
    head = AttentionFusion({last.name: last.channels}, {last.name: 8}, 3, readout=readout_string(8, 2))
    model = DifFeed(unet, head).eval()  # type: ignore[arg-type]
    assert model.blocks == (11, 14)  # 17 blocks, of which 9 is the middle
    noisy = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    conditions = Conditions(timestep=150)
    first = model.first_pass(unet, noisy, conditions)  # type: ignore[arg-type]
    plain = unet.network_maps(noisy, [last.name], conditions)[last.name]  # type: ignore[attr-defined]
    fed = model.second_pass(unet, noisy, conditions, first)[last.name]  # type: ignore[arg-type]
    assert not torch.allclose(fed, plain)
    for layer in model.feedback:
        torch.nn.init.zeros_(layer[0].weight)
    again = model.second_pass(unet, noisy, conditions, first)[last.name]  # type: ignore[arg-type]
    assert torch.allclose(again, plain)
    with pytest.raises(ValueError, match=r"ascending numbers of decoder blocks, 10\.\.17, got \(12, 11\)"):
        DifFeed(unet, head, blocks=(12, 11))  # type: ignore[arg-type]
    outermost = DifFeed(unet, head, blocks=(17,)).eval()  # type: ignore[arg-type]
    assert outermost.targets[17].module == "conv_in"
    first = outermost.first_pass(unet, noisy, conditions)  # type: ignore[arg-type]
    assert not torch.allclose(outermost.second_pass(unet, noisy, conditions, first)[last.name], plain)  # type: ignore[arg-type]


def test_a_diffeed_probe_trains_saves_and_predicts(unet: Backbone, sd_folder: Path, tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "colours", 6)
    data = read_labelled(folder)
    split = split_rows(data)
    settings = FeedbackSettings(
        timestep=10, tap="up.3.resnet.0", width=16, heads=2, depth=1, recipe=ProbeRecipe(epochs=2, optimiser="adamw")
    )
    extract = ExtractConfig(sizing=Sizing("squash", 64))
    start, _ = train_feedback(data, split, unet, replace(settings, recipe=ProbeRecipe(epochs=0)), extract)
    probe, test = train_feedback(data, split, unet, settings, extract)
    pairs = zip(start.network.feedback.parameters(), probe.network.feedback.parameters(), strict=True)
    assert all(not torch.equal(before, after) for before, after in pairs)
    assert test.n == len(split.test)
    probe.save(tmp_path / "probe")
    loaded = load_feedback_probe(tmp_path / "probe", unet)
    files = [folder / data.images[row].name for row in split.test]
    predicted = loaded.predict(files, backbone=unet)
    right = sum(a == data.classes[data.labels[row]] for a, row in zip(predicted.labels(), split.test, strict=True))
    assert right / len(files) == pytest.approx(test.top1)
    with pytest.raises(ValueError, match="holds no probe of the kind"):
        load_feedback_probe(tmp_path / "nowhere", unet)


def test_votes() -> None:
    gallery = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
    voters = NearestNeighbours(gallery, torch.tensor([0, 1, 1]), 4, backend="torch")
    votes = voters.votes(torch.tensor([[5.0, 0.0]]), [1, 3])
    assert votes[1].argmax() == 0
    assert votes[3].sum() == pytest.approx(1)
    assert votes[1].sum() < 1  # a part of the softmax over three
    ties = torch.tensor([[0.7, 0.3, 0.0, 0.0]])
    assert top_accuracy(ties, torch.tensor([2]), 3) == 1
    assert top_accuracy(ties, torch.tensor([2]), 3, voted_only=True) == 0
    with pytest.raises(ValueError, match="3 features but 2 labels"):
        NearestNeighbours(gallery, torch.tensor([0, 1]), 2)


def test_pixels_are_told_apart_and_doubt_lies_on_the_border() -> None:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.zeros(1, 2, 4, 8)
    coarse[:, 0, :, :4], coarse[:, 1, :, 4:] = 1, 1
    features = pixel_features([coarse, torch.randn(1, 3, 8, 16, generator=generator)], (8, 16))[0]
    truth = (torch.arange(16) >= 8).long().expand(8, 16)
    some = torch.randperm(128, generator=generator)[:60]
    settings = PixelSettings(members=3, epochs=30, batch_size=16)
    ensemble = fit_pixels(features.flatten(1).T[some], truth.flatten()[some], 2, settings)
    found = ensemble.segment(features)
    assert (found.labels == truth).float().mean() > 0.9
    assert found.divergence[:, 7:9].mean() > found.divergence[:, [0, 15]].mean()
    assert found.divergence.min() >= 0
    again = fit_pixels(features.flatten(1).T[some], truth.flatten()[some], 2, settings)
    assert all(torch.equal(a, b) for a, b in zip(ensemble.parameters(), again.parameters(), strict=True))
    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.1, got 0\.\.5"):
        fit_pixels(features.flatten(1).T[some], 5 * truth.flatten()[some], 2)


def test_maps_are_resized_as_the_settings_say() -> None:
    maps = [torch.randn(1, 2, 3, 4, generator=torch.Generator().manual_seed(0)), torch.randn(1, 1, 5, 5)]
    for mode, aligned in (
        ("bilinear", False),
        ("bilinear", True),
        ("bicubic", True),
        ("nearest", None),
        ("area", None),
    ):
        resizing = Resizing(upsampling=mode, align_corners=bool(aligned))  # type: ignore[arg-type]
        plain = [torch.nn.functional.interpolate(m, (10, 13), mode=mode, align_corners=aligned) for m in maps]
        assert torch.equal(pixel_features(maps, (10, 13), resizing), torch.cat(plain, 1))
    with pytest.raises(ValueError, match="align_corners goes with bilinear and bicubic, not with nearest"):
        Resizing(upsampling="nearest", align_corners=True)
    with pytest.raises(ValueError, match="upsampling must be one of bilinear, bicubic, nearest"):
        Resizing(upsampling="linear")  # type: ignore[arg-type]


def test_depth_stays_in_its_limits_and_maps_are_left_alone() -> None:
    maps = [torch.randn(1, c, 2, 3, generator=torch.Generator().manual_seed(c)) for c in (6, 5, 4, 3)]
    kept = [m.clone() for m in maps]
    probe = DepthProbe((6, 5, 4, 3), reader="dpt", limits=(1.0, 4.0), hidden=8, kernel=3)
    depth = probe(maps)
    assert depth.shape == (1, 1, 32, 48)
    assert float(depth.detach().min()) >= 1
    assert float(depth.detach().max()) <= 4
    assert all(torch.equal(a, b) for a, b in zip(maps, kept, strict=True))
    with pytest.raises(ValueError, match="takes four maps, got 2"):
        DepthProbe((6, 5), reader="dpt")


def test_a_pixel_probe_learns_from_two_images_and_is_kept(unet: Backbone, tmp_path: Path) -> None:
    def halves(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Dark on the left, bright on the right of a random column."""
        edge = 16 + 8 * seed
        image = torch.rand(3, 32, 64, generator=torch.Generator().manual_seed(seed)) * 0.2
        image[:, :, edge:] += 0.8
        return image, (torch.arange(64) >= edge).long().expand(32, 64)

    config = ExtractConfig(sizing=Sizing("pad", 64))
    settings = PixelSettings(members=2, epochs=4)
    told = [halves(0), halves(2)]
    told[1] = (told[1][0], told[1][1].clone().index_fill(0, torch.tensor([0]), IGNORED))
    probe = train_pixel_probe(
        told, ("dark", "bright"), unet, taps=["in", "conv_in"], timesteps=(10, 50), extract=config, settings=settings
    )
    image, truth = halves(1)
    found = probe.segment(image, backbone=unet)
    assert found.labels.shape == (32, 64)
    assert (found.labels == truth).float().mean() > 0.75
    probe.save(tmp_path)
    again = load_pixel_probe(tmp_path).segment(image, backbone=unet)
    assert torch.equal(again.labels, found.labels)
    with pytest.raises(ValueError, match=r"labels of image 0 must be \(32, 64\), as the image is, got \(4, 4\)"):
        train_pixel_probe([(image, torch.zeros(4, 4))], ("a", "b"), unet)
    with pytest.raises(ValueError, match="holds no probe of the kind"):
        load_pixel_probe(tmp_path / "nowhere")
