"""Running a plain model up to a site and reading the activations there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import MismatchError
from ..sae.placement import Tap

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class _DeepestReached(Exception):
    """Ends a forward pass when nothing below is needed."""


class Capture:
    """Reads the activations at some sites of a model, computing nothing past the deepest of them.

    Made by `capturing`.
    """

    def __init__(self, model: PreTrainedModel, taps: Sequence[Tap]) -> None:
        self._model = model
        self._taps = taps
        self._found: dict[int, torch.Tensor] = {}

    def run(self, ids: torch.Tensor, attention: torch.Tensor) -> list[torch.Tensor]:
        """Return the activations at every site, each [batch, length, width], in the order of the taps.

        Args:
            ids: token ids, int64 [batch, length].
            attention: 1 for tokens, 0 for padding, int64 [batch, length].

        Raises:
            MismatchError: the forward pass never reached a site.
        """
        self._found.clear()
        device = self._model.get_input_embeddings().weight.device
        with suppress(_DeepestReached):
            self._model(input_ids=ids.to(device), attention_mask=attention.to(device), use_cache=False)
        missing = [tap for index, tap in enumerate(self._taps) if index not in self._found]
        if missing:
            raise MismatchError(
                f"The forward pass of {type(self._model).__name__} does not go through {missing[0].module!r}, so the "
                f"activations at {missing[0].site} are not to be had. Choose other SAEs."
            )
        # OPT's blocks flatten batch and length between the attention and the end.
        return [self._found[index].reshape(*ids.shape, -1) for index in range(len(self._taps))]

    def keep(self, index: int, activations: torch.Tensor) -> None:
        """Store one site's activations, and end the forward pass when all are there."""
        self._found[index] = activations
        if len(self._found) == len(self._taps):
            raise _DeepestReached


@contextmanager
def capturing(model: PreTrainedModel, taps: Sequence[Tap]) -> Iterator[Capture]:
    """Hook the sites of a model for the time of a `with` block.

    The model is in evaluation mode and inference mode inside, and left exactly as it was found.
    """
    capture = Capture(model, taps)
    training = [module for module in model.modules() if module.training]
    handles = []
    try:
        for index, tap in enumerate(taps):
            handles.append(_register(model.get_submodule(tap.module), tap, index, capture))
        for module in training:
            module.training = False
        with torch.inference_mode():
            yield capture
    finally:
        for handle in handles:
            handle.remove()
        for module in training:
            module.training = True


def _register(module: nn.Module, tap: Tap, index: int, capture: Capture) -> Any:
    if tap.end == "output":

        def read_output(_: nn.Module, __: Any, output: Any) -> None:
            capture.keep(index, output[0] if isinstance(output, tuple) else output)

        return module.register_forward_hook(read_output)

    def read_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        capture.keep(index, args[0] if args else kwargs["hidden_states"])

    return module.register_forward_pre_hook(read_input, with_kwargs=True)
