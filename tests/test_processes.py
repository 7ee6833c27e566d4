"""Processes beside a run: they end with it, however it ends."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from PIL import Image

POOL = """
import os, time
from diffrep.processes import process_pool

if __name__ == "__main__":
    with process_pool(1) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        time.sleep(600)
"""
LOADER = """
import multiprocessing, time
from pathlib import Path
from diffrep.images import Sizing
from diffrep.store.sources import Job, decode, find_sources

if __name__ == "__main__":
    multiprocessing.set_start_method("forkserver")  # that of Python from 3.14 on
    job = Job(0, tuple(find_sources(["images"])[1]))
    decoded = decode([job], Sizing("squash", 32), portion=1, workers=1)
    next(decoded)
    print(multiprocessing.active_children()[0].pid, flush=True)
    time.sleep(600)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="nothing is killed there in this way")
@pytest.mark.parametrize("code", [POOL, LOADER], ids=["pool", "loader behind a fork server"])
def test_helpers_end_with_the_run_that_is_killed(tmp_path: Path, code: str) -> None:
    (tmp_path / "images").mkdir()
    for name in "abcdefgh":
        Image.new("RGB", (40, 40)).save(tmp_path / "images" / f"{name}.png")
    (tmp_path / "run.py").write_text(code)
    with subprocess.Popen([sys.executable, "run.py"], cwd=tmp_path, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        helper = psutil.Process(int(run.stdout.readline()))
        run.send_signal(signal.SIGKILL)
    end = time.monotonic() + 30
    with contextlib.suppress(psutil.NoSuchProcess):
        while helper.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < end, f"{helper} goes on"
            time.sleep(0.05)
