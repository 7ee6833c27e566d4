"""Segmentation: the official sequence of calls against ours, on the same random weights, same dtype, same noise.

The official sequence predicts mask and edge and decodes both, whatever is asked for. Ours gives the same two maps, or
the mask alone. The official program also runs six passes per image (its ensemble); that is counted, not timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from diffrep.eval.benchmarks.features import random_vae
from diffrep.eval.benchmarks.timing import PairedBenchmark, Row, count_flops
from diffrep.heads.diffdis import DiffDisUNet, branch_vectors
from diffrep.heads.mask_prediction import PASSES
from diffrep.heads.one_step import TIMESTEP, Schedule
from diffrep.heads.segmentation import DiffDis, ensemble, ensemble_sizes, finish

SD_TURBO = {  # the architecture of SD-Turbo's U-Net
    "block_out_channels": (320, 640, 1280, 1280),
    "attention_head_dim": (5, 10, 20, 20),
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
    "out_channels": 4,
}
_SCHEDULE = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "epsilon",
}


@dataclass(frozen=True)
class SegmentationBenchmark(PairedBenchmark):
    """Compare DiffDIS' official pass with ours: mask and edge, and the mask alone."""

    size: Literal["small", "sd"] = "small"  # sd: the published architecture (913 M parameters)
    side: int = 256  # of the image, pixels
    dtype: Literal["float32", "bfloat16"] = "float32"

    @torch.inference_mode()
    def rows(self) -> list[Row]:
        head = published_head(self.device, getattr(torch, self.dtype), size=self.size)
        generator = torch.Generator().manual_seed(0)
        pixels = torch.rand(1, 3, self.side, self.side, generator=generator).to(self.device)
        noise = head.draw((self.side, self.side), 0).to(self.device, head.dtype)
        noises = [head.draw(size, 0, n) for n, size in enumerate(ensemble_sizes((self.side,) * 2, head.multiple) * 2)]
        passes = count_flops(lambda: ensemble(head, pixels, noises[:PASSES], edges=True)[0]) / 1e9

        def both() -> Tensor:
            mask, edge = head.forward(pixels, noise, edges=True)
            assert edge is not None
            return torch.cat([finish(mask), finish(edge)])

        def mask_only() -> Tensor:
            return finish(head.forward(pixels, noise)[0])

        sides: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]] = {
            "mask and edge": (lambda: official_pass(head, pixels, noise), both),
            "mask alone": (lambda: official_pass(head, pixels, noise)[:1], mask_only),
        }
        rows = []
        for claim, (official, ours) in sides.items():
            memory = ""
            if self.device != "cpu":
                memory = f"; peak memory MiB {_peak(official):.0f} against {_peak(ours):.0f}"

            def said(plain: float, our: float, memory: str = memory) -> str:
                fewer = f"{1 - our / plain:.0%} fewer; the official program's {PASSES} passes: {passes:.1f}"
                return f"GFLOP {plain:.1f} against {our:.1f} ({fewer}){memory}"

            about = f"{self.side} px, {self.size} U-Net, {self.dtype} on {self.device}"
            rows.append(self.compare(f"{claim}, {about}", official, ours, flops=said))
        return rows


@torch.no_grad()
def official_pass(head: DiffDis, pixels: Tensor, noise: Tensor) -> Tensor:
    """DiffDIS' published pipeline, call by call: (2, 1, H, W), mask and edge, stretched to [0, 1]."""
    vae, unet, factor = head.vae, head.unet, head.vae.config.scaling_factor
    latents = []
    for level in range(unet.levels + 1):
        view = pixels if level == 0 else F.interpolate(pixels, scale_factor=0.5**level, mode="bilinear")
        latents.append(vae.encode(view.to(vae.dtype) * 2 - 1).latent_dist.mean * factor)
    doubled = [latent.repeat(2, 1, 1, 1) for latent in latents]
    start = noise.repeat(2, 1, 1, 1).to(latents[0])
    output = unet_both(unet, doubled, start, head.context)
    clean = head.schedule.clean(output, start, TIMESTEP)
    decoded = [vae.decode((row / factor)[None].to(vae.dtype)).sample.mean(1, keepdim=True) for row in clean]
    return torch.cat([finish(raw.float()) for raw in decoded])


def unet_both(unet: DiffDisUNet, latents: list[Tensor], noise: Tensor, context: Tensor) -> Tensor:
    """The U-Net as published: every row is computed to its end, conditions are computed for every row."""
    rows = len(noise)
    vectors = branch_vectors(rows // 2).to(noise)
    steps = torch.full((rows,), TIMESTEP, device=noise.device)
    embedding = unet.time_embedding(unet.time_proj(steps).to(noise.dtype)) + unet.class_embedding(vectors)
    states = context.repeat(rows, 1, 1)
    hidden = unet.conv_in(torch.cat([latents[0], noise], dim=1))
    skips: list[Any] = [hidden]
    for number, block in enumerate(unet.down_blocks):
        named = {"encoder_hidden_states": states} if getattr(block, "has_cross_attention", False) else {}
        hidden, residuals = block(hidden_states=hidden, temb=embedding, **named)
        skips += residuals
        if number < unet.levels:
            condition = unet.rgb_conv[number](latents[number + 1])
            skips[-1] = skips[-1] * unet.rgb_proj[number](condition) + unet.rgb_proj1[number](condition) + skips[-1]
    hidden = unet.mid_block(hidden, embedding, encoder_hidden_states=states)
    for block in unet.up_blocks:
        count = len(block.resnets)
        named = {"encoder_hidden_states": states} if getattr(block, "has_cross_attention", False) else {}
        hidden = block(hidden_states=hidden, temb=embedding, res_hidden_states_tuple=tuple(skips[-count:]), **named)
        skips = skips[:-count]
    predicted: Tensor = unet.conv_out(unet.conv_act(unet.conv_norm_out(hidden)))
    return predicted


def published_head(device: str, dtype: torch.dtype = torch.float32, *, size: Literal["small", "sd"] = "sd") -> DiffDis:
    """The published architecture with random weights, at full size or with narrow layers; "meta" computes nothing."""
    narrow = {"block_out_channels": (64, 128, 256, 256), "attention_head_dim": (1, 2, 4, 4)}
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(0)
        unet = DiffDisUNet(SD_TURBO if size == "sd" else SD_TURBO | narrow)
        vae = random_vae(size == "sd")
        context = torch.randn(1, 2, 1024)
    for module in (unet, vae):
        torch.nn.Module.to(module, dtype=dtype)
        module.eval().requires_grad_(False)
    return DiffDis(unet, vae, context.to(dtype), Schedule.from_config(_SCHEDULE))


def _peak(run: Any) -> float:
    """MiB that a function adds to what is allocated on the GPU."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**20
