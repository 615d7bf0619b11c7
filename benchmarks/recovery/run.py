"""Does a basis of SAE directions recover the concepts' space, where directions picked without an SAE do not?

    python -m benchmarks.recovery.run [--seeds 5] [--quick]

Activations are sums of concepts, more of them than dimensions; r concepts fire more often in one class of texts. The
engine reads these activations off a model (`benchmarks/embedded.py`), selects r features by the difference of their
means, and builds the basis, as for any model. Beside it stand the same SAE with the right features named, so that the
decoder's part of the error shows alone, and the bases that `control_subspace` makes without an SAE: neurons, PCA of
differences, the difference of the means, random.

The error is |sin| of the principal angles to the concepts' own span (Frobenius norm): 0 where they are the same,
sqrt(r - 1) where one direction is shared: the floor that SAILS (arXiv 2512.23260) gives for picking directions in the
polysemantic space. Five things vary: the decoder's error, dimensions, superposition (concepts per dimension), r, and,
in SAEs that sae-lens trains on the same activations, architecture and training.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sae_lens import SAE

from benchmarks.common import at_least_one, circumstances, options, summary
from benchmarks.embedded import HOOK, model_of, texts_of, tokenizer_of
from benchmarks.recovery.world import (
    World,
    decoder_error,
    draw_texts,
    make_world,
    nearest_features,
    noised_sae,
    subspace_error,
    trained_sae,
)
from peft_sae import Measures, collect_statistics, control_subspace, load_saes, select_features
from peft_sae.subspace.build import subspace_from_selection

WAYS = ("sae", "sae, features named", "neurons", "difference_pca", "mean_difference", "random")
_WIDTH, _TEXTS, _LENGTH = 64, 60, 25
_CROWDING, _RANK, _ERROR = 2.0, 8, 0.01
SWEEPS: Mapping[str, tuple[Any, ...]] = {
    "decoder error": (0.0, 0.003, 0.01, 0.03, 0.1, 0.3),
    "dimensions": (32, 64, 128, 256, 512),
    "concepts per dimension": (0.5, 1.0, 2.0, 4.0, 8.0),
    "r": (2, 4, 8, 16),
    "trained SAE": tuple((kind, samples) for kind in ("standard", "topk", "batchtopk") for samples in (2**18, 2**20)),
}
_ASKED = {"sae at most": 0.05, "direct, share of the floor": 0.8}


def recover(world: World, sae: SAE, seed: int) -> dict[str, Any]:
    """Errors of all ways on one world."""
    activations, owners = draw_texts(world, _TEXTS, _LENGTH, seed)
    model, tokenizer, saes = model_of(activations), tokenizer_of(len(activations)), load_saes(sae)
    measures = Measures(covariance=True)
    found = collect_statistics(model, tokenizer, texts_of(owners), saes, measures=measures, progress=False)
    rank = len(world.task)
    selection = select_features(found, top_k=rank, saes=saes, seed=seed)
    own = subspace_from_selection(model, None, selection, saes, variance=1.0)
    right = list(dict.fromkeys(f"{HOOK}:{feature}" for feature in nearest_features(world, sae.W_dec.data).tolist()))
    named = select_features(found, selector="explicit", features=right, top_k=rank, saes=saes)
    bases = {"sae": own, "sae, features named": subspace_from_selection(model, None, named, saes, variance=1.0)}
    bases |= {kind: control_subspace(own, kind, statistics=found, seed=seed) for kind in WAYS if kind not in bases}
    errors = {name: subspace_error(world.truth, subspace.sites[0].basis) for name, subspace in bases.items()}
    return {
        "rank": rank,
        "floor": (rank - 1) ** 0.5,
        "decoder_error": decoder_error(world, sae.W_dec.data),
        "errors": errors,
    }


def cases(seed: int, sweeps: Mapping[str, tuple[Any, ...]]) -> Iterator[tuple[str, Any, World, SAE]]:
    """Yield every sweep's name, value, world and SAE, for one seed."""
    for sweep, values in sweeps.items():
        for value in values:
            crowding = value if sweep == "concepts per dimension" else _CROWDING
            rank = value if sweep == "r" else _RANK
            width = value if sweep == "dimensions" else _WIDTH
            world = make_world(width, round(crowding * width), rank, seed)
            if sweep == "trained SAE":
                yield sweep, f"{value[0]}, {value[1] / 2**20:g} Mi samples", world, trained_sae(world, *value, seed)
            else:
                error = value if sweep == "decoder error" else _ERROR
                yield sweep, value, world, noised_sae(world, error, seed)


