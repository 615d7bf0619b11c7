"""The state of a long collection, so that it can go on after the process was killed."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..artifact import digest
from ..errors import ArtifactError, ConfigError
from ..reading import check_regular, parse_json
from ..writing import replace_file
from .share import Share
from .statistics import FeatureStatistics

_ENTRY = "peft_sae.state"


@dataclass(frozen=True)
class Progress:
    """How far a collection has come.

    Attributes:
        statistics: what is summed up so far; the last class may be unfinished.
        batches: batches done per class.
    """

    statistics: FeatureStatistics
    batches: Mapping[str, int]


def state_path(path: str | Path, share: Share) -> Path:
    """Return where a process keeps its state: processes that read one data set together have one file each."""
    path = Path(path)
    return path if share.world == 1 else path.with_name(f"{path.name}.{share.rank}-of-{share.world}")


class StateFile:
    """One file, replaced as a whole, so that it is never half-written.

    Args:
        path: the file; each of several processes has its own beside it.
        run: what must be the same when the run goes on: model, SAEs, settings.
        share: which process this is.
        every: seconds between two states.
    """

    def __init__(self, path: str | Path | None, run: Mapping[str, Any], share: Share, every: float) -> None:
        self._path = None if path is None else state_path(path, share)
        self._run = json.loads(json.dumps(dict(run)))
        self._every, self._last = every, time.monotonic()

    def read(self) -> Progress | None:
        """Return how far an earlier run has come, or None if there was none.

        Raises:
            ArtifactError: the file is damaged.
            ConfigError: it belongs to another run. It is left as it is.
        """
        from safetensors import safe_open

        if self._path is None or not os.path.lexists(self._path):
            return None
        try:
            check_regular(self._path)
            with safe_open(self._path, framework="pt") as file:
                description = parse_json((file.metadata() or {})[_ENTRY])
            run, batches = description.pop("run"), description.pop("batches")
            if not isinstance(run, dict):
                raise ValueError(f"no description of a run: {run!r}")
            if set(batches) != set(description["labels"]) or any(type(n) is not int or n < 1 for n in batches.values()):
                raise ValueError(f"impossible batches {batches}")
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArtifactError(
                f"'{self._path}' is no state of a collection ({error!r}). Remove it to begin anew, or name another "
                "file."
            ) from error
        if run != self._run:
            different = sorted(name for name in {**run, **self._run} if run.get(name) != self._run.get(name))
            raise ConfigError(
                f"'{self._path}' is the state of another run, which differs in {different}, so this one cannot go on "
                "from it. Name another file, or remove this one to begin anew."
            )
        statistics = FeatureStatistics.from_description(description, self._path, self._path, complete=False)
        return Progress(statistics, batches)

    @property
    def due(self) -> bool:
        """Whether it is time to write."""
        return self._path is not None and time.monotonic() - self._last >= self._every

    def write(self, progress: Progress) -> None:
        """Replace the file.

        Raises:
            ArtifactError: it cannot be written.
        """
        from safetensors.torch import save_file

        if self._path is None:
            return
        tensors, description = progress.statistics.to_tensors()
        description["digest"] = digest(tensors, description)
        entry = json.dumps({**description, "run": self._run, "batches": dict(progress.batches)})
        with replace_file(self._path) as scratch:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, scratch, {_ENTRY: entry})
        self._last = time.monotonic()
