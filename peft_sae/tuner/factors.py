"""Reading and writing the two factors of one LoRA layer."""

from __future__ import annotations

import torch
from peft.tuners.lora import LoraLayer

from .module_plan import ModulePlan


def holds_basis(layer: LoraLayer, adapter_name: str, plan: ModulePlan) -> bool:
    """Return whether a layer's factor is the planned basis, up to the factor's precision."""
    if plan.rows is None:
        return False
    factor = (layer.lora_A if plan.side == "read" else layer.lora_B)[adapter_name].weight
    rows = plan.rows if plan.side == "read" else plan.rows.T
    return not factor.is_meta and torch.equal(factor.detach().cpu(), rows.to(factor.dtype))


@torch.no_grad()
def write_basis(layer: LoraLayer, adapter_name: str, plan: ModulePlan, *, neutral: bool) -> None:
    """Initialise a layer's factors: the basis on the module's side, zero on the other.

    Args:
        layer: LoRA's layer.
        adapter_name: the adapter.
        plan: the module's plan. Without rows, and on the meta device, nothing is written.
        neutral: zero the other factor. Otherwise it stays as LoRA has made it, which with
            `init_lora_weights=False` is at random.
    """
    factor_a, factor_b = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
    if plan.rows is None or factor_a.is_meta:
        return
    basis, other = (factor_a, factor_b) if plan.side == "read" else (factor_b, factor_a)
    basis.copy_(plan.rows if plan.side == "read" else plan.rows.T)
    if neutral and plan.side == "write":  # LoRA itself has zeroed its B
        other.zero_()


def freeze_basis(layer: LoraLayer, adapter_name: str, side: str) -> None:
    """Declare the factor that holds the basis as frozen, by PEFT's own mechanism.

    `BaseTunerLayer.frozen_peft_weight_names` makes PEFT keep the factor frozen whenever it switches adapters on.

    Args:
        layer: LoRA's layer.
        adapter_name: the adapter.
        side: `read`, `write`, or `none` to freeze nothing (also what an earlier adapter of that name froze).
    """
    names = {name: frozen for name, frozen in layer.frozen_peft_weight_names.items() if name != adapter_name}
    if side != "none":
        names[adapter_name] = ("lora_A",) if side == "read" else ("lora_B",)
    layer.frozen_peft_weight_names = names
    layer._freeze_non_trainable_peft_weights(adapter_name)
