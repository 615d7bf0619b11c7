"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..sae.names import feature_name
from ..selection import FeatureExample, FeatureRow, FeatureTable
from ..selection.columns import NUMBERS, known_extras, word
from ..selection.escape import visible
from ..subspace import Subspace

_TOKENS = 6
_CONTEXT = 40  # characters on either side


def print_features(
    features: FeatureTable | Subspace,
    subspace: Subspace | None = None,
    *,
    per_site: int = 8,
    console: Console | None = None,
) -> None:
    """Print the best features of every hook point, and the protected ones.

    Args:
        features: the chosen features, from `describe_features`; or a Subspace alone, for what it knows of them.
        subspace: what was built from them: tells the bases' ranks, and what is protected.
        per_site: rows per hook point.
        console: where to print; by default the terminal.
    """
    console = console or Console()
    if isinstance(features, Subspace):
        subspace = features
    table = _features_of(features) if isinstance(features, Subspace) else features
    ranks = {} if subspace is None else {site.sae.hook_name: site.rank for site in subspace.sites}
    for hook_name, rows in table.by_hook().items():
        title = f"{hook_name}: {len(rows)} features"
        title += f", basis of rank {ranks[hook_name]}" if hook_name in ranks else ""
        console.print(_title(title), _feature_table(rows[:per_site]), sep="\n")
        if len(rows) > per_site:
            console.print(Text(f"... and {len(rows) - per_site} more", style="dim"))
    if subspace is not None:
        print_protected(subspace, per_site=per_site, console=console)


def print_protected(subspace: Subspace, *, per_site: int = 8, console: Console | None = None) -> None:
    """Print the protected features of every hook point with the tokens that they promote."""
    console = console or Console()
    for guarded in subspace.protected:
        table = Table()
        table.add_column("feature", justify="right")
        table.add_column("promotes")
        for feature, tokens in list(zip(guarded.features.tolist(), guarded.tokens, strict=True))[:per_site]:
            table.add_row(str(feature), _words(tokens))
        title = _title(f"{guarded.sae.hook_name}: protected, never read or written")
        console.print(title, table, sep="\n")


def _features_of(subspace: Subspace) -> FeatureTable:
    rows = [
        FeatureRow(
            rank=place + 1,
            block=site.sae.site.block,
            hook_name=site.sae.hook_name,
            sae=site.sae.name,
            feature=feature,
            name=feature_name(site.sae, feature),
            score=float(site.scores[place]),
            q_value=float(site.q_values[place]),
            aligned_mean=float(site.aligned_means[place]),
            unaligned_mean=float(site.unaligned_means[place]),
            aligned_rate=float(site.aligned_rates[place]),
            unaligned_rate=float(site.unaligned_rates[place]),
            promoted=site.tokens[place],
        )
        for site in subspace.sites
        for place, feature in enumerate(site.features.tolist())
    ]
    return FeatureTable(tuple(rows), subspace.settings)


def _title(text: str) -> Text:
    return Text(visible(text), style="italic")  # a table's own title would be broken to the table's width


def _feature_table(rows: Sequence[FeatureRow]) -> Table:
    extras = known_extras(rows)
    table = Table()
    for head in ("feature", *(column.head for column in NUMBERS)):
        table.add_column(head, justify="right")
    heads = {"label": "label", "promoted": "promotes", "suppressed": "suppresses", "examples": "most active in"}
    for name in extras:
        table.add_column(heads[name], overflow="fold")
    for row in rows:
        numbers = (Text(column.text(row)) for column in NUMBERS)
        table.add_row(Text(str(row.feature)), *numbers, *(_extra(row, name) for name in extras))
    return table


def _extra(row: FeatureRow, name: str) -> Text:
    if name == "label":
        return Text(visible(row.label or ""))
    if name == "examples":
        return _example(max(row.examples, key=lambda example: example.activation)) if row.examples else Text()
    return _words(getattr(row, name))


def _words(tokens: Sequence[str]) -> Text:
    return Text(" ".join(visible(word(token)) for token in tokens[:_TOKENS]))


def _example(example: FeatureExample) -> Text:
    before, after = example.before, example.after
    before = before if len(before) <= _CONTEXT else f"…{before[-_CONTEXT:]}"
    after = after if len(after) <= _CONTEXT else f"{after[:_CONTEXT]}…"
    return Text.assemble(visible(before), (visible(example.token), "bold"), visible(after))
