"""What an edit does to one side of an update: a linear map that is the identity but for a few directions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..errors import ConfigError
from ..tuner.basis import orthonormal_rows
from .request import Kind

_TOLERANCE = 1e-6  # singular values of unit vectors below this share of the largest are rounding
_EXACT = 1e-9
_LARGEST_GROWTH = 100.0  # times; float32 would keep less than five digits of what is removed


@dataclass(frozen=True, eq=False)
class DirectionMap:
    """M [width, width] for factors as rows: A becomes A M, and B^T becomes B^T M.

    Directions V [n, width] (unit rows) are to become M v_i = c_i v_i, and what is orthogonal to all of them is to stay:
    M = I - V^T diag(1 - c) U, with U [n, width] the dual vectors, u_i . v_j = 1 for i = j and else 0, which span the
    same space (the transposed pseudo-inverse of V, so the least change that does it). Where all c are equal any basis
    of the span serves, and for c = 0 M is the projection off the span. To keep only the directions M is the projection
    on their span.

    Attributes:
        kind: `scale` or `keep`.
        rows: V, or an orthonormal basis of its span, float64 [n, width].
        duals: U, float64 [n, width].
        factors: c, float64 [n].
        rank: dimensions of the span.
    """

    kind: Kind
    rows: torch.Tensor
    duals: torch.Tensor
    factors: torch.Tensor
    rank: int

    def apply(self, factor: torch.Tensor) -> torch.Tensor:
        """Return the rows of a factor (A, or B transposed) times M, float64 [r, width]."""
        if self.kind == "keep":
            return (factor @ self.rows.T) @ self.rows
        edited = factor - ((factor @ self.rows.T) * (1 - self.factors)) @ self.duals
        # What is all removed is zero, not rounding that would point anywhere.
        return torch.where(edited.norm() > 1e-13 * factor.norm(), edited, 0.0)

    def deviation(self, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        """Return how far rounded rows are from what the map promises, as rows to be met by the other factor.

        Args:
            before: the factor before the edit, [r, width].
            after: the factor as it is stored, [r, width].

        Returns:
            [n, r] for scaled directions, what is met along each beyond its share; [width, r] for kept ones, what lies
            outside their span.
        """
        if self.kind == "keep":
            return (after - (after @ self.rows.T) @ self.rows).T
        return self.rows @ after.T - self.factors[:, None] * (self.rows @ before.T)


def make_map(kind: Kind, rows: torch.Tensor, factors: torch.Tensor, names: Sequence[str], module: str) -> DirectionMap:
    """Return the map of an edit.

    Args:
        kind: `scale` or `keep`.
        rows: directions as the module meets them, of unit length, float64 [n, width].
        factors: what is to be left of each, float64 [n].
        names: the features' names, for messages.
        module: the module's name, for messages.

    Raises:
        ConfigError: directions depend on each other, or nearly so, and are to be scaled differently.
    """
    if kind == "keep" or bool((factors == factors[:1]).all()):
        basis = orthonormal_rows(rows)
        return DirectionMap(kind, basis, basis, factors[:1].expand(len(basis)), len(basis))
    duals = torch.linalg.pinv(rows, rtol=_TOLERANCE).T
    change = (1 - factors)[:, None]
    size = float(change.abs().max())
    missed = (rows.T @ (change * (torch.eye(len(rows)).double() - duals @ rows.T))).norm(dim=0)
    if float(missed.max()) > _EXACT * size:
        told = [f"{name} at {factor:g}" for name, factor, off in _sorted(names, factors, missed) if off > _EXACT * size]
        raise ConfigError(
            f"As {module!r} meets them, the features depend linearly on each other, so they cannot be left at "
            f"different shares of what they are ({', '.join(told[:4])}). Give them the same, or edit fewer."
        )
    growth = float(torch.linalg.matrix_norm(_triangle(rows) @ (change * _triangle(duals).T), ord=2)) / size
    if growth > _LARGEST_GROWTH:
        first, second, cosine = _closest(rows, factors)
        raise ConfigError(
            f"As {module!r} meets them, the features {names[first]} and {names[second]} are almost parallel (cosine "
            f"{cosine:.6f}) and to be left at {factors[first]:g} and {factors[second]:g} times what they are: what "
            f"lies between them would be made {growth:.0f} times larger. Give them the same, or edit one of them."
        )
    return DirectionMap(kind, rows, duals, factors, len(rows))


def _triangle(rows: torch.Tensor) -> torch.Tensor:
    """R of a QR decomposition of the transposed rows, [width or n, n]."""
    corner: torch.Tensor = torch.linalg.qr(rows.T, mode="r").R
    return corner


def _sorted(names: Sequence[str], factors: torch.Tensor, missed: torch.Tensor) -> list[tuple[str, float, float]]:
    order = missed.argsort(descending=True, stable=True).tolist()
    return [(names[index], float(factors[index]), float(missed[index])) for index in order]


def _closest(rows: torch.Tensor, factors: torch.Tensor) -> tuple[int, int, float]:
    """The two directions with different factors that are closest to each other."""
    cosines = rows @ rows.T
    cosines = torch.where(factors[:, None] == factors[None], 0.0, cosines)
    place = int(cosines.abs().argmax())
    first, second = divmod(place, len(rows))
    return first, second, float(cosines[first, second])
