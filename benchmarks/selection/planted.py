"""Selectors against a planted truth, and the q-values under texts that do not differ.

Run as `python -m benchmarks.selection.planted [--seeds 5] [--replicates 200]`.

*Truth.* Two classes of texts whose features are known, token by token (`planting.py`), go through the whole engine: the
model's embeddings are the features times a dictionary, a token each, and an SAE with the dictionary's inverse for an
encoder reads them back. Precision is the share of task features among as many chosen ones as there are.

*False discoveries.* Many cheap replicates, straight from the activations. Under the null (nothing differs) the share of
replicates with any discovery is to be at most the level; with task features among the others, the mean share of false
ones among the discoveries.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from sae_lens.registry import get_sae_class
from sae_lens.saes.sae import SAEMetadata

from benchmarks.common import circumstances
from benchmarks.embedded import HOOK, model_of, texts_of, tokenizer_of
from benchmarks.selection.planting import EFFECTS, KINDS, Planted, plant
from peft_sae import FeatureStatistics, collect_statistics, load_saes, select_features
from peft_sae.sae.handle import SaeHandle
from peft_sae.sae.identity import SaeIdentity
from peft_sae.selection import selector_names
from peft_sae.selection.contrast import Contrast
from peft_sae.selection.significance import q_values
from peft_sae.statistics import FeatureMoments, Measures

_FEATURES, _PLANTED = 512, 16
_TEXTS: Mapping[str, Mapping[str, Any]] = {
    "60 vs 60": {"counts": (60, 60)},
    "100 vs 20": {"counts": (100, 20)},
    "60 vs 60, extreme tails": {"counts": (60, 60), "tails": 1.5},
}
_NO_TRUTH = {"attribution": "what these tokens do to an output is not planted", "explicit": "the caller chooses"}
_ASKED = {"mean_difference": 0.95, "effect_size": 0.95}  # where features are separable

_NULLS: Mapping[str, Mapping[str, Any]] = {
    "100 vs 100 texts": {"counts": (100, 100)},
    "100 vs 20": {"counts": (100, 20)},
    "10 vs 200": {"counts": (10, 200)},
    "20 vs 20": {"counts": (20, 20)},
    "5 vs 5": {"counts": (5, 5)},
    "100 vs 20, lengths of all sizes": {"counts": (100, 20), "lengths": (25.0, 1.3)},
    "20 vs 20, lengths of all sizes": {"counts": (20, 20), "lengths": (25.0, 1.3)},
    "100 vs 20, rare features": {"counts": (100, 20), "kind": "rare"},
    "100 vs 20, features of few texts": {"counts": (100, 20), "kind": "one in few texts"},
    "100 vs 20, heavy tails": {"counts": (100, 20), "kind": "heavy tail"},
    "100 vs 20, extreme tails": {"counts": (100, 20), "kind": "heavy tail", "tails": 1.5},
    "100 vs 20, always on": {"counts": (100, 20), "kind": "always on"},
}
_MIXTURES = ((100, 100), (100, 20), (20, 100), (20, 20))
_LEVELS = (0.05, 0.1, 0.2)
_NULL_FEATURES, _MIXED_PLANTED = 1000, 30


def make_statistics(planted: Planted, seed: int) -> tuple[FeatureStatistics, list[SaeHandle], float]:
    """Collect the statistics of planted texts with the engine.

    Returns:
        The statistics, the SAE, and the largest error of a mean activation, relative to the largest mean.
    """
    everything = torch.cat(list(planted.activations.values()))
    generator = torch.Generator().manual_seed(seed)
    width = everything.shape[1]
    dictionary = torch.randn(width, width, generator=generator, dtype=torch.float64)
    dictionary = torch.nn.functional.normalize(dictionary + 20 * torch.eye(width, dtype=torch.float64), dim=1)
    model, tokenizer = model_of(everything.double() @ dictionary), tokenizer_of(len(everything))
    saes = load_saes(_sae(dictionary))
    data = texts_of(planted.examples)
    measures = Measures(histograms=True, sample=2000)
    found = collect_statistics(model, tokenizer, data, saes, measures=measures, progress=False)
    errors = [
        float((found.of(label)[0].mean - activations.double().mean(0)).abs().max() / activations.mean(0).max())
        for label, activations in planted.activations.items()
    ]
    return found, saes, max(errors)


def _sae(dictionary: torch.Tensor) -> Any:
    sae_cls, config_cls = get_sae_class("jumprelu")
    metadata = SAEMetadata(hook_name=HOOK, prepend_bos=False)
    width = len(dictionary)
    sae = sae_cls(config_cls(d_in=width, d_sae=width, metadata=metadata, apply_b_dec_to_input=False))
    sae.W_dec.data, sae.W_enc.data = dictionary.float(), torch.linalg.inv(dictionary).float()
    sae.threshold.data = torch.full((width,), 1e-3)  # above what rounding leaves of a zero
    return sae


def precision(found: FeatureStatistics, saes: list[SaeHandle], selector: str, task: torch.Tensor, seed: int) -> float:
    """Share of task features among as many chosen ones as there are."""
    (site,) = select_features(found, selector=selector, top_k=int(task.sum()), saes=saes, seed=seed).sites
    return float(task[site.features].sum()) / int(task.sum())


def measure_selectors(seeds: int) -> list[dict[str, Any]]:
    """Precision of every selector for every effect."""
    selectors = [name for name in selector_names() if name not in _NO_TRUTH]
    rows = []
    for effect_name, effect in EFFECTS.items():
        for name_of_texts, settings in _TEXTS.items():
            found: dict[str, list[float]] = {name: [] for name in selectors}
            for seed in range(seeds):
                planted = plant(features=_FEATURES, seed=seed, planted=_PLANTED, effect=effect, **settings)
                collected, saes, error = make_statistics(planted, seed)
                if error > 1e-3:
                    raise AssertionError(f"the SAE reads other features than were planted (error {error})")
                for name in selectors:
                    found[name].append(precision(collected, saes, name, planted.task, seed))
            rows.append({"effect": effect_name, "texts": name_of_texts, "precision": found})
    return rows


def _q(planted: Planted) -> torch.Tensor:
    moments = [FeatureMoments.of(planted.activations[label], planted.examples[label]) for label in planted.activations]
    sae = SaeIdentity("planted", HOOK, 8, len(planted.task), None, None, "0" * 64)
    return q_values([Contrast(sae, *moments)])[0]


def measure_null(replicates: int) -> dict[str, Any]:
    """Share of replicates with any discovery where nothing differs, by level."""
    found: dict[str, Any] = {}
    for name, settings in _NULLS.items():
        any_at = dict.fromkeys(_LEVELS, 0)
        kinds = dict.fromkeys(KINDS, 0)
        for seed in range(replicates):
            planted = plant(features=_NULL_FEATURES, seed=seed, **settings)
            q = _q(planted)
            for level in _LEVELS:
                any_at[level] += bool((q <= level).any())
            for feature in (q <= max(_LEVELS)).nonzero()[:, 0].tolist():
                kinds[planted.kinds[feature]] += 1
        shares = {str(level): count / replicates for level, count in any_at.items()}
        found[name] = {"any_discovery": shares, "discoveries_by_kind": {k: n for k, n in kinds.items() if n}}
    return found


def measure_mixture(replicates: int) -> list[dict[str, Any]]:
    """Mean share of false discoveries, and of the task features that are found, by effect and level."""
    rows = []
    for effect_name, effect in EFFECTS.items():
        for counts in _MIXTURES:
            false: dict[float, list[float]] = {level: [] for level in _LEVELS}
            power: dict[float, list[float]] = {level: [] for level in _LEVELS}
            for seed in range(replicates):
                planted = plant(counts, _NULL_FEATURES, seed, planted=_MIXED_PLANTED, effect=effect)
                q = _q(planted)
                for level in _LEVELS:
                    chosen = q <= level
                    false[level].append(float((chosen & ~planted.task).sum()) / max(1, int(chosen.sum())))
                    power[level].append(float(chosen[planted.task].double().mean()))
            rows.append(
                {
                    "effect": effect_name,
                    "texts": list(counts),
                    "false": {str(level): round(statistics.mean(found), 4) for level, found in false.items()},
                    "found": {str(level): round(statistics.mean(found), 4) for level, found in power.items()},
                }
            )
    return rows


def table(result: Mapping[str, Any]) -> str:
    """Return the results as Markdown."""
    rows, null, mixed = result["selectors"], result["null"], result["mixture"]
    names = list(rows[0]["precision"])
    lines = ["Precision, mean (least):", ""]
    lines += _header(["effect", "texts", *names])
    for row in rows:
        cells = [f"{statistics.mean(found):.2f} ({min(found):.2f})" for found in row["precision"].values()]
        lines.append(_line([row["effect"], row["texts"], *cells]))
    levels = [str(level) for level in _LEVELS]
    lines += ["", "Nothing differs: share of runs with any discovery, by level:", "", *_header(["texts", *levels])]
    lines += [
        _line([name, *(f"{found['any_discovery'][level]:.3f}" for level in levels)]) for name, found in null.items()
    ]
    heads = [f"{kind} {level}" for level in levels for kind in ("false", "found")]
    lines += ["", "Some features differ: share of false discoveries, and of task features found:", ""]
    lines += _header(["effect", "texts", *heads])
    for row in mixed:
        cells = [f"{row[kind][level]:.3f}" for level in levels for kind in ("false", "found")]
        lines.append(_line([row["effect"], "{} vs {}".format(*row["texts"]), *cells]))
    return "\n".join(lines)


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _header(cells: list[str]) -> list[str]:
    return [_line(cells), _line(["---"] * len(cells))]


def main() -> None:
    """Run the benchmark and write its results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--replicates", type=int, default=200)
    arguments = parser.parse_args()
    before = circumstances(0, "cpu")
    result = {
        "selectors": measure_selectors(arguments.seeds),
        "null": measure_null(arguments.replicates),
        "mixture": measure_mixture(arguments.replicates // 4),
    }
    content = {
        "benchmark": "planted features: precision of the selectors, and false discoveries",
        **before,
        "seeds": arguments.seeds,
        "replicates": {"null": arguments.replicates, "mixture": arguments.replicates // 4},
        "effects": {name: vars(effect) for name, effect in EFFECTS.items()},
        "asked": _ASKED,
        "left_out": _NO_TRUTH,
        **result,
    }
    (Path(__file__).parent / "result-planted-cpu.json").write_text(json.dumps(content, indent=2) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
