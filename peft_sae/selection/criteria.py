"""What a feature must fulfil beside a good score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from ..errors import ConfigError
from ..sae.identity import SaeIdentity
from ..sae.names import parse_feature_name
from ..statistics.moments import FeatureMoments
from .contrast import Contrast


@dataclass(frozen=True)
class Criteria:
    """What a feature must fulfil to be chosen, whatever the selector. The defaults are the plain method.

    Attributes:
        direction: rank by size of the score (`both`), or choose only features with more on the `aligned` texts, or only
            on the `unaligned` ones.
        min_firing_rate: drop features that fire on a smaller share of the observations of both classes.
        max_firing_rate: drop features that fire on a larger share of the observations of both classes ("always on").
        max_cosine: drop a feature whose decoder row has at least this cosine (or its negative) with that of a better
            one that is chosen; needs the SAEs.
        max_q: drop features with a larger q-value. That is the share of chance findings to expect among all features
            with such a q-value, and among the best by `welch_t`; the best by another score can be any of them.
        exclude: names of features never to choose, such as `"12:4051"` or `"blocks.12.hook_resid_post:4051"`.
        keep: names of features to choose first, whatever the other criteria say.
        retain_ratio: with a `retain` class, a feature counts as used by it if its mean there is at least this share of
            its larger mean on the two classes.
    """

    direction: Literal["both", "aligned", "unaligned"] = "both"
    min_firing_rate: float = 0.0
    max_firing_rate: float = 1.0
    max_cosine: float | None = None
    max_q: float | None = None
    exclude: Sequence[str] = ()
    keep: Sequence[str] = ()
    retain_ratio: float = 0.5

    def __post_init__(self) -> None:
        if self.direction not in ("both", "aligned", "unaligned"):
            raise ConfigError(f"direction={self.direction!r} is unknown. Use 'both', 'aligned' or 'unaligned'.")
        for name in ("min_firing_rate", "max_firing_rate", "max_cosine", "max_q"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ConfigError(f"{name}={value} is no share. Use a value from 0 to 1.")
        if self.min_firing_rate > self.max_firing_rate:
            raise ConfigError(
                f"min_firing_rate={self.min_firing_rate} is above max_firing_rate={self.max_firing_rate}, so no "
                "feature could be chosen. Swap them."
            )
        if not self.retain_ratio > 0:
            raise ConfigError(f"retain_ratio={self.retain_ratio} would drop every feature. Use a value above 0.")
        for name in ("exclude", "keep"):
            if isinstance(getattr(self, name), str):
                raise ConfigError(f"{name}={getattr(self, name)!r} is one text. Give a list of names.")

    def to_dict(self) -> dict[str, Any]:
        """Return the criteria as JSON-serialisable data."""
        return {**asdict(self), "exclude": list(self.exclude), "keep": list(self.keep)}


def ids_by_hook(names: Sequence[str], saes: Sequence[SaeIdentity]) -> dict[str, list[int]]:
    """Return feature ids by the hook point of their SAE, each once, in the order of the names.

    Raises:
        SelectionError: a name means no feature.
    """
    found: dict[str, list[int]] = {}
    for name in names:
        sae, feature = parse_feature_name(str(name), saes)
        ids = found.setdefault(sae.hook_name, [])
        if feature not in ids:
            ids.append(feature)
    return found


def failing(
    criteria: Criteria, contrast: Contrast, q_values: torch.Tensor, excluded: Sequence[int]
) -> dict[str, torch.Tensor]:
    """Return, for each criterion in use, which features of the SAE fail it, bool [d_sae]."""
    rates = torch.stack([contrast.aligned.firing_rate, contrast.unaligned.firing_rate])
    failed = {"never_fires": ~contrast.live}
    if criteria.min_firing_rate > 0:
        failed["rare"] = rates.amax(dim=0) < criteria.min_firing_rate
    if criteria.max_firing_rate < 1:
        failed["always_on"] = rates.amin(dim=0) > criteria.max_firing_rate
    if criteria.max_q is not None:
        failed["q_value"] = q_values > criteria.max_q
    if excluded:
        failed["excluded"] = torch.zeros_like(contrast.live)
        failed["excluded"][list(excluded)] = True
    return failed


def used_by(retain: FeatureMoments, contrast: Contrast, ratio: float) -> torch.Tensor:
    """Return which features the retain texts use as well, bool [d_sae]."""
    larger = torch.maximum(contrast.aligned.mean.abs(), contrast.unaligned.mean.abs())
    return (retain.fired > 0) & (retain.mean.abs() >= ratio * larger)
