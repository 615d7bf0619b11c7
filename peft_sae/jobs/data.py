"""Data sets that a job names: files here, or sets of the Hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from ..artifact import looks_like_path
from ..errors import ConfigError, DataError, suggest
from ..statistics.records import Data, check_data

Source: TypeAlias = "str | Mapping[str, Any]"

_KEYS = ("path", "name", "split", "revision", "data_files", "data_dir")
_BUILDERS = {".json": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow"}
_LINES = (".jsonl", ".ndjson", ".txt")


def source_problems(source: Any, key: str) -> list[str]:
    """Say what is wrong with the form of a source; an empty list if nothing is."""
    if not isinstance(source, Mapping):
        return []
    problems = [
        f"{key}.{name} is no key of a data set.{suggest(str(name), _KEYS)} Known: {list(_KEYS)}."
        for name in source
        if name not in _KEYS
    ]
    return problems if source.get("path") else [*problems, f"{key} lacks 'path', the id of a data set of the Hub."]


def open_data(source: Source, label: str) -> Data:
    """Return the records that a job names.

    Args:
        source: a JSONL file, which is read as a stream; a file in JSON, CSV, Parquet or Arrow format; a folder that
            `datasets` saved; the id of a data set of the Hub, of which the split `train` is taken; or a mapping with
            `path` and perhaps `name`, `split`, `revision`, `data_files` and `data_dir`, see `datasets.load_dataset`.
        label: how errors call it.

    Raises:
        DataError: it is not there, or damaged.
        ConfigError: a mapping with wrong keys.
    """
    problems = source_problems(source, label)
    if problems:
        raise ConfigError(" ".join(problems))
    if isinstance(source, Mapping):
        return _load(label, **{"split": "train", **source})
    path = Path(source)
    suffix = path.suffix.lower()
    if path.is_dir():
        return _from_disk(path, label)
    if suffix in _BUILDERS and path.is_file():
        return _load(label, path=_BUILDERS[suffix], data_files=str(path), split="train")
    if path.exists() or _is_local(source):
        check_data(source, label)
        return source
    return _load(label, path=source, split="train")


def check_source(source: Source | None, label: str) -> None:
    """Check the records of a source that is a file or a folder here, and ask no network for others.

    Raises:
        DataError: it is not there, or damaged.
    """
    if isinstance(source, str) and (_is_local(source) or Path(source).exists()):
        open_data(source, label)


def _is_local(source: str) -> bool:
    return Path(source).suffix.lower() in (*_BUILDERS, *_LINES) or looks_like_path(source)


def _load(label: str, **arguments: Any) -> Data:
    from datasets import load_dataset

    try:
        found: Data = load_dataset(**arguments)
    except Exception as error:  # of the network, of the Hub, of whatever a file holds
        raise DataError(
            f"The {label} data {arguments['path']!r} are no file here, and cannot be loaded as a data set "
            f"({type(error).__name__}: {error}). Check the path, the id, the split and the network."
        ) from error
    return found


def _from_disk(folder: Path, label: str) -> Data:
    from datasets import load_from_disk

    try:
        found: Data = load_from_disk(str(folder))
    except Exception as error:
        raise DataError(
            f"The {label} data '{folder}' are a folder that `datasets` cannot load ({error}). Give a file, or a folder "
            "that `Dataset.save_to_disk` wrote."
        ) from error
    return found
