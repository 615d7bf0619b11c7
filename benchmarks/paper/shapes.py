"""Sizes of models and adapters, found without weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from peft_sae.checkpoint import open_base
from peft_sae.errors import ConfigError
from peft_sae.jobs import TrainingJob


@dataclass(frozen=True)
class Shape:
    """A model's sizes.

    Attributes:
        parameters: all of them.
        multiplied: those that every token is multiplied with: linear layers and the head. Attention's own products are
            left out: at 200 tokens they are 1 to 2 % more.
        bytes_each: bytes of one, as it is loaded.
    """

    parameters: int
    multiplied: int
    bytes_each: int


def shape_of(job: TrainingJob) -> Shape:
    """Return the sizes of the base model, from the job's `architecture` or from the model's configuration."""
    model = meta_model(job)
    linear = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    return Shape(model.num_parameters(), linear, model.dtype.itemsize)


def meta_model(job: TrainingJob) -> Any:
    """Return the base model without weights.

    Raises:
        ConfigError: its sizes are unknown.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = open_base(job.model)[0] if job.architecture is None else AutoConfig.for_model(**job.architecture)
    dtype = getattr(torch, job.dtype or "float32", None)
    if not isinstance(dtype, torch.dtype):
        raise ConfigError(f"dtype={job.dtype!r} of the job is none of torch's. Use for example bfloat16.")
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def lora_config(adapter: Mapping[str, Any]) -> Any:
    """Return plain LoRA's configuration with what the job's adapter has in common with it."""
    from peft import LoraConfig

    known = {entry.name for entry in fields(LoraConfig)}
    return LoraConfig(**{"task_type": "CAUSAL_LM", **{key: value for key, value in adapter.items() if key in known}})


def lora_parameters(job: TrainingJob, adapter: Mapping[str, Any]) -> tuple[int, int]:
    """Return how many parameters plain LoRA trains, and how many there are with them."""
    from peft import get_peft_model

    adapted = get_peft_model(meta_model(job), lora_config(adapter), low_cpu_mem_usage=True)
    trained, total = adapted.get_nb_trainable_parameters()
    return int(trained), int(total)
