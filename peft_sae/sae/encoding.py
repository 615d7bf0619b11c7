"""Running an SAE's encoder as sae-lens does, whole or some features at a time, and leaving the SAE as it was."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from sae_lens import SAE

# In the encoders of these classes of sae-lens (not of ones derived from them) no feature depends on another.
_SEPARABLE = (
    "StandardSAE",
    "JumpReLUSAE",
    "GatedSAE",
    "Transcoder",
    "SkipTranscoder",
    "JumpReLUTranscoder",
    "JumpReLUSkipTranscoder",
)
_PER_FEATURE = ("W_enc", "b_enc", "b_gate", "b_mag", "r_mag", "threshold")
# A product with fewer features or tokens than these is slow, whatever it gains by staying in the cache.
_LEAST_FEATURES, _LEAST_ROWS = 1024, 192


@torch.no_grad()
def encode(sae: SAE[Any], inputs: torch.Tensor) -> torch.Tensor:
    """Return the feature activations [tokens, d_sae] of `inputs` [tokens, width], of the SAE's dtype and device."""
    with _unchanged(sae):
        return _encode(sae, inputs)


@torch.no_grad()
def encode_blocks(sae: SAE[Any], inputs: torch.Tensor, elements: int) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """Yield the feature activations block by block, each of about `elements` activations.

    A block has all tokens and some of the features where the encoder treats each feature by itself: what sae-lens does
    to a block after the matrix product then finds it in the cache, and the product stays fast.

    Args:
        sae: the SAE.
        inputs: [tokens, width], of the SAE's dtype and device.
        elements: a size; blocks can be larger where products of that size would be slow.

    Yields:
        Which tokens, which features, and their activations, of shape [tokens of the block, features of the block].
    """
    width = int(sae.cfg.d_sae)
    separable = _is_separable(sae)
    rows = max(_LEAST_ROWS, elements // (_LEAST_FEATURES if separable else width))
    for tokens in _parts(len(inputs), rows):
        part = inputs[tokens]
        limit = max(_LEAST_FEATURES, elements // len(part)) if separable else width
        for features in _parts(width, limit):
            with _unchanged(sae):
                found = _encode(_narrowed(sae, features) if separable else sae, part)
            yield tokens, features, found


def _encode(sae: SAE[Any], inputs: torch.Tensor) -> torch.Tensor:
    if sae.hook_z_reshaping_mode:
        # A plain model gives the heads' outputs already side by side, as this SAE wants them inside.
        sae.turn_off_forward_pass_hook_z_reshaping()
    features: torch.Tensor = sae.encode(inputs)
    return features.to_dense() if features.is_sparse else features


def _is_separable(sae: SAE[Any]) -> bool:
    """Whether the encoder may be run on some features, and nobody looks on who expects all of them."""
    kind = type(sae)
    known = kind.__module__.split(".")[0] == "sae_lens" and kind.__name__ in _SEPARABLE
    hooked = any(module._forward_hooks or module._forward_pre_hooks for module in sae.modules())
    return known and type(sae.activation_fn) is torch.nn.ReLU and not hooked


def _narrowed(sae: SAE[Any], features: slice) -> SAE[Any]:
    """Return the SAE with these features alone in its encoder. It shares its weights, and is its own object."""
    narrowed = copy.copy(sae)
    weights = {name: sae._parameters[name] for name in _PER_FEATURE if sae._parameters.get(name) is not None}
    narrowed._parameters = {**sae._parameters, **{name: weight[..., features] for name, weight in weights.items()}}
    return narrowed


def _parts(length: int, limit: int) -> Iterator[slice]:
    """Cut a length into as few parts as the limit allows, all of about the same size: small products are slow."""
    number = -(-length // limit)
    for index in range(number):
        yield slice(index * length // number, (index + 1) * length // number)


@contextmanager
def _unchanged(sae: SAE[Any]) -> Iterator[None]:
    """Undo what encoding stores in the SAE object: its reshaping mode and the norms of the last input."""
    state = vars(sae)
    before = dict(state)
    try:
        yield
    finally:  # one by one, so that the object is whole at every moment
        for name in [name for name in state if name not in before]:
            del state[name]
        for name, value in before.items():
            if state.get(name) is not value:
                state[name] = value
