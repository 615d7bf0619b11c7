"""The features that an adapter is looked at for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ..errors import MismatchError
from ..sae.handle import SaeHandle
from ..sae.identity import SaeIdentity
from ..subspace import Subspace


@dataclass(frozen=True, eq=False)
class FeatureGroup:
    """Features of one SAE.

    Attributes:
        sae: the SAE.
        ids: feature ids, int64 [n].
        directions: their decoder directions, of any length, float [n, d_in].
        kinds: `chosen` or `protected` by feature id; others are neither.
        tokens: promoted tokens by feature id, as far as they are known.
    """

    sae: SaeIdentity
    ids: torch.Tensor
    directions: torch.Tensor
    kinds: Mapping[int, str] = field(default_factory=dict)
    tokens: Mapping[int, tuple[str, ...]] = field(default_factory=dict)

    def of_kind(self, kind: str) -> torch.Tensor:
        """Places in the group of the features of one kind, int64."""
        return torch.tensor(
            [place for place, one in enumerate(self.ids.tolist()) if self.kinds.get(one) == kind]
        ).long()


def feature_groups(subspace: Subspace | None, handles: Sequence[SaeHandle]) -> list[FeatureGroup]:
    """Return the features to look for: all of the given SAEs, else those that the Subspace holds.

    Raises:
        MismatchError: an SAE is not the one that the Subspace was built from.
    """
    groups: dict[str, FeatureGroup] = {}
    if subspace is not None:
        kinds: dict[str, dict[int, str]] = {}
        tokens: dict[str, dict[int, tuple[str, ...]]] = {}
        rows: dict[str, dict[int, torch.Tensor]] = {}
        saes: dict[str, SaeIdentity] = {}
        for kind, sites in (("chosen", subspace.sites), ("protected", subspace.protected)):
            for site in sites:
                hook = site.sae.hook_name
                saes[hook] = site.sae
                for one, said, row in zip(site.features.tolist(), site.tokens, site.directions, strict=True):
                    kinds.setdefault(hook, {})[one] = kind
                    tokens.setdefault(hook, {})[one] = said
                    rows.setdefault(hook, {})[one] = row
        for hook, sae in saes.items():
            ids = torch.tensor(list(rows[hook]))
            groups[hook] = FeatureGroup(sae, ids, torch.stack(list(rows[hook].values())), kinds[hook], tokens[hook])
    for handle in handles:
        known = groups.get(handle.identity.hook_name)
        if known is not None and known.sae.digest != handle.identity.digest:
            raise MismatchError(
                f"The SAE {handle.identity.name!r} at {handle.identity.hook_name} has the digest "
                f"{handle.identity.digest[:12]}..., and the adapter's features there are of {known.sae.name!r} with "
                f"{known.sae.digest[:12]}..., so equal ids would be different features. Give the SAE that it was built "
                "from."
            )
        groups[handle.identity.hook_name] = FeatureGroup(
            handle.identity,
            torch.arange(handle.identity.d_sae),
            handle.decoder,
            {} if known is None else known.kinds,
            {} if known is None else known.tokens,
        )
    return sorted(groups.values(), key=lambda group: (group.sae.site.block, group.sae.hook_name))
