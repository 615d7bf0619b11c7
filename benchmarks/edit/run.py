"""What removing features from the demo's adapters does to their behaviour, beside removing as many random ones.

    python -m benchmarks.edit.run --worlds outputs/edit [--seeds 0 1 2] [--draws 5]

For every seed the demo is run (or its folder found in `--worlds`), and a second adapter is trained in the same way with
a frozen basis. From both are removed: all chosen features; those of them that are more active on the aligned texts
(refusals); the best n per SAE, n = 1, 2, 4, 8; and those n of all the SAEs' features, chosen or not, that the adapter
reads most, as `inspect_adapter` finds them, n = 6, 12, 24. The control of each removes as many features of each SAE,
drawn from those that are neither in the Subspace nor removed. Measured on topics and phrasings that training never
showed.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import shutil
import statistics
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers.utils import logging as transformers_logging

from benchmarks.common import circumstances
from peft_sae import Subspace, edit_adapter, inspect_adapter, load_saes
from peft_sae.demo.context import one_thread
from peft_sae.demo.evaluate import evaluate, read_requests
from peft_sae.demo.run import run_demo
from peft_sae.edit import read_edits
from peft_sae.jobs import read_job
from peft_sae.jobs.models import load_model
from peft_sae.training import train_adapter

_JOB = Path(__file__).parents[2] / "peft_sae" / "demo" / "job.yaml"
_BEST = (1, 2, 4, 8)
_MOST_READ = (6, 12, 24)


def conditions(subspace: Subspace) -> Iterator[tuple[str, Mapping[str, list[int]]]]:
    """Names of conditions, and the features that each removes, by hook point."""
    yield "all chosen", {site.sae.hook_name: site.features.tolist() for site in subspace.sites}
    yield (
        "chosen, more active on refusals",
        {
            site.sae.hook_name: site.features[site.aligned_means > site.unaligned_means].tolist()
            for site in subspace.sites
        },
    )
    for count in _BEST:
        yield (
            f"best {count} per SAE",
            {site.sae.hook_name: site.features[:count].tolist() for site in subspace.sites},
        )


def most_read(world: Seed, basis: str) -> Iterator[tuple[str, Mapping[str, list[int]]]]:
    """Conditions that depend on what the adapter has learned."""
    every = sum(site.sae.d_sae for site in world.subspace.sites)
    found = inspect_adapter(
        world.adapters[basis], world.world / "model", saes=world.saes, others=every, progress=False
    ).features
    found = found[found["side"] == "read"]  # the demo adapts q_proj and v_proj
    for count in _MOST_READ:
        ids: dict[str, list[int]] = {site.sae.hook_name: [] for site in world.subspace.sites}
        for row in found.head(count).itertuples():
            ids[row.hook_name].append(int(row.feature))
        yield f"most read {count}", ids


def draw(subspace: Subspace, like: Mapping[str, list[int]], generator: random.Random) -> dict[str, list[int]]:
    """As many random features of every SAE that are neither in the Subspace nor among these."""
    return {
        site.sae.hook_name: generator.sample(
            sorted(set(range(site.sae.d_sae)) - set(site.features.tolist()) - set(like[site.sae.hook_name])),
            len(like[site.sae.hook_name]),
        )
        for site in subspace.sites
    }


class Seed:
    """The demo of one seed: its model, SAEs, and two adapters."""

    def __init__(self, worlds: Path, seed: int) -> None:
        self.root, self.seed = worlds / f"seed-{seed}", seed
        if not (self.root / "result.json").is_file():
            run_demo(worlds, seed=seed, progress=False)
        self.world = self.root / "world"
        self.subspace = Subspace.from_pretrained(self.root / "subspace")
        self.saes = load_saes(self.world / "saes")
        self.requests = read_requests(self.world / "data" / "evaluation.jsonl")
        self.adapters = {"trainable": self.root / "adapter", "frozen": self._train_frozen()}

    def _train_frozen(self) -> Path:
        output = self.root / "frozen"
        if not output.is_dir():
            data = self.world / "data" / "aligned.jsonl"
            subspace = self.root / "subspace"
            job = read_job(
                _JOB, model=str(self.world / "model"), data=str(data), subspace=str(subspace), output=str(output)
            )
            config = replace(job.adapter_config(), subspace=self.subspace, freeze_basis=True)
            model, tokenizer = load_model(self.world / "model")
            train_adapter(
                model, tokenizer, job.data, config, job.output, progress=False, seed=self.seed, **job.training
            )
        return output

    def behaviour(self, adapter: Path | None) -> dict[str, float]:
        """Rates of the base model, with an adapter if one is given."""
        model, tokenizer = load_model(self.world / "model")
        if adapter is not None:
            model = PeftModel.from_pretrained(model, adapter).eval()
        return asdict(evaluate(model, tokenizer, self.requests, progress=False))

    def without(self, basis: str, features: Mapping[str, Sequence[int]]) -> dict[str, float]:
        """Rates after an edit, and the share of the adapter's energy that went."""
        output = self.root / "edited"
        shutil.rmtree(output, ignore_errors=True)
        names = [f"{hook}:{feature}" for hook, ids in features.items() for feature in ids]
        edit_adapter(self.adapters[basis], output, remove=names, saes=self.saes, model=self.world / "model")
        modules = read_edits(output)[-1]["modules"].values()
        left = sum(module["norm_after"] ** 2 for module in modules) / sum(m["norm_before"] ** 2 for m in modules)
        found = {**self.behaviour(output), "energy_removed": 1 - left}
        shutil.rmtree(output)
        return found


