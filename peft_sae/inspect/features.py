"""How much of an update reads or writes each feature."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ..errors import MismatchError
from ..layout import Side
from ..sae.handle import SaeHandle
from ..sae.identity import SaeIdentity
from ..sae.names import feature_name
from ..subspace import Subspace
from ..tuner.basis import unseen_through_norm
from .places import ModulePlace
from .weights import base_weight

if TYPE_CHECKING:
    import pandas as pd

_SIDES: tuple[Side, ...] = ("read", "write")
_CHUNK = 2048  # features at a time
_SINGULAR = 1e-10  # what is left of a direction beside the others, as a squared share, below which it is nothing

FEATURE_COLUMNS = {
    "name": "hook point and id",
    "block": "block of the hook point",
    "hook_name": "hook point",
    "sae": "its SAE",
    "feature": "its id",
    "group": "chosen (in the Subspace's basis), protected, or other",
    "side": "whether the update reads it or writes it",
    "modules": "number of modules that are nearest to its hook point on that side",
    "share": "share of the energy of these modules' updates that lies along it",
    "times_chance": "that, divided by what a direction has on average that is random in all dimensions alike",
    "times_typical": "that, divided by the median of all features of its SAE on that side; known with the SAE given",
    "unique": "share that lies along it and along no other chosen feature of the hook point; known for chosen ones",
    "sign": "cosine between what the base weights and the update do with it, over the modules weighted by the "
    "update's energy: the update adds to it (1) or works against it (-1)",
    "top_module": "module in which its share is largest",
    "top_share": "its share there",
    "tokens": "tokens that its direction promotes most, where the Subspace says so or the model was loaded",
    "neuronpedia": "address of its dashboard, or none",
    "label": "what the labels call it, or none",
}


@dataclass(frozen=True, eq=False)
class FeatureGroup:
    """Features of one SAE.

    Attributes:
        sae: the SAE.
        ids: feature ids, int64 [n].
        directions: their decoder directions, of any length, float [n, d_in].
        kinds: `chosen` or `protected` by feature id; others are neither.
        tokens: promoted tokens by feature id, as far as they are known.
    """

    sae: SaeIdentity
    ids: torch.Tensor
    directions: torch.Tensor
    kinds: Mapping[int, str] = field(default_factory=dict)
    tokens: Mapping[int, tuple[str, ...]] = field(default_factory=dict)

    def of_kind(self, kind: str) -> torch.Tensor:
        """Places in the group of the features of one kind, int64."""
        return torch.tensor(
            [place for place, one in enumerate(self.ids.tolist()) if self.kinds.get(one) == kind]
        ).long()


def feature_groups(subspace: Subspace | None, handles: Sequence[SaeHandle]) -> list[FeatureGroup]:
    """Return the features to look for: all of the given SAEs, else those that the Subspace holds.

    Raises:
        MismatchError: an SAE is not the one that the Subspace was built from.
    """
    groups: dict[str, FeatureGroup] = {}
    if subspace is not None:
        kinds: dict[str, dict[int, str]] = {}
        tokens: dict[str, dict[int, tuple[str, ...]]] = {}
        rows: dict[str, dict[int, torch.Tensor]] = {}
        saes: dict[str, SaeIdentity] = {}
        for kind, sites in (("chosen", subspace.sites), ("protected", subspace.protected)):
            for site in sites:
                hook = site.sae.hook_name
                saes[hook] = site.sae
                for one, said, row in zip(site.features.tolist(), site.tokens, site.directions, strict=True):
                    kinds.setdefault(hook, {})[one] = kind
                    tokens.setdefault(hook, {})[one] = said
                    rows.setdefault(hook, {})[one] = row
        for hook, sae in saes.items():
            ids = torch.tensor(list(rows[hook]))
            groups[hook] = FeatureGroup(sae, ids, torch.stack(list(rows[hook].values())), kinds[hook], tokens[hook])
    for handle in handles:
        known = groups.get(handle.identity.hook_name)
        if known is not None and known.sae.digest != handle.identity.digest:
            raise MismatchError(
                f"The SAE {handle.identity.name!r} at {handle.identity.hook_name} has the digest "
                f"{handle.identity.digest[:12]}..., and the adapter's features there are of {known.sae.name!r} with "
                f"{known.sae.digest[:12]}..., so equal ids would be different features. Give the SAE that it was built "
                "from."
            )
        groups[handle.identity.hook_name] = FeatureGroup(
            handle.identity,
            torch.arange(handle.identity.d_sae),
            handle.decoder,
            {} if known is None else known.kinds,
            {} if known is None else known.tokens,
        )
    return sorted(groups.values(), key=lambda group: (group.sae.site.block, group.sae.hook_name))


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


def _sign(directions: torch.Tensor, side: Side, places: Sequence[ModulePlace]) -> torch.Tensor:
    """Cosine between what the base weights and the update do with a direction, weighted by the update's energy."""
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