def table(rows: list[dict[str, Any]]) -> str:
    """Return the results as Markdown: mean error with its 95 % interval over seeds."""
    lines = ["| | decoder error | floor | " + " | ".join(WAYS) + " |", "|---" * (len(WAYS) + 3) + "|"]
    for key, group in grouped(rows).items():
        cells = [f"{key[0]} {key[1]}", f"{summary([row['decoder_error'] for row in group])['mean']:.3f}"]
        cells.append(f"{group[0]['floor']:.2f}")
        for way in WAYS:
            found = summary([row["errors"][way] for row in group])
            cells.append(f"{found['mean']:.3f} [{found['low']:.3f}, {found['high']:.3f}]")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def grouped(rows: list[dict[str, Any]]) -> dict[tuple[str, Any], list[dict[str, Any]]]:
    """The rows of each sweep and value, seeds together."""
    groups: dict[tuple[str, Any], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["sweep"], row["value"]), []).append(row)
    return groups


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw one panel per sweep of numbers, and one of the trained SAEs."""
    from benchmarks import plots

    groups = grouped(rows)
    sweeps = list(dict.fromkeys(sweep for sweep, _ in groups))
    figure, axes = plots.plt.subplots(1, len(sweeps), figsize=(4.2 * len(sweeps), 3.6), squeeze=False)
    for axis, sweep in zip(axes[0], sweeps, strict=True):
        found = {value: group for (name, value), group in groups.items() if name == sweep}
        errors = {way: [[row["errors"][way] for row in group] for group in found.values()] for way in WAYS}
        if sweep == "trained SAE":
            places = [summary([row["decoder_error"] for row in group])["mean"] for group in found.values()]
            order = sorted(range(len(places)), key=places.__getitem__)
            places = [places[index] for index in order]
            errors = {way: [values[index] for index in order] for way, values in errors.items()}
            axis.set_xlabel("decoder error of SAEs trained by sae-lens")
        else:
            places = [float(value) for value in found]
            axis.set_xlabel(sweep)
            if sweep == "decoder error":
                axis.set_xscale("symlog", linthresh=0.003)
            else:
                axis.set_xscale("log", base=2)
                axis.set_xticks(places, [f"{place:g}" for place in places])
        plots.curves(axis, places, errors)
        floors = [found[value][0]["floor"] for value in found]
        axis.plot(places, floors, color="#444444", linestyle=":", label="sqrt(r - 1)")
        axis.set_ylim(bottom=-0.05)
    axes[0][0].set_ylabel("subspace error")
    axes[0][-1].legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    plots.save(figure, path)


def main() -> None:
    """Run the benchmark and write result, table and plots."""
    parser = options(__doc__)
    parser.add_argument("--seeds", type=at_least_one, default=5, help="how many")
    parser.add_argument("--quick", action="store_true", help="one seed and few values: whether the machinery works")
    parser.add_argument("--output", type=Path, default=Path("outputs/recovery"), help="for result, table and plot")
    arguments = parser.parse_args()
    before = _read(arguments.output / "result.json")
    if before is not None and before.get("quick", False) != arguments.quick:
        kind = "quick" if before.get("quick") else "full"
        raise SystemExit(
            f"'{arguments.output}' holds the result of a {kind} run, which one of the other kind would overwrite. Give "
            "another --output."
        )
    logging.getLogger("peft_sae").setLevel(logging.ERROR)
    sweeps = SWEEPS
    if arguments.quick:
        arguments.seeds = 1
        sweeps = {"decoder error": (0.0, 0.1), "trained SAE": (("topk", 2**15),)}
    circumstances_before, start = circumstances(0, "cpu"), time.monotonic()
    rows = []
    for seed in range(arguments.seeds):
        for sweep, value, world, sae in cases(seed, sweeps):
            rows.append({"sweep": sweep, "value": value, "seed": seed, **recover(world, sae, seed)})
            print(json.dumps(rows[-1]), flush=True)
    result = {
        "benchmark": f"subspace recovery, {2 * _TEXTS} texts of {_LENGTH} tokens",
        "defaults": {"dimensions": _WIDTH, "concepts per dimension": _CROWDING, "r": _RANK, "decoder error": _ERROR},
        **circumstances_before,
        "seeds": arguments.seeds,
        "quick": arguments.quick,
        "asked": _ASKED,
        "minutes": round((time.monotonic() - start) / 60, 1),
        "rows": rows,
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    (arguments.output / "table.md").write_text(table(rows) + "\n")
    plot(rows, arguments.output / "errors")
    print(f"{table(rows)}\n\nResult, table and plot are in '{arguments.output}'.")


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.is_file() else None


if __name__ == "__main__":
    main()
