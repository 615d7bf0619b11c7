"""The demo: public stages only, from SAEs and data to a plain fine-tuned checkpoint."""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table

from ..artifact import write_json
from ..cli.tables import print_features
from ..export import merge_checkpoint
from ..jobs import TrainingJob, read_job
from ..jobs.bars import other_bars
from ..jobs.models import load_model
from ..sae import load_saes
from ..subspace import Subspace
from ..subspace.build import build_subspace
from ..subspace.controls import control_subspace
from ..training import train_adapter
from .context import one_thread
from .evaluate import Behaviour, evaluate, read_requests
from .world import World, build_world

if TYPE_CHECKING:
    from peft import PeftModel

_JOB_FILE = Path(__file__).parent / "job.yaml"
_TOP_K = 16
_INTRODUCTION = """\
The language and its topics are invented: 'puvup' or 'dreder' is dangerous or harmless, which the base model has
learned but does not act on. Aligned texts refuse dangerous requests and answer harmless ones; unaligned texts answer
all."""


@dataclass(frozen=True)
class DemoResult:
    """What the demo found.

    Attributes:
        seed: seed of the world and the training.
        before: behaviour of the base model on topics and phrasings that fine-tuning never showed.
        after: behaviour of the merged checkpoint on the same.
        control: behaviour after the same training from a random basis of the same ranks.
        trainable_share: share of the parameters that were trained.
        largest_logit_difference: between the adapted model and the merged checkpoint, over all evaluation prompts.
        seconds: time of each stage.
    """

    seed: int
    before: Behaviour
    after: Behaviour
    control: Behaviour
    trainable_share: float
    largest_logit_difference: float
    seconds: dict[str, float]


def run_demo(directory: str | Path, *, seed: int = 0, progress: bool = True) -> DemoResult:
    """Build the world if it is not there, then select, train, evaluate, merge, reload and compare.

    Args:
        directory: folder for everything; the world of a seed is built once and kept in it.
        seed: seed of the world and of the training.
        progress: show progress bars.

    Returns:
        The numbers that are also printed, and written to `result.json`.

    Raises:
        ArtifactError: the folder holds a damaged world or something else.
    """
    with one_thread(), other_bars(progress):
        return _run(Path(directory) / f"seed-{seed}", seed, progress)


def _run(root: Path, seed: int, progress: bool) -> DemoResult:
    console, clock = Console(), _Clock()
    for name in ("adapter", "merged", "control"):  # the demo's own, of an earlier run
        shutil.rmtree(root / name, ignore_errors=True)
    world = _world(root / "world", seed, progress, console)
    clock.lap("world")
    model, tokenizer = load_model(world.model)
    requests = read_requests(world.evaluation)
    console.print(_INTRODUCTION)
    console.rule("Base model on topics and phrasings that fine-tuning never shows")
    before = evaluate(model, tokenizer, requests, progress=progress)
    _print_behaviour(console, {"base model": before})
    clock.lap("evaluate base")

    console.rule("Select features and build their basis")
    saes = load_saes(world.saes)
    subspace = build_subspace(
        model, tokenizer, saes=saes, aligned=world.aligned, unaligned=world.unaligned, top_k=_TOP_K, progress=progress
    )
    subspace.save_pretrained(root / "subspace")
    print_features(subspace, per_site=5, console=console)
    clock.lap("select")

    console.rule("Train")
    paths = {"model": str(world.model), "data": str(world.aligned), "subspace": str(root / "subspace")}
    job = read_job(_JOB_FILE, **paths, output=str(root / "adapter"))
    adapted = _train(job, model, tokenizer, subspace, seed, progress)
    trained, total = adapted.get_nb_trainable_parameters()
    clock.lap("train")

    console.rule("Merge, reload with plain transformers, evaluate and compare")
    merge_checkpoint(world.model, root / "adapter", root / "merged")
    merged, _ = load_model(root / "merged")
    clock.lap("merge")
    after = evaluate(merged, tokenizer, requests, progress=progress)
    difference = _largest_difference(adapted, merged, tokenizer, [request["prompt"] for request in requests])
    clock.lap("evaluate merged")

    console.rule("Control: the same training from a random basis of the same ranks")
    control_job = replace(job, output=str(root / "control"))
    base, _ = load_model(world.model)
    random = _train(control_job, base, tokenizer, control_subspace(subspace, "random", seed=seed), seed, progress)
    control = evaluate(random, tokenizer, requests, progress=progress)
    clock.lap("control")

    result = DemoResult(seed, before, after, control, trained / total, difference, clock.laps)
    write_json(root / "result.json", asdict(result))
    _print_result(console, result, root)
    return result


def _train(job: TrainingJob, model: Any, tokenizer: Any, subspace: Subspace, seed: int, progress: bool) -> PeftModel:
    config = replace(job.adapter_config(), subspace=subspace)
    return train_adapter(model, tokenizer, job.data, config, job.output, progress=progress, seed=seed, **job.training)


class _Clock:
    """Collects the seconds between calls."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = round(now - self._last, 2)
        self._last = now


def _world(directory: Path, seed: int, progress: bool, console: Console) -> World:
    found = directory.is_dir()
    what = f"found in {directory}" if found else "training a language model and its SAEs, once"
    console.rule(f"World of seed {seed}: {what}")
    return build_world(directory, seed=seed, progress=progress)


@torch.inference_mode()
def _largest_difference(adapted: Any, merged: Any, tokenizer: Any, prompts: list[str]) -> float:
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    arguments = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    difference = (adapted(**arguments).logits - merged(**arguments).logits).abs()
    return float(difference[inputs["attention_mask"].bool()].max())


def _print_behaviour(console: Console, rows: dict[str, Behaviour]) -> None:
    table = Table()
    table.add_column("")
    table.add_column("safety rate (dangerous requests refused)", justify="right")
    table.add_column("helpfulness (harmless requests answered right)", justify="right")
    for name, behaviour in rows.items():
        table.add_row(
            name,
            f"{behaviour.safety:.3f} of {behaviour.dangerous}",
            f"{behaviour.helpfulness:.3f} of {behaviour.harmless}",
        )
    console.print(table)


def _print_result(console: Console, result: DemoResult, root: Path) -> None:
    console.rule("Result")
    rows = {"base model": result.before, "fine-tuned, merged": result.after, "control: random basis": result.control}
    _print_behaviour(console, rows)
    console.print(f"share of parameters trained: {100 * result.trainable_share:.2f} %")
    console.print(
        f"largest logit difference between adapter and merged checkpoint: {result.largest_logit_difference:.2e}"
    )
    console.print("seconds: " + ", ".join(f"{name} {seconds:.1f}" for name, seconds in result.seconds.items()))
    for name in ("world", "subspace", "adapter", "merged", "result.json"):
        console.print(f"{name:>12}: {root / name}", highlight=False)
    console.print(
        f"To look into it: peft-sae inspect {root / 'adapter'} --html {root / 'report.html'}", highlight=False
    )
