"""The sets of prompts that models are asked."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.paper.specs import SetSpec
from peft_sae.artifact import looks_like_path
from peft_sae.errors import DataError
from peft_sae.jobs.data import open_data
from peft_sae.statistics.records import iterate_records, split_preferences

_HUMAN, _ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
_CATEGORY = re.compile(r"category_(\d+)\.csv", re.IGNORECASE)


@dataclass(frozen=True)
class Prompt:
    """A prompt.

    Attributes:
        id: its place in the source, for humans.
        text: what is asked, without any form around it.
        category: what it is about, or None.
    """

    id: str
    text: str
    category: str | None = None


def load_prompts(name: str, spec: SetSpec) -> list[Prompt]:
    """Return the prompts of a set: all, or as many as it says, drawn with its seed and kept in the source's order.

    Of equal prompts there is one: a greedy model says the same to each, and they would pass for independent.

    Raises:
        DataError: the source is not there, lacks a column, or has fewer prompts than asked for.
    """
    readers = {"column": _columns, "hh_rlhf": _dialogues, "hex_phi": _hex_phi}
    unique: dict[str, Prompt] = {}
    for prompt in readers[spec.form](name, spec):
        unique.setdefault(prompt.text, prompt)
    found = list(unique.values())
    if not found:
        raise DataError(f"The set {name!r} has no prompts. Correct its source{', or keep' if spec.keep else ''}.")
    if spec.count is None:
        return found
    if spec.count > len(found):
        raise DataError(
            f"The set {name!r} has {len(found)} prompts, and count={spec.count} asks for more. Lower it, or leave it "
            "out for all of them."
        )
    chosen = random.Random(f"{spec.seed}/{name}").sample(range(len(found)), spec.count)
    return [found[index] for index in sorted(chosen)]


def _columns(name: str, spec: SetSpec) -> Iterator[Prompt]:
    wanted = [spec.column, *spec.keep, *([] if spec.category is None else [spec.category])]
    for number, found in enumerate(iterate_records(open_data(spec.source, name), name)):
        record: Any = found
        missing = [column for column in wanted if not isinstance(record, Mapping) or column not in record]
        if missing:
            there = sorted(record) if isinstance(record, Mapping) else type(record).__name__
            raise DataError(f"Record {number} of the set {name!r} has {there}, and lacks {missing}. Name its columns.")
        if all(record[column] == value for column, value in spec.keep.items()):
            category = None if spec.category is None else str(record[spec.category])
            yield Prompt(str(number), _text(record[spec.column], name, number), category)


def _text(found: Any, name: str, number: int) -> str:
    if not isinstance(found, str) or not found.strip():
        raise DataError(f"Prompt {number} of the set {name!r} is {found!r}, and no text. Correct the source.")
    return found.strip()


def _dialogues(name: str, spec: SetSpec) -> Iterator[Prompt]:
    """Prompts of HH-RLHF, whose dialogues are one text with speakers' names in it.

    Chosen and rejected dialogue have a beginning in common; the prompt lies in it. Of all turns the names of the
    speakers are part of the prompt, except the first and the last one, which the prompt's form adds.
    """
    choices, _ = split_preferences(open_data(spec.source, name))
    for number, record in enumerate(choices):
        head = record["prompt"] if isinstance(record, Mapping) else ""
        end = head.rfind(_ASSISTANT) if isinstance(head, str) else -1
        if not isinstance(head, str) or not head.startswith(_HUMAN) or end < 0:
            raise DataError(
                f"Dialogue {number} of the set {name!r} does not begin with {_HUMAN!r} and an {_ASSISTANT!r} that both "
                "answers have in common. Use form: column for prompts that lie in a column."
            )
        text = head[len(_HUMAN) : end]
        if spec.turns == "first":
            text = text.split(_ASSISTANT, 1)[0].split(_HUMAN, 1)[0]
        if text.strip():  # in a few dialogues the human says nothing
            yield Prompt(str(number), text.strip())


def _hex_phi(name: str, spec: SetSpec) -> Iterator[Prompt]:
    """Prompts of HEx-PHI (arXiv 2310.03693): a CSV file per category, a prompt per line, no header."""
    import csv

    folder = _folder(name, spec)
    files = {int(match[1]): path for path in folder.iterdir() if (match := _CATEGORY.fullmatch(path.name))}
    if not files:
        raise DataError(f"The set {name!r} has no files such as category_1.csv in '{folder}'. Correct its source.")
    for number in sorted(files):
        try:
            with files[number].open(encoding="utf-8-sig", newline="") as file:
                rows = list(csv.reader(file, strict=True))
        except (UnicodeDecodeError, csv.Error) as error:
            raise DataError(
                f"'{files[number]}' of the set {name!r} is no CSV file in UTF-8 ({error}). Download it again."
            ) from error
        for line, row in enumerate(rows, start=1):
            if any(cell.strip() for cell in row):
                # A prompt with a comma that nobody quoted falls into several cells.
                text = _text(",".join(row), name, line)
                if "\n" in text:
                    raise DataError(
                        f"Row {line} of '{files[number]}' goes over several lines, so a quotation mark is left open "
                        "and prompts would be lost. Correct the file."
                    )
                yield Prompt(f"{number}/{line}", text, f"category {number}")


def _folder(name: str, spec: SetSpec) -> Path:
    source: Any = {"path": spec.source} if isinstance(spec.source, str) else spec.source
    path, revision = str(source["path"]), source.get("revision")
    if Path(path).is_dir():
        return Path(path)
    if looks_like_path(path):
        raise DataError(f"The folder '{path}' of the set {name!r} does not exist. Correct its source.")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, repo_type="dataset", revision=revision, allow_patterns="category_*.csv"))
    except Exception as error:  # of the network, of the Hub, of rights
        raise DataError(
            f"The set {name!r} cannot be had from '{path}' ({type(error).__name__}: {error}). Ask there for access and "
            "log in with `hf auth login`, or give a folder with its files."
        ) from error
