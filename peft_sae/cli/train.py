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
    report: Annotated[str | None, typer.Option(help="Overrides the file's.")] = None,
    merged: Annotated[str | None, typer.Option(help="Overrides the file's.")] = None,
    lora: Annotated[str | None, typer.Option(help="Overrides the file's.")] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Only check the file and local data, and show modules, parameters and memory."),
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bars.")] = False,
) -> None:
    """Train an adapter with TRL as a YAML file describes, from the selection of features to the merged checkpoint.

    A job that was stopped goes on when it is started again. For several devices: `accelerate launch -m peft_sae train
    FILE`.

    Example: `peft-sae train configs/gemma-2-2b.yaml --output outputs/adapter`
    """
    from ..jobs import read_job, run_job

    overrides = {"model": model, "data": data, "subspace": subspace, "output": output}
    job = read_job(config, **overrides, report=report, merged=merged, lora=lora)
    console = Console()
    if dry_run:
        from ..jobs.dry_run import plan_job
        from .dry_run import print_dry_run

        print_dry_run(plan_job(job), console)
        return
    result = run_job(job, progress=not quiet)
    if not result.is_main:
        return
    written = {"Adapter": result.adapter, "Report": result.report, "Merged checkpoint": result.merged}
    for what, path in {**written, "Plain LoRA adapter": result.lora}.items():
        if path is not None:
            console.print(f"{what} written to {path}", markup=False)
