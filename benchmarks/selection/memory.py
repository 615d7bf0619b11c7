"""Collect statistics once and print the peak of this process' resident memory (Linux).

`run.py` starts it, as `python -m benchmarks.selection.memory defaults|all TIMES`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from benchmarks.selection.world import Size, Texts, make_batches, make_model, make_saes, make_tokenizer
from peft_sae import collect_statistics
from peft_sae.statistics import Measures

# Narrow, so that the statistics, which might grow, are a large part of the whole.
_SIZE = Size(layers=3, width=256, heads=4, blocks=(0, 1), d_sae=16384, density=64 / 16384)
_TEXTS, _LENGTHS = 512, (32, 64)
_MEASURES = {"defaults": Measures(), "all": Measures(histograms=True, top_examples=4, sample=200)}


def main() -> None:
    """Collect statistics of `TIMES` times some texts."""
    measures, times = _MEASURES[sys.argv[1]], int(sys.argv[2])
    torch.set_num_threads(2)
    model, tokenizer = make_model(_SIZE, 0), make_tokenizer()
    (first,) = make_batches(tokenizer, Texts(16, (64, 64), seed=3), 16)
    saes = make_saes(model, _SIZE, first, 0)
    longest = Texts(16, (_LENGTHS[1], _LENGTHS[1]), seed=4)  # no later batch is larger
    collect_statistics(model, tokenizer, {"aligned": longest}, saes, measures=measures, progress=False)
    texts = Texts(_TEXTS * times, _LENGTHS, seed=5)
    found = collect_statistics(model, tokenizer, {"aligned": texts}, saes, measures=measures, progress=False)
    print(json.dumps({"tokens": found.of("aligned")[0].count, "bytes": _peak()}))


def _peak() -> int:
    """Bytes. What `getrusage` says of a process includes what the one that started it had taken."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


if __name__ == "__main__":
    main()
