"""Tables and plots of the safety benchmark, from the rows that its runs have written."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import summary
from benchmarks.safety.attack import PrefixAttack, attack_name
from benchmarks.safety.catalogue import DANGEROUS, Extent, methods
from benchmarks.safety.rows import commits

# The headline: kinds of danger that fine-tuning does not have, asked for in the style of the harmless.
OUT, OUT_HELP = "safety, unseen kinds, cue swapped", "helpfulness, cue swapped"
VALIDATION = "validation"  # what rates and defaults are chosen by
_SAFETY = (VALIDATION, "safety", "safety, cue swapped", "safety, unseen kinds", OUT, "helpfulness", OUT_HELP)
_PRICE = ("over-refusal", "over-refusal, cue swapped", "harmless questions right", "corpus loss")
_ATTACK = (*(attack_name(rounds) for rounds in PrefixAttack.reports), attack_name(None))
_HEADS = {
    "safety": "safety",
    "safety, cue swapped": "cue swapped",
    "safety, unseen kinds": "unseen kinds",
    OUT: "unseen kinds, cue swapped",
    "over-refusal, cue swapped": "cue swapped",
}
_PEERS = ("full fine-tuning", "LoRA")

Rows = Sequence[Mapping[str, Any]]


def per_base(rows: Rows, column: str) -> dict[int, float]:
    """Mean of a measure, or of the validation score, over the draws of each base that have it."""
    found: dict[int, list[float]] = {}
    for row in rows:
        measured = {**row["measures"], VALIDATION: row.get(VALIDATION)}
        if measured.get(column) is not None:
            found.setdefault(row["base"], []).append(measured[column])
    return {base: sum(values) / len(values) for base, values in sorted(found.items())}


def of_method(rows: Rows, method: str, dangerous: int) -> Rows:
    """The rows of one method with so many dangerous topics."""
    return [row for row in rows if row["method"] == method and row["dangerous"] in (dangerous, 1)]


def paired(rows: Rows, other: Rows, column: str) -> dict[str, float]:
    """Difference of two methods' means over the bases that both have, with its bootstrap interval."""
    ours, theirs = per_base(rows, column), per_base(other, column)
    return summary([ours[base] - theirs[base] for base in ours if base in theirs])


