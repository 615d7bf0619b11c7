"""Gradients of an objective with respect to the activations at a site."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch.nn import functional

from ..errors import ConfigError, DataError
from ..sae.placement import Tap
from .batches import Batch
from .capture import Capture, evaluating, hook

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# From the logits [batch, length, vocabulary] and the batch to the sum over its examples of what is to be explained.
Objective: TypeAlias = Callable[[torch.Tensor, Batch], torch.Tensor]


def log_likelihood(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Return the sum of the log-probabilities (in nats) of the counted tokens, given the tokens before them."""
    counted = batch.counted[:, 1:].to(logits.device)
    targets = batch.ids[:, 1:].to(logits.device)[counted]
    return -functional.cross_entropy(logits[:, :-1][counted].float(), targets, reduction="sum")


def logit_difference(tokenizer: PreTrainedTokenizerBase, positive: Sequence[str], negative: Sequence[str]) -> Objective:
    """Return the objective "mean logit of some tokens minus that of others", behind each text's last counted token.

    With `tokens="prompt"` that is where the answer begins.

    Args:
        tokenizer: the model's.
        positive: tokens as text, for example `[" Sorry", " I"]`; each must be one token.
        negative: the others.

    Raises:
        ConfigError: a text is not one token, or none is given.
    """
    groups = []
    for texts in (positive, negative):
        if isinstance(texts, str) or not texts:
            raise ConfigError(f"{texts!r} is no list of tokens. Give one such as [' yes', ' Yes'].")
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        longer = [text for text, found in zip(texts, ids, strict=True) if len(found) != 1]
        if longer:
            raise ConfigError(
                f"{longer} are not single tokens of this tokenizer, so they have no logit of their own. Use their "
                "first tokens."
            )
        groups.append(torch.tensor([found[0] for found in ids]))

    def difference(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        places = torch.arange(batch.ids.shape[1])
        last = (batch.counted * places).amax(dim=1).to(logits.device)
        live = batch.counted.any(dim=1).to(logits.device)
        final = logits[torch.arange(len(last), device=logits.device), last][live].float()
        first, second = (final[:, ids.to(final.device)].mean(dim=1) for ids in groups)
        return (first - second).sum()

    # A state must not be continued with other tokens.
    difference.__qualname__ = f"{logit_difference.__qualname__}({list(positive)}, {list(negative)})"
    return difference


class GradientCapture(Capture):
    """Reads activations where SAEs read, and the gradients of an objective where they write.

    Made by `capturing_gradients`. The two places differ for transcoders only.
    """

    def __init__(
        self, model: PreTrainedModel, read: Sequence[Tap], written: Sequence[Tap], objective: Objective
    ) -> None:
        super().__init__(model, [*read, *written])
        self._objective, self._count = objective, len(read)
        self._leaves: dict[int, torch.Tensor] = {}

    def run_with_gradients(self, batch: Batch) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return the activations and the gradients of every SAE, each [batch, length, width].

        Raises:
            MismatchError: the forward pass never reached a site.
            DataError: the objective does not depend on the activations.
        """
        self._leaves.clear()
        with torch.enable_grad():
            logits = self._forward(batch.ids, batch.attention).logits
            activations = [tensor.detach() for tensor in self._captured(batch.ids)]
            objective = self._objective(logits, batch)
            if not objective.requires_grad:
                raise DataError(
                    "The objective does not depend on the model's activations, so there is nothing to attribute. It "
                    "must be computed from the logits, with gradients."
                )
            leaves = [self._leaves[index] for index in range(self._count, 2 * self._count)]
            found = torch.autograd.grad(objective, leaves, allow_unused=True)
        gradients = [
            torch.zeros_like(activation) if gradient is None else gradient.reshape(activation.shape)
            for gradient, activation in zip(found, activations[self._count :], strict=True)
        ]
        return activations[: self._count], gradients

    def keep(self, index: int, activations: torch.Tensor) -> torch.Tensor | None:
        """Store one site's activations, and let a leaf of the graph begin where an SAE writes."""
        self._found[index] = activations
        if index < self._count:
            return None
        self._leaves[index] = torch.zeros_like(activations, requires_grad=True)
        return activations + self._leaves[index]


@contextmanager
def capturing_gradients(
    model: PreTrainedModel, read: Sequence[Tap], written: Sequence[Tap], objective: Objective
) -> Iterator[GradientCapture]:
    """Hook the places where SAEs read and write for the time of a `with` block.

    The parameters need no gradients inside, so the graph begins at the first place; the model is left as it was found.
    """
    capture = GradientCapture(model, read, written, objective)
    # By name: where weights are offloaded, every forward pass leaves other parameters in the modules.
    trained = {name for name, weight in model.named_parameters(remove_duplicate=False) if weight.requires_grad}
    with evaluating(model), hook(model, [*read, *written], capture):
        try:
            model.requires_grad_(False)
            yield capture
        finally:
            for name, weight in model.named_parameters(remove_duplicate=False):
                weight.requires_grad_(name in trained)
