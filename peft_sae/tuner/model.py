"""The tuner: LoRA whose factors start from, or stay in, a basis of SAE features."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from peft import LoraModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers
from torch import nn

from ..errors import ConfigError
from .config import NO_BASIS, SaeSubspaceConfig
from .module_plan import ModulePlan
from .plan import InjectionPlan, describe_model, make_plan
from .resolve import resolve_subspace


class SaeSubspaceModel(LoraModel):
    """LoRA in a subspace of SAE features (SAILS, arXiv 2512.23260).

    The update of a module is dW = s B A as in LoRA, with A [r, in] and B [out, r]. Where the module reads the
    residual stream the rows of A are the basis and B starts at zero; where it writes, the columns of B are
    the basis and A starts at zero. So the adapted model equals the base model at step 0. Everything after
    injection is LoRA's own code on LoRA's own layers.

    Args:
        model: the model to adapt; changed in place, its weights never.
        config: a `SaeSubspaceConfig`.
        adapter_name: name of the adapter.
        low_cpu_mem_usage: create the adapter on the meta device, for weights that are loaded afterwards.

    Raises:
        ConfigError, MismatchError, ArtifactError: the configuration and the model do not fit; the model is then as
        before.
    """

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Plan every module's basis, then inject as LoRA does and put the bases in place."""
        config = self.peft_config[adapter_name]
        if not isinstance(config, SaeSubspaceConfig):
            raise ConfigError(
                f"The configuration of {adapter_name!r} is a {type(config).__module__}.{type(config).__name__}, made "
                "by another package or before peft_sae was imported anew. Make it again with SaeSubspaceConfig."
            )
        before = dict(config.__dict__)
        subspace = resolve_subspace(config)
        if subspace is not None:
            config.forget_automatic_ranks()
        try:
            plan = make_plan(config, model, self._find_targets(config, model), subspace)
            self._adopt_plan(config, plan)
            self._plans: dict[str, dict[str, ModulePlan]] = {**getattr(self, "_plans", {}), adapter_name: plan.modules}
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except Exception:
            config.__dict__.clear()
            config.__dict__.update(before)
            getattr(self, "_plans", {}).pop(adapter_name, None)
            raise

    def _find_targets(self, config: SaeSubspaceConfig, model: nn.Module) -> list[str]:
        """Names of the modules that injection will match, found without changing the configuration."""
        probe = copy.copy(config)
        probe = self._prepare_adapter_config(probe, self.get_model_config(model))
        probe = _maybe_include_all_linear_layers(probe, model)
        self._check_parameters(config)
        inside: tuple[str, ...] = ()
        targets = []
        for name, module in model.named_modules():
            if not name or name.startswith(inside):
                continue
            if isinstance(module, BaseTunerLayer):
                inside = (*inside, f"{name}.")
            if self._check_target_module_exists(probe, name):
                targets.append(name)
        return targets

    @staticmethod
    def _check_parameters(config: SaeSubspaceConfig) -> None:
        if config.target_parameters and (config.freeze_basis or config.r == "auto"):
            wish = "freeze_basis=True" if config.freeze_basis else "r='auto'"
            raise ConfigError(
                f"{wish} needs a basis, and target_parameters={config.target_parameters} get none: they are adapted "
                "as plain LoRA. Use a number for r and freeze_basis=False, or target modules only."
            )

    @staticmethod
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
        super()._create_and_replace(lora_config, adapter_name, target, target_name, parent, current_key, **kwargs)
        plan = getattr(self, "_plans", {}).get(adapter_name, {}).get(current_key)
        layer = getattr(parent, target_name)
        if plan is None or not isinstance(layer, LoraLayer) or adapter_name not in layer.lora_A:
            return
        write_basis(layer, adapter_name, plan, neutral=bool(lora_config.init_lora_weights))
        freeze_basis(layer, adapter_name, plan.side if lora_config.freeze_basis else "none")

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

    def add_weighted_adapter(self, adapters: list[str], weights: list[float], adapter_name: str, **kwargs: Any) -> None:
        """Combine adapters as LoRA does. The result has no basis of its own, and nothing in it is frozen.

        PEFT copies the first adapter's configuration for it, which would claim that adapter's basis.
        """
        first = self.peft_config[adapters[0]] if adapters and adapters[0] in self.peft_config else None
        known = adapter_name in self.peft_config
        if isinstance(first, SaeSubspaceConfig):
            self.peft_config[adapters[0]] = replace(
                first,
                subspace=None,
                freeze_basis=False,
                layer_map="nearest",
                sides=None,
                basis_record=copy.deepcopy(NO_BASIS),
            )
        try:
            super().add_weighted_adapter(adapters, weights, adapter_name, **kwargs)
        except Exception:
            if not known:
                self.peft_config.pop(adapter_name, None)
            raise
        finally:
            if first is not None:
                self.peft_config[adapters[0]] = first


def holds_basis(layer: LoraLayer, adapter_name: str, plan: ModulePlan) -> bool:
    """Return whether a layer's factor is the planned basis, up to the factor's precision."""
    if plan.rows is None:
        return False
    factor = (layer.lora_A if plan.side == "read" else layer.lora_B)[adapter_name].weight
    rows = plan.rows if plan.side == "read" else plan.rows.T
    return not factor.is_meta and torch.equal(factor.detach().cpu(), rows.to(factor.dtype))


@torch.no_grad()
def write_basis(layer: LoraLayer, adapter_name: str, plan: ModulePlan, *, neutral: bool) -> None:
    """Initialise a layer's factors: the basis on the module's side, zero on the other.

    Args:
        layer: LoRA's layer.
        adapter_name: the adapter.
        plan: the module's plan. Without rows, and on the meta device, nothing is written.
        neutral: zero the other factor. Otherwise it stays as LoRA has made it, which with
            `init_lora_weights=False` is at random.
    """
    factor_a, factor_b = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
    if plan.rows is None or factor_a.is_meta:
        return
    basis, other = (factor_a, factor_b) if plan.side == "read" else (factor_b, factor_a)
    basis.copy_(plan.rows if plan.side == "read" else plan.rows.T)
    if neutral and plan.side == "write":  # LoRA itself has zeroed its B
        other.zero_()


def freeze_basis(layer: LoraLayer, adapter_name: str, side: str) -> None:
    """Declare the factor that holds the basis as frozen, by PEFT's own mechanism.

    `BaseTunerLayer.frozen_peft_weight_names` makes PEFT keep the factor frozen whenever it switches adapters on.

    Args:
        layer: LoRA's layer.
        adapter_name: the adapter.
        side: `read`, `write`, or `none` to freeze nothing (also what an earlier adapter of that name froze).
    """
    names = {name: frozen for name, frozen in layer.frozen_peft_weight_names.items() if name != adapter_name}
    if side != "none":
        names[adapter_name] = ("lora_A",) if side == "read" else ("lora_B",)
    layer.frozen_peft_weight_names = names
    layer._freeze_non_trainable_peft_weights(adapter_name)