def cell(column: str, found: Mapping[str, float], sign: str = "") -> str:
    """Mean and interval: shares in percent, the loss in nats."""
    form, scale = (f"{sign}.3f", 1) if column == "corpus loss" else (f"{sign}.0f", 100)
    mean, low, high = (format(scale * found[name], form) for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def points(found: Mapping[str, float]) -> str:
    """A difference of shares and its interval, in points."""
    return f"{100 * found['mean']:+.1f} [{100 * found['low']:+.1f}, {100 * found['high']:+.1f}]"


def mean_cell(rows: Rows, column: str) -> str:
    """Mean of a measure over bases, and its interval; a dash without any."""
    values = list(per_base(rows, column).values())
    return cell(column, summary(values)) if values else "-"


def table(rows: Rows, name: str) -> str:
    """Return a table as Markdown: means over bases and draws, with bootstrap 95 % intervals over the bases."""
    parts = [(_SAFETY, ()), (_PRICE, ("trained", "ms per step")), (_ATTACK, ())]
    return "\n\n".join(_part(rows, name, columns, about) for columns, about in parts)


def _part(rows: Rows, name: str, columns: Sequence[str], about: Sequence[str]) -> str:
    heads = ["method", "topics", *about, *(_HEADS.get(column, column) for column in columns)]
    lines = [line(heads), "|---" * len(heads) + "|"]
    for method, dangerous in (("base", 1), *((each.name, each.dangerous) for each in methods(name))):
        group = of_method(rows, method, dangerous)
        if not group:
            continue
        cells = [method, str(dangerous) if method != "base" else "-"]
        if about:
            trained = [row["trained_share"] for row in group if "trained_share" in row]
            # The fastest of the runs, as two run at a time and disturb each other.
            steps = [row["seconds_per_step"] for row in group if "seconds_per_step" in row]
            cells += [f"{100 * trained[0]:.1f} %" if trained else "-", f"{1000 * min(steps):.0f}" if steps else "-"]
        cells += [mean_cell(group, column) for column in columns]
        lines.append(line(cells))
    return "\n".join(lines)


def comparison(rows: Rows, name: str) -> str:
    """Return the differences to full fine-tuning and to LoRA as Markdown, paired by base."""
    columns = ("safety", OUT, OUT_HELP, "corpus loss")
    peers = [peer for peer in _PEERS if any(row["method"] == peer for row in rows)]
    heads = ["method", "topics", *(f"{_HEADS.get(each, each)}: minus {peer}" for each in columns for peer in peers)]
    lines = [line(heads), "|---" * len(heads) + "|"]
    for method in methods(name):
        group = of_method(rows, method.name, method.dangerous)
        others = [of_method(rows, peer, method.dangerous) for peer in peers]
        if group and all(others):
            cells = [cell(column, paired(group, other, column), "+") for column in columns for other in others]
            lines.append(line([method.name, str(method.dangerous), *cells]))
    return "\n".join(lines)


def line(cells: Sequence[str]) -> str:
    """A line of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def by_validation(rows: Rows, name: str, reference: str) -> str:
    """Return, as Markdown, how far each method's validation score is from a reference's, paired by base, best first."""
    lines = [line(["changed", f"validation score: minus {reference}"]), "|---|---|"]
    lines += [line([changed, points(gap)]) for changed, gap in changes(rows, name, reference, VALIDATION).items()]
    return "\n".join(lines)


def changes(rows: Rows, name: str, reference: str, column: str) -> dict[str, dict[str, float]]:
    """Every method's difference to a reference, paired by base, the greatest validation score first."""
    own = of_method(rows, reference, DANGEROUS)
    groups = {
        method.name: group
        for method in methods(name)
        if method.name != reference and (group := of_method(rows, method.name, method.dangerous))
    }
    order = sorted(groups, key=lambda changed: -paired(groups[changed], own, VALIDATION)["mean"])
    return {changed: paired(groups[changed], own, column) for changed in order}


def rows_of_table(rows: Rows, name: str, extent: Extent) -> Rows:
    """The rows of a table's methods, on its own bases and draws."""
    wanted = {("base", 1), *((method.name, method.dangerous) for method in methods(name))}
    return [
        row
        for row in rows
        if row["base"] in extent.seeds and row["draw"] < extent.draws and (row["method"], row["dangerous"]) in wanted
    ]


def write_report(folder: Path, tables: Mapping[str, Extent], rows: Rows, about: Mapping[str, Any]) -> None:
    """Write what each table has as JSON, Markdown and plots, and print the tables.

    Args:
        folder: for what is written.
        tables: what each was run on.
        rows: of all tables.
        about: what else a result says of its making.
    """
    rows = sorted(rows, key=lambda row: (row["base"], row["draw"]))
    for name, extent in tables.items():
        own = rows_of_table(rows, name, extent)
        minutes = round(sum(row["seconds"] for row in own) / 60, 1)
        result = {
            "benchmark": f"safety after fine-tuning: {name}",
            **about,
            "bases": len(extent.seeds),
            "draws": extent.draws,
            "core_minutes": minutes,
            "commits": commits(own),
            "rows": own,
        }
        (folder / f"result-{name}.json").write_text(json.dumps(result, indent=1) + "\n")
        text = f"{table(own, name)}\n"
        if any(row["method"] == "LoRA" for row in own):
            text += f"\nDifferences, paired by base:\n\n{comparison(own, name)}\n"
        if name == "parts":
            text += f"\nWhat defaults are chosen by:\n\n{by_validation(own, name, methods(name)[0].name)}\n"
        (folder / f"table-{name}.md").write_text(text)
        print(text)
        from benchmarks.safety import plotting

        if name == "efficiency":
            plotting.plot_efficiency(own, folder / "efficiency")
        elif name == "parts":
            plotting.plot_changes(own, name, methods(name)[0].name, folder / "changes")
        else:
            plotting.plot_frontier(own, name, folder / f"frontier-{name}")
