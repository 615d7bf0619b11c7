"""How sure a difference of two classes is."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from .contrast import Contrast
from .selectors import welch_t


def p_values(contrast: Contrast) -> torch.Tensor:
    """Return a two-sided p-value per feature of "the means do not differ", float64 [d_sae].

    Welch's t-test with examples as the independent units (`welch_t`) and the degrees of freedom of Welch and
    Satterthwaite, (e1^2 + e2^2)^2 / (e1^4 / (G1 - 1) + e2^4 / (G2 - 1)), with G the numbers of examples. No p-value is
    below 2 / binomial(G1 + G2, G1), the least that a permutation of the examples' labels could give, so that a handful
    of examples that happen to agree proves nothing.
    """
    from scipy.special import stdtr

    first, second = contrast.aligned, contrast.unaligned
    if min(first.examples, second.examples) < 2:
        return torch.ones(contrast.sae.d_sae, dtype=torch.float64)
    squares = [one.standard_error.square() for one in (first, second)]
    both = squares[0] + squares[1]
    freedom = both.square() / (squares[0].square() / (first.examples - 1) + squares[1].square() / (second.examples - 1))
    freedom = torch.where(both > 0, freedom, torch.tensor(float(first.examples + second.examples - 2)).double())
    t = welch_t(contrast).abs()
    found = torch.from_numpy(2 * stdtr(freedom.numpy(), -t.numpy()))
    total = first.examples + second.examples
    log_ways = math.lgamma(total + 1) - math.lgamma(first.examples + 1) - math.lgamma(second.examples + 1)
    return found.clamp(min=2 * math.exp(-log_ways), max=1.0)


def q_values(contrasts: Sequence[Contrast]) -> list[torch.Tensor]:
    """Return a q-value per feature and SAE, float64 [d_sae] each.

    The q-value of a feature is the share of false discoveries to expect among all features, of all SAEs together, with
    a q-value at most as large (Benjamini and Hochberg, J. R. Statist. Soc. B 57 (1995) 289). Features that never fire
    are no hypotheses, and have 1.
    """
    live = [contrast.live for contrast in contrasts]
    tested = torch.cat([p_values(contrast)[fires] for contrast, fires in zip(contrasts, live, strict=True)])
    order = torch.argsort(tested, stable=True)
    ranks = torch.arange(1, len(tested) + 1, dtype=torch.float64)
    stepped = (tested[order] * len(tested) / ranks).flip(0).cummin(0).values.flip(0) if len(tested) else tested
    adjusted = torch.empty_like(tested)
    adjusted[order] = stepped.clamp(max=1.0)
    found = []
    for fires in live:
        values = torch.ones(len(fires), dtype=torch.float64)
        count = int(fires.sum())
        values[fires], adjusted = adjusted[:count], adjusted[count:]
        found.append(values)
    return found
