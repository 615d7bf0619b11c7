"""The updates of an adapter, from its folder or from a model in memory."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper, get_pattern_key

from ..adapter import read_adapter_config, read_adapter_weights, read_edits
from ..artifact import digest
from ..errors import ArtifactError, ConfigError
from ..subspace import Subspace
from ..tuner import SaeSubspaceConfig
from ..tuner.field_types import check_lora_types
from .update import LowRankUpdate

_PREFIX = "base_model.model."
_LARGEST_LOG = 2**26  # bytes
_LARGEST_VALUE = 1e30  # what is larger is no number of a training
_FACTOR = re.compile(r"(.+)\.lora_(A|B)(?:\.weight)?")


@dataclass(frozen=True, eq=False)
class AdapterSource:
    """An adapter as it is inspected.

    Attributes:
        name: its folder, or its name in the model.
        config: its configuration.
        updates: one per adapted module, in the order of the modules' names.
        subspace: the Subspace that it was built from; None if there is none.
        digest: SHA-256 of its weights.
        left_out: what of it is not measured: module name to reason.
        trainer_state: the log of the `Trainer` that saved it, if it lies beside it.
        edits: what `edit_adapter` has done to it since.
    """

    name: str
    config: Any
    updates: tuple[LowRankUpdate, ...]
    subspace: Subspace | None
    digest: str
    left_out: Mapping[str, str] = field(default_factory=dict)
    trainer_state: tuple[Mapping[str, Any], ...] = ()
    edits: tuple[Mapping[str, Any], ...] = ()


def source_of_folder(adapter: str | Path) -> AdapterSource:
    """Read an adapter, ours or a plain LoRA, from its folder.

    Raises:
        ArtifactError: it is no adapter, incomplete, damaged, or of another type.
        ConfigError: its configuration cannot be used.
    """
    folder = Path(adapter)
    read_adapter_config(folder)
    weights = read_adapter_weights(folder)
    try:
        config = PeftConfig.from_pretrained(str(folder))
        check_lora_types(config)
    except (TypeError, ValueError, KeyError, OSError) as error:
        if isinstance(error, (ConfigError, ArtifactError)):
            raise
        raise ArtifactError(f"The configuration in '{folder}' cannot be used ({error}). Save it again.") from error
    subspace = Subspace.from_pretrained(folder) if (folder / "subspace").is_dir() else None
    record = getattr(config, "basis_record", None)
    if subspace is None and record is not None and record["digest"] is not None:
        raise ArtifactError(
            f"The adapter in '{folder}' was built from the Subspace {record['digest'][:12]}..., and its folder "
            "'subspace' is missing, so it cannot be told what it started from or what it protects. Put it back, or use "
            "export_lora to go on with it as a plain LoRA adapter."
        )
    if subspace is not None and record is not None and record["digest"] not in (None, subspace.digest):
        raise ArtifactError(
            f"The Subspace in '{folder}' has the digest {subspace.digest[:12]}..., and the adapter was built from "
            f"{record['digest'][:12]}.... Put its own Subspace back."
        )
    try:
        updates, left_out = _updates_of_tensors(weights, config, folder)
    except (TypeError, ValueError, AttributeError, ArithmeticError, RecursionError, re.error) as error:
        if isinstance(error, ArtifactError):
            raise
        raise ArtifactError(
            f"The configuration in '{folder}' does not say how large the updates are ({error!r}). Save it again."
        ) from error
    state, edits = _read_trainer_state(folder), tuple(read_edits(folder))
    return AdapterSource(str(folder), config, updates, subspace, digest(weights), left_out, state, edits)


def source_of_model(model: PeftModel, adapter_name: str | None = None) -> AdapterSource:
    """Take an adapter as it stands in a model, for example in training.

    Args:
        model: the model with the adapter.
        adapter_name: which one; by default the active one.

    Raises:
        ConfigError: it has no such adapter, or one of another type.
    """
    name = adapter_name or model.active_adapter
    config = model.peft_config.get(name) if isinstance(name, str) else None
    if config is None or str(getattr(config.peft_type, "value", config.peft_type)) not in ("SAE_SUBSPACE", "LORA"):
        raise ConfigError(
            f"The model has no adapter {name!r} of the type SAE_SUBSPACE or LORA; it has {sorted(model.peft_config)}. "
            "Give the name of one."
        )
    base = model.get_base_model()
    updates, left_out = [], {}
    for module_name, module in base.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper) and name in getattr(module, "_adapters", ()):
            left_out[module_name] = _WHOLE
        if not isinstance(module, LoraLayer):
            continue
        if getattr(module, "merged", False):
            raise ConfigError(
                f"The adapter is merged into {module_name!r}, so the base weights are not the base's own. Call "
                "unmerge_adapter() first."
            )
        if name in getattr(module, "lora_magnitude_vector", {}):
            left_out[f"{module_name}.lora_magnitude_vector"] = _MAGNITUDE
        if name in module.lora_B and getattr(module.lora_B[name], "bias", None) is not None:
            left_out[f"{module_name}.lora_B.bias"] = _BIAS
        if name in module.lora_A:
            a, b = (factors[name].weight.detach() for factors in (module.lora_A, module.lora_B))
            reason = None if a.ndim == b.ndim == 2 else _CONVOLUTION
            if not (bool(torch.isfinite(a).all()) and bool(torch.isfinite(b).all())):
                raise ConfigError(
                    f"The factors of {module_name!r} hold NaN or infinity, so there is nothing to measure: the "
                    "training diverged. Go back to an earlier checkpoint, or use a lower learning rate."
                )
            if reason is None:
                updates.append(LowRankUpdate(module_name, _double(a), _double(b), float(module.scaling[name])))
            else:
                left_out[module_name] = reason
        elif name in module.lora_embedding_A:
            left_out[module_name] = _EMBEDDING
    subspace = config.own_subspace() if isinstance(config, SaeSubspaceConfig) else None
    factors = {f"{update.name}.{key}": getattr(update, key) for update in updates for key in ("a", "b")}
    updates.sort(key=lambda update: _natural(update.name))
    return AdapterSource(name, config, tuple(updates), subspace, digest(factors), left_out)


_CONVOLUTION = "a convolution: its update is no matrix"
_EMBEDDING = "an embedding reads token ids, not activations"
_MAGNITUDE = "DoRA's magnitudes rescale the whole weight; measured is the low-rank part"
_BIAS = "a bias writes whatever is read"
_WHOLE = "trained as a whole (modules_to_save)"


def _updates_of_tensors(
    weights: Mapping[str, torch.Tensor], config: Any, folder: Path
) -> tuple[tuple[LowRankUpdate, ...], dict[str, str]]:
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    left_out: dict[str, str] = {}
    for key, tensor in weights.items():
        name = key.removeprefix(_PREFIX)
        match = _FACTOR.fullmatch(name)
        if match is not None:
            pairs.setdefault(match[1], {})[match[2]] = tensor
        elif ".lora_embedding_" in name:
            left_out[name.split(".lora_embedding_")[0]] = _EMBEDDING
        elif "lora_magnitude_vector" in name:
            left_out[name] = _MAGNITUDE
        elif name.endswith(".lora_B.bias"):
            left_out[name] = _BIAS
        elif ".lora_" in name:
            left_out[name] = "not one of the two factors"
        else:
            left_out[name] = _WHOLE
    updates = []
    for name, pair in sorted(pairs.items(), key=lambda item: _natural(item[0])):
        if set(pair) != {"A", "B"}:
            raise ArtifactError(
                f"'{folder}' has only one of the two factors of {name!r}, so its update is not known. Save it again."
            )
        dimensions = {factor.ndim for factor in pair.values()}
        if dimensions <= {3, 4, 5}:
            left_out[name] = _CONVOLUTION
            continue
        if dimensions != {2} or pair["A"].shape[0] != pair["B"].shape[1]:
            raise ArtifactError(
                f"'{folder}' has factors of {name!r} of the shapes {tuple(pair['A'].shape)} and "
                f"{tuple(pair['B'].shape)}, which do not belong together. Save it again."
            )
        a, b = _double(pair["A"]), _double(pair["B"])
        if 0 in (*a.shape, *b.shape) or float(a.abs().max()) * float(b.abs().max()) > _LARGEST_VALUE:
            raise ArtifactError(f"'{folder}' has factors of {name!r} that are empty or beyond measure. Save it again.")
        updates.append(LowRankUpdate(name, a, b, _scaling(config, name, int(a.shape[0]))))
    return tuple(updates), left_out


def _scaling(config: Any, name: str, rank: int) -> float:
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), name), config.lora_alpha)
    scaling = float(alpha / (math.sqrt(rank) if config.use_rslora else rank))
    if not abs(scaling) < _LARGEST_VALUE:
        raise ValueError(f"scaling {scaling} of {name!r}")
    return scaling


def _double(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().double()


def _natural(name: str) -> list[Any]:
    """Block 10 behind block 9."""
    return [(int(part), "") if part.isdigit() and len(part) < 9 else (-1, part) for part in re.split(r"(\d+)", name)]


def _read_trainer_state(folder: Path) -> tuple[Mapping[str, Any], ...]:
    """The log of the Trainer that saved the folder; what is no log is passed over."""
    path = folder / "trainer_state.json"
    try:
        if path.is_symlink() or not path.is_file() or path.stat().st_size > _LARGEST_LOG:
            return ()
        history = json.loads(path.read_text(encoding="utf-8")).get("log_history", [])
    except (OSError, ValueError, AttributeError, RecursionError):
        return ()
    if not isinstance(history, list):
        return ()
    return tuple(
        {key: value for key, value in entry.items() if _is_logged(value)}
        for entry in history
        if isinstance(entry, dict)
    )


def _is_logged(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, (int, float)) and abs(value) < _LARGEST_VALUE)
