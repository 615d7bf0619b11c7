"""Capability tasks through lm-evaluation-harness, cached task by task."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from functools import lru_cache
from io import StringIO
from pathlib import Path
from typing import Any

from benchmarks.common import digest_of
from benchmarks.paper.lines import key_of, open_lines
from benchmarks.paper.models import Trained
from benchmarks.paper.specs import CapabilitySpec
from peft_sae.errors import ConfigError, suggest


def make_tasks(spec: CapabilitySpec) -> Any:
    """Return the harness' task manager.

    Raises:
        ConfigError: a task is unknown.
    """
    if spec.include_path is not None and not Path(spec.include_path).is_dir():
        raise ConfigError(f"capability.include_path={spec.include_path!r} is no folder. Correct it, or leave it out.")
    if spec.include_path is not None:
        own = _manager(spec.include_path, False)
        if set(spec.tasks) <= set(own.all_tasks):
            return own
    manager = _manager(spec.include_path, True)
    for name in spec.tasks:
        if name not in manager.all_tasks:
            hint = suggest(name, manager.all_tasks) or " `lm-eval ls tasks` lists them."
            raise ConfigError(f"capability.tasks has {name!r}, which lm-evaluation-harness does not know.{hint}")
    return manager


@lru_cache
def _manager(include_path: str | None, include_defaults: bool) -> Any:
    """The harness' own tasks are 14,000 files, which take it half a minute to read."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path, include_defaults=include_defaults)


def run_tasks(
    load: Callable[[], Trained], identity: str, spec: CapabilitySpec, path: Path, *, seed: int, progress: bool
) -> dict[str, dict[str, Any]]:
    """Return each task's metric with its standard error, and run the tasks for which that was not done.

    Args:
        load: gives the model, and is only called if there is something to do.
        identity: the model's.
        spec: the tasks.
        path: the cache.
        seed: of few-shot examples.
        progress: show the harness' progress bars.

    Raises:
        ConfigError: a task or its metric is unknown.
    """
    own_tasks = None if spec.include_path is None else digest_of(spec.include_path)
    settings = [spec.num_fewshot, spec.limit, spec.apply_chat_template, seed, own_tasks]
    keys = {task: key_of("capability", identity, task, metric, settings) for task, metric in spec.tasks.items()}
    with open_lines(path) as cache:
        left = [task for task, key in keys.items() if key not in cache]
        if left:
            with _quiet(progress):
                harness = _Harness(load(), spec, seed)
                for task in left:
                    cache.add(keys[task], {"task": task, **harness.run(task)})
        return {task: dict(cache[key]) for task, key in keys.items()}


class _Harness:
    """A model behind the harness' interface, and the tasks."""

    def __init__(self, trained: Trained, spec: CapabilitySpec, seed: int) -> None:
        from lm_eval.models.huggingface import HFLM

        self._spec, self._tasks = spec, make_tasks(spec)
        self._seeds = {f"{kind}_seed": seed for kind in ("random", "numpy_random", "torch_random", "fewshot_random")}
        self._model = HFLM(pretrained=trained.model, tokenizer=trained.tokenizer, batch_size=spec.batch_size)

    def run(self, task: str) -> dict[str, Any]:
        """Return a task's metric."""
        import lm_eval

        found = lm_eval.simple_evaluate(
            model=self._model,
            tasks=[task],
            task_manager=self._tasks,
            num_fewshot=self._spec.num_fewshot,
            limit=self._spec.limit,
            apply_chat_template=self._spec.apply_chat_template,
            log_samples=False,
            bootstrap_iters=1000,
            **self._seeds,
        )
        return _metric(task, self._spec.tasks[task], {} if found is None else found["results"][task])


@contextmanager
def _quiet(progress: bool) -> Iterator[None]:
    """Without the harness' log and, as it has no switch for them, without its progress bars."""
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        if progress:
            yield
        else:
            with redirect_stderr(StringIO()):
                yield
    finally:
        log.setLevel(level)


def _metric(task: str, metric: str, results: Any) -> dict[str, Any]:
    """A metric, which the harness names together with the filter of answers: `exact_match,strict-match`."""
    for name in (metric, f"{metric},none"):
        if name in results:
            base, _, filtered = name.partition(",")
            error = results.get(f"{base}_stderr,{filtered}")
            stderr = error if isinstance(error, float) else None
            return {"metric": metric, "value": float(results[name]), "stderr": stderr}
    known = sorted(name for name in results if "," in name and "_stderr" not in name)
    raise ConfigError(f"capability.tasks wants {metric!r} of {task!r}, which has {known}. Name one of these.")
