"""What the runs have written: a row of JSON per method, base and draw."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import cut_torn_line
from peft_sae.errors import ConfigError

UNKNOWN = "not recorded"


def key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a row is of."""
    return tuple(row[name] for name in ("base", "draw", "method", "dangerous"))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read what a run has written so far, one row of each kind; a line that a stop has cut is left out.

    Raises:
        ConfigError: another line is damaged.
    """
    if not path.is_file():
        return []
    return list({key(row): row for row in _whole_lines(path.read_text(), path)}.values())


def _whole_lines(text: str, path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(text.splitlines(keepends=True), start=1):
        if line.endswith("\n"):
            try:
                yield json.loads(line)
            except ValueError as error:
                raise ConfigError(
                    f"Line {number} of '{path}' is damaged ({error}), so its run is lost. Remove the line to run "
                    "it again."
                ) from error


def ready_rows(paths: Sequence[Path], how: Mapping[str, Any]) -> None:
    """Make files ready to be added to: what a stop has cut is cut off.

    Raises:
        ConfigError: a file is damaged, or has rows of another kind of run.
    """
    for path in paths:
        if any(row["how"] != how for row in read_rows(path)):
            raise ConfigError(
                f"'{path}' holds runs of another kind than {dict(how)}, which cannot be compared. Remove it, or give "
                "another --output."
            )
        cut_torn_line(path)


def check_ground(path: Path, rows: Sequence[Mapping[str, Any]], ground: Mapping[str, Any], commit: str) -> None:
    """Refuse rows that new ones could not be compared with.

    Args:
        path: where they are.
        rows: what is there.
        ground: what all runs on a base share, see `Base.ground`.
        commit: of the code that new rows are to be made by.

    Raises:
        ConfigError: rows were made of other weights, SAEs or texts.
    """
    for row in rows:
        other = [name for name, value in ground.items() if row.get("ground", {}).get(name) != value]
        if other:
            raise ConfigError(
                f"The rows in '{path}' were made with other {' and '.join(other)} than are here (by commit "
                f"{row.get('commit', UNKNOWN)}; here {commit}), so what is run now cannot be compared with them. "
                "Remove it, or give another --output."
            )


def add_row(path: Path, row: Mapping[str, Any]) -> None:
    """Add a row."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def commits(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """How many rows were made by the code of which commit."""
    return dict(Counter(row.get("commit", UNKNOWN) for row in rows))
