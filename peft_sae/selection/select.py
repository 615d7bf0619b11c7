"""From statistics to the chosen features."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from ..errors import ConfigError, MismatchError, SelectionError
from ..sae.handle import SaeHandle, as_handles
from ..sae.identity import SaeIdentity
from ..statistics.moments import FeatureMoments
from ..statistics.statistics import FeatureStatistics
from .contrast import Contrast
from .criteria import Criteria, failing, ids_by_hook, used_by
from .registry import Selector, get_selector
from .significance import q_values

logger = logging.getLogger(__name__)

_FEW_TEXTS = 5  # below, no permutation of labels is significant


@dataclass(frozen=True)
class SelectedFeatures:
    """The chosen features of one SAE, best first.

    Attributes:
        sae: the SAE.
        features: feature ids, int64 [k].
        scores: their scores, float64 [k]; of most selectors positive for more on the aligned texts.
        q_values: share of false discoveries among features with as small a q-value, float64 [k].
        aligned_means: mean activation on the aligned texts, float64 [k].
        unaligned_means: mean activation on the unaligned texts, float64 [k].
        aligned_rates: share of the aligned observations on which each fires, float64 [k].
        unaligned_rates: share of the unaligned observations on which each fires, float64 [k].
    """

    sae: SaeIdentity
    features: torch.Tensor
    scores: torch.Tensor
    q_values: torch.Tensor
    aligned_means: torch.Tensor
    unaligned_means: torch.Tensor
    aligned_rates: torch.Tensor
    unaligned_rates: torch.Tensor

    def subset(self, keep: torch.Tensor) -> SelectedFeatures:
        """Return some of them, by a mask bool [k] or places int64 [m]."""
        tensors = {field.name: getattr(self, field.name)[keep] for field in fields(self) if field.name != "sae"}
        return SelectedFeatures(sae=self.sae, **tensors)


@dataclass(frozen=True)
class Selection:
    """The chosen features of every SAE.

    Attributes:
        sites: one entry per SAE of which a feature was chosen.
        settings: selector, criteria, number of features, how many failed which criterion, and how the statistics were
            collected.
        retained: features good enough to be chosen, and passed over because the retain texts use them.
    """

    sites: tuple[SelectedFeatures, ...]
    settings: Mapping[str, Any]
    retained: tuple[SelectedFeatures, ...] = ()


def select_features(
    statistics: FeatureStatistics,
    *,
    selector: str = "mean_difference",
    top_k: int = 64,
    aligned: str = "aligned",
    unaligned: str = "unaligned",
    criteria: Criteria | None = None,
    retain: str | None = None,
    features: Sequence[str] = (),
    saes: Sequence[SaeHandle] | None = None,
    seed: int = 0,
    allow_empty: bool = False,
) -> Selection:
    """Choose the features of every SAE that tell two classes of text apart best.

    Every feature gets a q-value from a t-test of its two means (`significance.q_values`), whatever the selector.

    Args:
        statistics: from `collect_statistics`.
        selector: name of a registered selector; `mean_difference` is that of SAILS, arXiv 2512.23260.
        top_k: features per SAE, at most: there are fewer where the criteria leave fewer, which the log tells.
        aligned: label of the texts to move towards.
        unaligned: label of the texts to move away from.
        criteria: what a feature must fulfil beside a good score.
        retain: label of texts whose features are to be left alone: what they use is passed over.
        features: names for the selector `explicit`, such as `"12:4051"`.
        saes: the SAEs, for selectors and criteria that need the decoder's directions.
        seed: for what is random.
        allow_empty: leave an SAE out where no feature is left, unless that is so at all of them.

    Raises:
        SelectionError: unknown selector or feature, wrong scores, or no feature is left at an SAE.
        DataError: a label is not in the statistics.
        ConfigError: `criteria` is something else.
        MismatchError: the SAEs are not those of the statistics.
    """
    chosen, criteria = get_selector(selector), criteria or Criteria()
    if not isinstance(criteria, Criteria):
        raise ConfigError(f"criteria is a {type(criteria).__name__}. Give Criteria(...), of peft_sae.")
    if top_k < 1:
        raise SelectionError(f"top_k={top_k} selects nothing. Use 1 or more.")
    if bool(features) != chosen.named:
        raise SelectionError(
            f"features={list(features)} and selector={selector!r} do not go together. Name features for the selector "
            "'explicit', and for no other; to choose some in any case, use Criteria(keep=...)."
        )
    contrasts = _contrasts(statistics, aligned, unaligned, features, saes, seed)
    fewest = min(one.examples for contrast in contrasts for one in (contrast.aligned, contrast.unaligned))
    if fewest < _FEW_TEXTS:
        logger.warning("A class has %d texts only: differences may be of these texts, and no test can tell.", fewest)
    if criteria.max_cosine is not None:
        for contrast in contrasts:
            contrast.unit_decoder  # noqa: B018  (an error now rather than in the middle)
    retained = [None] * len(contrasts) if retain is None else list(statistics.of(retain))
    choices = [
        _Choice(chosen, top_k, criteria, contrast, q, kept, statistics.saes)
        for contrast, q, kept in zip(contrasts, q_values(contrasts), retained, strict=True)
    ]
    # With names given, an SAE of which none is named has no part in it.
    results = _make([choice for choice in choices if choice.contrast.named or not chosen.named], allow_empty)
    settings = {
        "selector": selector,
        "reference": chosen.reference,
        "top_k": top_k,
        "aligned": aligned,
        "unaligned": unaligned,
        "retain": retain,
        "criteria": criteria.to_dict(),
        "seed": seed,
        "failed": {choice.contrast.sae.hook_name: choice.failed for choice in choices if choice.failed},
        "statistics": dict(statistics.settings),
    }
    passed_over = tuple(over for _, over in results if len(over.features))
    return Selection(sites=tuple(site for site, _ in results), settings=settings, retained=passed_over)


def _contrasts(
    statistics: FeatureStatistics,
    aligned: str,
    unaligned: str,
    features: Sequence[str],
    saes: Sequence[SaeHandle] | None,
    seed: int,
) -> list[Contrast]:
    named = ids_by_hook(features, statistics.saes)
    decoders = {} if saes is None else {handle.identity: handle.decoder for handle in as_handles(saes)}
    missing = [sae.name for sae in statistics.saes if saes is not None and sae not in decoders]
    if missing:
        raise MismatchError(
            f"The statistics are of the SAEs {missing}, which are not among the given ones "
            f"{[sae.name for sae in decoders]} (name, hook point and digest must be the same). Give the same SAEs, or "
            "collect the statistics again."
        )
    quantity = str(statistics.settings.get("quantity", "activation"))
    return [
        Contrast(sae, first, second, quantity, decoders.get(sae), tuple(named.get(sae.hook_name, ())), seed)
        for sae, first, second in zip(statistics.saes, statistics.of(aligned), statistics.of(unaligned), strict=True)
    ]


def _make(choices: Sequence[_Choice], allow_empty: bool) -> list[tuple[SelectedFeatures, SelectedFeatures]]:
    results, last = [], None
    for choice in choices:
        try:
            results.append(choice.make())
        except NothingLeft as error:
            if not allow_empty:
                raise
            logger.warning("%s", error)
            last = error
    if last is not None and not results:
        raise last
    return results


class NothingLeft(SelectionError):
    """No feature of an SAE can be chosen."""


class _Choice:
    """The choice at one SAE."""

    def __init__(
        self,
        selector: Selector,
        top_k: int,
        criteria: Criteria,
        contrast: Contrast,
        q: torch.Tensor,
        retain: FeatureMoments | None,
        saes: Sequence[SaeIdentity],
    ) -> None:
        self._selector, self._criteria = selector, criteria
        self.contrast, self._q, self._retain = contrast, q, retain
        hook_name = contrast.sae.hook_name
        self._kept = [*contrast.named, *ids_by_hook(criteria.keep, saes).get(hook_name, [])]
        # Named features are chosen whatever the data say of them; without others beside them where names are all.
        self._top_k = len(self._kept) if selector.named else max(top_k, len(self._kept))
        excluded = ids_by_hook(criteria.exclude, saes).get(hook_name, [])
        both = sorted(set(self._kept) & set(excluded))
        if both:
            raise SelectionError(f"The features {both} at {hook_name} are both to keep and to exclude. Choose one.")
        masks = failing(criteria, contrast, q, excluded)
        self._fails = torch.stack(list(masks.values())).any(dim=0)
        self.failed = {name: int(mask.sum()) for name, mask in masks.items() if bool(mask.any())}

    def make(self) -> tuple[SelectedFeatures, SelectedFeatures]:
        """Return the chosen features and those passed over for the retain texts."""
        sae = self.contrast.sae
        scores = self._scores()
        ranked = scores.abs() if self._selector.signed and self._criteria.direction == "both" else scores
        if self._selector.signed and self._criteria.direction == "unaligned":
            ranked = -scores
        candidates = (~self._fails & (ranked > 0)).nonzero().squeeze(1)
        # A stable sort makes ties go to the lower feature id, on every machine.
        order = candidates[torch.sort(ranked[candidates], descending=True, stable=True).indices].tolist()
        found, over = self._walk([*self._kept, *(feature for feature in order if feature not in set(self._kept))])
        if not found:
            self._none_left(ranked, len(over))
        if len(found) < self._top_k:
            logger.warning(
                "%d instead of %d features at %s: no others fulfil the criteria and have a score.",
                len(found),
                self._top_k,
                sae.hook_name,
            )
        return self._described(found, scores), self._described(over, scores)

    def _scores(self) -> torch.Tensor:
        name, sae = self._selector.name, self.contrast.sae
        scores = self._selector.score(self.contrast)
        if not isinstance(scores, torch.Tensor) or scores.shape != (sae.d_sae,):
            shape = tuple(scores.shape) if isinstance(scores, torch.Tensor) else type(scores).__name__
            raise SelectionError(
                f"Selector {name!r} returned {shape} for {sae.name!r}, and one score per feature, shape "
                f"({sae.d_sae},), is needed. Mend the selector."
            )
        if scores.is_complex() or not bool(torch.isfinite(scores).all()):
            raise SelectionError(f"Selector {name!r} returned NaN or infinity for {sae.name!r}. Mend the selector.")
        return scores.detach().cpu().double()

    def _walk(self, order: Sequence[int]) -> tuple[list[int], list[int]]:
        """Take features from the best on, without those that the retain texts use or that are nearly parallel."""
        contrast, limit = self.contrast, self._criteria.max_cosine
        used = None if self._retain is None else used_by(self._retain, contrast, self._criteria.retain_ratio)
        decoder = None if limit is None else contrast.unit_decoder
        found: list[int] = []
        over: list[int] = []
        parallel = 0
        for feature in order:
            if len(found) == self._top_k:
                break
            if feature not in self._kept:
                if used is not None and bool(used[feature]):
                    over.append(feature)
                    continue
                if decoder is not None and found and _cosine(decoder, found, feature) >= (limit or 0):
                    parallel += 1
                    continue
            found.append(feature)
        self.failed |= {name: count for name, count in (("parallel", parallel), ("retained", len(over))) if count}
        return found, over

    def _none_left(self, ranked: torch.Tensor, retained: int) -> None:
        sae = self.contrast.sae
        if retained:
            raise NothingLeft(
                f"The retain texts use all of the {retained} features of {sae.name!r} that could be chosen, so nothing "
                "is left. Give retain texts that are further from the task, or raise retain_ratio."
            )
        best = float(ranked.max())
        if best <= 0:
            raise NothingLeft(
                f"No feature of {sae.name!r} differs between the two sets of text (best score {best}). Check that the "
                "sets differ, and that the tokens that differ are counted."
            )
        raise NothingLeft(
            f"No feature of the {sae.d_sae} of {sae.name!r} is left: {self.failed} fail the criteria. Loosen them, or "
            "give more text."
        )

    def _described(self, ids: Sequence[int], scores: torch.Tensor) -> SelectedFeatures:
        chosen = torch.tensor(ids, dtype=torch.int64)
        first, second = self.contrast.aligned, self.contrast.unaligned
        return SelectedFeatures(
            sae=self.contrast.sae,
            features=chosen,
            scores=scores[chosen],
            q_values=self._q[chosen],
            aligned_means=first.mean[chosen],
            unaligned_means=second.mean[chosen],
            aligned_rates=first.firing_rate[chosen],
            unaligned_rates=second.firing_rate[chosen],
        )


def _cosine(decoder: torch.Tensor, found: Sequence[int], feature: int) -> float:
    """The largest cosine, by size, of a feature's decoder row with those of others."""
    return float((decoder[list(found)] @ decoder[feature]).abs().max())
