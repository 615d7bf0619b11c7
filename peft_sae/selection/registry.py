"""The registry of selectors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import TypeAlias

import torch

from ..errors import SelectionError, suggest
from ..statistics.measures import Measures
from .contrast import Contrast

ScoreFunction: TypeAlias = Callable[[Contrast], torch.Tensor]

ENTRY_POINTS = "peft_sae.selectors"


@dataclass(frozen=True)
class Selector:
    """A way to score features.

    Attributes:
        name: name in the registry.
        reference: where the method comes from.
        score: the function; it returns one score per feature, shape [d_sae].
        signed: whether a positive score means "more on the aligned texts" and a negative one the reverse, so that the
            size is what counts; otherwise larger is better.
        measures: what the statistics must hold beside the moments.
        attribution: whether it wants attributions instead of activations.
        decoder: whether it wants the SAEs' decoder directions.
        named: whether it wants the ids of features from the caller.
    """

    name: str
    reference: str
    score: ScoreFunction
    signed: bool = True
    measures: Measures = field(default_factory=Measures)
    attribution: bool = False
    decoder: bool = False
    named: bool = False


_SELECTORS: dict[str, Selector] = {}


def register_selector(
    name: str,
    *,
    reference: str,
    signed: bool = True,
    measures: Measures | None = None,
    attribution: bool = False,
    decoder: bool = False,
    named: bool = False,
) -> Callable[[ScoreFunction], ScoreFunction]:
    """Return a decorator that registers a scoring function under a name.

    The function takes a `Contrast`, which holds one SAE's statistics on the aligned and on the unaligned texts, and
    returns one score per feature, shape [d_sae]. Installed packages can offer one without being imported, by an entry
    point of the group `peft_sae.selectors` that names a function decorated like this.

    Args:
        name: name to select it by.
        reference: where the method comes from.
        signed: whether positive scores mean "more on the aligned texts" and negative ones the reverse; features are
            then ranked by size, or by one sign if the caller wants that. If False, larger is better.
        measures: what must be collected beside the moments.
        attribution: whether the moments are to be of attributions instead of activations.
        decoder: whether `Contrast.decoder` is needed.
        named: whether `Contrast.named` is needed.

    Raises:
        SelectionError: the name is taken.
    """

    def decorate(function: ScoreFunction) -> ScoreFunction:
        if name in _SELECTORS:
            raise SelectionError(f"A selector named {name!r} exists already. Register yours under another name.")
        _SELECTORS[name] = Selector(
            name, reference, function, signed, measures or Measures(), attribution, decoder, named
        )
        return function

    return decorate


def selector_names() -> list[str]:
    """Return the names of all selectors, those of installed packages included."""
    return sorted({*_SELECTORS, *(point.name for point in entry_points(group=ENTRY_POINTS))})


def get_selector(name: str) -> Selector:
    """Return a selector by name.

    Raises:
        SelectionError: there is no such selector, or the package that offers it cannot be imported.
    """
    if not isinstance(name, str):
        raise SelectionError(
            f"selector={name!r} is no name. Register your function with @register_selector, and give its name."
        )
    if name not in _SELECTORS:
        _load_entry_point(name)
    if name not in _SELECTORS:
        known = selector_names()
        raise SelectionError(
            f"Selector {name!r} is unknown.{suggest(name, known)} Use one of {known} or register your own."
        )
    return _SELECTORS[name]


def _load_entry_point(name: str) -> None:
    for point in entry_points(group=ENTRY_POINTS, name=name):
        try:
            point.load()  # importing it runs its decorator
        except Exception as error:  # whatever another package fails with
            raise SelectionError(
                f"Selector {name!r} is offered by {point.value!r}, which cannot be imported ({error!r}). Mend or "
                "remove that package."
            ) from error
        if name not in _SELECTORS:
            raise SelectionError(
                f"{point.value!r} offers the selector {name!r} and does not register it. Its function needs the "
                f"decorator `@register_selector({name!r}, ...)`."
            )
