"""The published numbers were computed with one thread; chains of many network passes amplify the rounding that
another number of threads brings (a DDIM inversion of a random U-Net turns 1e-7 into 1e-2)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from threadpoolctl import threadpool_limits


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with threadpool_limits(1):  # BLAS and OpenMP, of whatever library
        yield
    torch.set_num_threads(threads)
