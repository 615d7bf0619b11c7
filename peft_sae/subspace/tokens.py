"""What a direction of the residual stream says in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..layout import LOCAL_KINDS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_TOKENS_PER_FEATURE = 8


@torch.no_grad()
def promoted_tokens(
    directions: torch.Tensor, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, kind: str
) -> tuple[tuple[str, ...], ...]:
    """The tokens with the largest logits when a direction goes straight through the unembedding."""
    unembedding = model.get_output_embeddings()
    # What is not in the residual stream, such as the heads' outputs, the unembedding cannot read.
    if tokenizer is None or unembedding is None or kind in LOCAL_KINDS or unembedding.weight.is_meta:
        return ((),) * directions.shape[0]
    weight = unembedding.weight
    if weight.shape[-1] != directions.shape[-1]:  # quantised, or behind a projection
        return ((),) * directions.shape[0]
    logits = directions.to(device=weight.device, dtype=weight.dtype) @ weight.T
    best = logits.topk(min(_TOKENS_PER_FEATURE, logits.shape[-1]), dim=-1).indices.tolist()
    return tuple(tuple(tokenizer.decode([token]) for token in row) for row in best)
