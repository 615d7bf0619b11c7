"""What a training job will do, found on the meta device: no weights are loaded and none are made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import open_base
from ..errors import ArtifactError, ConfigError, PeftSaeError
from ..sae.identity import SaeIdentity
from ..sae.placement import find_layout
from ..sae.places import ExpectedPlace, expected_places
from ..subspace import Subspace, SubspaceSite
from ..training.settings import training_arguments
from .data import check_source
from .memory import Memory, estimate_memory
from .training import TrainingJob

_LONGEST = 2**31


@dataclass(frozen=True)
class PlannedModule:
    """What one target module gets.

    Attributes:
        name: its name in the model.
        side: `read`, `write` or `none`.
        hook_name: hook point that its basis comes from; None for plain LoRA.
        rank: rank of its adapter.
        trained: parameters that are trained.
    """

    name: str
    side: str
    hook_name: str | None
    rank: int
    trained: int


@dataclass(frozen=True)
class DryRun:
    """What a training job will do.

    Attributes:
        model: the base model's name.
        parameters: of the base model.
        total: parameters of the base model and the adapter, as PEFT counts them.
        trained: parameters that are trained.
        modules: the target modules, in the model's order.
        memory: what it is expected to take.
        batch: sequences per step and device.
        length: tokens per sequence.
        notes: what is assumed.
    """

    model: str
    parameters: int
    total: int
    trained: int
    modules: tuple[PlannedModule, ...]
    memory: Memory
    batch: int
    length: int
    notes: tuple[str, ...]

    @property
    def share(self) -> float:
        """Share of the adapted model's parameters that is trained."""
        return self.trained / self.total


def plan_job(job: TrainingJob) -> DryRun:
    """Find out what a job will do, without weights and, where it has an `architecture`, without any network.

    Data that are files here are read through; data sets of the Hub are not asked for.

    Args:
        job: the job, as `read_job` has checked it.

    Raises:
        ConfigError, DataError, ArtifactError, MismatchError: the job cannot be carried out.
    """
    notes: list[str] = []
    _check_data(job)
    model = _build(job, notes)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    subspace = _subspace(job, model, notes)
    settings = training_arguments(job.method, _without_device(job), "dry-run", max_length=None, progress=False)
    adapted = _adapt(job, model, subspace)
    modules = _modules(adapted)
    trained, total = adapted.get_nb_trainable_parameters()
    batch = settings.per_device_train_batch_size * (2 if job.method == "dpo" else 1)
    context = int(getattr(model.config.get_text_config(), "max_position_embeddings", 0) or 0)
    length = min(job.max_length or _LONGEST, context or _LONGEST)
    if job.max_length is None:
        notes.append(f"max_length is not given: activations are those of texts of {length:,} tokens, the context.")
    mixed = torch.bfloat16 if job.training.get("bf16", not job.training.get("fp16")) else None
    mixed = torch.float16 if job.training.get("fp16") else mixed
    memory = estimate_memory(
        adapted,
        batch=batch,
        length=length,
        bits=job.bits,
        checkpointing=bool(settings.gradient_checkpointing),
        autocast=mixed,
        optimizer=str(getattr(settings.optim, "value", settings.optim)),
    )
    if memory.activations is None:
        notes.append("The activations of this architecture could not be found without values, and are not in the sum.")
    return DryRun(job.model, parameters, total, trained, modules, memory, batch, length, tuple(notes))


def _check_data(job: TrainingJob) -> None:
    check_source(job.data, "training")
    check_source(job.eval_data, "evaluation")
    for name in ("aligned", "unaligned", "preferences", "retain"):
        check_source((job.select or {}).get(name), name)


def _adapt(job: TrainingJob, model: Any, subspace: Subspace) -> Any:
    from peft import get_peft_model

    try:
        return get_peft_model(model, job.adapter_config(subspace), low_cpu_mem_usage=True)
    except PeftSaeError:
        raise
    except (ValueError, TypeError) as error:  # as PEFT tells of modules that are not there
        raise ConfigError(
            f"PEFT refuses the adapter of this job ({error}). Correct the fields under 'adapter'."
        ) from error


