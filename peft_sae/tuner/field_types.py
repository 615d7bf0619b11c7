"""What a configuration's fields may be called and hold; a file can have anything else."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import peft
from packaging.version import InvalidVersion, Version

from ..errors import ConfigError, suggest
from ..reading import MEGATRON

_TEXTS = ("base_model_name_or_path", "revision")
_NAMES = ("target_modules", "exclude_modules", "target_parameters", "modules_to_save")


def check_lora_types(config: Any) -> None:
    """Check the types of flags, names and numbers, which LoRA takes as they come.

    Args:
        config: a `LoraConfig`, ours included.

    Raises:
        ConfigError: a field is of a type that would mean something else later on, or nothing.
    """
    for entry in fields(config):
        value = getattr(config, entry.name)
        if entry.type in ("bool", bool) and not isinstance(value, bool):
            raise ConfigError(f"{entry.name}={value!r} is neither true nor false.")
    for name in _TEXTS:
        value = getattr(config, name)
        if not isinstance(value, (str, Path, type(None))):
            raise ConfigError(f"{name}={value!r} is no text. Give a path, an id, or None.")
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


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Refuse a field's value that is none of its choices.

    Raises:
        ConfigError: it is another one.
    """
    if value not in choices:
        raise ConfigError(f"{name}={value!r} is unknown. Choose one of {', '.join(map(repr, choices))}.")


def refuse_unknown_fields(init: Callable[..., None], known: list[str]) -> Callable[..., None]:
    """Wrap `__init__` so that a misspelt field is an error.

    PEFT drops unknown entries of a JSON file with a warning, for the sake of files from a newer PEFT. A user's
    own typo would change the training behind that warning; so only a newer PEFT's files keep that grace.
    """

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        unknown = sorted(set(kwargs) - set(known))
        if unknown and not _is_newer(kwargs.get("peft_version")):
            hint = suggest(unknown[0], known)
            raise ConfigError(
                f"SaeSubspaceConfig has no field {unknown[0]!r}, so its value would be lost.{hint} Remove or rename it."
            )
        init(self, *args, **kwargs)

    return checked


def _is_newer(peft_version: object) -> bool:
    try:
        return isinstance(peft_version, str) and Version(peft_version.split("@")[0]) > Version(peft.__version__)
    except InvalidVersion:
        return False


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer of hundreds of digits
        return False
