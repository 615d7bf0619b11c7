"""Other libraries' progress bars."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def other_bars(progress: bool) -> Iterator[None]:
    """Turn off the progress bars of transformers and datasets for a while, unless progress is wanted."""
    import datasets
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled(), datasets.is_progress_bar_enabled()
    if not progress:
        transformers_logging.disable_progress_bar()
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not progress and shown[0]:
            transformers_logging.enable_progress_bar()
        if not progress and shown[1]:
            datasets.enable_progress_bars()
