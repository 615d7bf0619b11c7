"""Types of a configuration's fields, which a file can hold in any other way."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

from ..errors import ConfigError
from ..reading import MEGATRON

_NAMES = ("target_modules", "exclude_modules")


def check_lora_types(config: Any) -> None:
    """Check the types of flags, names and numbers, which LoRA takes as they come.

    Args:
        config: a `SaeSubspaceConfig`.

    Raises:
        ConfigError: a field is of a type that would mean something else later on, or nothing.
    """
    for entry in fields(config):
        value = getattr(config, entry.name)
        if entry.type in ("bool", bool) and not isinstance(value, bool):
            raise ConfigError(f"{entry.name}={value!r} is neither true nor false.")
    for name in _NAMES:
        value = getattr(config, name)
        if value is None or isinstance(value, str):
            continue
        if not isinstance(value, (set, list, tuple)) or not all(isinstance(one, str) for one in value):
            raise ConfigError(f"{name}={value!r} are no names of modules. Give a list of names, or a pattern.")
    alphas = config.alpha_pattern if isinstance(config.alpha_pattern, dict) else {"": None}
    for module, alpha in {"": config.lora_alpha, **alphas}.items():
        if not _is_number(alpha):
            what = f"alpha_pattern[{module!r}]" if module else "lora_alpha"
            raise ConfigError(f"{what}={alpha!r} is no finite number, so no update could be scaled by it.")
    if config.megatron_core not in (None, MEGATRON):  # PEFT imports whatever module is named there
        raise ConfigError(
            f"megatron_core={config.megatron_core!r} names a module to import, and no code is run for a file's sake. "
            f"Use {MEGATRON!r}, or None."
        )
    if not _is_number(config.lora_dropout) or not 0 <= config.lora_dropout <= 1:
        raise ConfigError(f"lora_dropout={config.lora_dropout!r} is no probability. Use a number from 0 to 1.")


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer of hundreds of digits
        return False
