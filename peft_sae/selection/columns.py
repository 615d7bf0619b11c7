"""The columns of a feature table, whatever it is written in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from .table import FeatureRow


class Column(NamedTuple):
    """A column of numbers or names.

    Attributes:
        head: its name.
        value: what it is sorted by.
        text: how it is shown.
        number: whether it holds numbers.
    """

    head: str
    value: Callable[[FeatureRow], float | str]
    text: Callable[[FeatureRow], str]
    number: bool = True


def number_text(value: float) -> str:
    """Return a number with four significant digits at most."""
    return f"{value:.4g}"


def rate_text(value: float) -> str:
    """Return a share in per cent."""
    return f"{100 * value:.1f} %"


NUMBERS = (
    Column("score", lambda row: row.score, lambda row: number_text(row.score)),
    Column("q", lambda row: row.q_value, lambda row: f"{row.q_value:.2g}"),
    Column("mean aligned", lambda row: row.aligned_mean, lambda row: number_text(row.aligned_mean)),
    Column("mean unaligned", lambda row: row.unaligned_mean, lambda row: number_text(row.unaligned_mean)),
    Column("fires aligned", lambda row: row.aligned_rate, lambda row: rate_text(row.aligned_rate)),
    Column("fires unaligned", lambda row: row.unaligned_rate, lambda row: rate_text(row.unaligned_rate)),
)

EXTRAS = ("label", "promoted", "suppressed", "examples")
EXTRA_HEADS = {"label": "label", "promoted": "promotes", "suppressed": "suppresses", "examples": "texts"}


def known_extras(rows: Sequence[FeatureRow]) -> list[str]:
    """Return which of the attributes `EXTRAS` any row has, so that no column is empty."""
    return [name for name in EXTRAS if any(getattr(row, name) for row in rows)]


def word(token: str) -> str:
    """Return a token as it is listed: without the space before it, or that space alone."""
    return token.strip(" ") or "␣"
