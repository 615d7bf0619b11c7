"""Feature activations with known causes: what the benchmark of planted features starts from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

# Share of the features of each kind; the rest are of the last.
KINDS = {
    "always on": 0.04,
    "first tokens": 0.04,
    "rare": 0.2,
    "one in few texts": 0.2,
    "heavy tail": 0.2,
    "common": 1.0,
}


@dataclass(frozen=True)
class Effect:
    """How a task feature differs between the classes.

    Attributes:
        rates: share of the tokens on which it fires, aligned and unaligned.
        strengths: mean activation where it fires, aligned and unaligned.
    """

    rates: tuple[float, float]
    strengths: tuple[float, float]


EFFECTS = {
    "separable": Effect(rates=(0.5, 0.02), strengths=(4.0, 4.0)),
    "rate": Effect(rates=(0.3, 0.1), strengths=(2.0, 2.0)),
    "strength": Effect(rates=(0.3, 0.3), strengths=(3.0, 1.5)),
    "weak": Effect(rates=(0.15, 0.07), strengths=(1.5, 1.5)),
}


@dataclass(frozen=True)
class Planted:
    """Two classes of texts, token by token.

    Attributes:
        activations: label to activations, [tokens, features].
        examples: label to the text of each token, int64 [tokens].
        kinds: the kind of each feature, by name.
        task: whether each feature is a task feature, bool [features].
    """

    activations: Mapping[str, torch.Tensor]
    examples: Mapping[str, torch.Tensor]
    kinds: tuple[str, ...]
    task: torch.Tensor


def plant(
    counts: tuple[int, int],
    features: int,
    seed: int,
    *,
    planted: int = 0,
    effect: Effect | None = None,
    lengths: tuple[float, float] = (25.0, 0.6),
    kind: str | None = None,
    tails: float = 0.8,
) -> Planted:
    """Draw two classes of texts that differ in the planted features alone.

    The tokens of a text are alike: each text has its own rate and strength of each feature.

    Args:
        counts: texts per class, aligned and unaligned.
        features: number of features.
        seed: of everything.
        planted: number of task features.
        effect: of theirs.
        lengths: median number of tokens, and the standard deviation of its logarithm.
        kind: the kind of all features that are not planted; by default all kinds occur.
        tails: of the kind `heavy tail`, the standard deviation of the logarithm of the strength, between texts and
            within them: 0.8 makes the standard deviation twice the mean, 1.5 nine times.
    """
    generator = torch.Generator().manual_seed(seed)
    kinds = _kinds(features, kind)
    order = torch.randperm(features, generator=generator)
    task = torch.zeros(features, dtype=torch.bool)
    task[order[:planted]] = True
    base = _Background(kinds, tails, generator)
    activations, examples = {}, {}
    for side, (label, count) in enumerate(zip(("aligned", "unaligned"), counts, strict=True)):
        sizes = (lengths[0] * (lengths[1] * torch.randn(count, generator=generator)).exp()).round().long().clamp(3, 500)
        owners = torch.repeat_interleave(torch.arange(count), sizes)
        found = base.draw(sizes, owners, generator)
        if effect is not None and planted:
            rates = torch.full((planted,), effect.rates[side])
            found[:, task] = _fire(rates, effect.strengths[side], 0.7, 0.5, owners, count, generator)
        activations[label], examples[label] = found, owners
    return Planted(activations, examples, kinds, task)


def _kinds(features: int, kind: str | None) -> tuple[str, ...]:
    if kind is not None:
        return (kind,) * features
    found: list[str] = []
    for name, share in KINDS.items():
        found += [name] * min(round(share * features), features - len(found))
    return tuple(found)


class _Background:
    """Features that both classes have alike."""

    def __init__(self, kinds: tuple[str, ...], tails: float, generator: torch.Generator) -> None:
        self._masks = {name: torch.tensor([kind == name for kind in kinds]) for name in KINDS}
        self._tails = {"rare": 0.5, "heavy tail": tails, "common": 0.5, "first tokens": 0.5}
        spread = torch.randn(len(kinds), generator=generator)
        self._rates = (-3.0 + 1.2 * spread).exp().clamp(0.002, 0.6)  # heavy-tailed, a median of 5 %
        self._rates[self._masks["rare"]] = 0.01

    def draw(self, sizes: torch.Tensor, owners: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Activations [tokens, features] of texts with the given numbers of tokens."""
        count = len(sizes)
        found = torch.zeros(len(owners), len(self._rates))
        for name, tails in self._tails.items():
            mask = self._masks[name]
            found[:, mask] = _fire(self._rates[mask], 1.0, 0.8, tails, owners, count, generator)
        first = torch.arange(len(owners)) - (sizes.cumsum(0) - sizes)[owners] >= 2
        found[first[:, None] & self._masks["first tokens"]] = 0
        mask = self._masks["one in few texts"]  # on most tokens of one text in twenty, and nowhere else
        chosen = torch.rand(count, int(mask.sum()), generator=generator) < 0.05
        rates = torch.full_like(self._rates[mask], 0.6)
        found[:, mask] = chosen[owners] * _fire(rates, 2.0, 0.5, 0.5, owners, count, generator)
        mask = self._masks["always on"]
        level = 5 + 0.5 * torch.randn(count, int(mask.sum()), generator=generator)
        found[:, mask] = (level[owners] + 0.5 * torch.randn(len(owners), int(mask.sum()), generator=generator)).relu()
        return found


def _fire(
    rates: torch.Tensor,
    strength: float,
    spread: float,
    tails: float,
    owners: torch.Tensor,
    count: int,
    generator: torch.Generator,
) -> torch.Tensor:
    """Activations [tokens, features] that fire at some rates, log-normal in rate and strength from text to text.

    `tails` is the standard deviation of the logarithm of the strength, both between texts and within them.
    """
    shape, wide = (count, len(rates)), (len(owners), len(rates))
    odds = torch.logit(rates) + spread * torch.randn(shape, generator=generator)
    fires = torch.rand(wide, generator=generator) < torch.sigmoid(odds)[owners]
    levels = (tails * torch.randn(shape, generator=generator)).exp()
    return fires * strength * levels[owners] * (tails * torch.randn(wide, generator=generator)).exp()
