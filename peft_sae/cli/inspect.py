"""The command `inspect`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..errors import ConfigError, suggest
from ..escape import visible
from ..selection.columns import word
from .tables import example_text, title_text

if TYPE_CHECKING:
    import pandas as pd

    from ..inspect import Inspection

_TOKENS = 5


def inspect(
    adapter: Annotated[Path, typer.Argument(help="Folder of the adapter, ours or a plain LoRA.")],
    base: Annotated[str | None, typer.Option(help="Folder or Hub id of the base, if not the adapter's own.")] = None,
    data: Annotated[Path | None, typer.Option(help="JSONL file of texts to run it on.")] = None,
    saes: Annotated[str | None, typer.Option(help="sae-lens release, or folder of SAEs: shows all features.")] = None,
    ids: Annotated[list[str] | None, typer.Option("--id", help="SAE of the release; repeat for more.")] = None,
    layers: Annotated[list[int] | None, typer.Option("--layer", help="Block, instead of --id; repeat.")] = None,
    labels: Annotated[Path | None, typer.Option(help="File of labels of features (JSON, JSONL or CSV).")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a report to this file.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write all tables as JSON to this file.")] = None,
    others: Annotated[int, typer.Option(help="Features to list per hook point beside the adapter's own.")] = 16,
    tokens: Annotated[str, typer.Option(help="Tokens that count: all, prompt, response or assistant.")] = "all",
    batch_size: Annotated[int, typer.Option(help="Texts per forward pass.")] = 8,
    max_length: Annotated[int | None, typer.Option(help="Tokens per text; longer ones are cut.")] = None,
    device: Annotated[str, typer.Option(help="Device for model and SAEs.")] = "cpu",
    rows: Annotated[int, typer.Option(help="Rows to print per table.")] = 12,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bars.")] = False,
) -> None:
    """Show what an adapter has learned: how far it moved from its basis, and which features it reads and writes.

    Without --data nothing is run, and of the base model only the norms are read. With --data the change of the loss
    and, with --saes, of every feature's activation is measured.

    Example: `peft-sae inspect outputs/adapter --html report.html`
    """
    import torch

    from ..inspect import inspect_adapter
    from ..sae.load import load_saes
    from ..selection.labels import read_labels
    from ..statistics.data import TOKEN_CHOICES
    from ..statistics.records import check_data
    from ..writing import check_writable

    if saes is None and (ids or layers):
        raise ConfigError("--id and --layer choose among SAEs, and --saes does not say of which. Add it.")
    if tokens not in TOKEN_CHOICES:
        raise ConfigError(f"--tokens {tokens!r} is unknown.{suggest(tokens, TOKEN_CHOICES)}")
    if rows < 1:
        raise ConfigError(f"--rows {rows} shows nothing. Use 1 or more.")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"--device {device!r} is not to be had: no GPU is visible to PyTorch. Use cpu.")
    if data is not None:
        check_data(str(data), "inspected")
    for path, suffix in ((html, ".html"), (json, ".json")):
        if path is not None:
            if path.suffix.lower() != suffix:
                raise ConfigError(f"'{path}' does not end in {suffix}, which --{suffix[1:]} writes. Name it so.")
            check_writable(path)
    handles = None if saes is None else load_saes(saes, ids=ids or None, layers=layers or None, device=device)
    options: dict[str, Any] = {"tokens": tokens, "batch_size": batch_size, "max_length": max_length, "others": others}
    found = inspect_adapter(
        adapter,
        base if data is None else _model(adapter, base, device),
        None if data is None else str(data),
        handles,
        labels=None if labels is None else read_labels(labels),
        progress=not quiet,
        **options,
    )
    console = Console()
    print_inspection(found, rows=rows, console=console)
    for path in (html, json):
        if path is not None:
            found.save(path)
            console.print(f"Written to {path}", markup=False)


def _model(adapter: Path, base: str | None, device: str) -> Any:
    from ..adapter import read_adapter_config
    from ..jobs.models import load_model

    name = base or read_adapter_config(adapter).get("base_model_name_or_path")
    if not name:
        raise ConfigError(f"The adapter '{adapter}' does not name its base model. Give it with --base.")
    return load_model(name, device=device)[0]


def print_inspection(found: Inspection, *, rows: int = 12, console: Console | None = None) -> None:
    """Print summary, drift by block, and the features with the largest shares and changes.

    Args:
        found: from `inspect_adapter`.
        rows: rows per table.
        console: where to print; by default the terminal.
    """
    console = console or Console()
    console.print(_summary(found))
    if found.modules["in_basis"].notna().any():
        console.print(title_text("Drift by block: what of the update lies outside the basis that it started from"))
        console.print(_blocks(found.modules))
    if len(found.features):
        console.print(title_text("Features with the largest shares of the update"))
        console.print(_features(found.features, rows))
    if found.activations is not None:
        console.print(title_text("Features whose mean activation changed most on the texts"))
        console.print(_activations(found.activations, rows))
    for note in found.notes:
        console.print(Text(f"Note: {visible(note)}", style="yellow"))


def _summary(found: Inspection) -> Text:
    summary, provenance = found.summary, found.provenance
    lines = [
        f"{provenance['peft_type']} adapter of {provenance['base_model'] or 'an unknown base'}: "
        f"{summary['modules']} modules, {summary['parameters']:,} parameters, norm {summary['norm']:.3g}"
    ]
    if summary["in_basis"] is not None:
        lines.append(
            f"{summary['in_basis']:.1%} of the update lies in the basis of features it started from "
            f"(a random space of that size has {summary['in_random']:.1%}); largest angle "
            f"{summary['largest_angle']:.1f} degrees"
        )
    if "loss_before" in summary:
        lines.append(
            f"Loss on {summary['predicted_tokens']:,} tokens: {summary['loss_before']:.4f} to "
            f"{summary['loss_after']:.4f} nats; divergence from the base model {summary['kl']:.4f} nats per token"
        )
    return Text("\n".join(visible(line) for line in lines))


def _table(*heads: str, text: tuple[str, ...] = ()) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for head in heads:
        number = head not in text
        table.add_column(head, justify="right" if number else "left", no_wrap=number, overflow="fold")
    return table


def _blocks(modules: pd.DataFrame) -> Table:
    """Means over a block's modules, each weighted by the energy of its update."""
    table = _table("block", "modules", "norm", "drift", "drift from random", "largest angle")
    known = modules[modules["in_basis"].notna()]
    for block, mine in known.groupby("block", dropna=False):
        weights = mine["norm"].astype(float) ** 2
        drift, random = (
            float((mine[column].astype(float) * weights).sum() / weights.sum()) for column in ("drift", "in_random")
        )
        angle = f"{mine['largest_angle'].max():.1f}°"
        norm = f"{weights.sum() ** 0.5:.3g}"
        table.add_row(str(block), str(len(mine)), norm, _percent(drift), _percent(1 - random), angle)
    return table


