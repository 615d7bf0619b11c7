"""What a training needs, found on fake tensors: shapes and dtypes flow through the model, and no value is computed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

logger = logging.getLogger(__name__)

# NF4 with double quantisation: 4 bits, and an 8-bit scale per 64 weights with a 32-bit one per 256 of these.
_BYTES_OF_BITS = {4: 0.5 + 1 / 64 + 4 / (64 * 256), 8: 1.0}


@dataclass(frozen=True)
class Memory:
    """Expected memory of one device in bytes, without sharding.

    Attributes:
        weights: of the base model.
        adapter: of the adapter's factors.
        gradients: of what is trained.
        optimizer: its state.
        activations: what the forward pass keeps for the backward pass, at its most; None where it could not be found.
            The head and the loss, which TRL computes in tiles, are not in it.
    """

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int | None

    @property
    def total(self) -> int:
        """The sum of what is known."""
        return self.weights + self.adapter + self.gradients + self.optimizer + (self.activations or 0)


def estimate_memory(
    adapted: Any,
    *,
    batch: int,
    length: int,
    bits: int | None,
    checkpointing: bool,
    autocast: torch.dtype | None,
    optimizer: str,
) -> Memory:
    """Add up what an adapted model on the meta device will take when it is trained.

    Args:
        adapted: a PeftModel whose parameters are on the meta device. It is used up: they are fake tensors afterwards.
        batch: sequences per step and device.
        length: tokens per sequence.
        bits: that the base model's linear layers are quantised to; None for their own dtype.
        checkpointing: whether every block's activations are computed again in the backward pass.
        autocast: dtype of mixed precision, or None.
        optimizer: its name, as in `transformers.TrainingArguments.optim`.
    """
    weights, adapter, trained = 0.0, 0, 0
    linear = {
        id(module.weight)
        for name, module in adapted.named_modules()
        if isinstance(module, nn.Linear) and "lora_" not in name and not name.endswith("lm_head")
    }
    for name, parameter in adapted.named_parameters():
        size = parameter.numel() * parameter.element_size()
        if "lora_" in name or parameter.requires_grad:
            adapter += size
            trained += parameter.numel() if parameter.requires_grad else 0
        elif bits is not None and id(parameter) in linear:
            weights += parameter.numel() * _BYTES_OF_BITS[bits]
        else:
            weights += size
    gradients = sum(p.numel() * p.element_size() for p in adapted.parameters() if p.requires_grad)
    activations = _activations(adapted, batch, length, checkpointing, autocast)
    return Memory(round(weights), adapter, gradients, round(trained * state_bytes(optimizer)), activations)


def state_bytes(optimizer: str) -> float:
    """Bytes of state per trained parameter that an optimiser of transformers keeps; of an unknown one, Adam's."""
    name = optimizer.lower()
    if name == "sgd" or "adafactor" in name or "lomo" in name:
        return 0.0  # nothing (transformers gives SGD no momentum), or one row and one column per matrix
    values = 2
    if "rmsprop" in name or "adagrad" in name or "lion" in name:
        values = 1
    elif "ademamix" in name:
        values = 3
    return values * (1.0 if "8bit" in name else 0.5 if "4bit" in name else 4.0)


def _activations(
    adapted: Any, batch: int, length: int, checkpointing: bool, autocast: torch.dtype | None
) -> int | None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            adapted.to_empty(device="cpu")
            adapted.train()
            if checkpointing:
                adapted.enable_input_require_grads()
            ids, mask = torch.zeros(batch, length, dtype=torch.long), torch.ones(batch, length, dtype=torch.long)
            with nullcontext() if autocast is None else torch.autocast("cpu", dtype=autocast):
                return saved_bytes(adapted, ids, mask, checkpointing=checkpointing)
    except Exception as error:  # whatever an architecture does with values that are not there
        logger.info("The activations could not be found on fake tensors (%s: %s).", type(error).__name__, error)
        return None


def saved_bytes(adapted: Any, ids: torch.Tensor, mask: torch.Tensor, *, checkpointing: bool) -> int:
    """Return how many bytes a forward pass up to the head keeps for the backward pass.

    Every storage counts once, and parameters do not. With checkpointing: the blocks' inputs, and what the largest block
    keeps while it is computed again.

    Args:
        adapted: a PeftModel.
        ids: int64 [batch, length].
        mask: int64 [batch, length], 0 for padding. A batch without any is cheaper in some kernels; fake tensors are
            taken for one with padding.
        checkpointing: whether blocks are computed again.
    """
    model = adapted.get_base_model()
    backbone = getattr(model, model.base_model_prefix)
    counter = _Counter({parameter.untyped_storage()._cdata for parameter in adapted.parameters()})
    blocks = _blocks(model)
    inside: list[int] = []
    inputs: list[int] = []
    handles = []
    for block in blocks:
        handles.append(block.register_forward_pre_hook(counter.start(inputs), with_kwargs=True))
        handles.append(block.register_forward_hook(counter.stop(inside)))
    try:
        with torch.autograd.graph.saved_tensors_hooks(counter.pack, lambda tensor: tensor):
            backbone(input_ids=ids, attention_mask=mask, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    if not checkpointing or not blocks:
        return counter.total
    return counter.total - sum(inside) + sum(inputs) + max(inside)


def _blocks(model: Any) -> list[nn.Module]:
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    found = [part for part in model.modules() if isinstance(part, nn.ModuleList) and len(part) == depth]
    return list(found[0]) if found else []


class _Counter:
    """Adds up the storages that autograd saves."""

    def __init__(self, known: set[int]) -> None:
        self._seen = set(known)
        self._kept: list[Any] = []  # so that no storage's address is used again
        self._began = 0
        self.total = 0

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        """Count a tensor that is saved."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self._kept.append(storage)
            self.total += storage.nbytes()
        return tensor

    def start(self, inputs: list[int]) -> Callable[..., None]:
        """Return a hook for the beginning of a block."""

        def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            stream = args[0] if args else kwargs["hidden_states"]
            inputs.append(stream.numel() * stream.element_size())
            self._began = self.total

        return hook

    def stop(self, inside: list[int]) -> Callable[..., None]:
        """Return a hook for the end of a block."""

        def hook(*_: Any) -> None:
            inside.append(self.total - self._began)

        return hook
