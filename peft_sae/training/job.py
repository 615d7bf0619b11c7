"""A training job described by a YAML file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..errors import ConfigError, suggest
from ..tuner import SaeSubspaceConfig
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
    import yaml

    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"'{path}' cannot be opened ({error.strerror}). Give the path of a job file.") from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"'{path}' cannot be read as YAML ({error}). Give the path of a job file.") from error
    if not isinstance(data, dict):
        raise ConfigError(f"'{path}' holds a {type(data).__name__}, and a mapping of keys is needed. See configs/.")
    data.update({name: value for name, value in overrides.items() if value is not None})
    known = {entry.name: entry for entry in fields(TrainingJob)}
    for key in data:
        if key not in known:
            hint = suggest(str(key), known) or f" Known keys: {sorted(known)}."
            raise ConfigError(f"'{path}' has the unknown key {key!r}, which would have no effect.{hint}")
    missing = [
        name
        for name, entry in known.items()
        if entry.default is MISSING and entry.default_factory is MISSING and data.get(name) is None
    ]
    if missing:
        raise ConfigError(f"'{path}' lacks the keys {missing}. Add them, or give them on the command line.")
    _check_types(path, data)
    for key in ("adapter", "training"):
        data[key] = {name: _number(value) for name, value in (data.get(key) or {}).items()}
    job = TrainingJob(**data)
    job.adapter_config()
    return job


def _number(value: Any) -> Any:
    """A number that YAML 1.1 takes for text: it wants a point in `2e-4`."""
    return float(value) if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value) else value


def _check_types(path: str | Path, data: Mapping[str, Any]) -> None:
    types: dict[str, Any] = {
        "adapter": dict,
        "training": dict,
        "max_length": (int, type(None)),
        "dtype": (str, type(None)),
    }
    for key, value in data.items():
        if not isinstance(value, types.get(key, str)):
            raise ConfigError(f"Key {key!r} in '{path}' is {value!r}, of the wrong type. See configs/ for an example.")
    if data.get("max_length") is not None and data["max_length"] < 2:
        raise ConfigError(f"max_length={data['max_length']} in '{path}' leaves no text. Use 2 or more.")
    if "subspace" in data.get("adapter", {}):
        raise ConfigError(f"'{path}' names a subspace under 'adapter'. Put it at the top, under 'subspace'.")


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


def load_model(name: str | Path, *, dtype: str | None = None) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer.

    Args:
        name: folder or Hub id.
        dtype: for example `"bfloat16"`; by default as stored.

    Raises:
        ConfigError: there is no such model.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype or "auto")
        return model, AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(f"The model '{name}' cannot be loaded ({error}). Check the path or the id.") from error
