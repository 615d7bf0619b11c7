"""What is written beside an edited adapter: what was done to it, and to what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..artifact import read_json
from ..errors import ArtifactError

EDIT_FILE = "edit.json"
SCHEMA = "peft_sae.edit"
SCHEMA_VERSION = 1


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
