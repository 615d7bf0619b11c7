"""Training an adapter on completions."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..artifact import check_target, replace_folder
from ..errors import ConfigError, DataError, suggest
from ..statistics.data import ExampleReader
from ..statistics.records import Data, iterate_records

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_IGNORED = -100  # the label that transformers' loss passes over


def train_adapter(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    config: PeftConfig,
    output: str | Path,
    *,
    max_length: int | None = None,
    progress: bool = True,
    **arguments: Any,
) -> PeftModel:
    """Put an adapter on a model and train it with `transformers.Trainer`; the loss counts the responses only.

    Args:
        model: the base model, adapted in place.
        tokenizer: its tokenizer.
        data: records with `prompt` and `completion`, or with `messages`; see `collect_statistics`. Plain text counts
            whole.
        config: the adapter's configuration, of any PEFT type.
        output: folder that the trained adapter is written to; missing or empty. Checkpoints, if `save_strategy` asks
            for them, go beside it, into a folder whose name ends in `.checkpoints`.
        max_length: tokens per example; longer ones are cut. By default the model's context length.
        progress: show the Trainer's progress bar.
        **arguments: passed on to `transformers.TrainingArguments`.

    Returns:
        The adapted model, in evaluation mode.

    Raises:
        DataError: the data are empty or malformed.
        ArtifactError: the output cannot be written.
        ConfigError: an argument that `TrainingArguments` does not know.
    """
    from peft import get_peft_model
    from transformers import Trainer

    check_target(output)
    features = encode_examples(tokenizer, data, max_length or _context_length(model))
    settings = _training_arguments(output, arguments, progress)
    adapted = get_peft_model(model, config)
    trainer = Trainer(
        model=adapted,
        args=settings,
        train_dataset=features,
        data_collator=Collator(tokenizer.pad_token_id or 0),
        processing_class=tokenizer,
    )
    trainer.train()
    with replace_folder(output) as folder:
        adapted.save_pretrained(str(folder))
    return adapted.eval()


def encode_examples(tokenizer: PreTrainedTokenizerBase, data: Data, max_length: int) -> list[dict[str, list[int]]]:
    """Tokenise training data, with the prompt's labels masked.

    EOS is learned at the end of a text, except where a chat template has ended it in its own way or the text was cut.

    Args:
        tokenizer: a fast tokenizer.
        data: the records.
        max_length: tokens per example; longer ones are cut, EOS included.

    Returns:
        One mapping per example with `input_ids` and `labels`, lists of the same length.

    Raises:
        DataError: there are no records, or one has no token to learn from.
    """
    records = list(iterate_records(data, "training"))
    if not records:
        raise DataError("The training data are empty, so there is nothing to learn. Give at least one record.")
    plain = isinstance(records[0], str) or (isinstance(records[0], Mapping) and "text" in records[0])
    reader = ExampleReader(
        tokenizer, tokens="all" if plain else "assistant", max_length=max_length - 1, prepend_bos=False
    )
    features = []
    for number, record in enumerate(records):
        example = reader.read(record, number)
        labels = [token if counted else _IGNORED for token, counted in zip(example.ids, example.counted, strict=True)]
        ids, eos = list(example.ids), tokenizer.eos_token_id
        if ids[-1] == eos:  # put there by the tokenizer, which the reader does not count
            labels[-1] = eos
        elif eos is not None and not example.templated and not example.cut:
            ids, labels = [*ids, eos], [*labels, eos]
        if all(label in (_IGNORED, tokenizer.eos_token_id) for label in labels):
            raise DataError(
                f"Training example {number} has no response within {max_length} tokens, so nothing is learned from it. "
                "Raise max_length, or remove it."
            )
        features.append({"input_ids": ids, "labels": labels})
    if reader.truncated:
        logger.warning("%d of %d training texts were cut at %d tokens.", reader.truncated, len(records), max_length)
    return features


class Collator:
    """Pads examples on the right to the longest of their batch.

    Args:
        pad_id: token id to pad with.
    """

    def __init__(self, pad_id: int) -> None:
        self._pad_id = pad_id

    def __call__(self, features: Sequence[Mapping[str, list[int]]]) -> dict[str, torch.Tensor]:
        """Return `input_ids`, `attention_mask` and `labels`, each int64 [batch, length]."""
        length = max(len(feature["input_ids"]) for feature in features)
        batch: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
        for feature in features:
            missing = length - len(feature["input_ids"])
            batch["input_ids"].append([*feature["input_ids"], *[self._pad_id] * missing])
            batch["attention_mask"].append([1] * len(feature["input_ids"]) + [0] * missing)
            batch["labels"].append([*feature["labels"], *[_IGNORED] * missing])
        return {name: torch.tensor(rows) for name, rows in batch.items()}


def _training_arguments(output: str | Path, arguments: Mapping[str, Any], progress: bool) -> Any:
    from transformers import TrainingArguments

    defaults = {
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": not progress,
        "remove_unused_columns": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    known = {entry.name for entry in fields(TrainingArguments)}
    for name in arguments:
        if name not in known:
            raise ConfigError(
                f"transformers.TrainingArguments has no argument {name!r}, so its value would be lost."
                f"{suggest(name, known)} See its documentation for the names."
            )
    try:
        return TrainingArguments(output_dir=f"{output}.checkpoints", **{**defaults, **arguments})
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"transformers.TrainingArguments refuses {dict(arguments)} ({error}). See its documentation for their "
            "values."
        ) from error


def _context_length(model: PreTrainedModel) -> int:
    return int(getattr(model.config, "max_position_embeddings", 0) or 0) or 2**31
