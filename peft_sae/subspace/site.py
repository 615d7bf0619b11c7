"""The basis at one place of the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from ..errors import SelectionError

if TYPE_CHECKING:
    from ..sae.identity import SaeIdentity

# Singular values below this share of the largest are rounding, not directions.
_RANK_TOLERANCE = 1e-5


class HasSae(Protocol):
    """What belongs to one SAE and so has a place in the model."""

    @property
    def sae(self) -> SaeIdentity:
        """The SAE."""
        ...


@dataclass(frozen=True)
class SubspaceSite:
    """Chosen features of one SAE and the orthonormal basis built from them.

    Attributes:
        sae: the SAE that the features come from; it names the hook point.
        features: feature ids, int64 [k], best first.
        scores: their scores, float64 [k].
        q_values: share of false discoveries among features with as small a q-value, float64 [k].
        aligned_means: mean activation on the aligned texts, float64 [k].
        unaligned_means: mean activation on the unaligned texts, float64 [k].
        aligned_rates: share of the aligned tokens on which each fires, float64 [k].
        unaligned_rates: share of the unaligned tokens on which each fires, float64 [k].
        directions: their decoder directions, of unit length, float32 [k, d_in].
        basis: orthonormal rows, float32 [rank, d_in], most important first.
        coefficients: float32 [rank, k]; `basis = coefficients @ directions`.
        tokens: for each feature the tokens that its direction promotes most; empty lists if unknown.
    """

    sae: SaeIdentity
    features: torch.Tensor
    scores: torch.Tensor
    q_values: torch.Tensor
    aligned_means: torch.Tensor
    unaligned_means: torch.Tensor
    aligned_rates: torch.Tensor
    unaligned_rates: torch.Tensor
    directions: torch.Tensor
    basis: torch.Tensor
    coefficients: torch.Tensor
    tokens: tuple[tuple[str, ...], ...]

    @property
    def rank(self) -> int:
        """Number of basis vectors."""
        return int(self.basis.shape[0])


def unit_rows(directions: torch.Tensor, name: str) -> torch.Tensor:
    """Return rows scaled to unit length, float64, of the same shape.

    Raises:
        SelectionError: a row is zero.
    """
    rows = directions.detach().to(device="cpu", dtype=torch.float64)
    lengths = rows.norm(dim=-1, keepdim=True)
    if bool((lengths == 0).any()):
        dead = torch.nonzero(lengths.squeeze(-1) == 0).flatten().tolist()
        raise SelectionError(
            f"The chosen features number {dead} of {name!r} have a decoder direction of length zero, so they point "
            "nowhere. Choose other features."
        )
    return rows.div(lengths)


def principal_basis(directions: torch.Tensor, variance: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return an orthonormal basis of the main part of the span of some directions.

    With the singular value decomposition D = L S V of the unit directions D [k, d], the basis is the
    shortest run of rows of V whose squared singular values reach the share `variance` of their sum
    (PCA about the origin: directions are axes, and what they have in common must not be taken away as
    a mean). A QR decomposition then removes what rounding left of non-orthogonality. Signs are chosen
    so that each vector's coefficients have a positive sum. (SAILS, arXiv 2512.23260, gives "PCA with
    tau, then QR".)

    Args:
        directions: unit rows, float64 [k, d].
        variance: tau, the share of the squared singular values to keep, in (0, 1].

    Returns:
        The basis [rank, d] and the coefficients [rank, k], float64, with
        `basis = coefficients @ directions`.
    """
    left, values, right = torch.linalg.svd(directions, full_matrices=False)
    live = int((values > _RANK_TOLERANCE * values[0]).sum())
    shares = values[:live].square().cumsum(0) / values[:live].square().sum()
    rank = min(live, int((shares < variance - 1e-12).sum()) + 1)
    coefficients = (left[:, :rank] / values[:rank]).T
    orthogonal, upper = torch.linalg.qr(right[:rank].T)
    basis = orthogonal.T
    coefficients = torch.linalg.solve_triangular(upper.T, coefficients, upper=False)
    signs = torch.where(coefficients.sum(dim=1) < 0, -1.0, 1.0).to(torch.float64)[:, None]
    return basis * signs, coefficients * signs
