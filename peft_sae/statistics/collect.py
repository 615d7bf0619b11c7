"""One streaming pass over labelled texts."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence, Sized
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from ..errors import ConfigError, DataError
from ..sae.load import SaeHandle, as_handles, check_distinct
from ..sae.placement import check_placement
from .capture import Capture, capturing
from .data import Batch, Data, Example, ExampleReader, TokenChoice, iterate_batches, iterate_records
from .statistics import FeatureMoments, FeatureStatistics

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# At most this many feature activations exist at a time: 256 MiB in float32.
_CHUNK_ELEMENTS = 2**26


def collect_statistics(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Mapping[str, Data],
    saes: Sequence[SaeHandle],
    *,
    tokens: TokenChoice = "all",
    batch_size: int = 8,
    max_length: int | None = None,
    progress: bool = True,
) -> FeatureStatistics:
    """Run a model over labelled texts and sum up what every SAE feature does on each label.

    Each text goes through the model once, up to the deepest SAE and no further. Nothing is kept per
    token, so memory does not grow with the data. Padding, BOS and what else the tokenizer adds around a
    text do not count; the words of a chat template do. The model is left as it was found.

    Args:
        model: the plain Hugging Face model, on any device, in any dtype.
        tokenizer: its tokenizer (a fast one).
        data: label to data set, usually `{"aligned": ..., "unaligned": ...}`. A data set is a
            `datasets.Dataset`, an iterable, or the path of a JSONL file. Its records are strings, or
            mappings with `text`, with `prompt` and `completion`, or with `messages`.
        saes: from `load_saes`; SAE objects of sae-lens will do.
        tokens: count `all` tokens, those of the `prompt`, or those of the `response`.
        batch_size: texts per forward pass.
        max_length: tokens per text; longer texts are cut at the end, and their number is recorded and
            logged. By default the model's context length.
        progress: show a progress bar.

    Returns:
        Per label and SAE the count, sum, sum of squares, firing count and maximum of each feature.

    Raises:
        DataError: a data set is empty or malformed, no token of it counts, or activations are not
            finite.
        MismatchError: an SAE does not belong to the model.
        ConfigError: an argument is out of range.
    """
    if not isinstance(data, Mapping) or not data or not all(isinstance(label, str) for label in data):
        raise ConfigError(
            f"data is {type(data).__name__}, and a mapping from label to data set is needed, for example "
            "{'aligned': ..., 'unaligned': ...}."
        )
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size} processes nothing. Use 1 or more.")
    saes = as_handles(saes)
    check_distinct(saes)
    taps = check_placement(model, saes)
    limit = _context_length(model, max_length)
    prepend_bos = any(handle.prepend_bos for handle in saes)
    moments, examples, truncated = {}, {}, {}
    with capturing(model, taps) as capture:
        for label, records in data.items():
            reader = ExampleReader(tokenizer, tokens=tokens, max_length=limit, prepend_bos=prepend_bos)
            sums = _Sums(saes)
            batches = iterate_batches(
                _read(records, label, reader), batch_size=batch_size, pad_id=tokenizer.pad_token_id or 0
            )
            with tqdm(total=_length(records), desc=f"statistics ({label})", unit=" texts", disable=not progress) as bar:
                for batch, count in batches:
                    sums.add(batch, capture, label)
                    bar.update(count)
            moments[label] = sums.finish(label, tokens)
            examples[label], truncated[label] = sums.examples, reader.truncated
            if reader.truncated:
                logger.warning(
                    "%d of %d %s texts were cut at %d tokens.", reader.truncated, sums.examples, label, limit
                )
    settings = {
        "model": model_description(model),
        "tokens": tokens,
        "max_length": limit,
        "examples": examples,
        "truncated": truncated,
    }
    return FeatureStatistics(tuple(handle.identity for handle in saes), moments, settings)


class _Sums:
    """Running moments of one class, one per SAE."""

    def __init__(self, saes: Sequence[SaeHandle]) -> None:
        self._saes = saes
        self._moments = [FeatureMoments.empty(handle.identity.d_sae) for handle in saes]
        self.examples = 0

    def add(self, batch: Batch, capture: Capture, label: str) -> None:
        """Run one batch and add its tokens."""
        first, self.examples = self.examples, self.examples + batch.ids.shape[0]
        if not bool(batch.counted.any()):
            return
        for index, activations in enumerate(capture.run(batch.ids, batch.attention)):
            chosen = activations[batch.counted.to(activations.device)]
            handle = self._saes[index]
            chunk = max(1, _CHUNK_ELEMENTS // handle.identity.d_sae)
            for part in torch.split(chosen, chunk):
                added = FeatureMoments.of(handle.encode(part))
                if not bool(torch.isfinite(added.total_squares).all()) or not bool(torch.isfinite(part).all()):
                    raise DataError(
                        f"Activations at {handle.identity.hook_name} are NaN or infinite in the {label} texts "
                        f"{first} to {self.examples - 1} (sorted by length within their pool). Load the model in "
                        "bfloat16 or float32 instead of float16, or remove the text."
                    )
                self._moments[index] = self._moments[index] + added

    def finish(self, label: str, tokens: str) -> tuple[FeatureMoments, ...]:
        """Return the sums after checking that there is something in them."""
        if self.examples == 0:
            raise DataError(f"The {label} data set is empty, so it cannot be compared. Give at least one text.")
        if self._moments[0].count == 0:
            raise DataError(
                f"None of the {self.examples} {label} texts has a token that counts (tokens={tokens!r}; BOS and "
                "padding never do). Give longer texts or another choice of tokens."
            )
        return tuple(self._moments)


def _read(records: Data, label: str, reader: ExampleReader) -> Iterator[Example]:
    for number, record in enumerate(iterate_records(records, label)):
        yield reader.read(record, number)


def _length(records: Data) -> int | None:
    return len(records) if isinstance(records, Sized) and not isinstance(records, str) else None


def _context_length(model: PreTrainedModel, max_length: int | None) -> int:
    limit = int(getattr(model.config, "max_position_embeddings", 0) or 0) or 2**31
    if max_length is None:
        return limit
    if not 2 <= max_length <= limit:
        raise ConfigError(f"max_length={max_length} is not between 2 and the model's context length {limit}.")
    return max_length


def model_description(model: PreTrainedModel) -> dict[str, Any]:
    """Return what identifies a model: name, model_type, hidden_size, num_hidden_layers."""
    config = model.config
    return {
        "name": str(getattr(config, "_name_or_path", "") or ""),
        "model_type": str(config.model_type),
        "hidden_size": int(getattr(config, "hidden_size", 0) or 0),
        "num_hidden_layers": int(getattr(config, "num_hidden_layers", 0) or 0),
    }
