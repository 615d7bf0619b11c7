"""The selectors of this package, each one function."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch

from ..errors import SelectionError
from ..statistics.measures import Measures
from .contrast import Contrast
from .registry import register_selector

logger = logging.getLogger(__name__)

_ROWS = 4096  # features whose histograms are summed up at a time
_COARSE = 0.02  # an error of AUROC that is told of
_SAMPLE = 2000  # examples per class that the probe learns from


@register_selector("mean_difference", reference="SAILS, arXiv 2512.23260")
def mean_difference(contrast: Contrast) -> torch.Tensor:
    """Return mean over aligned minus mean over unaligned observations per feature, float64 [d_sae]."""
    return contrast.aligned.mean - contrast.unaligned.mean


@register_selector("effect_size", reference="Cohen, Statistical Power Analysis, 1988, section 2.5.1")
def effect_size(contrast: Contrast) -> torch.Tensor:
    """Return Cohen's d per feature, float64 [d_sae]: the difference of the means in pooled standard deviations.

    d = (m1 - m2) / s with s^2 = ((n1 - 1) s1^2 + (n2 - 1) s2^2) / (n1 + n2 - 2) and s_i^2 the sample variances.
    """
    first, second = contrast.aligned, contrast.unaligned
    squares = first.variance * first.count + second.variance * second.count
    return difference_over(contrast, (squares / max(1, first.count + second.count - 2)).sqrt())


@register_selector("welch_t", reference="Welch, Biometrika 34 (1947) 28; Cochran, Sampling Techniques, 1977, 6.4")
def welch_t(contrast: Contrast) -> torch.Tensor:
    """Return Welch's t per feature, float64 [d_sae], with examples as the independent units.

    t = (m1 - m2) / sqrt(e1^2 + e2^2) with e_i from `FeatureMoments.standard_error`.
    """
    first, second = contrast.aligned, contrast.unaligned
    error = (first.standard_error.square() + second.standard_error.square()).sqrt()
    return difference_over(contrast, error.nan_to_num(nan=float("inf")))


def difference_over(contrast: Contrast, spread: torch.Tensor) -> torch.Tensor:
    """Return the difference of the means over a spread, which rounding or constant activations may have made zero."""
    difference = mean_difference(contrast)
    floor = 1e-6 * torch.maximum(contrast.aligned.maximum, contrast.unaligned.maximum).clamp(min=1e-30)
    return difference / torch.maximum(spread, floor)


@register_selector("auroc", reference="Hanley and McNeil, Radiology 143 (1982) 29", measures=Measures(histograms=True))
def auroc(contrast: Contrast) -> torch.Tensor:
    """Return 2 AUROC - 1 per feature, float64 [d_sae]: how well its activation tells the classes apart.

    AUROC is the chance that an aligned observation has the larger activation than an unaligned one, ties (zeros, above
    all) counting half. From -1 (always smaller) to 1 (always larger); 0 tells nothing.
    """
    coarse = contrast.live & (area_error(contrast) > _COARSE)
    if bool(coarse.any()):
        logger.warning(
            "The activations of %d of %d live features at %s lie so close together (or outside the histograms' range) "
            "that their AUROC is known to %.2g at best.",
            int(coarse.sum()),
            int(contrast.live.sum()),
            contrast.sae.hook_name,
            float(area_error(contrast)[coarse].max()),
        )
    return 2 * area_under_curve(contrast) - 1


def area_under_curve(contrast: Contrast) -> torch.Tensor:
    """Return AUROC per feature from the histograms, float64 [d_sae].

    Exact but for pairs within one bin, which count as ties: see `area_error`.

    Raises:
        SelectionError: the statistics have no histograms.
    """
    areas = []
    for first, second in _shares(contrast):
        below = second.cumsum(dim=1) - second
        areas.append((first * (below + second / 2)).sum(dim=1))
    return torch.cat(areas)


def area_error(contrast: Contrast) -> torch.Tensor:
    """Return the largest error that `area_under_curve` can have per feature, float64 [d_sae].

    Half the share of pairs, one of each class, that fall into one bin (zeros are real ties, and no error).

    Raises:
        SelectionError: the statistics have no histograms.
    """
    return torch.cat([(first * second)[:, 1:].sum(dim=1) / 2 for first, second in _shares(contrast)])


def _shares(contrast: Contrast) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Shares of both classes' observations in zero and in every bin, each [rows, 1 + bins], some rows at a time."""
    for start in range(0, contrast.sae.d_sae, _ROWS):
        rows = slice(start, start + _ROWS)
        first, second = (
            torch.cat([(one.count - one.fired[rows, None]).double(), histogram.counts[rows].double()], dim=1)
            / one.count
            for one, histogram in zip((contrast.aligned, contrast.unaligned), contrast.histograms, strict=True)
        )
        yield first, second


