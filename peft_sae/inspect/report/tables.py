"""What the tables of the report show; its script builds them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ..activations import ACTIVATION_COLUMNS
from ..feature_tables import FEATURE_COLUMNS
from ..modules import COLUMNS
from .wording import SIDES

_GROUPS = {"chosen": "chosen", "protected": "protected", "other": "other"}
_CHANGES = {"up": "strengthened", "down": "weakened"}


class Column(NamedTuple):
    """A column.

    Attributes:
        key: which value of a row.
        head: its name.
        kind: how it is shown: text, name (with a link, if the row has one), side, tokens, examples, number, share,
            times, signed or degrees.
        second: another value of the row that is shown in the same cell.
    """

    key: str
    head: str
    kind: str = "number"
    second: str | None = None


_NAME = Column("name", "feature", "name")
_LABEL = Column("label", "label", "text")

_FEATURES = (
    _NAME,
    _LABEL,
    Column("tokens", "promotes", "tokens"),
    Column("group", "group", "text"),
    Column("side", "side", "side"),
    Column("share", "share", "share"),
    Column("times_chance", "× chance", "times"),  # noqa: RUF001
    Column("times_typical", "× typical", "times"),  # noqa: RUF001
    Column("unique", "unique", "share"),
    Column("sign", "sign", "signed"),
    Column("top_module", "top module", "text"),
    Column("top_share", "share there", "share"),
)
_ACTIVATIONS = (
    _NAME,
    _LABEL,
    Column("group", "group", "text"),
    Column("mean_before", "before"),
    Column("mean_after", "after"),
    Column("change", "change", "signed"),
    Column("error", "± error"),
    Column("rate_before", "fires before", "share"),
    Column("rate_after", "fires after", "share"),
    Column("promoted", "raises ↑, lowers ↓", "tokens", "suppressed"),
    Column("examples", "texts", "examples"),
)
_MODULES = (
    Column("module", "module", "name"),
    Column("block", "block"),
    Column("side", "side", "side"),
    Column("hook_name", "hook point", "text"),
    Column("rank", "rank"),
    Column("r", "r"),
    Column("norm", "norm"),
    Column("relative_norm", "of the weight", "share"),
    Column("singular_values", "singular values", "spark"),
    Column("basis", "basis"),
    Column("in_basis", "in basis", "share"),
    Column("drift", "drift", "share"),
    Column("in_random", "in random", "share"),
    Column("largest_angle", "largest angle", "degrees"),
    Column("mean_angle", "mean angle", "degrees"),
    Column("random_mean_angle", "mean to random", "degrees"),
)


class Table(NamedTuple):
    """A table.

    Attributes:
        noun: what its rows are.
        columns: its columns.
        meanings: what every value means.
        picks: values of a column to choose from, as head, column and what the values are called.
        sort: the column that it comes sorted by, largest first.
        hint: what can be searched for.
    """

    noun: str
    columns: tuple[Column, ...]
    meanings: Mapping[str, str]
    picks: tuple[tuple[str, str, Mapping[str, str]], ...]
    sort: str | None
    hint: str


TABLES = {
    "features": Table(
        "features",
        _FEATURES,
        FEATURE_COLUMNS,
        (("Side", "side", SIDES), ("Group", "group", _GROUPS)),
        "share",
        "name, label, token or module",
    ),
    "activations": Table(
        "features",
        _ACTIVATIONS,
        ACTIVATION_COLUMNS,
        (("Change", "change", _CHANGES), ("Group", "group", _GROUPS)),
        None,
        "name, label, token or text",
    ),
    "modules": Table("modules", _MODULES, COLUMNS, (("Side", "side", SIDES),), None, "module or hook point"),
}


def known_columns(table: Table, rows: list[dict[str, Any]]) -> list[Column]:
    """Return the columns that any row has a value for."""
    return [column for column in table.columns if any(row.get(column.key) not in (None, [], "") for row in rows)]


def table_view(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what the script needs to build a table."""
    table = TABLES[name]
    columns = [
        {**column._asdict(), "meaning": table.meanings.get(column.key, "")} for column in known_columns(table, rows)
    ]
    picks = [
        {"head": head, "key": key, "options": [[value, called] for value, called in options.items()]}
        for head, key, options in table.picks
    ]
    return {"noun": table.noun, "columns": columns, "picks": picks, "sort": table.sort, "hint": table.hint}
