"""What a dry run expects a training to take in memory, beside what it takes on a GPU.

    python -m benchmarks.speed.planned [--shapes gemma-2-2b gemma-2-9b llama-3.1-8b]

The jobs are those of `configs/`, carried out by the code that `peft-sae train` runs, for three steps, on a base of
random bfloat16 weights and texts as long as the job admits. Without a CUDA device nothing is run, and one line says so.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import circumstances, make_subspace
from benchmarks.selection.world import Texts, make_tokenizer
from benchmarks.speed.gpu import CONFIGS, blocks_of, make_model
from peft_sae.jobs import read_job
from peft_sae.jobs.dry_run import plan_job
from peft_sae.training import train_adapter

_STEPS = 3


def measure(shape: str, seed: int) -> dict[str, Any]:
    """Expected and measured bytes of one job."""
    job = read_job(CONFIGS / f"{shape}.yaml")
    expected = plan_job(job).memory
    model = make_model(shape, seed)
    length = job.max_length or 1024
    batch = int(job.training["per_device_train_batch_size"])
    texts = [{"prompt": "w1", "completion": f" {text}"} for text in Texts(batch * _STEPS, (length, length), seed)]
    config = job.adapter_config(make_subspace(model, blocks_of(model), rank=32, features=64, seed=seed))
    arguments = {**job.training, "max_steps": _STEPS, "gradient_accumulation_steps": 1, "seed": seed}
    torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        train_adapter(
            model, make_tokenizer(), texts, config, Path(folder) / "out", max_length=length, progress=False, **arguments
        )
    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return {
        "batch": [batch, length],
        "expected_bytes": {**asdict(expected), "total": expected.total},
        "measured_bytes": {"allocated": allocated, "reserved": reserved},
        "measured_to_expected": {
            "allocated": round(allocated / expected.total, 3),
            "reserved": round(reserved / expected.total, 3),
        },
    }


def main() -> None:
    """Run the benchmark and write its result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["gemma-2-2b", "gemma-2-9b", "llama-3.1-8b"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: nothing is measured")
        return
    result: dict[str, Any] = {"benchmark": "memory of the shipped jobs", **circumstances(arguments.seed, "cuda")}
    for shape in arguments.shapes:
        result[shape] = measure(shape, arguments.seed)
        print(shape, json.dumps(result[shape]), flush=True)
        (arguments.output / "result-planned-cuda.json").write_text(json.dumps(result, indent=2) + "\n")
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
