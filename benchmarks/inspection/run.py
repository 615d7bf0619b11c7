"""Time, memory and report size of `inspect_adapter` on a Gemma-2-2B-shaped adapter, without data.

    python -m benchmarks.inspection.run [--folder DIR] [--repetitions 5] [--saes]

The base (26 blocks, 5 GB in bfloat16, random weights) and the adapter (q_proj and v_proj of all layers, r = 32, a
Subspace of 64 features at 4 layers) are made in a folder first. Each inspection is a fresh process, which writes the
HTML report too; imports are part of its time. With `--saes` it is also given the four 16k-wide SAEs, in bfloat16, so
that all of their features are measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model

import peft_sae
from benchmarks.common import circumstances, make_subspace
from benchmarks.injection.run import make_model

_BLOCKS, _RANK, _FEATURES, _WIDTH = (5, 10, 15, 20), 32, 64, 16384
_MOST_SECONDS, _MOST_BYTES, _MOST_REPORT = 20, 2_000_000_000, 6_000_000

_INSPECT = """
import json, sys, time
start = time.perf_counter()
from pathlib import Path
import torch
from peft_sae import inspect_adapter
imported = time.perf_counter()
folder, with_saes = Path(sys.argv[1]), sys.argv[2] == "True"
saes = None
if with_saes:
    from benchmarks.inspection.run import make_saes
    saes = make_saes()
ready = time.perf_counter()
found = inspect_adapter(folder / "adapter", saes=saes, progress=False)
measured = time.perf_counter()
found.save(folder / "report.html")
end = time.perf_counter()
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(json.dumps({
    "seconds": {"import": imported - start, "saes": ready - imported, "inspect": measured - ready,
                "report": end - measured, "all": end - start - (ready - imported)},
    "peak_bytes": int(status["VmHWM"].split()[0]) * 1024,
    "report_bytes": (folder / "report.html").stat().st_size,
    "modules": len(found.modules), "features": len(found.features), "in_basis": found.summary["in_basis"],
}))
"""


def make_saes() -> list[Any]:
    """Random SAEs of the size of Gemma Scope's, in bfloat16."""
    from sae_lens import StandardSAE, StandardSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    found = []
    for block in _BLOCKS:
        metadata = SAEMetadata(hook_name=f"blocks.{block}.hook_resid_pre", prepend_bos=True)
        sae = StandardSAE(StandardSAEConfig(d_in=2304, d_sae=_WIDTH, dtype="bfloat16", metadata=metadata))
        sae.W_dec.data.normal_(generator=torch.Generator().manual_seed(block))
        found.append(sae)
    return found


def make_files(folder: Path, seed: int) -> None:
    """Write base and adapter, if they are not there yet."""
    if (folder / "adapter").is_dir():
        return
    model = make_model("cpu")
    model.save_pretrained(folder / "base")
    subspace = make_subspace(model, _BLOCKS, rank=_RANK, features=_FEATURES, seed=seed)
    fields = {"r": _RANK, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    adapted = get_peft_model(model, peft_sae.SaeSubspaceConfig(**fields, subspace=subspace))
    adapted.peft_config["default"].base_model_name_or_path = str(folder / "base")
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data += 0.01 * torch.randn(parameter.shape, generator=generator)
    adapted.save_pretrained(folder / "adapter")


def measure(folder: Path, repetitions: int, *, saes: bool) -> dict[str, Any]:
    """Medians over fresh processes."""
    runs = []
    for _ in range(repetitions):
        command = [sys.executable, "-c", _INSPECT, str(folder), str(saes)]
        start = time.perf_counter()
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        runs.append(json.loads(output.splitlines()[-1]))
        runs[-1]["seconds"]["process"] = time.perf_counter() - start
    seconds = {name: round(statistics.median(run["seconds"][name] for run in runs), 2) for name in runs[0]["seconds"]}
    return {
        "seconds": seconds,
        "peak_bytes": max(run["peak_bytes"] for run in runs),
        **{name: runs[-1][name] for name in ("report_bytes", "modules", "features", "in_basis")},
        "all_seconds": [round(run["seconds"]["all"], 2) for run in runs],
    }


def main() -> None:
    """Run the benchmark and write its result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="Where base and adapter are, or are made. [default: temporary]")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--saes", action="store_true", help="Also with SAEs, for all of their features.")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    before = circumstances(arguments.seed, "cpu")
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch)
        make_files(folder, arguments.seed)
        found = {"adapter alone": measure(folder, arguments.repetitions, saes=False)}
        if arguments.saes:
            found["with 4 SAEs of 16k features"] = measure(folder, arguments.repetitions, saes=True)
    result = {
        "benchmark": "inspect_adapter and its report, Gemma-2-2B shape, q_proj and v_proj, r=32, no data",
        **before,
        "asked": {"seconds": _MOST_SECONDS, "peak_bytes": _MOST_BYTES, "report_bytes": _MOST_REPORT},
        **found,
    }
    target = Path(__file__).parent / "result-cpu.json"
    target.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
