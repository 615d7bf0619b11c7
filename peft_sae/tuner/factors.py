"""The two factors of one LoRA layer: writing the basis, freezing it, and keeping directions out of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.distributed.tensor import DTensor, Replicate
from torch.utils.weak import WeakIdKeyDictionary

from ..errors import ConfigError
from ..layout import Side
from .module_plan import ModulePlan


class ProtectedLinear(nn.Module):
    """A factor of LoRA that neither reads nor writes given directions, whatever its parameter holds.

    With Q [count, width], orthonormal rows, the factor A [r, in] of a reading module is used as A (I - Q^T Q), and B
    [out, r] of a writing one as (I - Q^T Q) B, a bias with it. `weight` *is* that product, so forward, merging,
    unmerging and everything else in PEFT that reads a factor meet it alone. The parameter behind it, `raw_weight`, is
    what optimisers and FSDP see; an adapter is saved with the product under the usual name. The product costs
    2 * count * r * width multiplications, however many tokens there are.

    Args:
        linear: the factor as LoRA has made it; its parameters are taken over.
        unseen: Q, float32 [count, width].
        side: `read` for A, `write` for B.
    """

    def __init__(self, linear: nn.Linear, unseen: torch.Tensor, side: Side) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.side = side
        # No buffer: it must keep its precision when the model is cast, and does not belong into a checkpoint.
        self._unseen = unseen.float()
        self.raw_weight = linear.weight
        self.register_parameter("raw_bias", linear.bias)
        self._computed: torch.Tensor | None = None

    @property
    def weight(self) -> torch.Tensor:
        """The factor that takes effect, [out, in]."""
        weight = self.compute_weight()
        if not torch.compiler.is_compiling():
            # Always, so that what an earlier caller has left can never be taken for the factor of now.
            self._computed = weight if weight.requires_grad and weight is not self.raw_weight else None
        return weight

    def compute_weight(self) -> torch.Tensor:
        """Return `weight` without remembering it for `take_weight`."""
        raw = self.raw_weight
        # Outside of its forward pass FSDP1 leaves a part of it, or none; then its dtype and device are what is asked.
        if raw.shape != (self.out_features, self.in_features) or raw.is_meta or not _has_storage(raw):
            return raw
        return self.effective(raw)

    def take_weight(self) -> torch.Tensor:
        """Return what `weight` was when it was last asked for, once; or compute it.

        For the forward pass of PEFT's layer alone, which asks `weight` for its dtype right before. The product is
        small, but on a GPU the launch of its kernels is not.
        """
        if torch.compiler.is_compiling():
            return self.compute_weight()
        computed, self._computed = self._computed, None
        return self.compute_weight() if computed is None else computed

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_computed": None}  # no leaf, so it cannot be copied

    @property
    def bias(self) -> torch.Tensor | None:
        """The bias that takes effect; what a reading module's factor returns is not in the stream."""
        raw = self._parameters["raw_bias"]
        return raw if raw is None or raw.is_meta or self.side == "read" else self.effective(raw)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x [..., in] times the factor, [..., out]."""
        return nn.functional.linear(x, self.compute_weight(), self.bias)

    def effective(self, factor: torch.Tensor) -> torch.Tensor:
        """Return a factor, or a bias, without what lies along the protected directions.

        Args:
            factor: [r, width] to read, [width, r] or [width] to write.

        Returns:
            The same shape and dtype. In float16 and bfloat16 it is orthogonal up to the rounding of the result.
        """
        if self._unseen.device != factor.device:
            self._unseen = _moved(self._unseen, factor.device)
        # Under autocast the products would be rounded to a few digits, and the directions with them.
        kind = factor.device.type
        with torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext():
            exact = factor if factor.dtype == torch.float64 else factor.float()
            unseen = _distribute_like(self._unseen.to(exact.dtype), exact)
            part = (exact @ unseen.T) @ unseen if self.side == "read" else unseen.T @ (unseen @ exact)
            return (exact - part).to(factor.dtype)

    @property
    def count(self) -> int:
        """Number of protected directions."""
        return int(self._unseen.shape[0])

    def protects_like(self, other: ProtectedLinear) -> bool:
        """Return whether another factor keeps away from the same directions."""
        unseen = other._unseen.to(self._unseen.device)
        return self.side == other.side and torch.equal(self._unseen, unseen)

    def like(self, linear: nn.Linear) -> ProtectedLinear:
        """Return another factor that keeps away from the same directions."""
        return ProtectedLinear(linear, self._unseen, self.side)

    def extra_repr(self) -> str:
        """The sizes, and how many directions are protected."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.raw_bias is not None}, side={self.side}, protected={self.count}"


