"""The report as a page."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from ...escape import in_html
from .figures import figures
from .summary import cards, highlights
from .tables import TABLES, known_columns, table_view
from .wording import UNKNOWN

if TYPE_CHECKING:
    from ..result import Inspection

_SCRIPTS = ("plot.js", "table.js", "page.js")
_LEFT_OUT = ("module_features", "coefficients", "training")  # large; the first two are in the JSON form
_UNSAFE = re.compile("[<>&\u2028\u2029\ud800-\udfff]")


def html_report(inspection: Inspection) -> str:
    """Return a report as one HTML page that needs nothing beside it, not even a network.

    The page holds the inspection's summary, provenance, notes and tables as JSON in the element `inspection`, from
    which its script builds tables and plots. The tables `module_features` and `coefficients` are left out: they grow
    with features times modules. Whatever comes from data, labels or files is shown as text, never read as HTML, and the
    page's content security policy allows no script but its own and no address to be loaded.

    Args:
        inspection: from `inspect_adapter`.
    """
    found = inspection.to_dict()
    plots = figures(found)
    views = {
        "plots": plots,
        "tables": {name: table_view(name, found[name]) for name in TABLES if found[name]},
    }
    script = "".join(_asset(name) for name in _SCRIPTS)
    script = f'"use strict";\n{script}'
    title = f"Inside {_short(found['provenance'].get('adapter') or 'an adapter')}"
    kept = {key: value for key, value in found.items() if key not in _LEFT_OUT}
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_policy(script)}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{in_html(title)}</title>
<style>
{_asset("page.css")}</style>
</head>
<body>
<header>
<h1>{in_html(title)}</h1>
{_lede(found)}
</header>
{_sections(found, plots)}
<footer><p>Made by peft-sae. The page loads nothing, and it works without a network.</p></footer>
<div id="tip" hidden></div>
<script type="application/json" id="inspection">{embedded(kept)}</script>
<script type="application/json" id="views">{embedded(views)}</script>
<script>{script}</script>
</body>
</html>
"""


def embedded(data: Any) -> str:
    """Return data as JSON that cannot end the element it stands in."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return _UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def _short(name: str) -> str:
    """The last part of a path or of a name on the Hub."""
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1] or name


def _asset(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _policy(script: str) -> str:
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; "
        "form-action 'none'"
    )


def _lede(found: dict[str, Any]) -> str:
    provenance = found["provenance"]
    said = [
        f"{name} <b>{in_html(str(provenance[key])[:length])}</b>"
        for name, key, length in (
            ("kind", "peft_type", 40),
            ("base model", "base_model", 400),
            ("digest", "adapter_digest", 12),
        )
        if provenance.get(key)
    ]
    return f'<p class="lede">{" · ".join(said)}</p>'


def _sections(found: dict[str, Any], plots: list[dict[str, Any]]) -> str:
    drawn = {plot["id"]: plot for plot in plots}

    def figure(*names: str) -> str:
        return "".join(_figure(drawn[name]) for name in names if name in drawn)

    parts = [
        ("summary", "Summary", _summary(found)),
        ("notes", "Notes", _notes(found["notes"])),
        ("moved", "How far it moved", figure("drift", "angles")),
        ("features", "What it reads and writes", _table("features", found)),
        ("activations", "What changes on texts", figure("before-after") + _table("activations", found)),
        ("predictions", "What it does to predictions", figure("loss-by-place", "kl-by-place")),
        ("training-loss", "Training", figure("training")),
        ("modules", "Modules", _table("modules", found)),
        ("provenance", "Where it comes from", _provenance(found["provenance"])),
    ]
    parts = [part for part in parts if part[2]]
    links = "".join(f'<li><a href="#{key}">{head}</a></li>' for key, head, _ in parts)
    sections = "\n".join(
        f'<section id="{key}" aria-labelledby="{key}-head"><h2 id="{key}-head">{head}</h2>\n{body}\n</section>'
        for key, head, body in parts
    )
    return f"""<nav aria-label="Sections"><ul>{links}</ul></nav>
<main>
<noscript><p class="warning">Plots and tables need the page's own script, which is switched off.</p></noscript>
{sections}
</main>"""


def _summary(found: dict[str, Any]) -> str:
    shown = "".join(
        f'<div class="card"><dt>{in_html(card.head)}</dt><dd><strong>{in_html(card.value)}</strong> '
        f"{in_html(card.words)}</dd></div>"
        for card in cards(found)
    )
    lines = "".join(f"<li><b>{in_html(head)}</b> {in_html(words)}</li>" for head, words in highlights(found))
    return f'<dl class="cards">{shown}</dl>' + (f'<ul class="highlights">{lines}</ul>' if lines else "")


def _notes(notes: list[str]) -> str:
    return f"<ul>{''.join(f'<li>{in_html(note)}</li>' for note in notes)}</ul>" if notes else ""


def _figure(plot: dict[str, Any]) -> str:
    key = plot["id"]
    return (
        f'<figure id="{key}"><h3 id="{key}-title">{in_html(plot["title"])}</h3>'
        f'<figcaption id="{key}-about">{in_html(plot["about"])}</figcaption>'
        f'<div class="plot" data-plot="{key}"></div></figure>'
    )


def _table(name: str, found: dict[str, Any]) -> str:
    rows = found[name]
    if not rows:
        return ""
    table = TABLES[name]
    meanings = "".join(
        f"<dt>{in_html(column.head)}</dt><dd>{in_html(table.meanings[column.key])}</dd>"
        for column in known_columns(table, rows)
    )
    return (
        f'<details class="meanings"><summary>What the columns mean</summary><dl class="pairs">{meanings}</dl></details>'
        f'<div class="table" data-table="{name}"></div>'
    )


def _provenance(provenance: Mapping[str, Any]) -> str:
    plain = {key: value for key, value in provenance.items() if not isinstance(value, (Mapping, list))}
    nested = "".join(
        f"<details><summary>{in_html(_spaced(key))}</summary>{_nested(value)}</details>"
        for key, value in provenance.items()
        if key not in plain
    )
    return (_nested({_spaced(key): value for key, value in plain.items()}) + nested) if provenance else ""


def _nested(value: Any) -> str:
    if isinstance(value, Mapping):
        pairs = "".join(f"<dt>{in_html(str(key))}</dt><dd>{_nested(one)}</dd>" for key, one in value.items())
        return f'<dl class="pairs">{pairs}</dl>' if pairs else UNKNOWN
    if isinstance(value, list):
        if any(isinstance(one, (Mapping, list)) for one in value):
            return f"<ol>{''.join(f'<li>{_nested(one)}</li>' for one in value)}</ol>"
        return ", ".join(_nested(one) for one in value) or UNKNOWN
    if isinstance(value, bool):
        return "yes" if value else "no"
    return UNKNOWN if value in (None, "") else in_html(str(value))


def _spaced(key: str) -> str:
    return key.replace("_", " ")
