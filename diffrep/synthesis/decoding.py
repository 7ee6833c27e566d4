"""From latents to pixels, window by window."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from tqdm import tqdm

from diffrep.synthesis.canvas import Lines, Position, Run
from diffrep.synthesis.sampler import PatchDenoiser, SynthesisSettings
from diffrep.synthesis.windows import RowSweep, WindowPlan, decode_weights, window_weights

STRIP, WINDOWS = 2048, 8  # pixels, or windows: width of what is decoded from top to bottom before the next
DECODE_BATCH = 4  # windows that are decoded together: a decoder needs far more memory than the denoiser


@torch.inference_mode()
def decode_lines(
    model: PatchDenoiser,
    latents: Lines,
    settings: SynthesisSettings,
    *,
    run: Run | None = None,
    progress: bool = False,
) -> Iterator[tuple[int, int, np.ndarray]]:
    """Decode a canvas with overlapping windows, in strips from top to bottom.

    Windows that lie across two strips are decoded for both.

    A decoder sees the whole of its input, so windows never agree exactly: they are blended. The official Gaussian is
    still a fifth of its height at a window's border, where it leaves a step; a raised cosine leaves none.

    Args:
        latents: (H, c, W) lines of scaled latents.
        run: where an interrupted run goes on; from the top where left out.

    Yields:
        (first line, first column, (lines, 3, columns) float32, about [0, 1], not clamped), in pixels.
    """
    height, _, width = latents.shape
    stride = settings.decode_stride or max(model.window // 2, 1)
    plan = WindowPlan((height, width), model.window, stride)
    factor = model.factor
    pixels = WindowPlan((height * factor, width * factor), model.window * factor, stride * factor)
    official = settings.decode_weights == "official"
    weights = (
        decode_weights(pixels.window, settings.decode_sigma) if official else window_weights("hann", pixels.window)
    )
    width, side = pixels.size[1], max(STRIP, WINDOWS * pixels.window)
    strips = [(left, min(left + side, width)) for left in range(0, width, side)]
    run = run or Run(None, {})
    first = run.position
    total = sum(len(RowSweep(pixels, weights, 0, strip=strip).columns) for strip in strips) * len(plan.rows)
    bar = tqdm(total=total, desc="decode", unit="window", disable=not progress)
    for number, strip in enumerate(strips):
        sweep = RowSweep(pixels, weights, 3, strip=strip)
        start_row = first.row if number == first.step else 0
        if number < first.step:
            start_row = len(plan.rows)
        elif run.carry is not None:
            sweep.resume(start_row, run.carry)
            run.carry = None
        bar.update(start_row * len(sweep.columns))
        for row in range(start_row, len(plan.rows)):
            for start in range(0, len(sweep.columns), DECODE_BATCH):
                part = sweep.columns[start : start + DECODE_BATCH]
                decoded = _decode_row(model, latents, plan, row, part, settings)
                for column, value in zip(part, decoded, strict=True):
                    sweep.add(row, column, value)
                bar.update(len(part))
            for top, lines in sweep.end_row():
                yield top, strip[0], lines
            run.checkpoint(Position("decode", number, row + 1), sweep.carry)
    bar.close()


def _decode_row(
    model: PatchDenoiser,
    latents: Lines,
    plan: WindowPlan,
    row: int,
    columns: Sequence[int],
    settings: SynthesisSettings,
) -> np.ndarray:
    """(columns, 3, h, w): some windows of a row."""
    top, lefts = plan.rows[row], [plan.columns[k] for k in columns]
    lines = latents.tensor(top, top + plan.window)[:, :, lefts[0] : lefts[-1] + plan.window].movedim(1, 0)
    windows = torch.stack([lines[:, :, left - lefts[0] :][:, :, : plan.window] for left in lefts])
    found: np.ndarray = model.decode(windows, quantize=settings.quantize).float().cpu().numpy()
    return found


def to_uint8(lines: np.ndarray) -> np.ndarray:
    """(n, 3, W) values in [0, 1] -> (n, W, 3) uint8."""
    return np.round(np.clip(lines, 0, 1) * 255).astype(np.uint8).transpose(0, 2, 1)
