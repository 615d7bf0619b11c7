"""A feature table in Markdown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..escape import in_address, in_markdown, visible
from .columns import EXTRA_HEADS, NUMBERS, known_extras, word

if TYPE_CHECKING:
    from .table import FeatureRow, FeatureTable
    from .texts import FeatureExample


def markdown_page(table: FeatureTable) -> str:
    """Return a document with one table per hook point, and behind them how the features were chosen."""
    parts = ["# Features", f"Chosen by {in_markdown(str(table.settings.get('selector', 'hand')))}."]
    for hook_name, rows in table.by_hook().items():
        parts.append(f"## {in_markdown(hook_name)}: {len(rows)} features of {in_markdown(rows[0].sae)}")
        parts.append("\n".join(_lines(rows)))
    settings = json.dumps(dict(table.settings), indent=2, sort_keys=True, default=str)
    parts.append("## Settings")
    parts.append("\n".join(f"    {visible(line)}" for line in settings.splitlines()))
    return "\n\n".join(parts) + "\n"


def _lines(rows: Sequence[FeatureRow]) -> list[str]:
    extras = known_extras(rows)
    heads = ["rank", "feature", *(column.head for column in NUMBERS), *(EXTRA_HEADS[name] for name in extras)]
    rule = ["---:"] * (2 + len(NUMBERS)) + ["---"] * len(extras)
    cells = [
        [
            str(row.rank),
            _feature(row),
            *(column.text(row) for column in NUMBERS),
            *(_extra(row, name) for name in extras),
        ]
        for row in rows
    ]
    return [f"| {' | '.join(line)} |" for line in [heads, rule, *cells]]


def _feature(row: FeatureRow) -> str:
    return f"[{row.feature}](<{in_address(row.neuronpedia)}>)" if row.neuronpedia else str(row.feature)


def _extra(row: FeatureRow, name: str) -> str:
    if name == "label":
        return in_markdown(row.label or "")
    if name == "examples":
        return "<br>".join(_example(example) for example in row.examples)
    return ", ".join(in_markdown(word(token)) for token in getattr(row, name))


def _example(example: FeatureExample) -> str:
    token = example.token
    core = token.strip(" ")
    # Stars beside a space are no emphasis, so the token's own spaces stay outside.
    before, after = token[: len(token) - len(token.lstrip(" "))], token[len(token.rstrip(" ")) :] if core else ""
    marked = f"{before if core else ''}**{in_markdown(core) or '␣'}**{after}"
    text = f"{in_markdown(example.before)}{marked}{in_markdown(example.after)}".strip()
    return f"{in_markdown(example.label)} {example.activation:.3g}: {text}"
