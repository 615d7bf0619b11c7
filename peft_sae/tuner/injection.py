"""Injecting as LoRA does, with a basis planned for every module beforehand."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils import transformers_weight_conversion
from torch import nn

from ..errors import ConfigError, suggest
from .basis_record import NO_BASIS
from .config import SaeSubspaceConfig
from .factors import freeze_factors, holds_basis, protect_factors, write_basis
from .forward import use_fused_forward
from .module_plan import ModulePlan
from .plan import InjectionPlan, describe_model, make_plan
from .registration import NAME
from .resolve import resolve_subspace

if TYPE_CHECKING:
    from peft.tuners.tuners_utils import BaseTuner as _Tuner
else:
    _Tuner = object


logger = logging.getLogger(__name__)


class SubspaceInjection(_Tuner):
    """What a PEFT tuner needs to inject `SaeSubspaceConfig` beside the configurations it knows.

    It is mixed into `LoraModel` and into PEFT's mixed model. Every other configuration passes through untouched.
    """

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Plan every module's basis, then inject as LoRA does and put the bases in place."""
        config = self.peft_config[adapter_name]
        if not isinstance(config, SaeSubspaceConfig):
            _check_import(config, adapter_name)
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            return
        if config.protects_something() and config.protect is False:
            raise ConfigError(
                "The configuration belongs to an adapter that protects features, and protect=False would let it use "
                "them. Set protect=True, or basis_record=None to start a new adapter."
            )
        before = dict(config.__dict__)
        subspace = resolve_subspace(config)
        if subspace is not None:
            config.forget_automatic_ranks()
        try:
            # PEFT does this first too: in transformers 5 the experts of a mixture are parameters, not modules.
            if hasattr(getattr(model, "config", None), "model_type"):
                transformers_weight_conversion.convert_peft_config_for_transformers(config, model, None)
            targets = self._find_targets(config, model, kwargs.get("state_dict"))
            _tell_unmatched(config, model)
            plan = make_plan(config, model, targets, subspace)
            _adopt_plan(config, plan)
            self._plans: dict[str, dict[str, ModulePlan]] = {**getattr(self, "_plans", {}), adapter_name: plan.modules}
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except BaseException:
            config.__dict__.clear()
            config.__dict__.update(before)
            getattr(self, "_plans", {}).pop(adapter_name, None)
            raise

    def _find_targets(
        self, config: SaeSubspaceConfig, model: nn.Module, state_dict: Iterable[str] | None = None
    ) -> list[str]:
        """Names of the modules that injection will match, found without changing the configuration.

        The rules are those of `BaseTuner.inject_adapter`; `_create_and_replace` refuses what was not found here.
        """
        probe = copy.copy(config)
        probe.modules_to_save = copy.copy(config.modules_to_save)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # injection warns itself
            self._check_tied_modules(model, probe)
        probe = self._prepare_adapter_config(probe, self.get_model_config(model))
        probe = _maybe_include_all_linear_layers(probe, model)
        _check_parameters(config)
        named = None
        if state_dict is not None:
            named = {key.rsplit(f".{self.prefix}", 1)[0].removeprefix("_orig_mod.") for key in state_dict}
        inside: tuple[str, ...] = ()
        targets = []
        for name, module in model.named_modules():
            if not name or name.startswith(inside):
                continue
            if isinstance(module, BaseTunerLayer):
                inside = (*inside, f"{name}.")
            if self._check_tied_module_exists(probe, name):
                continue  # it shares the factors of the embedding
            if name in named if named is not None else self._check_target_module_exists(probe, name):
                targets.append(name)
        return targets

    def _create_and_replace(
        self,
        lora_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        """Create LoRA's layer and put the module's basis into it."""
        plan = None
        planned = isinstance(lora_config, SaeSubspaceConfig) and not kwargs.get("parameter_name")
        if planned and not self._check_tied_module_exists(lora_config, current_key):
            plans = getattr(self, "_plans", {}).get(adapter_name, {})
            if current_key not in plans:
                raise ConfigError(
                    f"PEFT matches {current_key!r}, for which no basis was planned: this version of PEFT selects "
                    "targets in another way. Upgrade peft_sae, or install an older peft."
                )
            plan = plans[current_key]
        super()._create_and_replace(lora_config, adapter_name, target, target_name, parent, current_key, **kwargs)
        layer = getattr(parent, target_name)
        if plan is None or not isinstance(layer, LoraLayer) or adapter_name not in layer.lora_A:
            return
        write_basis(layer, adapter_name, plan, neutral=bool(lora_config.init_lora_weights))
        protect_factors(layer, adapter_name, plan)
        freeze_factors(layer, adapter_name, plan.frozen(freeze_basis=lora_config.freeze_basis))
        use_fused_forward(layer, adapter_name)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Cast as PEFT does; a basis that had passed through a lower precision is written again exactly.

        Weights that were loaded in the meantime are not the basis any more, and stay.
        """
        fresh = {}
        for name, plan in getattr(self, "_plans", {}).pop(adapter_name, {}).items():
            layer = self.model.get_submodule(name)
            if isinstance(layer, LoraLayer) and adapter_name in layer.lora_A and holds_basis(layer, adapter_name, plan):
                fresh[layer] = plan
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype=autocast_adapter_dtype)
        for layer, plan in fresh.items():
            write_basis(layer, adapter_name, plan, neutral=False)


def _tell_unmatched(config: SaeSubspaceConfig, model: nn.Module) -> None:
    """PEFT passes over names of targets that no module has, unless none has any: a typo would leave modules out."""
    if not isinstance(config.target_modules, (list, set, tuple)):
        return
    names = [f".{name}" for name, _ in model.named_modules()]
    lost = [name for name in sorted(config.target_modules) if not any(one.endswith(f".{name}") for one in names)]
    if lost:
        last = {name.rpartition(".")[2] for name in names}
        hints = " ".join(suggest(name, last) for name in lost)
        logger.warning(
            "target_modules has %s, and the model no module of that name: nothing is adapted for it.%s", lost, hints
        )


def _check_import(config: Any, adapter_name: str) -> None:
    if config.peft_type == NAME:  # but not our class
        raise ConfigError(
            f"The configuration of {adapter_name!r} is a {type(config).__module__}.{type(config).__name__}, made "
            "by another package or before peft_sae was imported anew. Make it again with SaeSubspaceConfig."
        )


def _check_parameters(config: SaeSubspaceConfig) -> None:
    if config.target_parameters and (config.freeze_basis or config.r == "auto"):
        wish, remedy = ("freeze_basis=True", "freeze_basis=False") if config.freeze_basis else ("r='auto'", "a number")
        raise ConfigError(
            f"{wish} needs a basis, and target_parameters={sorted(config.target_parameters)} get none. (In "
            "transformers 5 the experts of a mixture are such parameters, also where 'all-linear' or their old names "
            f"ask for them.) Use {remedy}, or other target_modules, such as ['q_proj', 'k_proj', 'v_proj', 'o_proj']."
        )


def _adopt_plan(config: SaeSubspaceConfig, plan: InjectionPlan) -> None:
    """Write into the configuration what was decided, so that loading needs no Subspace."""
    ranks = {name: module.rank for name, module in plan.modules.items()}
    automatic = config.r == "auto"
    if automatic:
        config.r = max(ranks.values(), default=1)
        unequal = {name: rank for name, rank in ranks.items() if rank != config.r}
        config.rank_pattern = {**config.rank_pattern, **unequal}
    if config.layer_map == "exact" and plan.subspace is not None:
        config.target_modules = set(ranks)
    if plan.subspace is not None:
        modules = {name: module.to_record() for name, module in plan.modules.items()}
        model = describe_model(plan.subspace)
        config.basis_record = {
            "digest": plan.subspace.digest,
            "model": model,
            "automatic_r": config.r if automatic else None,
            "modules": modules,
        }
        config.remember_subspace(plan.subspace)
    elif config.basis_record is None:
        config.basis_record = copy.deepcopy(NO_BASIS)
