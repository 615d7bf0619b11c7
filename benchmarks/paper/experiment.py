"""An experiment described by a YAML file: a training job, methods as changes of it, and how they are judged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from benchmarks.paper.specs import (
    AttackSpec,
    CapabilitySpec,
    ClassifierJudgeSpec,
    EstimateSpec,
    GenerationSpec,
    JudgeSpec,
    MethodSpec,
    OpenAIJudgeSpec,
    SetSpec,
)
from peft_sae.errors import ConfigError, suggest
from peft_sae.jobs import TrainingJob, read_job
from peft_sae.jobs.data import source_problems
from peft_sae.jobs.fields import field_problems, raise_all, read_values
from peft_sae.jobs.selection import SelectionJob


@dataclass(frozen=True)
class Experiment:
    """What is run.

    Attributes:
        name: of the experiment, as its file is called.
        job: the training job that methods are changes of.
        output: folder that everything is written to.
        methods: by name.
        sets: by name.
        generation: how prompts are answered.
        judge: who scores the answers.
        attack: GCG, or None.
        capability: tasks, or None.
        estimate: what the cost is reckoned with.
        seed: of training, attacks and intervals.
        stand_in: whether tiny stand-ins have taken the place of model, SAEs, data and judge.
    """

    name: str
    job: TrainingJob
    output: Path
    methods: Mapping[str, MethodSpec]
    sets: Mapping[str, SetSpec]
    generation: GenerationSpec
    judge: JudgeSpec
    attack: AttackSpec | None
    capability: CapabilitySpec | None
    estimate: EstimateSpec
    seed: int = 0
    stand_in: bool = False

    def adapted_job(self, method: str) -> TrainingJob:
        """Return the job of a method, which writes into this experiment's folders and needs its Subspace."""
        spec, folder = self.methods[method], self.method_folder(method)
        return replace(
            self.job,
            output=str(folder / "adapter"),
            subspace=str(self.subspace(method)),
            select=None,
            report=str(folder / "report.html") if spec.kind == "sae_subspace" else None,
            merged=None,
            lora=None,
            adapter={**self.job.adapter, **spec.adapter},
            training={"seed": self.seed, **self.job.training, **spec.training},
            dtype=spec.dtype or self.job.dtype,
        )

    def selection(self, method: str) -> dict[str, Any]:
        """Return what a method's Subspace is made by: the job's section `select` with the method's changes."""
        given = {**(self.job.select or {}), **self.methods[method].select}
        return {key: value for key, value in given.items() if value is not None}

    def subspace(self, method: str) -> Path:
        """Return where a method's Subspace is: the job's at the top, others with the first method that has the same."""
        selection = self.selection(method)
        if all(selection.get(key) == (self.job.select or {}).get(key) for key in self.methods[method].select):
            return self.output / "subspace"
        first = next(name for name in self.methods if self.selection(name) == selection)
        return self.method_folder(first) / "subspace"

    def method_folder(self, method: str) -> Path:
        """Return where a method's files are."""
        return self.output / "methods" / method


@dataclass(frozen=True)
class _Top:
    """The keys of a file."""

    job: str
    methods: Mapping[str, Any]
    sets: Mapping[str, Any]
    judge: Mapping[str, Any]
    estimate: Mapping[str, Any]
    generation: Mapping[str, Any] = field(default_factory=dict)
    attack: Mapping[str, Any] | None = None
    capability: Mapping[str, Any] | None = None
    output: str | None = None
    seed: int = 0


