"""What the demo changes in its process while it runs, and puts back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute in one thread for a while.

    The demo's tensors are so small that a second thread saves a quarter of the time at best, and makes training ten
    times slower when another process wants the core, as threads then wait for each other. It also adds in one order,
    so that the number of cores does not change the world.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
