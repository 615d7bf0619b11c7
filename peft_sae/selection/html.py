"""A feature table as one HTML page."""

from __future__ import annotations

import base64
import hashlib
import json
from typing import TYPE_CHECKING

from ..escape import in_address, in_html
from .columns import EXTRA_HEADS, NUMBERS, Column, known_extras, word

if TYPE_CHECKING:
    from .table import FeatureRow, FeatureTable
    from .texts import FeatureExample

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1d21; --paper: #fff; --soft: #5c6068; --line: #d9dce1; --head: #f3f4f6;
  --mark: #ffe08a; --link: #0b57d0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7e8ea; --paper: #17181b; --soft: #a2a7b0; --line: #36393f;
  --head: #222429; --mark: #7a5c00; --link: #8ab4f8; } }
body { margin: 0 auto; padding: 1rem; max-width: 110rem; font: 15px/1.45 system-ui, sans-serif; color: var(--ink);
  background: var(--paper); }
h1 { font-size: 1.4rem; margin: 0 0 .2rem; }
p, summary { color: var(--soft); }
a { color: var(--link); }
mark { background: var(--mark); color: inherit; border-radius: .15em; padding: 0 .1em; }
table { border-collapse: collapse; width: 100%; margin: 1rem 0; }
th, td { border-bottom: 1px solid var(--line); padding: .35rem .5rem; text-align: left; vertical-align: top;
  overflow-wrap: anywhere; }
th { position: sticky; top: 0; background: var(--head); }
.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
th button { all: unset; cursor: pointer; font-weight: 600; }
th button:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
.token { display: inline-block; background: var(--head); border-radius: .25em; padding: 0 .3em; margin: 0 .2em .2em 0; }
.text { margin: 0 0 .3rem; color: inherit; min-width: 16rem; }
.class { color: var(--soft); font-size: .85em; }
pre { overflow: auto; background: var(--head); padding: .7rem; }
@media (max-width: 60rem) {
  table, thead, tbody, tr, td { display: block; }
  thead tr { display: flex; flex-wrap: wrap; gap: .3rem; }
  th { position: static; border: 1px solid var(--line); border-radius: .4em; }
  tbody tr { border: 1px solid var(--line); border-radius: .5em; margin: .7rem 0; padding: .3rem .6rem; }
  td, td.number { border: 0; padding: .12rem 0; text-align: left; white-space: normal; }
  td::before { content: attr(data-head) ": "; color: var(--soft); }
  td:empty { display: none; }
  .text { min-width: 0; }
}
"""

_SCRIPT = """
const heads = [...document.querySelectorAll("th")], body = document.querySelector("tbody");
heads.forEach((head, place) => head.firstElementChild.addEventListener("click", () => {
  const turn = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  const number = head.dataset.sort === "number";
  const value = (row) => row.cells[place].dataset.value;
  const rows = [...body.rows].sort((a, b) => turn * (number ? value(a) - value(b) : value(a).localeCompare(value(b))));
  heads.forEach((other) => other.setAttribute("aria-sort", "none"));
  head.setAttribute("aria-sort", turn > 0 ? "ascending" : "descending");
  body.append(...rows);
}));
"""

_PLACES = (
    Column("rank", lambda row: row.rank, lambda row: str(row.rank)),
    Column("layer", lambda row: row.block, lambda row: str(row.block)),
    Column("hook point", lambda row: row.hook_name, lambda row: row.hook_name, number=False),
    Column("feature", lambda row: row.feature, lambda row: str(row.feature)),
)


def html_page(table: FeatureTable) -> str:
    """Return one page that loads nothing: the table, which a click on a column's head sorts, and the settings."""
    columns, extras = [*_PLACES, *NUMBERS], known_extras(table.rows)
    heads = [_head(column.head, column.number) for column in columns]
    heads += [_head(EXTRA_HEADS[name], name == "examples", aligned=False) for name in extras]  # by activation
    body = "\n".join(
        f"<tr>{''.join([*(_cell(row, column) for column in columns), *(_extra(row, name) for name in extras)])}</tr>"
        for row in table.rows
    )
    selector = in_html(str(table.settings.get("selector", "hand")))
    settings = json.dumps(dict(table.settings), indent=2, sort_keys=True, default=str)
    digest = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; \
script-src 'sha256-{digest}'">
<title>Features chosen by {selector}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>Features</h1>
<p>{len(table.rows)} features at {len(table.by_hook())} hook points, chosen by {selector}. \
Click on a column's head to sort.</p>
<table>
<thead><tr>{"".join(heads)}</tr></thead>
<tbody>
{body}
</tbody>
</table>
<details><summary>How they were chosen</summary>
<pre>{chr(10).join(in_html(line) for line in settings.splitlines())}</pre>
</details>
<script>{_SCRIPT}</script>
</body>
</html>
"""


def _head(name: str, number: bool, *, aligned: bool = True) -> str:
    kind = ' class="number"' if number and aligned else ""
    sort = "number" if number else "text"
    return (
        f'<th scope="col" aria-sort="none" data-sort="{sort}"{kind}><button type="button">{in_html(name)}</button></th>'
    )


def _cell(row: FeatureRow, column: Column) -> str:
    text = in_html(column.text(row))
    if column.head == "feature" and row.neuronpedia:
        text = f'<a href="{in_html(in_address(row.neuronpedia))}" rel="noopener noreferrer">{text}</a>'
    if column.head == "hook point":
        text = f'<span title="{in_html(row.sae)}">{text}</span>'
    return _td(column.head, str(column.value(row)), text, column.number)


def _extra(row: FeatureRow, name: str) -> str:
    if name == "label":
        value, text = row.label or "", in_html(row.label or "")
    elif name == "examples":
        value = str(max((example.activation for example in row.examples), default=0.0))
        text = "".join(_example(example) for example in row.examples)
    else:
        words = [word(token) for token in getattr(row, name)]
        value, text = " ".join(words), "".join(f'<span class="token">{in_html(one)}</span>' for one in words)
    return _td(EXTRA_HEADS[name], value, text, False)


def _td(head: str, value: str, text: str, number: bool) -> str:
    kind = ' class="number"' if number else ""
    return f'<td{kind} data-head="{in_html(head)}" data-value="{in_html(value)}">{text}</td>'


def _example(example: FeatureExample) -> str:
    about = f"{example.label}, {example.activation:.3g}"
    return (
        f'<p class="text"><span class="class">{in_html(about)}:</span> {in_html(example.before)}'
        f"<mark>{in_html(example.token)}</mark>{in_html(example.after)}</p>"
    )
