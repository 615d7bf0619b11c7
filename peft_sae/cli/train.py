"""The command `train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def train(
    config: Annotated[Path, typer.Argument(help="YAML file of the job; see configs/.")],
    model: Annotated[str | None, typer.Option(help="Overrides the file's.")] = None,
    data: Annotated[str | None, typer.Option(help="Overrides the file's.")] = None,
    subspace: Annotated[str | None, typer.Option(help="Overrides the file's.")] = None,
    output: Annotated[str | None, typer.Option(help="Overrides the file's.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bars.")] = False,
) -> None:
    """Train an adapter as a YAML file describes.

    Example: `peft-sae train configs/gemma-2-2b.yaml --output outputs/adapter`
    """
    from ..training import read_job, run_job

    job = read_job(config, model=model, data=data, subspace=subspace, output=output)
    Console().print(f"Adapter written to {run_job(job, progress=not quiet)}", markup=False)
