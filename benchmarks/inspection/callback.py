"""What `SubspaceCallback` costs, as a share of the steps between two of its entries.

    python -m benchmarks.inspection.callback [--repetitions 9]

Steps (as in `benchmarks.training`, 4 x 128 tokens) and measurements are timed in turn in one process.
"""

from __future__ import annotations

import argparse
import inspect
import json
import statistics
import time
from pathlib import Path

import torch

from benchmarks.common import circumstances
from benchmarks.training.run import make_adapters, step_seconds
from peft_sae import SubspaceCallback
from peft_sae.inspect.monitor import SubspaceMonitor

_EVERY = inspect.signature(SubspaceCallback).parameters["every"].default
_MOST = 0.01


def main() -> None:
    """Run the benchmark and write its result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    before = circumstances(arguments.seed, device)
    found = {}
    for targets in ("all-linear", "q_v"):
        model = make_adapters(arguments.seed, device, targets)["sae_subspace"]
        monitor = SubspaceMonitor(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        ids = torch.randint(8000, (4, 128), generator=torch.Generator().manual_seed(0)).to(device)
        steps, measurements = [], []
        for _ in range(arguments.repetitions + 1):
            steps.append(step_seconds(model, optimizer, ids))
            start = time.perf_counter()
            monitor.measure()
            measurements.append(time.perf_counter() - start)
        step, measurement = statistics.median(steps[1:]), statistics.median(measurements[1:])
        found[targets] = {
            "step_seconds": round(step, 4),
            "measure_seconds": round(measurement, 4),
            "share_of_step_time": round(measurement / (_EVERY * step), 5),
        }
    result = {"benchmark": "SubspaceCallback", **before, "every": _EVERY, "asked": _MOST, **found}
    (Path(__file__).parent / f"result-callback-{device}.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
