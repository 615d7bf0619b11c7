"""Whether an SAE's metadata name another model than the one at hand."""

from __future__ import annotations

import itertools
import re
from functools import cache
from typing import TypeAlias

# A name as words and numbers: "Llama-3.1-8B-Instruct" is ("llama", "3", "1", "size", "instruct").
_Tokens: TypeAlias = "tuple[str, ...]"

# Families whose models are named otherwise than transformers names their architecture.
_ALIASES = {"pythia": "gpt_neox"}
# What transformers appends to a family's name for parts and variants of it; names of models rarely say it.
_APPENDED = {"text", "vision", "audio", "encoder", "decoder", "moe"}
_SIZE = re.compile(r"(?<![a-z0-9.])(?:\d+x)?\d+(?:\.\d+)?[bmk](?![a-z0-9])")


def is_other_model(trained_on: str, *, model_type: str, name: str) -> bool:
    """Return whether `trained_on` names another family than the model's, or another version of it.

    Sizes and suffixes such as "-it" are not compared: the width is checked elsewhere, and SAEs of a base
    model are used on its fine-tuned children. A name that tells no family is no evidence.

    Args:
        trained_on: model name in the SAE's metadata, for example `gemma-2-2b`.
        model_type: the model's `config.model_type`, for example `gemma2`.
        name: the model's name or path; it may be empty.
    """
    theirs, ours = _tokens(trained_on), _tokens(name)
    families = _families(theirs)
    if not families:
        return False
    shared = families & (_families(ours) | _families(_tokens(model_type)))
    return not shared or any(_versions_differ(family[0], theirs, ours) for family in shared)


def _tokens(name: str) -> _Tokens:
    """The last part of a name or path in words and numbers; a size such as "8b" becomes "size"."""
    last = re.split(r"[/\\]", name.rstrip("/\\"))[-1].lower()
    return tuple(re.findall(r"[a-z]+|\d+", _SIZE.sub(" size ", last)))


@cache
def _known_families() -> dict[_Tokens, _Tokens]:
    """Every architecture of transformers and every alias as tokens, with the family that it names."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    types = (_tokens(name) for name in CONFIG_MAPPING_NAMES)
    known = {tokens: tokens for tokens in types if tokens and not _APPENDED & set(tokens)}
    return known | {_tokens(alias): _tokens(family) for alias, family in _ALIASES.items()}


def _families(tokens: _Tokens) -> set[_Tokens]:
    """The architectures that a name mentions; of several that begin at one word, the longest."""
    known = _known_families()
    found = set()
    for start in range(len(tokens)):
        runs = (tokens[start:end] for end in range(len(tokens), start, -1))
        found |= {known[run] for run in itertools.islice(filter(known.__contains__, runs), 1)}
    return found


def _versions_differ(word: str, theirs: _Tokens, ours: _Tokens) -> bool:
    first, second = _version(word, theirs), _version(word, ours)
    return bool(first and second) and first != second


def _version(word: str, tokens: _Tokens) -> _Tokens:
    """The numbers that follow a word: ("3", "1") for "llama" in "Llama-3.1-8B"."""
    if word not in tokens:
        return ()
    start = end = tokens.index(word) + 1
    while end < len(tokens) and tokens[end].isdigit():
        end += 1
    return tokens[start:end]
