"""What every process of the tests runs: `torchrun --nproc_per_node 2 -m tests.statistics.share_worker OUTPUT`.

Every case leaves the statistics it gets, or its error, in a folder of its own. So one launch serves many tests.
"""

import json
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import PartialState

from peft_sae import load_saes
from peft_sae.statistics import Measures
from peft_sae.statistics.accumulate import ClassSums
from peft_sae.statistics.gradient import log_likelihood
from tests.tiny import WORDS, make_model, make_sae, make_tokenizer

from .dense import HOOKS, collect, make_texts

PROCESSES = 2
# No two texts begin alike, so none have the same activations to rounding anywhere.
DATA = {
    label: [f"{word} {text}" for word, text in zip(WORDS, make_texts(count, seed), strict=False)]
    for seed, (label, count) in enumerate({"aligned": 11, "unaligned": 8}.items())
}
FEW = {"aligned": ["red sea"], "unaligned": make_texts(3, 2)}
ALL = Measures(histograms=True, covariance=True, top_examples=3, sample=5)
PASSES = []


def run(data=DATA, **options):
    """The statistics, with the number of forward passes that they took in `PASSES`."""
    model = make_model()
    PASSES.clear()
    model.model.embed_tokens.register_forward_hook(lambda *_: PASSES.append(1))
    saes = load_saes([make_sae(hook, seed=seed) for seed, hook in enumerate(HOOKS)])
    return collect(model, make_tokenizer(), data, saes, **{"measures": ALL, "batch_size": 2, **options})


def run_generators():
    return run({label: iter(texts) for label, texts in DATA.items()})


def run_attribution():
    return run(attribute=log_likelihood, measures=Measures(top_examples=3, sample=5))


def run_alone(rank):
    """Only one process calls, which must wait for nobody."""
    return run(distributed=False) if rank == 0 else None


def run_broken_record(number):
    return run({"aligned": [*DATA["aligned"][:number], 7], "unaligned": ["red"]})


def run_resumed(folder, rank, data, stop):
    """Stop in one process at some call, and go on."""
    add, calls = ClassSums.add, []

    def stopping(self, *args, **kwargs):
        calls.append(1)
        if rank == 1 and len(calls) == stop:
            raise RuntimeError("no more electricity")
        return add(self, *args, **kwargs)

    ClassSums.add = stopping
    options = {"state": folder / "state", "save_every": 0}
    try:
        run(data, **options)
    except Exception as error:
        (folder / f"first-{rank}.txt").write_text(f"{type(error).__name__}: {error}")
    finally:
        ClassSums.add = add
    return run(data, **options)


def run_foreign_state(folder, rank):
    """One process finds the state of another run."""
    run(state=folder / "state")
    if rank == 1:
        path = folder / "state.1-of-2"
        run({"aligned": ["red"]}, state=folder / "other", distributed=False)
        path.write_bytes((folder / "other").read_bytes())
    dist.barrier()
    return run(state=folder / "state")


CASES = {
    "whole": lambda folder, rank: run(),
    "mean": lambda folder, rank: run(pooling="mean", batch_size=8),
    "cut": lambda folder, rank: run(max_length=6),
    "generators": lambda folder, rank: run_generators(),
    "attribution": lambda folder, rank: run_attribution(),
    "few": lambda folder, rank: run(FEW),
    "alone": lambda folder, rank: run_alone(rank),
    "broken-first": lambda folder, rank: run_broken_record(4),
    "broken-second": lambda folder, rank: run_broken_record(5),
    "empty": lambda folder, rank: run({"aligned": ["red"], "unaligned": []}),
    "resumed": lambda folder, rank: run_resumed(folder, rank, DATA, 9),
    "resumed-few": lambda folder, rank: run_resumed(folder, rank, FEW, 10**6),
    "foreign": run_foreign_state,
}


def main(output: Path) -> None:
    state = PartialState(cpu=True, backend="gloo", timeout=timedelta(seconds=30))
    rank = state.process_index
    assert state.num_processes == PROCESSES
    for name, case in CASES.items():
        folder = output / name
        folder.mkdir(parents=True, exist_ok=True)
        dist.barrier()
        try:
            statistics = case(folder, rank)
            if statistics is not None:
                statistics.save_pretrained(folder / f"statistics-{rank}")
        except Exception as error:
            (folder / f"error-{rank}.txt").write_text(f"{type(error).__name__}: {error}")
            traceback.print_exc()
        (folder / f"passes-{rank}.json").write_text(json.dumps(len(PASSES)))
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
