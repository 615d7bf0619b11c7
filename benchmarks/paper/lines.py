"""A cache of results in JSONL that is written line by line, so that a run that was stopped goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.common import cut_torn_line
from peft_sae.errors import ArtifactError
from peft_sae.writing import alone, check_writable

_T = TypeVar("_T")


def key_of(*parts: Any) -> str:
    """Return what a result depends on as 32 hexadecimal digits; the parts are JSON-serialisable."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=True).encode()).hexdigest()[:32]


class Lines(Mapping[str, Mapping[str, Any]]):
    """Rows by their key, of which the later one counts if there are two. Made by `open_lines`."""

    def __init__(self, path: Path, rows: dict[str, Mapping[str, Any]]) -> None:
        self._path, self._rows = path, rows

    def __getitem__(self, key: str) -> Mapping[str, Any]:
        return self._rows[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._rows)

    def missing(self, keys: Sequence[str], items: Sequence[_T]) -> dict[str, _T]:
        """Return the items that have no row yet by their keys, each key once."""
        return {key: item for key, item in zip(keys, items, strict=True) if key not in self}

    def add(self, key: str, row: Mapping[str, Any]) -> None:
        """Add a row, on the disk too when this returns.

        Raises:
            ArtifactError: it cannot be written.
        """
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, **row}, ensure_ascii=True) + "\n")
        except OSError as error:
            raise ArtifactError(
                f"'{self._path}' cannot be written ({error.strerror}). What is in it is kept: make room, and start "
                "again."
            ) from error
        self._rows[key] = row


def read_lines(path: Path) -> dict[str, Mapping[str, Any]]:
    """Return the rows of a cache by key; none if there is no file. A last line that a stop has cut is left out.

    Raises:
        ArtifactError: a line is damaged that no stop has cut.
    """
    rows, content = {}, path.read_bytes() if path.is_file() else b""
    for number, line in enumerate(content[: content.rfind(b"\n") + 1].splitlines(), start=1):
        try:
            row = json.loads(line)
            rows[row.pop("key")] = row
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ArtifactError(
                f"Line {number} of '{path}' is no row of a cache ({type(error).__name__}), so what was paid for may be "
                "lost. Remove the line to make its result again, or restore the file."
            ) from error
    return rows


@contextmanager
def open_lines(path: Path) -> Iterator[Lines]:
    """Yield the cache in a file, which no other process may write meanwhile.

    Raises:
        ArtifactError: it is damaged, in use, or cannot be written.
    """
    check_writable(path)
    with alone(path):
        rows = read_lines(path)
        cut_torn_line(path)
        yield Lines(path, rows)
