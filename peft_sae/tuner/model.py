"""The tuner: LoRA whose factors start from, or stay in, a basis of SAE features."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from peft import LoraModel
from peft.tuners.mixed import MixedModel
from peft.utils import save_and_load
from torch import nn

from ..errors import ConfigError
from .basis_record import NO_BASIS
from .config import SaeSubspaceConfig
from .factors import ProtectedLinear, protected_factors
from .injection import SubspaceInjection
from .module_plan import ModulePlan
from .registration import viewed_as_lora


class SaeSubspaceModel(SubspaceInjection, LoraModel):
    """LoRA in a subspace of SAE features (SAILS, arXiv 2512.23260).

    The update of a module is dW = s B A as in LoRA, with A [r, in] and B [out, r]. Where the module reads the
    residual stream the rows of A are the basis and B starts at zero; where it writes, the columns of B are
    the basis and A starts at zero. So the adapted model equals the base model at step 0. Everything after
    injection is LoRA's own code on LoRA's own layers. Adapters of the type LORA can be added beside.

    Args:
        model: the model to adapt; changed in place, its weights never.
        config: a `SaeSubspaceConfig`.
        adapter_name: name of the adapter.
        low_cpu_mem_usage: create the adapter on the meta device, for weights that are loaded afterwards.

    Raises:
        ConfigError, MismatchError, ArtifactError: the configuration and the model do not fit; the model is then as
        before.
    """

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Combine adapters as LoRA does. The result has no basis of its own, and nothing in it is frozen.

        PEFT copies the first adapter's configuration for it, which would claim that adapter's basis. Directions that
        all of the adapters protect stay protected; where they protect different ones, a sum uses what only some of them
        keep away from, and that is refused.

        Raises:
            ConfigError: the adapters protect different directions, or one of them was loaded only to be run.
        """
        guards = _common_protection(self, adapters)
        first = self.peft_config[adapters[0]] if adapters and adapters[0] in self.peft_config else None
        known = adapter_name in self.peft_config
        if isinstance(first, SaeSubspaceConfig):
            self.peft_config[adapters[0]] = without_basis(first)
        try:
            super().add_weighted_adapter(adapters, weights, adapter_name, *args, **kwargs)
            if not known:
                _protect_again(self, adapter_name, guards)
        except BaseException:
            if not known:
                self.peft_config.pop(adapter_name, None)
            raise
        finally:
            if first is not None:
                self.peft_config[adapters[0]] = first

    def _check_merge_allowed(self) -> None:
        """Refuse to merge as protected what was unfrozen by hand, beside PEFT's own checks."""
        super()._check_merge_allowed()
        for adapter_name, config in self.peft_config.items():
            _check_still_protected(self, config, adapter_name)

    def _check_target_module_compatiblity(self, peft_config: Any, model: nn.Module, target_name: str) -> None:
        """Refuse what LoRA cannot adapt in state-space models, which PEFT tells by the type LORA."""
        with viewed_as_lora(peft_config):
            super()._check_target_module_compatiblity(peft_config, model, target_name)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        """Select the adapter's tensors; warn of factors that were not gathered, as PEFT does for the type LORA."""
        tensors: dict[str, torch.Tensor] = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        _check_still_protected(model, config, adapter_name)
        for name, factor in protected_factors(model, adapter_name):
            # What is written must be what takes effect, for whoever loads it without knowing of the protection.
            for key in (f"{name}.raw_weight", f"{name}.raw_bias"):
                if key in tensors and (key.endswith("weight") or factor.side == "write"):
                    tensors[key] = factor.effective(tensors[key])
        factors = {name: tensor for name, tensor in tensors.items() if not name.endswith("bias")}
        save_and_load._validate_lora_adapter_state_dict(factors, adapter_name=adapter_name)
        return tensors

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """Translate a model's key into the adapter's file; protected factors have LoRA's names there."""
        name: str = super()._remove_adapter_name_from_key(key, adapter_name)
        return re.sub(r"\.raw_(weight|bias)$", r".\1", name)

    @classmethod
    def _convert_state_dict_for_initial_model(
        cls, peft_model: Any, peft_config: Any, path: str, output_state_dict: dict[str, torch.Tensor], kwargs: Any
    ) -> Any:
        """Turn a PiSSA, OLoRA or CorDA adapter into plain LoRA.

        The initial adapter must be loaded with `init_lora_weights=True`. `PeftModel.save_pretrained` writes that for
        the type LORA, and `init_weights`, which LoRA does not have, for every other.
        """
        peft_config.init_lora_weights = True
        peft_config.save_pretrained(path)
        return super()._convert_state_dict_for_initial_model(peft_model, peft_config, path, output_state_dict, kwargs)


