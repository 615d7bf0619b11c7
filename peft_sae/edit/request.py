"""What is asked for: which features, and what is to be left of each."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from ..errors import ConfigError, SelectionError
from ..inspect.groups import FeatureGroup
from ..sae.identity import SaeIdentity
from ..sae.names import feature_name, parse_feature_name
from ..subspace.site import unit_rows

Kind = Literal["scale", "keep"]
Scales = Mapping[str, float] | Iterable[tuple[str, float]]

_SHOWN = 12  # features of a hook point that an error lists


@dataclass(frozen=True)
class Wish:
    """An edit by the user's names.

    Attributes:
        kind: `scale`, of which removing is the case 0; or `keep`, which removes all else.
        factors: a name and what is to be left of the feature, as often as they were given.
    """

    kind: Kind
    factors: tuple[tuple[str, float], ...]


@dataclass(frozen=True, eq=False)
class EditedFeature:
    """One feature to edit.

    Attributes:
        sae: its SAE.
        feature: its id.
        direction: its decoder direction, of unit length, float64 [d_in].
        factor: what is to be left of it: 0 to remove it, 1 to keep it.
    """

    sae: SaeIdentity
    feature: int
    direction: torch.Tensor
    factor: float

    @property
    def name(self) -> str:
        """Hook point and id."""
        return feature_name(self.sae, self.feature)


def read_wish(remove: Sequence[str], scale: Scales | None, keep: Sequence[str] | None) -> Wish:
    """Check the arguments of an edit.

    Raises:
        ConfigError: there is nothing to do, they contradict each other, or a scale is no finite number.
    """
    removed = _names(remove, "remove")
    scaled = _scales(scale)
    if keep is not None:
        kept = _names(keep, "keep")
        if removed or scaled:
            raise ConfigError(
                f"keep={kept} removes everything but these features, which remove={removed} and scale={dict(scaled)} "
                "contradict or repeat. Edit twice, or leave the others out."
            )
        if not kept:
            raise ConfigError("keep=[] names no feature, so nothing of the update would be left. Name at least one.")
        return Wish("keep", tuple((name, 1.0) for name in kept))
    if not removed and all(factor == 1 for _, factor in scaled):
        raise ConfigError(
            "There is nothing to do: no feature is to be removed or kept, and none scaled by another number than 1. "
            "Give remove=[...], scale={...} or keep=[...]."
        )
    return Wish("scale", (*((name, 0.0) for name in removed), *scaled))


def find_features(wish: Wish, groups: Sequence[FeatureGroup]) -> list[EditedFeature]:
    """Return the features that a wish names, each once, by hook point and id.

    Args:
        wish: the names.
        groups: the features whose directions are known.

    Raises:
        SelectionError: a name means no feature whose direction is known.
        ConfigError: one feature has two factors.
    """
    if not groups:
        raise ConfigError(
            f"{wish.factors[0][0]!r} has no direction: the adapter has no Subspace, and no SAEs are given. Give the "
            "SAEs of its base model with saes=load_saes(...) (on the command line --saes)."
        )
    found: dict[tuple[str, int], EditedFeature] = {}
    for name, factor in wish.factors:
        group, feature, place = _look_up(name, groups)
        key = (group.sae.hook_name, feature)
        if key in found and found[key].factor != factor:
            raise ConfigError(
                f"{feature_name(group.sae, feature)} is to be left at {found[key].factor:g} and at {factor:g} times "
                "what it is (0 means removed), which contradict each other. Name it once."
            )
        direction = unit_rows(group.directions[place : place + 1], group.sae.hook_name)[0]
        found[key] = EditedFeature(group.sae, feature, direction, factor)
    return [found[key] for key in sorted(found, key=lambda key: (found[key].sae.site.block, *key))]


def _look_up(name: str, groups: Sequence[FeatureGroup]) -> tuple[FeatureGroup, int, int]:
    sae, feature = parse_feature_name(name, [group.sae for group in groups])
    group = next(group for group in groups if group.sae == sae)
    places = (group.ids == feature).nonzero().flatten().tolist()
    if not places:
        ids = sorted(group.ids.tolist())
        more = f" and {len(ids) - _SHOWN} more" if len(ids) > _SHOWN else ""
        raise SelectionError(
            f"{name!r} names feature {feature} of {sae.hook_name}, and the adapter's Subspace has the features "
            f"{ids[:_SHOWN]}{more} there, so the direction of another is not known. Give the SAE it was built from "
            "with saes=load_saes(...) (on the command line --saes)."
        )
    return group, feature, int(places[0])


def _names(names: Sequence[str], argument: str) -> list[str]:
    if isinstance(names, (str, bytes)) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{argument}={names!r} is no list of names. Give one such as ['12:4051'].")
    return list(names)


def _scales(scale: Scales | None) -> list[tuple[str, float]]:
    if scale is None:
        return []
    try:
        pairs = [(name, factor) for name, factor in (scale.items() if isinstance(scale, Mapping) else scale)]
    except (TypeError, ValueError) as error:
        raise ConfigError(f"scale={scale!r} is no mapping. Give one such as {{'12:4051': 0.5}}.") from error
    for name, factor in pairs:
        number = isinstance(factor, (int, float)) and not isinstance(factor, bool)
        if not isinstance(name, str) or not number or not math.isfinite(factor):
            raise ConfigError(
                f"scale leaves {name!r} at {factor!r} times what it is, which is no finite number. Give one such as "
                "{'12:4051': 0.5}."
            )
    return [(name, float(factor)) for name, factor in pairs]
