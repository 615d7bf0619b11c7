"""What injection records of an adapter's basis in its configuration."""

from __future__ import annotations

from typing import Any

from ..errors import ConfigError

SIDES = ("read", "write", "none")

# The record of an adapter that has no basis.
NO_BASIS: dict[str, Any] = {"digest": None, "model": {}, "automatic_r": None, "modules": {}}

# What is recorded of each module, with its type.
RECORD_ENTRIES: dict[str, Any] = {
    "side": str,
    "hook_name": (str, type(None)),
    "basis": int,
    "filled": int,
    "dropped": int,
    "protected_read": int,
    "protected_write": int,
}


def check_record(record: Any) -> None:
    """Refuse a record that injection did not write: it comes from a file, and decides what is frozen.

    Raises:
        ConfigError: it is another value than None or what injection writes.
    """
    if record is None:
        return
    try:
        known = set(record) == {"digest", "model", "automatic_r", "modules"}
        known = known and isinstance(record["digest"], (str, type(None))) and isinstance(record["model"], dict)
        known = known and isinstance(record["automatic_r"], (int, type(None)))
        for name, entry in record["modules"].items():
            known = known and isinstance(name, str) and set(entry) == set(RECORD_ENTRIES) and entry["side"] in SIDES
            known = known and all(isinstance(entry[key], kind) for key, kind in RECORD_ENTRIES.items())
            known = known and all(entry[key] >= 0 for key, kind in RECORD_ENTRIES.items() if kind is int)
    except (TypeError, KeyError, AttributeError):
        known = False
    if not known:
        raise ConfigError(
            "basis_record is not what injection writes, so the modules' sides are unknown. Restore the adapter's "
            "configuration, or set basis_record=None to start a new adapter."
        )
