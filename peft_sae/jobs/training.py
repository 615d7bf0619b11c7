"""A training job described by a YAML file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from ..errors import ConfigError, suggest
from ..training.settings import Method, config_class, wrong_arguments
from ..tuner import SaeSubspaceConfig
from .data import source_problems
from .fields import field_problems, raise_all, read_values, type_problems
from .selection import SelectionJob

_GIVEN = ("model", "output", "dtype", "device")  # what a selection takes from the job around it
_SOURCES = ("data", "eval_data")


@dataclass(frozen=True)
class TrainingJob:
    """What `peft-sae train` does.

    Attributes:
        model: folder or Hub id of the base model.
        data: what is trained on: a file or a data set of the Hub, see `open_data`.
        output: folder that the adapter is written to. Checkpoints go beside it, into `OUTPUT.checkpoints`,
            and stay if `training` has `save_strategy` or `save_steps`.
        subspace: folder or Hub id of the Subspace; with `select`, the folder that it is written to (by default
            `OUTPUT-subspace`).
        select: a selection that comes first, with the fields of `SelectionJob` except those of this job.
        method: `sft` or `dpo`.
        learn: for `sft`, the tokens that are learned: `all`, `response` (the last turn) or `assistant` (every turn). By
            default `all` of plain text, else `assistant`.
        eval_data: texts for `eval_strategy`.
        adapter: fields of `SaeSubspaceConfig`, except `subspace`.
        training: fields of `trl.SFTConfig` or `trl.DPOConfig`.
        dtype: dtype that the base model is loaded in; by default as stored.
        attn_implementation: of the base model; by default transformers' choice.
        load_in_4bit: quantise the base model to 4 bits with bitsandbytes (QLoRA, arXiv 2305.14314).
        load_in_8bit: quantise it to 8 bits.
        max_length: tokens per example; longer ones are cut.
        watch: log drift and changing features, see `SubspaceCallback`.
        report: also write this HTML report of the trained adapter.
        merged: also merge the adapter into the base model, into this folder.
        lora: also export the adapter as plain LoRA, into this folder.
        architecture: values of the model's configuration, `model_type` among them. `--dry-run` takes them instead of
            the model's own file, so it needs no network; a training checks them.
    """

    model: str
    data: str | Mapping[str, Any]
    output: str
    subspace: str | None = None
    select: Mapping[str, Any] | None = None
    method: Literal["sft", "dpo"] = "sft"
    learn: Literal["all", "response", "assistant"] | None = None
    eval_data: str | Mapping[str, Any] | None = None
    adapter: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    dtype: str | None = None
    attn_implementation: str | None = None
    load_in_4bit: bool = False
    load_in_8bit: bool = False
    max_length: int | None = None
    watch: bool = True
    report: str | None = None
    merged: str | None = None
    lora: str | None = None
    architecture: Mapping[str, Any] | None = None

    @property
    def bits(self) -> int | None:
        """Bits that the base model is quantised to, or None."""
        return 4 if self.load_in_4bit else 8 if self.load_in_8bit else None

    @property
    def subspace_source(self) -> str:
        """Where the Subspace is, or will be."""
        return self.subspace or f"{Path(self.output)}-subspace"

    def adapter_config(self, subspace: Any = None) -> SaeSubspaceConfig:
        """Return the adapter's configuration.

        Args:
            subspace: takes the place of the path.

        Raises:
            ConfigError: an unknown or impossible field.
        """
        subspace = self.subspace_source if subspace is None else subspace
        return SaeSubspaceConfig(**{"task_type": "CAUSAL_LM", **self.adapter, "subspace": subspace})

    def selection(self, device: str = "cpu") -> SelectionJob | None:
        """Return the selection that comes first, or None.

        Raises:
            ConfigError: its fields cannot work together.
        """
        if self.select is None:
            return None
        given = {"model": self.model, "output": self.subspace_source, "dtype": self.dtype, "device": device}
        return SelectionJob(**{**self.select, **given})

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-serialisable data."""
        return asdict(self)


def read_job(path: str | Path, **overrides: Any) -> TrainingJob:
    """Read a job from YAML and check every key before anything is loaded.

    Args:
        path: the YAML file. Relative paths in it are relative to the working directory.
        **overrides: values that take the place of the file's; those that are None do not.

    Raises:
        ConfigError: the file cannot be read, or keys or values are wrong; it names all of them.
    """
    data = read_values(path, overrides)
    problems = field_problems(TrainingJob, data, path)
    for key in _SOURCES:
        problems += source_problems(data.get(key), key)
    problems += _section_problems(data, path)
    if not problems:
        problems += _combination_problems(data, path)
    raise_all(problems, path)
    job = TrainingJob(**data)
    job.adapter_config()
    job.selection()
    return job