def feature_table(
    readings: Sequence[FeatureReading], *, others: int, labels: Mapping[str, str] | None = None
) -> pd.DataFrame:
    """Return one row per chosen or protected feature and side, and as many other ones with the largest shares.

    Args:
        readings: from `read_features`.
        others: number of features per hook point and side that are neither.
        labels: what the user calls features, by name.

    Returns:
        With the columns of `FEATURE_COLUMNS`, largest share first.
    """
    import pandas as pd

    rows = [row for reading in readings for row in _rows(reading, others, labels or {})]
    table = pd.DataFrame(rows, columns=list(FEATURE_COLUMNS))
    return table.sort_values("share", ascending=False, kind="stable", ignore_index=True)


def _rows(reading: FeatureReading, others: int, labels: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    group, kept = reading.group, reading.kept.tolist()
    place_of = {place: number for number, place in enumerate(kept)}
    share = reading.energy / reading.total if reading.total else reading.energy
    free = torch.ones(len(group.ids), dtype=torch.bool)
    free[reading.kept] = False
    candidates = free.nonzero().squeeze(1)
    best = candidates[share[candidates].argsort(descending=True, stable=True)[:others]]
    chance = reading.chance / reading.total if reading.total else 0.0
    # The directions of an SAE favour some dimensions, as updates do: a typical one has more than a random one.
    whole = len(group.ids) == group.sae.d_sae
    typical = float(share.median()) if whole and reading.total else 0.0
    shown = [*kept, *best.tolist()]
    signs = _sign(group.directions[shown].detach().cpu().double(), reading.side, reading.places)
    for place, sign in zip(shown, signs, strict=True):
        feature = int(group.ids[place])
        number = place_of.get(place)
        name = feature_name(group.sae, feature)
        yield {
            "name": name,
            "block": group.sae.site.block,
            "hook_name": group.sae.hook_name,
            "sae": group.sae.name,
            "feature": feature,
            "group": group.kinds.get(feature, "other"),
            "side": reading.side,
            "modules": len(reading.places),
            "share": float(share[place]) if reading.total else None,
            "times_chance": float(share[place]) / chance if chance else None,
            "times_typical": float(share[place]) / typical if typical else None,
            "unique": None if number is None else _number(reading.unique[number]),
            "sign": _number(sign),
            "top_module": (
                reading.places[int(reading.best_place[place])].update.name if float(reading.best[place]) else None
            ),
            "top_share": float(reading.best[place]) if reading.total else None,
            "tokens": list(group.tokens.get(feature, ())),
            "neuronpedia": group.sae.neuronpedia_url(feature),
            "label": labels.get(name),
        }


def _number(value: torch.Tensor) -> float | None:
    return None if bool(value.isnan()) else float(value)


def module_feature_table(readings: Sequence[FeatureReading]) -> pd.DataFrame:
    """Return one row per chosen or protected feature and module: `name`, `module`, `side`, `share`."""
    import pandas as pd

    rows = [
        (feature_name(reading.group.sae, int(reading.group.ids[place])), module.update.name, reading.side, float(share))
        for reading in readings
        for place, shares in zip(reading.kept.tolist(), reading.each, strict=True)
        for module, share in zip(reading.places, shares, strict=True)
    ]
    return pd.DataFrame(rows, columns=["name", "module", "side", "share"])
