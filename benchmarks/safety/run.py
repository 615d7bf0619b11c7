"""Does an SAE-built subspace align a model better than the alternatives?

    python -m benchmarks.safety.run [--tables main parts protect efficiency] [--bases 5] [--draws 2] [--quick]

Each base model has its own language, pretraining and SAEs (`base.py`); each draw its own topics and forms of
fine-tuning data, their order, and random choices. Every method has the same data, steps and grid of learning rates. The
rate is chosen per base on validation topics, in the first draw, going up and down the grid from its middle until the
score falls; the tests are run at that rate. Results are written one by one, so that a run that was stopped goes on.
`--output benchmarks/safety` adds to the results that lie here, if weights, SAEs and texts are the same; without it, all
is run anew.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import circumstances
from benchmarks.safety.attack import PrefixAttack
from benchmarks.safety.catalogue import RANK, TABLES, Method, methods
from benchmarks.safety.report import write_report
from benchmarks.safety.rows import add_row, check_ground, key, read_rows, ready_rows
from peft_sae.errors import PeftSaeError
from peft_sae.writing import alone

RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)


@dataclass(frozen=True)
class Plan:
    """What is run.

    Attributes:
        bases: where base models are kept.
        output: where results go.
        tables: names of tables.
        draws: per base.
        rates: grid of learning rates, ascending.
        steps: of fine-tuning.
        quick: small bases, to see whether the machinery works.
        commit: of the code.
    """

    bases: Path
    output: Path
    tables: tuple[str, ...]
    draws: int
    rates: tuple[float, ...]
    steps: int
    quick: bool
    commit: str

    def rows(self, seed: int) -> Path:
        """Where the rows of a base are."""
        return self.output / f"runs-{seed}.jsonl"

    @property
    def attack(self) -> PrefixAttack:
        """The attack that is measured."""
        return PrefixAttack(requests=2, rounds=1, reports=(0,)) if self.quick else PrefixAttack()

    @property
    def how(self) -> dict[str, Any]:
        """What every row of a result must have in common."""
        attack = json.loads(json.dumps(asdict(self.attack)))
        return {"steps": self.steps, "rates": list(self.rates), "quick": self.quick, "attack": attack}


def prepare(plan: Plan, seed: int) -> Any:
    """Return the base of a seed, which is trained if it is not there yet."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    from benchmarks.safety.base import QUICK, Size, make_base

    torch.set_num_threads(1)
    logging.getLogger("peft_sae").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    disable_progress_bar()
    return make_base(plan.bases, seed, QUICK if plan.quick else Size(), progress=False)


def _make_base(plan: Plan, seed: int) -> None:
    prepare(plan, seed)  # what it returns stays in its process


def run_base(plan: Plan, draw: int, seed: int, part: int, parts: int) -> None:
    """Run every parts-th method of one draw on one base, and write each result as it comes."""
    from benchmarks.safety.setting import Setting

    base = prepare(plan, seed)
    path = plan.rows(seed)
    done = {key(row): row for row in read_rows(path)}
    check_ground(path, list(done.values()), base.ground, plan.commit)
    settings: dict[tuple[int, bool], Setting] = {}
    for method in _wanted(plan)[part::parts]:
        described = _described(seed, draw, method)
        if key(described) in done:
            continue
        what = described["dangerous"], method is not None and method.neutral
        if what not in settings:
            settings[what] = Setting(base, what[0], draw, neutral=what[1])
        first = done.get(key(_described(seed, 0, method)), {})
        made_with = {"how": plan.how, "commit": plan.commit, "ground": base.ground}
        row = described | made_with | _run(plan, settings[what], method, first.get("rate"))
        add_row(path, row)
        print(json.dumps(row), flush=True)


def _wanted(plan: Plan) -> list[Method | None]:
    """Every method of the tables once; None is the base as it is."""
    made = (method for table in plan.tables for method in methods(table))
    return [None, *{(method.name, method.dangerous): method for method in made}.values()]


def _described(seed: int, draw: int, method: Method | None) -> dict[str, Any]:
    if method is None:
        return {"base": seed, "draw": draw, "method": "base", "dangerous": 1}
    return {"base": seed, "draw": draw, "method": method.name, "dangerous": method.dangerous}


