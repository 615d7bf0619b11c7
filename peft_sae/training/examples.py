"""Training data in the form that TRL's trainers take."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from ..errors import ConfigError, DataError
from ..statistics.data import ExampleReader
from ..statistics.records import Data, iterate_records, split_preferences

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Learned = Literal["all", "response", "assistant"]

_IGNORED = -100  # the label that transformers' loss passes over


def encode_examples(
    tokenizer: PreTrainedTokenizerBase, data: Data, max_length: int, *, learn: Learned | None = None
) -> list[dict[str, list[int]]]:
    """Tokenise training data as selection reads it, with the labels of what is not learned masked.

    EOS is learned at the end of a text, except where a chat template has ended it in its own way or the text was cut.

    Args:
        tokenizer: a fast tokenizer.
        data: the records.
        max_length: tokens per example; longer ones are cut, EOS included. One whose prompt alone is as long is left
            out.
        learn: tokens that are learned: `all`, `response` (the last turn) or `assistant` (every turn). By default
            `all` for plain text, else `assistant`.

    Returns:
        One mapping per example with `input_ids` and `labels`, lists of the same length.

    Raises:
        DataError: there are no records, one has no token to learn from, or none has one within `max_length`.
    """
    records = list(iterate_records(data, "training"))
    if not records:
        raise DataError("The training data are empty, so there is nothing to learn. Give at least one record.")
    plain = isinstance(records[0], str) or (isinstance(records[0], Mapping) and "text" in records[0])
    reader = ExampleReader(
        tokenizer,
        tokens=learn or ("all" if plain else "assistant"),
        max_length=max_length,
        prepend_bos=False,
    )
    features, too_long = [], 0
    for number, record in enumerate(records):
        example = reader.read(record, number)
        labels = [token if counted else _IGNORED for token, counted in zip(example.ids, example.counted, strict=True)]
        ids, eos = list(example.ids), tokenizer.eos_token_id
        if eos is not None and not example.templated and not example.cut:
            if ids[-1] == eos:  # put there by the tokenizer, which the reader does not count
                labels[-1] = eos
            elif len(ids) < max_length:
                ids, labels = [*ids, eos], [*labels, eos]
        if all(label in (_IGNORED, tokenizer.eos_token_id) for label in labels):
            if not example.cut:
                raise DataError(
                    f"Training example {number} has no response, so nothing is learned from it. Remove it, or correct "
                    "its fields."
                )
            too_long += 1
            continue
        features.append({"input_ids": ids, "labels": labels})
    if not features:
        raise DataError(
            f"None of the {len(records)} training examples has a response within {max_length} tokens, so nothing is "
            "learned. Raise max_length."
        )
    if too_long:
        logger.warning(
            "%d of %d training examples are left out: their prompts alone fill %d tokens. Raise max_length to learn "
            "from them.",
            *(too_long, len(records), max_length),
        )
    if reader.truncated > too_long:
        logger.warning(
            "%d of %d training texts were cut at %d tokens.", reader.truncated - too_long, len(records), max_length
        )
    return features


def preference_records(data: Data) -> list[dict[str, Any]]:
    """Return preference data as TRL's DPO takes them.

    Args:
        data: records with `chosen` and `rejected`, both texts or both lists of messages, and perhaps with `prompt`.

    Raises:
        DataError: there are no records, or one has another form.
    """
    records: list[dict[str, Any]] = []
    for number, record in enumerate(iterate_records(data, "preference")):
        answers = [record.get(key) for key in ("chosen", "rejected")] if isinstance(record, Mapping) else [None]
        if not isinstance(record, Mapping) or {type(answer) for answer in answers} not in ({str}, {list}):
            found = sorted(map(str, record)) if isinstance(record, Mapping) else type(record).__name__
            raise DataError(
                f"Training example {number} has {found}, and DPO needs 'chosen' and 'rejected', both texts or both "
                "lists of messages. Rename the columns, or use method: sft."
            )
        records.append({key: record[key] for key in ("prompt", "chosen", "rejected") if key in record})
        if records[0].keys() != records[-1].keys():
            raise DataError(
                f"Training example {number} has {sorted(records[-1])}, and the first one {sorted(records[0])}. Give "
                "all of them a 'prompt', or none."
            )
    if not records:
        raise DataError("The preference data are empty, so there is nothing to learn. Give at least one record.")
    return records


def to_dataset(
    method: str, tokenizer: PreTrainedTokenizerBase, data: Data, max_length: int, learn: Learned | None
) -> Any:
    """Return the `datasets.Dataset` that a method's trainer takes; `sft` learns the chosen ones of preference data."""
    from datasets import Dataset

    if method == "dpo":
        if learn is not None:
            raise ConfigError(f"learn={learn!r} is about method: sft; DPO compares whole answers. Leave it out.")
        return Dataset.from_list(preference_records(data))
    first = next(iter(iterate_records(data, "training")), None)
    if isinstance(first, Mapping) and {"chosen", "rejected"} <= set(first):
        data, _ = split_preferences(data)
    return Dataset.from_list(encode_examples(tokenizer, data, max_length, learn=learn))
