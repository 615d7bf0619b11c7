"""Open the report of a Gemma-2-2B-shaped adapter in a headless Chromium: its size and the time to first paint.

    python -m benchmarks.report.run [--runs 5] [--output FILE]

The numbers in the report are made up; what counts is how many there are: 52 modules, 512 rows of features, 256 of
activations with three texts each.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import circumstances
from tests.inspect.browser import browser
from tests.inspect.synthetic import make_inspection

_PAINTED = """new Promise((found) => new PerformanceObserver((list) =>
  list.getEntriesByName("first-contentful-paint").forEach((one) => found(one.startTime))
).observe({ type: "paint", buffered: true }))"""
_VIEWPORTS = {"laptop": {"width": 1280, "height": 800}, "phone": {"width": 390, "height": 844}}


def first_paint(opened: Any, path: Path, viewport: dict[str, int]) -> float:
    """Return the seconds until a page's first paint, in a fresh context."""
    context = opened.new_context(viewport=viewport)
    try:
        page = context.new_page()
        page.goto(path.as_uri())
        return float(page.evaluate(_PAINTED)) / 1000
    finally:
        context.close()


def main() -> None:
    """Measure, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    start = time.perf_counter()
    text = make_inspection().to_html()
    result: dict[str, Any] = {"bytes": len(text.encode()), "seconds_to_write": time.perf_counter() - start}
    with tempfile.TemporaryDirectory() as folder, browser() as opened:
        path = Path(folder) / "report.html"
        path.write_text(text, encoding="utf-8")
        for name, viewport in _VIEWPORTS.items():
            seconds = [first_paint(opened, path, viewport) for _ in range(arguments.runs)]
            result[name] = {"median": statistics.median(seconds), "worst": max(seconds), "runs": arguments.runs}
    result["circumstances"] = circumstances(0, "cpu")
    print(json.dumps(result, indent=2))
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
