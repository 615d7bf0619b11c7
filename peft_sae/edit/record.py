"""What is written beside an edited adapter: what was done to it, and to what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..artifact import read_json
from ..errors import ArtifactError
from ..escape import in_markdown

EDIT_FILE = "edit.json"
SCHEMA = "peft_sae.edit"
SCHEMA_VERSION = 1
_SHOWN = 20  # features per edit in the model card


def edits_section(edits: Sequence[Mapping[str, Any]]) -> str:
    """Return Markdown for the model card: what was done to the adapter after its training."""
    lines = ["## Edited after training", "", "With `peft_sae.edit_adapter`; the details are in `edit.json`.", ""]
    for edit in edits:
        parts = [f"{in_markdown(str(one.get('name')))}{_done(edit, one)}" for one in edit["features"][:_SHOWN]]
        more = len(edit["features"]) - len(parts)
        kept = "kept alone: " if edit.get("kind") == "keep" else ""
        parent = in_markdown(str(edit.get("parent_digest"))[:12])
        lines.append(f"- {kept}{', '.join(parts)}{f' and {more} more' if more else ''}; of the weights {parent}")
    return "\n".join(lines)


def _done(edit: Mapping[str, Any], feature: Mapping[str, Any]) -> str:
    if edit.get("kind") == "keep":
        return ""
    return " removed" if not feature.get("factor") else f" times {feature.get('factor')}"


def read_edits(adapter: str | Path) -> list[dict[str, Any]]:
    """Return the edits that made an adapter, the first one first; an adapter that was never edited has none.

    Every edit has `parent_digest` and `digest` (SHA-256 of the weights before and after), `features` (name, SAE and
    `factor`: what is left of it, 0 if it was removed), `kind` (`scale`, of which removing is a case, or `keep`),
    `saes`, `base_model`, `versions`, `modules` (what it did to each), `notes`, and `left_out` (files that were
    not copied).

    Raises:
        ArtifactError: the record is damaged, or of a newer schema.
    """
    path = Path(adapter) / EDIT_FILE
    if not path.exists():
        return []
    edits = read_json(path, schema=SCHEMA, newest=SCHEMA_VERSION).get("edits")
    known = isinstance(edits, list) and all(
        isinstance(edit, dict) and isinstance(edit.get("digest"), str) and isinstance(edit.get("features"), list)
        for edit in edits
    )
    if not known or not edits:
        raise ArtifactError(f"'{path}' is malformed, so earlier edits are not known. Copy the adapter again.")
    return list(edits)
