"""The trajectory of Diffusion Hyperfeatures and its aggregation network."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffrep.backbones import (
    AggregationNetwork,
    BackboneError,
    Conditions,
    Hyperfeatures,
    LatentDiffusion,
    Trajectory,
    load_backbone,
)
from diffrep.backbones.hyperfeatures import TAPS, follow

LATENTS = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
READ = ("up.0.resnet.1.increment", "up.2.resnet.0.increment")
SHORT = Trajectory(steps=4, saved=(3, 0))


@pytest.fixture(scope="module")
def sd(sd_folder: Path) -> LatentDiffusion:
    backbone = load_backbone(sd_folder)
    assert isinstance(backbone, LatentDiffusion)
    return backbone


def network(sd: LatentDiffusion, *, steps: int = 2, groups: int = 2) -> AggregationNetwork:
    torch.manual_seed(0)  # the layers' initialisation takes its draws from the global generator
    made = AggregationNetwork([sd.tap(t).channels for t in READ], projection=16, steps=steps, groups=groups)
    torch.nn.init.normal_(made.mixing_weights)
    return made.eval().requires_grad_(False)


def test_streaming_gives_what_joining_all_maps_gives(sd: LatentDiffusion) -> None:
    joining, context = network(sd), sd.embed("").context
    steps = {s.number: s.maps for s in follow(sd, LATENTS, READ, SHORT, context=context, to_the_end=True)}
    resized = [
        torch.nn.functional.interpolate(steps[number][tap], size=(8, 8), mode="bilinear")
        for number in SHORT.saved
        for tap in READ
    ]
    whole = joining(resized)
    streamed = Hyperfeatures(sd, joining, taps=READ, trajectory=SHORT)
    torch.testing.assert_close(streamed.join(LATENTS, context), whole, rtol=1e-4, atol=1e-5)


def test_the_trajectory_ends_with_the_last_saved_step_at_the_deepest_tap(sd: LatentDiffusion) -> None:
    ran: list[str] = []
    handles = [
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
        for name, module in (("conv_in", sd.network.conv_in), ("conv_out", sd.network.conv_out))
    ]
    list(follow(sd, LATENTS, READ, Trajectory(steps=50, saved=(49, 47)), context=sd.embed("").context))
    for handle in handles:
        handle.remove()
    assert ran == ["conv_in", "conv_out"] * 2 + ["conv_in"]


def test_inversion_and_generation_undo_each_other(sd: LatentDiffusion) -> None:
    """On a network that always sees the same noise, DDIM is exact in both directions."""

    class Constant:
        predicts = "epsilon"
        alphas_cumprod = sd.alphas_cumprod
        as_noise, alpha, ddim_step = LatentDiffusion.as_noise, LatentDiffusion.alpha, LatentDiffusion.ddim_step

        def context_maps(self, latents: Tensor, taps: list[str], timestep: int, context: Tensor) -> dict[str, Tensor]:
            return {tap: torch.full_like(latents, 0.3) for tap in taps}

    context = torch.zeros(1, 1, 1)

    def run(latents: Tensor, mode: str) -> Tensor:
        path = Trajectory(steps=5, saved=(0,), mode=mode)  # type: ignore[arg-type]  # a literal
        step = list(follow(Constant(), latents, READ, path, context=context, to_the_end=True))[-1]  # type: ignore[arg-type]  # stands in
        alpha = sd.alphas_cumprod[800] if mode == "inversion" else torch.tensor(1.0)
        assert step.clean is not None
        return alpha.sqrt() * step.clean + (1 - alpha).sqrt() * 0.3

    noisy = run(LATENTS, "inversion")
    assert not torch.allclose(noisy, LATENTS)
    torch.testing.assert_close(run(noisy, "generation"), LATENTS, rtol=1e-4, atol=1e-4)


def test_guidance_needs_and_uses_the_unconditional_prompt(sd: LatentDiffusion) -> None:
    cat, none = sd.embed("a cat").context, sd.embed("").context
    guided = Trajectory(steps=3, saved=(0,), mode="generation", guidance=3.0)
    with pytest.raises(ValueError, match="guidance 3 needs the context of the unconditional"):
        list(follow(sd, LATENTS, READ, guided, context=cat))
    with_scale = list(follow(sd, LATENTS, READ, guided, context=cat, unconditional=none, to_the_end=True))
    plain = list(follow(sd, LATENTS, READ, Trajectory(3, (0,), "generation"), context=cat, to_the_end=True))
    assert torch.equal(with_scale[0].maps[READ[0]], plain[0].maps[READ[0]])  # of the conditional pass
    assert not torch.allclose(with_scale[-1].clean, plain[-1].clean)  # type: ignore[arg-type]  # both predict


def test_as_a_backbone_it_gives_one_map_per_image(sd: LatentDiffusion) -> None:
    backbone = Hyperfeatures(sd, network(sd, steps=1), taps=READ)
    assert backbone.trajectory == Trajectory(steps=1, saved=(0,))
    pixels = torch.rand(3, 3, 64, 48, generator=torch.Generator().manual_seed(0))
    told = Conditions(posterior="sample")
    together = backbone.maps(pixels, ["hyperfeatures"], told, batch_size=2)["hyperfeatures"]
    alone = backbone.maps(pixels[2:], ["hyperfeatures"], told)["hyperfeatures"]
    assert together.shape == (3, 16, 8, 6)
    torch.testing.assert_close(together[2:], alone, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"joins 2 steps of .*gives 11 steps of"):
        Hyperfeatures(sd, network(sd), taps=READ)


def test_published_weights_are_read_by_their_names(sd: LatentDiffusion, tmp_path: Path) -> None:
    made = network(sd)
    state = {**made.state_dict(), "logit_scale": torch.ones(())}
    torch.save({"aggregation_network": state, "config": {"a": 1}}, tmp_path / "net.pt")
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "net.safetensors")
    for file in ("net.pt", "net.safetensors"):
        again = AggregationNetwork.load(tmp_path / file, groups=2)
        assert (again.feature_dims, again.projection, again.steps) == (made.feature_dims, 16, 2)
        assert all(torch.equal(v, again.state_dict()[k]) for k, v in made.state_dict().items())
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(BackboneError, match=r"other\.safetensors: is no aggregation network: it holds a"):
        AggregationNetwork.load(tmp_path / "other.safetensors")
    with pytest.raises(BackboneError, match="needs the trained aggregation network"):
        load_backbone("hyperfeatures")


def test_geoawares_network_is_the_same_one() -> None:
    folder = Path(__file__).parent / "parity" / "data" / "features" / "pck-geoaware-spair" / "model"
    weights = load_file(folder / "aggregation_network.safetensors")
    loaded = AggregationNetwork.load(folder / "aggregation_network.safetensors", groups=4)
    assert loaded.steps == 1
    assert len(loaded.feature_dims) == 4  # s3, s4, s5, DINO
    maps = [torch.ones(1, channels, 3, 3) for channels in loaded.feature_dims]
    assert loaded(maps).shape == (1, weights["bottleneck_layers.0.0.conv3.weight"].shape[0], 3, 3)
    with pytest.raises(ValueError, match="joins 1 steps of 4 maps each, got 3"):
        loaded(maps[:3])


def test_less_than_100_mb_of_features_are_held_at_the_published_size() -> None:
    """One image of 512 through Stable Diffusion 1.5: the maps of a step, the largest one resized, the sum."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
        vae = AutoencoderKL(block_out_channels=(8, 8, 16, 16), down_block_types=("DownEncoderBlock2D",) * 4,
                            up_block_types=("UpDecoderBlock2D",) * 4, norm_num_groups=4)  # fmt: skip
        latents, context = torch.empty(1, 4, 64, 64), torch.empty(1, 77, 768)
    backbone = LatentDiffusion(unet, vae, torch.linspace(0.999, 0.005, 1000))
    (step,) = follow(backbone, latents, TAPS, Trajectory(steps=1, saved=(0,)), context=context)
    assert len(step.maps) == 12
    assert sum(m.shape[1] for m in step.maps.values()) == 10560
    held = sum(m.numel() for m in step.maps.values())
    resized = max(m.shape[1] for m in step.maps.values()) * 64 * 64
    assert 4 * (held + resized + 2 * 384 * 64 * 64) < 100e6


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"steps": 5, "saved": (5,)}, {"saved": ()}, {"saved": (1, 1)}])
def test_a_trajectory_checks_itself(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="must be"):
        Trajectory(**wrong)  # type: ignore[arg-type]  # wrong on purpose
