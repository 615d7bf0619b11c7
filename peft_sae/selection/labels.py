"""What people call features: from a file, or from Neuronpedia."""

from __future__ import annotations

import csv
import gzip
import json
import logging
import queue
import re
import threading
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator, Mapping
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ..errors import ConfigError, DataError, suggest
from ..escape import visible
from ..sae.names import feature_name
from .select import Selection

logger = logging.getLogger(__name__)

_NAME = re.compile(r"[^:\s][^:]*:[0-9]{1,9}")
_SUFFIXES = (".json", ".jsonl", ".csv", ".json.gz", ".jsonl.gz", ".csv.gz")
_WORKERS = 4
_LARGEST_FILE = 2**28
_LONGEST_LABEL = 1000  # characters
_MAX_ANSWER = 2**25  # bytes


def read_labels(path: str | Path) -> dict[str, str]:
    """Return labels by the names of features, from a file of the user's.

    The file is one of these, compressed with gzip or not:

    - JSON: an object, `{"12:4051": "politeness", "blocks.20.hook_resid_post:7": "weapons"}`;
    - JSONL: records `{"feature": "12:4051", "label": "politeness"}`, also as a list in a JSON file;
    - CSV with the columns `feature` and `label`.

    Records may have the form of Neuronpedia's exports of explanations instead, with `modelId`, `layer` (such as
    `20-gemmascope-res-16k`), `index` and `description`. The first explanation of a feature counts, and its name is
    `gemma-2-2b/20-gemmascope-res-16k:4051`, which `describe_features` finds by the SAE's `neuronpedia_id`.

    Raises:
        ConfigError: unknown suffix.
        DataError: the file cannot be read, an entry has another form, or a feature has two labels.
    """
    path = Path(path)
    kind = "".join(path.suffixes[-2:] if path.suffix.lower() == ".gz" else path.suffixes[-1:]).lower()
    if kind not in _SUFFIXES:
        raise ConfigError(
            f"'{path}' has the suffix {kind!r}, so the form of the labels is unknown.{suggest(kind, _SUFFIXES)} Use "
            f"one of {', '.join(_SUFFIXES)}."
        )
    labels: dict[str, str] = {}
    for place, record in _records(path, kind.removesuffix(".gz")):
        name, label, exported = _entry(record, f"{place} of '{path}'")
        if not label:
            continue
        if not exported and labels.get(name, label) != label:
            raise DataError(
                f"{place} of '{path}' calls {name!r} {label!r}, which is {labels[name]!r} before. Keep one of the two."
            )
        labels.setdefault(name, label)
    return labels


def _records(path: Path, kind: str) -> Iterator[tuple[str, Any]]:
    """The records of a file, each with its place in words."""
    try:
        _check_size(path)
        with (gzip.open if path.suffix.lower() == ".gz" else open)(
            path, "rt", encoding="utf-8-sig", newline=""
        ) as file:
            if kind == ".csv":
                yield from _csv_records(csv.DictReader(file), path)
            elif kind == ".jsonl":
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        yield f"Line {number}", _parse(line, f"Line {number} of '{path}'")
            else:
                content = _parse(file.read(), f"'{path}'")
                if isinstance(content, dict):
                    content = [{"feature": name, "label": label} for name, label in content.items()]
                if not isinstance(content, list):
                    raise DataError(f"'{path}' holds a {type(content).__name__}. Give an object or a list of records.")
                yield from ((f"Entry {number}", record) for number, record in enumerate(content, start=1))
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"The labels '{path}' cannot be read ({error}). Check the path.") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"'{path}' is no text of the form {kind} in UTF-8 ({error}). Convert the file.") from error


def _check_size(path: Path) -> None:
    """Refuse a file that a bomb would unpack to, before it is in memory."""
    left = _LARGEST_FILE
    with (gzip.open if path.suffix.lower() == ".gz" else open)(path, "rb") as file:
        while chunk := file.read(2**20):
            left -= len(chunk)
            if left < 0:
                raise DataError(
                    f"The labels '{path}' hold more than {_LARGEST_FILE // 2**20} MiB of text, more than any SAE has "
                    "labels for. Give the labels of one SAE."
                )


def _csv_records(reader: csv.DictReader[str], path: Path) -> Iterator[tuple[str, Any]]:
    missing = sorted({"feature", "label"} - set(reader.fieldnames or ()))
    if missing and not {"layer", "index", "description"} <= set(reader.fieldnames or ()):
        raise DataError(f"'{path}' lacks the columns {missing}. Begin the file with the line: feature,label")
    for record in reader:
        yield f"Line {reader.line_num}", record


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place} is not JSON ({error}). Mend it.") from error


