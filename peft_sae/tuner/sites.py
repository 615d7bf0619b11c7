"""Which site's basis a module gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D

from ..layout import LOCAL_KINDS, ModuleRole, Site
from ..subspace import SubspaceSite


@dataclass(frozen=True)
class Place:
    """Where a module is.

    Attributes:
        block: index of its block; one beyond the last for the head.
        roles: its roles there; empty if they are unknown.
        prefix: what precedes the paths of the block's parts in the model; None if it is in no block.
        path: its path within the block.
    """

    block: int
    roles: tuple[ModuleRole, ...]
    prefix: str | None
    path: str = ""

    def norm(self, role: ModuleRole) -> str | None:
        """Path in the model of the norm between the module and the site of a role."""
        return None if role.norm is None or self.prefix is None else f"{self.prefix}{role.norm}"


_RESIDUAL_KINDS = ("resid_pre", "resid_mid", "resid_post")
_WRITE_KINDS = (*_RESIDUAL_KINDS, "attn_out", "mlp_out")


def sites_of_role(sites: Sequence[SubspaceSite], role: ModuleRole, block: int) -> list[SubspaceSite]:
    """Return the sites whose directions live in the space where the module reads or writes.

    Args:
        sites: all sites of the Subspace.
        role: the module's role.
        block: index of its block.
    """
    if role.site in LOCAL_KINDS:
        return [site for site in sites if site.sae.site == Site(block, role.site)]
    kinds = _RESIDUAL_KINDS if role.side == "read" else _WRITE_KINDS
    return [site for site in sites if site.sae.site.kind in kinds]


def nearest_site(sites: Sequence[SubspaceSite], role: ModuleRole, block: int) -> SubspaceSite:
    """Return the nearest site along the residual stream; of two as near, the one that the module touches.

    A reader touches what was written before it; a writer touches what is read after it.
    """
    own = _half_steps(Site(block, role.site))
    downstream = 1 if role.side == "write" else -1

    def distance(site: SubspaceSite) -> tuple[int, bool]:
        steps = _half_steps(site.sae.site) - own
        return abs(steps), steps * downstream < 0

    return min(sites, key=distance)


def own_sites(sites: Sequence[SubspaceSite], role: ModuleRole, block: int) -> list[SubspaceSite]:
    """Return the sites of the module's own block that the module touches.

    A block's input belongs to the block that reads it: `resid_post` of block 4 is block 5's own for a reading module,
    and
    block 4's own for a writing one.
    """
    if role.site in LOCAL_KINDS:
        return list(sites)
    own = _half_steps(Site(block, role.site))
    first, last = (2 * block, own) if role.side == "read" else (own, 2 * block + 2)
    return [site for site in sites if first <= _half_steps(site.sae.site) <= last]


def _half_steps(site: Site) -> int:
    return site.half_steps or 0


def width_of(module: nn.Module, side: str) -> int | None:
    """Width of a linear module on one side; None for others."""
    if isinstance(module, Conv1D):
        return int(module.weight.shape[0 if side == "read" else 1])
    width = getattr(module, "in_features" if side == "read" else "out_features", None)
    return None if width is None else int(width)
