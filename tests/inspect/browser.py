"""A headless Chromium, where there is one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

NAMES = ("chromium", "chromium-browser", "google-chrome")


def why_not() -> str | None:
    """Say what is missing, if anything is."""
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        return "playwright is not installed"
    return None if chromium() else f"none of {', '.join(NAMES)} is installed"


def chromium() -> str | None:
    """Return the browser's path."""
    return next((found for found in map(shutil.which, NAMES) if found), None)


@contextmanager
def browser() -> Iterator:
    """Open a browser; it closes at the end."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Containers seldom let a browser build its sandbox; the pages are our own.
        opened = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        try:
            yield opened
        finally:
            opened.close()
