"""Bases without an SAE, of the same shape, for those who doubt that features are needed."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, TypeAlias

import torch

from ..artifact import digest
from ..errors import ConfigError, MismatchError, SelectionError
from ..sae.identity import SaeIdentity
from ..statistics.parts import RawMoments
from ..statistics.statistics import FeatureStatistics
from .artifact import Subspace
from .site import SubspaceSite

Control: TypeAlias = Literal["random", "neurons", "difference_pca", "mean_difference"]
CONTROLS = ("random", "neurons", "difference_pca", "mean_difference")

# Orthonormal rows [rank, width], their scores, and the class means along them, each [rank].
_Rows: TypeAlias = "tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]"


def control_subspace(
    like: Subspace,
    kind: Control,
    *,
    statistics: FeatureStatistics | None = None,
    aligned: str = "aligned",
    unaligned: str = "unaligned",
    seed: int = 0,
) -> Subspace:
    """Return a Subspace with bases of the same ranks at the same hook points as another, made without the SAEs.

    - `random`: random orthonormal vectors, of a uniform distribution over subspaces.
    - `neurons`: the coordinates of the activations whose means differ most between the classes: the polysemantic
      baseline of SAILS (arXiv 2512.23260), whose error has a floor of sqrt(r - 1).
    - `difference_pca`: the main axes, about the origin, of the differences between every aligned and every unaligned
      observation: eigenvectors of E[d d^T] = E[x x^T] + E[y y^T] - m_x m_y^T - m_y m_x^T, largest eigenvalues first.
      The spread within the classes counts, as in PCA on paired differences (arXiv 2310.01405); with pooling="mean" it
      is that of texts instead of tokens. The spread can hide the difference of the means:
    - `mean_difference`: the direction of the difference of the raw means (arXiv 2312.06681), and random directions
      across it for the rest of the rank.

    Its "features" are numbered vectors; protected features are those of `like`.

    Args:
        like: gives hook points, ranks and protected features.
        kind: which control.
        statistics: for `neurons` and `difference_pca`; the latter needs Measures(covariance=True).
        aligned: label of the texts to move towards.
        unaligned: label of the texts to move away from.
        seed: for `random` and `mean_difference`.

    Raises:
        ConfigError: unknown kind, or the statistics are missing.
        SelectionError: the statistics lack the covariance.
        MismatchError: the statistics are of other hook points, or a site's SAE is a transcoder.
        DataError: a label is not in the statistics.
    """
    if kind not in CONTROLS:
        raise ConfigError(f"kind={kind!r} is unknown. Choose one of {CONTROLS}.")
    if kind != "random" and statistics is None:
        raise ConfigError(f"The control {kind!r} is made of raw activations. Give statistics=... .")
    generator = torch.Generator().manual_seed(seed)
    sites = []
    for site in like.sites:
        if statistics is None or kind == "random":
            rows = _random(site, generator)
        else:
            classes = _raw(site.sae, statistics, (aligned, unaligned))
            if kind == "mean_difference":
                rows = _mean_difference(site, classes, generator)
            else:
                rows = (_neurons if kind == "neurons" else _difference_components)(site.rank, *classes)
        sites.append(_control_site(site, kind, rows))
    settings = {"control": kind, "like": like.digest, "seed": seed, "aligned": aligned, "unaligned": unaligned}
    if statistics is not None:
        settings["statistics"] = dict(statistics.settings)
    return replace(like, sites=tuple(sites), settings=settings)


def _random(site: SubspaceSite, generator: torch.Generator) -> _Rows:
    rows = _orthonormal(torch.randn(site.sae.d_in, site.rank, generator=generator, dtype=torch.float64))
    ones = torch.ones(site.rank, dtype=torch.float64)
    return rows, ones, torch.zeros_like(ones), torch.zeros_like(ones), ones


def _orthonormal(columns: torch.Tensor) -> torch.Tensor:
    """Rows [rank, width] that span the columns [width, rank], the first along the first; of normal ones, uniform."""
    orthogonal, upper = torch.linalg.qr(columns)
    rows: torch.Tensor = (orthogonal * upper.diagonal().sign()).T
    return rows


def _mean_difference(site: SubspaceSite, classes: tuple[RawMoments, RawMoments], generator: torch.Generator) -> _Rows:
    first, second = classes
    difference = first.mean - second.mean
    normal = torch.randn(site.sae.d_in, site.rank - 1, generator=generator, dtype=torch.float64)
    rows = _orthonormal(torch.cat([difference[:, None], normal], dim=1))
    scores = rows @ difference
    return rows, scores, rows @ first.mean, rows @ second.mean, torch.arange(site.rank).double()


def _raw(sae: SaeIdentity, statistics: FeatureStatistics, labels: tuple[str, str]) -> tuple[RawMoments, RawMoments]:
    places = [other.hook_name for other in statistics.saes]
    if sae.hook_name not in places or sae.hook_name_in is not None:
        raise MismatchError(
            f"The statistics have no raw activations at {sae.hook_name}, where the basis is to stand (a transcoder "
            f"reads another place than it writes): their SAEs write {places}. Collect them with an SAE at that hook "
            "point, or use the control 'random'."
        )
    found = [statistics.of(label)[places.index(sae.hook_name)].raw for label in labels]
    if found[0] is None or found[1] is None:
        raise SelectionError(f"The statistics hold no raw activations at {sae.hook_name}. Collect them again.")
    return found[0], found[1]


def _neurons(rank: int, first: RawMoments, second: RawMoments) -> _Rows:
    difference = first.mean - second.mean
    order = torch.sort(difference.abs(), descending=True, stable=True).indices[:rank]
    rows = torch.eye(len(difference), dtype=torch.float64)[order]
    return rows, difference[order], first.mean[order], second.mean[order], order.double()


def _difference_components(rank: int, first: RawMoments, second: RawMoments) -> _Rows:
    if first.products is None or second.products is None:
        raise SelectionError(
            "The statistics hold no covariance, which the control 'difference_pca' needs. Collect them again with "
            "measures=Measures(covariance=True) (--measure covariance)."
        )
    cross = torch.outer(first.mean, second.mean)
    moments = first.products / first.count + second.products / second.count - cross - cross.T
    values, vectors = torch.linalg.eigh((moments + moments.T) / 2)
    rows = vectors.flip(1).T[:rank].contiguous()
    # Towards the aligned texts, as far as a component has to do with them.
    rows = rows * torch.where(rows @ (first.mean - second.mean) < 0, -1.0, 1.0).double()[:, None]
    return rows, values.flip(0)[:rank], rows @ first.mean, rows @ second.mean, torch.arange(rank).double()


def _control_site(site: SubspaceSite, kind: str, made: _Rows) -> SubspaceSite:
    rows, scores, first, second, ids = made
    count = len(rows)
    features = ids.long() if kind == "neurons" else torch.arange(count)
    sae = SaeIdentity(
        name=f"{kind} at {site.sae.hook_name}",
        hook_name=site.sae.hook_name,
        d_in=site.sae.d_in,
        d_sae=site.sae.d_in,
        model_name=site.sae.model_name,
        neuronpedia_id=None,
        digest=digest({"rows": rows}),
    )
    ones = torch.ones(count, dtype=torch.float64)
    return SubspaceSite(
        sae=sae,
        features=features,
        scores=scores,
        q_values=ones,
        aligned_means=first,
        unaligned_means=second,
        aligned_rates=ones,
        unaligned_rates=ones,
        directions=rows.float(),
        basis=rows.float(),
        coefficients=torch.eye(count),
        tokens=((),) * count,
    )
