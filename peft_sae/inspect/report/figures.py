"""What the plots of the report show; its script draws them to the width of the page."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .lines import Point, Rows, position_figures, training_figure
from .wording import SIDES, count, degrees, number, percent, signed

_SERIES = 7  # that shapes and colours tell apart
_WIDE = 20  # how many times the median the largest value is where a plain scale shows only the largest


def figures(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the plots of an inspection (`Inspection.to_dict`) that have anything to show."""
    drawn = [
        drift_figure(found["modules"]),
        angle_figure(found["modules"]),
        activation_figure(found["activations"] or []),
        *position_figures(found["positions"] or []),
        training_figure(found["training"]),
    ]
    return [figure for figure in drawn if figure is not None]


def drift_figure(modules: Rows) -> dict[str, Any] | None:
    """Return how far each module has moved out of the basis, by block."""
    rows = [row for row in modules if row.get("drift") is not None]
    if not rows:
        return None

    def tip(row: dict[str, Any]) -> list[str]:
        random = None if row.get("in_random") is None else 1 - row["in_random"]
        return [f"drift {percent(row['drift'])}", f"with a random space {percent(random)}"]

    values = [row["drift"] for row in rows]
    return {
        "id": "drift",
        "title": "Drift of every module",
        "about": "Share of each module's update that lies outside the span of the features it started from. A module "
        "at 0 % has stayed in its basis; the dashes are the same measure with a random space of as many dimensions.",
        "alt": f"Scatter plot of {count(len(rows), 'module')} by block. Drift goes from {percent(min(values))} to "
        f"{percent(max(values))}.",
        "x": _blocks(rows),
        "y": {"label": "drift (share of the update's energy)", "kind": "share", "min": 0, "max": 1},
        "series": _by_type(rows, lambda row: [row["drift"], tip(row), None]),
        "control": {
            "name": "random space of as many dimensions",
            "points": _places(rows, lambda row: None if row.get("in_random") is None else 1 - row["in_random"]),
        },
    }


def angle_figure(modules: Rows) -> dict[str, Any] | None:
    """Return the principal angles of each module, by block."""
    rows = [row for row in modules if row.get("mean_angle") is not None]
    if not rows:
        return None

    def tip(row: dict[str, Any]) -> list[str]:
        return [
            f"mean angle {degrees(row['mean_angle'])}, largest {degrees(row.get('largest_angle'))}",
            f"mean with a random space {degrees(row.get('random_mean_angle'))}",
        ]

    values = [row["mean_angle"] for row in rows]
    return {
        "id": "angles",
        "title": "Principal angles of every module",
        "about": "How far each module's trained factor has turned away from the basis it started from: the mark is the "
        "mean of the principal angles, the bar reaches up to the largest. The dashes are the mean for a random space.",
        "alt": f"Scatter plot of {count(len(rows), 'module')} by block. Mean angles go from {degrees(min(values))} to "
        f"{degrees(max(values))}.",
        "x": _blocks(rows),
        "y": {"label": "angle to the basis (degrees)", "kind": "degrees", "min": 0, "max": 90},
        "series": _by_type(rows, lambda row: [row["mean_angle"], tip(row), row.get("largest_angle")]),
        "bars": "up to the largest angle",
        "control": {
            "name": "mean for a random space",
            "points": _places(rows, lambda row: row.get("random_mean_angle")),
        },
    }


def activation_figure(activations: Rows) -> dict[str, Any] | None:
    """Return every feature's mean activation in the adapted model over that in the base model."""
    rows = [row for row in activations if None not in (row.get("mean_before"), row.get("mean_after"))]
    if not rows:
        return None
    sizes = sorted(abs(value) for row in rows for value in (row["mean_before"], row["mean_after"]))
    wide = sizes[-1] > _WIDE * sizes[len(sizes) // 2]
    axis = {"kind": "number", "scale": "root" if wide else "linear"}
    said = " Both axes have a square-root scale." if wide else ""
    up = sum(row["mean_after"] > row["mean_before"] for row in rows)
    down = sum(row["mean_after"] < row["mean_before"] for row in rows)
    series = []
    for group in dict.fromkeys(["chosen", "protected", *(str(row.get("group")) for row in rows)]):
        points = [
            [row["mean_before"], row["mean_after"], _activation_tip(row), None]
            for row in rows
            if str(row.get("group")) == group
        ]
        if points:
            series.append({"name": f"{group} features", "points": points, "hollow": group == "other"})
    return {
        "id": "before-after",
        "title": "Activation of the features, before and after",
        "about": "Each mark is a feature: further to the right the more active it is in the base model, further up in "
        f"the adapted one. Above the diagonal it was strengthened, below it weakened.{said}",
        "alt": f"Scatter plot of {count(len(rows), 'feature')}: {up} strengthened, {down} weakened.",
        "x": {**axis, "label": "base model: mean activation per token"},
        "y": {**axis, "label": "adapted model: mean activation per token"},
        "diagonal": "no change",
        "series": series,
    }


def _activation_tip(row: dict[str, Any]) -> list[str]:
    before, after, change = number(row["mean_before"]), number(row["mean_after"]), signed(row.get("change"))
    label = [row["label"]] if row.get("label") else []
    return [
        str(row["name"]),
        *label,
        f"before {before}, after {after}",
        f"change {change} ± {number(row.get('error'))}",
    ]


def _blocks(rows: Rows) -> dict[str, Any]:
    """The axis of the blocks; what belongs to none stands behind the last."""
    axis: dict[str, Any] = {"label": "block of the model", "kind": "count", "min": -0.5, "max": _head(rows) - 0.5}
    if any(row.get("block") is None for row in rows):
        axis |= {"max": _head(rows) + 0.5, "names": [[_head(rows), "head"]]}
    return axis


def _head(rows: Rows) -> int:
    return 1 + max((row["block"] for row in rows if row.get("block") is not None), default=-1)


def _types(rows: Rows) -> list[tuple[str, str]]:
    """Kinds of modules, each with its side, in the order of their first rows."""
    return list(dict.fromkeys(_type(row) for row in rows))


def _type(row: dict[str, Any]) -> tuple[str, str]:
    return str(row["module"]).rsplit(".", 1)[-1], SIDES.get(str(row.get("side")), "")


def _x(row: dict[str, Any], rows: Rows, types: list[tuple[str, str]]) -> float:
    """The block, and a little to the side for each kind of module, so that marks do not cover each other."""
    if row.get("block") is None:
        return float(_head(rows))
    return float(row["block"] + 0.64 * ((types.index(_type(row)) + 0.5) / len(types) - 0.5))


def _by_type(rows: Rows, point: Callable[[dict[str, Any]], Point]) -> list[dict[str, Any]]:
    types = _types(rows)
    series: dict[tuple[str, str], list[Point]] = {}
    for row in rows:
        kind = _type(row)
        if types.index(kind) >= _SERIES - 1 and len(types) > _SERIES:
            kind = ("other modules", "")
        y, tip, end = point(row)
        lines = [f"{row['module']}{f' ({_type(row)[1]})' if _type(row)[1] else ''}", *tip]
        series.setdefault(kind, []).append([_x(row, rows, types), y, lines, end])
    return [
        {"name": f"{name} ({side})" if side else name, "points": points, "hollow": side == SIDES["write"]}
        for (name, side), points in series.items()
    ]


def _places(rows: Rows, value: Callable[[dict[str, Any]], float | None]) -> list[Point]:
    types = _types(rows)
    return [[_x(row, rows, types), value(row)] for row in rows if value(row) is not None]
