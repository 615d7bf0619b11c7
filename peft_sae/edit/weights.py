"""An adapter's tensors under an edit."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError
from ..inspect.source import AdapterSource
from ..inspect.update import LowRankUpdate
from ..layout import Side
from ..tuner.protection import OTHER_VARIANTS
from .direction_map import DirectionMap
from .request import Kind

_PART = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<factor>A|B)(?:\.(?P<kind>weight|bias))?")
EXACT = 1e-6  # what rounding to float32 may leave of a removed feature, as a share of the update's norm


@dataclass(frozen=True)
class ModuleEdit:
    """What an edit did to one module.

    Attributes:
        directions: dimensions that it acted on, by side.
        norm_before: Frobenius norm of the update before.
        norm_after: and after.
        energy_removed: share of its energy (squared norm) that went; negative where it grew, None for an update of 0.
        changed: norm of the difference, relative to the update before; None for an update of 0.
        left: largest deviation from what was asked for that rounding left, relative to the larger of both norms.
    """

    directions: dict[Side, int]
    norm_before: float
    norm_after: float
    energy_removed: float | None
    changed: float | None
    left: float


def check_editable(source: AdapterSource, weights: Mapping[str, torch.Tensor], kind: Kind) -> list[str]:
    """Refuse adapters whose update is not that of their two factors, and return notes on what is not edited.

    Raises:
        ConfigError: it could use edited features beside its factors.
    """
    config: Any = source.config
    for name in OTHER_VARIANTS:
        if getattr(config, name, None):
            reason = "its magnitudes rescale what the base weights do with" if name == "use_dora" else ""
            raise ConfigError(
                f"'{source.name}' was trained with {name}: {reason or 'parts of its update beside the factors may use'}"
                " edited features, so it cannot be edited. Train without it."
            )
    if config.bias != "none":
        raise ConfigError(
            f"'{source.name}' was trained with bias={config.bias!r}: biases of the base model are no part of a "
            "low-rank update and may write edited features, so it cannot be edited. Train with bias='none'."
        )
    if config.target_parameters:
        raise ConfigError(
            f"'{source.name}' adapts the parameters {sorted(config.target_parameters)}, of which it is not known what "
            "they read and write, so their update might use edited features. Edit an adapter of modules only."
        )
    for key in weights:
        if ".lora_" in key and _PART.fullmatch(key) is None:
            what = "an embedding writes the stream from token ids" if "lora_embedding" in key else "it is no factor"
            raise ConfigError(
                f"'{source.name}' holds {key!r}, whose part in edited features is out of an edit's reach ({what}), so "
                "it cannot be edited. Train an adapter without it."
            )
    for name, reason in source.left_out.items():
        if reason.startswith("a convolution"):
            raise ConfigError(
                f"'{source.name}' adapts {name!r}, {reason}, so it is not known which features it uses. Edit an "
                "adapter of linear modules only."
            )
    biases = sorted(key for key in weights if key.endswith(".lora_B.bias"))
    if kind == "keep" and biases:
        raise ConfigError(
            f"'{source.name}' holds the bias {biases[0]!r}, which writes whatever is read, so keeping some features "
            "alone would keep it too. Remove features by name instead, or train without lora_bias."
        )
    whole = sorted(key for key in weights if ".lora_" not in key)
    if not whole:
        return []
    return [
        f"{len(whole)} tensors that were trained as a whole ({whole[0]} ...) are not edited and may use the edited "
        "features (modules_to_save, trained tokens)."
    ]


def edit_weights(
    source: AdapterSource, weights: Mapping[str, torch.Tensor], maps: Mapping[str, Mapping[Side, DirectionMap]]
) -> tuple[dict[str, torch.Tensor], dict[str, ModuleEdit]]:
    """Return the tensors after an edit, in the dtypes of before, and what it did to every module.

    Raises:
        ConfigError: the result is too large for its dtype, or rounding leaves more of the features than is told.
    """
    edited = dict(weights)
    keys: dict[str, dict[str, str]] = {}
    for key in weights:
        match = _PART.fullmatch(key)
        if match is not None:
            part = "bias" if match["kind"] == "bias" else match["factor"]
            keys.setdefault(match["module"], {})[part] = key
    report = {}
    for update in source.updates:
        mine = maps[update.name]
        own = keys[update.name]
        if "read" in mine:
            edited[own["A"]] = _rounded(own["A"], mine["read"].apply(update.a), weights)
        if "write" in mine:
            edited[own["B"]] = _rounded(own["B"], mine["write"].apply(update.b.T).T, weights)
            if "bias" in own:  # what is added to B's output
                bias = mine["write"].apply(weights[own["bias"]].double()[None])[0]
                edited[own["bias"]] = _rounded(own["bias"], bias, weights)
        after = LowRankUpdate(update.name, edited[own["A"]].double(), edited[own["B"]].double(), update.scaling)
        report[update.name] = _compare(update, after, mine)
        exact = {weights[own[factor]].dtype for factor in ("A", "B")} <= {torch.float32, torch.float64}
        if exact and report[update.name].left > EXACT:
            raise ConfigError(
                f"Rounding would leave {report[update.name].left:.1e} of {update.name!r} along the edited features, "
                f"above {EXACT:g}: their directions are too close to each other. Edit fewer at a time."
            )
    return edited, report


def _rounded(key: str, tensor: torch.Tensor, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
    rounded = tensor.to(weights[key].dtype).contiguous()
    if not bool(torch.isfinite(rounded).all()):
        raise ConfigError(
            f"The edited {key!r} has values up to {float(tensor.abs().max()):.1e}, too large for {weights[key].dtype}. "
            "Scale by smaller numbers."
        )
    return rounded


def _compare(before: LowRankUpdate, after: LowRankUpdate, maps: Mapping[Side, DirectionMap]) -> ModuleEdit:
    norm, left = before.norm, after.norm
    change = LowRankUpdate(  # dW' - dW = [B', -B] [A'; A]
        before.name, torch.cat([after.a, before.a]), torch.cat([after.b, -before.b], dim=1), before.scaling
    )
    deviations = [0.0]
    for side, direction_map in maps.items():
        rows = (before.a, after.a, after.b) if side == "read" else (before.b.T, after.b.T, after.a.T)
        off = direction_map.deviation(rows[0], rows[1])
        if off.numel():
            along = off @ torch.linalg.qr(rows[2], mode="r").R.T
            deviations.append(abs(before.scaling) * float(along.norm(dim=1).max()))
    largest = max(norm, left)
    return ModuleEdit(
        directions={side: direction_map.rank for side, direction_map in maps.items()},
        norm_before=norm,
        norm_after=left,
        energy_removed=1 - (left / norm) ** 2 if norm else None,
        changed=change.norm / norm if norm else None,
        left=max(deviations) / largest if largest else 0.0,
    )


def read_metadata(path: Path) -> dict[str, str]:
    """Return the metadata in the header of a safetensors file."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {"format": "pt"})
