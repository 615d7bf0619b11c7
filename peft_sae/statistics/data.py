"""From a user's data set to token ids, with a mask of the tokens that count."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from ..errors import ConfigError, DataError
from .records import Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

TokenChoice = Literal["all", "prompt", "response", "assistant"]
TOKEN_CHOICES = ("all", "prompt", "response", "assistant")

_Spans: TypeAlias = "list[tuple[int, int]] | None"
# What transformers looks for before it gives a mask of the assistant's tokens.
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Example:
    """One tokenised text.

    Attributes:
        ids: token ids, BOS included where there is one.
        counted: for each token, whether it is among those that were asked for.
        ordinary: for each token, whether it is one of the text: neither BOS nor what the tokenizer adds.
        number: place of the record in its data set.
        templated: whether a chat template rendered the text, and so has ended it as the model expects.
        cut: whether the text went on.
        text: the text.
        spans: for each token, where in the text it begins and ends; the same place twice for what is not in it.
    """

    ids: list[int]
    counted: list[bool]
    ordinary: list[bool]
    number: int = 0
    templated: bool = False
    cut: bool = False
    text: str = field(default="", compare=False, repr=False)
    spans: tuple[tuple[int, int], ...] = field(default=(), compare=False, repr=False)


class ExampleReader:
    """Tokenises records in the forms that training data have.

    A record is a string, or a mapping with `text`, with `prompt` and `completion`, or with `messages`
    (also as a list under `prompt` and `completion`), which go through the tokenizer's chat template.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        tokens: which tokens count. `response` is the completion or, of messages, the assistant's last turn;
            `prompt` is everything before it; `assistant` is all that the assistant says, in every turn.
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

    def read(self, record: Record, number: int) -> Example:
        """Tokenise one record.

        Args:
            record: the record.
            number: its place in the data.

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
        ordinary = [not added for added in encoding["special_tokens_mask"]]
        places = [(int(start), int(end)) for start, end in encoding["offset_mapping"]]
        counted = [self._counts(start, end, spans) for start, end in places]
        if self._prepend_bos and (not ids or ids[0] != self._tokenizer.bos_token_id):
            ids, counted, ordinary = [self._tokenizer.bos_token_id, *ids], [False, *counted], [False, *ordinary]
            places = [(0, 0), *places]
        ignored = {self._tokenizer.bos_token_id, self._tokenizer.pad_token_id}
        if self._tokenizer.pad_token_id == self._tokenizer.eos_token_id:
            ignored = {self._tokenizer.bos_token_id}  # here padding is known from the attention mask alone
        ordinary = [keep and token not in ignored for keep, token in zip(ordinary, ids, strict=True)]
        # Where there is no BOS, the first token is what every head attends to for want of better, whatever it says.
        ordinary[:1] = [False] * len(ordinary[:1])
        counted = [keep and real for keep, real in zip(counted, ordinary, strict=True)]
        length = self._max_length
        cut = len(ids) > length
        self.truncated += cut
        return Example(
            ids[:length], counted[:length], ordinary[:length], number, templated, cut, text, tuple(places[:length])
        )

    def _counts(self, start: int, end: int, spans: _Spans) -> bool:
        """Whether the token at these characters counts, given the spans of the response."""
        if spans is None:
            return True
        # A token that straddles the border belongs to the response: it cannot be known before it.
        in_response = any(start < span_end and end > span_start for span_start, span_end in spans)
        if self._tokens == "prompt":
            return not in_response and (not spans or start < spans[0][0])
        return in_response

    def _render(self, record: Record, number: int) -> tuple[str, _Spans, bool]:
        """The text, the character spans of the response if they matter, and whether it is templated."""
        if isinstance(record, str):
            text: str = record
        elif isinstance(record, Mapping) and "messages" in record:
            return self._render_messages(record["messages"], number, first=-1)
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

    def _render_pair(self, prompt: Any, completion: Any, number: int) -> tuple[str, _Spans, bool]:
        if isinstance(prompt, str) and isinstance(completion, str):
            spans = None if self._tokens == "all" else [(len(prompt), len(prompt) + len(completion))]
            return prompt + completion, spans, False
        if isinstance(prompt, list) and isinstance(completion, list):
            return self._render_messages([*prompt, *completion], number, first=len(prompt))
        raise DataError(
            f"Example {number} has a prompt of type {type(prompt).__name__} and a completion of type "
            f"{type(completion).__name__}, which cannot be joined. Give two strings or two lists of messages."
        )

    def _render_messages(self, messages: Any, number: int, *, first: int) -> tuple[str, _Spans, bool]:
        """The same for a conversation, whose response begins at the message with the index `first`."""
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
        if self._tokens == "assistant" and _GENERATION.search(str(self._tokenizer.chat_template)):
            return text, self._marked_spans(messages), True
        begin = 0 if self._tokens == "assistant" else first if first >= 0 else len(messages) - 1
        spans = []
        for index, message in enumerate(messages):
            if index < begin or message.get("role") != "assistant":
                continue
            before, through = (
                self._template(messages[:index], True, number),
                self._template(messages[: index + 1], False, number),
            )
            if not (text.startswith(before) and text.startswith(through)):
                raise DataError(
                    f"Example {number}: the chat template changes earlier turns when later ones are added, so the "
                    "assistant's tokens cannot be found. Use tokens='all', tokens='response' for the last turn alone, "
                    "or a template that marks them with {% generation %}."
                )
            spans.append((len(before), len(through)))
        return text, spans, True

    def _marked_spans(self, messages: list[Mapping[str, Any]]) -> list[tuple[int, int]]:
        """Character spans that the template itself marks as the assistant's, with {% generation %}."""
        found = self._tokenizer.apply_chat_template(
            messages,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True},
        )
        return [
            (start, end)
            for (start, end), marked in zip(found["offset_mapping"], found["assistant_masks"], strict=True)
            if marked
        ]

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