# Modules behind the same norm have the same directions, which move to a device once.
_copies: Any = WeakIdKeyDictionary()


def _moved(unseen: torch.Tensor, device: torch.device) -> torch.Tensor:
    copies: dict[torch.device, torch.Tensor] = _copies.get(unseen, {})
    _copies[unseen] = copies
    if device not in copies:
        copies[device] = unseen.to(device)
    return copies[device]


def _has_storage(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, DTensor) or torch.compiler.is_compiling() or tensor.untyped_storage().nbytes() > 0


def _distribute_like(unseen: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """The whole of the directions in every process that has a part of the factor (FSDP2)."""
    if not isinstance(factor, DTensor):
        return unseen
    mesh = factor.device_mesh
    return DTensor.from_local(unseen, mesh, [Replicate()] * mesh.ndim, run_check=False)


# Injection while transformers loads an adapter: its loader knows the parameters by LoRA's names.
_pending: ContextVar[list[tuple[LoraLayer, str, ModulePlan]] | None] = ContextVar("pending", default=None)


@contextmanager
def protecting_afterwards() -> Iterator[None]:
    """Put protected factors in place at the end only, taking over what was loaded in the meantime."""
    pending: list[tuple[LoraLayer, str, ModulePlan]] = []
    token = _pending.set(pending)
    try:
        yield
    finally:
        _pending.reset(token)
        for layer, adapter_name, plan in pending:
            protect_factors(layer, adapter_name, plan)


def protect_factors(layer: LoraLayer, adapter_name: str, plan: ModulePlan) -> None:
    """Put factors in place that keep to the plan's protected directions."""
    pending = _pending.get()
    if pending is not None:
        pending.append((layer, adapter_name, plan))
        return
    if plan.unseen_read is not None:
        layer.lora_A[adapter_name] = ProtectedLinear(layer.lora_A[adapter_name], plan.unseen_read, "read")
    if plan.unseen_write is not None:
        layer.lora_B[adapter_name] = ProtectedLinear(layer.lora_B[adapter_name], plan.unseen_write, "write")


def protected_factors(model: nn.Module, adapter_name: str | None = None) -> Iterator[tuple[str, ProtectedLinear]]:
    """Yield the protected factors of an adapter, or of all, with their names in the model."""
    for name, module in model.named_modules():
        if isinstance(module, ProtectedLinear) and (adapter_name is None or name.endswith(f".{adapter_name}")):
            yield name, module


def refuse_protected(model: nn.Module, adapter_name: str | None) -> None:
    """Raise an error if an adapter, or any, is held in protected factors, which other weights must not replace.

    Raises:
        ConfigError: it is.
    """
    for name, _ in protected_factors(model, adapter_name):
        raise ConfigError(
            f"{name!r} is being trained with protected features, and what is swapped in would not be protected alike. "
            "Load the adapter with is_trainable=False (inference_mode=True), and swap then."
        )


def raw_weight(factor: nn.Module) -> torch.Tensor:
    """Return the parameter that holds a factor, which `weight` is not where directions are protected."""
    weight = factor.raw_weight if isinstance(factor, ProtectedLinear) else factor.weight
    assert isinstance(weight, torch.Tensor)
    return weight


def holds_basis(layer: LoraLayer, adapter_name: str, plan: ModulePlan) -> bool:
    """Return whether a layer's factor is the planned basis, up to the factor's precision."""
    if plan.rows is None:
        return False
    factor = raw_weight((layer.lora_A if plan.side == "read" else layer.lora_B)[adapter_name])
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
    factor_a, factor_b = raw_weight(layer.lora_A[adapter_name]), raw_weight(layer.lora_B[adapter_name])
    if plan.rows is None or factor_a.is_meta:
        return
    basis, other = (factor_a, factor_b) if plan.side == "read" else (factor_b, factor_a)
    basis.copy_(plan.rows if plan.side == "read" else plan.rows.T)
    if neutral and plan.side == "write":  # LoRA itself has zeroed its B
        other.zero_()


def freeze_factors(layer: LoraLayer, adapter_name: str, names: tuple[str, ...]) -> None:
    """Declare factors as frozen, by PEFT's own mechanism.

    `BaseTunerLayer.frozen_peft_weight_names` makes PEFT keep them frozen whenever it switches adapters on.

    Args:
        layer: LoRA's layer.
        adapter_name: the adapter.
        names: `lora_A`, `lora_B`, both, or none (also of what an earlier adapter of that name froze).
    """
    frozen = {name: kept for name, kept in layer.frozen_peft_weight_names.items() if name != adapter_name}
    if names:
        frozen[adapter_name] = names
    layer.frozen_peft_weight_names = frozen
    layer._freeze_non_trainable_peft_weights(adapter_name)
