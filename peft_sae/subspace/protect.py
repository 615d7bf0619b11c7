"""Finding the features that an update must not use: by name, or by a contrast of texts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import torch

from ..errors import ConfigError, SelectionError
from ..sae.handle import SaeHandle, as_handles
from ..sae.identity import SaeIdentity
from ..selection.criteria import Criteria
from ..selection.select import SelectedFeatures, Selection, select_features
from ..selection.tokens import promoted_tokens
from ..statistics.records import Data, check_data
from ..statistics.statistics import FeatureStatistics
from .protected import ProtectedSite, parse_feature_name
from .site import unit_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# Names of features, or two sets of text that differ in what is to be ignored.
Protect: TypeAlias = "Sequence[str] | tuple[Data, Data]"


def find_protected(
    protect: Protect | None, saes: Sequence[SaeHandle], contrast: Callable[[Data, Data], Selection]
) -> Sequence[str] | Selection:
    """Return what is protected: names, checked before the long work, or the selection that a pair of sets gives.

    Args:
        protect: names of features, two sets of text, or None for nothing.
        saes: the SAEs that names can mean.
        contrast: selects the features in which the two sets differ most.

    Raises:
        ConfigError: it is neither.
        SelectionError: a name means no feature.
        DataError: a file of texts cannot be opened.
    """
    if protect is None:
        return ()
    if isinstance(protect, str):
        raise ConfigError(f"protect={protect!r} is one text. Give a list of names, or a pair of sets of text.")
    if isinstance(protect, tuple) and len(protect) == 2 and not all(_is_name(part) for part in protect):
        if any(_is_name(part) for part in protect):
            raise ConfigError(f"protect={protect!r} is neither two names of features nor two sets of text.")
        for data, which in zip(protect, ("first protected", "second protected"), strict=True):
            check_data(data, which)
        return contrast(*protect)
    names = [str(name) for name in protect]
    protected_ids(names, as_handles(saes))
    return names


def select_contrast(statistics: FeatureStatistics, top_k: int, max_q: float | None) -> Selection:
    """Select the features in which two sets differ most in the mean, to be protected.

    Raises:
        SelectionError: they differ nowhere.
    """
    return select_features(statistics, top_k=top_k, criteria=Criteria(max_q=max_q), allow_empty=True)


def _is_name(value: object) -> bool:
    return isinstance(value, str) and ":" in value and not Path(value).exists()


def sae_key(sae: SaeIdentity) -> tuple[str, str]:
    """What tells SAEs apart: their weights and their place, as the same weights may stand at several."""
    return sae.digest, sae.hook_name


def protected_ids(protect: Sequence[str] | Selection, saes: Sequence[SaeHandle]) -> dict[tuple[str, str], list[int]]:
    """Return protected feature ids by the key of their SAE.

    Raises:
        ConfigError: `protect` is one text.
        SelectionError: a name means no feature.
    """
    if isinstance(protect, Selection):
        return {sae_key(chosen.sae): chosen.features.tolist() for chosen in protect.sites}
    if isinstance(protect, str):
        raise ConfigError(f"protect={protect!r} is one text. Give a list of names, or a pair of sets of text.")
    found: dict[tuple[str, str], list[int]] = {}
    for name in protect:
        sae, feature = parse_feature_name(name, [handle.identity for handle in saes])
        ids = found.setdefault(sae_key(sae), [])
        if feature not in ids:
            ids.append(feature)
    return found


def without_protected(chosen: SelectedFeatures, guarded: Sequence[int]) -> SelectedFeatures:
    """Return the chosen features without the protected ones: protection goes before selection, which the log tells.

    Raises:
        SelectionError: none is left.
    """
    kept = ~torch.isin(chosen.features, torch.tensor(guarded, dtype=torch.int64))
    if bool(kept.all()):
        return chosen
    both = chosen.features[~kept].tolist()
    if not bool(kept.any()):
        raise SelectionError(
            f"All features chosen at {chosen.sae.hook_name} are protected ({both}), so no basis is left. Raise top_k, "
            "or protect fewer."
        )
    logger.warning("Features %s at %s are chosen and protected: they are left out.", both, chosen.sae.hook_name)
    return chosen.subset(kept)


def protected_site(
    handle: SaeHandle, ids: Sequence[int], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
) -> ProtectedSite:
    """Return the directions of protected features of one SAE, with the tokens that they promote."""
    directions = unit_rows(handle.decoder[torch.tensor(ids, device=handle.decoder.device)], handle.identity.name)
    tokens = promoted_tokens(directions, model, tokenizer, handle.identity.site.kind)
    return ProtectedSite(handle.identity, torch.tensor(ids), directions.float(), tokens)
