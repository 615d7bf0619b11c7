"""What a module's factors must be orthogonal to, so that protected features are neither read nor written."""

from __future__ import annotations

import logging
from typing import Any

import torch
from peft import LoraConfig
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import ConfigError, MismatchError, UnsupportedPeftError
from ..layout import LOCAL_KINDS, BlockLayout, ModuleRole, Side, Site
from ..subspace import Subspace, SubspaceSite
from ..subspace.protected import ProtectedSite, feature_name, parse_feature_name
from .basis import orthonormal_rows, unseen_through_norm
from .config import SaeSubspaceConfig
from .norms import NormGains
from .registration import missing_guards
from .sites import Place, width_of

logger = logging.getLogger(__name__)

# Variants of LoRA whose update is not that of its two factors alone.
OTHER_VARIANTS = ("use_dora", "use_bdlora", "kasa_config", "velora_config", "monteclora_config", "arrow_config")


class Protection:
    """The protected directions of one adapter, as each module meets them."""

    def __init__(self, config: SaeSubspaceConfig, model: nn.Module, subspace: Subspace, norms: NormGains) -> None:
        self._norms = norms
        get_embeddings: Any = getattr(model, "get_input_embeddings", None)
        embeddings = None if get_embeddings is None else get_embeddings()
        self._embedding = getattr(embeddings, "weight", None)
        self._trained = tuple(config.modules_to_save or ())
        self._directions = _choose(config, subspace)
        self._layout: BlockLayout = subspace.layout
        # The part of a block that the heads belong to, such as self_attn.
        self._attention = {
            path.split(".")[0] for path, roles in subspace.layout.roles.items() if any(r.site == "z" for r in roles)
        }
        self._rows: dict[tuple[str, str | None, Site | None], torch.Tensor] = {}
        if self._directions:
            _check_config(config)
            _check_guards()

    def of_module(self, name: str, module: nn.Module, place: Place) -> dict[str, Any]:
        """Return the fields of the module's plan that say what it must not read and write.

        The protected features of every SAE of the residual stream count for every module that touches the stream, near
        or far; those of a block's heads for the output projection of that block, and those of the MLP's input for the
        modules of that MLP which read it.

        Args:
            name: the target module's name.
            module: the module, without adapters.
            place: where it is.

        Raises:
            ConfigError: protection cannot be had for this module.
        """
        if not self._directions:
            return {}
        if any(parameter.is_meta for parameter in module.parameters()):
            raise ConfigError(
                f"{name!r} is on the meta device, where nothing can be protected. Load the model's weights first, "
                "without offloading, or set protect=False to count parameters only."
            )
        residual = any(site.sae.site.kind != "z" for site, _ in self._directions)
        linear = isinstance(module, (nn.Linear, Conv1D)) or hasattr(module, "in_features")
        if residual and not (linear and place.roles):
            raise ConfigError(
                f"It is not known what the target {name!r} ({type(module).__name__}) reads and writes, so it cannot be "
                "kept from using protected features. Exclude it with exclude_modules, or set protect=False."
            )
        if any(parameter is self._embedding for parameter in module.parameters()):
            raise ConfigError(
                f"{name!r} shares its weights with the input embedding, which writes the stream, so merging an update "
                "of it would write protected features. Exclude it, or untie the two (tie_word_embeddings=False)."
            )
        heads = any(site.sae.site == Site(place.block, "z") for site, _ in self._directions)
        if heads and place.path.split(".")[0] in self._attention and not any(r.site == "z" for r in place.roles):
            raise ConfigError(
                f"What {name!r} computes becomes the heads' output, where features are protected in its block, and "
                "heads mix what they are given, so it cannot be kept from writing them. Exclude it with "
                "exclude_modules, or protect features of the residual stream instead."
            )
        self._check_upstream(name, place)
        fields: dict[str, Any] = {}
        for role in place.roles:
            rows = self._role_rows(name, module, role, place)
            if rows is None:
                continue
            key = f"unseen_{role.side}"
            if key in fields:  # one side of a module may be in two spaces, such as a stream's and the MLP's own
                both = orthonormal_rows(torch.cat([fields[key], rows]).double())
                rows = self._check_left(name, both, role.side).float()
            fields[f"protected_{role.side}"] = rows.shape[0]
            fields[key] = rows
        return fields

    def _check_upstream(self, name: str, place: Place) -> None:
        """Refuse a module that writes what an MLP's norm passes on, if features are protected behind that norm."""
        written = [step for role in place.roles if role.side == "write" if (step := _step(place.block, role.site))]
        for site, _ in self._directions:
            here = site.sae.site
            if here.kind == "mlp_in" and any(step <= self._mlp_step(here.block) for step in written):
                raise ConfigError(
                    f"What {name!r} writes reaches the MLP of block {here.block} through its norm, where features are "
                    "protected, so it cannot be kept from writing them. Exclude it with exclude_modules, or protect "
                    "features of the residual stream instead."
                )

    def _mlp_step(self, block: int) -> int:
        """Where along the residual stream the MLP of a block branches off, in half blocks."""
        for roles in self._layout.roles.values():
            if any(role.site == "mlp_in" for role in roles):
                return _step(block, roles[0].site) or 0
        return _step(block, "resid_mid") or 0

    def _role_rows(self, name: str, module: nn.Module, role: ModuleRole, place: Place) -> torch.Tensor | None:
        own = Site(place.block, role.site) if role.site in LOCAL_KINDS else None
        found = [
            (site, directions)
            for site, directions in self._directions
            if (site.sae.site == own if own is not None else site.sae.site.kind not in LOCAL_KINDS)
        ]
        if not found:
            return None
        width = width_of(module, role.side)
        for site, _ in found:
            if site.sae.d_in != width:
                raise MismatchError(
                    f"Target {name!r} is {width} wide on its {role.side} side, and the protected features at "
                    f"{site.sae.hook_name} are {site.sae.d_in} wide. Use a Subspace of this model."
                )
        directions = torch.cat([directions for _, directions in found])
        key = (role.side, place.norm(role), own)
        if key not in self._rows:
            self._rows[key] = self._measure(name, directions, role.side, place.norm(role))
        rows = self._rows[key]
        return rows if len(rows) else None

    def _measure(self, name: str, directions: torch.Tensor, side: Side, norm: str | None) -> torch.Tensor:
        for trained in self._trained:
            if norm is not None and f".{trained}." in f".{norm}.":
                raise ConfigError(
                    f"modules_to_save trains the norm {norm!r}, behind which the protected directions were found, so "
                    "they would move away. Take it out, or set protect=False."
                )
        width = directions.shape[1]
        rows = orthonormal_rows(unseen_through_norm(directions, self._norms.get(norm, width), side))
        return self._check_left(name, rows, side).float()

    @staticmethod
    def _check_left(name: str, rows: torch.Tensor, side: Side) -> torch.Tensor:
        if rows.shape[0] >= rows.shape[1]:
            raise ConfigError(
                f"The protected features fill all {rows.shape[1]} dimensions that {name!r} {side}s, so no update is "
                "left. Protect fewer features."
            )
        return rows


