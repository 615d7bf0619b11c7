"""The basis as one module sees it: through the norm, orthonormal, and filled up to the rank."""

from __future__ import annotations

import copy
import hashlib
from dataclasses import dataclass

import torch
from torch import nn

from ..layout import Side

_TOLERANCE = 1e-6  # a gain or a direction smaller than this, relative to the largest, is zero
# The part of a direction that is new beside those before it. Cholesky QR loses its square in precision: with the first
# it is exact to 1e-13 at once, with the second after a repetition.
_WELL_CONDITIONED = 3e-2
_ILL_CONDITIONED = 1e-5
_REMAINDER = 0.1


@dataclass(frozen=True)
class NormGain:
    """What a norm does to a small change of its input, up to the common rescaling.

    Attributes:
        gain: factor per channel, float64 [width].
        centers: whether the norm takes off the mean over the channels first, as LayerNorm does.
    """

    gain: torch.Tensor
    centers: bool


@torch.no_grad()
def measure_norm(norm: nn.Module, width: int) -> NormGain | None:
    """Find a norm's gain by asking the norm itself.

    For an input x of ones and minus ones with mean 0, every RMSNorm and LayerNorm gives g * x plus a bias; half
    the difference of the outputs for x and -x is g * x. Whether the norm centres shows on the constant
    input, which LayerNorm maps to its bias. So no table of norms and their conventions (Gemma's `1 +
    weight`) is needed.

    Args:
        norm: the norm.
        width: its number of channels.

    Returns:
        None if the weights are on the meta device, where there is nothing to measure.
    """
    parameter = next(norm.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    if device.type == "meta":
        return None
    dtype = torch.float32 if parameter is None else parameter.dtype
    if dtype not in (torch.float32, torch.float64):  # its outputs would be rounded to a few digits
        norm, dtype = copy.deepcopy(norm).float(), torch.float32
    signs = torch.ones(width, device=device, dtype=dtype)
    signs[1::2] = -1
    if width % 2:  # then the mean is zero with the last channel at zero, which the rolled input measures
        signs[-1] = 0
    inputs = torch.stack([signs, signs.roll(1), torch.ones_like(signs)])
    outputs: torch.Tensor = norm(torch.cat([inputs, -inputs])[None])[0]
    odd = ((outputs[:3].double() - outputs[3:].double()) / 2).cpu()
    signs = signs.double().cpu()
    gain = torch.where(signs == 0, odd[1] * signs.roll(1), odd[0] * signs)
    return NormGain(gain=gain, centers=bool(odd[2].abs().max() < 1e-3 * gain.abs().max()))


def through_norm(basis: torch.Tensor, norm: NormGain | None, side: Side) -> torch.Tensor:
    """Return directions of the residual stream as a module meets them.

    A feature direction d reaches a reading module as g * d, or g * (d - mean(d)) behind a LayerNorm: that is
    what the feature looks like there, and what the module's update reads. (Seen from the stream it reads along
    g * g * d. Reading the stream along d alone would take d / g, which channels of small gain dominate; in the
    demo's worlds neither did better than the other.) A writing module behind a post-norm must write d / g to move
    the stream along d; channels whose gain is zero it cannot move, and they are left at zero. A post-norm that centres
    takes off the mean of what is written, so that goes before.

    Args:
        basis: directions, float [rank, width].
        norm: the norm between stream and module, or None.
        side: the module's side.

    Returns:
        Directions of any length, float64 [rank, width].
    """
    directions = basis.double().cpu()
    if norm is None:
        return directions
    if side == "read":
        if norm.centers:
            directions = directions - directions.mean(dim=-1, keepdim=True)
        return directions * norm.gain
    usable = norm.gain.abs() > _TOLERANCE * norm.gain.abs().max()
    directions = torch.where(usable, directions / torch.where(usable, norm.gain, 1.0), 0.0)
    return directions - directions.mean(dim=-1, keepdim=True) if norm.centers else directions


def unseen_through_norm(directions: torch.Tensor, norm: NormGain | None, side: Side) -> torch.Tensor:
    """Return what a module's factor must be orthogonal to, so that it neither reads nor writes some directions.

    A change of the stream along d reaches a reading module along g * d, or g * (d - mean(d)) behind a LayerNorm. What
    a writing module adds as u changes the stream behind a post-norm by g * u, whose part along d is the product of u
    with g * d, or with g * d - mean(g * d) where the norm centres. Both up to the norm's common rescaling.

    Args:
        directions: directions of the residual stream, float [count, width].
        norm: the norm between stream and module, or None.
        side: the module's side.

    Returns:
        Directions of any length, float64 [count, width].
    """
    found = directions.double().cpu()
    if norm is None:
        return found
    if side == "read":
        return through_norm(found, norm, side)
    found = found * norm.gain
    return found - found.mean(dim=-1, keepdim=True) if norm.centers else found


def orthonormal_rows(directions: torch.Tensor) -> torch.Tensor:
    """Return orthonormal rows that span the same space, in the same order of importance.

    The result is that of Gram-Schmidt: each row adds to those before it what its direction has left. It is computed by
    Cholesky QR, which for a few rows of a great width costs two thin products, and once more where that loses digits;
    where directions depend on each other it is done row by row.

    Args:
        directions: float64 [rank, width].

    Returns:
        Float64 [rank', width]; rank' is smaller where directions depend on those before them, or are so short beside
        the longest that they are rounding.
    """
    lengths = directions.norm(dim=-1)
    longest = float(lengths.max()) if len(directions) else 0.0
    rows = directions = directions[lengths > _TOLERANCE * longest]
    if not len(rows):
        return rows
    for _ in range(2):
        gram = rows @ rows.T
        scale = torch.diagonal(gram).rsqrt()
        lower, failed = torch.linalg.cholesky_ex(gram * scale * scale[:, None])
        newest = float(torch.diagonal(lower).min())
        if bool(failed) or not newest > _ILL_CONDITIONED:  # also where a zero row has made it NaN
            return _gram_schmidt_rows(directions)
        # The inverse is small; multiplying by it is faster than solving for every column.
        inverse = torch.linalg.solve_triangular(lower, torch.diag(scale), upper=False)
        rows = inverse @ rows
        if newest > _WELL_CONDITIONED:
            break
    return rows


def _gram_schmidt_rows(directions: torch.Tensor) -> torch.Tensor:
    """Row by row, which is slow and holds for rows that depend on each other, wherever they stand."""
    found = torch.empty_like(directions)
    count = 0
    for row in torch.nn.functional.normalize(directions):
        known = found[:count]
        # Twice, because the first subtraction leaves rounding errors of the size of its operands.
        for _ in range(2):
            row = row - (known @ row) @ known
        length = row.norm()
        if length > _TOLERANCE and count < directions.shape[1]:
            found[count] = row / length
            count += 1
    return found[:count]


def without_part(rows: torch.Tensor, avoided: torch.Tensor) -> torch.Tensor:
    """Return orthonormal rows, in the same order, that span what is left of some rows without their part along others.

    What is left of a direction that lies almost within the others would be a direction of its own, hardly one of the
    first: of the principal directions those are left out of which less than a tenth remains.

    Args:
        rows: orthonormal, float64 [rank, width].
        avoided: orthonormal, float64 [count, width].

    Returns:
        Float64 [rank', width], orthogonal to `avoided`.
    """
    left = rows - (rows @ avoided.T) @ avoided
    remainders = torch.linalg.svd(left, full_matrices=False)
    space = remainders.Vh[remainders.S > _REMAINDER]
    space = space - (space @ avoided.T) @ avoided
    return orthonormal_rows((left @ space.T) @ space)


def fill_rows(rows: torch.Tensor, count: int, *, seed: str) -> torch.Tensor:
    """Return `count` random orthonormal rows that are orthogonal to given ones.

    Args:
        rows: orthonormal, float64 [rank, width].
        count: how many are wanted; `rank + count` must not exceed the width.
        seed: any text; the same text gives the same rows on every machine and in every process.
    """
    number = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:7], "big")
    generator = torch.Generator().manual_seed(number)
    random = torch.randn(count, rows.shape[1], generator=generator).double()
    # Twice, because the first subtraction leaves rounding errors of the size of its operands.
    for _ in range(2):
        random = orthonormal_rows(random - (random @ rows.T) @ rows)
    return random
