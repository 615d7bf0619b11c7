"""What an experiment will cost, before anything is loaded or fetched."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from benchmarks.paper.experiment import Experiment
from benchmarks.paper.judging import RUBRICS
from benchmarks.paper.shapes import Shape, lora_parameters, shape_of
from benchmarks.paper.specs import ClassifierJudgeSpec, EstimateSpec
from peft_sae.errors import ConfigError
from peft_sae.jobs.dry_run import plan_job
from peft_sae.training.settings import training_arguments
from peft_sae.tuner import SaeSubspaceConfig

_CHARACTERS_PER_TOKEN = 4  # of English, in the rubric
_GCG_DEFAULTS = {"num_steps": 250, "search_width": 512}
_GCG_SUFFIX, _GCG_TARGET = 20, 8  # tokens
_ADAM, _ADAM_8BIT = 8, 2  # bytes of state per parameter
_ADAPTER_BYTES = 2 * (4 + _ADAM)
_ROW_BYTES_PER_TOKEN, _ROW_BYTES = 6, 300  # of the caches


@dataclass(frozen=True)
class CostRow:
    """One part of the work.

    Attributes:
        stage: which stage it belongs to.
        what: what is done.
        tokens: that the model (or the judge) reads and writes.
        gpu_hours: of one GPU.
        price: of these hours, or of the judge.
        disk: bytes that it takes at its fullest.
        memory: bytes of one GPU, where that is known.
    """

    stage: str
    what: str
    tokens: float = 0.0
    gpu_hours: float = 0.0
    price: float = 0.0
    disk: float = 0.0
    memory: float | None = None


def estimate_cost(experiment: Experiment) -> list[CostRow]:
    """Return the parts of the work with what each will cost."""
    shape, given = shape_of(experiment.job), experiment.estimate
    rows = [*_training(experiment, shape), *_asking(experiment, shape)]
    return [replace(row, price=row.price + row.gpu_hours * given.gpu_price) for row in rows]


def training_steps(experiment: Experiment, method: str) -> int:
    """Return the steps of optimisation of a method on one device."""
    training = experiment.adapted_job(method).training
    if training.get("max_steps", -1) > 0:
        return int(training["max_steps"])
    batch = training.get("per_device_train_batch_size", 8)
    batches = math.ceil(experiment.estimate.train_examples / batch)
    per_epoch: int = math.ceil(batches / training.get("gradient_accumulation_steps", 1))
    epochs: float = training.get("num_train_epochs", 3)
    return math.ceil(per_epoch * epochs)


def _training(experiment: Experiment, shape: Shape) -> list[CostRow]:
    given, job = experiment.estimate, experiment.job
    rows: list[CostRow] = []
    if job.select is not None:
        made = [name for name, spec in experiment.methods.items() if spec.kind == "sae_subspace"]
        first = {experiment.subspace(name): name for name in reversed(made)}
        rows += [_selecting(experiment, name, shape) for name in reversed(first.values())]
    for name, spec in experiment.methods.items():
        if spec.kind == "base":
            continue
        training = experiment.adapted_job(name).training
        examples = training_steps(experiment, name) * training.get("per_device_train_batch_size", 8)
        tokens = examples * training.get("gradient_accumulation_steps", 1) * given.train_tokens
        checkpointing = 2 if training.get("gradient_checkpointing", True) else 0
        # Forward 2, back to the activations 2, and 2 more to the weights where they are trained.
        passes = (6 if spec.kind == "full" else 4) + checkpointing
        disk, memory = _training_bytes(experiment, name, shape)
        hours = _hours(passes * shape.multiplied * tokens, given)
        rows.append(
            CostRow("train", f"{name}: {training_steps(experiment, name):,} steps", tokens, hours, 0, disk, memory)
        )
    return rows


def _selecting(experiment: Experiment, method: str, shape: Shape) -> CostRow:
    """What it costs to read the texts that a Subspace is chosen by."""
    given, selection = experiment.estimate, experiment.selection(method)
    if "preferences" in selection:
        texts, length, what = 2 * given.train_examples, given.train_tokens, "Subspace: both answers read"
    else:
        texts = sum(_records(selection.get(name), given) for name in ("aligned", "unaligned"))
        length, what = given.prompt_tokens, f"Subspace of {method}: {texts:,} requests read"
    tokens, speed = texts * length, given.selection_tokens_per_second
    hours = _hours(2 * shape.multiplied * tokens, given) if speed is None else tokens / speed / 3600
    return CostRow("train", what, tokens, hours)


def _records(source: Any, given: EstimateSpec) -> int:
    """How many texts a source has; of what is not here, as many as there are training examples."""
    if isinstance(source, str) and Path(source).is_file():
        with Path(source).open("rb") as file:
            return sum(1 for _ in file)
    return given.train_examples


def _training_bytes(experiment: Experiment, method: str, shape: Shape) -> tuple[float, float | None]:
    """Bytes on the disk, where a new checkpoint lies beside the old one for a while, and on the GPU."""
    spec, job = experiment.methods[method], experiment.adapted_job(method)
    if spec.kind == "full":
        each = getattr(torch, job.dtype or "float32").itemsize
        state = _ADAM_8BIT if "8bit" in str(job.training.get("optim", "")) else _ADAM
        # Activations and the head come on top; they are those of an adapter with the same batch, which is below.
        weights, optimizer = shape.parameters * each, shape.parameters * state
        return 2 * (weights + optimizer), 2 * weights + optimizer
    if spec.kind == "lora":
        trained = lora_parameters(experiment.job, job.adapter)[0]
        # As much memory as a basis of the same rank that is trained, too.
        known = {entry.name for entry in fields(SaeSubspaceConfig)} & {entry.name for entry in fields(LoraConfig)}
        same = {key: value for key, value in job.adapter.items() if key in known}
        return trained * _ADAPTER_BYTES, plan_job(replace(job, select=experiment.job.select, adapter=same)).memory.total
    plan = plan_job(replace(job, select=experiment.selection(method)))
    return plan.trained * _ADAPTER_BYTES, plan.memory.total


def _asking(experiment: Experiment, shape: Shape) -> list[CostRow]:
    given, methods = experiment.estimate, len(experiment.methods)
    sizes = {name: _size(experiment, name) for name in experiment.sets}
    answers = methods * sum(sizes.values())
    rows = [_generating(experiment, shape, "generate", f"{answers:,} answers", answers)]
    rows += [_judging(experiment, methods * size, name, experiment.sets[name].kind) for name, size in sizes.items()]
    attack, capability = experiment.attack, experiment.capability
    if attack is not None:
        count = methods * min(attack.count, sizes[attack.set])
        settings = {**_GCG_DEFAULTS, **attack.settings}
        length = given.prompt_tokens + _GCG_SUFFIX + _GCG_TARGET
        tokens = count * settings["num_steps"] * settings["search_width"] * length
        slopes = 4 * shape.multiplied * count * settings["num_steps"] * length
        hours = _hours(2 * shape.multiplied * tokens + slopes, given)
        rows.append(CostRow("attack", f"GCG: {count:,} suffixes", tokens, hours))
        rows.append(_generating(experiment, shape, "attack", f"{count:,} answers", count))
        rows.append(replace(_judging(experiment, count, "attacked", "harmful"), stage="attack"))
    if capability is not None:
        tokens = methods * given.capability_tokens
        what = f"{len(capability.tasks)} tasks"
        rows.append(CostRow("capability", what, tokens, _hours(2 * shape.multiplied * tokens, given)))
    return rows


def _size(experiment: Experiment, name: str) -> int:
    count = experiment.sets[name].count
    size = count if count is not None else experiment.estimate.set_sizes.get(name)
    if size is None:
        raise ConfigError(
            f"The set {name!r} has no count, and estimate.set_sizes does not say how large it is, so nothing can be "
            "reckoned. Add it to one of the two."
        )
    return size


def _generating(experiment: Experiment, shape: Shape, stage: str, what: str, answers: int) -> CostRow:
    given = experiment.estimate
    read = answers * given.prompt_tokens
    written = answers * min(given.answer_tokens, experiment.generation.max_new_tokens)
    hours = _hours(2 * shape.multiplied * read, given) + written / given.generation_tokens_per_second / 3600
    disk = _ROW_BYTES * answers + _ROW_BYTES_PER_TOKEN * (read + written)
    return CostRow(stage, what, read + written, hours, 0.0, disk, float(shape.parameters * shape.bytes_each))


def _judging(experiment: Experiment, count: int, name: str, kind: Any) -> CostRow:
    given = experiment.estimate
    if isinstance(experiment.judge, ClassifierJudgeSpec):
        return CostRow("judge", f"{name}: {count:,} answers, classified here", disk=_ROW_BYTES * count)
    read = len(RUBRICS[kind]) / _CHARACTERS_PER_TOKEN + given.prompt_tokens + given.answer_tokens
    tokens, written = count * read, count * given.judge_reply_tokens
    price = (tokens * given.judge_input_price + written * given.judge_output_price) / 1e6
    return CostRow("judge", f"{name}: {count:,} answers", tokens + written, 0.0, price, _ROW_BYTES * count)


def _hours(flops: float, given: Any) -> float:
    hours: float = flops / given.training_flops / 3600
    return hours


def cost_table(experiment: Experiment, rows: Sequence[CostRow]) -> str:
    """Return the estimate as Markdown."""
    currency = experiment.estimate.currency
    lines = [
        f"| stage | what | million tokens | GPU hours | {currency} | GB of disk | GB of GPU memory |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    total = CostRow(
        *("total", "", sum(row.tokens for row in rows), sum(row.gpu_hours for row in rows)),
        *(sum(row.price for row in rows), sum(row.disk for row in rows)),
        max((row.memory for row in rows if row.memory is not None), default=None),
    )
    for row in (*rows, total):
        memory = "" if row.memory is None else f"{row.memory / 1e9:,.1f}"
        lines.append(
            f"| {row.stage} | {row.what} | {row.tokens / 1e6:,.2f} | {row.gpu_hours:,.2f} | {row.price:,.2f} | "
            f"{row.disk / 1e9:,.2f} | {memory} |"
        )
    given = experiment.estimate
    price = f"{len(experiment.methods)} methods; an hour of a GPU costs {given.gpu_price:g} {currency}. "
    notes = price + (
        "Reckoned with the assumptions under `estimate`; nothing was loaded or fetched. Memory is without the loss, "
        "and for full fine-tuning without activations, too. Base model, SAEs and data sets come on top of the disk."
    )
    return "\n".join([*lines, "", notes])


def check_arguments(experiment: Experiment) -> None:
    """Check that the trainers' arguments can be made here, before anything is loaded.

    Raises:
        ConfigError: one is impossible.
    """
    for name, spec in experiment.methods.items():
        if spec.kind != "base":
            job = experiment.adapted_job(name)
            training_arguments(job.method, job.training, job.output, max_length=job.max_length, progress=False)
