"""Features that an update must neither read nor write."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..sae.names import feature_name, parse_feature_name

if TYPE_CHECKING:
    from ..sae.identity import SaeIdentity

__all__ = ["ProtectedSite", "feature_name", "parse_feature_name"]


@dataclass(frozen=True)
class ProtectedSite:
    """Protected features of one SAE.

    Attributes:
        sae: the SAE that the features come from; it names the hook point.
        features: feature ids, int64 [count].
        directions: their decoder directions, of unit length, float32 [count, d_in].
        tokens: for each feature the tokens that its direction promotes most; empty lists if unknown.
    """

    sae: SaeIdentity
    features: torch.Tensor
    directions: torch.Tensor
    tokens: tuple[tuple[str, ...], ...]
