"""Collecting statistics beside the least that it could cost, and beside the usual way: tokens per second and memory.

    python -m benchmarks.selection.run [--sizes small wide ...] [--repetitions 5] [--texts 32] [--skip-memory]

The limit is the forward pass of the plain model to the deepest SAE, no SAE in it, on batches that are tokenised and
padded already, plus the encoders' bare matrix products (`torch.mm` in float32, into memory that is kept). The usual way
is sae-lens' `HookedSAETransformer` with the same weights on the same batches, and then the features' means:

- `run_with_cache_with_saes`: with error terms, as without them a later SAE sees what an earlier one rebuilt.
- `the same, stopped`: no block past the deepest SAE, and nothing but features in the cache.
- `the same, no error terms`: that with `use_error_term=False`. Means at later SAEs are then of another model.
- `run_with_cache, then encode`: no SAE in the model, stopped, streams in the cache, one `SAE.encode` per batch.

All are run in turn in one process, in another order each time. What counts is the ratio of the medians.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import circumstances
from benchmarks.selection.world import Size, Texts, make_batches, make_model, make_saes, make_tokenizer, mean_firing
from peft_sae import collect_statistics
from peft_sae.sae.placement import check_placement
from peft_sae.statistics import Measures
from peft_sae.statistics.capture import capturing
from tests.sae.hooked import make_hooked

SIZES = {
    "small": Size(layers=12, width=768, heads=12, blocks=(3, 6, 9), d_sae=16384, density=64 / 16384),
    "medium": Size(layers=24, width=1024, heads=16, blocks=(6, 12, 18), d_sae=32768, density=64 / 32768),
    "wide": Size(layers=12, width=768, heads=12, blocks=(3, 6, 9), d_sae=65536, density=64 / 65536),
    "dense": Size(layers=12, width=768, heads=12, blocks=(3, 6, 9), d_sae=16384, density=0.5),
}
ALL_MEASURES = Measures(histograms=True, top_examples=4, sample=200)
LIMIT, USUAL = "limit", "run_with_cache_with_saes"
_BATCH, _WARM_UP = 8, 1
_MOST_TIME, _LEAST_GAIN, _MOST_GROWTH = 1.15, 4.0, 1.03


class Contest:
    """The same work, done in several ways."""

    def __init__(self, size: Size, texts: int, seed: int) -> None:
        self._model, self._tokenizer = make_model(size, seed), make_tokenizer()
        self._texts = {"aligned": Texts(texts // 2, seed=seed + 1), "unaligned": Texts(texts // 2, seed=seed + 2)}
        self._batches = {label: make_batches(self._tokenizer, found, _BATCH) for label, found in self._texts.items()}
        (first,) = make_batches(self._tokenizer, Texts(16, (160, 160), seed=seed + 3), 16)
        self._handles = make_saes(self._model, size, first, seed)
        self._saes = [handle.sae for handle in self._handles]
        self._taps = check_placement(self._model, self._handles)
        self._hooks = [handle.identity.hook_name for handle in self._handles]
        self._stop = max(size.blocks) + 1
        self._hooked = make_hooked(self._model)
        everything = [batch for batches in self._batches.values() for batch in batches]
        self.tokens = sum(int(batch.counted.sum()) for batch in everything)
        self._streams = self._run(everything[:1])[0]
        self.firing = mean_firing(self._handles, self._streams)
        rows = max(batch.counted.sum() for batch in everything)
        self._memory = torch.empty(int(rows), size.d_sae)
        self._counts = [int(batch.counted.sum()) for batch in everything]

    def ways(self) -> Mapping[str, Callable[[], Any]]:
        """Return what is to be timed, by name; those of the limit are its two parts."""
        cached = {"stop_at_layer": self._stop, "names_filter": lambda name: name.endswith("hook_sae_acts_post")}
        return {
            "forward": lambda: [self._run(batches) for batches in self._batches.values()],
            "product": self._multiply,
            "collect_statistics": self._collect,
            "collect_statistics, all measures": lambda: self._collect(measures=ALL_MEASURES),
            USUAL: lambda: self._cache_with_saes(use_error_term=True),
            "the same, stopped": lambda: self._cache_with_saes(use_error_term=True, **cached),
            "the same, no error terms": lambda: self._cache_with_saes(use_error_term=False, **cached),
            "run_with_cache, then encode": self._cache_then_encode,
        }

    def check(self) -> float:
        """Return by how much our means differ from those of the usual way, at most, relative to the largest mean."""
        ours = self._collect()
        usual = self._cache_with_saes(use_error_term=True)
        pairs = [
            (moments.mean, means)
            for label, found in usual.items()
            for moments, means in zip(ours.of(label), found, strict=True)
        ]
        return max(float((first - second).abs().max() / second.abs().max()) for first, second in pairs)

    def _run(self, batches: list[Any]) -> list[list[torch.Tensor]]:
        with capturing(self._model, self._taps) as capture:
            return [[found[batch.counted] for found in capture.run(batch.ids, batch.attention)] for batch in batches]

    @torch.no_grad()
    def _multiply(self) -> None:
        for count in self._counts:
            for sae, stream in zip(self._saes, self._streams, strict=True):
                rows = stream.repeat(-(-count // len(stream)), 1)[:count] if count != len(stream) else stream
                torch.mm(rows, sae.W_enc, out=self._memory[:count])

    def _collect(self, **settings: Any) -> Any:
        return collect_statistics(
            self._model, self._tokenizer, self._texts, self._handles, batch_size=_BATCH, progress=False, **settings
        )

    def _means(self, features: Callable[[torch.Tensor], list[torch.Tensor]]) -> dict[str, list[torch.Tensor]]:
        """Mean activation per class and SAE, of a function from token ids to features [batch, length, d_sae]."""
        means = {}
        for label, batches in self._batches.items():
            sums: list[torch.Tensor] = []
            for batch in batches:
                found = [acts[batch.counted].sum(0) for acts in features(batch.ids)]
                sums = [one + other for one, other in zip(sums, found, strict=True)] if sums else found
            tokens = sum(int(batch.counted.sum()) for batch in batches)
            means[label] = [total / tokens for total in sums]
        return means

    @torch.no_grad()
    def _cache_with_saes(self, **settings: Any) -> dict[str, list[torch.Tensor]]:
        def features(ids: torch.Tensor) -> list[torch.Tensor]:
            _, cache = self._hooked.run_with_cache_with_saes(ids, saes=self._saes, **settings)
            return [cache[f"{hook}.hook_sae_acts_post"] for hook in self._hooks]

        return self._means(features)

    @torch.no_grad()
    def _cache_then_encode(self) -> dict[str, list[torch.Tensor]]:
        def features(ids: torch.Tensor) -> list[torch.Tensor]:
            _, cache = self._hooked.run_with_cache(ids, stop_at_layer=self._stop, names_filter=self._hooks)
            return [sae.encode(cache[hook]) for sae, hook in zip(self._saes, self._hooks, strict=True)]

        return self._means(features)


def measure(size: Size, texts: int, repetitions: int, seed: int) -> dict[str, Any]:
    """Median seconds of every way, and the ratios that the limits are about."""
    contest = Contest(size, texts, seed)
    difference = contest.check()
    ways = contest.ways()
    times: dict[str, list[float]] = {name: [] for name in ways}
    order = list(ways)
    for repetition in range(-_WARM_UP, repetitions):
        random.shuffle(order)
        for name in order:
            start = time.perf_counter()
            ways[name]()
            if repetition >= 0:
                times[name].append(time.perf_counter() - start)
    parts = {name: statistics.median(times.pop(name)) for name in ("forward", "product")}
    seconds = {LIMIT: sum(parts.values())} | {name: statistics.median(found) for name, found in times.items()}
    ours = seconds["collect_statistics"]
    return {
        "size": {**vars(size)},
        "tokens": contest.tokens,
        "batch": _BATCH,
        "features_per_token": contest.firing,
        "largest_difference_of_means": difference,
        "seconds_of_the_limit": parts,
        "seconds": seconds,
        "tokens_per_second": {name: round(contest.tokens / value) for name, value in seconds.items()},
        "ratio_to_limit": {name: round(value / seconds[LIMIT], 3) for name, value in seconds.items()},
        "times_faster_than": {name: round(value / ours, 2) for name, value in seconds.items()},
        "asked": {"most_time": _MOST_TIME, "least_gain": _LEAST_GAIN},
        "gain_that_the_limit_leaves": round(seconds[USUAL] / seconds[LIMIT], 2),
        "all_seconds": {name: [round(value, 3) for value in found] for name, found in times.items()},
    }


def measure_memory() -> dict[str, Any]:
    """Peak resident memory of fresh processes, at some number of tokens and at ten times as many."""
    found: dict[str, Any] = {}
    for measures in ("defaults", "all"):
        for times in (1, 10):
            command = [sys.executable, "-m", "benchmarks.selection.memory", measures, str(times)]
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            found.setdefault(measures, []).append(json.loads(output.splitlines()[-1]))
    growth = {name: round(large["bytes"] / small["bytes"], 4) for name, (small, large) in found.items()}
    return {"growth": growth, "asked": _MOST_GROWTH, "peaks": found}


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the results as Markdown."""
    lines = ["| size | L0 | way | tokens/s | x limit | we are faster |", "|---|---|---|---|---|---|"]
    for name, result in results.items():
        for way, rate in result["tokens_per_second"].items():
            cells = [name, result["features_per_token"], way, rate]
            cells += [f"{result['ratio_to_limit'][way]:.2f}", f"{result['times_faster_than'][way]:.2f}"]
            lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines)


def write(name: str, description: str, seed: int, before: Mapping[str, Any], result: Mapping[str, Any]) -> None:
    """Write a result with its circumstances."""
    target = Path(__file__).parent / f"result-{name}-cpu.json"
    content = {"benchmark": description, **before, "seed": seed, **result}
    target.write_text(json.dumps(content, indent=2) + "\n")


def main() -> None:
    """Run the benchmark and write its results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", choices=tuple(SIZES), default=list(SIZES))
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--texts", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--skip-memory", action="store_true")
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    results = {}
    for name in arguments.sizes:
        before = circumstances(arguments.seed, "cpu")
        results[name] = measure(SIZES[name], arguments.texts, arguments.repetitions, arguments.seed)
        write(name, "collect_statistics on a GPT-2 of random weights", arguments.seed, before, results[name])
        print(name, json.dumps(results[name]["ratio_to_limit"], indent=2), flush=True)
    print(table(results))
    if not arguments.skip_memory:
        before = circumstances(arguments.seed, "cpu")
        memory = measure_memory()
        write("memory", "peak memory of collect_statistics", arguments.seed, before, memory)
        print("memory, ten times the tokens:", memory["growth"])


if __name__ == "__main__":
    main()