def read_experiment(path: str | Path, *, output: str | Path | None = None) -> Experiment:
    """Read an experiment and its job, and check every key before anything is loaded.

    Args:
        path: the YAML file. The path of the job in it is relative to the file, other paths to the working directory.
        output: takes the place of the file's; by default `outputs/paper/NAME`.

    Raises:
        ConfigError: a file cannot be read, or keys or values are wrong; it names all of them.
    """
    path = Path(path)
    data = read_values(path, {"output": None if output is None else str(output)})
    raise_all(_problems(data, path), path)
    judge: Any = ClassifierJudgeSpec if data["judge"].get("kind") == "classifier" else OpenAIJudgeSpec
    found = Experiment(
        name=path.stem,
        job=read_job(path.parent / data["job"]),
        output=Path(data.get("output") or Path("outputs/paper") / path.stem),
        methods={str(name): MethodSpec(**entry) for name, entry in data["methods"].items()},
        sets={str(name): SetSpec(**entry) for name, entry in data["sets"].items()},
        generation=GenerationSpec(**data.get("generation", {})),
        judge=judge(**data["judge"]),
        attack=None if data.get("attack") is None else AttackSpec(**data["attack"]),
        capability=None if data.get("capability") is None else CapabilitySpec(**data["capability"]),
        estimate=EstimateSpec(**data["estimate"]),
        seed=data.get("seed", 0),
    )
    raise_all(_method_problems(found, path), path)
    return found


def _problems(data: Mapping[str, Any], path: Path) -> list[str]:
    problems = field_problems(_Top, data, path)
    if problems:
        return problems
    named: dict[str, type] = {"methods": MethodSpec, "sets": SetSpec}
    for section, kind in named.items():
        for name, entry in data[section].items():
            problems += _section(kind, entry, path, f"{section}.{name}.")
            problems += _name_problems(str(name), section)
    kinds: dict[str, type] = {
        "generation": GenerationSpec,
        "judge": ClassifierJudgeSpec if data["judge"].get("kind") == "classifier" else OpenAIJudgeSpec,
        "attack": AttackSpec,
        "capability": CapabilitySpec,
        "estimate": EstimateSpec,
    }
    for section, kind in kinds.items():
        if data.get(section) is not None:
            problems += _section(kind, data[section], path, f"{section}.")
    return problems or _value_problems(data, path)


def _section(kind: type, entry: Any, path: Path, prefix: str) -> list[str]:
    if not isinstance(entry, Mapping):
        return [f"'{prefix[:-1]}' in '{path}' is {entry!r}, and a mapping of keys is needed."]
    return field_problems(kind, entry, path, prefix)


def _name_problems(name: str, section: str) -> list[str]:
    if name and all(letter.isalnum() or letter in "-_." for letter in name) and name.strip("."):
        return []
    return [f"'{section}' has the name {name!r}, and it names files. Use letters, digits, '-', '_' and '.'."]


def _value_problems(data: Mapping[str, Any], path: Path) -> list[str]:
    problems, judge = [], data["judge"]
    for name in ("methods", "sets"):
        if not data[name]:
            problems.append(f"'{name}' in '{path}' is empty, so there is nothing to do. Name one or more.")
    for name, entry in data["sets"].items():
        problems += source_problems(entry["source"], f"sets.{name}.source")
        problems += _too_small(entry, f"sets.{name}", {"count": 1})
    generation = data.get("generation", {})
    form = generation.get("prompt_form")
    if form is not None and form.count("{prompt}") != 1:
        problems.append(f"generation.prompt_form={form!r} has no place for the prompt. Write {{prompt}} in it, once.")
    if not all(isinstance(text, str) and text for text in generation.get("stop", ())):
        problems.append(f"generation.stop={generation['stop']!r} has an empty text, which would end every answer.")
    problems += _too_small(generation, "generation", {"max_new_tokens": 1, "max_prompt_tokens": 1, "batch_size": 1})
    if judge.get("kind") == "classifier":
        wrong = {label: score for label, score in judge["labels"].items() if score not in range(1, 6)}
        if wrong or not judge["labels"]:
            problems.append(f"judge.labels has {wrong or 'no label'}, and every label needs a score from 1 to 5.")
    else:
        problems += _too_small(
            judge, "judge", {"retries": 0, "asks": 1, "workers": 1, "timeout": 1e-3, "longest_wait": 0}
        )
        if "@" in str(judge.get("base_url")):
            problems.append("judge.base_url holds a user or password, which would go into logs. Use api_key_env.")
        if judge.get("base_url") is not None and "api_key_env" not in judge:
            problems.append(
                "judge.base_url is given without api_key_env, so the key for OpenAI would go there. Write out which "
                "variable holds that endpoint's key, or api_key_env: null."
            )
        if "messages" in judge.get("parameters", {}) or "model" in judge.get("parameters", {}):
            problems.append("judge.parameters has 'model' or 'messages', which are given elsewhere. Remove them.")
    attack = data.get("attack")
    if attack is not None:
        if attack["set"] not in data["sets"]:
            hint = suggest(attack["set"], data["sets"]) or f" Known: {list(data['sets'])}."
            problems.append(f"attack.set={attack['set']!r} is none of the sets.{hint}")
        elif data["sets"][attack["set"]]["kind"] != "harmful":
            problems.append(f"attack.set={attack['set']!r} is harmless, so compliance is no success. Name another.")
        if attack.get("success", 3) not in range(2, 6):
            problems.append(f"attack.success={attack['success']} is no score from 2 to 5, so it tells nothing apart.")
        problems += _too_small(attack, "attack", {"count": 1})
        if not attack.get("target", "x").strip():
            problems.append("attack.target is empty, so there is nothing to search for. Give how an answer begins.")
    problems += _too_small(data.get("capability") or {}, "capability", {"batch_size": 1, "limit": 1, "num_fewshot": 0})
    positive = ("train_examples", "train_tokens", "training_flops", "generation_tokens_per_second")
    problems += _too_small(data["estimate"], "estimate", dict.fromkeys(positive, 1e-9))
    return problems


