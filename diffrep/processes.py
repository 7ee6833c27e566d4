"""Processes beside this one, which end with it even where it is killed.

Those of Python's pools would wait for ever, and so would torch's, which watch the process that started them: that can
be a fork server, as it is from Python 3.14 on. An hour's killed runs then fill the memory.
"""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import wait
from threading import Thread


def end_with_parent(_number: int = 0) -> None:
    """Let this process end when the one that it works for does; a ``worker_init_fn`` of torch's loaders."""
    if (parent := multiprocessing.parent_process()) is not None:
        Thread(target=_end_after, args=(parent.sentinel,), daemon=True).start()


def _end_after(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)


def process_pool(workers: int) -> ProcessPoolExecutor:
    """So many processes. They are spawned: forked ones would inherit the locks of other libraries' threads."""
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=spawn, initializer=end_with_parent)
