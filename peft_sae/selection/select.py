"""From statistics to the chosen features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import SelectionError
from ..sae.identity import SaeIdentity
from ..statistics.moments import FeatureMoments
from ..statistics.statistics import FeatureStatistics
from .registry import Selector, get_selector


@dataclass(frozen=True)
class SelectedFeatures:
    """The chosen features of one SAE, best first.

    Attributes:
        sae: the SAE.
        features: feature ids, int64 [k].
        scores: their scores, float64 [k].
        aligned_means: mean activation on the aligned texts, float64 [k].
        unaligned_means: mean activation on the unaligned texts, float64 [k].
        aligned_rates: share of the aligned tokens on which each fires, float64 [k].
        unaligned_rates: share of the unaligned tokens on which each fires, float64 [k].
    """

    sae: SaeIdentity
    features: torch.Tensor
    scores: torch.Tensor
    aligned_means: torch.Tensor
    unaligned_means: torch.Tensor
    aligned_rates: torch.Tensor
    unaligned_rates: torch.Tensor


@dataclass(frozen=True)
class Selection:
    """The chosen features of every SAE.

    Attributes:
        sites: one entry per SAE.
        settings: selector, number of features, and how the statistics were collected.
    """

    sites: tuple[SelectedFeatures, ...]
    settings: Mapping[str, Any]


def select_features(
    statistics: FeatureStatistics,
    *,
    selector: str = "mean_difference",
    top_k: int = 64,
    aligned: str = "aligned",
    unaligned: str = "unaligned",
) -> Selection:
    """Choose the features of every SAE that tell two classes of text apart best.

    Args:
        statistics: from `collect_statistics`.
        selector: name of a registered selector; `mean_difference` is that of SAILS, arXiv 2512.23260.
        top_k: features per SAE.
        aligned: label of the texts to move towards.
        unaligned: label of the texts to move away from.

    Raises:
        SelectionError: unknown selector, fewer live features than `top_k`, or no feature that differs.
        DataError: a label is not in the statistics.
    """
    chosen = get_selector(selector)
    if top_k < 1:
        raise SelectionError(f"top_k={top_k} selects nothing. Use 1 or more.")
    pairs = zip(statistics.saes, statistics.of(aligned), statistics.of(unaligned), strict=True)
    sites = tuple(_select(chosen, top_k, sae, first, second) for sae, first, second in pairs)
    settings = {
        "selector": selector,
        "reference": chosen.reference,
        "top_k": top_k,
        "aligned": aligned,
        "unaligned": unaligned,
        "statistics": dict(statistics.settings),
    }
    return Selection(sites=sites, settings=settings)


def _select(
    selector: Selector, top_k: int, sae: SaeIdentity, aligned: FeatureMoments, unaligned: FeatureMoments
) -> SelectedFeatures:
    scores = selector.score(aligned, unaligned)
    if not isinstance(scores, torch.Tensor) or scores.shape != (sae.d_sae,):
        shape = tuple(scores.shape) if isinstance(scores, torch.Tensor) else type(scores).__name__
        raise SelectionError(
            f"Selector {selector.name!r} returned {shape} for {sae.name!r}, and one score per feature, shape "
            f"({sae.d_sae},), is needed. Mend the selector."
        )
    if not bool(torch.isfinite(scores).all()):
        raise SelectionError(
            f"Selector {selector.name!r} returned NaN or infinity for {sae.name!r}. Mend the selector."
        )
    live = (aligned.fired + unaligned.fired) > 0
    found = int(live.sum())
    if found < top_k:
        raise SelectionError(
            f"Only {found} of the {sae.d_sae} features of {sae.name!r} ever fire on these texts, and top_k={top_k} are "
            "asked for. Lower top_k or give more text."
        )
    scores = scores.double().masked_fill(~live, -torch.inf)
    # A stable sort makes ties go to the lower feature id, on every machine.
    order = torch.sort(scores, descending=True, stable=True).indices[:top_k]
    if float(scores[order[0]]) <= 0:
        raise SelectionError(
            f"No feature of {sae.name!r} differs between the two sets of text (best score {float(scores[order[0]])}). "
            "Check that the sets differ, and that the tokens that differ are counted."
        )
    return SelectedFeatures(
        sae=sae,
        features=order,
        scores=scores[order],
        aligned_means=aligned.mean[order],
        unaligned_means=unaligned.mean[order],
        aligned_rates=aligned.firing_rate[order],
        unaligned_rates=unaligned.firing_rate[order],
    )
