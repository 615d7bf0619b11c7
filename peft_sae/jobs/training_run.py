"""Carrying a training job out, from texts to adapter, report and merged checkpoint."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..export import export_lora, merge_checkpoint
from ..inspect import inspect_adapter
from ..subspace import Subspace
from ..training import train_adapter
from ..training.callback import SubspaceCallback
from ..training.checkpoints import finish
from ..writing import alone
from .bars import other_bars
from .data import open_data
from .models import load_model
from .request import Request, holds_something
from .selection import SelectionJob
from .selection_run import run_selection
from .training import TrainingJob, check_architecture


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
    with other_bars(shown), ExitStack() as stack:
        request = Request(job)
        trained = request.check_places()
        if processes.is_main_process:
            stack.enter_context(alone(request.folder))
        return _run(job, request, trained, processes, shown)


def _run(job: TrainingJob, request: Request, trained: bool, processes: Any, shown: bool) -> JobResult:
    data, held_out = _open(job)
    processes.wait_for_everyone()  # all have looked before one writes
    selection = None if request.has_subspace else _selection(job, request, str(processes.device))
    if processes.is_main_process:
        request.write()
    if selection is not None:
        run_selection(selection, progress=shown)
        processes.wait_for_everyone()
    if not trained:
        _train(job, data, held_out, shown)
    processes.wait_for_everyone()
    if processes.is_main_process:
        _write_rest(job, shown)
        finish(request.folder, job.training)
        request.forget()
    report, merged, lora = (None if name is None else Path(name) for name in (job.report, job.merged, job.lora))
    return JobResult(Path(job.output), job.subspace_source, report, merged, lora, processes.is_main_process)


def _on_cpu(job: TrainingJob) -> bool:
    import torch

    return bool(job.training.get("use_cpu")) or not torch.accelerator.is_available()


def _selection(job: TrainingJob, request: Request, device: str) -> SelectionJob | None:
    """The selection that is to be made, or None.

    Its statistics are kept while the job is not done: a stopped collection goes on, and a finished one is read again,
    also when the start before this one chose from it in another way. Where the job names a place for them, what lies
    there may be from elsewhere, so it is collected anew.
    """
    found = job.selection(device)
    if found is None or found.from_statistics is not None or found.statistics is not None:
        return found
    place = str(request.statistics)
    if request.has_statistics:
        return replace(found, retain=None, from_statistics=place, measures=(), texts=0)
    return replace(found, statistics=place)


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
    if job.lora is not None and not holds_something(job.lora):
        export_lora(job.output, job.lora)
    if job.merged is not None and not holds_something(job.merged):
        merge_checkpoint(job.model, job.output, job.merged, progress=progress)
