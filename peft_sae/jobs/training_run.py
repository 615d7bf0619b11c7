"""Carrying a training job out, from texts to adapter, report and merged checkpoint."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..adapter import CONFIG_FILE
from ..artifact import check_target, check_writable, read_json, replace_file, write_json
from ..errors import ConfigError
from ..export import export_lora, merge_checkpoint
from ..inspect import inspect_adapter
from ..subspace import Subspace
from ..training import train_adapter
from ..training.callback import SubspaceCallback
from .bars import other_bars
from .data import open_data
from .models import load_model
from .selection import SelectionJob
from .selection_run import run_selection
from .training import TrainingJob, check_architecture

logger = logging.getLogger(__name__)

_SCHEMA, _SCHEMA_VERSION = "peft_sae.job", 1
_FILE = "request.json"
_STATISTICS = "statistics"
_AFTERWARDS = ("report", "merged", "lora", "architecture", "watch")  # what a trained adapter does not depend on
_SELECTING = ("model", "dtype", "select", "subspace")  # what the Subspace depends on


@dataclass(frozen=True)
class JobResult:
    """What a job has written.

    Attributes:
        adapter: the adapter's folder.
        subspace: where its Subspace lies.
        report: the HTML report, or None.
        merged: the merged checkpoint, or None.
        lora: the plain LoRA adapter, or None.
        is_main: whether this process is the one that writes, of those that were launched together.
    """

    adapter: Path
    subspace: str
    report: Path | None
    merged: Path | None
    lora: Path | None
    is_main: bool


def run_job(job: TrainingJob, *, progress: bool = True) -> JobResult:
    """Select if the job says so, train the adapter, and write what is asked for.

    A job that was stopped goes on when it is started again: statistics from their state, training from its last
    checkpoint, and what is there already is not made twice. Under `accelerate launch` the processes work together.

    Args:
        job: what to do.
        progress: show progress bars.

    Raises:
        ConfigError, DataError, ArtifactError, MismatchError, SelectionError: the job cannot be carried out. What can be
            known before the model is loaded is told before.
    """
    from accelerate import PartialState

    processes = PartialState(cpu=_on_cpu(job))
    shown = progress and processes.is_local_main_process
    with other_bars(shown):
        return _run(job, processes, shown)


def _run(job: TrainingJob, processes: Any, shown: bool) -> JobResult:
    request = _Request(job)
    trained = request.check_places()
    data, held_out = _open(job)
    processes.wait_for_everyone()  # all have looked before one writes
    if processes.is_main_process:
        request.write()
    if job.select is not None and not request.has_subspace:
        run_selection(_selection(job, str(processes.device)), progress=shown)
        processes.wait_for_everyone()
    if not trained:
        _train(job, data, held_out, shown)
    processes.wait_for_everyone()
    if processes.is_main_process:
        _write_rest(job, shown)
        request.forget()
    report, merged, lora = (None if name is None else Path(name) for name in (job.report, job.merged, job.lora))
    return JobResult(Path(job.output), job.subspace_source, report, merged, lora, processes.is_main_process)


def _on_cpu(job: TrainingJob) -> bool:
    import torch

    return bool(job.training.get("use_cpu")) or not torch.accelerator.is_available()


def _selection(job: TrainingJob, device: str) -> SelectionJob:
    """The selection; its statistics are kept while the job is not done, so that it goes on if it is stopped."""
    found = job.selection(device)
    assert found is not None
    own = found.statistics is not None or found.from_statistics is not None
    return found if own else replace(found, statistics=str(_work(job) / _STATISTICS))


def _work(job: TrainingJob) -> Path:
    return Path(f"{job.output}.checkpoints")


def _open(job: TrainingJob) -> tuple[Any, Any]:
    """The data, before a model is loaded."""
    data = open_data(job.data, "training")
    return data, None if job.eval_data is None else open_data(job.eval_data, "evaluation")


def _train(job: TrainingJob, data: Any, held_out: Any, progress: bool) -> None:
    subspace = Subspace.from_pretrained(job.subspace_source)
    config = job.adapter_config(subspace)
    device = None
    if job.bits is not None:
        from accelerate import PartialState

        device = str(PartialState().device)  # a quantised model is made where it stays
    model, tokenizer = load_model(
        job.model, dtype=job.dtype, device=device, attn_implementation=job.attn_implementation, bits=job.bits
    )
    check_architecture(job, model.config)
    train_adapter(
        model,
        tokenizer,
        data,
        config,
        job.output,
        method=job.method,
        eval_data=held_out,
        learn=job.learn,
        max_length=job.max_length,
        callbacks=[SubspaceCallback] if job.watch else [],
        progress=progress,
        **job.training,
    )


def _write_rest(job: TrainingJob, progress: bool) -> None:
    if job.report is not None:
        inspect_adapter(job.output, job.model).save(job.report)
    if job.lora is not None and not _holds_something(job.lora):
        export_lora(job.output, job.lora)
    if job.merged is not None and not _holds_something(job.merged):
        merge_checkpoint(job.model, job.output, job.merged, progress=progress)


def _holds_something(place: str) -> bool:
    folder = Path(place)
    return folder.is_dir() and any(folder.iterdir())


class _Request:
    """The job as it was started, beside its checkpoints, so that a second start knows what is its own."""

    def __init__(self, job: TrainingJob) -> None:
        self._job = job
        self._folder = _work(job)
        self._data = json.loads(json.dumps(job.to_dict(), default=str))
        self._before = self._read()

    def _read(self) -> dict[str, Any]:
        path = self._folder / _FILE
        if not path.is_file():
            return {}
        found = read_json(path, schema=_SCHEMA, newest=_SCHEMA_VERSION).get("job")
        return found if isinstance(found, dict) else {}

    def _agrees(self, keys: Any = None) -> bool:
        keys = self._data if keys is None else keys
        return bool(self._before) and all(self._before.get(key) == self._data.get(key) for key in keys)

    @property
    def has_subspace(self) -> bool:
        """Whether an earlier start of the same job has written the Subspace."""
        return Path(self._job.subspace_source).is_dir() and self._agrees(_SELECTING)

    def check_places(self) -> bool:
        """Check what is to be written, and return whether an earlier start of the same job has trained the adapter.

        Raises:
            ArtifactError, ConfigError: something is in the way.
        """
        job, again = self._job, self._agrees(key for key in self._data if key not in _AFTERWARDS)
        trained = again and (Path(job.output) / CONFIG_FILE).is_file()
        for place in (job.output, job.merged, job.lora):
            if place is not None and not (again and _holds_something(place)):
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
        """Write the job down."""
        with replace_file(self._folder / _FILE) as scratch:
            write_json(scratch, {"schema": _SCHEMA, "schema_version": _SCHEMA_VERSION, "job": self._data})

    def forget(self) -> None:
        """Remove it, and the folder if there are no checkpoints in it."""
        (self._folder / _FILE).unlink(missing_ok=True)
        shutil.rmtree(self._folder / _STATISTICS, ignore_errors=True)
        try:
            self._folder.rmdir()
        except OSError as error:
            logger.debug("'%s' stays (%s).", self._folder, error)
