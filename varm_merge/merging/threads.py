"""The threads that take the chunks of a tensor; torch does not split operations in them."""

import functools
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import torch

__all__ = ["MAX_THREADS", "pool"]

MAX_THREADS = 8


@functools.cache
def pool() -> ThreadPoolExecutor:
    """Threads in which torch does not split operations; the caller's setting stays what it was."""
    threads = torch.get_num_threads()
    workers = min(threads, MAX_THREADS)
    all_started = threading.Barrier(workers + 1)

    def become_serial() -> None:
        torch.get_num_threads()  # a thread's first use of torch sets its number; only later settings last
        torch.set_num_threads(1)  # also the number that threads started later begin with: restored below

    executor = ThreadPoolExecutor(workers, "varm-merge", become_serial)
    for _ in range(workers):
        executor.submit(all_started.wait)
    all_started.wait()
    torch.set_num_threads(threads)
    return executor


os.register_at_fork(after_in_child=pool.cache_clear)  # threads do not survive a fork
