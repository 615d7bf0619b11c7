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


@contextmanager
def transformers_bars(progress: bool) -> Iterator[None]:
    """Turn off transformers' own progress bars for a while unless progress is wanted."""
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    if not progress:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