def _step(block: int, kind: str) -> int | None:
    return Site(block, kind).half_steps


def _choose(config: SaeSubspaceConfig, subspace: Subspace) -> list[tuple[SubspaceSite | ProtectedSite, torch.Tensor]]:
    """The protected directions, one tensor [count, d_in] per site."""
    if config.protect is False:
        return []
    if config.protect is True:
        return [(site, site.directions) for site in subspace.protected]
    guarded = {feature_name(site.sae, feature) for site in subspace.protected for feature in site.features.tolist()}
    sites: list[SubspaceSite | ProtectedSite] = [*subspace.sites, *subspace.protected]
    known = {
        (_key(site), feature): direction
        for site in sites
        for feature, direction in zip(site.features.tolist(), site.directions, strict=True)
    }
    places = {_key(site): site for site in sites}
    chosen: dict[tuple[str, str], dict[int, torch.Tensor]] = {}
    for name in config.protect:
        sae, feature = parse_feature_name(name, [site.sae for site in places.values()])
        key = (sae.digest, sae.hook_name)
        guarded.discard(feature_name(sae, feature))
        if (key, feature) not in known:
            ids = sorted(number for place, number in known if place == key)
            raise MismatchError(
                f"protect names {name!r}, and of the SAE at {sae.hook_name} the Subspace has the features {ids} only, "
                "so the direction of another is not known. Build the Subspace with protect=[...]."
            )
        chosen.setdefault(key, {})[feature] = known[key, feature]
    if guarded:
        logger.warning(
            "protect names %d features; %d that the Subspace protects are not among them, and may be used (%s ...).",
            len(config.protect),
            len(guarded),
            min(guarded),
        )
    return [(places[key], torch.stack(list(found.values()))) for key, found in chosen.items()]


def _key(site: SubspaceSite | ProtectedSite) -> tuple[str, str]:
    """One SAE's weights may stand at several hook points."""
    return site.sae.digest, site.sae.hook_name


def _check_guards() -> None:
    if missing_guards:
        raise UnsupportedPeftError(
            f"The installed versions have changed {missing_guards}, which could go around the protection unnoticed. "
            "Upgrade peft_sae, install an older peft or transformers, or set protect=False."
        )


def _check_config(config: LoraConfig) -> None:
    for name in OTHER_VARIANTS:
        if getattr(config, name, None):
            reason = "its magnitude rescales what the base weights read and write" if name == "use_dora" else ""
            raise ConfigError(
                f"{name} and protected features contradict each other: {reason or 'its update has other parts'}, so "
                "protected features would be used after all. Use one of the two, or protect=False."
            )
    if config.bias != "none":
        raise ConfigError(
            f"bias={config.bias!r} trains biases of the base model, which may write protected features. Use "
            "bias='none', or protect=False."
        )
    if config.target_parameters:
        raise ConfigError(
            f"target_parameters={sorted(config.target_parameters)} have no known side, so they cannot be kept from "
            "using protected features. (In transformers 5 the experts of a mixture are such parameters, also where "
            "'all-linear' or their old names ask for them.) Use other target_modules, such as ['q_proj', 'k_proj', "
            "'v_proj', 'o_proj'], or set protect=False."
        )
