"""The command `merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..errors import ConfigError, MismatchError


def merge(
    base: Annotated[str, typer.Argument(help="Folder or Hub id of the base model.")],
    adapter: Annotated[str, typer.Argument(help="Folder or Hub id of the adapter.")],
    output: Annotated[Path, typer.Argument(help="Folder for the merged checkpoint.")],
    add: Annotated[
        list[str] | None, typer.Option(help="Another adapter to merge, with its factor: ADAPTER=0.5; repeat.")
    ] = None,
    factor: Annotated[float, typer.Option(help="Factor of the first adapter's update.")] = 1.0,
    dtype: Annotated[str | None, typer.Option(help="dtype of the result; by default the base's.")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest size of one weights file.")] = "5GB",
    in_memory: Annotated[
        bool, typer.Option("--in-memory", help="Load the whole model: for what cannot be merged piece by piece.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Load both afterwards and compare logits; takes memory for one model.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bars.")] = False,
) -> None:
    """Merge an adapter into its base model and write a plain checkpoint, in little memory.

    Example: `peft-sae merge google/gemma-2-2b outputs/adapter outputs/merged`
    """
    from ..export import merge_checkpoint, verify_merge

    adapters = {adapter: factor}
    for text in add or ():
        name, number = _factor(text)
        if name in adapters:
            raise ConfigError(f"--add {text!r} names an adapter twice. Give one factor to it.")
        adapters[name] = number
    path = merge_checkpoint(
        base,
        adapters,
        output,
        dtype=dtype,
        max_shard_size=max_shard_size,
        in_memory=in_memory,
        progress=not quiet,
    )
    console = Console()
    console.print(f"Merged checkpoint written to {path}", markup=False)
    if verify:
        check = verify_merge(base, adapters, path)
        console.print(str(check), markup=False, highlight=False)
        if not check.agrees:
            raise MismatchError(
                f"That is more than rounding explains. '{path}' is kept, but do not use it as the merged model; "
                "merge with --in-memory and compare, and report it."
            )


def _factor(text: str) -> tuple[str, float]:
    name, equals, number = text.rpartition("=")
    if not equals:
        return text, 1.0
    try:
        return name, float(number)
    except ValueError as error:
        raise ConfigError(f"--add {text!r} ends in no number. Write for example --add outputs/other=0.5.") from error
