"""Whether a Subspace that was read is what it says."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..errors import ArtifactError

if TYPE_CHECKING:
    from .artifact import Subspace
    from .protected import ProtectedSite
    from .site import SubspaceSite

_MODEL_SIZES = ("hidden_size", "num_hidden_layers")
_TOLERANCE = 1e-3  # far above rounding, far below anything that is not an orthonormal basis


def check_sense(subspace: Subspace) -> None:
    """Refuse content that is well-formed and belongs together, but is no basis of features.

    Args:
        subspace: as it was read.

    Raises:
        ArtifactError: what it says cannot be.
    """
    depth = subspace.model.get("num_hidden_layers")
    if not isinstance(subspace.model.get("model_type", ""), (str, type(None))):
        raise ArtifactError(f"The Subspace's model_type is {subspace.model['model_type']!r}, no name. Build it again.")
    problems = []
    for sites in (subspace.sites, subspace.protected):
        hooks = [site.sae.hook_name for site in sites]
        problems += ["two sites have the same hook point"] if len(set(hooks)) < len(hooks) else []
    problems += [
        f"the model's {name} is no number" for name in _MODEL_SIZES if not isinstance(subspace.model.get(name), int)
    ]
    every: list[SubspaceSite | ProtectedSite] = [*subspace.sites, *subspace.protected]
    for site in every:
        ids = site.features.tolist()
        if isinstance(depth, int) and site.sae.site.block >= depth:
            problems.append(f"{site.sae.hook_name} lies beyond the model's {depth} blocks")
        if len(set(ids)) < len(ids) or min(ids) < 0 or max(ids) >= site.sae.d_sae:
            problems.append(f"the feature ids at {site.sae.hook_name} are not distinct features of the SAE")
        if float((site.directions.double().norm(dim=-1) - 1).abs().max()) > _TOLERANCE:
            problems.append(f"the directions at {site.sae.hook_name} are not of unit length")
    for base in subspace.sites:
        overlap = base.basis.double() @ base.basis.double().T
        if float((overlap - torch.eye(base.rank)).abs().max()) > _TOLERANCE:
            problems.append(f"the basis at {base.sae.hook_name} is not orthonormal")
        shares = torch.stack([base.q_values, base.aligned_rates, base.unaligned_rates])
        if bool(((shares < 0) | (shares > 1)).any()):
            problems.append(f"the q-values or rates at {base.sae.hook_name} are no shares")
        if float((base.coefficients @ base.directions - base.basis).abs().max()) > _TOLERANCE:
            problems.append(f"the basis at {base.sae.hook_name} does not consist of its features")
    if problems:
        raise ArtifactError(f"The Subspace makes no sense: {'; '.join(problems)}. Build it again.")
