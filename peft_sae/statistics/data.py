"""From a user's data set to token ids, with a mask of the tokens that count."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch

from ..errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

TokenChoice = Literal["all", "prompt", "response"]
TOKEN_CHOICES = ("all", "prompt", "response")
Data: TypeAlias = "str | Path | Iterable[str | Mapping[str, Any]]"


@dataclass(frozen=True)
class Example:
    """One tokenised text.

    Attributes:
        ids: token ids, BOS included where there is one.
        counted: for each token, whether it is among those that were asked for.
        templated: whether a chat template rendered the text, and so has ended it as the model expects.
        cut: whether the text went on.
    """

    ids: list[int]
    counted: list[bool]
    templated: bool = False
    cut: bool = False


@dataclass(frozen=True)
class Batch:
    """Padded examples.

    Attributes:
        ids: int64 [batch, length], padded on the right.
        attention: int64 [batch, length], 1 for tokens and 0 for padding.
        counted: bool [batch, length], the tokens that enter the statistics.
    """

    ids: torch.Tensor
    attention: torch.Tensor
    counted: torch.Tensor


class ExampleReader:
    """Tokenises records in the forms that training data have.

    A record is a string, or a mapping with `text`, with `prompt` and `completion`, or with `messages`
    (also as a list under `prompt` and `completion`), which go through the tokenizer's chat template.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        tokens: which tokens count. `prompt` and `response` need records that tell them apart; of
            messages, the response is what the assistant says.
        max_length: longer texts are cut at the end, and counted in `truncated`.
        prepend_bos: put BOS in front where the tokenizer does not do so itself.

    Attributes:
        truncated: number of texts cut so far.

    Raises:
        ConfigError: unknown `tokens`, or a slow tokenizer.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, tokens: TokenChoice, max_length: int, prepend_bos: bool
    ) -> None:
        if tokens not in TOKEN_CHOICES:
            raise ConfigError(f"tokens={tokens!r} is unknown. Choose one of {TOKEN_CHOICES}.")
        if not tokenizer.is_fast:
            raise ConfigError(
                f"{type(tokenizer).__name__} is a slow tokenizer, which cannot say where its tokens lie in the text. "
                "Load it with AutoTokenizer.from_pretrained(..., use_fast=True)."
            )
        self._tokenizer = tokenizer
        self._tokens = tokens
        self._max_length = max_length
        self._prepend_bos = prepend_bos and tokenizer.bos_token_id is not None
        self.truncated = 0

    def read(self, record: str | Mapping[str, Any], number: int) -> Example:
        """Tokenise one record.

        Args:
            record: the record.
            number: its place in the data, for error messages.

        Raises:
            DataError: the record has none of the known forms, or is empty.
        """
        text, spans, templated = self._render(record, number)
        if not text.strip():
            raise DataError(f"Example {number} is empty, so it has no activations. Remove it from the data.")
        encoding = self._tokenizer(
            text,
            add_special_tokens=not templated,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            verbose=False,
        )
        ids = list(encoding["input_ids"])
        counted = [
            not added and self._counts(start, end, spans)
            for added, (start, end) in zip(encoding["special_tokens_mask"], encoding["offset_mapping"], strict=True)
        ]
        if self._prepend_bos and (not ids or ids[0] != self._tokenizer.bos_token_id):
            ids, counted = [self._tokenizer.bos_token_id, *ids], [False, *counted]
        ignored = {self._tokenizer.bos_token_id, self._tokenizer.pad_token_id}
        if self._tokenizer.pad_token_id == self._tokenizer.eos_token_id:
            ignored = {self._tokenizer.bos_token_id}  # here padding is known from the attention mask alone
        counted = [keep and token not in ignored for keep, token in zip(counted, ids, strict=True)]
        cut = len(ids) > self._max_length
        if cut:
            self.truncated += 1
            ids, counted = ids[: self._max_length], counted[: self._max_length]
        return Example(ids=ids, counted=counted, templated=templated, cut=cut)

    def _counts(self, start: int, end: int, spans: list[tuple[int, int]] | None) -> bool:
        """Whether the token at these characters counts, given the spans of the response."""
        if spans is None:
            return True
        # A token that straddles the border belongs to the response: it cannot be known before it.
        in_response = any(start < span_end and end > span_start for span_start, span_end in spans)
        return in_response == (self._tokens == "response")

    def _render(self, record: str | Mapping[str, Any], number: int) -> tuple[str, list[tuple[int, int]] | None, bool]:
        """The text, the character spans of the response if they matter, and whether it is templated."""
        if isinstance(record, str):
            text: str = record
        elif isinstance(record, Mapping) and "messages" in record:
            return self._render_messages(record["messages"], number)
        elif isinstance(record, Mapping) and "prompt" in record and "completion" in record:
            return self._render_pair(record["prompt"], record["completion"], number)
        elif isinstance(record, Mapping) and isinstance(record.get("text"), str):
            text = record["text"]
        else:
            found = sorted(record) if isinstance(record, Mapping) else type(record).__name__
            raise DataError(
                f"Example {number} has {found}, and none of the known forms. Give strings, or records with 'text', "
                "with 'prompt' and 'completion', or with 'messages'."
            )
        if self._tokens != "all":
            raise DataError(
                f"Example {number} is plain text, in which tokens={self._tokens!r} cannot be told apart. Give records "
                "with 'prompt' and 'completion' or with 'messages', or use tokens='all'."
            )
        return text, None, False

    def _render_pair(self, prompt: Any, completion: Any, number: int) -> tuple[str, list[tuple[int, int]] | None, bool]:
        if isinstance(prompt, str) and isinstance(completion, str):
            spans = None if self._tokens == "all" else [(len(prompt), len(prompt) + len(completion))]
            return prompt + completion, spans, False
        if isinstance(prompt, list) and isinstance(completion, list):
            return self._render_messages([*prompt, *completion], number)
        raise DataError(
            f"Example {number} has a prompt of type {type(prompt).__name__} and a completion of type "
            f"{type(completion).__name__}, which cannot be joined. Give two strings or two lists of messages."
        )

    def _render_messages(self, messages: Any, number: int) -> tuple[str, list[tuple[int, int]] | None, bool]:
        if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
            raise DataError(
                f"Example {number} has malformed messages. Give a list of mappings with 'role' and 'content'."
            )
        if not self._tokenizer.chat_template:
            raise DataError(
                f"Example {number} is a conversation, and the tokenizer has no chat template to render it. Set "
                "`tokenizer.chat_template`, use the tokenizer of the chat model, or give 'prompt' and 'completion'."
            )
        text = self._template(messages, False, number)
        if self._tokens == "all":
            return text, None, True
        spans = []
        for index, message in enumerate(messages):
            if message.get("role") != "assistant":
                continue
            before, through = (
                self._template(messages[:index], True, number),
                self._template(messages[: index + 1], False, number),
            )
            if not (text.startswith(before) and text.startswith(through)):
                raise DataError(
                    f"Example {number}: the chat template changes earlier turns when later ones are added, so the "
                    "assistant's tokens cannot be found. Use tokens='all'."
                )
            spans.append((len(before), len(through)))
        return text, spans, True

    def _template(self, messages: list[Mapping[str, Any]], generation_prompt: bool, number: int) -> str:
        from jinja2 import TemplateError

        if not messages:
            return ""
        try:
            rendered = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=generation_prompt
            )
        except TemplateError as error:
            raise DataError(
                f"Example {number} does not suit the tokenizer's chat template ({error}). Mend the conversation."
            ) from error
        return str(rendered)


