"""Time and memory of `merge_checkpoint` on a Gemma-2-2B-shaped checkpoint, beside copying it and PEFT's own way.

    python -m benchmarks.merge.run [--folder DIR] [--repetitions 5] [--targets qv|all]

The base (26 blocks, 5 GB in bfloat16, random weights) and the adapter (r = 32) are made in a folder first. Every run is
a fresh process, and the kinds take turns: `ours`, `copy` (`shutil.copytree` of the base), `arithmetic` (ours without
writing: the time in PEFT's layers counts) and `peft` (`from_pretrained`, `merge_and_unload`, `save_pretrained`, in
bfloat16, which rounds twice). The ratio is that of `ours` to `copy` and `arithmetic` together, without imports.
Results are removed outside the time that is measured.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model

import peft_sae
from benchmarks.common import circumstances, make_subspace
from benchmarks.injection.run import make_model

_BLOCKS, _RANK, _FEATURES = (5, 10, 15, 20), 32, 64
_TARGETS = {"qv": ["q_proj", "v_proj"], "all": "all-linear"}
_MOST_BYTES, _MOST_RATIO = 1_500_000_000, 1.25

_HEAD = """
import json, sys, time
start = time.perf_counter()
from pathlib import Path
base, adapter, output = sys.argv[1:]
"""
_TAIL = """
end = time.perf_counter()
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
peak = int(status["VmHWM"].split()[0]) * 1024
print(json.dumps({"import": ready - start, "seconds": end - ready, "arithmetic": arithmetic, "peak_bytes": peak}))
"""
_OURS = """
import peft, torch, transformers
from peft_sae import merge_checkpoint
from peft_sae.export import stream
arithmetic, original = 0.0, stream.merge_layers
def timed(layers):
    global arithmetic
    before = time.perf_counter()
    original(layers)
    arithmetic += time.perf_counter() - before
stream.merge_layers = timed
"""
_KINDS = {
    "copy": """
import shutil
ready, arithmetic = time.perf_counter(), 0.0
shutil.copytree(base, output)
""",
    "ours": _OURS
    + """
ready = time.perf_counter()
merge_checkpoint(base, adapter, output)
""",
    "arithmetic": _OURS
    + """
stream._copy = stream._write = lambda *arguments: 0
ready = time.perf_counter()
merge_checkpoint(base, adapter, output)
""",
    "peft": """
import peft, torch, transformers
import peft_sae
from peft import PeftModel
from transformers import AutoModelForCausalLM
ready, arithmetic = time.perf_counter(), 0.0
model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(output)
""",
}


def make_files(folder: Path, targets: str, seed: int) -> Path:
    """Write base and adapter, if they are not there yet; return the adapter."""
    adapter = folder / f"adapter-{targets}"
    if adapter.is_dir():
        return adapter
    model = make_model("cpu")
    if not (folder / "base").is_dir():
        model.save_pretrained(folder / "base")
    subspace = make_subspace(model, _BLOCKS, rank=_RANK, features=_FEATURES, seed=seed)
    fields = {"r": _RANK, "target_modules": _TARGETS[targets], "task_type": "CAUSAL_LM"}
    adapted = get_peft_model(model, peft_sae.SaeSubspaceConfig(**fields, subspace=subspace))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data += 0.01 * torch.randn(parameter.shape, generator=generator)
    adapted.save_pretrained(adapter)
    return adapter


def measure(base: Path, adapter: Path, scratch: Path, repetitions: int) -> dict[str, Any]:
    """Run the kinds in turns and return medians."""
    runs: dict[str, list[dict[str, float]]] = {kind: [] for kind in _KINDS}
    for repetition in range(repetitions + 1):
        for kind, code in _KINDS.items():
            output = scratch / "output"
            command = [sys.executable, "-c", _HEAD + code + _TAIL, str(base), str(adapter), str(output)]
            text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            shutil.rmtree(output)
            if repetition:  # the first round warms the page cache
                runs[kind].append(json.loads(text.splitlines()[-1]))
    ratios = [
        ours["seconds"] / (copy["seconds"] + alone["arithmetic"])
        for ours, copy, alone in zip(runs["ours"], runs["copy"], runs["arithmetic"], strict=True)
    ]
    medians = {
        kind: {key: statistics.median(run[key] for run in kind_runs) for key in kind_runs[0]}
        for kind, kind_runs in runs.items()
    }
    for kind, kind_runs in runs.items():
        medians[kind]["peak_bytes"] = max(run["peak_bytes"] for run in kind_runs)
    ours, limit = medians["ours"], medians["copy"]["seconds"] + medians["arithmetic"]["arithmetic"]
    return {
        "ratio of medians": round(ours["seconds"] / limit, 3),
        "median of ratios": round(statistics.median(ratios), 3),
        "peft to ours": round(medians["peft"]["seconds"] / ours["seconds"], 2),
        "medians": {kind: {key: round(value, 3) for key, value in found.items()} for kind, found in medians.items()},
        "seconds": {kind: [round(run["seconds"], 2) for run in kind_runs] for kind, kind_runs in runs.items()},
    }


def main() -> None:
    """Run the benchmark and write its result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="Where base and adapter are, or are made. [default: temporary]")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--targets", choices=sorted(_TARGETS), default="qv")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    before = circumstances(arguments.seed, "cpu")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        folder = arguments.folder or Path(scratch)
        adapter = make_files(folder, arguments.targets, arguments.seed)
        found = measure(folder / "base", adapter, Path(scratch), arguments.repetitions)
    result = {
        "benchmark": f"merge_checkpoint, Gemma-2-2B shape in bfloat16, {_TARGETS[arguments.targets]}, r={_RANK}",
        **before,
        "asked": {"peak_bytes": _MOST_BYTES, "ratio": _MOST_RATIO},
        **found,
    }
    target = Path(__file__).parent / f"result-{arguments.targets}-cpu.json"
    target.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
