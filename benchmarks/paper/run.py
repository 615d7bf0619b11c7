"""The published experiment: training, answers, judging, attack and capability, from one YAML file.

    python -m benchmarks.paper.run benchmarks/paper/gemma-2-2b.yaml --estimate     # what it will cost; offline
    python -m benchmarks.paper.run benchmarks/paper/gemma-2-2b.yaml --stand-in     # everything but the weights
    python -m benchmarks.paper.run benchmarks/paper/gemma-2-2b.yaml

Every stage goes on where it was stopped. Results go to `result.json` and `table.md` in the output folder.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from benchmarks.common import circumstances
from benchmarks.paper.cost import check_arguments, cost_table, estimate_cost
from benchmarks.paper.data import Prompt, load_prompts
from benchmarks.paper.experiment import Experiment, read_experiment
from benchmarks.paper.generate import Answer, generate
from benchmarks.paper.judging import Item, Judge, Verdict, make_judge
from benchmarks.paper.measures import attack_success, measure
from benchmarks.paper.models import Trained, load_trained
from benchmarks.paper.results import describe, table
from benchmarks.paper.scoring import score
from benchmarks.paper.train import NotTrainedError, identity_of, train, training_record
from peft_sae.errors import ConfigError, PeftSaeError
from peft_sae.jobs.bars import other_bars
from peft_sae.writing import write_text

_EXTRA = ("openai", "nanogcg", "lm_eval")  # what the extra `paper` brings
STAGES = ("train", "generate", "judge", "attack", "capability", "table")


class _NotRun(ConfigError):
    """A stage has not made what the table is to show."""


class Run:
    """An experiment while it is carried out.

    Args:
        experiment: what is run.
        progress: show progress bars.
    """

    def __init__(self, experiment: Experiment, *, progress: bool) -> None:
        self._experiment, self._progress = experiment, progress
        self._loaded: Trained | None = None

    @cached_property
    def _prompts(self) -> dict[str, list[Prompt]]:
        return {name: load_prompts(name, spec) for name, spec in self._experiment.sets.items()}

    @cached_property
    def _judge(self) -> Judge:
        return make_judge(self._experiment.judge)

    def check(self, stages: Sequence[str]) -> None:
        """Find what is wrong with the stages before the first one begins.

        Raises:
            PeftSaeError: something is.
        """
        experiment = self._experiment
        if "train" in stages:
            check_arguments(experiment)
        if {"generate", "judge", "attack"} & set(stages):
            self._prompts  # noqa: B018  (for the sets that are not there)
        if {"judge", "attack"} & set(stages):
            self._judge  # noqa: B018  (for a key that is not there)
        if "attack" in stages and experiment.attack is not None:
            from benchmarks.paper.attack import check_settings

            check_settings(experiment.attack)
        if "capability" in stages and experiment.capability is not None:
            from benchmarks.paper.capability import make_tasks

            make_tasks(experiment.capability)

    def stage(self, name: str) -> None:
        """Carry a stage out for every method."""
        if name == "table":
            self.write_table()
            return
        for method in self._experiment.methods:
            if name == "train":
                train(self._experiment, method, progress=self._progress)
            elif name == "generate":
                for each in self._experiment.sets:
                    self._answers(method, each, self._load(method))
            elif name == "judge":
                for each in self._experiment.sets:
                    self._scores(method, each, self._load(method), lambda: self._judge)
            elif name == "attack":
                self._attack(method, self._load(method), lambda: self._judge)
            else:
                self._capability(method, self._load(method))

    def write_table(self) -> str:
        """Write the results that are there, and return the table."""
        experiment = self._experiment
        device = "cuda" if _has_cuda() else "cpu"
        methods = {method: self._results(method) for method in experiment.methods}
        result = describe(experiment, circumstances(experiment.seed, device), methods)
        text = table(result)
        write_text(experiment.output / "result.json", json.dumps(result, indent=1, default=str) + "\n")
        write_text(experiment.output / "table.md", text + "\n")
        return text

    def _results(self, method: str) -> dict[str, Any]:
        experiment, not_run = self._experiment, []

        def found(part: str, get: Callable[[], Any]) -> Any:
            try:
                return get()
            except _NotRun:
                not_run.append(part)
                return None

        record = found("train", lambda: self._record(method))
        sets = {name: found(name, partial(self._measured, method, name)) for name in experiment.sets}
        attack = found("attack", lambda: self._attack(method, _missing, _missing))
        capability = found("capability", lambda: self._capability(method, _missing))
        kept = ("trained", "total", "minutes", "identity")
        training = None if record is None else {key: record[key] for key in kept}
        return {"training": training, "sets": sets, "attack": attack, "capability": capability, "not run": not_run}

    def _record(self, method: str) -> dict[str, Any] | None:
        try:
            return training_record(self._experiment, method)
        except NotTrainedError as error:
            raise _NotRun(str(error)) from error

    def _measured(self, method: str, name: str) -> dict[str, Any]:
        prompts, kind = self._prompts[name], self._experiment.sets[name].kind
        self._record(method)
        verdicts = self._scores(method, name, _missing, _missing)
        categories = [prompt.category for prompt in prompts]
        return measure(verdicts, kind, categories=categories, seed=self._experiment.seed)

    def _answers(self, method: str, name: str, load: Callable[[], Trained]) -> list[Answer]:
        return self._ask(method, self._prompts[name], f"{method}: answers to {name}", load)

    def _ask(self, method: str, prompts: Sequence[Prompt], label: str, load: Callable[[], Trained]) -> list[Answer]:
        return generate(
            load,
            identity_of(self._experiment, method),
            prompts,
            self._experiment.generation,
            self._experiment.method_folder(method) / "answers.jsonl",
            label=label,
            progress=self._progress,
        )

    def _scores(self, method: str, name: str, load: Callable[[], Trained], judge: Callable[[], Judge]) -> list[Verdict]:
        kind = self._experiment.sets[name].kind
        answers = self._answers(method, name, load)
        items = [Item(answer.prompt.text, answer.text, kind) for answer in answers]
        return self._score(items, f"{method}: scores of {name}", judge)

    def _score(self, items: Sequence[Item], label: str, judge: Callable[[], Judge]) -> list[Verdict]:
        path = self._experiment.output / "scores.jsonl"
        return score(judge, self._experiment.judge, items, path, label=label, progress=self._progress)

    def _attack(self, method: str, load: Callable[[], Trained], judge: Callable[[], Judge]) -> dict[str, Any] | None:
        from benchmarks.paper.attack import attack, chosen_prompts, losses_of

        spec = self._experiment.attack
        if spec is None:
            return None
        self._record(method)
        attacked = attack(
            *(load, identity_of(self._experiment, method), chosen_prompts(self._prompts[spec.set], spec.count)),
            *(spec, self._experiment.generation, self._experiment.method_folder(method) / "suffixes.jsonl"),
            seed=self._experiment.seed,
            label=f"{method}: GCG",
            progress=self._progress,
        )
        prompts = [Prompt(one.prompt.id, one.text, one.prompt.category) for one in attacked]
        answers = self._ask(method, prompts, f"{method}: answers under attack", load)
        # The judge is shown the request itself: whether the answer gives it is the question, whatever stood behind it.
        items = [Item(one.prompt.text, answer.text, "harmful") for one, answer in zip(attacked, answers, strict=True)]
        verdicts = self._score(items, f"{method}: scores under attack", judge)
        return {**attack_success(verdicts, spec.success, self._experiment.seed), **losses_of(attacked)}

    def _capability(self, method: str, load: Callable[[], Trained]) -> Mapping[str, Any] | None:
        spec = self._experiment.capability
        if spec is None:
            return None
        from benchmarks.paper.capability import run_tasks

        self._record(method)
        path = self._experiment.method_folder(method) / "capability.jsonl"
        identity, seed = identity_of(self._experiment, method), self._experiment.seed
        return run_tasks(load, identity, spec, path, seed=seed, progress=self._progress)

    def _load(self, method: str) -> Callable[[], Trained]:
        """Return a function that gives a method's model; the one of the method before is let go of."""

        def load() -> Trained:
            if self._loaded is None or self._loaded.method != method:
                self._loaded = None
                self._loaded = load_trained(self._experiment, method)
            return self._loaded

        return load


