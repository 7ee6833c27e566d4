"""What extraction costs at Stable Diffusion 2.1's size, counted on meta tensors: no weights, no arithmetic."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from diffrep.backbones import Conditions, LatentDiffusion, PromptEmbedding

# performance.md section 2.2: GFLOP of one sample until right after a module, by image side
COST = {
    "mid": {512: 262, 768: 725, 960: 1350, 1024: 1630},
    "up.0.resnet.1": {512: 274, 768: 752, 960: 1392, 1024: 1679},
    "up.0.upsampler": {512: 288, 768: 783, 960: 1440, 1024: 1733},
    "up.1.resnet.1": {512: 354, 768: 932, 960: 1675, 1024: 2001},
    "up.1.attention.1": {512: 372, 768: 972, 960: 1739, 1024: 2074},
    "up.1.attention.2": {512: 409, 768: 1058, 960: 1874, 1024: 2228},
    "up.1": {512: 440, 768: 1126, 960: 1980, 1024: 2349},
    "up.2.attention.1": {512: 536, 768: 1358, 960: 2367, 1024: 2800},
    "up.2.attention.2": {512: 576, 768: 1455, 960: 2530, 1024: 2991},
    "up.2": {512: 606, 768: 1523, 960: 2637, 1024: 3112},
    "up.3.resnet.0": {512: 639, 768: 1597, 960: 2752, 1024: 3243},
    "up.3.resnet.2": {512: 765, 768: 2001, 960: 3574, 1024: 4262},
}
ENCODER = {512: 1117, 768: 2609, 960: 4230, 1024: 4879}


@pytest.fixture(scope="module")
def sd21() -> LatentDiffusion:
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=96,
            cross_attention_dim=1024,
            attention_head_dim=[5, 10, 20, 20],
            use_linear_projection=True,
        )
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
        )
    schedule = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).alphas_cumprod
    backbone = LatentDiffusion(unet, vae, schedule)
    backbone.embed("", PromptEmbedding(torch.empty(1, 77, 1024, device="meta")))
    return backbone


def gigaflops(backbone: LatentDiffusion, tap: str, side: int, **conditions: int) -> float:
    """Of extracting one tap of one image: VAE encoder and U-Net."""
    backbone._forget()  # count the prompt's keys and values too, as the table does
    with FlopCounterMode(display=False) as counter:
        backbone.maps(torch.empty(1, 3, side, side, device="meta"), [tap], Conditions(timestep=261, **conditions))
    return float(counter.get_total_flops()) / 1e9


@pytest.mark.parametrize(
    "side", [512, 768, pytest.param(960, marks=pytest.mark.slow), pytest.param(1024, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("tap", COST)
def test_extraction_costs_no_more_than_the_modules_up_to_the_tap(sd21: LatentDiffusion, tap: str, side: int) -> None:
    with FlopCounterMode(display=False) as counter:
        sd21.encode(torch.empty(1, 3, side, side, device="meta"))
    encoder = counter.get_total_flops() / 1e9
    assert encoder == pytest.approx(ENCODER[side], rel=0.01)
    # folded upsampling saves up to a thirtieth
    assert 0.95 * COST[tap][side] < gigaflops(sd21, tap, side) - encoder <= 1.01 * COST[tap][side]


def test_an_ensemble_encodes_the_image_once(sd21: LatentDiffusion) -> None:
    total = gigaflops(sd21, "up.1", 768, ensemble=8)
    assert total == pytest.approx(ENCODER[768] + 8 * COST["up.1"][768], rel=0.03)
    assert total <= 11_800  # the official structure encodes each member: 29,900


def test_the_decoder_never_runs_and_the_encoder_once_a_batch(sd21: LatentDiffusion) -> None:
    calls: Counter[str] = Counter()
    modules = [m for m in (sd21.vae.encoder, sd21.vae.decoder) if m is not None]
    handles = [m.register_forward_pre_hook(lambda m, _: calls.update([type(m).__name__])) for m in modules]
    sd21.maps(torch.empty(3, 3, 512, 512, device="meta"), ["mid"], Conditions(timestep=1, ensemble=4), batch_size=3)
    for handle in handles:
        handle.remove()
    assert calls == {"Encoder": 1}  # one batch of three images, whatever the ensemble; the decoder never
    assert sd21.text is None
