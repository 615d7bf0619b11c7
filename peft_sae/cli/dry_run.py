"""A dry run in the terminal."""

from __future__ import annotations

from collections import defaultdict

from rich.console import Console
from rich.table import Table

from ..jobs.dry_run import DryRun, PlannedModule
from ..layout import Site


def print_dry_run(plan: DryRun, console: Console) -> None:
    """Print targets, sides, ranks, the share of trained parameters and the expected memory.

    Args:
        plan: what was found.
        console: where to print.
    """
    console.print(_targets(plan))
    console.print(
        f"{plan.model}: {plan.trained:,} of {plan.total:,} parameters are trained, {100 * plan.share:.2f} %",
        markup=False,
        highlight=False,
    )
    console.print(f"Expected memory of one device, {plan.batch} x {plan.length:,} tokens a step:", highlight=False)
    console.print(_memory(plan))
    console.print("Without the loss, the kernels' own memory and fragmentation; not sharded.", highlight=False)
    for note in plan.notes:
        console.print(f"- {note}", markup=False, highlight=False)
    console.print("No weights were loaded, and nothing was written.", highlight=False)


def _targets(plan: DryRun) -> Table:
    table = Table()
    for name in ("module", "side", "basis from", "blocks"):
        table.add_column(name)
    table.add_column("rank", justify="right")
    table.add_column("trained", justify="right")
    groups: dict[tuple[str, str, str, int], list[PlannedModule]] = defaultdict(list)
    for module in plan.modules:
        groups[_ending(module.name), module.side, module.hook_name or "-", module.rank].append(module)
    for (ending, side, hook, rank), modules in groups.items():
        trained = sum(module.trained for module in modules)
        table.add_row(ending, side, _short(hook), _blocks(modules), str(rank), f"{trained:,}")
    return table


def _memory(plan: DryRun) -> Table:
    table = Table()
    table.add_column("")
    table.add_column("GB", justify="right")
    rows = {
        "base weights": plan.memory.weights,
        "adapter": plan.memory.adapter,
        "gradients": plan.memory.gradients,
        "optimiser": plan.memory.optimizer,
        "activations": plan.memory.activations,
    }
    for name, size in rows.items():
        table.add_row(name, "?" if size is None else f"{size / 1e9:.2f}")
    table.add_section()
    table.add_row("together", f"{plan.memory.total / 1e9:.2f}")
    return table


def _ending(name: str) -> str:
    """A module's name within its block."""
    parts = name.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[numbers[0] + 1 :]) if numbers else name


def _short(hook: str) -> str:
    if hook == "-":
        return hook
    site = Site.from_hook_name(hook)
    return f"{site.block}: {site.kind}"


def _blocks(modules: list[PlannedModule]) -> str:
    """Numbers of blocks, those that follow one another as a span."""
    numbers = sorted(int(part) for module in modules for part in module.name.split(".") if part.isdigit())
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
