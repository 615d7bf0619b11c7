"""The commands. What is heavy is imported inside them, so that `--help` is quick."""

from __future__ import annotations

import logging
import signal
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..errors import PeftSaeError
from ..escape import visible
from .edit import edit
from .inspect import inspect
from .merge import merge
from .run import run, run_script, with_command
from .select import select
from .train import train

app = typer.Typer(
    name="peft-sae",
    help="Fine-tuning with PEFT in a basis of sparse-autoencoder features.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)

FAILED = 1  # exit code for an error of this package
WRONG_USAGE = 2  # as the command line itself has it

Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars.")]


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 an error that was told, 2 wrong usage; of `run`, the script's own."""
    arguments = sys.argv[1:]
    try:
        if arguments[:1] == ["run"] and arguments[1:2] not in ([], ["--help"]):
            # Outside of the command line's own handling: a script's logging, signals and errors are its own affair.
            run_script(arguments[1:])
            return
        _prepare()
        app()
    except PeftSaeError as error:
        _tell(error)
        sys.exit(FAILED)


def main_of_module() -> None:
    """Run `python -m peft_sae`: a command, or else the script that is named."""
    try:
        sys.argv[1:] = with_command(sys.argv[1:], _commands())
    except PeftSaeError as error:
        _tell(error)
        sys.exit(WRONG_USAGE)
    main()


def _commands() -> list[str]:
    named = [command.name or getattr(command.callback, "__name__", "") for command in app.registered_commands]
    return list(map(str, named))


def _prepare() -> None:
    # PEFT asks transformers for an attribute under its old name; the reader of a terminal can do nothing about it.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    # So that temporary folders are removed when a scheduler stops the job.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def _tell(error: PeftSaeError) -> None:
    Console(stderr=True).print(f"[bold red]{type(error).__name__}:[/] ", end="")
    # Messages quote what files and servers say, which must not drive the terminal.
    Console(stderr=True).print("\n".join(map(visible, str(error).split("\n"))), markup=False, highlight=False)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for the world, the adapter and the results.")] = Path(
        "outputs/demo"
    ),
    seed: Annotated[int, typer.Option(help="Seed of the world and of the training.")] = 0,
    quiet: Quiet = False,
) -> None:
    """Run the whole path on a small world that is made here: no network, no GPU.

    Example: `peft-sae demo --output outputs/demo --seed 1`
    """
    from ..demo.run import run_demo

    run_demo(output, seed=seed, progress=not quiet)


app.command()(select)
app.command()(inspect)
app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})(run)


app.command()(train)
app.command()(edit)


app.command()(merge)


@app.command("export-lora")
def export_lora_command(
    adapter: Annotated[Path, typer.Argument(help="Folder of the adapter.")],
    output: Annotated[Path, typer.Argument(help="Folder for the plain LoRA adapter.")],
    uniform: Annotated[
        bool, typer.Option("--uniform", help="One rank and no scaling for all modules, as some servers need.")
    ] = False,
) -> None:
    """Write an adapter as plain LoRA, which PEFT loads without this package.

    Example: `peft-sae export-lora outputs/adapter outputs/lora`
    """
    from ..export import export_lora

    Console().print(f"LoRA adapter written to {export_lora(adapter, output, uniform=uniform)}", markup=False)
