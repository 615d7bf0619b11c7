"""What the plots of the report show; its script draws them to the width of the page."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from .wording import SIDES, count, degrees, number, percent, signed

_LINE_POINTS = 400  # of one line: a page shows no more
_SERIES = 7  # that shapes and colours tell apart
_WIDE = 20  # how many times the median the largest value is where a plain scale shows only the largest

Point = list[Any]  # [x, y, lines of the tooltip, far end of a bar or None]
Rows = list[dict[str, Any]]


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
        "alt": f"Scatter plot of {count(len(rows), 'feature')}: {sum(row['mean_after'] > row['mean_before'] for row in rows)} "
        f"strengthened, {sum(row['mean_after'] < row['mean_before'] for row in rows)} weakened.",
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


def position_figures(positions: Rows) -> list[dict[str, Any] | None]:
    """Return the loss and the divergence by the place of the token."""
    x = {"label": "place of the token in its text", "kind": "count"}
    losses = [
        _line(positions, "position", key, name, "tokens")
        for key, name in (("loss_before", "base model"), ("loss_after", "adapted model"))
    ]
    return [
        _lines(
            "loss-by-place",
            "Next-token loss by place in the text",
            "Mean loss of the tokens at each place, without and with the adapter. Lower is better predicted.",
            x,
            {"label": "loss (nats per token)", "kind": "number"},
            losses,
        ),
        _lines(
            "kl-by-place",
            "Divergence by place in the text",
            "How far the adapted model's predictions are from the base model's at each place "
            "(Kullback-Leibler). 0 means that they are the same.",
            x,
            {"label": "divergence (nats per token)", "kind": "number", "min": 0},
            [_line(positions, "position", "kl", "divergence", "tokens")],
        ),
    ]


def training_figure(training: Rows) -> dict[str, Any] | None:
    """Return the losses that the `Trainer` logged."""
    return _lines(
        "training",
        "Loss in training",
        "What the Trainer logged while it trained this adapter.",
        {"label": "step", "kind": "count"},
        {"label": "loss (nats per token)", "kind": "number"},
        [
            _line(training, "step", "loss", "training loss", None),
            _line(training, "step", "eval_loss", "evaluation loss", None),
        ],
    )


def _lines(
    key: str, title: str, about: str, x: dict[str, Any], y: dict[str, Any], series: Sequence[dict[str, Any]]
) -> dict[str, Any] | None:
    series = [one for one in series if one["points"]]
    if not series:
        return None
    ends = "; ".join(
        f"{one['name']} {number(one['points'][0][1])} at first, {number(one['points'][-1][1])} at last"
        for one in series
    )
    thinned = " Several places are drawn as one." if any(one.pop("thinned") for one in series) else ""
    return {
        "id": key,
        "title": title,
        "about": about + thinned,
        "alt": f"Line plot: {ends}.",
        "x": x,
        "y": y,
        "line": True,
        "series": series,
    }


def _line(rows: Rows, x: str, y: str, name: str, weight: str | None) -> dict[str, Any]:
    """A line with few enough points: where there are more, means of neighbours."""
    known = sorted(
        (float(row[x]), float(row[y]), float(row.get(weight) or 0) if weight else 1.0)
        for row in rows
        if _is_number(row.get(x)) and _is_number(row.get(y))
    )
    step = max(1, math.ceil(len(known) / _LINE_POINTS))
    points: list[Point] = []
    for start in range(0, len(known), step):
        part = known[start : start + step]
        total = sum(one[2] for one in part) or 1.0
        value = sum(one[1] * one[2] for one in part) / total if len(part) > 1 else part[0][1]
        first, last = number(part[0][0], 6), number(part[-1][0], 6)
        place = f"{x} {first}" if len(part) == 1 else f"{x}s {first} to {last}"
        tokens = [count(int(total), "token")] if weight else []
        points.append([part[len(part) // 2][0], value, [name, f"{place}: {number(value, 4)}", *tokens], None])
    return {"name": name, "points": points, "thinned": step > 1}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _blocks(rows: Rows) -> dict[str, Any]:
    """The axis of the blocks; what belongs to none stands behind the last."""
    axis: dict[str, Any] = {"label": "block of the model", "kind": "count", "min": -0.5, "max": _head(rows) - 0.5}
    if any(row.get("block") is None for row in rows):
        axis |= {"max": _head(rows) + 0.5, "names": [[_head(rows), "head"]]}
    return axis


def _head(rows: Rows) -> int:
    return 1 + max((row["block"] for row in rows if row.get("block") is not None), default=-1)


def _types(rows: Rows) -> list[tuple[str, str]]:
    """Kinds of modules, each with its side, in the order of their first rows; rare ones are put together."""
    return list(dict.fromkeys(_type(row) for row in rows))


def _type(row: dict[str, Any]) -> tuple[str, str]:
    return str(row["module"]).rsplit(".", 1)[-1], SIDES.get(str(row.get("side")), "")


def _x(row: dict[str, Any], rows: Rows, types: list[tuple[str, str]]) -> float:
    """The block, and a little to the side for each kind of module, so that marks do not cover each other."""
    block = _head(rows) if row.get("block") is None else row["block"]
    return float(block + 0.64 * ((types.index(_type(row)) + 0.5) / len(types) - 0.5))


def _by_type(rows: Rows, point: Callable[[dict[str, Any]], Point]) -> list[dict[str, Any]]:
    types = _types(rows)
    series: dict[tuple[str, str], list[Point]] = {}
    for row in rows:
        name, side = kind = _type(row)
        if types.index(kind) >= _SERIES - 1 and len(types) > _SERIES:
            kind = ("other modules", "")
        y, tip, end = point(row)
        lines = [f"{row['module']}{f' ({side})' if side else ''}", *tip]
        series.setdefault(kind, []).append([_x(row, rows, types), y, lines, end])
    return [
        {"name": f"{name} ({side})" if side else name, "points": points, "hollow": side == SIDES["write"]}
        for (name, side), points in series.items()
    ]


def _places(rows: Rows, value: Callable[[dict[str, Any]], float | None]) -> list[Point]:
    types = _types(rows)
    return [[_x(row, rows, types), value(row)] for row in rows if value(row) is not None]