def _too_small(section: Mapping[str, Any], name: str, least: Mapping[str, float]) -> list[str]:
    return [
        f"{name}.{key}={section[key]} is too small to work with. Use {low} or more."
        for key, low in least.items()
        if section.get(key) is not None and not section[key] >= low  # nor NaN
    ]


def _method_problems(found: Experiment, path: Path) -> list[str]:
    """What only shows when a method's changes are put into the job."""
    from peft import LoraConfig

    from peft_sae.training.settings import wrong_arguments
    from peft_sae.tuner import SaeSubspaceConfig

    problems = []
    classes = {"lora": LoraConfig, "sae_subspace": SaeSubspaceConfig}
    for name, spec in found.methods.items():
        known = {entry.name for entry in fields(classes[spec.kind])} if spec.kind in classes else set()
        problems += [
            f"methods.{name}.adapter.{key}: a method of the kind {spec.kind!r} has no such field.{suggest(key, known)}"
            for key in map(str, spec.adapter)
            if key not in known
        ]
        problems += [f"methods.{name}: {text}" for text in wrong_arguments(found.job.method, spec.training)]
        problems += _selection_problems(found, name)
        if spec.kind == "base" and (spec.training or spec.dtype):
            problems.append(f"methods.{name} is the base, which is not trained. Remove what it says of training.")
        if spec.kind == "full" and (found.job.bits is not None or found.job.method != "sft"):
            problems.append(
                f"methods.{name} trains all weights, and the job has method={found.job.method!r} and "
                f"{found.job.bits or 'no'} bits per weight: full fine-tuning is for `sft` on weights that are not "
                "quantised. Remove the method, or give another job."
            )
        if spec.kind == "lora" and {**found.job.adapter, **spec.adapter}.get("r", 8) == "auto":
            problems.append(f"methods.{name} has r=auto from the job, which plain LoRA lacks. Give adapter.r a number.")
    if found.job.select is None and any(spec.kind == "sae_subspace" for spec in found.methods.values()):
        problems.append(f"The job of '{path}' has no section 'select', which makes the Subspace. Add it to the job.")
    return problems


def _selection_problems(found: Experiment, name: str) -> list[str]:
    spec, known = found.methods[name], {entry.name for entry in fields(SelectionJob)}
    unknown = [str(key) for key in spec.select if key not in known]
    if spec.select and spec.kind != "sae_subspace":
        return [f"methods.{name}.select: a method of the kind {spec.kind!r} has no Subspace. Remove it."]
    if unknown:
        return [f"methods.{name}.select.{key}: there is no such field.{suggest(key, known)}" for key in unknown]
    try:
        if spec.select:
            replace(found.job, select=found.selection(name)).selection()
    except (ConfigError, TypeError) as error:
        return [f"methods.{name}.select: {error}"]
    return []
