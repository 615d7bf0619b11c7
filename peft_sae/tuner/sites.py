"""Which site's basis a module gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import ConfigError, MismatchError
from ..layout import LOCAL_KINDS, BlockLayout, ModuleRole, Site
from ..subspace.site import HasSae

S = TypeVar("S", bound=HasSae)


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


def sites_of_role(sites: Sequence[S], role: ModuleRole, block: int) -> list[S]:
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


def nearest_site(sites: Sequence[S], role: ModuleRole, block: int) -> S:
    """Return the nearest site along the residual stream; of two as near, the one that the module touches.

    A reader touches what was written before it; a writer touches what is read after it.
    """
    own = _half_steps(Site(block, role.site))
    downstream = 1 if role.side == "write" else -1

    def distance(site: S) -> tuple[int, bool]:
        steps = _half_steps(site.sae.site) - own
        return abs(steps), steps * downstream < 0

    return min(sites, key=distance)


def own_sites(sites: Sequence[S], role: ModuleRole, block: int) -> list[S]:
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


class Locator(Generic[S]):
    """Finds where a module is, and which of some sites belongs to it.

    Args:
        layout: what the modules of a block read and write.
        depth: number of blocks.
        sites: places with directions.
        model_type: the architecture's name, for messages.
        sides: module name or its end to side, overriding the layout.
        layer_map: `"nearest"` or `"exact"`, as in `SaeSubspaceConfig`.
    """

    def __init__(
        self,
        layout: BlockLayout,
        depth: int,
        sites: Sequence[S],
        *,
        model_type: str,
        sides: Mapping[str, str] | None = None,
        layer_map: str = "nearest",
    ) -> None:
        self._layout, self._depth, self._sites = layout, depth, sites
        self._model_type, self._sides, self._layer_map = model_type, sides or {}, layer_map

    def place(self, name: str) -> Place:
        """Return where a module is."""
        head = self._layout.locate_head(name)
        if head is not None:  # it reads what a block behind the last one would
            return Place(self._depth, (ModuleRole("read", "resid_pre", self._layout.final_norm),), head)
        found = self._layout.locate(name)
        if found is None:
            return Place(self._depth, (), None)
        path, block, rest = found
        return Place(block, self._layout.roles.get(rest, ()), f"{path}." if path else "", rest)

    def find(self, name: str, module: nn.Module, place: Place) -> tuple[ModuleRole | None, S | None]:
        """Return the module's role, None for plain LoRA, and its site, None if it is to be left alone.

        Raises:
            ConfigError: its role is not known.
            MismatchError: no site has directions of the space that it reads or writes.
        """
        given = self._given_side(name)
        if given == "none" or (not isinstance(module, (nn.Linear, Conv1D)) and not hasattr(module, "in_features")):
            return None, None
        roles = place.roles
        if given is not None:
            roles = tuple(role for role in roles if role.side == given) or (_default_role(given),)
        if not roles:
            raise ConfigError(
                f"Target {name!r} is not known to read or to write the residual stream in {self._model_type}, so its "
                f"basis has no place. Say which with sides={{{name.split('.')[-1]!r}: 'read'}} ('write', or 'none' for "
                "plain LoRA), or do not target it."
            )
        if not self._sites:  # LoRA that keeps away from protected features
            return None, None
        for role in roles:
            candidates = sites_of_role(self._sites, role, place.block)
            if candidates and self._layer_map == "exact":
                candidates = own_sites(candidates, role, place.block)
                return role, nearest_site(candidates, role, place.block) if candidates else None
            if candidates:
                return role, nearest_site(candidates, role, place.block)
        kinds = sorted({site.sae.site.kind for site in self._sites})
        raise MismatchError(
            f"Target {name!r} can get no basis from SAEs at {kinds} alone: it {roles[0].side}s {roles[0].site}. "
            "Target other modules, or build the Subspace from SAEs of the residual stream."
        )

    def _given_side(self, name: str) -> str | None:
        for key, side in self._sides.items():
            if name == key or name.endswith(f".{key}"):
                return side
        return None


def _default_role(side: str) -> ModuleRole:
    if side == "write":
        return ModuleRole(side="write", site="resid_post")
    return ModuleRole(side="read", site="resid_pre")
