"""Along which directions every module of an adapter meets the edited features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import ConfigError, MismatchError
from ..inspect.places import find_places
from ..inspect.source import AdapterSource
from ..layout import LOCAL_KINDS, BlockLayout, ModuleRole, Side, Site
from ..tuner import SaeSubspaceConfig
from ..tuner.basis import NormGain, orthonormal_rows, unseen_through_norm
from ..tuner.module_plan import ModulePlan
from ..tuner.norms import NormGains
from ..tuner.plan import make_plan
from ..tuner.sites import Locator, Place, width_of
from .direction_map import DirectionMap, make_map
from .request import EditedFeature, Kind

_NOTHING = 1e-6  # a direction of which less than this passes a norm, relative to its gain, is not met at all

Maps = dict[str, dict[Side, DirectionMap]]


def find_maps(
    source: AdapterSource,
    base: Any,
    layout: BlockLayout,
    depth: int,
    kind: Kind,
    features: Sequence[EditedFeature],
) -> Maps:
    """Return what an edit does to every module, by its name and side; sides that it leaves alone are not in it.

    Args:
        source: the adapter.
        base: its base model, or the skeleton of it.
        layout: what the base model's modules read and write.
        depth: number of its blocks.
        kind: `scale` or `keep`.
        features: what is edited.

    Raises:
        MismatchError: the adapter is of another model, or the features are.
        ConfigError: a module could use a removed feature in a way that no edit of its factors prevents, or directions
            cannot be scaled as is asked for.
    """
    places = find_places(replace(source, subspace=None), base, None, depth, ())  # what it started from is not asked
    modules = {place.update.name: place.module for place in places}
    finder = _Finder(source, base, layout, depth, kind, features)
    return {name: finder.maps(name, module) for name, module in modules.items()}


class _Finder:
    """Finds maps; modules behind the same norm share theirs."""

    def __init__(
        self,
        source: AdapterSource,
        base: Any,
        layout: BlockLayout,
        depth: int,
        kind: Kind,
        features: Sequence[EditedFeature],
    ) -> None:
        self._config, self._base, self._layout, self._kind, self._features = source.config, base, layout, kind, features
        self._locator: Locator[Any] = Locator(layout, depth, (), model_type=type(base).__name__)
        self._norms = NormGains(base)
        self._plans = _plans(source, base)
        self._known: dict[Any, DirectionMap] = {}
        self._attention = {
            path.split(".")[0] for path, roles in layout.roles.items() if any(role.site == "z" for role in roles)
        }

    def maps(self, name: str, module: nn.Module) -> dict[Side, DirectionMap]:
        place = self._locator.place(name)
        self._check(name, module, place)
        parts: dict[Side, list[tuple[ModuleRole, list[int]]]] = {}
        for role in place.roles:
            mine = self._features_of(role, place.block)
            if mine:
                parts.setdefault(role.side, []).append((role, mine))
        if not parts and self._kind == "keep":  # it meets none of what is to be kept
            parts = {place.roles[0].side: []}
        return {side: self._map(name, module, place, side, found) for side, found in parts.items()}

    def _features_of(self, role: ModuleRole, block: int) -> list[int]:
        """Places of the features in the space of a role: of the stream anywhere, of another only in its own block."""
        own = Site(block, role.site) if role.site in LOCAL_KINDS else None
        sites = [feature.sae.site for feature in self._features]
        return [
            index
            for index, site in enumerate(sites)
            if (site == own if own is not None else site.kind not in LOCAL_KINDS)
        ]

    def _map(
        self, name: str, module: nn.Module, place: Place, side: Side, parts: list[tuple[ModuleRole, list[int]]]
    ) -> DirectionMap:
        plan = self._plans.get(name)
        unseen = None if plan is None else (plan.unseen_read if side == "read" else plan.unseen_write)
        norms = tuple(place.norm(role) for role, _ in parts)
        local = place.block if any(role.site in LOCAL_KINDS for role, _ in parts) else None
        width = width_of(module, side) or 0
        key = (side, width, norms, local, None if unseen is None else id(unseen))
        if key not in self._known:
            rows, which = self._met(name, width, place, parts)
            if unseen is not None:
                rows, which = _beside(rows, which, unseen)
            if not which:
                rows = torch.zeros(0, width, dtype=torch.float64)
            factors = torch.tensor([self._features[index].factor for index in which], dtype=torch.float64)
            self._known[key] = make_map(
                self._kind, rows, factors, [self._features[index].name for index in which], name
            )
        return self._known[key]

    def _met(
        self, name: str, width: int, place: Place, parts: list[tuple[ModuleRole, list[int]]]
    ) -> tuple[torch.Tensor, list[int]]:
        """Unit vectors along which the module meets the features, and which feature each is of."""
        rows, which = [torch.zeros(0, width, dtype=torch.float64)], []
        for role, indices in parts:
            for index in indices:
                found = self._features[index].direction.shape[0]
                if found != width:
                    raise MismatchError(
                        f"{name!r} is {width} wide on its {role.side} side, and {self._features[index].name} is "
                        f"{found} wide, so it is of another model. Give features of the adapter's own base model."
                    )
            self._check_norm(place.norm(role))
            norm = self._norms.get(place.norm(role), width)
            directions = torch.stack([self._features[index].direction for index in indices])
            met = unseen_through_norm(directions, norm, role.side)
            lengths = met.norm(dim=1)
            passes = lengths > _NOTHING * _largest_gain(norm)
            rows.append(met[passes] / lengths[passes, None])
            which += [index for index, does in zip(indices, passes.tolist(), strict=True) if does]
        return torch.cat(rows), which

    def _check(self, name: str, module: nn.Module, place: Place) -> None:
        """Refuse modules whose update would use edited features in ways that their factors do not show."""
        kinds = {feature.sae.site.kind for feature in self._features}
        linear = isinstance(module, (nn.Linear, Conv1D)) or hasattr(module, "in_features")
        if not (linear and place.roles) and (self._kind == "keep" or kinds - {"z"}):
            raise ConfigError(
                f"It is not known what {name!r} ({type(module).__name__}) reads and writes, so its update might use "
                "the edited features unnoticed. Edit an adapter without this module."
            )
        if self._is_tied_head(module):
            raise ConfigError(
                f"{name!r} shares its weights with the input embedding, which writes the stream, so a merged update of "
                "it would write edited features. Edit an adapter without this module."
            )
        if self._kind == "keep":
            side = _given_side(self._config, name)
            if side == "none":
                raise ConfigError(
                    f"sides says that {name!r} is plain LoRA, on neither side of any feature, so it cannot be kept to "
                    "features. Edit an adapter without this module, or remove features instead."
                )
            return
        block, inside = place.block, {role.site for role in place.roles}
        heads = any(feature.sae.site == Site(block, "z") for feature in self._features)
        if heads and place.path.split(".")[0] in self._attention and "z" not in inside:
            raise ConfigError(
                f"What {name!r} computes becomes the heads' output of block {block}, where features are edited, and "
                "heads mix what they are given, so no edit of its factors keeps it from writing them. Edit features of "
                "the residual stream instead, or an adapter without this module."
            )
        self._check_upstream(name, place)

    def _check_upstream(self, name: str, place: Place) -> None:
        steps = [Site(place.block, role.site).half_steps or 0 for role in place.roles if role.side == "write"]
        for feature in self._features:
            site = feature.sae.site
            if site.kind == "mlp_in" and any(step <= self._mlp_step(site.block) for step in steps):
                raise ConfigError(
                    f"What {name!r} writes reaches the MLP of block {site.block} through its norm, where "
                    f"{feature.name} is, so no edit of its factors keeps it from writing that. Edit features of the "
                    "residual stream instead, or an adapter without this module."
                )

    def _mlp_step(self, block: int) -> int:
        """Where along the stream the MLP of a block branches off, in half blocks."""
        for roles in self._layout.roles.values():
            if any(role.site == "mlp_in" for role in roles):
                return Site(block, roles[0].site).half_steps or 0
        return Site(block, "resid_mid").half_steps or 0

    def _check_norm(self, norm: str | None) -> None:
        for trained in self._config.modules_to_save or ():
            if norm is not None and f".{trained}." in f".{norm}.":
                raise ConfigError(
                    f"The adapter holds a norm of its own in place of {norm!r} (modules_to_save), so how modules "
                    "behind it meet features is not what the base model says. Edit an adapter without that."
                )

    def _is_tied_head(self, module: nn.Module) -> bool:
        get_head = getattr(self._base, "get_output_embeddings", None)
        config = getattr(self._base, "config", None)
        tied = getattr(config, "tie_word_embeddings", False)
        return bool(tied) and get_head is not None and get_head() is module


def _plans(source: AdapterSource, base: nn.Module) -> Mapping[str, ModulePlan]:
    """What every module is protected from, as injection would find it anew."""
    config = source.config
    if not isinstance(config, SaeSubspaceConfig):
        return {}
    if source.subspace is not None:
        return make_plan(config, base, [update.name for update in source.updates], source.subspace).modules
    if config.protects_something():
        raise ConfigError(
            f"The adapter in '{source.name}' protects features, and its Subspace, which says along which directions, "
            "is not there, so an edit might bring them back. Put the adapter's `subspace` folder back."
        )
    make_plan(config, base, [], None)  # for its check of the model
    return {}


def _beside(rows: torch.Tensor, which: list[int], unseen: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
    """Directions without their part along protected ones.

    The update does not use the protected ones, so along a direction it uses exactly what is along this part of it; and
    an edit along the parts brings nothing of the protected ones back.
    """
    guard = orthonormal_rows(unseen.double())
    left = rows
    for _ in range(2):  # the first subtraction leaves rounding errors of the size of its operands
        left = left - (left @ guard.T) @ guard
    lengths = left.norm(dim=1)
    kept = lengths > _NOTHING
    return left[kept] / lengths[kept, None], [
        index for index, is_left in zip(which, kept.tolist(), strict=True) if is_left
    ]


def _largest_gain(norm: NormGain | None) -> float:
    return 1.0 if norm is None else float(norm.gain.abs().max())


def _given_side(config: Any, name: str) -> str | None:
    for key, side in (getattr(config, "sides", None) or {}).items():
        if name == key or name.endswith(f".{key}"):
            return str(side)
    return None
