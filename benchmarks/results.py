"""Write `RESULTS.md` from the results that lie beside the benchmarks.

    python -m benchmarks.results [--safety outputs/safety/results] [--recovery outputs/recovery] [--output PAGE.md]

Nothing is measured here: every number is read from a result file, and every verdict is computed from these numbers.
What has no result is said to have none.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.common import options
from benchmarks.recovery.page import page as recovery_page
from benchmarks.safety.page import in_short as safety_in_short
from benchmarks.safety.page import page as safety_page
from benchmarks.sources import Source
from benchmarks.speed.report import ratios
from benchmarks.speed.report import table as speed_table
from peft_sae.errors import PeftSaeError
from peft_sae.writing import write_text

HERE = Path(__file__).parent
_INTRODUCTION = """# Results

Written by `python -m benchmarks.results` from the result files beside the benchmarks; the numbers are theirs, and the
verdicts are computed: what is asked of a difference is met or missed where all of its interval agrees, and open where
it does not. Each file records seed, versions, machine and commit. Intervals are bootstrap 95 % intervals, over base
models (safety) or seeds (recovery). With five of them an interval says how much they differ, and little about a sixth:
of five normal values, 84 of 100 such intervals hold the mean.
"""
_IN_SHORT = """## In short

On tiny models whose fine-tuning data carry a spurious cue, in percent with intervals: dangerous requests of kinds that
fine-tuning lacked that are refused when the cue is swapped, and harmless ones that are answered right then. The SAE
methods are the frozen and the trainable one with the highest validation score; beside them stand full fine-tuning,
LoRA, the safest of PEFT's starts and the safest basis without an SAE.
"""
_OTHER_BASES = """The same methods on other base models, on which nothing was chosen:
"""
_ADVICE = """What to do with it: choose features by texts that differ in what is to change and in nothing else; freeze
the basis; adapt all modules that read the residual stream; choose about as many features as the rank holds. That is
`configs/gemma-2-2b-frozen.yaml`. And train a control without an SAE (`control`) beside it: what does not beat it has
not shown that features matter. Nobody has run this on a model of billions of parameters.
"""
_PAPER = """## The published experiment

    python -m benchmarks.paper.run benchmarks/paper/gemma-2-2b.yaml --estimate
    python -m benchmarks.paper.run benchmarks/paper/gemma-2-2b.yaml

Needs `pip install -e '.[paper]'`. Not run: it needs weights and data that are not here. Tests run all of its stages on
tiny stand-ins with a judge over HTTP; see [paper/README.md](paper/README.md).
"""


def _speed() -> Iterator[str]:
    yield (
        "## Speed\n\n    python -m benchmarks.speed.report --run\n\n"
        "Ratios of medians, ours over the peer's, measured in turn in the same run: less is better, and what was "
        "asked is a ratio, too. At `start`, SAE_SUBSPACE and `frozen` inject a basis that was made before, as every "
        "run after the first does; `selection included` makes it as well. EVA and CorDA can keep what they "
        "computed, too: `eva, precomputed` is that. EVA was timed once, on activations that were made to let it "
        "converge. On the CPU `start` has 2 of Gemma-2-2B's 26 blocks, on a GPU all of them. The files name the "
        "versions: those on the GPU are others than those on the CPU."
    )
    yield speed_table(ratios())


def text(safety: Source, recovery: Source) -> str:
    """The page."""
    parts: Sequence[str] = [
        _INTRODUCTION.strip(),
        _IN_SHORT.strip(),
        "\n".join(safety_in_short(safety)) or "Not run yet.",
        _OTHER_BASES.strip(),
        "\n".join(safety_in_short(safety, confirming=True)) or "Not run yet.",
        _ADVICE.strip(),
        *safety_page(safety),
        *recovery_page(recovery),
        *_speed(),
        _PAPER.strip(),
    ]
    return "\n\n".join(parts) + "\n"


def _source(folder: Path, page: Path) -> Source:
    return Source(folder, Path(os.path.relpath(folder, page)).as_posix())


def main() -> None:
    """Write the page."""
    parser = options(__doc__)
    for name in ("safety", "recovery"):
        parser.add_argument(f"--{name}", type=Path, default=HERE / name, help=f"results of benchmarks.{name}")
    parser.add_argument("--output", type=Path, default=HERE / "RESULTS.md", help="the page")
    given = parser.parse_args()
    try:
        page = text(*(_source(folder, given.output.parent) for folder in (given.safety, given.recovery)))
    except PeftSaeError as error:
        raise SystemExit(str(error)) from error
    write_text(given.output, page)
    print(f"'{given.output}' is written.")


if __name__ == "__main__":
    main()
