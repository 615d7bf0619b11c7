"""Training of every method with the same data, steps and seed, and what is recorded of it."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.common import digest_of
from benchmarks.paper.experiment import Experiment
from benchmarks.paper.full_tuning import train_full
from benchmarks.paper.lines import key_of
from benchmarks.paper.shapes import lora_config, lora_parameters, shape_of
from peft_sae.artifact import read_json, write_json
from peft_sae.errors import ConfigError
from peft_sae.jobs import TrainingJob, run_job
from peft_sae.jobs.data import open_data
from peft_sae.jobs.dry_run import plan_job
from peft_sae.jobs.models import load_model
from peft_sae.jobs.request import holds_something
from peft_sae.jobs.training import check_architecture
from peft_sae.training import train_adapter
from peft_sae.training.checkpoints import finish
from peft_sae.writing import discard, replace_file

_SCHEMA, _VERSION = "peft_sae.paper.record", 1
_RECORD, _BEGUN, _SUBSPACE_RECORD = "trained.json", "begun.json", "subspace.json"


class NotTrainedError(ConfigError):
    """A method has no trained weights yet."""


def train(experiment: Experiment, method: str, *, progress: bool) -> None:
    """Train a method, unless that was done. A training that was stopped goes on.

    The first SAE_SUBSPACE method of a selection also makes the Subspace, which the others with it share.

    Raises:
        ConfigError: the folder holds a training with other settings.
        PeftSaeError: the training cannot be carried out.
    """
    spec, made_with = experiment.methods[method], _description(experiment, method)
    record, begun = (experiment.method_folder(method) / name for name in (_RECORD, _BEGUN))
    if spec.kind == "base" or _read_record(record, made_with) is not None:
        return
    start, job = time.monotonic(), experiment.adapted_job(method)
    if not holds_something(job.output):
        _write_record(begun, made_with)
    elif _read_record(begun, made_with) is None:
        raise ConfigError(f"'{job.output}' is there, and no record says how it was made. Remove it to train anew.")
    if not _is_complete(job):
        _train(experiment, method, job, progress)
    finish(f"{job.output}.checkpoints", job.training)
    digest_of.cache_clear()
    subspace_record = experiment.subspace(method).with_name(_SUBSPACE_RECORD)
    if spec.kind == "sae_subspace" and not subspace_record.is_file():
        identity = digest_of(job.subspace_source)
        _write_record(subspace_record, _selection(experiment, method), identity=identity)
    trained, total = _parameters(experiment, job, spec.kind)
    minutes = round((time.monotonic() - start) / 60, 2)
    _write_record(record, made_with, identity=digest_of(job.output), trained=trained, total=total, minutes=minutes)
    discard(begun)


def _is_complete(job: TrainingJob) -> bool:
    """Whether a start that was stopped had only its record to write; weights are moved into place as a whole."""
    return holds_something(job.output) and not Path(f"{job.output}.checkpoints", "request.json").is_file()


def _train(experiment: Experiment, method: str, job: TrainingJob, progress: bool) -> None:
    kind = experiment.methods[method].kind
    if kind != "sae_subspace":
        _train_plain(job, kind, progress)
        return
    subspace_record = experiment.subspace(method).with_name(_SUBSPACE_RECORD)
    known = _read_record(subspace_record, _selection(experiment, method))
    run_job(job if known else replace(job, select=experiment.selection(method)), progress=progress)


def _selection(experiment: Experiment, method: str) -> dict[str, Any]:
    """What the Subspace depends on."""
    job = experiment.job
    return {
        "select": experiment.selection(method),
        "model": job.model,
        "base": digest_of(job.model),
        "dtype": job.dtype,
    }


def _train_plain(job: TrainingJob, kind: str, progress: bool) -> None:
    data = open_data(job.data, "training")
    device = None
    if job.bits is not None:
        from accelerate import PartialState

        device = str(PartialState().device)
    model, tokenizer = load_model(
        job.model, dtype=job.dtype, device=device, attn_implementation=job.attn_implementation, bits=job.bits
    )
    check_architecture(job, model.config)
    settings: dict[str, Any] = {"learn": job.learn, "max_length": job.max_length, "progress": progress, **job.training}
    if kind == "full":
        train_full(model, tokenizer, data, job.output, **settings)
    else:
        train_adapter(model, tokenizer, data, lora_config(job.adapter), job.output, method=job.method, **settings)


def _parameters(experiment: Experiment, job: TrainingJob, kind: str) -> tuple[int, int]:
    """How many parameters were trained, and how many there are."""
    if kind == "full":
        total = shape_of(experiment.job).parameters
        return total, total
    if kind == "lora":
        return lora_parameters(experiment.job, job.adapter)
    plan = plan_job(job)
    return plan.trained, plan.total


def _description(experiment: Experiment, method: str) -> dict[str, Any]:
    """What a method's weights depend on, as far as the experiment says it."""
    job, spec = experiment.adapted_job(method), experiment.methods[method]
    kept = ("model", "data", "method", "learn", "adapter", "training", "dtype", "load_in_4bit", "load_in_8bit")
    found = {key: value for key, value in asdict(job).items() if key in (*kept, "max_length")}
    found |= {"base": digest_of(job.model), "texts": digest_of(job.data) if isinstance(job.data, str) else None}
    if spec.kind == "full":
        found.pop("adapter")
    if spec.kind == "sae_subspace":
        found["select"] = experiment.selection(method)
    return {"kind": spec.kind, **found}


def _read_record(path: Path, made_with: Mapping[str, Any]) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    found = read_json(path, schema=_SCHEMA, newest=_VERSION)
    before, now = found["made_with"], json.loads(json.dumps(made_with, default=str))
    different = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if different:
        key = different[0]
        raise ConfigError(
            f"'{path.parent}' was made with {key}={before.get(key)!r}, and the experiment now says {now.get(key)!r}, "
            "so its results would pass for those of other settings. Give another --output, or remove the folder to "
            "make it anew."
        )
    return found


def _write_record(path: Path, made_with: Mapping[str, Any], **found: Any) -> None:
    described = json.loads(json.dumps(made_with, default=str))
    with replace_file(path) as scratch:
        write_json(scratch, {"schema": _SCHEMA, "schema_version": _VERSION, "made_with": described, **found})


def training_record(experiment: Experiment, method: str) -> dict[str, Any] | None:
    """Return what is known of a method's training; None of the base, which has none.

    Raises:
        NotTrainedError: it was not trained.
        ConfigError: it was trained in another way.
    """
    if experiment.methods[method].kind == "base":
        return None
    found = _read_record(experiment.method_folder(method) / _RECORD, _description(experiment, method))
    if found is None:
        raise NotTrainedError(f"The method {method!r} is not trained in '{experiment.output}'. Run the stage 'train'.")
    return found


def identity_of(experiment: Experiment, method: str) -> str:
    """Return what tells a method's model from every other one, so that answers are never taken for another's."""
    record = training_record(experiment, method)
    job, bits = experiment.job, None if experiment.methods[method].kind == "full" else experiment.job.bits
    base = key_of(job.model, digest_of(job.model), experiment.generation.dtype or job.dtype, bits)
    return base if record is None else key_of(base, record["identity"])
