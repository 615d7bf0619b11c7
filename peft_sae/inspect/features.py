"""How much of an update reads or writes each feature."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..layout import Side
from ..tuner.basis import unseen_through_norm
from .groups import FeatureGroup
from .places import ModulePlace
from .weights import base_weight

_SIDES: tuple[Side, ...] = ("read", "write")
_CHUNK = 2048  # features at a time
_SINGULAR = 1e-10  # what is left of a direction beside the others, as a squared share, below which it is nothing


@dataclass(frozen=True, eq=False)
class FeatureReading:
    """What is measured of the features of one group on one side.

    Attributes:
        group: the features.
        side: the side.
        places: the modules, in the order of the columns of `each`.
        energy: of the updates along each feature, summed over the modules, float64 [n].
        total: energy of the modules' updates.
        chance: energy that a random direction has on average.
        best: largest share in one module, float64 [n].
        best_place: which module that is, int64 [n].
        each: shares of the chosen and protected features in every module, float64 [kept, modules].
        unique: share of the chosen features alone, summed over the modules, float64 [kept]; NaN for protected ones.
        kept: places in the group of the chosen and protected features, int64 [kept].
    """

    group: FeatureGroup
    side: Side
    places: tuple[ModulePlace, ...]
    energy: torch.Tensor
    total: float
    chance: float
    best: torch.Tensor
    best_place: torch.Tensor
    each: torch.Tensor
    unique: torch.Tensor
    kept: torch.Tensor


def read_features(groups: Sequence[FeatureGroup], places: Sequence[ModulePlace]) -> Iterator[FeatureReading]:
    """Measure every group on every side on which modules are nearest to its hook point.

    With v the unit vector along which a module meets the feature (behind its norm: g * d for a direction d and the
    norm's gain g), the energy along it is the squared norm of dW v for a reading module, of v^T dW for a writing one,
    and the share is that over the squared Frobenius norm of dW. Directions overlap, so shares do not add up to 1: what
    two features have in common counts for both. `unique` counts it for none: it is the same with the part of v that is
    orthogonal to those of the other chosen features, and so the energy that the span of the chosen features loses
    without this one. `sign` is the cosine of W v and dW v (of v^T W and v^T dW).
    """
    for group in groups:
        for side in _SIDES:
            mine = [
                place
                for place in places
                if place.side == side and place.sae is not None and place.sae.hook_name == group.sae.hook_name
            ]
            if mine:
                yield _read(group, side, mine)


def _read(group: FeatureGroup, side: Side, places: list[ModulePlace]) -> FeatureReading:
    number = len(group.ids)
    energy, best = torch.zeros(number, dtype=torch.float64), torch.zeros(number, dtype=torch.float64)
    best_place = torch.zeros(number, dtype=torch.int64)
    kept = torch.cat([group.of_kind("chosen"), group.of_kind("protected")])
    each = torch.zeros(len(kept), len(places), dtype=torch.float64)
    energies = [place.update.norm**2 for place in places]
    for start in range(0, number, _CHUNK):
        part = slice(start, start + _CHUNK)
        chunk = group.directions[part].detach().cpu().double()
        for index, along in _by_norm(chunk, side, places):
            share = along(index) / energies[index] if energies[index] else torch.zeros(len(chunk), dtype=torch.float64)
            energy[part] += share * energies[index]
            higher = share > best[part]
            best[part] = torch.where(higher, share, best[part])
            best_place[part] = torch.where(higher, index, best_place[part])
    directions = group.directions[kept].detach().cpu().double()
    for index, along in _by_norm(directions, side, places):
        if energies[index]:
            each[:, index] = along(index) / energies[index]
    total = sum(energies)
    return FeatureReading(
        group,
        side,
        tuple(places),
        energy,
        total,
        sum(one / place.update.width[side] for one, place in zip(energies, places, strict=True)),
        best,
        best_place,
        each,
        _unique(group, side, places, total),
        kept,
    )


def _by_norm(directions: torch.Tensor, side: Side, places: list[ModulePlace]) -> Iterator[tuple[int, Any]]:
    """Index of every module and how to measure it; modules behind the same norm share their directions."""
    by_norm: dict[str | None, list[int]] = {}
    for index, place in enumerate(places):
        by_norm.setdefault(place.norm_name, []).append(index)
    for indices in by_norm.values():
        met = _met(directions, places[indices[0]], side)
        for index in indices:
            yield index, lambda which, met=met: places[which].update.energy_along(met, side)


def _met(directions: torch.Tensor, place: ModulePlace, side: Side) -> torch.Tensor:
    """Unit vectors along which a module meets directions of the stream; zero where its norm lets nothing pass."""
    return torch.nn.functional.normalize(unseen_through_norm(directions, place.norm, side), dim=-1)


def _unique(group: FeatureGroup, side: Side, places: list[ModulePlace], total: float) -> torch.Tensor:
    chosen, protected = group.of_kind("chosen"), group.of_kind("protected")
    found = torch.zeros(len(chosen), dtype=torch.float64)
    known: dict[str | None, torch.Tensor] = {}
    for place in places:
        if place.norm_name not in known:
            known[place.norm_name] = own_parts(_met(group.directions[chosen].detach().cpu().double(), place, side))
        found += place.update.energy_along(known[place.norm_name], side)
    return torch.cat([found / total if total else found, torch.full((len(protected),), torch.nan).double()])


def own_parts(rows: torch.Tensor) -> torch.Tensor:
    """Return the part of every row that is orthogonal to all others, of unit length; zero where nothing is left.

    For independent rows V these are the rows of (V V^T)^-1 V. Where some depend on others, each row is compared with
    the others by itself.

    Args:
        rows: unit vectors, float64 [n, width].
    """
    if not len(rows):
        return rows
    inverse, failed = torch.linalg.inv_ex(rows @ rows.T)
    left = 1 / torch.diagonal(inverse)  # squared length of the part that is left
    if not bool(failed) and bool(torch.isfinite(inverse).all()) and float(left.min()) > _SINGULAR**0.5:
        return torch.nn.functional.normalize(inverse @ rows, dim=-1)
    parts = []
    for index in range(len(rows)):
        others = torch.cat([rows[:index], rows[index + 1 :]])
        _, values, right = torch.linalg.svd(others, full_matrices=False)
        span = right[values > _SINGULAR**0.5 * values.max()] if len(values) else right
        part = rows[index] - (rows[index] @ span.T) @ span
        parts.append(part / part.norm() if float(part.square().sum()) > _SINGULAR else torch.zeros_like(part))
    return torch.stack(parts)


def signs(directions: torch.Tensor, side: Side, places: Sequence[ModulePlace]) -> torch.Tensor:
    """Return how far the base weights and the update agree in what they do with directions.

    Args:
        directions: of the residual stream, float64 [n, d_in].
        side: the modules' side.
        places: the modules.

    Returns:
        The cosine of W v and dW v, weighted over the modules by the update's energy, float64 [n]; NaN without weights.
    """
    weighted, sizes = torch.zeros(len(directions)).double(), torch.zeros(len(directions)).double()
    seen = False
    for place in places:
        weight = base_weight(place.module)
        if weight is None:
            continue
        seen = True
        met = _met(directions, place, side)
        weight = weight.cpu()
        a, b, scale = place.update.a, place.update.b, place.update.scaling
        if side == "read":
            base, change = (met.to(weight.dtype) @ weight.T).double(), scale * (met @ a.T) @ b.T
        else:
            base, change = (met.to(weight.dtype) @ weight).double(), scale * (met @ b) @ a
        size = change.square().sum(dim=1)
        lengths = base.norm(dim=1) * change.norm(dim=1)
        weighted += torch.where(lengths > 0, (base * change).sum(dim=1) / lengths.clamp(min=1e-300), 0.0) * size
        sizes += size
    return torch.where(sizes > 0, weighted / sizes, torch.nan) if seen else torch.full_like(sizes, torch.nan)