@register_selector("firing_rate", reference="share of observations on which a feature fires, aligned minus unaligned")
def firing_rate(contrast: Contrast) -> torch.Tensor:
    """Return the difference of the firing rates per feature, aligned minus unaligned, float64 [d_sae]."""
    return contrast.aligned.firing_rate - contrast.unaligned.firing_rate


@register_selector(
    "probe",
    reference="sparse probing, arXiv 2305.01610; logistic regression with an L1 penalty, scikit-learn (liblinear)",
    measures=Measures(sample=_SAMPLE),
)
def probe(contrast: Contrast) -> torch.Tensor:
    """Return the weight per feature of a sparse logistic regression, float64 [d_sae].

    It tells the sampled examples of the two classes apart by their pooled features, each scaled to unit standard
    deviation, with an L1 penalty (C = 1) and both classes weighing the same. Features that it does not use have 0.

    Raises:
        SelectionError: the statistics have no sample of examples.
    """
    import numpy as np
    import sklearn
    from packaging.version import Version
    from scipy.sparse import csr_matrix, vstack
    from sklearn.linear_model import LogisticRegression

    parts = []
    for sample in contrast.samples:
        starts = np.concatenate([[0], sample.ends.numpy()])
        shape = (len(sample.examples), contrast.sae.d_sae)
        parts.append(csr_matrix((sample.values.double().numpy(), sample.features.numpy(), starts), shape=shape))
    rows = vstack(parts, format="csc")
    classes = np.repeat([1, 0], [part.shape[0] for part in parts])
    fires = np.diff(rows.indptr) >= 2  # a feature of one example alone could only name that example
    mean = np.asarray(rows.mean(axis=0)).ravel()
    spread = np.sqrt(np.maximum(np.asarray(rows.multiply(rows).mean(axis=0)).ravel() - mean**2, 0))
    used = np.flatnonzero(fires & (spread > 0))
    if not len(used):
        return torch.zeros(contrast.sae.d_sae, dtype=torch.float64)
    scaled = rows[:, used].multiply(1 / spread[used]).tocsr()
    # The argument's name before and since scikit-learn 1.8.
    lasso = {"penalty": "l1"} if Version(sklearn.__version__) < Version("1.8") else {"l1_ratio": 1.0}
    model = LogisticRegression(
        **lasso, solver="liblinear", class_weight="balanced", max_iter=1000, random_state=contrast.seed
    )
    model.fit(scaled, classes)
    weights = torch.zeros(contrast.sae.d_sae, dtype=torch.float64)
    weights[torch.from_numpy(used)] = torch.from_numpy(model.coef_[0]).double()
    return weights


@register_selector("attribution", reference="activation times gradient: arXiv 2310.10348, 2403.19647", attribution=True)
def attribution(contrast: Contrast) -> torch.Tensor:
    """Return the difference of the mean attributions per feature, aligned minus unaligned, float64 [d_sae].

    Raises:
        SelectionError: the statistics are of activations.
    """
    if contrast.quantity != "attribution":
        raise SelectionError(
            "The statistics are of activations, and this selector needs attributions. Collect them again with "
            "attribute=log_likelihood (peft_sae.statistics.gradient), or --selector attribution with texts."
        )
    return mean_difference(contrast)


@register_selector("cosine", reference="difference of means, arXiv 2312.06681, against the decoder rows", decoder=True)
def cosine(contrast: Contrast) -> torch.Tensor:
    """Return the cosine of each decoder row with the difference of the mean raw activations, float64 [d_sae].

    Raises:
        SelectionError: the SAEs were not given, or an SAE writes another place than it reads (a transcoder).
    """
    if contrast.sae.hook_name_in is not None:
        raise SelectionError(
            f"The SAE reads {contrast.sae.hook_name_in} and writes {contrast.sae.hook_name}, so its decoder's "
            "directions cannot be compared with differences of what it reads. Use another selector."
        )
    difference, decoder = contrast.raw_difference, contrast.unit_decoder
    return (decoder @ torch.nn.functional.normalize(difference, dim=0).float()).double()


@register_selector("explicit", reference="features that the caller names", signed=False, named=True)
def explicit(contrast: Contrast) -> torch.Tensor:
    """Return a score for the named features only, the first one's largest, float64 [d_sae]."""
    scores = torch.zeros(contrast.sae.d_sae, dtype=torch.float64)
    for place, feature in enumerate(contrast.named):
        scores[feature] = len(contrast.named) - place
    return scores


@register_selector("random", reference="control: features at random among those that fire", signed=False)
def random(contrast: Contrast) -> torch.Tensor:
    """Return a random score in (0, 1] per feature, float64 [d_sae], the same for the same seed and SAE."""
    generator = torch.Generator().manual_seed(contrast.seed ^ int(contrast.sae.digest[:8], 16))
    return 1 - torch.rand(contrast.sae.d_sae, dtype=torch.float64, generator=generator)