def _features(features: pd.DataFrame, rows: int) -> Table:
    table = _table(
        "feature", "side", "share", "x random", "x typical", "its own", "says", text=("feature", "side", "says")
    )
    for name, row in zip(_names(features)[:rows], features.head(rows).to_dict("records"), strict=True):
        table.add_row(
            name,
            f"{row['side']}s",
            _percent(row["share"]),
            _number(row["times_chance"], ".1f"),
            _number(row["times_typical"], ".1f"),
            _percent(row["unique"]),
            _says(row["label"], row["tokens"]),
        )
    return table


def _activations(activations: pd.DataFrame, rows: int) -> Table:
    table = _table("feature", "before", "after", "change", "says", text=("feature", "says"))
    for name, row in zip(_names(activations)[:rows], activations.head(rows).to_dict("records"), strict=True):
        says = _says(row["label"], row["promoted"])
        best = max(row["examples"], key=lambda example: example.activation, default=None)
        table.add_row(
            name,
            _number(row["mean_before"], ".3g"),
            _number(row["mean_after"], ".3g"),
            _number(row["change"], "+.3g"),
            says if best is None else Text("\n").join([says, example_text(best)]),
        )
    return table


def _number(value: float | None, form: str) -> str:
    """A number, or a dash where it is not known."""
    return "-" if value is None or math.isnan(value) else format(value, form)


def _percent(value: float | None) -> str:
    return _number(value, ".2%")


def _names(table: pd.DataFrame) -> list[Text]:
    """Short names, as `edit` takes them, where a block has one hook point; those of the table's rows."""
    hooks = table.groupby("block")["hook_name"].nunique().to_dict()
    found = []
    for row in table.to_dict("records"):
        name = f"{row['block']}:{row['feature']}" if hooks[row["block"]] == 1 else row["name"]
        found.append(Text(visible(name if row["group"] == "chosen" else f"{name} ({row['group']})")))
    return found


def _says(label: object, tokens: list[str]) -> Text:
    parts = [visible(label)] if isinstance(label, str) else []
    words = " ".join(visible(word(token)) for token in tokens[:_TOKENS])
    return Text(" | ".join([*parts, *([words] if words else [])]))
