"""What a direction of the residual stream says in words."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import nn

from ..layout import LOCAL_KINDS
from ..sae.placement import find_layout

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_ROWS = 16384  # of the unembedding, taken to float32 at a time

Words: TypeAlias = "tuple[tuple[str, ...], ...]"


@dataclass(frozen=True)
class TokenEffects:
    """The tokens whose logits directions raise and lower most, for each direction in their order.

    Attributes:
        promoted: the tokens of the largest logits, largest first; empty where they cannot be known.
        suppressed: those of the smallest, smallest first; empty where they cannot be known.
    """

    promoted: Words
    suppressed: Words


def promoted_tokens(
    directions: torch.Tensor,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    kind: str,
    *,
    count: int = 8,
) -> Words:
    """Return the promoted tokens of `token_effects` alone."""
    return token_effects(directions, model, tokenizer, kind, count=count).promoted


def token_effects(
    directions: torch.Tensor,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    kind: str,
    *,
    count: int = 8,
) -> TokenEffects:
    """Return the tokens that directions promote and suppress when they go straight to the head: the logit lens.

    Args:
        directions: of the residual stream, [k, d_model].
        model: the plain Hugging Face model; its last norm and its unembedding are read.
        tokenizer: None gives no tokens.
        kind: the kind of site where the directions live. Those outside the residual stream have no tokens.
        count: tokens per direction and side, at most.

    Returns:
        Empty tuples where there is nothing to read: no head, or one that is quantised, offloaded, or behind a
        projection.
    """
    logits = None if tokenizer is None or kind in LOCAL_KINDS or count < 1 else lens_logits(directions, model)
    if logits is None or tokenizer is None:
        nothing: Words = ((),) * directions.shape[0]
        return TokenEffects(nothing, nothing)
    logits = logits[:, : len(tokenizer)]  # some models pad their vocabulary
    count = min(count, logits.shape[1])
    best, worst = (logits.topk(count, dim=-1, largest=largest).indices.tolist() for largest in (True, False))
    promoted, suppressed = (
        tuple(tuple(str(tokenizer.decode([token])) for token in row) for row in rows) for rows in (best, worst)
    )
    return TokenEffects(promoted, suppressed)


@torch.no_grad()
def lens_logits(directions: torch.Tensor, model: PreTrainedModel) -> torch.Tensor | None:
    """Return how the logits change along directions of the stream behind the last block, float32 [k, vocabulary].

    W_U (g * d) with W_U the unembedding and g the gain of the last norm, or W_U (g * (d - mean(d))) behind a LayerNorm,
    each row up to a positive factor. That is the derivative of the logits along d at a stream that is orthogonal to d.
    Left out are: the norm's division by the stream's own size, which scales all logits alike, and that it takes off
    what lies along the stream; the blocks in between, which read the direction too; biases, which do not depend on it;
    and a final soft cap, which flattens large logits.

    Returns:
        None if the model has no head that reads the stream, or one that cannot be multiplied with: on the meta device,
        quantised, or behind a projection.
    """
    weight: torch.Tensor | None = getattr(model.get_output_embeddings(), "weight", None)
    if weight is None or not _is_plain(weight) or weight.shape[1:] != directions.shape[1:]:
        return None
    layout = find_layout(model)
    if layout.head is None:
        return None
    seen = _behind_norm(directions, model, layout.final_norm)
    if seen is None:
        return None
    seen = seen.to(device=weight.device, dtype=torch.float32)
    parts = [seen @ weight[start : start + _ROWS].float().T for start in range(0, weight.shape[0], _ROWS)]
    return torch.cat(parts, dim=1)


def _is_plain(weight: torch.Tensor) -> bool:
    return type(weight) in (torch.Tensor, nn.Parameter) and weight.is_floating_point() and not weight.is_meta


def _behind_norm(directions: torch.Tensor, model: PreTrainedModel, path: str | None) -> torch.Tensor | None:
    """Directions as the head meets them, up to a positive factor each; None if the norm's gain cannot be had.

    Every RMSNorm and LayerNorm N gives N(x) = s * g * x + b, with x centred by the latter and s a positive number that
    depends on the size of x alone. So half of N(d) - N(-d) has the direction that is wanted, with no table of norms
    and their conventions (Gemma's gain is 1 + weight).
    """
    rows = directions.detach().float()
    if path is None:
        return rows
    try:
        norm = model.get_submodule(path)
    except AttributeError:
        logger.warning("There is no last norm at %r, so the tokens that features promote are left out.", path)
        return None
    parameter = next(norm.parameters(), None)
    if parameter is not None and parameter.is_meta:
        return None
    device = rows.device if parameter is None else parameter.device
    if parameter is not None and parameter.dtype != torch.float32:  # a copy; its outputs would be rounded
        norm = copy.deepcopy(norm).float()
    # With a mean square of 1 the norm's epsilon does not matter.
    rows = (nn.functional.normalize(rows, dim=-1) * rows.shape[-1] ** 0.5).to(device)
    odd: torch.Tensor = (norm(rows[None])[0] - norm(-rows[None])[0]) / 2
    return odd
