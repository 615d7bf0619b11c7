"""Names of features: a hook point, or a block, and an id."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..errors import SelectionError, suggest
from .identity import SaeIdentity

_NAME = re.compile(r"(?P<place>[^:]+):(?P<feature>[0-9]{1,9})")


def feature_name(sae: SaeIdentity, feature: int) -> str:
    """Return a feature's name, its hook point and its id: `blocks.12.hook_resid_post:4051`."""
    return f"{sae.hook_name}:{feature}"


def parse_feature_name(name: str, saes: Sequence[SaeIdentity]) -> tuple[SaeIdentity, int]:
    """Return the SAE and the id that a feature's name means.

    Args:
        name: hook point and id, `"blocks.12.hook_resid_post:4051"`, or block and id, `"12:4051"`, where the block has
            one SAE only.
        saes: the SAEs that can be meant.

    Raises:
        SelectionError: the name is malformed, ambiguous, or names an SAE or a feature that is not there.
    """
    match = _NAME.fullmatch(name.strip())
    if match is None:
        raise SelectionError(
            f"{name!r} names no feature. Write the hook point and the id, as in 'blocks.12.hook_resid_post:4051', or "
            "the block and the id, as in '12:4051'."
        )
    place, feature = match["place"].strip(), int(match["feature"])
    found = [sae for sae in saes if place in (sae.hook_name, str(sae.site.block))]
    known = [sae.hook_name for sae in saes]
    if not found:
        raise SelectionError(
            f"{name!r} names an SAE at {place!r}, and there are SAEs at {known} only.{suggest(place, known)} Name a "
            "feature of one of these."
        )
    if len(found) > 1:
        raise SelectionError(
            f"{name!r} could mean any of the SAEs at {[sae.hook_name for sae in found]}. Write the hook point instead "
            "of the block."
        )
    if feature >= found[0].d_sae:
        raise SelectionError(
            f"{name!r} names feature {feature}, and the SAE at {found[0].hook_name} has {found[0].d_sae} (ids 0 to "
            f"{found[0].d_sae - 1}). Check the id."
        )
    return found[0], feature
