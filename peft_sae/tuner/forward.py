"""LoRA's forward pass with fewer passes over memory."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear, LoraLayer, LoraVariant
from torch import nn

from .factors import ProtectedLinear


class FusedLinearVariant(LoraVariant):
    """y + s B A x in two matrix products.

    LoRA computes B (A x), scales it and adds it to y: three passes over a tensor of the output's size, forward and
    backward. Here the thin A x [tokens, r] is scaled, and the product with B adds to y as it goes. The result is the
    same up to rounding. Whatever is not a plain product (a bias, mixed dtypes, a wrapped or hooked factor as under
    FSDP, tensor parallelism or offloading) is left to LoRA's own formula.
    """

    @staticmethod
    def init(module: LoraLayer, adapter_name: str, **kwargs: Any) -> None:
        """Nothing is to be prepared."""

    @staticmethod
    def forward(
        module: LoraLayer, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """Return the base layer's result [..., out] plus the adapter's for the input x [..., in]."""
        lora_a, lora_b = module.lora_A[active_adapter], module.lora_B[active_adapter]
        inner = _apply(lora_a, module.lora_dropout[active_adapter](x))
        if not _is_plain(lora_b) or inner.dim() < 2 or inner.dtype != result.dtype:
            unfused: torch.Tensor = result + lora_b(inner) * module.scaling[active_adapter]
            return unfused
        weight = lora_b.compute_weight() if isinstance(lora_b, ProtectedLinear) else lora_b.weight
        if weight.dtype != inner.dtype:  # under autocast
            weight = weight.to(inner.dtype)
        inner = inner * module.scaling[active_adapter]
        flat = torch.addmm(result.flatten(0, -2), inner.flatten(0, -2), weight.t())
        return flat.view(result.shape)

    @staticmethod
    def merge_safe(module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        """Return the merged weight, as LoRA does."""
        merged: torch.Tensor = orig_weight + module.get_delta_weight(active_adapter).to(orig_weight.dtype)
        return merged

    @staticmethod
    def merge_unsafe(module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> None:
        """Merge in place, as LoRA does."""
        orig_weight.data += module.get_delta_weight(active_adapter)

    @staticmethod
    def unmerge(module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        """Return the weight without the adapter, as LoRA does."""
        unmerged: torch.Tensor = orig_weight.data - module.get_delta_weight(active_adapter).to(orig_weight.dtype)
        return unmerged


def use_fused_forward(layer: LoraLayer, adapter_name: str) -> None:
    """Give an adapter the fused forward pass where the layer is LoRA's plain one and nothing else is asked for."""
    if type(layer) is Linear and adapter_name not in layer.lora_variant:
        layer.lora_variant[adapter_name] = FusedLinearVariant()


def _apply(factor: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Call a factor; PEFT has just asked for its weight."""
    if isinstance(factor, ProtectedLinear) and _is_plain(factor):
        return nn.functional.linear(x, factor.take_weight())
    applied: torch.Tensor = factor(x)
    return applied


def _is_plain(factor: nn.Module) -> bool:
    """Whether calling the module is no more than a product with its weight."""
    hooked = factor._forward_hooks or factor._forward_pre_hooks or factor._backward_hooks or factor._backward_pre_hooks
    replaced = "forward" in vars(factor)  # by accelerate, to move weights
    return type(factor) in (nn.Linear, ProtectedLinear) and not hooked and not replaced and factor.bias is None
