"""Deciding, before anything is changed, which basis every target module gets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import ConfigError, MismatchError
from ..subspace import Subspace
from .config import SaeSubspaceConfig
from .module_plan import ModulePlan, asked_rank
from .planner import Planner
from .sites import width_of

_MODEL_ENTRIES = ("model_type", "hidden_size", "num_hidden_layers")


@dataclass(frozen=True)
class InjectionPlan:
    """The plans of all target modules.

    Attributes:
        subspace: the Subspace that the bases come from; None if the weights come from elsewhere.
        modules: module name to plan; modules that are left alone are not in it.
    """

    subspace: Subspace | None
    modules: dict[str, ModulePlan]


def make_plan(
    config: SaeSubspaceConfig, model: nn.Module, targets: Iterable[str], subspace: Subspace | None
) -> InjectionPlan:
    """Plan every target module, changing neither the model nor the configuration.

    Args:
        config: the adapter's configuration.
        model: the base model.
        targets: names of the target modules.
        subspace: from `resolve_subspace`.

    Raises:
        ConfigError, MismatchError: the configuration cannot be carried out.
    """
    record = config.basis_record or {"model": {}, "modules": {}}
    _check_model(model, record["model"] if subspace is None else subspace.model)
    if subspace is not None:
        return InjectionPlan(subspace, Planner(config, model, subspace).plan(list(targets)))
    return InjectionPlan(
        None, {name: _from_record(config, model, name, record["modules"].get(name)) for name in targets}
    )


def describe_model(subspace: Subspace) -> dict[str, Any]:
    """Return what must agree between the model of a Subspace and the model of an adapter."""
    return {name: subspace.model[name] for name in _MODEL_ENTRIES if subspace.model.get(name)}


def _check_model(model: nn.Module, expected: Mapping[str, Any]) -> None:
    """Refuse a model of another architecture or depth, in which the directions would mean nothing."""
    config: Any = getattr(model, "config", None)
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name in _MODEL_ENTRIES:
        found = {getattr(part, name, None) for part in (config, text_config)} - {None}
        if expected.get(name) and found and expected[name] not in found:
            raise MismatchError(
                f"The Subspace was built on a model with {name}={expected[name]!r}, and this one has "
                f"{' or '.join(map(repr, sorted(found, key=str)))}: its directions would mean nothing here. Use a "
                "Subspace of this model, or the model that the adapter was trained on."
            )


def _from_record(config: SaeSubspaceConfig, model: nn.Module, name: str, entry: Mapping[str, Any] | None) -> ModulePlan:
    rank = asked_rank(config, name)
    if rank is None:
        raise ConfigError(
            "r='auto' needs the Subspace that the ranks come from, and it is not there. Give it or a number."
        )
    side = "none" if entry is None else entry["side"]
    width = None if side == "none" else width_of(model.get_submodule(name), side)
    if width is not None and rank > width:
        raise ConfigError(
            f"r={rank} exceeds the {width} dimensions that {name!r} {side}s, so no basis had so many directions. "
            "Restore the adapter's configuration."
        )
    if config.freeze_basis and side == "none":
        raise ConfigError(
            f"freeze_basis=True, and basis_record says nothing of the basis of {name!r}, so nothing in it would be "
            "frozen. Restore the adapter's configuration."
        )
    protected = entry is not None and bool(entry["protected_read"] or entry["protected_write"])
    if protected and not config.inference_mode:
        raise ConfigError(
            f"The adapter protects features in {name!r}, and its Subspace, which says which directions those are, is "
            "not there, so training on would not keep away from them. Put the adapter's `subspace` folder back, or "
            "load it with is_trainable=False."
        )
    return ModulePlan(rank=rank, locked=protected, **(entry or {"side": "none"}))
