"""Fields of a job from a YAML file, checked before anything is loaded."""

from __future__ import annotations

import re
import reprlib
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from ..errors import ConfigError, suggest

_WORDS = (
    *((Mapping, "a mapping"), (Enum, "text"), (str, "text"), (Sequence, "a list")),
    *((bool, "true or false"), (int, "a whole number"), (float, "a number")),
)
_DEEPEST = 100  # brackets
_MOST_VALUES = 100_000  # of a file; names for parts of it (YAML's aliases) can make a short one endless


def read_fields(kind: type[Any], path: str | Path | None, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a dataclass' fields from a YAML file, in which other values take the place of some.

    Args:
        kind: the dataclass.
        path: the YAML file; None for no file. Relative paths in it are relative to the working directory.
        overrides: values that take the place of the file's; those that are None, and empty lists, do not.

    Raises:
        ConfigError: the file cannot be read, a key is unknown or missing, or a value has the wrong type.
    """
    data = read_values(path, overrides)
    raise_all(field_problems(kind, data, path), path)
    return data


def read_values(path: str | Path | None, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a YAML file, in which others take the place of some, unchecked.

    Raises:
        ConfigError: the file cannot be read.
    """
    data = {} if path is None else _read_yaml(path)
    data.update({name: value for name, value in overrides.items() if value is not None and value != []})
    return {key: _number(value) for key, value in data.items()}


def field_problems(kind: type[Any], data: Mapping[Any, Any], path: str | Path | None, prefix: str = "") -> list[str]:
    """Say of every wrong key and value what is wrong with it.

    Args:
        kind: the dataclass whose fields are wanted.
        data: the values.
        path: the file that they come from; None for the command line.
        prefix: of their names in the file, for values of a section.
    """
    place = "the command" if path is None else f"'{path}'"
    start = place[0].upper() + place[1:]
    known = {entry.name: entry for entry in fields(kind)}
    problems = []
    for key in data:
        if key not in known:
            hint = suggest(str(key), known) or f" Known keys: {sorted(known)}."
            shown = f"{prefix}{key}"
            problems.append(f"{start} has the unknown key {shown!r}, which would have no effect.{hint}")
    missing = [
        f"{prefix}{name}"
        for name, entry in known.items()
        if entry.default is MISSING and entry.default_factory is MISSING and data.get(name) is None
    ]
    if missing:
        remedy = "Give a file that has them with --config" if path is None else "Add them"
        problems.append(f"{start} lacks the keys {missing}. {remedy}, or give them on the command line.")
    return problems + type_problems(
        kind, {key: data[key] for key in data if f"{prefix}{key}" not in missing}, path, prefix
    )


def type_problems(kind: type[Any], data: Mapping[Any, Any], path: str | Path | None, prefix: str = "") -> list[str]:
    """Say of every value whose type is not that of its field what is needed; unknown keys are passed over.

    Args:
        kind: the dataclass whose fields are wanted.
        data: the values.
        path: the file that they come from; None for the command line.
        prefix: of their names in the file, for values of a section.
    """
    place, hints, problems = "the command" if path is None else f"'{path}'", typing.get_type_hints(kind), []
    for key, value in data.items():
        if key in hints and not _fits(value, hints[key]):
            problems.append(
                f"Key '{prefix}{key}' in {place} is {reprlib.repr(value)}, and {_wanted(hints[key])} is needed. See "
                "configs/ for an example."
            )
    return problems


def raise_all(problems: Sequence[str], path: str | Path | None) -> None:
    """Raise one error that says everything that is wrong, if anything is.

    Raises:
        ConfigError: there is a problem.
    """
    if len(problems) == 1:
        raise ConfigError(problems[0])
    if problems:
        place = "The command" if path is None else f"'{path}'"
        raise ConfigError("\n- ".join([f"{place} has {len(problems)} mistakes:", *problems]))


def _read_yaml(path: str | Path) -> dict[str, Any]:
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
        if _depth(text) > _DEEPEST:  # which the parser would walk through again and again
            raise ValueError(f"it is nested more than {_DEEPEST} deep")
        data = yaml.safe_load(text)
        _check_size(data)
    except OSError as error:
        raise ConfigError(f"'{path}' cannot be opened ({error.strerror}). Give the path of a YAML file.") from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"'{path}' cannot be read as YAML ({error}). Give the path of a YAML file.") from error
    if not isinstance(data, dict):
        raise ConfigError(f"'{path}' holds a {type(data).__name__}, and a mapping of keys is needed. See configs/.")
    return data


def _depth(text: str) -> int:
    depth = deepest = 0
    for character in text:
        depth += (character in "[{") - (character in "]}")
        deepest = max(deepest, depth)
    return deepest


def _check_size(data: Any) -> None:
    """Refuse what no job needs, before anything walks through it."""
    left, found = [data], 0
    while left:
        value = left.pop()
        found += 1
        if found > _MOST_VALUES:
            raise ValueError(f"it has more than {_MOST_VALUES:,} values, counting each alias in full")
        left += value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple, set)) else ()


def _wanted(hint: Any) -> str:
    """What an annotated type means to the writer of a file."""
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    words = []
    for option in options:
        if get_origin(option) is Literal:
            words += [repr(value) for value in get_args(option)]
        elif option is type(None):
            words.append("nothing")
        else:
            origin = get_origin(option) or option
            words.append(next((word for one, word in _WORDS if issubclass(origin, one)), origin.__name__))
    return " or ".join(dict.fromkeys(words))


def _number(value: Any) -> Any:
    """A number that YAML 1.1 takes for text, since it wants a point in `2e-4`; in mappings too."""
    if isinstance(value, Mapping):
        return {key: _number(entry) for key, entry in value.items()}
    return float(value) if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value) else value


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotated type."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is Literal:
        return value in inner
    if origin is not None and issubclass(origin, Mapping):
        return isinstance(value, Mapping)
    if origin is not None and issubclass(origin, Sequence):
        return isinstance(value, (list, tuple)) and all(_fits(one, inner[0]) for one in value)
    if isinstance(value, bool):
        return hint is bool
    if isinstance(hint, type) and issubclass(hint, Enum):
        return isinstance(value, (str, hint))
    return isinstance(value, (int, float) if hint is float else hint)
