"""Time to import the package and to load a trained adapter, beside PEFT and LoRA.

    python -m benchmarks.speed.load [--blocks 8] [--repetitions 7]

Imports are timed in fresh processes, in turn. Adapters (r = 32, q_proj and v_proj) are saved to a folder first and
loaded with `PeftModel.from_pretrained` onto a model of Gemma-2-2B's shape with fewer blocks and a small vocabulary.
"""

from __future__ import annotations

import gc
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Gemma2Config, Gemma2ForCausalLM

from benchmarks.common import circumstances, make_subspace, timing_options
from peft_sae import SaeSubspaceConfig

_FIELDS: dict[str, Any] = {"r": 32, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
_IMPORTS = {"peft": "import peft", "peft and peft_sae": "import peft, peft_sae"}


def import_seconds(statement: str) -> float:
    """Seconds that a statement takes in a fresh process, without starting Python."""
    code = f"import time; start = time.perf_counter(); {statement}; print(time.perf_counter() - start)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def measure_imports(repetitions: int) -> dict[str, list[float]]:
    """Seconds of each import; the first round warms the disk's cache."""
    times: dict[str, list[float]] = {name: [] for name in _IMPORTS}
    for repetition in range(-1, repetitions):
        for name, statement in _IMPORTS.items():
            seconds = import_seconds(statement)
            if repetition >= 0:
                times[name].append(seconds)
    return times


def measure_loading(blocks: int, repetitions: int, seed: int) -> dict[str, list[float]]:
    """Seconds of `PeftModel.from_pretrained` per kind of adapter."""
    torch.manual_seed(seed)
    shape = {"hidden_size": 2304, "intermediate_size": 9216, "head_dim": 256, "vocab_size": 1024}
    config = Gemma2Config(num_hidden_layers=blocks, num_attention_heads=8, num_key_value_heads=4, **shape)
    model = Gemma2ForCausalLM(config).to(torch.bfloat16)
    subspace = make_subspace(model, (blocks // 3, 2 * blocks // 3), rank=32, features=64, seed=seed)
    configs = {
        "lora": LoraConfig(**_FIELDS),
        "sae_subspace": SaeSubspaceConfig(**_FIELDS, subspace=subspace),
        "sae_subspace_frozen": SaeSubspaceConfig(**_FIELDS, subspace=subspace, freeze_basis=True),
    }
    times: dict[str, list[float]] = {name: [] for name in configs}
    with tempfile.TemporaryDirectory() as scratch:
        for name, made in configs.items():
            adapted = get_peft_model(model, made)
            adapted.save_pretrained(Path(scratch, name))
            model = adapted.unload()
        for repetition in range(-1, repetitions):
            for name in configs:
                gc.collect()
                start = time.perf_counter()
                adapted = PeftModel.from_pretrained(model, Path(scratch, name))
                if repetition >= 0:
                    times[name].append(time.perf_counter() - start)
                model = adapted.unload()
    return times


def main() -> None:
    """Run the benchmark and write its result."""
    arguments = timing_options(__doc__, blocks=8, repetitions=7, output=Path(__file__).parent)
    logging.getLogger("peft_sae").setLevel(logging.ERROR)
    before = circumstances(arguments.seed, "cpu")
    found = {
        "import": (measure_imports(arguments.repetitions), "peft"),
        "load": (measure_loading(arguments.blocks, arguments.repetitions, arguments.seed), "lora"),
    }
    result: dict[str, Any] = {"benchmark": f"import, and loading onto {arguments.blocks} blocks of 2B shape", **before}
    for part, (times, peer) in found.items():
        medians = {name: statistics.median(values) for name, values in times.items()}
        result[part] = {
            "median_seconds": {name: round(value, 4) for name, value in medians.items()},
            "ratio": {name: round(value / medians[peer], 3) for name, value in medians.items()},
            "all_seconds": {name: [round(value, 4) for value in values] for name, values in times.items()},
        }
    (arguments.output / "result-load-cpu.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({part: result[part]["median_seconds"] | {"ratio": result[part]["ratio"]} for part in found}))


if __name__ == "__main__":
    main()
