"""What one module gets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft.utils.other import get_pattern_key

from .config import RECORD_ENTRIES, SaeSubspaceConfig


@dataclass(frozen=True)
class ModulePlan:
    """What one module gets.

    Attributes:
        side: `read`, `write`, or `none` for plain LoRA.
        rank: rank of its adapter.
        hook_name: hook point that its basis comes from; None for plain LoRA.
        basis: number of its directions that come from features.
        filled: number of its directions that do not.
        dropped: number of the basis' directions, the least important ones, that its rank has no room for.
        rows: the directions, float32 [rank, width]; None if there is nothing to initialise.
    """

    side: str
    rank: int
    hook_name: str | None = None
    basis: int = 0
    filled: int = 0
    dropped: int = 0
    rows: torch.Tensor | None = None

    def to_record(self) -> dict[str, Any]:
        """Return what is worth keeping, as JSON-serialisable data."""
        return {name: getattr(self, name) for name in RECORD_ENTRIES}


def asked_rank(config: SaeSubspaceConfig, name: str) -> int | None:
    """The rank that the configuration asks for, or None for the basis' own."""
    rank: Any = config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), name), config.r)
    return None if rank == "auto" else int(rank)
