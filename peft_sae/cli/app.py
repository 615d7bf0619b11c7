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

from ..errors import ConfigError, PeftSaeError

app = typer.Typer(
    name="peft-sae",
    help="Fine-tuning with PEFT in a basis of sparse-autoencoder features.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)

FAILED = 1  # exit code for an error of this package; 2 is the usage error of the command line itself

Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars.")]


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 an error that was told, 2 wrong usage."""
    # PEFT asks transformers for an attribute under its old name; the reader of a terminal can do nothing about it.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    # So that temporary folders are removed when a scheduler stops the job.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        app()
    except PeftSaeError as error:
        Console(stderr=True).print(f"[bold red]{type(error).__name__}:[/] ", end="")
        Console(stderr=True).print(str(error), markup=False, highlight=False)
        sys.exit(FAILED)


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


@app.command()
def select(
    model: Annotated[str, typer.Option(help="Folder or Hub id of the base model.")],
    saes: Annotated[str, typer.Option(help="sae-lens release, or folder of SAEs.")],
    aligned: Annotated[str, typer.Option(help="JSONL file of texts to move towards.")],
    unaligned: Annotated[str, typer.Option(help="JSONL file of texts to move away from.")],
    output: Annotated[Path, typer.Option(help="Folder that the Subspace is written to.")],
    ids: Annotated[list[str] | None, typer.Option("--id", help="SAE of the release; repeat for more.")] = None,
    layers: Annotated[list[int] | None, typer.Option("--layer", help="Block, instead of --id; repeat.")] = None,
    selector: Annotated[str, typer.Option(help="How features are scored.")] = "mean_difference",
    top_k: Annotated[int, typer.Option(help="Features per SAE.")] = 64,
    variance: Annotated[float, typer.Option(help="Share of variance that the basis keeps.")] = 0.8,
    tokens: Annotated[str, typer.Option(help="Tokens that count: all, prompt or response.")] = "all",
    batch_size: Annotated[int, typer.Option(help="Texts per forward pass.")] = 8,
    max_length: Annotated[int | None, typer.Option(help="Tokens per text; longer ones are cut.")] = None,
    protect: Annotated[
        list[str] | None, typer.Option(help="Feature that the update must not use, such as 12:4051; repeat.")
    ] = None,
    protect_contrast: Annotated[
        tuple[str, str] | None,
        typer.Option(help="Instead: two JSONL files that differ only in what the update is to ignore."),
    ] = None,
    protect_top_k: Annotated[int, typer.Option(help="Features per SAE that the contrast protects.")] = 16,
    dtype: Annotated[str | None, typer.Option(help="dtype to load the model in, for example bfloat16.")] = None,
    device: Annotated[str, typer.Option(help="Device for model and SAEs.")] = "cpu",
    statistics: Annotated[Path | None, typer.Option(help="Also write the statistics, to this folder.")] = None,
    quiet: Quiet = False,
) -> None:
    """Choose SAE features with two sets of text, build their basis, and write both as a Subspace.

    Example: `peft-sae select --model google/gemma-2-2b --saes gemma-scope-2b-pt-res-canonical
    --id layer_10/width_16k/canonical --aligned good.jsonl --unaligned bad.jsonl --output outputs/subspace`
    """
    from ..artifact import check_target
    from ..sae import load_saes
    from ..selection import select_features
    from ..statistics import FeatureStatistics, collect_statistics
    from ..statistics.records import check_data
    from ..statistics.statistics import STATISTICS_FILES
    from ..subspace.artifact import SUBSPACE_FILES
    from ..subspace.build import subspace_from_selection
    from ..subspace.protect import find_protected, protected_ids
    from ..training.job import load_model
    from .tables import print_features

    if protect and protect_contrast:
        raise ConfigError("--protect and --protect-contrast both say what is protected. Use one of the two.")
    check_target(output, owned=SUBSPACE_FILES)
    if statistics is not None:
        check_target(statistics, owned=STATISTICS_FILES)
    check_data(aligned, "aligned")
    check_data(unaligned, "unaligned")
    handles = load_saes(saes, ids=ids or None, layers=layers or None, device=device)
    if protect:
        protected_ids(protect, handles)
    base, tokenizer = load_model(model, dtype=dtype)
    base.to(device)

    def collect(first: str, second: str) -> FeatureStatistics:
        return collect_statistics(
            base,
            tokenizer,
            {"aligned": first, "unaligned": second},
            handles,
            tokens=tokens,  # type: ignore[arg-type]  # checked there, with a better message than Typer's
            batch_size=batch_size,
            max_length=max_length,
            progress=not quiet,
        )

    guarded = find_protected(
        protect_contrast or protect,
        handles,
        lambda first, second: select_features(collect(str(first), str(second)), top_k=protect_top_k),
    )
    collected = collect(aligned, unaligned)
    if statistics is not None:
        collected.save_pretrained(statistics)
    selection = select_features(collected, selector=selector, top_k=top_k)
    subspace = subspace_from_selection(base, tokenizer, selection, handles, variance=variance, protect=guarded)
    subspace.save_pretrained(output)
    print_features(subspace)
    Console().print(f"Subspace written to {output}", markup=False)


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML file of the job; see configs/.")],
    model: Annotated[str | None, typer.Option(help="Overrides the file's.")] = None,
    data: Annotated[str | None, typer.Option(help="Overrides the file's.")] = None,
    subspace: Annotated[str | None, typer.Option(help="Overrides the file's.")] = None,
    output: Annotated[str | None, typer.Option(help="Overrides the file's.")] = None,
    quiet: Quiet = False,
) -> None:
    """Train an adapter as a YAML file describes.

    Example: `peft-sae train configs/gemma-2-2b.yaml --output outputs/adapter`
    """
    from ..training import read_job, run_job

    job = read_job(config, model=model, data=data, subspace=subspace, output=output)
    Console().print(f"Adapter written to {run_job(job, progress=not quiet)}", markup=False)


@app.command()
def merge(
    base: Annotated[str, typer.Argument(help="Folder or Hub id of the base model.")],
    adapter: Annotated[Path, typer.Argument(help="Folder of the adapter.")],
    output: Annotated[Path, typer.Argument(help="Folder for the merged checkpoint.")],
    dtype: Annotated[str | None, typer.Option(help="dtype of the result; by default the base's.")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest size of one weights file.")] = "5GB",
) -> None:
    """Merge an adapter into its base model and write a plain checkpoint.

    Example: `peft-sae merge google/gemma-2-2b outputs/adapter outputs/merged`
    """
    from ..export import merge_checkpoint

    path = merge_checkpoint(base, adapter, output, dtype=dtype, max_shard_size=max_shard_size)
    Console().print(f"Merged checkpoint written to {path}", markup=False)


@app.command("export-lora")
def export_lora_command(
    adapter: Annotated[Path, typer.Argument(help="Folder of the adapter.")],
    output: Annotated[Path, typer.Argument(help="Folder for the plain LoRA adapter.")],
) -> None:
    """Write an adapter as plain LoRA, which PEFT loads without this package.

    Example: `peft-sae export-lora outputs/adapter outputs/lora`
    """
    from ..export import export_lora

    Console().print(f"LoRA adapter written to {export_lora(adapter, output)}", markup=False)