def _run(plan: Plan, setting: Any, method: Method | None, rate: float | None) -> dict[str, Any]:
    from benchmarks.safety.tuning import fine_tune, measure, validation_score

    start = time.monotonic()
    if method is None:
        return {
            "measures": measure(setting.base.load(), setting.base, plan.attack),
            "seconds": time.monotonic() - start,
        }
    batches = setting.batches(plan.steps)
    tried: dict[float, tuple[float, dict[str, float], Any]] = {}

    def score(each: float) -> float:
        if each not in tried:
            model = method.start(setting)
            trained = fine_tune(model, batches, each, penalty=method.penalty)
            tried[each] = validation_score(model, setting.base), trained, model
        return tried[each][0]

    best = climb(plan.rates, score) if rate is None else rate
    validation = score(best)
    _, trained, model = tried[best]
    counts = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    total = sum(parameter.numel() for parameter in setting.base.load().parameters())
    return {
        "rate": best,
        "validation": validation,
        "scores": {each: found[0] for each, found in tried.items()},
        **trained,
        "trained": sum(counts),
        "trained_share": sum(counts) / total,
        "measures": measure(model, setting.base, plan.attack),
        "seconds": round(time.monotonic() - start, 2),
    }


def climb(rates: tuple[float, ...], score: Any) -> float:
    """Go from the middle of a grid to where the score is highest, downwards and upwards until it falls."""
    best = middle = len(rates) // 2
    for step in (1, -1):
        place = middle + step
        while 0 <= place < len(rates) and score(rates[place]) >= score(rates[best]) - _PATIENCE:
            if score(rates[place]) > score(rates[best]):
                best = place
            place += step
    return rates[best]


_PATIENCE = 0.02  # a score that fell by less than this may rise again


def main() -> None:
    """Run the benchmark and write results, tables and plots."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--bases", type=int, default=5, help="how many")
    parser.add_argument("--draws", type=int, default=2, help="per base")
    parser.add_argument("--jobs", type=int, default=2, help="processes, each with one thread")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--folder", type=Path, default=Path("outputs/safety"), help="where bases are kept")
    parser.add_argument("--output", type=Path, default=Path("outputs/safety/results"), help="for rows and tables")
    parser.add_argument("--quick", action="store_true", help="one small base, two rates: whether the machinery works")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.bases, arguments.draws, arguments.steps = 1, 1, 6
    before = circumstances(0, "cpu")
    plan = Plan(
        arguments.folder / ("quick" if arguments.quick else "full"),
        arguments.output,
        tuple(arguments.tables),
        arguments.draws,
        RATES[2:4] if arguments.quick else RATES,
        arguments.steps,
        arguments.quick,
        before["commit"] + (" with changes" if before["uncommitted_changes"] else ""),
    )
    plan.output.mkdir(parents=True, exist_ok=True)
    try:
        with alone(plan.output / "runs"):
            rows = _run_all(plan, range(arguments.bases), arguments.jobs)
    except PeftSaeError as error:
        raise SystemExit(str(error)) from error
    about = {"bases": arguments.bases, "draws": plan.draws, "steps": plan.steps, "rank": RANK, "rates": RATES}
    write_report(plan.output, plan.tables, rows, {**before, **about})


def _run_all(plan: Plan, seeds: Sequence[int], jobs: int) -> list[dict[str, Any]]:
    """Run what is missing, and return the rows of all draws that are asked for."""
    ready_rows([plan.rows(seed) for seed in seeds], plan.how)
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        pool.starmap(_make_base, [(plan, seed) for seed in seeds], chunksize=1)
        for draw in range(plan.draws):  # the first finds the learning rates of all
            tasks = [(plan, draw, seed, part, jobs) for seed in seeds for part in range(jobs)]
            pool.starmap(run_base, tasks, chunksize=1)
    found = [row for seed in seeds for row in read_rows(plan.rows(seed))]
    return [row for row in found if row["draw"] < plan.draws]  # other tables may have more


if __name__ == "__main__":
    main()
