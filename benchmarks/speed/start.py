"""How long until training can begin: a basis of SAE features beside LoRA's other initialisations, on the CPU.

    python -m benchmarks.speed.start [--blocks 2] [--repetitions 5]

The layers are of Gemma-2-2B's shape, with random float32 weights, embeddings whose variance falls along the channels,
and a small vocabulary. There are fewer blocks than
the model's 26, as PiSSA's exact decompositions take up to half a minute for each; every way takes longer in proportion.
r = 32 on q_proj and v_proj. EVA, CorDA, LoRA-GA and the statistics of our selection read the same batches of texts. EVA
reads them as often as it needs to converge; as that takes minutes, it is timed once.

- `sae_subspace` and `sae_subspace_frozen` inject a basis that was made before: what every run with it pays.
- `sae_subspace, selection included` collects statistics of two SAEs of 16k features, selects, builds and injects: what
  is paid once per model and data.
- `eva, precomputed` injects what EVA found before, as a basis is injected.

All are run in turn in one process, in another order each time; the ratios are of medians.
"""

from __future__ import annotations

import copy
import gc
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import EvaConfig, LoraConfig, get_eva_state_dict, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora.config import CordaConfig, LoraGAConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from transformers import Gemma2Config, Gemma2ForCausalLM

from benchmarks.common import circumstances, make_subspace, timing_options
from benchmarks.selection.world import VOCABULARY, Size, Texts, make_batches, make_saes, make_tokenizer
from peft_sae import SaeSubspaceConfig, collect_statistics, select_features
from peft_sae.statistics.batches import Batch
from peft_sae.subspace.build import subspace_from_selection

