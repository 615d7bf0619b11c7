"""Every benchmark of time and memory in one report of ratios.

    python -m benchmarks.speed.report [--run]

With `--run` the benchmarks are run first, one after another (about an hour and a half on two cores); without it, the
report is of the results as they lie beside the benchmarks. Each of them runs ours and the peer in turn and takes
medians; a ratio is time or bytes of ours over those of the peer, so less is better. The GPU part needs CUDA, and says
so where there is none.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).parents[1]
COMMANDS = (
    "benchmarks.training.run --targets q_v",
    "benchmarks.training.run --targets all-linear",
    "benchmarks.selection.run",
    "benchmarks.injection.run",
    "benchmarks.speed.start",
    "benchmarks.speed.load",
    "benchmarks.merge.run --targets qv",
    "benchmarks.merge.run --targets all",
    "benchmarks.inspection.run",
    "benchmarks.speed.gpu --shapes gemma-2-2b gemma-2-9b llama-3.1-8b",
)
_KINDS = {"sae_subspace": "SAE_SUBSPACE", "sae_subspace_frozen": "frozen", "sae_subspace_protect": "with protect"}


@dataclass(frozen=True)
class Ratio:
    """One line of the report.

    Attributes:
        stage: of the work.
        what: is measured.
        peer: that it is measured beside.
        ratio: ours over the peer's.
        source: result file.
        device: that it ran on.
        asked: the most that was asked for; None where nothing was.
    """

    stage: str
    what: str
    peer: str
    ratio: float
    source: Path
    device: str
    asked: float | None = None


def read(name: str) -> tuple[Path, dict[str, Any]]:
    """A result file by its path below `benchmarks`, and what is in it; nothing where it is not there."""
    path = BENCHMARKS / name
    return path, json.loads(path.read_text()) if path.is_file() else {}


def ratios() -> list[Ratio]:
    """Every ratio whose result is there."""
    return [*_training(), *_selection(), *_start(), *_load(), *_merge(), *_gpu()]


def _training() -> Iterator[Ratio]:
    for targets in ("q_v", "all-linear"):
        path, found = read(f"training/result-{targets}-cpu.json")
        for kind, name in _KINDS.items():
            for what, label in (("step_seconds", "step time"), ("saved_for_backward_bytes", "saved activations")):
                if found:
                    value = found["ratio_to_lora"][what][kind]
                    yield Ratio("training", f"{label}, {targets}, {name}", "LoRA", value, path, found["device"])


def _selection() -> Iterator[Ratio]:
    peers = ("run_with_cache_with_saes", "the same, no error terms", "run_with_cache, then encode")
    for size in ("small", "medium", "wide"):
        path, found = read(f"selection/result-{size}-cpu.json")
        for peer in peers if found else ():
            value = found["seconds"]["collect_statistics"] / found["seconds"][peer]
            yield Ratio("selection", f"statistics, {size}", f"sae-lens, {peer}", value, path, found["device"])


def _start() -> Iterator[Ratio]:
    path, found = read("speed/result-start-cpu.json")
    seconds = found.get("median_seconds", {})
    for ours in (name for name in seconds if name.startswith("sae_subspace")):
        for peer in (name for name in seconds if not name.startswith("sae_subspace")):
            asked = 1 / found["asked"][peer] if peer in found["asked"] else None
            what = ours.replace("sae_subspace_frozen", "frozen").replace("sae_subspace", "SAE_SUBSPACE")
            yield Ratio("start", what, peer, seconds[ours] / seconds[peer], path, found["device"], asked)


def _load() -> Iterator[Ratio]:
    path, found = read("speed/result-load-cpu.json")
    if found:
        value = found["import"]["ratio"]["peft and peft_sae"]
        yield Ratio("import", "peft and peft_sae", "peft", value, path, found["device"])
        for kind in ("sae_subspace", "sae_subspace_frozen"):
            yield Ratio("load", _KINDS[kind], "LoRA", found["load"]["ratio"][kind], path, found["device"])


def _merge() -> Iterator[Ratio]:
    for targets in ("qv", "all"):
        path, found = read(f"merge/result-{targets}-cpu.json")
        if found:
            asked, peers = found["asked"]["ratio"], found["medians"]
            value = found["ratio of medians"]
            yield Ratio("merge", f"time, {targets}", "copy and arithmetic", value, path, found["device"], asked)
            if "peft" in peers:
                for what in ("seconds", "peak_bytes"):
                    value = peers["ours"][what] / peers["peft"][what]
                    yield Ratio("merge", f"{what}, {targets}", "merge_and_unload", value, path, found["device"])


def _gpu() -> Iterator[Ratio]:
    starts = read("speed/result-start-cpu.json")[1].get("asked", {})
    for shape in ("gemma-2-2b", "gemma-2-9b", "llama-3.1-8b"):
        path, found = read(f"speed/result-{shape}-cuda.json")
        for part in found.get("training", []):
            for kind, name in _KINDS.items():
                for what, label in (("step_seconds", "step time"), ("peak_bytes", "peak memory")):
                    value = part["ratio_to_lora"][what][kind]
                    text = f"{label}, {shape}, {part['targets']}, {name}"
                    yield Ratio("training", text, "LoRA", value, path, found["device"])
        if "selection" in found:
            value = found["selection"]["ratio_to_forward"]["collect_statistics"]
            yield Ratio("selection", f"statistics, {shape}", "bare forward pass", value, path, found["device"])
        seconds = found.get("start", {}).get("seconds", {})
        for peer in ("lora", "olora", "pissa"):
            if seconds:
                value = seconds["sae_subspace"] / seconds[peer]
                asked = 1 / starts[peer] if peer in starts else None
                yield Ratio("start", f"SAE_SUBSPACE, {shape}", peer, value, path, found["device"], asked)


def table(found: list[Ratio]) -> str:
    """Return the report as Markdown."""
    lines = ["| stage | ours | beside | ratio | asked | device | result |", "|---|---|---|---|---|---|---|"]
    for each in found:
        asked = "" if each.asked is None else f"≤ {each.asked:.3g}: {'met' if each.ratio <= each.asked else 'missed'}"
        source = each.source.relative_to(BENCHMARKS).as_posix()
        cells = (each.stage, each.what, each.peer, f"{each.ratio:.3g}", asked, each.device, f"[{source}]({source})")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run what is asked for, and print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true", help="run the benchmarks first")
    if parser.parse_args().run:
        for command in COMMANDS:
            print(f"python -m {command}", flush=True)
            subprocess.run([sys.executable, "-m", *command.split()], check=True)
    print(table(ratios()))


if __name__ == "__main__":
    main()
