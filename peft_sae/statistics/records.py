"""The records of a user's data set, wherever they lie."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from ..errors import DataError

Record: TypeAlias = "str | Mapping[str, Any]"
Data: TypeAlias = "str | Path | Iterable[Record]"


def check_data(data: Data, label: str) -> None:
    """Read a file of records through, so that a bad line is told before the long work and not in its midst.

    Raises:
        DataError: it cannot be opened, is empty, or a record has none of the known forms or no text.
    """
    if not isinstance(data, (str, Path)):
        return
    number = -1
    for number, record in enumerate(iterate_records(data, label)):
        problem = _problem(record)
        if problem:
            raise DataError(
                f"Record {number} of the {label} data '{data}' {problem}. Give strings, or records with 'text', with "
                "'prompt' and 'completion', with 'messages', or with 'chosen' and 'rejected'."
            )
    if number < 0:
        raise DataError(f"The {label} data '{data}' is empty, so there is nothing to read. Give at least one text.")


def _problem(record: Any) -> str | None:
    if isinstance(record, Mapping) and not {"messages", "completion", "chosen"} & set(record):
        record = record.get("text")
        if record is None:
            return "has no text"
    if isinstance(record, str):
        return None if record.strip() else "is empty"
    return None if isinstance(record, Mapping) else f"is of type {type(record).__name__}"


def iterate_records(data: Data, label: str) -> Iterator[Record]:
    """Yield the records of a data set: a `datasets.Dataset`, an iterable, or a path to a JSONL file.

    Raises:
        DataError: the file is missing or a line of it is not JSON.
    """
    if isinstance(data, Mapping):
        raise DataError(
            f"The {label} data is a mapping with the keys {list(data)[:5]}, and a sequence of records is needed. Give "
            "one of its splits, or a list."
        )
    if not isinstance(data, (str, Path)):
        yield from data
        return
    try:
        with Path(data).open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _parse_line(line, number, data)
    except OSError as error:
        raise DataError(
            f"The {label} data {str(data)!r} cannot be opened ({error.strerror}). Give the path of a JSONL file, a "
            "list, or a datasets.Dataset."
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"'{data}' is not UTF-8 text ({error}). Convert the file.") from error


def _parse_line(line: str, number: int, file: str | Path) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"Line {number} of '{file}' is not JSON ({error}). Mend the line.") from error


class _View:
    """The records of a data set, each turned into another; it can be read as often as the data set can."""

    def __init__(self, data: Data, turn: Callable[[Record, int], Record]) -> None:
        self._data = data
        self._turn = turn

    def __iter__(self) -> Iterator[Record]:
        for number, record in enumerate(iterate_records(self._data, "preference")):
            yield self._turn(record, number)

    def __len__(self) -> int:
        """Return the number of records; TypeError where the data set does not know it."""
        return len(self._data)  # type: ignore[arg-type]


def split_preferences(data: Data) -> tuple[Iterable[Record], Iterable[Record]]:
    """Return preference data as the aligned and the unaligned set: the chosen and the rejected answers.

    Args:
        data: records with `chosen` and `rejected`, both texts or both lists of messages, and perhaps with `prompt`.
            Where there is none, what both texts begin with is the prompt, up to the last space in it (as TRL does); of
            messages, those that both begin with.

    Returns:
        Two views of records with `prompt` and `completion`, read when they are iterated.

    Raises:
        DataError: when read, if a record has another form.
    """
    return _View(data, _choice("chosen")), _View(data, _choice("rejected"))


def _choice(name: str) -> Callable[[Record, int], Record]:
    def turn(record: Record, number: int) -> Record:
        answers = [record.get(key) for key in ("chosen", "rejected")] if isinstance(record, Mapping) else [None, None]
        kinds = {type(answer) for answer in answers}
        if not isinstance(record, Mapping) or len(kinds) != 1 or not kinds <= {str, list}:
            found = sorted(record) if isinstance(record, Mapping) else type(record).__name__
            raise DataError(
                f"Example {number} has {found}, and 'chosen' and 'rejected' are needed, both texts or both lists of "
                "messages. Rename the columns, or give the two sets apart."
            )
        mine: Any = record[name]
        if "prompt" in record:
            return {"prompt": record["prompt"], "completion": mine}
        border = _common(*answers)
        return {"prompt": mine[:border], "completion": mine[border:]}

    return turn


def _common(first: Any, second: Any) -> int:
    """How much two texts, or two lists of messages, have in common at their beginning."""
    length = next((i for i, (one, other) in enumerate(zip(first, second, strict=False)) if one != other), None)
    length = min(len(first), len(second)) if length is None else length
    if isinstance(first, str):
        while length and not first[length - 1].isspace():
            length -= 1
        length -= bool(length)  # the space belongs to the answer, as tokenizers have it
    return length
