"""Running a plain model up to a site and reading the activations there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import MismatchError
from ..sae.norm import without_gain
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
        self._device = input_device(model)
        # Where weights are offloaded, tensors made in inference mode would stay in the modules.
        offloaded = any(parameter.is_meta for parameter in model.parameters())
        self._mode = torch.no_grad if offloaded else torch.inference_mode
        self._found: dict[int, torch.Tensor] = {}

    def run(self, ids: torch.Tensor, attention: torch.Tensor) -> list[torch.Tensor]:
        """Return the activations at every site, each [batch, length, width], in the order of the taps.

        Args:
            ids: token ids, int64 [batch, length].
            attention: 1 for tokens, 0 for padding, int64 [batch, length].

        Raises:
            MismatchError: the forward pass never reached a site.
        """
        with suppress(_DeepestReached), self._mode():
            self._forward(ids, attention)
        return self._captured(ids)

    def _forward(self, ids: torch.Tensor, attention: torch.Tensor) -> Any:
        self._found.clear()
        return self._model(input_ids=ids.to(self._device), attention_mask=attention.to(self._device), use_cache=False)

    def _captured(self, ids: torch.Tensor) -> list[torch.Tensor]:
        """What the last pass has brought to the sites."""
        missing = [tap for index, tap in enumerate(self._taps) if index not in self._found]
        if missing:
            raise MismatchError(
                f"The forward pass of {type(self._model).__name__} does not go through {missing[0].module!r}, so the "
                f"activations at {missing[0].site} are not to be had. Choose other SAEs."
            )
        # OPT's blocks flatten batch and length between the attention and the end.
        return [self._found[index].reshape(*ids.shape, -1) for index in range(len(self._taps))]

    def keep(self, index: int, activations: torch.Tensor) -> torch.Tensor | None:
        """Store one site's activations, and end the forward pass when all are there.

        Returns:
            What the site is to hold instead; None leaves it as it is.
        """
        self._found[index] = activations
        if len(self._found) == len(self._taps):
            raise _DeepestReached
        return None


def input_device(model: nn.Module) -> torch.device:
    """Return the device that a model wants its token ids on, also where its weights are offloaded."""
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    execution = getattr(getattr(embeddings, "_hf_hook", None), "execution_device", None)
    return embeddings.weight.device if execution is None else torch.device(execution)


@contextmanager
def capturing(model: PreTrainedModel, taps: Sequence[Tap]) -> Iterator[Capture]:
    """Hook the sites of a model for the time of a `with` block.

    The model is in evaluation mode inside, run without gradients (in inference mode), and left exactly as it was found.
    """
    capture = Capture(model, taps)
    with evaluating(model), hook(model, taps, capture):
        yield capture


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode for the time of a `with` block."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def hook(model: nn.Module, taps: Sequence[Tap], capture: Capture) -> Iterator[None]:
    """Hook the sites of a model for the time of a `with` block."""
    handles = []
    try:
        for index, tap in enumerate(taps):
            handles.append(_register(model.get_submodule(tap.module), tap, index, capture))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _register(module: nn.Module, tap: Tap, index: int, capture: Capture) -> Any:
    if tap.end == "output":

        def read_output(_: nn.Module, __: Any, output: Any) -> Any:
            if not isinstance(output, tuple):
                return capture.keep(index, output)
            changed = capture.keep(index, output[0])
            return None if changed is None else (changed, *output[1:])

        return module.register_forward_hook(read_output)

    def read_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = args[0] if args else kwargs["hidden_states"]
        changed = capture.keep(index, without_gain(module, given) if tap.end == "normalized" else given)
        if changed is None:
            return None
        return ((changed, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": changed})

    return module.register_forward_pre_hook(read_input, with_kwargs=True)
