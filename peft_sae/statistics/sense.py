"""Whether statistics from a file can be true."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from .moments import FeatureMoments

if TYPE_CHECKING:
    from .statistics import FeatureStatistics

_ROUNDING = 1e-6
_KNOWN: dict[str, tuple[str, ...]] = {
    "tokens": ("all", "prompt", "response", "assistant"),
    "pooling": ("token", "mean", "max", "last"),
    "quantity": ("activation", "attribution"),
}
_NUMBERS = ("hidden_size", "num_hidden_layers")


def problems_of(statistics: FeatureStatistics) -> list[str]:
    """Return what contradicts itself in statistics, in words; nothing if they can be true."""
    found = _settings(statistics.settings, list(statistics.moments))
    activations = statistics.settings.get("quantity", "activation") == "activation"
    for label, moments in statistics.moments.items():
        for sae, one in zip(statistics.saes, moments, strict=True):
            wrong = _moments(one, activations)
            found += [f"{label} at {sae.hook_name}: {', '.join(wrong)}"] if wrong else []
    return found


def _settings(settings: Mapping[str, Any], labels: list[str]) -> list[str]:
    found = []
    model = settings.get("model", {})
    if not isinstance(model, Mapping) or any(type(model.get(name, 0)) is not int for name in _NUMBERS):
        found.append("the model is not described")
    for name in ("examples", "truncated"):
        counts = settings.get(name, {})
        if not isinstance(counts, Mapping) or any(type(counts.get(label, 0)) is not int for label in labels):
            found.append(f"{name} are no counts of every class")
    if type(settings.get("max_length", 2)) is not int or type(settings.get("prepend_bos", True)) is not bool:
        found.append("max_length or prepend_bos are of wrong types")
    unknown = [name for name, values in _KNOWN.items() if settings.get(name, values[0]) not in values]
    return found + [f"{name} is unknown" for name in unknown]


def _moments(one: FeatureMoments, activations: bool) -> list[str]:
    found = []
    if not one.examples <= one.count or not one.count <= one.count_squares <= one.count**2:
        found.append("impossible numbers of observations and texts")
    if bool(((one.fired < 0) | (one.fired > one.count)).any()) or bool((one.maximum < 0).any()):
        found.append("impossible firing counts or maxima")
    squares = one.total_squares * one.count * (1 + _ROUNDING) + 1e-30
    if bool((one.total.square() > squares).any()):  # Cauchy and Schwarz
        found.append("sums that do not go with sums of squares")
    if one.histogram is not None and activations:
        counts = one.histogram.counts
        if bool((counts < 0).any()) or not torch.equal(counts.sum(dim=1), one.fired):
            found.append("histograms of other numbers of observations")
    if one.raw is not None and one.raw.count < 1:
        found.append("raw activations of nothing")
    return found
