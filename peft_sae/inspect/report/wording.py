"""How numbers and names are written in the report."""

from __future__ import annotations

from typing import Any

UNKNOWN = "–"  # noqa: RUF001
SIDES = {"read": "reads", "write": "writes"}


def number(value: float | None, digits: int = 3) -> str:
    """Return a number with some significant digits."""
    if value is None:
        return UNKNOWN
    text = f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"
    return text.replace("-", "\N{MINUS SIGN}").replace(",", "\N{NARROW NO-BREAK SPACE}")


def percent(value: float | None) -> str:
    """Return a share in per cent."""
    return UNKNOWN if value is None else f"{number(100 * value)} %"


def degrees(value: float | None) -> str:
    """Return an angle."""
    return UNKNOWN if value is None else f"{number(value)}°"


def signed(value: float | None) -> str:
    """Return a number with its sign."""
    return number(value) if value is None or value <= 0 else f"+{number(value)}"


def count(value: int | None, noun: str) -> str:
    """Return a number of things."""
    return f"{number(value)} {noun}{'' if value == 1 else 's'}"


def called(row: dict[str, Any]) -> str:
    """Return a feature's name, with its label if it has one."""
    return f"{row['name']} ({row['label']})" if row.get("label") else str(row["name"])


def mean(rows: list[dict[str, Any]], key: str) -> float | None:
    """Return the mean of what is known in a column."""
    known = [row[key] for row in rows if row.get(key) is not None]
    return sum(known) / len(known) if known else None
