"""The GPU part: training, selection and initialisation on random models of the published shapes, in bfloat16.

    python -m benchmarks.speed.gpu [--shapes gemma-2-2b gemma-2-9b llama-3.1-8b] [--parts training selection start]

The shapes are those of `configs/`. The base's weights are random and shared by all adapters, so they lie in memory
once; adapters are in float32 under autocast, as the Trainer has it with `bf16`. All are run in turn, in another order
each time; what counts is the ratio of the medians. Without a CUDA device nothing is run, and one line says so.

- training: seconds per step (forward, backward, AdamW), tokens per second and peak memory, beside LoRA.
- selection: `collect_statistics` with four JumpReLU SAEs of 16k features, L0 about 64, beside the plain model's forward
  pass to the deepest SAE, and beside that with sae-lens' `SAE.encode` and dense means behind it.
- start: `get_peft_model` beside LoRA's other initialisations.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import random
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from benchmarks.common import circumstances, make_subspace
from benchmarks.selection.world import Size, Texts, make_batches, make_saes, make_tokenizer, mean_firing
from peft_sae import SaeSubspaceConfig, collect_statistics
from peft_sae.sae.placement import check_placement
from peft_sae.statistics.capture import capturing

CONFIGS = Path(__file__).parents[2] / "configs"
_RANK, _FEATURES, _PROTECTED, _WARM_UP = 32, 64, 16, 4
_TARGETS = {"q_v": ["q_proj", "v_proj"], "all-linear": "all-linear"}
_FEATURES_PER_SAE, _L0 = 16384, 64
_BATCH, _TEXTS = 8, 512


def make_model(shape: str, seed: int) -> PreTrainedModel:
    """A model of random bfloat16 weights, of a shape in `configs/`, on the GPU."""
    architecture = dict(yaml.safe_load((CONFIGS / f"{shape}.yaml").read_text())["architecture"])
    config = AutoConfig.for_model(architecture.pop("model_type"), **architecture)
    torch.manual_seed(seed)
    with torch.device("cuda"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def share(model: PreTrainedModel) -> PreTrainedModel:
    """The same model around the same weights."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def blocks_of(model: PreTrainedModel) -> tuple[int, ...]:
    """Four blocks, a fifth of the depth apart."""
    return tuple(model.config.num_hidden_layers * part // 5 for part in (1, 2, 3, 4))


def timed(work: Callable[[], Any]) -> float:
    """Seconds that some work takes, until the device is done."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def interleaved(ways: Mapping[str, Callable[[], Any]], repetitions: int, warm_up: int) -> dict[str, list[float]]:
    """Seconds of every way, run in turn in another order each time."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    order = list(ways)
    for repetition in range(-warm_up, repetitions):
        random.shuffle(order)
        for name in order:
            seconds = timed(ways[name])
            if repetition >= 0:
                times[name].append(seconds)
    return times


def make_adapters(model: PreTrainedModel, targets: str, seed: int) -> dict[str, PeftModel]:
    """One adapted model per kind, around the same weights."""
    places: dict[str, Any] = {"rank": _RANK, "features": _FEATURES, "seed": seed}
    plain = make_subspace(model, blocks_of(model), **places)
    guarded = make_subspace(model, blocks_of(model), **places, protected=_PROTECTED)
    fields: dict[str, Any] = {"r": _RANK, "lora_alpha": _RANK, "target_modules": _TARGETS[targets]}
    fields["task_type"] = "CAUSAL_LM"
    configs: dict[str, LoraConfig] = {
        "lora": LoraConfig(**fields),
        "sae_subspace": SaeSubspaceConfig(**fields, subspace=plain),
        "sae_subspace_frozen": SaeSubspaceConfig(**fields, subspace=plain, freeze_basis=True),
        "sae_subspace_protect": SaeSubspaceConfig(**fields, subspace=guarded),
    }
    return {name: get_peft_model(share(model), config) for name, config in configs.items()}


def measure_training(
    model: PreTrainedModel, targets: str, batch: int, length: int, repetitions: int, seed: int
) -> dict[str, Any]:
    """Step time, tokens per second and peak memory of every kind of adapter."""
    adapters = make_adapters(model, targets, seed)
    ids = torch.randint(0, model.config.vocab_size, (batch, length), device="cuda")
    base = sum(parameter.nbytes for parameter in model.parameters())
    steps, peaks, trained, own = {}, {}, {}, {}
    for name, adapted in adapters.items():
        adapted.train()
        parameters = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
        trained[name] = sum(parameter.numel() for parameter in parameters)
        # The factors and AdamW's two moments; gradients are in the peak of the step.
        own[name] = sum(parameter.nbytes for parameter in adapted.parameters()) - base + 2 * 4 * trained[name]
        steps[name] = _step(adapted, torch.optim.AdamW(parameters, lr=1e-4), ids)
        steps[name]()
    for name, step in steps.items():
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        peaks[name] = base + own[name] + torch.cuda.max_memory_allocated() - before
    times = interleaved(steps, repetitions, _WARM_UP)
    seconds = {name: statistics.median(found) for name, found in times.items()}
    return {
        "targets": targets,
        "batch": [batch, length],
        "rank": _RANK,
        "trained_parameters": trained,
        "seconds": seconds,
        "tokens_per_second": {name: round(ids.numel() / value) for name, value in seconds.items()},
        "peak_bytes": peaks,
        "ratio_to_lora": {
            "step_seconds": {name: round(value / seconds["lora"], 3) for name, value in seconds.items()},
            "peak_bytes": {name: round(value / peaks["lora"], 4) for name, value in peaks.items()},
        },
        "all_seconds": {name: [round(value, 4) for value in found] for name, found in times.items()},
    }


def _step(model: PeftModel, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> Callable[[], None]:
    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure_selection(model: PreTrainedModel, repetitions: int, seed: int) -> dict[str, Any]:
    """Tokens per second of `collect_statistics`, and of two ways without it."""
    config, tokenizer = model.config, make_tokenizer()
    size = Size(
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        heads=config.num_attention_heads,
        blocks=blocks_of(model),
        d_sae=_FEATURES_PER_SAE,
        density=_L0 / _FEATURES_PER_SAE,
    )
    (first,) = make_batches(tokenizer, Texts(16, (160, 160), seed=seed + 3), 16)
    handles = make_saes(model, size, first, seed)
    texts = Texts(_TEXTS, seed=seed + 1)
    batches = make_batches(tokenizer, texts, _BATCH)
    taps = check_placement(model, handles)

    @torch.no_grad()
    def forward() -> list[list[torch.Tensor]]:
        with capturing(model, taps) as capture:
            return [[found[batch.counted] for found in capture.run(batch.ids, batch.attention)] for batch in batches]

    @torch.no_grad()
    def encode() -> list[torch.Tensor]:
        sums = [torch.zeros(_FEATURES_PER_SAE, device="cuda") for _ in handles]
        with capturing(model, taps) as capture:
            for batch in batches:
                found = capture.run(batch.ids, batch.attention)
                for total, handle, stream in zip(sums, handles, found, strict=True):
                    total += handle.sae.encode(stream[batch.counted].float()).sum(0)
        return sums

    def collect() -> Any:
        return collect_statistics(
            model, tokenizer, {"aligned": texts}, handles, batch_size=_BATCH, distributed=False, progress=False
        )

    tokens = sum(int(batch.counted.sum()) for batch in batches)
    pairs = zip(collect().of("aligned"), encode(), strict=True)
    difference = max(
        float((ours.mean.cpu() - (total / tokens).cpu()).abs().max() / ours.mean.abs().max()) for ours, total in pairs
    )
    ways = {"forward": forward, "forward, SAE.encode, means": encode, "collect_statistics": collect}
    times = interleaved(ways, repetitions, 1)
    seconds = {name: statistics.median(found) for name, found in times.items()}
    firing = mean_firing(handles, [stream.float() for stream in forward()[0]])
    return {
        "tokens": tokens,
        "batch": _BATCH,
        "saes": [handle.identity.hook_name for handle in handles],
        "features_per_sae": _FEATURES_PER_SAE,
        "features_per_token": firing,
        "largest_difference_of_means": difference,
        "seconds": seconds,
        "tokens_per_second": {name: round(tokens / value) for name, value in seconds.items()},
        "ratio_to_forward": {name: round(value / seconds["forward"], 3) for name, value in seconds.items()},
        "all_seconds": {name: [round(value, 4) for value in found] for name, found in times.items()},
    }


def measure_start(model: PreTrainedModel, repetitions: int, seed: int) -> dict[str, Any]:
    """Seconds of `get_peft_model` for q_proj and v_proj; some ways change the base's (random) weights."""
    subspace = make_subspace(model, blocks_of(model), rank=_RANK, features=_FEATURES, seed=seed)
    fields: dict[str, Any] = {"r": _RANK, "target_modules": _TARGETS["q_v"], "task_type": "CAUSAL_LM"}
    makers: dict[str, Callable[[], LoraConfig]] = {
        "lora": lambda: LoraConfig(**fields),
        "sae_subspace": lambda: SaeSubspaceConfig(**fields, subspace=subspace),
        "sae_subspace_frozen": lambda: SaeSubspaceConfig(**fields, subspace=subspace, freeze_basis=True),
        "olora": lambda: LoraConfig(**fields, init_lora_weights="olora"),
        "pissa, 16 iterations": lambda: LoraConfig(**fields, init_lora_weights="pissa_niter_16"),
        "pissa": lambda: LoraConfig(**fields, init_lora_weights="pissa"),
    }

    def start(make: Callable[[], LoraConfig]) -> None:
        adapted = get_peft_model(model, make())
        adapted.unload()

    times = interleaved({name: lambda make=make: start(make) for name, make in makers.items()}, repetitions, 1)
    seconds = {name: statistics.median(found) for name, found in times.items()}
    return {
        "targets": "q_v",
        "rank": _RANK,
        "seconds": {name: round(value, 4) for name, value in seconds.items()},
        "ratio_to_lora": {name: round(value / seconds["lora"], 2) for name, value in seconds.items()},
        "all_seconds": {name: [round(value, 4) for value in found] for name, found in times.items()},
    }


def main() -> None:
    """Run the benchmark and write its results, after every part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["gemma-2-2b"])
    parser.add_argument("--parts", nargs="+", choices=("training", "selection", "start"), default=None)
    parser.add_argument("--targets", nargs="+", choices=tuple(_TARGETS), default=tuple(_TARGETS))
    parser.add_argument("--repetitions", type=int, default=11)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: the GPU part is skipped")
        return
    random.seed(arguments.seed)
    parts = arguments.parts or ("training", "selection", "start")
    for shape in arguments.shapes:
        model = make_model(shape, arguments.seed)
        result: dict[str, Any] = {"shape": shape, "dtype": "bfloat16", **circumstances(arguments.seed, "cuda")}
        for part in parts:
            if part == "training":
                result[part] = [
                    measure_training(
                        model, targets, arguments.batch, arguments.length, arguments.repetitions, arguments.seed
                    )
                    for targets in arguments.targets
                ]
            elif part == "selection":
                result[part] = measure_selection(model, arguments.repetitions, arguments.seed)
            else:
                result[part] = measure_start(model, min(arguments.repetitions, 5), arguments.seed)
            (arguments.output / f"result-{shape}-cuda.json").write_text(json.dumps(result, indent=2) + "\n")
            print(shape, part, json.dumps(_without_lists(result[part]), indent=1), flush=True)
            gc.collect()
            torch.cuda.empty_cache()
        del model


def _without_lists(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_lists(each) for each in value]
    if isinstance(value, dict):
        return {key: _without_lists(each) for key, each in value.items() if key != "all_seconds"}
    return value


if __name__ == "__main__":
    main()