def _entry(record: Any, place: str) -> tuple[str, str, bool]:
    """Name, label, and whether it is from an export."""
    if not isinstance(record, Mapping):
        raise DataError(f"{place} is {str(record)[:60]!r} instead of a record with 'feature' and 'label'.")
    exported = {"layer", "index", "description"} <= set(record) and "feature" not in record
    name: Any
    label: Any
    if exported:
        source = f"{record['modelId']}/{record['layer']}" if record.get("modelId") else str(record["layer"])
        name, label = f"{source}:{record['index']}", record["description"] or ""
    else:
        name, label = record.get("feature"), record.get("label")
    if not isinstance(name, str) or _NAME.fullmatch(name.strip()) is None:
        raise DataError(
            f"{place} names the feature {name!r}. Write the hook point and the id, as in "
            "'blocks.12.hook_resid_post:4051', or the block and the id, as in '12:4051'."
        )
    if not isinstance(label, str):
        raise DataError(f"{place} gives {name!r} the label {label!r}, which is no text. Give a text.")
    return name.strip(), label.strip()[:_LONGEST_LABEL], exported


def fetch_labels(
    selection: Selection, *, timeout: float = 5.0, server: str = "https://www.neuronpedia.org"
) -> dict[str, str]:
    """Ask Neuronpedia what it calls the chosen features. Nothing else of this package asks the network for labels.

    One request per feature, the best features first (GET /api/feature/MODEL/SOURCE/INDEX, of which the first
    explanation counts; docs.neuronpedia.org/api-and-data/api). For hundreds of features download an export of
    explanations instead, and give it to `read_labels`.

    Args:
        selection: the chosen features. Those of SAEs without a `neuronpedia_id` are left out.
        timeout: seconds after which it returns what it has got.
        server: address of the site.

    Returns:
        Labels by the features' names. Whatever goes wrong is told as a warning in the log, never raised.

    Raises:
        ConfigError: an argument is out of range.
    """
    if not timeout > 0:
        raise ConfigError(f"timeout={timeout} leaves no time to ask. Use a number of seconds above 0.")
    if not server.startswith(("https://", "http://")):
        raise ConfigError(f"server={server!r} is no address. Use one that begins with https://.")
    asked = [
        (place, feature_name(site.sae, feature), f"{quote(site.sae.neuronpedia_id)}/{feature}")
        for site in selection.sites
        if site.sae.neuronpedia_id
        for place, feature in enumerate(site.features.tolist())
    ]
    if not asked:
        logger.warning("None of the SAEs has a Neuronpedia id, so no labels are fetched.")
        return {}
    fetch = _Fetch(server.rstrip("/"), time.monotonic() + timeout)
    for _, name, address in sorted(asked, key=lambda entry: entry[0]):
        fetch.waiting.put((name, address))
    return fetch.run(len(asked))


class _Fetch:
    """Requests that run beside each other until all are done or the time is up."""

    def __init__(self, server: str, deadline: float) -> None:
        self.waiting: queue.Queue[tuple[str, str]] = queue.Queue()
        self._server, self._deadline = server, deadline
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._labels: dict[str, str] = {}
        self._problems: list[str] = []
        self._answered = 0

    def run(self, count: int) -> dict[str, str]:
        """Return the labels that came in time, and warn of the others."""
        # Not a pool: the interpreter would wait at its end for a server that trickles.
        threads = [threading.Thread(target=self._work, daemon=True) for _ in range(min(_WORKERS, count))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(0.0, self._deadline - time.monotonic()))
        self._stop.set()
        with self._lock:
            labels, problems, answered = dict(self._labels), list(self._problems), self._answered
        if answered < count:
            reason = problems[0] if problems else "the time was up"
            logger.warning(
                "%d of %d features got no answer from %s: %s.", count - answered, count, self._server, reason
            )
        return labels

    def _work(self) -> None:
        while not self._stop.is_set():
            left = self._deadline - time.monotonic()
            try:
                name, address = self.waiting.get_nowait()
            except queue.Empty:
                return
            if left <= 0:
                return
            try:
                label = self._ask(f"{self._server}/api/feature/{address}", left)
            except Exception as error:  # never fails the run
                with self._lock:
                    self._problems.append(visible(f"{error} ({address})"))
                unreachable = isinstance(error, (OSError, HTTPException)) and not isinstance(
                    error, urllib.error.HTTPError
                )
                if unreachable or getattr(error, "code", 0) == 429:  # asking for the others would be no better
                    self._stop.set()
                continue
            with self._lock:
                self._answered += 1
                if label:
                    self._labels[name] = label

    @staticmethod
    def _ask(url: str, timeout: float) -> str:
        request = urllib.request.Request(url, headers={"Accept": "application/json", "User-Agent": "peft-sae"})
        with urllib.request.urlopen(request, timeout=timeout) as response:
            answer = json.loads(response.read(_MAX_ANSWER))
        if not isinstance(answer, dict) or not isinstance(answer.get("explanations", []), list):
            raise ValueError("the answer has another form than expected")
        for explanation in answer.get("explanations", []):
            description = explanation.get("description") if isinstance(explanation, dict) else None
            if isinstance(description, str) and description.strip():
                return description.strip()[:_LONGEST_LABEL]
        return ""