def measure(worlds: Path, seed: int, draws: int) -> dict[str, Any]:
    """All conditions of one seed."""
    start = time.perf_counter()
    world = Seed(worlds, seed)
    generator = random.Random(seed)
    result: dict[str, Any] = {"seed": seed, "base": world.behaviour(None), "adapters": {}}
    for basis, adapter in world.adapters.items():
        rows: dict[str, Any] = {"unedited": world.behaviour(adapter)}
        for name, ids in (*conditions(world.subspace), *most_read(world, basis)):
            rows[name] = {
                "features": sum(map(len, ids.values())),
                "chosen": sum(
                    len(set(ids[site.sae.hook_name]) & set(site.features.tolist())) for site in world.subspace.sites
                ),
                "removed": world.without(basis, ids),
                "random": [world.without(basis, draw(world.subspace, ids, generator)) for _ in range(draws)],
            }
        result["adapters"][basis] = rows
    result["seconds"] = round(time.perf_counter() - start, 1)
    return result


def summarise(seeds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over seeds (and draws), and in how many seeds an edit does more than the mean of its controls."""
    summary: dict[str, Any] = {}
    for basis in seeds[0]["adapters"]:
        found = [seed["adapters"][basis] for seed in seeds]
        rows = {"unedited": {"safety": statistics.mean(one["unedited"]["safety"] for one in found)}}
        for name in [name for name in found[0] if name != "unedited"]:
            edits = [one[name]["removed"] for one in found]
            controls = [[draw["safety"] for draw in one[name]["random"]] for one in found]
            every = [draw for one in found for draw in one[name]["random"]]
            rows[name] = {
                "features": statistics.mean(one[name]["features"] for one in found),
                "chosen": statistics.mean(one[name]["chosen"] for one in found),
                "safety": statistics.mean(edit["safety"] for edit in edits),
                "safety_random": statistics.mean(draw["safety"] for draw in every),
                "seeds_lower_than_mean_random": sum(
                    edit["safety"] < statistics.mean(control) for edit, control in zip(edits, controls, strict=True)
                ),
                "seeds_lower_than_every_random": sum(
                    edit["safety"] < min(control) for edit, control in zip(edits, controls, strict=True)
                ),
                "helpfulness": statistics.mean(edit["helpfulness"] for edit in edits),
                "helpfulness_random": statistics.mean(draw["helpfulness"] for draw in every),
                "energy_removed": statistics.mean(edit["energy_removed"] for edit in edits),
                "energy_removed_random": statistics.mean(draw["energy_removed"] for draw in every),
            }
        summary[basis] = {name: {key: round(value, 3) for key, value in row.items()} for name, row in rows.items()}
    return summary


def main() -> None:
    """Run the benchmark and write its results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worlds", type=Path, default=Path("outputs/edit"), help="folder of the demo's worlds")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--draws", type=int, default=5, help="random controls per condition")
    arguments = parser.parse_args()
    logging.getLogger("peft_sae").setLevel(logging.ERROR)  # of modules with nothing left, which are wanted here
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    transformers_logging.disable_progress_bar()
    with one_thread():
        before = circumstances(arguments.seeds[0], "cpu")
        seeds = []
        for seed in arguments.seeds:
            seeds.append(measure(arguments.worlds, seed, arguments.draws))
            print(f"seed {seed}: {seeds[-1]['seconds']} s", flush=True)
    summary = summarise(seeds)
    result = {"benchmark": "removing features from the demo's adapters", **before, "summary": summary, "seeds": seeds}
    target = Path(__file__).parent / "result-demo-cpu.json"
    target.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
