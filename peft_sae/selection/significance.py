"""How sure a difference of two classes is."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..statistics.moments import FeatureMoments
from .contrast import Contrast
from .selectors import difference_over, welch_t


def p_values(contrast: Contrast) -> torch.Tensor:
    """Return a two-sided p-value per feature of "the classes do not differ", float64 [d_sae].

    The larger of two, both with examples as the independent units. Each class has n = (sum_e n_e)^2 / sum_e n_e^2
    effective examples (Kish, Survey Sampling, 1965, section 11.7), n_e an example's number of observations; with one
    each, n is the number of examples.

    - Welch's t-test: `welch_t`, and the degrees of freedom of Welch and Satterthwaite,
      (e1^2 + e2^2)^2 / (e1^4 / (n1 - 1) + e2^4 / (n2 - 1)).
    - Student's: one variance for both classes, v = G / (G - 2) * (Q1 + Q2) / (C1 + C2), with Q the sum over examples of
      the squared residuals (S_e - n_e m)^2, C that of n_e^2, G the number of all examples; then
      t = (m1 - m2) / sqrt(v / n1 + v / n2) with n1 + n2 - 2 degrees of freedom.

    Welch's alone takes a handful of examples on which a feature happens to be silent for a class without variance;
    Student's alone is wrong where the smaller class has the larger variance. No p-value is below
    2 / binomial(G1 + G2, G1), the least that a permutation of the examples' labels could give, so that a handful of
    examples that happen to agree proves nothing.
    """
    first, second = contrast.aligned, contrast.unaligned
    if min(first.examples, second.examples) < 2:
        return torch.ones(contrast.sae.d_sae, dtype=torch.float64)
    found = torch.maximum(_welch(contrast), _student(contrast))
    total = first.examples + second.examples
    log_ways = math.lgamma(total + 1) - math.lgamma(first.examples + 1) - math.lgamma(second.examples + 1)
    return found.clamp(min=2 * math.exp(-log_ways), max=1.0)


def _welch(contrast: Contrast) -> torch.Tensor:
    classes = (contrast.aligned, contrast.unaligned)
    squares = torch.stack([one.standard_error.square() for one in classes])
    each = torch.tensor([_effective(one) - 1 for one in classes], dtype=torch.float64)
    freedom = squares.sum(dim=0).square() / (squares.square() / each[:, None]).sum(dim=0)
    return _two_sided(welch_t(contrast), freedom.nan_to_num(nan=float(each.sum())))


def _student(contrast: Contrast) -> torch.Tensor:
    classes = (contrast.aligned, contrast.unaligned)
    total = sum(one.examples for one in classes)
    residuals = classes[0].squared_residuals + classes[1].squared_residuals
    variance = total / (total - 2) * residuals / sum(one.count_squares for one in classes)
    numbers = [_effective(one) for one in classes]
    error = (variance * sum(1 / number for number in numbers)).sqrt()
    freedom = torch.tensor(sum(numbers) - 2, dtype=torch.float64)
    return _two_sided(difference_over(contrast, error), freedom)


def _effective(moments: FeatureMoments) -> float:
    return moments.count**2 / moments.count_squares


def _two_sided(t: torch.Tensor, freedom: torch.Tensor) -> torch.Tensor:
    from scipy.special import stdtr

    return torch.from_numpy(2 * stdtr(freedom.clamp(min=1e-3).numpy(), -t.abs().numpy()))


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
