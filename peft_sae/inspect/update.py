"""A low-rank update of one module, measured without ever forming its matrix."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from ..layout import Side

_RANK_TOLERANCE = 1e-6  # singular values below this share of the largest are rounding of factors in float32


@dataclass(frozen=True, eq=False)
class LowRankUpdate:
    """dW = s B A of one module, in float64.

    Attributes:
        name: the module's name in the base model.
        a: factor A, [r, in].
        b: factor B, [out, r].
        scaling: s, LoRA's scaling (alpha / r, or alpha / sqrt(r) for rsLoRA).
    """

    name: str
    a: torch.Tensor
    b: torch.Tensor
    scaling: float

    @property
    def width(self) -> dict[Side, int]:
        """Width of the module on each side."""
        return {"read": int(self.a.shape[1]), "write": int(self.b.shape[0])}

    @cached_property
    def singular_values(self) -> torch.Tensor:
        """Singular values of dW, float64 [r], largest first: those of the r x r core between two QR decompositions."""
        values: torch.Tensor = torch.linalg.svdvals(self.scaling * self._corner_b @ self._corner_a.T)
        return values

    @property
    def norm(self) -> float:
        """Frobenius norm of dW."""
        return float(self.singular_values.norm())

    @property
    def rank(self) -> int:
        """Number of singular values above rounding."""
        values = self.singular_values
        return int((values > _RANK_TOLERANCE * values[0]).sum()) if float(values[0]) > 0 else 0

    def energy_along(self, directions: torch.Tensor, side: Side) -> torch.Tensor:
        """Return what of the update's energy lies along unit directions of one side.

        Args:
            directions: of unit length, float64 [n, width of the side].
            side: `read` gives the squared norm of dW v for every direction v, `write` that of v^T dW.

        Returns:
            Float64 [n].
        """
        factor, corner = (self.a.T, self._corner_b) if side == "read" else (self.b, self._corner_a)
        found: torch.Tensor = self.scaling * ((directions @ factor) @ corner.T)
        return found.square().sum(dim=1)

    def factor_rows(self, side: Side) -> torch.Tensor:
        """Orthonormal rows that span what the factor of one side reads or writes, float64 [rank of it, width]."""
        rows = self.a if side == "read" else self.b.T
        _, values, right = torch.linalg.svd(rows, full_matrices=False)
        kept: torch.Tensor = right[values > _RANK_TOLERANCE * values[0]] if float(values[0]) > 0 else right[:0]
        return kept

    @cached_property
    def _corner_a(self) -> torch.Tensor:
        corner: torch.Tensor = torch.linalg.qr(self.a.T, mode="r").R
        return corner

    @cached_property
    def _corner_b(self) -> torch.Tensor:
        corner: torch.Tensor = torch.linalg.qr(self.b, mode="r").R
        return corner


def principal_angles(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return the angles between two spaces, in degrees, smallest first.

    Small angles come from sines and large ones from cosines, because the arc cosine loses half the digits near 1
    (Björck and Golub, 1973).

    Args:
        first: orthonormal rows, float64 [k, width].
        second: orthonormal rows, float64 [n, width].

    Returns:
        Float64 [min(k, n)].
    """
    if len(first) > len(second):
        first, second = second, first
    cosines = torch.linalg.svdvals(first @ second.T).clamp(0, 1)
    sines = torch.linalg.svdvals(first - (first @ second.T) @ second).flip(0).clamp(0, 1)
    return torch.rad2deg(torch.where(cosines > 0.5**0.5, torch.asin(sines), torch.acos(cosines)))
