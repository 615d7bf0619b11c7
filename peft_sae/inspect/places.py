"""Where the modules of an adapter are: side, hook point, norm, and the basis that each started from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..artifact import digest
from ..errors import ConfigError, MismatchError
from ..layout import BlockLayout, Side
from ..sae.identity import SaeIdentity
from ..sae.placement import find_layout
from ..tuner import SaeSubspaceConfig
from ..tuner.basis import NormGain
from ..tuner.norms import NormGains
from ..tuner.plan import make_plan
from ..tuner.sites import Locator, width_of
from .source import AdapterSource
from .update import LowRankUpdate


@dataclass(frozen=True)
class Where:
    """A place of features, as the search for the nearest one wants it."""

    sae: SaeIdentity


@dataclass(frozen=True, eq=False)
class ModulePlace:
    """What is known of one module beside its update.

    Attributes:
        update: its update.
        module: the base model's module.
        block: its block; None for the head or where it is not known.
        side: on which side it touches features; None if it touches none.
        sae: the SAE whose features those are.
        norm_name: path of the norm between the stream and the module, or None.
        norm: what that norm does.
        start: the basis that its factor started from, behind the norm, orthonormal, float64 [basis, width]; None if
            it started from none, or from one that is not known.
    """

    update: LowRankUpdate
    module: nn.Module
    block: int | None = None
    side: Side | None = None
    sae: SaeIdentity | None = None
    norm_name: str | None = None
    norm: NormGain | None = None
    start: torch.Tensor | None = None


def layout_of(source: AdapterSource, base: Any) -> tuple[BlockLayout, int]:
    """Return what the modules of a base model read and write, and its depth: as the Subspace says, or the model."""
    if source.subspace is not None:
        return source.subspace.layout, int(source.subspace.model.get("num_hidden_layers", 0))
    return find_layout(base), int(base.config.get_text_config().num_hidden_layers)


def find_places(
    source: AdapterSource, base: nn.Module, layout: BlockLayout | None, depth: int, saes: Sequence[SaeIdentity]
) -> list[ModulePlace]:
    """Find the place of every update.

    Args:
        source: the adapter.
        base: the base model, or its skeleton.
        layout: what its modules read and write; None if there are neither a Subspace nor SAEs to say it.
        depth: number of its blocks.
        saes: the SAEs whose features are looked for; a module belongs to the nearest.

    Raises:
        MismatchError: the adapter is of another model, or a module is of another width than the features.
    """
    modules = {update.name: _module_of(base, update) for update in source.updates}
    starts = _starts(source, base)
    if layout is None:
        return [ModulePlace(update, modules[update.name]) for update in source.updates]
    config = source.config
    sides = config.sides if isinstance(config, SaeSubspaceConfig) else None
    locator = Locator(layout, depth, [Where(sae) for sae in saes], model_type=type(base).__name__, sides=sides)
    norms = NormGains(base)
    return [_place(update, modules[update.name], locator, norms, starts.get(update.name)) for update in source.updates]


def norms_digest(places: Sequence[ModulePlace]) -> str:
    """Return the SHA-256 of the gains of all norms that were used: other bases of the same shape have others."""
    return digest({place.norm_name or "": place.norm.gain for place in places if place.norm is not None})


def _place(
    update: LowRankUpdate, module: nn.Module, locator: Locator[Where], norms: NormGains, start: torch.Tensor | None
) -> ModulePlace:
    place = locator.place(update.name)
    block = place.block if place.prefix is not None else None
    try:
        role, where = locator.find(update.name, module, place)
    except (ConfigError, MismatchError):  # a module that no feature belongs to is measured all the same
        return ModulePlace(update, module, block, start=start)
    if role is None or where is None:
        return ModulePlace(update, module, block, start=start)
    width = update.width[role.side]
    if where.sae.d_in != width:
        raise MismatchError(
            f"{update.name!r} is {width} wide on its {role.side} side, and the features at {where.sae.hook_name} are "
            f"{where.sae.d_in} wide, so they are of another model. Give SAEs of the adapter's own base model."
        )
    name = place.norm(role)
    return ModulePlace(update, module, block, role.side, where.sae, name, norms.get(name, width), start)


def _module_of(base: nn.Module, update: LowRankUpdate) -> nn.Module:
    try:
        module = base.get_submodule(update.name)
    except AttributeError as error:
        raise MismatchError(
            f"The adapter changes {update.name!r}, and the model ({type(base).__name__}) has no such module: it is an "
            "adapter of another model. Give the base that it was trained on."
        ) from error
    if isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    for side, width in update.width.items():
        found = width_of(module, side)
        if found != width:
            raise MismatchError(
                f"The adapter's update of {update.name!r} is {width} wide on its {side} side, and the model's module "
                f"({type(module).__name__}) is {found} wide: it is an adapter of another model. Give the base that it "
                "was trained on."
            )
    return module


def _starts(source: AdapterSource, base: nn.Module) -> dict[str, torch.Tensor]:
    """The basis that every module started from, as injection would compute it anew."""
    config = source.config
    if not isinstance(config, SaeSubspaceConfig) or source.subspace is None:
        return {}
    targets = [update.name for update in source.updates]
    plan = make_plan(config, base, targets, source.subspace)
    return {
        name: module.rows[: module.basis].double()
        for name, module in plan.modules.items()
        if module.rows is not None and module.basis
    }
