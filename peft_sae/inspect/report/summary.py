"""The key numbers of an inspection, in plain words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from .wording import called, count, degrees, mean, number, percent, signed


class Card(NamedTuple):
    """A key number.

    Attributes:
        head: what it is called.
        value: the number, as it is shown.
        words: what it means, and what it would be by chance.
    """

    head: str
    value: str
    words: str


def cards(found: dict[str, Any]) -> list[Card]:
    """Return the key numbers of an inspection (`Inspection.to_dict`)."""
    return [*_subspace(found), *_size(found["summary"]), *_language(found["summary"])]


def _subspace(found: dict[str, Any]) -> Iterator[Card]:
    known, modules = found["summary"], found["modules"]
    inside, random = known.get("in_basis"), known.get("in_random")
    if inside is None:
        return
    times = f"{number(inside / random, 2)} times" if random else "beside"
    yield Card(
        "Inside the basis",
        percent(inside),
        "of the update's energy (its squared size) lies in the span of the features that it started from: "
        f"{times} what a random space of as many dimensions holds ({percent(random)}).",
    )
    yield Card(
        "Drift",
        percent(known.get("drift")),
        "is the rest: what has moved out of that span. With a random space in place of the basis it is "
        f"{percent(None if random is None else 1 - random)}.",
    )
    yield Card(
        "Mean angle",
        degrees(mean(modules, "mean_angle")),
        "between the basis and what the modules' trained factors span. With a random space it is "
        f"{degrees(mean(modules, 'random_mean_angle'))}.",
    )
    yield Card(
        "Largest angle",
        degrees(known.get("largest_angle")),
        "in any module: 0° means that every trained direction is still in the basis, 90° that one has left it wholly.",
    )


def _size(known: dict[str, Any]) -> Iterator[Card]:
    yield Card(
        "Size of the update",
        number(known.get("norm")),
        f"in the Frobenius norm, over {count(known.get('modules'), 'module')} whose factors have "
        f"{number(known.get('parameters'))} numbers.",
    )


def _language(known: dict[str, Any]) -> Iterator[Card]:
    if "loss_after" not in known:
        return
    change = known.get("loss_change")
    meaning = "" if change is None else "It predicts these texts better. " if change < 0 else "It predicts them worse. "
    yield Card(
        "Next-token loss",
        signed(change),
        f"nats per token: {number(known.get('loss_before'), 4)} in the base model, "
        f"{number(known.get('loss_after'), 4)} in the adapted one. {meaning if change else ''}"
        f"Measured on {count(known.get('predicted_tokens'), 'token')}.",
    )
    yield Card(
        "Divergence",
        number(known.get("kl")),
        "nats per token: how far the adapted model's predictions are from the base model's (Kullback-Leibler). 0 means "
        "that they are the same.",
    )


def highlights(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the features that stand out: what they do and which they are."""
    lines = []
    for side, verb in (("read", "Read most"), ("write", "Written most")):
        rows = [row for row in found["features"] if row.get("side") == side and row.get("share")]
        if rows:
            best = max(rows, key=lambda row: row["share"])
            times = best.get("times_chance")
            beside = "" if times is None else f", {number(times, 2)} times what a random direction has"
            typical = best.get("times_typical")
            beside += (
                "" if typical is None else f" and {number(typical, 2)} times what its SAE's features typically have"
            )
            lines.append((verb, f"{called(best)}: {percent(best['share'])} of the update's energy{beside}"))
    changed = [row for row in found["activations"] or [] if row.get("change")]
    for verb, sign in (("Strengthened most", 1), ("Weakened most", -1)):
        rows = [row for row in changed if sign * row["change"] > 0]
        if rows:
            best = max(rows, key=lambda row: sign * row["change"])
            before, after = number(best.get("mean_before")), number(best.get("mean_after"))
            lines.append((verb, f"{called(best)}: mean activation {before} before, {after} after"))
    return lines
