"""A training job described by a YAML file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..errors import ConfigError
from ..tuner import SaeSubspaceConfig
from .fields import read_fields
from .train import train_adapter


@dataclass(frozen=True)
class TrainingJob:
    """What `peft-sae train` does.

    Attributes:
        model: folder or Hub id of the base model.
        data: JSONL file of `prompt` and `completion`, or of `messages`.
        subspace: folder or Hub id of the Subspace, as `peft-sae select` writes it.
        output: folder that the adapter is written to.
        adapter: fields of `SaeSubspaceConfig`, except `subspace`.
        training: fields of `transformers.TrainingArguments`.
        dtype: dtype that the base model is loaded in; by default as stored.
        max_length: tokens per example; longer ones are cut.
    """

    model: str
    data: str
    subspace: str
    output: str
    adapter: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    dtype: str | None = None
    max_length: int | None = None

    def adapter_config(self) -> SaeSubspaceConfig:
        """Return the adapter's configuration.

        Raises:
            ConfigError: an unknown or impossible field.
        """
        return SaeSubspaceConfig(**{"task_type": "CAUSAL_LM", **self.adapter, "subspace": self.subspace})


def read_job(path: str | Path, **overrides: Any) -> TrainingJob:
    """Read a job from YAML and check every key before anything is loaded.

    Args:
        path: the YAML file. Relative paths in it are relative to the working directory.
        **overrides: values that take the place of the file's; those that are None do not.

    Raises:
        ConfigError: the file cannot be read, a key is unknown or missing, or a value has the wrong type.
    """
    data = read_fields(TrainingJob, path, overrides)
    if data.get("max_length") is not None and data["max_length"] < 2:
        raise ConfigError(f"max_length={data['max_length']} in '{path}' leaves no text. Use 2 or more.")
    if "subspace" in data.get("adapter", {}):
        raise ConfigError(f"'{path}' names a subspace under 'adapter'. Put it at the top, under 'subspace'.")
    job = TrainingJob(**data)
    job.adapter_config()
    return job


def run_job(job: TrainingJob, *, progress: bool = True) -> Path:
    """Load the base model, train the adapter and write it.

    Returns:
        The adapter's folder.

    Raises:
        ConfigError, DataError, ArtifactError, MismatchError: the job cannot be carried out.
    """
    model, tokenizer = load_model(job.model, dtype=job.dtype)
    train_adapter(
        model,
        tokenizer,
        job.data,
        job.adapter_config(),
        job.output,
        max_length=job.max_length,
        progress=progress,
        **job.training,
    )
    return Path(job.output)


def load_model(name: str | Path, *, dtype: str | None = None, device: str | None = None) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer.

    Args:
        name: folder or Hub id.
        dtype: for example `"bfloat16"`; by default as stored.
        device: for example `"cuda"`; `"auto"` spreads the model over all devices.

    Raises:
        ConfigError: there is no such model.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype or "auto", device_map=device)
        return model, AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, AttributeError, SafetensorError) as error:
        raise ConfigError(f"The model '{name}' cannot be loaded ({error}). Check the path or the id.") from error