def _build(job: TrainingJob, notes: list[str]) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    if job.architecture is None:
        config, _ = open_base(job.model)
    else:
        try:
            config = AutoConfig.for_model(**job.architecture)
        except Exception as error:  # whatever a configuration's class makes of values from a file
            raise ConfigError(
                f"'architecture' makes no configuration ({type(error).__name__}: {error}). Take the values from the "
                "config.json of the model."
            ) from error
    wanted = job.dtype or getattr(config, "dtype", None)
    if wanted is None:
        notes.append("dtype is given neither here nor by the model: float32 is assumed.")
    dtype = getattr(torch, str(wanted or "float32").removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise ConfigError(f"dtype={wanted!r} is none of torch's. Use for example bfloat16.")
    options = {} if job.attn_implementation is None else {"attn_implementation": job.attn_implementation}
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype, **options)
    except Exception as error:
        raise ArtifactError(
            f"The configuration of '{job.model}' makes no model ({type(error).__name__}: {error}). Check it."
        ) from error


def _without_device(job: TrainingJob) -> dict[str, Any]:
    """The arguments, except those that need the device on which the job will run."""
    return {**{key: value for key, value in job.training.items() if key not in ("bf16", "fp16", "tf32")}, "bf16": False}


def _subspace(job: TrainingJob, model: Any, notes: list[str]) -> Subspace:
    selection = job.selection()
    if selection is None or Path(job.subspace_source).is_dir():
        return Subspace.from_pretrained(job.subspace_source)
    places = expected_places(selection.saes, ids=selection.ids or None, layers=selection.layers or None)
    if any(place.by_name for place in places):
        notes.append("Hook points are read off the SAEs' names; the SAEs are not loaded.")
    width = int(model.config.get_text_config().hidden_size)
    rank = min(selection.top_k, width)
    config = job.adapter_config()
    if config.r == "auto":
        notes.append(f"r is 'auto' and the features are not chosen yet: ranks are those of top_k={rank}, at most.")
    else:
        rank = min(rank, int(config.r))
        what = "is filled up"
        if config.fill == "zeros":
            what = "is filled up with zeros"
        elif config.freeze_basis or config.fill == "error":
            what = "will be an error; fill: zeros, or r: auto, avoids it"
        notes.append(f"A basis of fewer directions than r, which is known when the features are chosen, {what}.")
    return _stand_in(places, model, width, rank)


def _stand_in(places: list[ExpectedPlace], model: Any, width: int, rank: int) -> Subspace:
    """A Subspace of the shapes that a selection will give; its directions are zeros and are never used."""
    ones = torch.ones(rank, dtype=torch.float64)
    sites = [
        SubspaceSite(
            sae=SaeIdentity(place.name, place.hook_name, width, rank, None, None, f"{number:064x}"),
            features=torch.arange(rank),
            scores=ones,
            q_values=ones,
            aligned_means=ones,
            unaligned_means=ones,
            aligned_rates=ones,
            unaligned_rates=ones,
            directions=torch.eye(rank, width),
            basis=torch.eye(rank, width),
            coefficients=torch.eye(rank),
            tokens=((),) * rank,
        )
        for number, place in enumerate(places)
    ]
    config = model.config.get_text_config()
    described = {
        "name": "",
        "model_type": model.config.model_type,
        "hidden_size": width,
        "num_hidden_layers": config.num_hidden_layers,
    }
    return Subspace(tuple(sites), find_layout(model), described, {"selector": "not yet"})


def _modules(adapted: Any) -> tuple[PlannedModule, ...]:
    record = adapted.active_peft_config.basis_record["modules"]
    trained: dict[str, int] = dict.fromkeys(record, 0)
    model, adapter = adapted.get_base_model(), adapted.active_adapter
    for name, parameter in model.named_parameters():
        owner = name.split(".lora_")[0]
        if owner in trained and parameter.requires_grad:
            trained[owner] += parameter.numel()
    return tuple(
        PlannedModule(name, entry["side"], entry["hook_name"], model.get_submodule(name).r[adapter], trained[name])
        for name, entry in record.items()
    )
