"""Adding `SAE_SUBSPACE` to PEFT: everything that reaches into PEFT's own tables is here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import peft
from packaging.version import Version
from peft import PeftType
from peft.tuners import tuners_utils
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import hotswap

from ..errors import UnsupportedPeftError

MINIMUM_PEFT = "0.21.0"
NAME = "SAE_SUBSPACE"

# Functions of PEFT that could not be kept from going around a protection, because this version has changed them.
missing_guards: list[str] = []


def check_peft() -> None:
    """Raise an error if the installed PEFT cannot carry the tuner.

    Raises:
        UnsupportedPeftError: PEFT is too old, or a newer one has lost a mechanism that is needed.
    """
    from importlib.metadata import version

    ours = version("peft-sae")
    if Version(peft.__version__) < Version(MINIMUM_PEFT):
        raise UnsupportedPeftError(
            f"peft_sae {ours} needs peft {MINIMUM_PEFT} or newer, and peft {peft.__version__} is installed, so "
            "SAE_SUBSPACE cannot be registered. Upgrade with `pip install -U peft`."
        )
    needed = {
        "BaseTunerLayer.frozen_peft_weight_names": hasattr(BaseTunerLayer, "frozen_peft_weight_names"),
        "LoraModel._create_and_replace": hasattr(peft.LoraModel, "_create_and_replace"),
        "LoraModel._cast_adapter_dtype": hasattr(peft.LoraModel, "_cast_adapter_dtype"),
        "LoraModel._prepare_adapter_config": hasattr(peft.LoraModel, "_prepare_adapter_config"),
        "LoraModel._check_target_module_exists": hasattr(peft.LoraModel, "_check_target_module_exists"),
        "LoraModel.add_weighted_adapter": hasattr(peft.LoraModel, "add_weighted_adapter"),
        "LoraModel._get_adapter_state_dict": hasattr(peft.LoraModel, "_get_adapter_state_dict"),
        "LoraModel._remove_adapter_name_from_key": hasattr(peft.LoraModel, "_remove_adapter_name_from_key"),
        "LoraModel._convert_state_dict_for_initial_model": hasattr(
            peft.LoraModel, "_convert_state_dict_for_initial_model"
        ),
        "save_and_load._validate_lora_adapter_state_dict": hasattr(
            peft.utils.save_and_load, "_validate_lora_adapter_state_dict"
        ),
        "integrations.gather_params_ctx": hasattr(peft.utils.integrations, "gather_params_ctx"),
        "hotswap.CONFIG_KEYS_TO_CHECK": hasattr(hotswap, "CONFIG_KEYS_TO_CHECK"),
        "BaseTunerLayer._freeze_non_trainable_peft_weights": hasattr(
            BaseTunerLayer, "_freeze_non_trainable_peft_weights"
        ),
        "tuners_utils._maybe_include_all_linear_layers": hasattr(tuners_utils, "_maybe_include_all_linear_layers"),
        "peft.utils.other.get_pattern_key": hasattr(peft.utils.other, "get_pattern_key"),
        "peft.utils.register_peft_method": hasattr(peft.utils, "register_peft_method"),
    }
    missing = [name for name, there in needed.items() if not there]
    if missing:
        raise UnsupportedPeftError(
            f"peft {peft.__version__} lacks {missing}, on which peft_sae {ours} is built, so SAE_SUBSPACE cannot be "
            "registered. Upgrade peft_sae with `pip install -U peft-sae`, or install an older peft."
        )


def register_name() -> None:
    """Add the member `PeftType.SAE_SUBSPACE`. Calling it again changes nothing.

    Raises:
        UnsupportedPeftError: as `check_peft`.
    """
    check_peft()
    _add_enum_member()


def register_classes(config_cls: type, model_cls: type) -> None:
    """Map the type to its config and model classes, also when the package is imported anew.

    Raises:
        UnsupportedPeftError: another package has taken the name.
    """
    from peft.mapping import (
        PEFT_TYPE_TO_CONFIG_MAPPING,
        PEFT_TYPE_TO_PREFIX_MAPPING,
        PEFT_TYPE_TO_TUNER_MAPPING,
    )

    member = PeftType(NAME)
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(member)
    if known is not None and known.__module__ != config_cls.__module__:
        raise UnsupportedPeftError(
            f"PEFT already has a type {NAME}, of {known.__module__}. Only one package can provide it; uninstall one."
        )
    for mapping in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING):
        mapping.pop(member, None)
    peft.utils.register_peft_method(name=NAME.lower(), config_cls=config_cls, model_cls=model_cls, prefix="lora_")


@contextmanager
def viewed_as_lora(*configs: Any) -> Iterator[None]:
    """Give configurations the type LORA for the time of a call into code that does its work for no other."""
    ours = [config for config in configs if config.peft_type == PeftType(NAME)]
    for config in ours:
        config.peft_type = PeftType.LORA
    try:
        yield
    finally:
        for config in ours:
            config.peft_type = PeftType(NAME)


def _add_enum_member() -> None:
    """Give the closed enum `PeftType` one more member.

    `register_peft_method` (peft/utils/peft_types.py) refuses a name that is not in `list(PeftType)`, and PEFT has
    no call that adds one. What is set here is what the enum machinery itself keeps for a member.
    """
    if NAME in PeftType.__members__:
        return
    member = str.__new__(PeftType, NAME)
    member._name_ = NAME
    member._value_ = NAME
    member._sort_order_ = len(PeftType)
    member.__objclass__ = PeftType
    PeftType._member_names_.append(NAME)
    PeftType._member_map_[NAME] = member
    PeftType._value2member_map_[NAME] = member
    type.__setattr__(PeftType, NAME, member)
