"""Padded batches of texts of similar length."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from .data import Example


@dataclass(frozen=True)
class Batch:
    """Padded examples.

    Attributes:
        ids: int64 [batch, length], padded on the right.
        attention: int64 [batch, length], 1 for tokens and 0 for padding.
        counted: bool [batch, length], the tokens that were asked for.
        ordinary: bool [batch, length], the tokens of the texts, without BOS and what the tokenizer adds.
        numbers: places of the records in their data set, int64 [batch].
    """

    ids: torch.Tensor
    attention: torch.Tensor
    counted: torch.Tensor
    ordinary: torch.Tensor
    numbers: torch.Tensor


def iterate_batches(examples: Iterable[Example], *, batch_size: int, pad_id: int, pool: int = 64) -> Iterator[Batch]:
    """Yield padded batches.

    Args:
        examples: tokenised texts, read lazily.
        batch_size: examples per batch.
        pad_id: token id to pad with.
        pool: number of batches within which examples are sorted by length, so that little is padded.
    """
    waiting: list[Example] = []
    for example in examples:
        waiting.append(example)
        if len(waiting) == batch_size * pool:
            yield from _drain(waiting, batch_size, pad_id)
            waiting = []
    yield from _drain(waiting, batch_size, pad_id)


def _drain(waiting: Sequence[Example], batch_size: int, pad_id: int) -> Iterator[Batch]:
    ordered = sorted(waiting, key=lambda example: len(example.ids))
    for start in range(0, len(ordered), batch_size):
        yield _pad(ordered[start : start + batch_size], pad_id)


def _pad(examples: Sequence[Example], pad_id: int) -> Batch:
    length = max(len(example.ids) for example in examples)
    ids = torch.full((len(examples), length), pad_id, dtype=torch.int64)
    attention = torch.zeros_like(ids)
    counted = torch.zeros_like(ids, dtype=torch.bool)
    ordinary = counted.clone()
    for row, example in enumerate(examples):
        end = len(example.ids)
        ids[row, :end] = torch.tensor(example.ids)
        attention[row, :end] = 1
        counted[row, :end] = torch.tensor(example.counted)
        ordinary[row, :end] = torch.tensor(example.ordinary)
    numbers = torch.tensor([example.number for example in examples])
    return Batch(ids, attention, counted, ordinary, numbers)
