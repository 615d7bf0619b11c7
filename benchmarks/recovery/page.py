"""What the recovery benchmark's results say, as a page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.common import summary
from benchmarks.recovery.run import grouped
from benchmarks.sources import Source, verdict

_ABOUT = """## Recovery

    python -m benchmarks.recovery.run

Known concepts in superposition, two classes of texts that differ in r of them, and the error of each basis to the
concepts' own span: 0 where they are the same, sqrt(r - 1) where they share one direction. Where nothing else is said:
64 dimensions, 2 concepts per dimension, r = 8 and a decoder error of 0.01. `sae, features named` has the same SAE with
the right features given by name: the decoder's part of the error alone.
"""


def page(source: Source) -> Iterator[str]:
    """Yield the parts of the page."""
    yield _ABOUT.strip()
    result = source.read("result.json")
    if result:
        yield "### What was asked\n\n" + "\n".join(_recovery_verdicts(result))
    yield from source.section("table.md", "Errors", "errors")


def _recovery_verdicts(result: Mapping[str, Any]) -> Iterator[str]:
    most, least = result["asked"]["sae at most"], result["asked"]["direct, share of the floor"]
    groups = grouped(result["rows"])
    for (sweep, value), rows in groups.items():
        if sweep != "dimensions":
            continue
        errors, named = ([row["errors"][way] for row in rows] for way in ("sae", "sae, features named"))
        mean, below = summary(errors)["mean"], sum(error < most for error in errors)
        shares = {
            way: summary([row["errors"][way] / row["floor"] for row in rows])["mean"]
            for way in ("neurons", "mean_difference", "difference_pca")
        }
        yield verdict(
            f"{value} dimensions: mean error of the SAE {mean:.3f} (asked: below {most}; so in {below} of "
            f"{len(errors)} seeds), with the right features named {summary(named)['mean']:.3f}. Direct identification, "
            f"as a share of the floor (asked: above {least}): neurons {shares['neurons']:.2f}, mean difference "
            f"{shares['mean_difference']:.2f}, difference PCA {shares['difference_pca']:.2f}.",
            mean < most and min(shares.values()) > least,
        )
    trained = {value: rows for (sweep, value), rows in groups.items() if sweep == "trained SAE"}
    if trained:
        best = min(trained, key=lambda value: summary([row["decoder_error"] for row in trained[value]])["mean"])
        errors, named, decoder = (
            summary([row[what] if way is None else row[what][way] for row in trained[best]])["mean"]
            for what, way in (("errors", "sae"), ("errors", "sae, features named"), ("decoder_error", None))
        )
        yield (
            f"- The best SAE that sae-lens trained here ({best}) has a decoder error of {decoder:.2f}; the basis is "
            f"off by {errors:.2f}, and by {named:.2f} with the right features named: what is left is the decoder's."
        )
    if ("dimensions", 64) in groups:
        yield (
            "- One wrong feature among the chosen ones makes an error of about 1 by itself. Features leak into each "
            "other here, as the SAE's encoder is its decoder behind a threshold, and the fewer the dimensions, the "
            "more. PCA of differences does not pick single directions: it finds the space in which the classes differ, "
            "and so keeps below the floor. That the mean difference and random directions are at it is geometry: one "
            "direction, or none, is shared."
        )
