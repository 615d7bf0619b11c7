"""Does an SAE-built subspace align a model better than the alternatives?

    python -m benchmarks.safety.run [--bases 5] [--draws 3] [--jobs 2] [--quick]

Each base model has its own language, pretraining and SAEs (`base.py`); each draw its own order of data and random
choices. Every method has the same data, steps and grid of learning rates; the rate is chosen on validation topics, and
the tests are run once, at that rate. Results go to `runs.jsonl` one by one, so that a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import circumstances, summary

HERE = Path(__file__).parent
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
COLUMNS = (
    "safety",
    "safety, cue swapped",
    "safety, unseen kinds",
    "attack success",
    "over-refusal",
    "over-refusal, harmless questions",
    "helpfulness",
    "corpus loss",
)


@dataclass(frozen=True)
class Plan:
    """What is run.

    Attributes:
        bases: where base models are kept.
        output: where results go.
        draws: per base.
        methods: names from the catalogue; empty for all.
        rates: grid of learning rates.
        steps: of fine-tuning.
        dangerous: dangerous topics in fine-tuning.
        rank: of adapters.
        quick: small bases, to see whether the machinery works.
    """

    bases: Path
    output: Path
    draws: int
    methods: tuple[str, ...]
    rates: tuple[float, ...]
    steps: int
    dangerous: int
    rank: int
    quick: bool


def run_base(plan: Plan, seed: int) -> None:
    """Run every draw and method on one base, and write each result as it comes."""
    from transformers.utils.logging import disable_progress_bar

    from benchmarks.safety.base import QUICK, Size, make_base
    from benchmarks.safety.methods import Setting, catalogue

    torch.set_num_threads(1)
    logging.getLogger("peft_sae").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    disable_progress_bar()
    base = make_base(plan.bases, seed, QUICK if plan.quick else Size(), progress=False)
    path = plan.output / f"runs-{seed}.jsonl"
    done = {_key(row) for row in read_rows(path)}
    methods = catalogue(plan.rank)
    for draw in range(plan.draws):
        setting = Setting(base, plan.dangerous, draw)
        for name in ("base", *(plan.methods or methods)):
            row = {"base": seed, "draw": draw, "method": name, "rank": plan.rank, "dangerous": plan.dangerous}
            if _key(row) in done:
                continue
            start = time.monotonic()
            row |= _run(plan, setting, None if name == "base" else methods[name].start)
            row["seconds"] = round(time.monotonic() - start, 2)
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)


def _run(plan: Plan, setting: Any, start: Any) -> dict[str, Any]:
    from benchmarks.safety.attack import PrefixAttack
    from benchmarks.safety.tuning import fine_tune, measure, validation_score

    attack = PrefixAttack(requests=2, rounds=1) if plan.quick else PrefixAttack()
    if start is None:
        return {"measures": measure(setting.base.load(), setting.base, attack)}
    best: dict[str, Any] = {"validation": -1.0}
    batches, scores = setting.data.batches(plan.steps), {}
    for rate in plan.rates:
        model = start(setting)
        trained = fine_tune(model, batches, rate)
        scores[rate] = validation_score(model, setting.base)
        if scores[rate] > best["validation"]:
            best = {"validation": scores[rate], "rate": rate, **trained, "model": model}
    model = best.pop("model")
    counts = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    total = sum(parameter.numel() for parameter in model.parameters())
    share = {"trained": sum(counts), "trained_share": sum(counts) / total}
    return {**best, **share, "scores": scores, "measures": measure(model, setting.base, attack)}


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("base", "draw", "method", "rank", "dangerous"))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read what a run has written so far; a line that a stop has cut is left out."""
    if not path.is_file():
        return []
    return list(_whole_lines(path.read_text()))


def _whole_lines(text: str) -> Iterator[dict[str, Any]]:
    for line in text.splitlines(keepends=True):
        if line.endswith("\n"):
            yield json.loads(line)


def table(rows: list[dict[str, Any]]) -> str:
    """Return the results as Markdown: means over bases and draws, with bootstrap 95 % intervals over the bases."""
    lines = ["| method | trained | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 2) + "|"]
    for method in dict.fromkeys(row["method"] for row in rows):
        group = [row for row in rows if row["method"] == method]
        share = [row["trained_share"] for row in group if "trained_share" in row]
        cells = [method, f"{100 * sum(share) / len(share):.2f} %" if share else "-"]
        for column in COLUMNS:
            by_base: dict[int, list[float]] = {}
            for row in group:
                by_base.setdefault(row["base"], []).append(row["measures"][column])
            found = summary([sum(values) / len(values) for values in by_base.values()])
            cells.append(f"{found['mean']:.3f} [{found['low']:.3f}, {found['high']:.3f}]")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run the benchmark and write results and table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bases", type=int, default=5)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="processes, each with one thread")
    parser.add_argument("--methods", nargs="*", default=(), help="default: all")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--dangerous", type=int, default=16)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--folder", type=Path, default=Path("outputs/safety"), help="where bases are kept")
    parser.add_argument("--output", type=Path, default=HERE)
    parser.add_argument("--quick", action="store_true", help="one small base, two rates: whether the machinery works")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.bases, arguments.draws, arguments.steps = 1, 1, 6
    plan = Plan(
        arguments.folder / ("quick" if arguments.quick else "full"),
        arguments.output,
        arguments.draws,
        tuple(arguments.methods),
        RATES[2:4] if arguments.quick else RATES,
        arguments.steps,
        arguments.dangerous,
        arguments.rank,
        arguments.quick,
    )
    before, start = circumstances(0, "cpu"), time.monotonic()
    plan.output.mkdir(parents=True, exist_ok=True)
    seeds = range(arguments.bases)
    with multiprocessing.get_context("spawn").Pool(min(arguments.jobs, len(seeds))) as pool:
        pool.starmap(run_base, [(plan, seed) for seed in seeds], chunksize=1)
    rows = [row for seed in seeds for row in read_rows(plan.output / f"runs-{seed}.jsonl")]
    result = {
        "benchmark": "safety after fine-tuning",
        **before,
        "bases": arguments.bases,
        "draws": arguments.draws,
        "steps": arguments.steps,
        "dangerous": arguments.dangerous,
        "rank": arguments.rank,
        "rates": plan.rates,
        "minutes": round((time.monotonic() - start) / 60, 1),
        "rows": rows,
    }
    (plan.output / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    (plan.output / "table.md").write_text(table(rows) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
