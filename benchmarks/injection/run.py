"""Time of `get_peft_model` with a Subspace beside plain LoRA's, on a Gemma-2-2B-shaped model.

    python -m benchmarks.injection.run [--device meta|cpu] [--repetitions 7]

Both are run in turn in one process; the result is the ratio of the medians.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import Gemma2Config, Gemma2ForCausalLM

import peft_sae
from benchmarks.common import circumstances, make_subspace

_BLOCKS_WITH_SAE = (5, 10, 15, 20)  # as published for Gemma-2-2B (SAILS, arXiv 2512.23260)
_FEATURES, _RANK = 64, 32


def make_model(device: str) -> Gemma2ForCausalLM:
    """A model of Gemma-2-2B's shape in bfloat16; on the CPU its weights are random."""
    config = Gemma2Config(
        hidden_size=2304,
        num_hidden_layers=26,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
        intermediate_size=9216,
        vocab_size=256000,
        dtype=torch.bfloat16,
    )
    with torch.device(device):
        return Gemma2ForCausalLM(config).to(torch.bfloat16)


def measure(model: Gemma2ForCausalLM, config: LoraConfig) -> float:
    """Seconds for one injection; the adapter is taken off again."""
    gc.collect()
    start = time.perf_counter()
    adapted = get_peft_model(model, config)
    seconds = time.perf_counter() - start
    adapted.unload()
    return seconds


def main() -> None:
    """Run the benchmark and write its result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("meta", "cpu"), default="cpu")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    model = make_model(arguments.device)
    subspace = make_subspace(model, _BLOCKS_WITH_SAE, rank=_RANK, features=_FEATURES, seed=arguments.seed)
    shared = {"r": 32, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    makers = {
        "lora": lambda: LoraConfig(**shared),
        "sae_subspace": lambda: peft_sae.SaeSubspaceConfig(**shared, subspace=subspace),
        "sae_subspace_frozen": lambda: peft_sae.SaeSubspaceConfig(**shared, subspace=subspace, freeze_basis=True),
    }
    times: dict[str, list[float]] = {name: [] for name in makers}
    for _ in range(arguments.repetitions + 1):
        for name, maker in makers.items():
            times[name].append(measure(model, maker()))
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}  # the first is a warm-up
    result = {
        "benchmark": "get_peft_model, Gemma-2-2B shape, q_proj and v_proj, r=32",
        "seconds": {name: [round(value, 4) for value in values[1:]] for name, values in times.items()},
        "median_seconds": {name: round(value, 4) for name, value in medians.items()},
        "ratio_to_lora": {name: round(value / medians["lora"], 3) for name, value in medians.items()},
        **circumstances(arguments.seed, arguments.device),
    }
    target = Path(__file__).parent / f"result-{arguments.device}.json"
    target.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({key: result[key] for key in ("device", "median_seconds", "ratio_to_lora")}, indent=2))


if __name__ == "__main__":
    main()
