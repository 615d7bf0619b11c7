"""Every place where PEFT or transformers asks for the type LORA and offers no way to add another.

Each patch names the line that it answers and wraps the function around it; nothing is copied. It is applied only while
that line stands in the installed version: a version that has changed it is left alone.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import peft
from peft import LoraModel, PeftType
from peft.tuners.lora import LoraLayer

from ..errors import ConfigError
from .config import BESIDE, SUBSPACE_FOLDER, SaeSubspaceConfig
from .factors import protected_factors, protecting_afterwards, refuse_protected
from .model import SaeMixedModel, SaeSubspaceModel, without_basis
from .registration import missing_guards, viewed_as_lora

logger = logging.getLogger(__name__)

Function = Callable[..., Any]


@dataclass(frozen=True)
class Patch:
    """One wrapped function.

    Attributes:
        module: where it is looked up.
        name: its name there, with its class if it has one.
        line: the line that is answered.
        wrap: takes the function and returns the one to put in its place.
        guards: protected features could be used if it were missing.
    """

    module: str
    name: str
    line: str
    wrap: Callable[[Function], Function]
    guards: bool = False


def _as_lora(original: Function) -> Function:
    """For functions that do their work for the type LORA only and have the configuration as an argument."""

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        ours = [value for value in (*args, *kwargs.values()) if isinstance(value, SaeSubspaceConfig)]
        with viewed_as_lora(*ours):
            return original(*args, **kwargs)

    return wrapper


def _beside_lora(original: Function) -> Function:
    """LORA and SAE_SUBSPACE adapters live in one model; the tuner becomes the one that knows both."""

    @functools.wraps(original)
    def add_adapter(self: Any, adapter_name: str, peft_config: Any, *args: Any, **kwargs: Any) -> Any:
        if {self.peft_type, peft_config.peft_type} != {PeftType.LORA, PeftType.SAE_SUBSPACE}:
            return original(self, adapter_name, peft_config, *args, **kwargs)
        own_type, tuner, own_class = self.peft_type, self.base_model, type(self.base_model)
        if own_class is LoraModel:
            tuner.__class__ = SaeSubspaceModel
        self.peft_type = peft_config.peft_type
        try:
            return original(self, adapter_name, peft_config, *args, **kwargs)
        except BaseException:
            tuner.__class__ = own_class
            raise
        finally:
            self.peft_type = own_type

    return add_adapter


def _reduce_intruders(original: Function) -> Function:
    """The reduced adapter is computed from the old one, so it has no basis, and keeps within none."""

    @functools.wraps(original)
    def reduce_intruder_dimension(peft_model: Any, old_adapter_name: str = "default", *args: Any, **kwargs: Any) -> Any:
        config = peft_model.peft_config.get(old_adapter_name)
        if not isinstance(config, SaeSubspaceConfig):
            return original(peft_model, old_adapter_name, *args, **kwargs)
        if any(protected_factors(peft_model, old_adapter_name)) or config.protects_something():
            raise ConfigError(
                f"Reducing the intruder dimensions of {old_adapter_name!r} would subtract parts of the base weights, "
                "which read and write its protected features. Use an adapter without protected features."
            )
        own_type = peft_model.peft_type
        peft_model.peft_type = PeftType.LORA
        peft_model.peft_config[old_adapter_name] = without_basis(config)
        try:
            return original(peft_model, old_adapter_name, *args, **kwargs)
        finally:
            peft_model.peft_config[old_adapter_name] = config
            peft_model.peft_type = own_type

    return reduce_intruder_dimension


def _check_swap(original: Function) -> Function:
    """Weights that would not be frozen or protected alike are refused."""

    @functools.wraps(original)
    def check_hotswap_configs_compatible(config0: Any, config1: Any) -> None:
        original(config0, config1)
        if isinstance(config0, SaeSubspaceConfig) and isinstance(config1, SaeSubspaceConfig):
            config0.check_swap(config1)

    return check_hotswap_configs_compatible


def _hotswap(original: Function) -> Function:
    """Hot swapping writes through `weight`, which for a protected factor is not the parameter.

    What is recorded of an adapter's basis is afterwards that of the weights which were swapped in.
    """

    @functools.wraps(original)
    def hotswap_adapter_from_state_dict(*args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(original).bind(*args, **kwargs).arguments
        model, adapter_name, config = given["model"], given["adapter_name"], given.get("config")
        refuse_protected(model, adapter_name)
        result = original(*args, **kwargs)
        own = getattr(model, "peft_config", {}).get(adapter_name)
        if isinstance(own, SaeSubspaceConfig):
            own.adopt_basis(config if isinstance(config, SaeSubspaceConfig) else None)
        return result

    return hotswap_adapter_from_state_dict


def _pad(original: Function) -> Function:
    """Padding for compiled hot swapping replaces the factors by larger ones, which would protect nothing."""

    @functools.wraps(original)
    def _pad_lora_weights(model: Any, *args: Any, **kwargs: Any) -> Any:
        refuse_protected(model, None)
        return original(model, *args, **kwargs)

    return _pad_lora_weights


def _load_in_transformers(original: Function) -> Function:
    """Hot swapping, which asks for the type LORA; and a frozen basis stays frozen."""

    @functools.wraps(original)
    def load_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(original).bind(self, *args, **kwargs).arguments
        loaded = self.peft_config if getattr(self, "_hf_peft_config_loaded", False) else {}
        name, hotswap = given.get("adapter_name") or "default", given.get("hotswap", "auto")
        if hotswap == "auto":
            hotswap = getattr(self, "_hotswap_enabled", False) and name in loaded
        if not hotswap:
            with protecting_afterwards():
                report = original(self, *args, **kwargs)
            _freeze_again(self)
            return report
        refuse_protected(self, name)
        own, other = loaded.get(name), given.get("peft_config")
        if isinstance(own, SaeSubspaceConfig) and other is None and given.get("peft_model_id") is not None:
            other = peft.PeftConfig.from_pretrained(given["peft_model_id"], **(given.get("adapter_kwargs") or {}))
        if isinstance(own, SaeSubspaceConfig) and isinstance(other, SaeSubspaceConfig):
            own.check_swap(other)
        with viewed_as_lora(*loaded.values()):
            report = original(self, *args, **kwargs)
        if isinstance(own, SaeSubspaceConfig):
            own.adopt_basis(other if isinstance(other, SaeSubspaceConfig) else None)
        _freeze_again(self)
        return report

    return load_adapter


def _freeze_again(model: Any) -> None:
    """Loading puts new parameters into the layers, which are trainable whatever the layers declare as frozen."""
    ours = [name for name, config in getattr(model, "peft_config", {}).items() if isinstance(config, SaeSubspaceConfig)]
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module._freeze_non_trainable_peft_weights(ours)


def _find_subspace_beside(original: Function) -> Function:
    """`PeftConfig.from_pretrained` builds our class without telling it the folder that it read."""

    @functools.wraps(original)
    def from_pretrained(cls: type, *args: Any, **kwargs: Any) -> Any:
        config = original(cls, *args, **kwargs)
        if isinstance(config, SaeSubspaceConfig) and config.subspace == BESIDE:
            given = inspect.signature(original).bind(cls, *args, **kwargs).arguments
            path, subfolder = given["pretrained_model_name_or_path"], given.get("subfolder")
            beside = Path(path, subfolder or "", SUBSPACE_FOLDER)
            if beside.is_dir():
                config.subspace = str(beside)
        return config

    return from_pretrained


def _tag_model_card(original: Function) -> Function:
    @functools.wraps(original)
    def tags(self: Any) -> list[str]:
        found: list[str] = original(self)
        if self.active_peft_config.peft_type == PeftType.SAE_SUBSPACE:
            found += ["peft_sae", "sae-subspace"]
        return found

    return tags


PATCHES = (
    Patch(
        "peft.utils.transformers_weight_conversion",
        "convert_peft_config_for_transformers",
        "if peft_config.peft_type != PeftType.LORA:",
        _as_lora,
    ),
    Patch(
        "peft.utils.transformers_weight_conversion",
        "convert_peft_adapter_state_dict_for_transformers",
        "if peft_config.peft_type != PeftType.LORA:",
        _as_lora,
    ),
    Patch("peft.peft_model", "PeftModel.add_adapter", "if peft_config.peft_type != self.peft_type:", _beside_lora),
    Patch(
        "peft.tuners.lora.intruders",
        "reduce_intruder_dimension",
        'if peft_model.peft_type != "LORA":',
        _reduce_intruders,
        guards=True,
    ),
    Patch("peft.peft_model", "PeftModel._get_peft_specific_model_tags", 'if peft_method == "LORA":', _tag_model_card),
    Patch(
        "peft.utils.hotswap",
        "check_hotswap_configs_compatible",
        "if config0.peft_type not in CONFIG_KEYS_TO_CHECK:",
        _check_swap,
        guards=True,
    ),
    Patch(
        "peft.utils.hotswap",
        "hotswap_adapter_from_state_dict",
        "old_val.data.copy_(new_val.data)",
        _hotswap,
        guards=True,
    ),
    Patch(
        "peft.utils.hotswap",
        "_pad_lora_weights",
        "def _pad_lora_weights(model: torch.nn.Module, target_rank: int) -> bool:",
        _pad,
        guards=True,
    ),
    Patch(
        "peft.config",
        "PeftConfigMixin.from_pretrained",
        "return cls.from_peft_type(**kwargs)",
        _find_subspace_beside,
    ),
    Patch(
        "transformers.integrations.peft",
        "PeftAdapterMixin.load_adapter",
        "if any(conf.peft_type != PeftType.LORA for conf in self.peft_config.values()):",
        _load_in_transformers,
        guards=True,
    ),
)


def apply_patches() -> list[Patch]:
    """Apply the patches, and return those whose line is not there any more, after telling so."""
    missing = [patch for patch in PATCHES if not _apply(patch)]
    for patch in missing:
        logger.warning(
            "%s.%s has changed (no line %r), so what peft_sae adds there is missing. Upgrade peft_sae.",
            patch.module,
            patch.name,
            patch.line,
        )
    missing_guards[:] = [f"{patch.module}.{patch.name}" for patch in missing if patch.guards]
    _enter_tables()
    return missing


def _apply(patch: Patch) -> bool:
    holder: Any = import_module(patch.module)
    *owner, name = patch.name.split(".")
    for part in owner:
        holder = getattr(holder, part, None)
    found = vars(holder).get(name) if holder is not None else None
    function = found.__func__ if isinstance(found, classmethod) else found
    # A package that is imported anew wraps the function itself, not its own earlier wrapper (but another package's).
    if getattr(function, "__peft_sae_wrapper__", None) is function:
        function = getattr(function, "__peft_sae_original__", None)
    try:
        if function is None or patch.line not in inspect.getsource(function):
            return False
    except (OSError, TypeError):  # there is no source to look at
        return False
    wrapped: Any = patch.wrap(function)
    wrapped.__peft_sae_original__ = function
    wrapped.__peft_sae_wrapper__ = wrapped
    wrapped = classmethod(wrapped) if isinstance(found, classmethod) else wrapped
    setattr(holder, name, wrapped)
    for other in _other_names(patch, found):
        setattr(other, name, wrapped)
    return True


def _other_names(patch: Patch, found: Any) -> list[Any]:
    """Modules of PEFT that have imported a function under the same name."""
    if "." in patch.name:
        return []
    modules = (peft, peft.tuners, peft.tuners.lora, peft.utils)
    return [module for module in modules if vars(module).get(patch.name) is found]


def _enter_tables() -> None:
    """Add the type to tables that PEFT keeps as module constants."""
    mixed: Any = import_module("peft.tuners.mixed")
    mixed_model: Any = import_module("peft.mixed_model")
    keys = import_module("peft.utils.hotswap").CONFIG_KEYS_TO_CHECK
    keys[PeftType.SAE_SUBSPACE] = list(keys[PeftType.LORA])
    if PeftType.SAE_SUBSPACE not in mixed.COMPATIBLE_TUNER_TYPES:
        mixed.COMPATIBLE_TUNER_TYPES = (*mixed.COMPATIBLE_TUNER_TYPES, PeftType.SAE_SUBSPACE)
    # The mixed model would take the configuration for a LoraConfig and leave out the basis.
    mixed_model.MixedModel = SaeMixedModel
