"""Does an SAE-built subspace align a model better than the alternatives?

    python -m benchmarks.safety.run [--tables main parts protect efficiency confirm] [--bases 5] [--draws N] [--quick]

Each base model has its own language, pretraining and SAEs (`base.py`); each draw its own topics and forms of
fine-tuning data, their order, and random choices. Every method has the same data, steps and grid of learning rates. The
rate is chosen per base on validation topics, in the first draw, going up and down the grid from its middle until the
score falls; the tests are run at that rate. The table `confirm` has bases of its own, on which nothing was chosen
before. Results are written one by one, so that a run that was stopped goes on.
`--output benchmarks/safety` adds to the results that lie here, if weights, SAEs and texts are the same; without it, all
is run anew.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import time
import warnings
from argparse import SUPPRESS
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from benchmarks.common import at_least_one, circumstances, options
from benchmarks.safety.attack import PrefixAttack
from benchmarks.safety.catalogue import RANK, TABLES, Extent, Method, extents, methods
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
        tables: what each is run on.
        rates: grid of learning rates, ascending.
        steps: of fine-tuning.
        quick: small bases, to see whether the machinery works.
        commit: of the code.
    """

    bases: Path
    output: Path
    tables: Mapping[str, Extent]
    rates: tuple[float, ...]
    steps: int
    quick: bool
    commit: str

    @property
    def seeds(self) -> list[int]:
        """Of all bases."""
        return sorted({seed for extent in self.tables.values() for seed in extent.seeds})

    @property
    def draws(self) -> int:
        """The most of any table."""
        return max(extent.draws for extent in self.tables.values())

    def methods(self, seed: int, draw: int) -> list[Method | None]:
        """Every method that one draw on a base is wanted for, once; None is the base as it is."""
        tables = [name for name, each in self.tables.items() if seed in each.seeds and draw < each.draws]
        made = {(method.name, method.dangerous): method for table in tables for method in methods(table)}
        return [None, *made.values()] if tables else []

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
    for method in plan.methods(seed, draw)[part::parts]:
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
    parser = options(__doc__)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES), help="what to run")
    parser.add_argument("--bases", type=at_least_one, default=5, help="how many for each table")
    parser.add_argument(
        "--draws", type=at_least_one, default=SUPPRESS, help="per base (default: 2 for main, 1 for the others)"
    )
    parser.add_argument("--jobs", type=at_least_one, default=2, help="processes, each with one thread")
    parser.add_argument("--steps", type=at_least_one, default=80, help="of fine-tuning")
    parser.add_argument("--folder", type=Path, default=Path("outputs/safety"), help="where bases are kept")
    parser.add_argument("--output", type=Path, default=Path("outputs/safety/results"), help="for rows and tables")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="whether the machinery works: one small base, one draw, six steps, two rates; numbers say nothing",
    )
    arguments = parser.parse_args()
    draws = vars(arguments).get("draws")
    try:
        tables = extents(arguments.tables, bases=arguments.bases, draws=draws, quick=arguments.quick)
    except PeftSaeError as error:
        raise SystemExit(str(error)) from error
    before = circumstances(0, "cpu")
    plan = Plan(
        arguments.folder / ("quick" if arguments.quick else "full"),
        arguments.output,
        tables,
        RATES[2:4] if arguments.quick else RATES,
        6 if arguments.quick else arguments.steps,
        arguments.quick,
        before["commit"] + (" with changes" if before["uncommitted_changes"] else ""),
    )
    plan.output.mkdir(parents=True, exist_ok=True)
    try:
        with alone(plan.output / "runs"):
            rows = _run_all(plan, arguments.jobs)
    except PeftSaeError as error:
        raise SystemExit(str(error)) from error
    about = {
        "steps": plan.steps,
        "rank": RANK,
        "rates": RATES,
        "quick": plan.quick,
    }
    write_report(plan.output, plan.tables, rows, {**before, **about})
    print(f"Rows, tables and plots are in '{plan.output}'.", end=" ")
    page = f"`python -m benchmarks.results --safety {plan.output} --output PAGE.md` makes a page of them."
    print("A quick run's numbers say nothing." if plan.quick else page)


def _run_all(plan: Plan, jobs: int) -> list[dict[str, Any]]:
    """Run what is missing, and return the rows of all draws that are asked for."""
    ready_rows([plan.rows(seed) for seed in plan.seeds], plan.how)
    runs = [sum(len(plan.methods(seed, draw)) for seed in plan.seeds) for draw in range(plan.draws)]
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        bases = [(plan, seed) for seed in plan.seeds]
        _follow(pool, _make_base, bases, "bases", len(bases), lambda: _bases_there(plan))
        for draw in range(plan.draws):  # the first finds the learning rates of all
            seeds = [seed for seed in plan.seeds if plan.methods(seed, draw)]
            tasks = [(plan, draw, seed, part, jobs) for seed in seeds for part in range(jobs)]
            _follow(pool, run_base, tasks, f"runs, draw {draw}", runs[draw], partial(_count_of, plan, draw))
        pool.close()
        pool.join()
    return _rows_of(plan)


def _rows_of(plan: Plan) -> list[dict[str, Any]]:
    """What the plan has asked for and is there; other plans may have asked for more."""
    wanted = {
        key(_described(seed, draw, each))
        for seed in plan.seeds
        for draw in range(plan.draws)
        for each in plan.methods(seed, draw)
    }
    return [row for seed in plan.seeds for row in read_rows(plan.rows(seed)) if key(row) in wanted]


def _count_of(plan: Plan, draw: int) -> int:
    return sum(row["draw"] == draw for row in _rows_of(plan))


def _bases_there(plan: Plan) -> int:
    return sum((plan.bases / f"base-{seed}").is_dir() for seed in plan.seeds)


def _follow(pool: Any, work: Any, tasks: Sequence[Any], what: str, total: int, count: Callable[[], int]) -> None:
    """Have a pool do the tasks, and show how many of all results are there meanwhile."""
    before = count()
    waiting = pool.starmap_async(work, tasks, chunksize=1)
    with tqdm(desc=what, total=total, initial=before, mininterval=1.0) as bar:
        while not waiting.ready():
            waiting.wait(2.0)
            bar.update(count() - bar.n)
    waiting.get()  # an error of a task is raised here


if __name__ == "__main__":
    main()
