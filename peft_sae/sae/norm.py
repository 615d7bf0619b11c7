"""What a norm makes of its input before its gain and bias."""

from __future__ import annotations

import torch
from torch import nn


def can_leave_out_gain(norm: nn.Module) -> bool:
    """Whether a module is a norm whose gain and bias `without_gain` can leave out."""
    return _epsilon(norm) is not None and (isinstance(norm, nn.LayerNorm) or "RMSNorm" in type(norm).__name__)


def without_gain(norm: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """Return `hidden` normalised as the norm does it, without its gain and bias, as TransformerLens' `hook_normalized`.

    It is that of a model whose norms' gains are folded into the modules behind them too, such as the one that Gemma
    Scope's transcoders were trained on. Computed, not divided out of the norm's output: a gain may be 0.

    Args:
        norm: an `nn.LayerNorm` or an RMS norm.
        hidden: the norm's input, shape [..., width].

    Returns:
        Shape [..., width], at least in float32.
    """
    hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    if isinstance(norm, nn.LayerNorm):
        hidden = hidden - hidden.mean(dim=-1, keepdim=True)
    normalized: torch.Tensor = hidden * torch.rsqrt(hidden.pow(2).mean(dim=-1, keepdim=True) + (_epsilon(norm) or 0.0))
    return normalized


def _epsilon(norm: nn.Module) -> float | None:
    for name in ("eps", "variance_epsilon"):
        value = getattr(norm, name, None)
        if value is not None:
            return float(value)
    return None
