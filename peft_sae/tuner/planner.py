"""Finding the site and the basis of every target module."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..errors import ConfigError, MismatchError
from ..layout import ModuleRole
from ..subspace import Subspace, SubspaceSite
from .basis import fill_rows, orthonormal_rows, through_norm, without_part
from .config import SaeSubspaceConfig
from .module_plan import ModulePlan, asked_rank
from .norms import NormGains
from .protection import Protection
from .sites import Locator, width_of

logger = logging.getLogger(__name__)

# What LoRA adapts beside linear modules (`peft.tuners.lora.layer.dispatch_default`).
_PLAIN_TYPES = (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)


class Planner:
    """Finds sites and bases; what several modules share is computed once."""

    def __init__(self, config: SaeSubspaceConfig, model: nn.Module, subspace: Subspace) -> None:
        self._config = config
        self._model = model
        self._subspace = subspace
        self._locator = Locator(
            subspace.layout,
            int(subspace.model.get("num_hidden_layers", 0)),
            subspace.sites,
            model_type=str(getattr(getattr(model, "config", None), "model_type", type(model).__name__)),
            sides=config.sides,
            layer_map=config.layer_map,
        )
        self._norms = NormGains(model)
        self._protection = Protection(config, model, subspace, self._norms)
        self._rows: dict[tuple[str, str, str | None], torch.Tensor] = {}

    def plan(self, targets: Sequence[str]) -> dict[str, ModulePlan]:
        """Return the plan of every target module that is not left alone.

        Raises:
            ConfigError, MismatchError: a module can have no basis, or none of the size that is asked for.
        """
        self._check_sides(targets)
        plans, alone = {}, []
        for name in targets:
            plan = self._plan_module(name, self._model.get_submodule(name))
            if plan is None:
                alone.append(name)
            else:
                plans[name] = plan
        self._check_left_alone(plans, alone)
        self._tell_dropped(plans)
        return plans

    def _check_sides(self, targets: Sequence[str]) -> None:
        for key in self._config.sides or {}:
            if targets and not any(name == key or name.endswith(f".{key}") for name in targets):
                raise ConfigError(
                    f"sides names {key!r}, which is the end of no target's name, so it would have no effect. Targets "
                    f"end in {sorted({name.split('.')[-1] for name in targets})}."
                )

    @staticmethod
    def _tell_dropped(plans: Mapping[str, ModulePlan]) -> None:
        short = {name: plan for name, plan in plans.items() if plan.dropped}
        if short:
            plan = max(short.values(), key=lambda plan: plan.dropped)
            logger.warning(
                "r=%d keeps %d of the %d directions of the basis at %s (%d modules are cut like that); the least "
                "important are left out. Use r='auto' or a larger r to keep all.",
                plan.rank,
                plan.basis,
                plan.basis + plan.dropped,
                plan.hook_name,
                len(short),
            )

    def _check_left_alone(self, plans: Mapping[str, ModulePlan], alone: list[str]) -> None:
        if not alone:
            return
        sites = [site.sae.hook_name for site in self._subspace.sites]
        if not plans or self._config.layers_to_transform is not None:
            raise MismatchError(
                f"layer_map='exact', and the target {alone[0]!r} touches none of the Subspace's sites {sites} within "
                "its block. What a block leaves in resid_post is read by the next block, and written by its own. Use "
                "layer_map='nearest', or target blocks that touch a site."
            )
        logger.info("layer_map='exact' leaves %d modules alone that touch no site (%s ...).", len(alone), alone[0])

    def _plan_module(self, name: str, module: nn.Module) -> ModulePlan | None:
        if isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
        place = self._locator.place(name)
        role, site = self._locator.find(name, module, place)
        if role is not None and site is None:
            return None
        unseen = self._protection.of_module(name, module, place)
        if role is None or site is None:
            return replace(self._plain(name, module), **unseen)
        norm_name = place.norm(role) if self._config.norm_gain else None
        width = width_of(module, role.side)
        if width is not None and width != site.sae.d_in:
            raise MismatchError(
                f"Target {name!r} is {width} wide on its {role.side} side, and the basis at {site.sae.hook_name} is "
                f"{site.sae.d_in} wide. Use a Subspace of this model, or set sides={{{name!r}: 'none'}}."
            )
        if _is_on_meta(module):  # nothing can be initialised there, so only the sizes matter
            return self._fit_rank(name, role, site, None)
        rows = self._module_rows(site, role, norm_name)
        avoided = unseen.get(f"unseen_{role.side}")
        if avoided is not None:
            found = rows.shape[0]
            rows = without_part(rows, avoided.double())
            if rows.shape[0] < found:
                logger.info("%s: %d of %d directions lie in what is protected.", name, found - rows.shape[0], found)
            if rows.shape[0] == 0:
                raise ConfigError(
                    f"All of the basis at {site.sae.hook_name} lies in what is protected at {name!r}, so nothing is "
                    "left to start from. Protect fewer features, or choose others."
                )
        return replace(self._fit_rank(name, role, site, rows, avoided), **unseen)

    def _plain(self, name: str, module: nn.Module) -> ModulePlan:
        """A module that no basis belongs to: plain LoRA."""
        if width_of(module, "read") is None and not isinstance(module, _PLAIN_TYPES):
            raise ConfigError(
                f"Target {name!r} is a {type(module).__name__}, which LoRA cannot adapt. Take it out of target_modules."
            )
        rank = asked_rank(self._config, name)
        if self._config.freeze_basis:
            raise ConfigError(
                f"Target {name!r} ({type(module).__name__}) has no basis that freeze_basis=True could freeze. Exclude "
                "it with exclude_modules, or use freeze_basis=False."
            )
        if rank is None:
            raise ConfigError(
                f"Target {name!r} ({type(module).__name__}) has no basis, so r='auto' gives it no rank. Give it one in "
                "rank_pattern, or set r to a number."
            )
        return ModulePlan(side="none", rank=rank)

    def _module_rows(self, site: SubspaceSite, role: ModuleRole, norm_name: str | None) -> torch.Tensor:
        key = (site.sae.hook_name, role.side, norm_name)
        if key not in self._rows:
            gain = self._norms.get(norm_name, site.basis.shape[1])
            rows = orthonormal_rows(through_norm(site.basis, gain, role.side))
            if rows.shape[0] == 0:
                raise MismatchError(
                    f"Nothing of the basis at {site.sae.hook_name} passes the norm {norm_name!r}. Use norm_gain=False."
                )
            self._rows[key] = rows
        return self._rows[key]

    def _fit_rank(
        self,
        name: str,
        role: ModuleRole,
        site: SubspaceSite,
        rows: torch.Tensor | None,
        avoided: torch.Tensor | None = None,
    ) -> ModulePlan:
        asked = asked_rank(self._config, name)
        found, width = site.basis.shape if rows is None else rows.shape
        width -= 0 if avoided is None else avoided.shape[0]
        rank = found if asked is None else asked
        if rank > width:
            raise ConfigError(
                f"r={rank} exceeds the {width} dimensions that {name!r} {role.side}s"
                f"{'' if avoided is None else ' and that are not protected'}, so no basis has so many directions. Use "
                f"r='auto' or r <= {width}."
            )
        self._check_bias(name, role.side)
        missing = max(0, rank - found)
        if missing:
            self._check_fill(name, rank, found)
        if missing and rows is not None:
            rows = torch.cat([rows, self._fill(name, rows, missing, avoided)])
        return ModulePlan(
            side=role.side,
            rank=rank,
            hook_name=site.sae.hook_name,
            basis=min(rank, found),
            filled=missing,
            dropped=max(0, found - rank),
            rows=None if rows is None else rows[:rank].float(),
        )

    def _check_bias(self, name: str, side: str) -> None:
        if self._config.freeze_basis and self._config.lora_bias and side == "write":
            raise ConfigError(
                f"lora_bias=True adds a trained bias to what {name!r} writes, outside the span of the basis that "
                "freeze_basis=True is to keep to. Use one of the two."
            )

    def _check_fill(self, name: str, rank: int, found: int) -> None:
        if self._config.fill == "zeros" or (self._config.fill == "orthogonal" and not self._config.freeze_basis):
            return
        reason = "fill='error' forbids to make up the others"
        if self._config.freeze_basis:
            reason = (
                "with freeze_basis=True the others would be frozen arbitrary directions, outside the features' span"
            )
        raise ConfigError(
            f"r={rank} exceeds the {found} directions of the basis of {name!r}, and {reason}. Use r='auto', r <= "
            f"{found}, fill='zeros', or a larger variance or top_k when building the Subspace."
        )

    def _fill(self, name: str, rows: torch.Tensor, missing: int, avoided: torch.Tensor | None) -> torch.Tensor:
        if self._config.fill == "zeros":
            return rows.new_zeros(missing, rows.shape[1])
        taken = rows if avoided is None else torch.cat([rows, avoided.double()])
        return fill_rows(taken, missing, seed=f"{self._subspace.digest}/{name}")


def _is_on_meta(module: nn.Module) -> bool:
    parameter = next(module.parameters(), None)
    return parameter is not None and parameter.is_meta
