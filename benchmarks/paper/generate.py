"""Answers by greedy generation, cached one by one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from benchmarks.paper.data import Prompt
from benchmarks.paper.lines import Lines, key_of, open_lines
from benchmarks.paper.models import Trained
from benchmarks.paper.specs import GenerationSpec
from peft_sae.errors import ConfigError, DataError


@dataclass(frozen=True)
class Answer:
    """What a model says to a prompt.

    Attributes:
        prompt: the prompt.
        text: the answer, without special tokens and without what follows a stop text.
        tokens: tokens that were made for it.
        complete: whether it ended by itself, and not at the highest number of tokens.
    """

    prompt: Prompt
    text: str
    tokens: int
    complete: bool


def answer_key(identity: str, text: str, spec: GenerationSpec) -> str:
    """Return what an answer depends on; the batch size is no part of it, and the dtype is one of the identity."""
    settings = {name: getattr(spec, name) for name in ("prompt_form", "stop", "max_new_tokens")}
    return key_of("answer", identity, text, settings)


def generate(
    load: Callable[[], Trained],
    identity: str,
    prompts: Sequence[Prompt],
    spec: GenerationSpec,
    path: Path,
    *,
    label: str,
    progress: bool,
) -> list[Answer]:
    """Answer prompts, except those whose answers are there already.

    Args:
        load: gives the model, and is only called if there is something to do.
        identity: the model's.
        prompts: what it is asked.
        spec: how.
        path: the cache.
        label: of the progress bar.
        progress: show it.
    """
    keys = [answer_key(identity, prompt.text, spec) for prompt in prompts]
    with open_lines(path) as cache:
        left = cache.missing(keys, prompts)
        if left:
            _generate(load(), left, spec, cache, label, progress)
        return [_answer(prompt, cache[key]) for prompt, key in zip(prompts, keys, strict=True)]


def _answer(prompt: Prompt, row: Mapping[str, Any]) -> Answer:
    return Answer(prompt, row["answer"], row["tokens"], row["complete"])


def _generate(
    trained: Trained, left: Mapping[str, Prompt], spec: GenerationSpec, cache: Lines, label: str, progress: bool
) -> None:
    rows = [(key, encode_prompt(trained.tokenizer, prompt.text, spec)) for key, prompt in left.items()]
    for key, ids in rows:
        if len(ids) > spec.max_prompt_tokens:
            raise DataError(
                f"Prompt {left[key].id} has {len(ids)} tokens, and max_prompt_tokens={spec.max_prompt_tokens}; cut, it "
                "would be another one. Raise it, or leave the prompt out of the set."
            )
    rows.sort(key=lambda row: -len(row[1]))  # the longest batch comes first, and with it any lack of memory
    with ExitStack() as stack:
        bar = stack.enter_context(tqdm(total=len(rows), desc=label, unit=" answers", disable=not progress))
        for batch in _batches(rows, spec.batch_size):
            answers = _answer_batch(trained, [ids for _, ids in batch], spec)
            for (key, _), found in zip(batch, answers, strict=True):
                cache.add(key, {"method": trained.method, "prompt": left[key].text, **found})
            bar.update(len(batch))


def _batches(rows: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def encode_prompt(tokenizer: Any, text: str, spec: GenerationSpec) -> list[int]:
    """Return the tokens of a prompt in its form, with BOS where the tokenizer or its template puts one.

    Raises:
        ConfigError: neither a form nor a chat template says how a prompt is put.
    """
    if spec.prompt_form is not None:
        ids: list[int] = tokenizer(put(spec.prompt_form, prompt=text))["input_ids"]
        # Some tokenizers end every text with EOS, behind which nothing would be said.
        return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids
    if not tokenizer.chat_template:
        raise ConfigError(
            "The tokenizer has no chat template and the experiment no generation.prompt_form, so nothing says how a "
            'prompt is put. Give for example prompt_form: "\\n\\nHuman: {prompt}\\n\\nAssistant:".'
        )
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
    )
    found: list[int] = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    return found


def put(form: str, **values: str) -> str:
    """Return a form with values in the place of their names; braces in form and values mean nothing else."""
    return re.sub("|".join(rf"\{{{name}\}}" for name in values), lambda match: values[match[0][1:-1]], form)


@torch.inference_mode()
def _answer_batch(trained: Trained, prompts: Sequence[list[int]], spec: GenerationSpec) -> list[dict[str, Any]]:
    tokenizer, model = trained.tokenizer, trained.model
    pad = next(
        (
            token
            for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id)
            if token is not None
        ),
        0,
    )
    length = max(map(len, prompts))
    ids = torch.tensor([[pad] * (length - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    stop: dict[str, Any] = {"stop_strings": list(spec.stop), "tokenizer": tokenizer} if spec.stop else {}
    # A checkpoint's own generation settings may ask for sampling, or for other penalties.
    plain = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
    made = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=spec.max_new_tokens, pad_token_id=pad, **plain, **stop
    )[:, length:].tolist()
    ends = model.generation_config.eos_token_id
    ends = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id, pad}
    return [_finish(tokenizer, row, ends, spec) for row in made]


def _finish(tokenizer: Any, row: list[int], ends: set[int | None], spec: GenerationSpec) -> dict[str, Any]:
    """An answer up to its end; a row that a stop text has ended is padded, in a batch."""
    end = next((place for place, token in enumerate(row) if token in ends), None)
    text = tokenizer.decode(row[:end], skip_special_tokens=True)
    places = [place for place in map(text.find, spec.stop) if place >= 0]
    complete = end is not None or bool(places)
    return {"answer": text[: min(places, default=len(text))].strip(), "tokens": len(row[:end]), "complete": complete}
