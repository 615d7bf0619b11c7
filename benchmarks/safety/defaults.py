"""Which defaults the safety benchmark's validation scores speak for, and by how much."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from statistics import median

from benchmarks.safety.catalogue import DANGEROUS, ONLY
from benchmarks.safety.report import VALIDATION, of_method, paired, points
from benchmarks.sources import Source

_ALL = ("SAE, answers", "SAE, requests", "SAE, neutral requests", "SAE, best parts")
_SAE = (*_ALL, f"SAE{ONLY}", f"SAE, best parts{ONLY}")


def _told(gap: Mapping[str, float]) -> str:
    """A difference in points, and whether its interval tells the two apart."""
    word = "better" if gap["low"] > 0 else "worse" if gap["high"] < 0 else "not told apart"
    return f"{points(gap)} ({word})"


def defaults(source: Source) -> Iterator[str]:
    """What was decided by the validation scores of the parts, with these scores."""
    rows = source.read("result-parts.json").get("rows", [])
    if not rows:
        return
    reference = of_method(rows, "SAE, neutral requests, frozen", DANGEROUS)

    def against(name: str) -> str:
        own = of_method(rows, name, DANGEROUS)
        return _told(paired(own, reference, VALIDATION)) if own and reference else "not run yet"

    main = source.read("result-main.json").get("rows", [])
    pairs = [[of_method(main, f"{name}{frozen}", DANGEROUS) for frozen in (", frozen", "")] for name in _SAE]
    gaps = [_told(paired(*pair, VALIDATION)) for pair in pairs if all(pair)]
    rates = {
        name: median(row["rate"] for row in of_method(main, name, DANGEROUS) if row["draw"] == 0)
        for name in ("LoRA", "full fine-tuning", "SAE, neutral requests", "SAE, neutral requests, frozen")
    }
    lines = [
        *_parts(against),
        f"- **`freeze_basis`: try it first.** Frozen against trainable, in the order above: {'; '.join(gaps)}; out of "
        "distribution see above. The default stays off, as in SAILS.",
        f"- **No penalty that keeps a trainable basis near its span**: trainable without one "
        f"{against('SAE, neutral requests')}, with a weight of 0.1 {against('trainable, penalty 0.1')}, of 1 "
        f"{against('trainable, penalty 1')}. Freezing is that without a weight to choose.",
        "- **Learning rate**, the median of the best on the grid: "
        + ", ".join(f"{name} {rate:g}" for name, rate in rates.items())
        + ". So begin with LoRA's.",
        "- **`fill`** is not varied: a frozen basis is never filled with random directions (that is refused), and "
        "those here are filled with zeros where a basis is smaller than the rank.",
    ]
    yield (
        "### Defaults, and why\n\nWritten after the run that is recorded here, with its numbers: points of validation "
        "score, paired by base, against the first row of the parts. They changed no default of the package; they added "
        "a configuration."
    )
    yield "\n".join(lines)


def _parts(against: Callable[[str], str]) -> Iterator[str]:
    """Yield what was changed one at a time, and what was decided by it."""
    yield (
        f"- **Modules: all that read the residual stream, of attention and MLP.** Of these only q and v: "
        f"{against('modules: q, v')}; only those of attention: {against('modules: attention reads')}; those that write "
        f"instead: {against('modules: writes')}; both: {against('modules: reads and writes')}, for more parameters. "
        "`configs/gemma-2-2b-frozen.yaml` adapts them all; `target_modules` that nobody sets stay PEFT's."
    )
    yield (
        f"- **`top_k` and rank.** At rank 4, 4 features: {against('top_k 4')}, 64: {against('top_k 64')}; at rank 8, "
        f"16 features: {against('rank 8')}, 8: {against('top_k 8, rank 8')}, 64: {against('top_k 64, rank 8')}; rank "
        f"1: {against('rank 1')}, rank 2: {against('rank 2')}. The default of 64 features is for r = 32, where fewer "
        "would leave most of the rank to random directions; for a small rank choose about as many as it holds. "
        f"`variance` (tau) says nothing where the rank cuts first; with ranks that follow it: {against('rank auto')}."
    )
    yield (
        f"- **`selector`: `mean_difference` stays.** Beside it `welch_t` {against('selector welch_t')}, `attribution` "
        f"to a refusal {against('selector attribution')}, `cosine` {against('selector cosine')}, `probe` "
        f"{against('selector probe')}, `auroc` {against('selector auroc')}, `firing_rate` "
        f"{against('selector firing_rate')}, `effect_size` {against('selector effect_size')}, `random` "
        f"{against('selector random')}."
    )
    yield (
        f"- **Both signs stay**: features with more on the aligned texts only {against('direction aligned')}, with "
        f"less only {against('direction unaligned')}."
    )
    yield (
        f"- **`norm_gain` stays on**, as with it a basis is what the module meets of the features; off: "
        f"{against('norm_gain off')}. "
        f"**The basis stays orthonormal and as it comes**: scaled by the spread of the data along it "
        f"{against('scaled by spread')}; turned within its span towards features (varimax) "
        f"{against('turned towards features')}."
    )
    yield (
        f"- **`layer_map`: `nearest` stays**; `exact` {against('layers with an SAE only')}. Here that leaves out one "
        "block of four, the first, for which the nearest SAE stands behind it. With SAEs at four of 26 layers it "
        "leaves out most of the model, which is another thing and not measured. With 4 features "
        f"{against('top_k 4, layers with an SAE only')}, with 8 at rank 8 "
        f"{against('top_k 8, rank 8, layers with an SAE only')}."
    )
