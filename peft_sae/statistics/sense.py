"""Whether statistics from a file can be true."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from .moments import FeatureMoments

if TYPE_CHECKING:
    from .statistics import FeatureStatistics

_ROUNDING = 1e-4  # sums of a batch may be in float32
_TINY = 1e-30
_KNOWN: dict[str, tuple[str, ...]] = {
    "tokens": ("all", "prompt", "response", "assistant"),
    "pooling": ("token", "mean", "max", "last"),
    "quantity": ("activation", "attribution"),
}
_NUMBERS = ("hidden_size", "num_hidden_layers")


def problems_of(statistics: FeatureStatistics, *, complete: bool) -> list[str]:
    """Return what contradicts itself in statistics, in words; nothing if they can be true.

    Args:
        statistics: the statistics.
        complete: they are of all the data, so they tell how many texts there are.
    """
    found = _settings(statistics.settings, list(statistics.moments))
    activations = statistics.settings.get("quantity", "activation") == "activation"
    if found:
        return found
    for label, moments in statistics.moments.items():
        examples = statistics.settings.get("examples", {}).get(label)
        for sae, one in zip(statistics.saes, moments, strict=True):
            wrong = [*_moments(one), *_parts(one, activations)]
            wrong += _places(one, examples if complete and examples is not None else math.inf)
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


def _moments(one: FeatureMoments) -> list[str]:
    found = []
    numbers = one.count**2 <= one.examples * one.count_squares and one.count_squares <= one.count**2
    if not one.examples <= one.count or not numbers:
        found.append("impossible numbers of observations and texts")
    if bool(((one.fired < 0) | (one.fired > one.count)).any()) or bool((one.maximum < 0).any()):
        found.append("impossible firing counts or maxima")
    if bool((one.total_squares < 0).any()) or bool((one.example_squares < 0).any()):
        found.append("negative sums of squares")
    if bool((one.total_squares[one.fired == 0] != 0).any()) or _exceeds(one.total, one.fired * one.maximum):
        found.append("sums that do not go with firing counts and maxima")
    bounds = (  # of Cauchy and Schwarz, over observations and over texts
        (one.total.square(), one.fired * one.total_squares),
        (one.total.square(), one.examples * one.example_squares),
        (one.example_squares, one.count * one.total_squares),
        (one.example_products.square(), one.count_squares * one.example_squares),
    )
    if any(_exceeds(*bound) for bound in bounds):
        found.append("sums that do not go with sums of squares")
    return found


def _exceeds(value: torch.Tensor, bound: torch.Tensor) -> bool:
    return not bool((value <= bound * (1 + _ROUNDING) + _TINY).all())


def _parts(one: FeatureMoments, activations: bool) -> list[str]:
    found = []
    if one.histogram is not None and activations:
        counts = one.histogram.counts
        if bool((counts < 0).any()) or not torch.equal(counts.sum(dim=1), one.fired):
            found.append("histograms of other numbers of observations")
    if one.raw is not None and one.raw.count < 1:
        found.append("raw activations of nothing")
    elif one.raw is not None and one.raw.products is not None:
        products, squares = one.raw.products, one.raw.products.diagonal()
        unequal = (products - products.T).abs() > _ROUNDING * squares.clamp(min=0).max() + _TINY
        if bool(unequal.any()) or _exceeds(one.raw.total.square(), one.raw.count * squares):
            found.append("products of raw activations that are none")
    if one.top is not None and bool((one.top.values.diff(dim=1) > 0).any()):
        found.append("most active texts out of order")
    if one.sample is not None and len(one.sample.examples) > one.sample.limit:
        found.append("a sample that is larger than its limit")
    return found


def _places(one: FeatureMoments, examples: float) -> list[str]:
    """Places of texts that a data set of so many does not have."""
    found = []
    if one.examples > examples:
        found.append("more texts than were read")
    if one.top is not None:
        known, places = one.top.examples >= 0, one.top.positions
        if bool(((one.top.examples < -1) | (one.top.examples >= examples)).any()) or bool((places[known] < 0).any()):
            found.append("most active texts that were not read")
    sample = None if one.sample is None else one.sample.examples
    if sample is not None and bool(((sample < 0) | (sample >= examples)).any()):
        found.append("a sample of texts that were not read")
    return found
