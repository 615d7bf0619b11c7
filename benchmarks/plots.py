"""Plots of results: PNG to look at, SVG to print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl

from benchmarks.common import summary

mpl.use("Agg")
import matplotlib.pyplot as plt

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999", "#000000")


def save(figure: plt.Figure, path: Path) -> None:
    """Write a figure as PNG and SVG; nothing in the files depends on when they are written."""
    for suffix, settings in (
        (".png", {"dpi": 144, "metadata": {"Software": None}}),
        (".svg", {"metadata": {"Date": None}}),
    ):
        with mpl.rc_context({"svg.hashsalt": "peft-sae"}):
            figure.savefig(path.with_suffix(suffix), bbox_inches="tight", **settings)
    plt.close(figure)


def curves(
    axis: plt.Axes,
    places: Sequence[float],
    found: Mapping[str, Sequence[Sequence[float]]],
    *,
    colours: Mapping[str, str] | None = None,
) -> None:
    """Draw one line per name: the means of the values at each place, with their 95 % intervals as bands.

    Args:
        axis: to draw on.
        places: of the values.
        found: values at each place, by name.
        colours: by name; by default as they come.
    """
    colours = dict(zip(found, COLOURS, strict=False)) if colours is None else colours
    for name, values in found.items():
        colour = colours[name]
        points = [summary(each) for each in values]
        axis.plot(places, [point["mean"] for point in points], marker="o", color=colour, label=name, linewidth=1.5)
        axis.fill_between(
            places, [p["low"] for p in points], [p["high"] for p in points], color=colour, alpha=0.18, linewidth=0
        )
    axis.grid(color="#dddddd", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
