"""Tables for the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..subspace import Subspace


def print_features(subspace: Subspace, *, per_site: int = 8, console: Console | None = None) -> None:
    """Print the best features of every site with the tokens that they promote.

    Args:
        subspace: the Subspace.
        per_site: rows per hook point.
        console: where to print; by default the terminal.
    """
    console = console or Console()
    for site in subspace.sites:
        title = Text(f"{site.sae.hook_name}: {len(site.features)} features, basis of rank {site.rank}")
        table = Table(title=title, title_justify="left")
        for name in ("feature", "score", "mean aligned", "mean unaligned", "fires aligned", "fires unaligned"):
            table.add_column(name, justify="right")
        table.add_column("promotes")
        for place in range(min(per_site, len(site.features))):
            numbers = (site.scores[place], site.aligned_means[place], site.unaligned_means[place])
            table.add_row(
                str(int(site.features[place])),
                *(f"{float(number):.3f}" for number in numbers),
                *(f"{100 * float(rate):.1f} %" for rate in (site.aligned_rates[place], site.unaligned_rates[place])),
                Text(" ".join(_visible(token.strip()) for token in site.tokens[place][:6])),
            )
        console.print(table)
    for guarded in subspace.protected:
        table = Table(title=Text(f"{guarded.sae.hook_name}: protected, never read or written"), title_justify="left")
        table.add_column("feature", justify="right")
        table.add_column("promotes")
        for feature, tokens in list(zip(guarded.features.tolist(), guarded.tokens, strict=True))[:per_site]:
            table.add_row(str(feature), Text(" ".join(_visible(token.strip()) for token in tokens[:6])))
        console.print(table)


def _visible(token: str) -> str:
    """A token as it can safely be printed: control characters and lone surrogates are spelled out."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode() for char in token
    )
