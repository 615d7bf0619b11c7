"""What the update of every module is, and how far it has moved from the basis that it started from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..layout import Side
from ..tuner.basis import fill_rows
from .places import ModulePlace
from .update import principal_angles
from .weights import base_weight

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = {
    "module": "name in the base model",
    "block": "block of the model; none for the head",
    "side": "side on which it touches the features: it reads or writes them",
    "hook_name": "hook point of the features that it is nearest to",
    "r": "rank that its factors allow",
    "rank": "number of singular values of the update that are not rounding",
    "norm": "Frobenius norm of the update",
    "relative_norm": "that, as a share of the norm of the base weight; unknown without the base's weights",
    "singular_values": "of the update, largest first",
    "basis": "number of directions from features that it started from",
    "in_basis": "share of the update's energy (squared norm) that lies in their span",
    "drift": "the rest, 1 - in_basis",
    "in_random": "the same share for a random space of as many dimensions",
    "chance": "what that is on average: dimensions of the basis / width",
    "angles": "principal angles in degrees between the basis and what the trained factor spans, smallest first",
    "largest_angle": "the largest of them",
    "mean_angle": "their mean",
    "random_mean_angle": "the mean for a random space of as many dimensions",
}


def module_table(places: Sequence[ModulePlace], *, seed: int = 0) -> pd.DataFrame:
    """Return one row per module, with the columns of `COLUMNS`."""
    import pandas as pd

    randoms = _Randoms(seed)
    return pd.DataFrame([_row(place, randoms) for place in places], columns=list(COLUMNS)).astype(
        {"block": "Int64", "basis": "Int64"}
    )


class _Randoms:
    """Random spaces, one per size: drawing them costs more than measuring with them."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._known: dict[tuple[int, int], torch.Tensor] = {}

    def get(self, count: int, width: int) -> torch.Tensor:
        if (count, width) not in self._known:
            self._known[count, width] = fill_rows(
                torch.zeros(0, width, dtype=torch.float64), count, seed=f"control/{self._seed}"
            )
        return self._known[count, width]


def _row(place: ModulePlace, randoms: _Randoms) -> dict[str, Any]:
    update = place.update
    row: dict[str, Any] = dict.fromkeys(COLUMNS)
    row |= {
        "module": update.name,
        "block": place.block,
        "side": place.side,
        "hook_name": None if place.sae is None else place.sae.hook_name,
        "r": int(update.a.shape[0]),
        "rank": update.rank,
        "norm": update.norm,
        "singular_values": update.singular_values.tolist(),
    }
    weight = base_weight(place.module)
    if weight is not None:
        size = float(torch.linalg.vector_norm(weight, dtype=torch.float64))
        row["relative_norm"] = update.norm / size if size else None
    if place.start is not None and place.side is not None:
        row |= _drift(place, place.start, place.side, randoms)
    return row


def _drift(place: ModulePlace, start: torch.Tensor, side: Side, randoms: _Randoms) -> dict[str, Any]:
    update = place.update
    count, width = start.shape
    random = randoms.get(count, width)
    found: dict[str, Any] = {"basis": count, "chance": count / width}
    if update.norm > 0:
        energy = update.norm**2
        found["in_basis"] = min(1.0, float(update.energy_along(start, side).sum()) / energy)
        found["drift"] = 1 - found["in_basis"]
        found["in_random"] = float(update.energy_along(random, side).sum()) / energy
    rows = update.factor_rows(side)
    if len(rows):
        angles = principal_angles(start, rows)
        found |= {
            "angles": angles.tolist(),
            "largest_angle": float(angles.max()),
            "mean_angle": float(angles.mean()),
            "random_mean_angle": float(principal_angles(random, rows).mean()),
        }
    return found