def _section_problems(data: Mapping[str, Any], path: str | Path) -> list[str]:
    problems: list[str] = []
    training, adapter, select = (data.get(key) for key in ("training", "adapter", "select"))
    if isinstance(training, Mapping):
        method: Method = "dpo" if data.get("method") == "dpo" else "sft"
        problems += wrong_arguments(method, training)
        given = {key: value for key, value in training.items() if value is not None}
        problems += type_problems(config_class(method), given, path, "training.")
    if isinstance(adapter, Mapping):
        if "subspace" in adapter:
            problems.append(f"'{path}' names a subspace under 'adapter'. Put it at the top, under 'subspace'.")
        known = {entry.name for entry in fields(SaeSubspaceConfig)}
        problems += [
            f"adapter.{key}: SaeSubspaceConfig has no field {key!r}, so its value would be lost."
            f"{suggest(str(key), known)} Remove or rename it."
            for key in adapter
            if key not in known
        ]
    if isinstance(select, Mapping):
        twice = [key for key in _GIVEN if key in select]
        problems += [f"Key 'select.{key}' in '{path}' is that of the job itself. Leave it out." for key in twice]
        given = {"model": "", "output": "", **{key: value for key, value in select.items() if key not in _GIVEN}}
        problems += field_problems(SelectionJob, given, path, "select.")
    return problems


def _combination_problems(data: Mapping[str, Any], path: str | Path) -> list[str]:
    problems = []
    if data.get("max_length") is not None and data["max_length"] < 2:
        problems.append(f"max_length={data['max_length']} in '{path}' leaves no text. Use 2 or more.")
    if data.get("subspace") is None and data.get("select") is None:
        problems.append(
            f"'{path}' lacks the key 'subspace', so there is no basis to train from. Give the Subspace that "
            "`peft-sae select` wrote, or a section 'select' that says how it is made."
        )
    if data.get("load_in_4bit") and data.get("load_in_8bit"):
        problems.append(f"'{path}' has both load_in_4bit and load_in_8bit. Use one of the two.")
    if data.get("report") is not None and Path(data["report"]).suffix.lower() not in (".html", ".htm"):
        problems.append(f"report={data['report']!r} in '{path}' is no HTML file. Use for example report.html.")
    places = {key: data[key] for key in ("output", "merged", "lora") if data.get(key)}
    places["subspace"] = data.get("subspace") or f"{Path(data['output'])}-subspace"
    if isinstance(data.get("select"), Mapping) and data["select"].get("statistics"):
        places["select.statistics"] = data["select"]["statistics"]
    for one in places:
        for other in places:
            first, second = Path(places[one]).absolute(), Path(places[other]).absolute()
            if one < other and (first == second or first in second.parents or second in first.parents):
                problems.append(
                    f"{one}={places[one]!r} and {other}={places[other]!r} in '{path}' lie in one another, and each "
                    "takes a folder of its own. Give two folders."
                )
    for one, place in places.items():
        if Path(data["model"]).is_dir() and Path(data["model"]).absolute() in Path(place).absolute().parents:
            problems.append(
                f"{one}={place!r} in '{path}' lies in the model's folder, which is read and stays as it is. Give a "
                "folder beside it."
            )
    around = [] if data.get("report") is None else Path(data["report"]).absolute().parents
    for one, place in places.items():
        if Path(place).absolute() in around:
            problems.append(
                f"report={data['report']!r} in '{path}' lies in {one}={place!r}, which is written as a whole. Give "
                "another place."
            )
    architecture = data.get("architecture")
    if architecture is not None and not isinstance(architecture.get("model_type"), str):
        problems.append(
            f"'architecture' in '{path}' lacks 'model_type', so it says nothing. Add it: model_type: gemma2."
        )
    return problems


def check_architecture(job: TrainingJob, config: Any) -> None:
    """Check that a model is what the job's file says of it.

    Args:
        job: the job.
        config: the model's configuration.

    Raises:
        ConfigError: a value differs.
    """
    for key, value in (job.architecture or {}).items():
        parts = [config, config.get_text_config()]
        found = [getattr(part, key) for part in parts if hasattr(part, key)]
        if found and value not in found:
            raise ConfigError(
                f"'architecture' says {key}={value!r}, and '{job.model}' has {found[0]!r}, so a dry run would tell of "
                "another model. Correct it, or leave it out."
            )