def _is_message(message: Any) -> bool:
    return isinstance(message, Mapping) and "role" in message and "content" in message


def check_data(data: Data, label: str) -> None:
    """Open a file of records and close it again, so that a wrong path is told before the long work.

    Raises:
        DataError: it cannot be opened.
    """
    if isinstance(data, (str, Path)):
        next(iter(iterate_records(data, label)), None)


def iterate_records(data: Data, label: str) -> Iterator[str | Mapping[str, Any]]:
    """Yield the records of a data set: a `datasets.Dataset`, an iterable, or a path to a JSONL file.

    Raises:
        DataError: the file is missing or a line of it is not JSON.
    """
    if isinstance(data, Mapping):
        raise DataError(
            f"The {label} data is a mapping with the keys {list(data)[:5]}, and a sequence of records is needed. Give "
            "one of its splits, or a list."
        )
    if not isinstance(data, (str, Path)):
        yield from data
        return
    try:
        with Path(data).open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _parse_line(line, number, data)
    except OSError as error:
        raise DataError(
            f"The {label} data {str(data)!r} cannot be opened ({error.strerror}). Give the path of a JSONL file, a "
            "list, or a datasets.Dataset."
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"'{data}' is not UTF-8 text ({error}). Convert the file.") from error


def _parse_line(line: str, number: int, file: str | Path) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"Line {number} of '{file}' is not JSON ({error}). Mend the line.") from error


def iterate_batches(
    examples: Iterable[Example], *, batch_size: int, pad_id: int, pool: int = 64
) -> Iterator[tuple[Batch, int]]:
    """Yield padded batches and the number of examples that each stands for.

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


def _drain(waiting: Sequence[Example], batch_size: int, pad_id: int) -> Iterator[tuple[Batch, int]]:
    ordered = sorted(waiting, key=lambda example: len(example.ids))
    for start in range(0, len(ordered), batch_size):
        chunk = ordered[start : start + batch_size]
        yield _pad(chunk, pad_id), len(chunk)


def _pad(examples: Sequence[Example], pad_id: int) -> Batch:
    length = max(len(example.ids) for example in examples)
    ids = torch.full((len(examples), length), pad_id, dtype=torch.int64)
    attention = torch.zeros_like(ids)
    counted = torch.zeros_like(ids, dtype=torch.bool)
    for row, example in enumerate(examples):
        ids[row, : len(example.ids)] = torch.tensor(example.ids)
        attention[row, : len(example.ids)] = 1
        counted[row, : len(example.ids)] = torch.tensor(example.counted)
    return Batch(ids=ids, attention=attention, counted=counted)
