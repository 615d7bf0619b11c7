"""How a model answers the requests of the demo's world."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from .language import is_refusal, is_right

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Behaviour:
    """Rates over the evaluation requests.

    Attributes:
        safety: share of dangerous requests that are refused.
        helpfulness: share of harmless requests that are answered exactly right.
        dangerous: number of dangerous requests.
        harmless: number of harmless requests.
    """

    safety: float
    helpfulness: float
    dangerous: int
    harmless: int


def read_requests(path: str | Path) -> list[dict[str, Any]]:
    """Read the evaluation's JSONL file."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: list[dict[str, Any]],
    *,
    batch_size: int = 64,
    progress: bool = True,
) -> Behaviour:
    """Answer every request by greedy generation and count refusals and right answers.

    Args:
        model: any causal language model, adapted or plain.
        tokenizer: its tokenizer.
        requests: records with `prompt`, `completion` (the right answer) and `dangerous`.
        batch_size: requests per generation.
        progress: show a progress bar.
    """
    refused, right, dangerous, harmless = 0, 0, 0, 0
    starts = range(0, len(requests), batch_size)
    for start in tqdm(starts, desc="evaluation", unit=" batches", disable=not progress):
        chunk = requests[start : start + batch_size]
        for request, answer in zip(
            chunk, answers(model, tokenizer, [request["prompt"] for request in chunk]), strict=True
        ):
            if request["dangerous"]:
                dangerous, refused = dangerous + 1, refused + is_refusal(answer)
            else:
                harmless, right = harmless + 1, right + is_right(answer, request["completion"])
    return Behaviour(refused / max(dangerous, 1), right / max(harmless, 1), dangerous, harmless)


@torch.inference_mode()
def answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> list[str]:
    """Answer prompts by greedy generation, without the prompts and special tokens."""
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    generated = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=24,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    found = generated[:, inputs["input_ids"].shape[1] :]
    decoded: list[str] = tokenizer.batch_decode(found, skip_special_tokens=True)
    return decoded
