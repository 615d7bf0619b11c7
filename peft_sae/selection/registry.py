"""The registry of selectors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch

from ..errors import SelectionError
from ..statistics.moments import FeatureMoments

# Scores the features of one SAE from its moments on the aligned and on the unaligned texts.
ScoreFunction: TypeAlias = Callable[[FeatureMoments, FeatureMoments], torch.Tensor]


@dataclass(frozen=True)
class Selector:
    """A way to score features.

    Attributes:
        name: name in the registry.
        reference: where the method comes from.
        score: the function; it returns one score per feature, shape [d_sae], larger meaning more apt.
    """

    name: str
    reference: str
    score: ScoreFunction


_SELECTORS: dict[str, Selector] = {}


def register_selector(name: str, *, reference: str) -> Callable[[ScoreFunction], ScoreFunction]:
    """Return a decorator that registers a scoring function under a name.

    The function takes the `FeatureMoments` of one SAE on the aligned and on the unaligned texts and
    returns one score per feature, shape [d_sae].

    Raises:
        SelectionError: the name is taken.
    """

    def decorate(function: ScoreFunction) -> ScoreFunction:
        if name in _SELECTORS:
            raise SelectionError(f"A selector named {name!r} exists already. Register yours under another name.")
        _SELECTORS[name] = Selector(name=name, reference=reference, score=function)
        return function

    return decorate


def selector_names() -> list[str]:
    """Return the names of all registered selectors."""
    return sorted(_SELECTORS)


def get_selector(name: str) -> Selector:
    """Return a selector by name.

    Raises:
        SelectionError: there is no such selector.
    """
    if name not in _SELECTORS:
        raise SelectionError(f"Selector {name!r} is unknown. Use one of {selector_names()} or register your own.")
    return _SELECTORS[name]


@register_selector("mean_difference", reference="SAILS, arXiv 2512.23260")
def mean_difference(aligned: FeatureMoments, unaligned: FeatureMoments) -> torch.Tensor:
    """Return |mean over aligned tokens - mean over unaligned tokens| per feature, float64 [d_sae]."""
    return (aligned.mean - unaligned.mean).abs()