_RANK, _FEATURES, _FEATURES_PER_SAE, _L0 = 32, 64, 16384, 64
_TEXTS, _LENGTHS, _BATCH = 16, (48, 80), 4
_FIELDS: dict[str, Any] = {"r": _RANK, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
_ONCE = ("eva",)
ASKED = {"pissa": 50.0, "eva": 10.0}


class Starts:
    """The ways to begin, each on a copy of the same model.

    Args:
        blocks: how many blocks of Gemma-2-2B's shape.
        seed: of weights, SAEs and texts.
    """

    def __init__(self, blocks: int, seed: int) -> None:
        torch.manual_seed(seed)
        config = Gemma2Config(
            hidden_size=2304,
            num_hidden_layers=blocks,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=256,
            intermediate_size=9216,
            vocab_size=VOCABULARY,
        )
        self.model = Gemma2ForCausalLM(config).eval()
        _shape_spectrum(self.model.get_input_embeddings().weight)
        self._tokenizer = make_tokenizer()
        self._texts = {
            label: Texts(_TEXTS, _LENGTHS, seed + number) for number, label in enumerate(("aligned", "unaligned"))
        }
        self._batches = [batch for texts in self._texts.values() for batch in self._read(texts)]
        with_sae = (blocks // 3, 2 * blocks // 3)
        size = Size(blocks, 2304, 8, with_sae, _FEATURES_PER_SAE, _L0 / _FEATURES_PER_SAE)
        self._saes = make_saes(self.model, size, self._batches[0], seed)
        self._subspace = make_subspace(self.model, with_sae, rank=_RANK, features=_FEATURES, seed=seed)
        self._eva_state: dict[str, Any] = {}
        self.tokens = sum(int(batch.counted.sum()) for batch in self._batches)

    def _read(self, texts: Texts) -> list[Batch]:
        return make_batches(self._tokenizer, texts, _BATCH)

    def ways(self) -> dict[str, Callable[[Gemma2ForCausalLM], Any]]:
        """What is timed, by name: each injects adapters into the model that it is given."""
        return {
            "lora": lambda model: get_peft_model(model, LoraConfig(**_FIELDS)),
            "sae_subspace": lambda model: self._inject(model, freeze_basis=False),
            "sae_subspace_frozen": lambda model: self._inject(model, freeze_basis=True),
            "sae_subspace, selection included": self._select,
            "olora": lambda model: get_peft_model(model, LoraConfig(**_FIELDS, init_lora_weights="olora")),
            "pissa, 16 iterations": lambda model: get_peft_model(
                model, LoraConfig(**_FIELDS, init_lora_weights="pissa_niter_16")
            ),
            "pissa": lambda model: get_peft_model(model, LoraConfig(**_FIELDS, init_lora_weights="pissa")),
            "mica": lambda model: get_peft_model(model, LoraConfig(**_FIELDS, init_lora_weights="mica")),
            "eva": self._eva,
            "eva, precomputed": lambda model: self._eva(model, again=True),
            "lora-ga": self._lora_ga,
            "corda": self._corda,
        }

    def _inject(self, model: Gemma2ForCausalLM, *, freeze_basis: bool) -> Any:
        return get_peft_model(model, SaeSubspaceConfig(**_FIELDS, subspace=self._subspace, freeze_basis=freeze_basis))

    def _select(self, model: Gemma2ForCausalLM) -> Any:
        found = collect_statistics(
            model, self._tokenizer, self._texts, self._saes, batch_size=_BATCH, distributed=False, progress=False
        )
        selection = select_features(found, top_k=_FEATURES, saes=self._saes)
        subspace = subspace_from_selection(model, None, selection, self._saes, variance=0.8)
        return get_peft_model(model, SaeSubspaceConfig(**_FIELDS, subspace=subspace))

    def _eva(self, model: Gemma2ForCausalLM, *, again: bool = False) -> Any:
        config = LoraConfig(**_FIELDS, init_lora_weights="eva", eva_config=EvaConfig(rho=1.0))
        adapted = get_peft_model(model, config, low_cpu_mem_usage=True)
        if not again:
            self._eva_state = get_eva_state_dict(adapted, self._data(), config, show_progress_bar=False)
        initialize_lora_eva_weights(adapted, eva_state_dict=dict(self._eva_state), show_progress_bar=False)
        return adapted

    def _data(self) -> list[dict[str, torch.Tensor]]:
        return [{"input_ids": batch.ids, "attention_mask": batch.attention} for batch in self._batches]

    def _lora_ga(self, model: Gemma2ForCausalLM) -> Any:
        config = LoraConfig(**_FIELDS, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())

        def step() -> None:
            for data in self._data():
                model(**data, labels=data["input_ids"]).loss.backward()

        preprocess_loraga(model, config, train_step=step)
        return get_peft_model(model, config)

    def _corda(self, model: Gemma2ForCausalLM) -> Any:
        config = LoraConfig(
            **_FIELDS, init_lora_weights="corda", corda_config=CordaConfig(corda_method="kpm", verbose=False)
        )

        @torch.no_grad()
        def run() -> None:
            for batch in self._batches:
                for ids, attention in zip(batch.ids, batch.attention, strict=True):
                    model(input_ids=ids[attention.bool()][None])  # its hooks take one text at a time

        preprocess_corda(model, config, run_model=run)
        return get_peft_model(model, config)


@torch.no_grad()
def _shape_spectrum(embeddings: torch.Tensor) -> None:
    """Let the variance of embeddings [words, width] fall as 1 / n² along the channels, and keep its mean.

    Activations of trained models have such principal components; without any that stand out EVA would not converge.
    """
    spread = 1 / torch.arange(1, embeddings.shape[1] + 1)
    embeddings *= spread / spread.square().mean().sqrt()


def measure(blocks: int, repetitions: int, seed: int) -> dict[str, Any]:
    """Seconds of every way, and their ratios."""
    starts = Starts(blocks, seed)
    ways = starts.ways()
    times: dict[str, list[float]] = {name: [] for name in ways}
    repeated = [name for name in ways if name not in _ONCE]
    order = random.Random(seed)
    rounds = [(-1, list(_ONCE)), (-1, repeated), *((each, repeated) for each in range(repetitions))]
    for repetition, names in rounds:  # the first round of all warms up
        for name in order.sample(names, len(names)):
            model = copy.deepcopy(starts.model)  # some ways change the base's weights
            gc.collect()
            start = time.perf_counter()
            ways[name](model)
            seconds = time.perf_counter() - start
            del model
            if repetition >= 0 or name in _ONCE:
                times[name].append(seconds)
            print(repetition, name, round(seconds, 3), flush=True)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "tokens": starts.tokens,
        "median_seconds": {name: round(value, 4) for name, value in medians.items()},
        "ratio_to_lora": {name: round(value / medians["lora"], 2) for name, value in medians.items()},
        "times_faster_than": {
            name: {
                other: round(medians[other] / medians[name], 2)
                for other in ways
                if not other.startswith("sae_subspace")
            }
            for name in ways
            if name.startswith("sae_subspace")
        },
        "asked": ASKED,
        "all_seconds": {name: [round(value, 4) for value in values] for name, values in times.items()},
    }


def main() -> None:
    """Run the benchmark and write its result."""
    arguments = timing_options(__doc__, blocks=2, repetitions=5, output=Path(__file__).parent)
    before = circumstances(arguments.seed, "cpu")
    result = {
        "benchmark": f"initialisation, {arguments.blocks} blocks of Gemma-2-2B's shape, q_proj and v_proj, r={_RANK}",
        **before,
        **measure(arguments.blocks, arguments.repetitions, arguments.seed),
    }
    (arguments.output / "result-start-cpu.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({key: result[key] for key in ("median_seconds", "times_faster_than")}, indent=2))


if __name__ == "__main__":
    main()
