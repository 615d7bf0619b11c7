"""Making words from data, tokenizers and labels harmless where they are shown."""

from __future__ import annotations

import html
import unicodedata
from urllib.parse import quote


def visible(text: str) -> str:
    """Return a text on one line: control characters, line breaks and lone surrogates are spelled out."""
    return "".join(
        char
        if char.isprintable() or unicodedata.category(char) == "Zs"
        else char.encode("unicode_escape", "surrogatepass").decode()
        for char in text
    )


def in_csv(value: object) -> object:
    """Return a cell for a spreadsheet: a text that begins like a formula gets a quote in front."""
    if not isinstance(value, str):
        return value
    shown = visible(value)
    return f"'{shown}" if shown.startswith(("=", "+", "-", "@")) else shown


def in_html(text: str) -> str:
    """Return a text for use between tags or in a quoted attribute."""
    return html.escape(visible(text), quote=True)


def in_markdown(text: str) -> str:
    """Return a text for use in a line or a table cell."""
    return "".join(f"\\{char}" if char in "\\`*_{}[]()<>#|~&$" else char for char in visible(text))


def in_address(url: str) -> str:
    """Return an address without anything that could end it: spaces, quotes, brackets and the like are encoded."""
    return quote(url, safe="/:?=&%.-_~", errors="backslashreplace")
