"""Weights of base modules, where they are there."""

from __future__ import annotations

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


def base_weight(module: nn.Module) -> torch.Tensor | None:
    """Return a linear module's weight, [out, in], as it is multiplied with; None if it is not there.

    A skeleton has no values, and what is offloaded is on the meta device. Quantised weights are not unpacked.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.is_meta or weight.ndim != 2 or not weight.is_floating_point():
        return None
    if weight.numel() > 1 and not any(weight.stride()):  # one zero, shown in the weight's shape
        return None
    return weight.detach().T if isinstance(module, Conv1D) else weight.detach()
