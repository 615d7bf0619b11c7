"""Training with SAE_SUBSPACE beside LoRA: step time, bytes saved for backward, optimiser state, loading, checkpoint.

    python -m benchmarks.training.run [--targets all-linear|q_v] [--repetitions 15] [--device cpu|cuda]

A 6-layer, 768-wide Llama with grouped queries, as Llama 3 has them, and random weights, batch 4 x 128, r = 16. All are
run in turn in one process, in another order each time; what counts is the ratio of the medians to LoRA's.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common import circumstances, make_subspace
from peft_sae import SaeSubspaceConfig

_RANK, _BATCH, _LENGTH, _VOCABULARY, _PROTECTED = 16, 4, 128, 8192, 8
_TARGETS = {"all-linear": "all-linear", "q_v": ["q_proj", "v_proj"]}


def make_model(seed: int, device: str) -> LlamaForCausalLM:
    """The base model; the same weights for every adapter."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=6,
        num_attention_heads=12,
        num_key_value_heads=4,
        vocab_size=_VOCABULARY,
        max_position_embeddings=_LENGTH,
    )
    return LlamaForCausalLM(config).to(device)


def make_adapters(seed: int, device: str, targets: str) -> Mapping[str, PeftModel]:
    """One adapted model per kind."""
    model = make_model(seed, device)
    plain = make_subspace(model, (1, 3), rank=_RANK, features=_RANK, seed=seed)
    guarded = make_subspace(model, (1, 3), rank=_RANK, features=_RANK, seed=seed, protected=_PROTECTED)
    fields: dict[str, Any] = {"r": _RANK, "lora_alpha": _RANK, "task_type": "CAUSAL_LM"}
    fields["target_modules"] = _TARGETS[targets]
    configs: dict[str, Callable[[], LoraConfig]] = {
        "lora": lambda: LoraConfig(**fields),
        "sae_subspace": lambda: SaeSubspaceConfig(**fields, subspace=plain),
        "sae_subspace_frozen": lambda: SaeSubspaceConfig(**fields, subspace=plain, freeze_basis=True),
        "sae_subspace_protect": lambda: SaeSubspaceConfig(**fields, subspace=guarded),
    }
    return {name: get_peft_model(make_model(seed, device), make()) for name, make in configs.items()}


def saved_bytes(model: PeftModel, ids: torch.Tensor) -> int:
    """Bytes of distinct storages kept for backward, parameters and buffers apart."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    storages: dict[int, int] = {}
    kept = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        kept.append(tensor)  # otherwise an address could be used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=ids).loss
    del loss
    return sum(storages.values())


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the optimiser's state."""
    tensors = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    return sum(tensor.nbytes for tensor in tensors)


def load_seconds(model: PeftModel, seed: int, device: str, repetitions: int) -> tuple[float, int]:
    """Median seconds of `PeftModel.from_pretrained`, and the bytes of the adapter's folder."""
    times = []
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        size = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
        for _ in range(repetitions):
            base = make_model(seed, device)
            start = time.perf_counter()
            PeftModel.from_pretrained(base, folder)
            times.append(time.perf_counter() - start)
    return statistics.median(times), size


def step_seconds(model: PeftModel, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> float:
    """Seconds of one step: forward, backward and update."""
    start = time.perf_counter()
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if ids.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(targets: str, repetitions: int, seed: int, device: str) -> dict[str, Any]:
    """All measurements for one choice of targets."""
    models = make_adapters(seed, device, targets)
    ids = torch.randint(0, _VOCABULARY, (_BATCH, _LENGTH), device=device)
    optimizers = {}
    for name, model in models.items():
        model.train()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizers[name] = torch.optim.AdamW(trained, lr=1e-4)
        for _ in range(2):  # warm up
            step_seconds(model, optimizers[name], ids)
    times: dict[str, list[float]] = {name: [] for name in models}
    order = list(models)
    for _ in range(repetitions):
        random.shuffle(order)
        for name in order:
            times[name].append(step_seconds(models[name], optimizers[name], ids))
    loading = {name: load_seconds(model, seed, device, 5) for name, model in models.items()}
    values: dict[str, dict[str, float]] = {
        "step_seconds": {name: statistics.median(found) for name, found in times.items()},
        "saved_for_backward_bytes": {name: saved_bytes(model, ids) for name, model in models.items()},
        "optimizer_state_bytes": {name: state_bytes(optimizer) for name, optimizer in optimizers.items()},
        "load_seconds": {name: seconds for name, (seconds, _) in loading.items()},
        "checkpoint_bytes": {name: size for name, (_, size) in loading.items()},
    }
    ratios = {
        measure: {name: round(value / found["lora"], 3) for name, value in found.items()}
        for measure, found in values.items()
    }
    steps = {name: [round(value, 4) for value in found] for name, found in times.items()}
    return {"ratio_to_lora": ratios, "values": values, "all_step_seconds": steps}


def main() -> None:
    """Run the benchmark and write its results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--targets", choices=tuple(_TARGETS), default=None, help="default: both")
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    for targets in [arguments.targets] if arguments.targets else list(_TARGETS):
        result = {
            "benchmark": "training step, 6-layer 768-wide Llama, batch 4 x 128, r=16",
            "targets": targets,
            "vocabulary": _VOCABULARY,
            "protected_directions": 2 * _PROTECTED,
            **circumstances(arguments.seed, arguments.device),
            **measure(targets, arguments.repetitions, arguments.seed, arguments.device),
        }
        target = Path(__file__).parent / f"result-{targets}-{arguments.device}.json"
        target.write_text(json.dumps(result, indent=2) + "\n")
        print(targets, json.dumps(result["ratio_to_lora"], indent=2))


if __name__ == "__main__":
    main()
