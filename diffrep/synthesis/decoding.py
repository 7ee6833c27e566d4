"""From latents to pixels, window by window."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from tqdm import tqdm

from diffrep.synthesis.canvas import Lines, Position, Run
from diffrep.synthesis.sampler import Denoiser, SynthesisSettings
from diffrep.synthesis.windows import Sweep, WindowPlan, decode_weights, window_weights

DECODE_BATCH = 4  # windows that are decoded together: a decoder needs far more memory than the denoiser


@torch.inference_mode()
def decode_lines(
    model: Denoiser,
    latents: Lines,
    settings: SynthesisSettings,
    *,
    run: Run | None = None,
    progress: bool = False,
) -> Iterator[tuple[int, np.ndarray]]:
    """Decode a canvas with overlapping windows, from top to bottom.

    A decoder sees the whole of its input, so windows never agree exactly: they are blended. The official Gaussian is
    still a fifth of its height at a window's border, where it leaves a step; a raised cosine leaves none.

    Args:
        latents: (H, c, W) lines of scaled latents.
        run: where an interrupted run goes on; from the top where left out.

    Yields:
        (first line, (lines, 3, W * factor) float32, about [0, 1], not clamped).
    """
    height, _, width = latents.shape
    stride = settings.decode_stride or max(model.window // 2, 1)
    plan = WindowPlan((height, width), model.window, stride)
    factor = model.factor
    pixels = WindowPlan((height * factor, width * factor), model.window * factor, stride * factor)
    official = settings.decode_weights == "official"
    sweep = Sweep(pixels, decode_weights(pixels.window) if official else window_weights("hann", pixels.window), 3)
    run = run or Run(None, {})
    first = run.position.row
    if run.carry is not None:
        sweep.resume(first, run.carry)
        run.carry = None
    columns = plan.columns
    bar = tqdm(
        total=len(plan), initial=first * len(columns), desc="decode", unit="window", disable=not progress
    )
    for row in range(first, len(plan.rows)):
        top = plan.rows[row]
        lines = latents.tensor(top, top + plan.window).movedim(1, 0)
        for start in range(0, len(columns), DECODE_BATCH):
            part = range(start, min(start + DECODE_BATCH, len(columns)))
            windows = torch.stack([lines[:, :, columns[k] : columns[k] + plan.window] for k in part])
            decoded = model.decode(windows, quantize=settings.quantize).float().cpu().numpy()
            for column, value in zip(part, decoded, strict=True):
                sweep.add(row, column, value)
            bar.update(len(part))
        yield from sweep.end_row()
        run.checkpoint(Position("decode", 0, row + 1), sweep.carry)
    bar.close()


def to_uint8(lines: np.ndarray) -> np.ndarray:
    """(n, 3, W) values in [0, 1] -> (n, W, 3) uint8."""
    return np.round(np.clip(lines, 0, 1) * 255).astype(np.uint8).transpose(0, 2, 1)
