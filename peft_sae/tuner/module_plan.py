"""What one module gets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft.utils.other import get_pattern_key

from .basis_record import RECORD_ENTRIES
from .config import SaeSubspaceConfig


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
        protected_read: number of protected directions that it must not read.
        protected_write: number of protected directions that it must not write.
        unseen_read: what its A must be orthogonal to, orthonormal, float32 [protected_read, in]; None if nothing.
        unseen_write: what its B must be orthogonal to, orthonormal, float32 [protected_write, out]; None if nothing.
        locked: nothing may be trained, because protected directions are recorded and not at hand.
    """

    side: str
    rank: int
    hook_name: str | None = None
    basis: int = 0
    filled: int = 0
    dropped: int = 0
    rows: torch.Tensor | None = None
    protected_read: int = 0
    protected_write: int = 0
    unseen_read: torch.Tensor | None = None
    unseen_write: torch.Tensor | None = None
    locked: bool = False

    def frozen(self, *, freeze_basis: bool) -> tuple[str, ...]:
        """Names of the factors that are not trained."""
        if self.locked:
            return ("lora_A", "lora_B")
        if not freeze_basis or self.side == "none":
            return ()
        return ("lora_A",) if self.side == "read" else ("lora_B",)

    def to_record(self) -> dict[str, Any]:
        """Return what is worth keeping, as JSON-serialisable data."""
        return {name: getattr(self, name) for name in RECORD_ENTRIES}


def asked_rank(config: SaeSubspaceConfig, name: str) -> int | None:
    """The rank that the configuration asks for, or None for the basis' own."""
    rank: Any = config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), name), config.r)
    return None if rank == "auto" else int(rank)
