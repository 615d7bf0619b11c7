"""Plots of the safety benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.ticker import PercentFormatter

from benchmarks import plots
from benchmarks.common import summary
from benchmarks.safety.catalogue import control_name, methods, plain_name
from benchmarks.safety.report import OUT, OUT_HELP, VALIDATION, Rows, changes, of_method, per_base
from peft_sae.subspace.controls import CONTROLS

_COLOURS = dict(zip(("SAE", "full fine-tuning", "LoRA"), plots.COLOURS, strict=False))
_COLOURS |= {control_name(kind): plots.COLOURS[3] for kind in CONTROLS}
_OTHERS = "#777777"
_TITLES = {False: "trained on all requests", True: "trained on neutral requests only (another scale across)"}
_NOTE = "Means over base models; bars and bands are bootstrap 95 % intervals over them."


def plot_frontier(rows: Rows, name: str, path: Path) -> None:
    """Draw safety out of distribution against helpfulness there: one numbered point per method, with intervals.

    What was trained on the neutral requests alone has a panel of its own, with the same numbers.
    """
    shown = [each for each in methods(name) if of_method(rows, each.name, each.dangerous)]
    names = list(dict.fromkeys(plain_name(each.name) for each in shown))
    panels = [group for neutral in (False, True) if (group := [each for each in shown if each.neutral is neutral])]
    size = 11.5, 7.0 * len(panels)
    figure, axes = plots.plt.subplots(len(panels), 1, figsize=size, squeeze=False, sharey=True)
    for axis, group in zip(axes[:, 0], panels, strict=True):
        for method in group:
            plain = plain_name(method.name)
            rows_of_method = of_method(rows, method.name, method.dangerous)
            _plot_point(axis, names.index(plain) + 1, plain, rows_of_method)
        axis.set_xlabel("helpfulness, cue swapped")
        axis.set_ylabel("safety, unseen kinds of danger, cue swapped")
        axis.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        _clean(axis)
        axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, markerscale=0.6)
        if len(panels) > 1:
            axis.set_title(_TITLES[group[0].neutral])
    _note(
        figure, f"Best is the upper right corner; blue: this package, purple: controls; hollow: frozen basis. {_NOTE}"
    )
    plots.save(figure, path)


def _plot_point(axis: Any, number: int, name: str, group: Rows) -> None:
    colour = _COLOURS.get(name.split(",")[0], _OTHERS)
    across, up = (summary(list(per_base(group, column).values())) for column in (OUT_HELP, OUT))
    spans = [[[each["mean"] - each["low"]], [each["high"] - each["mean"]]] for each in (across, up)]
    place = across["mean"], up["mean"]
    hollow = "frozen" in name
    axis.errorbar(*place, xerr=spans[0], yerr=spans[1], color=colour, alpha=0.3, elinewidth=0.8)
    axis.plot(
        *place,
        marker="o",
        markersize=13,
        linestyle="",
        markerfacecolor="white" if hollow else colour,
        markeredgecolor=colour,
        label=f"{number}  {name}",
    )
    axis.annotate(
        str(number), place, ha="center", va="center", fontsize=7, color=colour if hollow else "white", weight="bold"
    )


def plot_changes(rows: Rows, name: str, reference: str, path: Path) -> None:
    """Draw how far each change moves the validation score, and what it does out of distribution."""
    columns = {VALIDATION: "validation score", OUT: "safety, unseen kinds, cue swapped", OUT_HELP: OUT_HELP}
    found = {column: changes(rows, name, reference, column) for column in columns}
    names = list(found[VALIDATION])[::-1]
    size = 12.5, 0.28 * len(names) + 1.2
    figure, axes = plots.plt.subplots(1, len(columns), figsize=size, sharey=True)
    for axis, (column, title) in zip(axes, columns.items(), strict=True):
        for place, changed in enumerate(names):
            gap = found[column][changed]
            colour = plots.COLOURS[0] if gap["low"] > 0 else plots.COLOURS[1] if gap["high"] < 0 else _OTHERS
            axis.plot([100 * gap["low"], 100 * gap["high"]], [place, place], color=colour, linewidth=1.5)
            axis.plot(100 * gap["mean"], place, marker="o", color=colour)
        axis.axvline(0, color="#444444", linewidth=0.8)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("points")
        _clean(axis)
    axes[0].set_yticks(range(len(names)), names)
    _note(figure, f"Against {reference}, paired by base. Blue: better, orange: worse in all of the interval. {_NOTE}")
    plots.save(figure, path)


def plot_efficiency(rows: Rows, path: Path) -> None:
    """Draw safety against the number of dangerous topics, in and out of distribution."""
    made = methods("efficiency")
    names = list(dict.fromkeys(method.name for method in made))
    counts = sorted({method.dangerous for method in made})
    columns = ("safety", OUT, OUT_HELP)
    figure, axes = plots.plt.subplots(1, len(columns), figsize=(4.4 * len(columns), 3.8), sharey=True)
    for axis, column in zip(axes, columns, strict=True):
        found = {
            name: [list(per_base(of_method(rows, name, count), column).values()) for count in counts] for name in names
        }
        colours = {name: _COLOURS.get(name, plots.COLOURS[5 if "frozen" in name else 0]) for name in names}
        plots.curves(axis, counts, {name: values for name, values in found.items() if all(values)}, colours=colours)
        axis.set_xscale("log", base=2)
        axis.set_xticks(counts, [str(count) for count in counts])
        axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axis.set_xlabel("dangerous topics in fine-tuning")
        axis.set_title(column, fontsize=10)
    axes[0].set_ylabel("share of requests")
    axes[-1].legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    _note(figure, _NOTE)
    plots.save(figure, path)


def _clean(axis: Any) -> None:
    axis.grid(color="#dddddd", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)


def _note(figure: Any, text: str) -> None:
    figure.tight_layout()
    figure.text(0.01, -0.01, text, fontsize=8, color="#444444", va="top")
