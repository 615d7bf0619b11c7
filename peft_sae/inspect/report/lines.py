"""The report's plots of lines: by place in the text, and by step of the training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .wording import count, number

_LINE_POINTS = 400  # of one line: a page shows no more

Point = list[Any]  # [x, y, lines of the tooltip, far end of a bar or None]
Rows = list[dict[str, Any]]


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
        {"label": "loss (nats)", "kind": "number"},
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
