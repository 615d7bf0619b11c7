"""What is written beside an edited adapter: what was done to it, and to what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..escape import in_markdown

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
    return " removed" if not feature.get("factor") else f" times {float(feature['factor']):g}"
