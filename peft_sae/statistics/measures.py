"""What can be measured beside the moments."""

from __future__ import annotations

from dataclasses import dataclass, fields

from ..errors import ConfigError

_MOST = 100_000


@dataclass(frozen=True)
class Measures:
    """What `collect_statistics` measures beside the moments.

    Attributes:
        histograms: counts of activations per feature in bins of 0.8 to 1.6 %, for `auroc`. They take 6 KiB of memory
            per feature and class.
        covariance: second moments of the raw activations, for the control `difference_pca`. They cost a product of
            [d_in, tokens] and [tokens, d_in].
        top_examples: texts to remember per feature, those that activate it most.
        sample: examples per class whose pooled features are kept, for `probe`; 0 keeps none.
    """

    histograms: bool = False
    covariance: bool = False
    top_examples: int = 0
    sample: int = 0

    def __post_init__(self) -> None:
        for name in ("top_examples", "sample"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _MOST:
                raise ConfigError(f"{name}={value!r} is no number of examples. Use 0 to {_MOST}.")

    def __or__(self, other: Measures) -> Measures:
        """Return everything that either measures."""
        return Measures(
            **{field.name: max(getattr(self, field.name), getattr(other, field.name)) for field in fields(self)}
        )
