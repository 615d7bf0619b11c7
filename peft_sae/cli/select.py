"""The command `select`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..errors import ConfigError


def select(
    config: Annotated[str | None, typer.Option(help="YAML file with any of these; see configs/selection.")] = None,
    model: Annotated[str | None, typer.Option(help="Folder or Hub id of the base model.")] = None,
    saes: Annotated[str | None, typer.Option(help="sae-lens release, or folder of SAEs.")] = None,
    ids: Annotated[list[str] | None, typer.Option("--id", help="SAE of the release; repeat for more.")] = None,
    layers: Annotated[list[int] | None, typer.Option("--layer", help="Block, instead of --id; repeat.")] = None,
    aligned: Annotated[str | None, typer.Option(help="JSONL file of texts to move towards.")] = None,
    unaligned: Annotated[str | None, typer.Option(help="JSONL file of texts to move away from.")] = None,
    preferences: Annotated[
        str | None, typer.Option(help="Instead of both: JSONL file of records with 'chosen' and 'rejected'.")
    ] = None,
    from_statistics: Annotated[
        str | None, typer.Option(help="Instead of texts: statistics of an earlier run. The model is not run.")
    ] = None,
    statistics: Annotated[
        str | None, typer.Option(help="Also write the statistics, to this folder. A killed run goes on from its state.")
    ] = None,
    output: Annotated[str | None, typer.Option(help="Folder that the Subspace is written to.")] = None,
    selector: Annotated[
        str | None, typer.Option(help="How features are scored: mean_difference (default), effect_size, auroc, ...")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Features per SAE. [default: 64]")] = None,
    variance: Annotated[
        float | None, typer.Option(help="Share of variance that the basis keeps. [default: 0.8]")
    ] = None,
    features: Annotated[
        list[str] | None, typer.Option("--feature", help="Feature for --selector explicit, such as 12:4051; repeat.")
    ] = None,
    direction: Annotated[
        str | None, typer.Option(help="Features with more on 'aligned' texts, on 'unaligned' ones, or 'both'.")
    ] = None,
    min_firing_rate: Annotated[float | None, typer.Option(help="Drop features that fire less often.")] = None,
    max_firing_rate: Annotated[float | None, typer.Option(help="Drop features that fire more often on both.")] = None,
    max_cosine: Annotated[float | None, typer.Option(help="Drop features this parallel to a better one.")] = None,
    max_q: Annotated[float | None, typer.Option(help="Share of false discoveries to allow.")] = None,
    drop: Annotated[list[str] | None, typer.Option(help="Feature never to choose, such as 12:4051; repeat.")] = None,
    keep: Annotated[list[str] | None, typer.Option(help="Feature to choose whatever its score; repeat.")] = None,
    retain: Annotated[str | None, typer.Option(help="JSONL file of texts whose features are to be left alone.")] = None,
    retain_by: Annotated[str | None, typer.Option(help="'exclude' them from the basis, or 'protect' them.")] = None,
    retain_ratio: Annotated[
        float | None, typer.Option(help="Mean there, in those of the two sets, from which it counts. [default: 0.5]")
    ] = None,
    protect: Annotated[
        list[str] | None, typer.Option(help="Feature that the update must not use, such as 12:4051; repeat.")
    ] = None,
    protect_contrast: Annotated[
        tuple[str, str] | None,
        typer.Option(help="Instead: two JSONL files that differ only in what the update is to ignore."),
    ] = None,
    protect_top_k: Annotated[int | None, typer.Option(help="Features per SAE that the contrast protects.")] = None,
    protect_max_q: Annotated[float | None, typer.Option(help="Largest q-value of those.")] = None,
    tokens: Annotated[
        str | None, typer.Option(help="Tokens that count: all, prompt, response or assistant. [default: all]")
    ] = None,
    pooling: Annotated[
        str | None, typer.Option(help="What one observation is: token, or an example's mean, max or last.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Texts per forward pass. [default: 8]")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens per text; longer ones are cut.")] = None,
    measures: Annotated[
        list[str] | None,
        typer.Option(
            "--measure",
            help="Keep more in the statistics for later selections: histograms (auroc), sample (probe), covariance "
            "(difference_pca); repeat.",
        ),
    ] = None,
    texts: Annotated[int | None, typer.Option(help="Texts per feature and class to show: its most active.")] = None,
    table: Annotated[Path | None, typer.Option(help="Also write the table, as .html, .md, .csv or .json.")] = None,
    labels: Annotated[Path | None, typer.Option(help="File of labels of features (JSON, JSONL or CSV).")] = None,
    fetch_labels: Annotated[
        bool, typer.Option("--fetch-labels", help="Ask Neuronpedia for labels. Never fails the run.")
    ] = False,
    control: Annotated[
        str | None,
        typer.Option(
            help="Instead of features: random, neurons, difference_pca or mean_difference, of the same ranks."
        ),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="dtype to load the model in, for example bfloat16.")] = None,
    device: Annotated[str | None, typer.Option(help="Device for model and SAEs, or 'auto'. [default: cpu]")] = None,
    seed: Annotated[int | None, typer.Option(help="For what is random. [default: 0]")] = None,
    rows: Annotated[int, typer.Option(help="Rows to print per hook point.")] = 8,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bars.")] = False,
) -> None:
    """Choose SAE features with two sets of text, build their basis, and write it as a Subspace.

    Example: `peft-sae select --config configs/selection/gemma-2-2b.yaml --aligned good.jsonl --unaligned bad.jsonl
    --output outputs/subspace`
    """
    from ..jobs.selection import SelectionJob, read_selection
    from ..jobs.selection_run import run_selection
    from ..selection.labels import fetch_labels as ask_neuronpedia
    from ..selection.labels import read_labels
    from ..selection.table import SUFFIXES, describe_features
    from ..writing import check_suffix
    from .tables import print_features

    given = {name: value for name, value in locals().items() if name in SelectionJob.__dataclass_fields__}
    job = read_selection(config, **given)
    if table is not None:
        check_suffix(table, SUFFIXES)
        if job.control is not None:
            raise ConfigError("--table describes features, and a --control has none. Leave one of the two out.")
    known = {} if labels is None else read_labels(labels)
    result = run_selection(job, progress=not quiet)
    if job.control is not None:
        Console().print(f"Control {job.control!r} instead of the chosen features:", markup=False)
        print_features(result.subspace, per_site=rows)
        Console().print(f"Subspace written to {job.output}", markup=False)
        return
    if fetch_labels:
        known = {**ask_neuronpedia(result.selection), **known}
    shown = describe_features(
        result.selection,
        saes=result.saes,
        model=result.model,
        tokenizer=result.tokenizer,
        statistics=result.statistics,
        data=result.data if result.statistics.has_texts and result.data else None,
        labels=known,
    )
    print_features(shown, result.subspace, per_site=rows)
    if table is not None:
        shown.save(table)
        Console().print(f"Table written to {table}", markup=False)
    Console().print(f"Subspace written to {job.output}", markup=False)
