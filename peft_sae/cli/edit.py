"""The command `edit`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..errors import ConfigError
from ..escape import visible

if TYPE_CHECKING:
    from ..sae import SaeHandle

_MODULES = 8  # rows; the rest is in edit.json


def edit(
    adapter: Annotated[Path, typer.Argument(help="Folder of the adapter; it is not changed.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the edited adapter.")],
    remove: Annotated[list[str] | None, typer.Option(help="Feature to remove, such as 12:4051; repeat.")] = None,
    scale: Annotated[
        list[str] | None, typer.Option(help="Feature and what to multiply it by, such as 20:77=0.5; repeat.")
    ] = None,
    keep: Annotated[
        list[str] | None, typer.Option(help="Feature to keep; all else is removed. Repeat; not with the others.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Folder or Hub id of the base model; by default what the adapter names.")
    ] = None,
    saes: Annotated[
        str | None,
        typer.Option(help="sae-lens release, or folder of SAEs: for features that are not in the adapter's Subspace."),
    ] = None,
    ids: Annotated[list[str] | None, typer.Option("--id", "--ids", help="SAE of the release; repeat for more.")] = None,
) -> None:
    """Remove or scale features in a trained adapter, or keep only some, without training.

    Example: `peft-sae edit outputs/adapter --remove 12:4051 --scale 20:77=0.5 -o outputs/edited`
    """
    from ..edit import edit_adapter, read_edits

    path = edit_adapter(
        adapter,
        output,
        remove=remove or (),
        scale=[_scale(text) for text in scale or ()],
        keep=keep or None,
        model=base,
        saes=_load(saes, ids),
    )
    _print(read_edits(path)[-1])
    Console().print(f"Edited adapter written to {path}", markup=False)


def _scale(text: str) -> tuple[str, float]:
    name, equals, number = text.rpartition("=")
    try:
        if equals:
            return name, float(number)
    except ValueError:
        pass
    raise ConfigError(f"--scale {text!r} is no feature with a number. Write for example --scale 20:77=0.5.")


def _load(source: str | None, ids: list[str] | None) -> list[SaeHandle] | None:
    if source is None:
        if ids:
            raise ConfigError(
                f"--id {ids[0]!r} names an SAE, and --saes does not say of which release or folder. Add it."
            )
        return None
    from ..sae import load_saes

    return load_saes(source, ids=ids)


def _print(edit: dict[str, Any]) -> None:
    console = Console()
    for feature in edit["features"]:
        factor = feature["factor"]
        what = "kept" if edit["kind"] == "keep" else "removed" if factor == 0 else f"multiplied by {factor:g}"
        console.print(visible(f"{feature['name']}: {what}"), markup=False, highlight=False)
    table = Table()
    table.add_column("module", overflow="fold")
    for head in ("directions", "norm before", "after", "changed by"):
        table.add_column(head, justify="right")
    modules = sorted(edit["modules"].items(), key=lambda item: -(item[1]["changed"] or 0))
    for name, module in modules[:_MODULES]:
        changed = module["changed"]
        table.add_row(
            visible(name),
            " + ".join(f"{count} {side}" for side, count in module["directions"].items()) or "none",
            f"{module['norm_before']:.4g}",
            f"{module['norm_after']:.4g}",
            "-" if changed is None else f"{100 * changed:.1f} %",
        )
    console.print(table)
    if len(modules) > _MODULES:
        console.print(f"... and {len(modules) - _MODULES} modules that changed less (all are in edit.json)")
