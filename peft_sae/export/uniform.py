"""One rank and no scaling for all modules, for servers that know no other adapters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from peft.utils.other import get_pattern_key

from ..errors import ConfigError

_PREFIX = "base_model.model."
_FACTORS = (".lora_A.weight", ".lora_B.weight", ".lora_B.bias")
_OTHERS = ("lora_embedding_", "lora_magnitude_vector")


def with_one_rank(
    tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return an adapter of the same updates in which every module has the largest rank and the scaling 1.

    Zero rows of A and columns of B fill up the rank, and B is multiplied by lora_alpha / r (with rank-stabilised
    scaling, arXiv 2312.03732, by lora_alpha / sqrt(r)), so that B A is the whole update.

    Args:
        tensors: of the adapter's file.
        config: of its `adapter_config.json`.

    Raises:
        ConfigError: a module is adapted in another way than by two matrices.
    """
    other = [name for name in tensors if any(part in name for part in _OTHERS)]
    bent = [name for name, tensor in tensors.items() if name.endswith(_FACTORS[:2]) and tensor.dim() != 2]
    if other or bent or config.get("target_parameters"):
        found = (other or bent or list(config["target_parameters"]))[0]
        raise ConfigError(
            f"{found!r} is no pair of matrices (DoRA, embeddings, convolutions, experts), so one rank without scaling "
            "cannot say the same. Merge the adapter instead (merge_checkpoint, peft-sae merge)."
        )
    ranks = {
        name.removesuffix(_FACTORS[0]): tensor.shape[0]
        for name, tensor in tensors.items()
        if name.endswith(_FACTORS[0])
    }
    lone = [name for name in tensors if name.endswith(_FACTORS[1]) and name.removesuffix(_FACTORS[1]) not in ranks]
    if lone or not ranks:
        raise ConfigError(
            f"{lone[0] if lone else 'The adapter'!r} has no pair of factors, so there is no update to write with one "
            "rank. Save the adapter again, or merge it."
        )
    rank = max(ranks.values())
    found_tensors = {}
    for name, tensor in tensors.items():
        ending = next((ending for ending in _FACTORS if name.endswith(ending)), None)
        module = name.removesuffix(ending or "")
        if ending is None:
            found_tensors[name] = tensor
        elif ending == _FACTORS[0]:
            found_tensors[name] = _padded(tensor, rank - ranks[module], dim=0)
        else:
            scaled = (tensor.double() * _scaling(module.removeprefix(_PREFIX), ranks[module], config)).to(tensor.dtype)
            found_tensors[name] = _padded(scaled, rank - ranks[module], dim=1) if tensor.dim() == 2 else scaled
    changes = {"r": rank, "lora_alpha": rank, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}
    return found_tensors, {**config, **changes}


def _padded(tensor: torch.Tensor, missing: int, *, dim: int) -> torch.Tensor:
    if not missing:
        return tensor.contiguous()
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor, tensor.new_zeros(shape)], dim=dim).contiguous()


def _scaling(module: str, rank: int, config: Mapping[str, Any]) -> float:
    pattern = config.get("alpha_pattern") or {}
    alpha = float(pattern.get(get_pattern_key(pattern.keys(), module), config["lora_alpha"]))
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
