"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..escape import visible
from ..selection import FeatureExample, FeatureRow, FeatureTable
from ..selection.columns import word
from ..selection.table import numbers_of
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

    Of each feature: its numbers on the aligned (and on the unaligned) texts, label, promoted (+) and suppressed (-)
    tokens, and the text that activates it most.

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
        console.print(title_text(title), _feature_table(rows[:per_site]), sep="\n")
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
        title = title_text(f"{guarded.sae.hook_name}: protected, never read or written")
        console.print(title, table, sep="\n")


def _features_of(subspace: Subspace) -> FeatureTable:
    rows = [
        FeatureRow(
            **numbers_of(site, place),
            promoted=site.tokens[place],
        )
        for site in subspace.sites
        for place in range(len(site.features))
    ]
    return FeatureTable(tuple(rows), subspace.settings)


def title_text(text: str) -> Text:
    """Return a table's title: what it says is made visible."""
    return Text(visible(text), style="italic")  # a table's own title would be broken to the table's width


def _feature_table(rows: Sequence[FeatureRow]) -> Table:
    # Narrow, so that words have room on 80 columns: both classes share a column.
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for head in ("feature", "score", "q", "mean aligned\n(unaligned)", "fires on %\n(unaligned)"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("says", overflow="fold")
    for row in rows:
        table.add_row(
            str(row.feature),
            f"{row.score:.3g}",
            f"{row.q_value:.2g}",
            f"{row.aligned_mean:.3g} ({row.unaligned_mean:.3g})",
            f"{100 * row.aligned_rate:.1f} ({100 * row.unaligned_rate:.1f})",
            Text("\n").join(_says(row)),
        )
    return table


def _says(row: FeatureRow) -> list[Text]:
    """Label, promoted and suppressed tokens and the most active text, a line each."""
    lines = [Text(visible(row.label), style="bold")] if row.label else []
    lines += [Text("+ ") + _words(row.promoted)] if row.promoted else []
    lines += [Text("- ") + _words(row.suppressed)] if row.suppressed else []
    best = max(row.examples, key=lambda example: example.activation, default=None)
    return [*lines, *([example_text(best)] if best else [])]


def _words(tokens: Sequence[str]) -> Text:
    return Text(" ".join(visible(word(token)) for token in tokens[:_TOKENS]))


def example_text(example: FeatureExample) -> Text:
    """Return a text around its most active token, which is bold."""
    before, after = example.before, example.after
    before = before if len(before) <= _CONTEXT else f"…{before[-_CONTEXT:]}"
    after = after if len(after) <= _CONTEXT else f"{after[:_CONTEXT]}…"
    return Text.assemble(visible(before), (visible(example.token), "bold"), visible(after))