class SaeMixedModel(SubspaceInjection, MixedModel):
    """PEFT's mixed model, in which SAE_SUBSPACE adapters have their basis too."""

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Inject as usual; the mixed model casts no dtypes afterwards, so the plans have done their work."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        getattr(self, "_plans", {}).pop(adapter_name, None)


def _check_still_protected(model: nn.Module, config: Any, adapter_name: str) -> None:
    """Refuse to save or merge as protected what was loaded without its directions and then unfrozen by hand."""
    if not isinstance(config, SaeSubspaceConfig) or not config.protects_something():
        return
    trained = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and "lora_" in name and f".{adapter_name}." in name
    ]
    if trained and not any(protected_factors(model, adapter_name)):
        raise ConfigError(
            f"{trained[0]!r} was made trainable although the adapter protects features and was loaded only to be run, "
            "so it may use them now, and is neither saved nor merged as if it did not. Load it with "
            "is_trainable=True to train on."
        )


def without_basis(config: SaeSubspaceConfig) -> SaeSubspaceConfig:
    """Return a copy of a configuration for factors that are computed from others: no basis, nothing frozen."""
    return replace(
        config,
        subspace=None,
        freeze_basis=False,
        layer_map="nearest",
        sides=None,
        protect=False,
        basis_record=copy.deepcopy(NO_BASIS),
    )


def _common_protection(model: SaeSubspaceModel, adapters: list[str]) -> dict[str, ProtectedLinear]:
    """The protected factors of adapters, by their names without the adapter's, if they are the same in all."""
    found = [
        {name.removesuffix(f".{adapter}"): factor for name, factor in protected_factors(model, adapter)}
        for adapter in adapters
    ]
    for adapter, guards in zip(adapters, found, strict=True):
        config = model.peft_config.get(adapter)
        if isinstance(config, SaeSubspaceConfig) and config.protects_something() and not guards:
            raise ConfigError(
                f"The adapter {adapter!r} was loaded only to be run, without the directions that it protects, so a "
                "combination could not keep away from them. Load it with is_trainable=True."
            )
        if guards.keys() != found[0].keys() or not all(
            guard.protects_like(found[0][name]) for name, guard in guards.items()
        ):
            raise ConfigError(
                f"The adapters {adapters[0]!r} and {adapter!r} protect different features, so their combination would "
                "use what one of them keeps away from. Combine adapters with the same protection, or export them with "
                "export_lora and combine the plain LoRA adapters."
            )
    return found[0] if found else {}


def _protect_again(model: SaeSubspaceModel, adapter_name: str, guards: Mapping[str, ProtectedLinear]) -> None:
    """Protect the factors of a combination, and record it, so that it is not trained on without its protection."""
    if not guards:
        return
    config = model.peft_config[adapter_name]
    config.protect = True
    modules: dict[str, dict[str, Any]] = config.basis_record["modules"]
    for name, guard in guards.items():
        factors = model.get_submodule(name)
        factors[adapter_name] = guard.like(factors[adapter_name])
        target = name.removeprefix("model.").rpartition(".")[0]
        entry = modules.setdefault(target, ModulePlan(side="none", rank=guard.in_features).to_record())
        entry[f"protected_{guard.side}"] = guard.count
