"""What a job was started with, so that a second start knows what is its own."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from ..adapter import CONFIG_FILE
from ..artifact import read_json, write_json
from ..errors import ArtifactError, ConfigError
from ..statistics.statistics import FeatureStatistics
from ..subspace import Subspace
from ..training.checkpoints import FREE_ARGUMENTS, check_own
from ..writing import check_target, check_writable, discard, replace_file, tidy_up
from .training import TrainingJob

logger = logging.getLogger(__name__)

_SCHEMA, _SCHEMA_VERSION = "peft_sae.job", 1
_FILE = "request.json"
_STATISTICS = "statistics"
_OWN_STATISTICS = re.compile(r"\.?statistics(\.state(\.\d+-of-\d+)?)?(\.lock)?")
_AFTERWARDS = ("report", "merged", "lora", "architecture", "watch")  # what a trained adapter does not depend on
_SELECTING = ("model", "base", "dtype", "select", "subspace", "texts")  # what the Subspace depends on
# What a selection does with statistics that are collected already.
_CHOOSING = (
    *("top_k", "variance", "features", "direction", "min_firing_rate", "max_firing_rate", "max_cosine", "max_q"),
    *("drop", "keep", "retain_by", "retain_ratio", "seed"),
    *("protect", "protect_contrast", "protect_top_k", "protect_max_q"),
)
_FILES = ("aligned", "unaligned", "preferences", "retain", "protect_contrast", "saes", "from_statistics")
_LONGEST_READ = 2**28  # bytes; of larger files size and time must do


class Request:
    """A job and the files that it reads, kept in a file beside its checkpoints while it is not done.

    Args:
        job: what is to be done.
    """

    def __init__(self, job: TrainingJob) -> None:
        self._job = job
        self.folder = Path(f"{Path(job.output)}.checkpoints")
        self._data = json.loads(json.dumps(_describe(job), default=str))
        self._before = self._read()

    def _read(self) -> dict[str, Any]:
        path = self.folder / _FILE
        if not path.is_file():
            return {}
        try:
            found = read_json(path, schema=_SCHEMA, newest=_SCHEMA_VERSION).get("job")
        except ArtifactError as error:
            raise ConfigError(
                f"'{path}' does not say what an earlier start was to do ({error}). Remove '{self.folder}' to begin "
                "anew, or give another output."
            ) from error
        return found if isinstance(found, dict) else {}

    def _agrees(self, keys: Iterable[str]) -> bool:
        return bool(self._before) and all(self._before.get(key) == self._data.get(key) for key in keys)

    @property
    def statistics(self) -> Path:
        """Where statistics lie that nobody asked for, while the job is not done."""
        return self.folder / _STATISTICS

    @property
    def has_subspace(self) -> bool:
        """Whether an earlier start of the same job has written the Subspace."""
        return Path(self._job.subspace_source).is_dir() and self._agrees(_SELECTING)

    @cached_property
    def has_statistics(self) -> bool:
        """Whether an earlier start has collected what this one selects from, though it may have chosen otherwise."""
        before, now = ({**data, "select": _collecting(data.get("select"))} for data in (self._before, self._data))
        if not self._before or any(before.get(key) != now.get(key) for key in _SELECTING):
            return False
        try:
            FeatureStatistics.from_pretrained(self.statistics)
        except ArtifactError as error:
            logger.debug("'%s' is collected anew (%s).", self.statistics, error)
            return False
        return True

    def check_places(self) -> bool:
        """Check what is to be written, and return whether an earlier start of the same job has trained the adapter.

        Raises:
            ArtifactError, ConfigError: something is in the way.
        """
        check_own(self.folder)
        job, again = self._job, self._agrees(key for key in self._data if key not in _AFTERWARDS)
        trained = again and (Path(job.output) / CONFIG_FILE).is_file()
        for key in ("output", "merged", "lora"):
            place, same = getattr(job, key), self._before.get(key) == self._data[key]
            if place is not None and not (again and same and holds_something(place)):
                check_target(place)
                check_writable(place)
        if job.report is not None:
            check_writable(job.report)
        if job.select is None:
            Subspace.from_pretrained(job.subspace_source)  # before the model is loaded
        elif Path(job.subspace_source).exists() and not self.has_subspace:
            raise ConfigError(
                f"'{job.subspace_source}' is there already, and not from this job, so selecting would replace it. "
                "Remove the section 'select' to use it, or give another 'subspace'."
            )
        return trained

    def write(self) -> None:
        """Write the job down; statistics of another one go first, or they would pass for this one's."""
        if not self.has_statistics and self.statistics.exists():
            discard(self.statistics)
        with replace_file(self.folder / _FILE) as scratch:
            write_json(scratch, {"schema": _SCHEMA, "schema_version": _SCHEMA_VERSION, "job": self._data})

    def forget(self) -> None:
        """Remove it with what only an unfinished job needs, and the folder if nothing else is in it."""
        own = [path for path in self.folder.glob("*") if _OWN_STATISTICS.fullmatch(path.name)]
        for path in [self.statistics, *own, self.folder / _FILE]:  # in this order: till the end it is this job's
            discard(path)
        for place in (self._job.output, self._job.subspace_source, self._job.merged, self._job.lora):
            if place is not None:
                tidy_up(place)
        try:
            self.folder.rmdir()
        except OSError as error:
            logger.debug("'%s' stays (%s).", self.folder, error)


def holds_something(place: str | Path) -> bool:
    """Whether a folder is there and not empty."""
    folder = Path(place)
    return folder.is_dir() and any(folder.iterdir())


def _describe(job: TrainingJob) -> dict[str, Any]:
    """The job, less what changes nothing, and the contents of the files that it reads."""
    described = job.to_dict()
    described["training"] = {key: value for key, value in job.training.items() if key not in FREE_ARGUMENTS}
    described["base"] = _digest(job.model)
    described["basis"] = _digest(job.subspace) if job.select is None else None
    described["trained_on"] = {key: _digest(getattr(job, key)) for key in ("data", "eval_data")}
    described["texts"] = {name: _digest(source) for name, source in _texts(job)}
    return described


def _texts(job: TrainingJob) -> Iterator[tuple[str, Any]]:
    for key in _FILES:
        found = (job.select or {}).get(key)
        for number, source in enumerate(found if isinstance(found, list | tuple) else [found]):
            yield f"{key}.{number}", source


def _collecting(select: Any) -> Any:
    """A selection less what it does with statistics; `texts` and the selector say what has to be collected."""
    return {key: value for key, value in select.items() if key not in _CHOOSING} if isinstance(select, dict) else select


def _digest(source: Any) -> str | None:
    """SHA-256 of a file or of all files of a folder; None of what is not here, as data sets of the Hub are."""
    if isinstance(source, dict):
        return str([_digest(source.get(key)) for key in ("path", "data_files", "data_dir")])
    if isinstance(source, list | tuple):
        return str([_digest(one) for one in source])
    try:
        if not isinstance(source, str) or not Path(source).exists():
            return None
    except OSError:  # too long a name, or one that may not be looked at
        return None
    place, content = Path(source), hashlib.sha256()
    for path in sorted(place.rglob("*")) if place.is_dir() else [place]:
        if path.is_file():
            found = path.stat()
            content.update(f"{path.relative_to(place)}\0{found.st_size}\0".encode(errors="surrogateescape"))
            if found.st_size > _LONGEST_READ:
                content.update(str(found.st_mtime_ns).encode())
            else:
                content.update(path.read_bytes())
    return content.hexdigest()
