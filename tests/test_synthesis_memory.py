"""Memory does not grow with the image."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from diffrep.synthesis.large import scratch_bytes

ROOT = Path(__file__).resolve().parent.parent

MEASURE = """
import json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from diffrep.synthesis import EmbeddingGrid, SynthesisSettings
from diffrep.synthesis.canvas import Run
from diffrep.synthesis.large import grid_shape, synthesize_file
from tests.synthetic_painter import Painter

# 64 x 64 latents, 512 x 512 pixels a window, as in Stable Diffusion
model = Painter(window=64, channels=4, factor=8)
settings = SynthesisSettings(steps=2, decode_stride=64, batch_size=8)
peaks = []
for side in map(int, sys.argv[2:]):
    rows, columns = grid_shape(model, (side, side))
    grid = EmbeddingGrid(torch.randn(rows, columns, 6, generator=torch.Generator().manual_seed(0)))
    path = Path(sys.argv[1]) / f"{side}.tiff"
    synthesize_file(model, grid, path, (side, side), settings)
    path.unlink()
    # not getrusage, whose peak is also that of the process this one was started from
    (peak,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    peaks.append(int(peak.split()[1]) / 2**10)
print(json.dumps(peaks))
"""


def peaks_of(folder: Path, *sides: int) -> list[float]:
    """Peak memory of a process in MiB, after each of images of growing size.

    Blocks from 128 KiB on are mapped one by one (a fixed limit: glibc raises it by itself), so that what is freed is
    not kept in pieces: that alone moves the peak by a tenth from run to run.
    """
    command = [sys.executable, "-c", MEASURE, str(folder), *map(str, sides)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return [float(peak) for peak in json.loads(result.stdout)]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read where Linux writes it")
def test_sixteen_thousand_pixels_a_side(tmp_path: Path) -> None:
    needed, free = scratch_bytes((16384, 16384), 4, 8), shutil.disk_usage(tmp_path).free
    if free < 1.1 * needed:  # a run would refuse to begin, and rightly so
        pytest.skip(f"needs {1.1 * needed / 1e9:.1f} GB on the disk of {tmp_path}, {free / 1e9:.1f} GB are free")
    quarter, whole = peaks_of(tmp_path, 8192, 16384)
    assert whole < 2048
    assert whole <= 1.1 * quarter  # of four times the pixels
    assert not list(tmp_path.iterdir())
