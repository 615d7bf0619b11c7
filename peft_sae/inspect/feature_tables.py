"""What was measured of features, as tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..sae.names import feature_name
from .features import FeatureReading, signs

if TYPE_CHECKING:
    import pandas as pd

FEATURE_COLUMNS = {
    "name": "hook point and id",
    "block": "block of the hook point",
    "hook_name": "hook point",
    "sae": "its SAE",
    "feature": "its id",
    "group": "chosen (in the Subspace's basis), protected, or other",
    "side": "whether the update reads it or writes it",
    "modules": "number of modules that are nearest to its hook point on that side",
    "share": "share of the energy of these modules' updates that lies along it",
    "times_chance": "that, divided by what a direction has on average that is random in all dimensions alike",
    "times_typical": "that, divided by the median of all features of its SAE on that side; known with the SAE given",
    "unique": "share that lies along it and along no other chosen feature of the hook point; known for chosen ones",
    "sign": "cosine between what the base weights and the update do with it, over the modules weighted by the "
    "update's energy: the update adds to it (1) or works against it (-1)",
    "top_module": "module in which its share is largest",
    "top_share": "its share there",
    "tokens": "tokens that its direction promotes most, where the Subspace says so or the model was loaded",
    "neuronpedia": "address of its dashboard, or none",
    "label": "what the labels call it, or none",
}


def feature_table(
    readings: Sequence[FeatureReading], *, others: int, labels: Mapping[str, str] | None = None
) -> pd.DataFrame:
    """Return one row per chosen or protected feature and side, and as many other ones with the largest shares.

    Args:
        readings: from `read_features`.
        others: number of features per hook point and side that are neither.
        labels: what the user calls features, by name.

    Returns:
        With the columns of `FEATURE_COLUMNS`, largest share first.
    """
    import pandas as pd

    rows = [row for reading in readings for row in _rows(reading, others, labels or {})]
    table = pd.DataFrame(rows, columns=list(FEATURE_COLUMNS))
    return table.sort_values("share", ascending=False, kind="stable", ignore_index=True)


def _rows(reading: FeatureReading, others: int, labels: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    group, kept = reading.group, reading.kept.tolist()
    place_of = {place: number for number, place in enumerate(kept)}
    share = reading.energy / reading.total if reading.total else reading.energy
    free = torch.ones(len(group.ids), dtype=torch.bool)
    free[reading.kept] = False
    candidates = free.nonzero().squeeze(1)
    best = candidates[share[candidates].argsort(descending=True, stable=True)[:others]]
    chance = reading.chance / reading.total if reading.total else 0.0
    # The directions of an SAE favour some dimensions, as updates do: a typical one has more than a random one.
    whole = len(group.ids) == group.sae.d_sae
    typical = float(share.median()) if whole and reading.total else 0.0
    shown = [*kept, *best.tolist()]
    agreements = signs(group.directions[shown].detach().cpu().double(), reading.side, reading.places)
    for place, sign in zip(shown, agreements, strict=True):
        feature = int(group.ids[place])
        number = place_of.get(place)
        name = feature_name(group.sae, feature)
        yield {
            "name": name,
            "block": group.sae.site.block,
            "hook_name": group.sae.hook_name,
            "sae": group.sae.name,
            "feature": feature,
            "group": group.kinds.get(feature, "other"),
            "side": reading.side,
            "modules": len(reading.places),
            "share": float(share[place]) if reading.total else None,
            "times_chance": float(share[place]) / chance if chance else None,
            "times_typical": float(share[place]) / typical if typical else None,
            "unique": None if number is None else _number(reading.unique[number]),
            "sign": _number(sign),
            "top_module": (
                reading.places[int(reading.best_place[place])].update.name if float(reading.best[place]) else None
            ),
            "top_share": float(reading.best[place]) if reading.total else None,
            "tokens": list(group.tokens.get(feature, ())),
            "neuronpedia": group.sae.neuronpedia_url(feature),
            "label": labels.get(name),
        }


def _number(value: torch.Tensor) -> float | None:
    return None if bool(value.isnan()) else float(value)


def module_feature_table(readings: Sequence[FeatureReading]) -> pd.DataFrame:
    """Return one row per chosen or protected feature and module: `name`, `module`, `side`, `share`."""
    import pandas as pd

    rows = [
        (feature_name(reading.group.sae, int(reading.group.ids[place])), module.update.name, reading.side, float(share))
        for reading in readings
        for place, shares in zip(reading.kept.tolist(), reading.each, strict=True)
        for module, share in zip(reading.places, shares, strict=True)
    ]
    return pd.DataFrame(rows, columns=["name", "module", "side", "share"])