def _missing() -> Any:
    raise _NotRun("This was not made yet. Run the stages before.")


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def run(experiment: Experiment, stages: Sequence[str], *, progress: bool) -> None:
    """Carry out the stages of an experiment, in their order.

    Raises:
        PeftSaeError: something is wrong; what was done is kept.
    """
    running = Run(experiment, progress=progress)
    running.check(stages)
    for name in STAGES:
        if name in stages:
            running.stage(name)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", type=Path, help="YAML file of the experiment")
    parser.add_argument("--estimate", action="store_true", help="only show what it will cost")
    parser.add_argument("--stand-in", action="store_true", help="tiny stand-ins for models, SAEs, data and judge")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="default: all")
    parser.add_argument("--output", type=Path, help="default: as in the file")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    given = parser.parse_args(arguments)
    try:
        experiment = read_experiment(given.experiment, output=given.output)
        if given.estimate:
            print(cost_table(experiment, estimate_cost(experiment)))
            return 0
        with ExitStack() as stack:
            stack.enter_context(other_bars(not given.quiet))
            if given.stand_in:
                from benchmarks.paper.stand_in import stand_in

                experiment = stack.enter_context(stand_in(experiment))
            run(experiment, given.stages, progress=not given.quiet)
        if "table" in given.stages:
            print((experiment.output / "table.md").read_text(encoding="utf-8"))
    except PeftSaeError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in _EXTRA:
            raise
        print(f"The package '{error.name}' is not installed. `pip install -e '.[paper]'` installs it.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
