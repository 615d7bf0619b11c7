"""The sums that every selector starts from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .parts import PARTS, ActivationHistogram, ExampleSample, Layout, RawMoments, TopExamples

_DTYPES = {
    "total": torch.float64,
    "total_squares": torch.float64,
    "fired": torch.int64,
    "maximum": torch.float64,
    "example_squares": torch.float64,
    "example_products": torch.float64,
}
_COUNTS = ("count", "examples", "count_squares")


@dataclass(frozen=True, repr=False)
class FeatureMoments:
    """Sums over the observations of one class, for the features of one SAE.

    An observation is a token or, with pooling, a whole example. Sums over examples are kept beside those over
    observations, because the tokens of an example are not independent of each other: `standard_error` is about
    examples.

    Attributes:
        count: number of observations.
        examples: number of examples that they come from.
        count_squares: sum over examples of the squared number of observations.
        total: sum of activations, float64 [d_sae].
        total_squares: sum of squared activations, float64 [d_sae].
        fired: number of observations with an activation other than zero, int64 [d_sae].
        maximum: largest activation, float64 [d_sae]; at least 0.
        example_squares: sum over examples of the squared sum of activations, float64 [d_sae].
        example_products: sum over examples of the sum of activations times the number of observations, float64 [d_sae].
        histogram: how often activations of each size occur, if it was asked for.
        raw: sums of the activations before the SAE, if they were collected.
        top: the examples that activate each feature most, if they were asked for.
        sample: pooled features of some examples, if they were asked for.
    """

    count: int
    examples: int
    count_squares: int
    total: torch.Tensor
    total_squares: torch.Tensor
    fired: torch.Tensor
    maximum: torch.Tensor
    example_squares: torch.Tensor
    example_products: torch.Tensor
    histogram: ActivationHistogram | None = None
    raw: RawMoments | None = None
    top: TopExamples | None = None
    sample: ExampleSample | None = None

    def __repr__(self) -> str:
        parts = [name for name in PARTS if getattr(self, name) is not None]
        return f"FeatureMoments({len(self.total)} features, {self.count} observations, {self.examples} texts, {parts})"

    @classmethod
    def of(cls, activations: torch.Tensor, examples: torch.Tensor | None = None) -> FeatureMoments:
        """Return the moments of activations that are at hand as a whole.

        Args:
            activations: [observations, d_sae].
            examples: the example that each observation belongs to, int64 [observations]; by default one each.
        """
        exact = activations.detach().double().cpu()
        number = torch.arange(len(exact)) if examples is None else torch.unique(examples, return_inverse=True)[1]
        sizes = torch.bincount(number).double()
        sums = torch.zeros(len(sizes), exact.shape[1], dtype=torch.float64).index_add_(0, number, exact)
        return cls(
            count=len(exact),
            examples=len(sizes),
            count_squares=int(sizes.square().sum()),
            total=exact.sum(dim=0),
            total_squares=exact.square().sum(dim=0),
            fired=(exact != 0).sum(dim=0),
            maximum=exact.amax(dim=0).clamp(min=0),
            example_squares=sums.square().sum(dim=0),
            example_products=(sizes[:, None] * sums).sum(dim=0),
        )

    def __add__(self, other: FeatureMoments) -> FeatureMoments:
        """Return the moments of both together. A part that only one of them has is left out."""
        parts = {
            name: getattr(self, name) + getattr(other, name)
            for name in PARTS
            if getattr(self, name) is not None and getattr(other, name) is not None
        }
        sums = {name: getattr(self, name) + getattr(other, name) for name in (*_COUNTS, *_DTYPES) if name != "maximum"}
        return FeatureMoments(maximum=torch.maximum(self.maximum, other.maximum), **sums, **parts)

    @property
    def mean(self) -> torch.Tensor:
        """Mean activation per feature, float64 [d_sae]."""
        return self.total / self.count

    @property
    def variance(self) -> torch.Tensor:
        """Variance of the activations per feature (divided by count), float64 [d_sae]."""
        return (self.total_squares / self.count - self.mean.square()).clamp(min=0)

    @property
    def firing_rate(self) -> torch.Tensor:
        """Share of observations on which each feature fires, float64 [d_sae]."""
        return self.fired.double() / self.count

    @property
    def standard_error(self) -> torch.Tensor:
        """Standard error of the mean, float64 [d_sae], with examples as the independent units.

        With S_e the sum and n_e the number of an example's observations, m the mean, N the number of observations and G
        that of examples: sqrt(G / (G - 1) * sum_e (S_e - n_e m)^2) / N, the linearised variance of a ratio of sums
        (Cochran, Sampling Techniques, 3rd edition, section 6.4). With one observation per example that is the usual
        standard error. NaN for a single example.
        """
        correction = self.examples / (self.examples - 1) if self.examples > 1 else float("nan")
        return (correction * self.squared_residuals).sqrt() / self.count

    @property
    def squared_residuals(self) -> torch.Tensor:
        """Sum over examples of (S_e - n_e m)^2, with the names of `standard_error`, float64 [d_sae]."""
        mean = self.mean
        squares = self.example_squares - 2 * mean * self.example_products + mean.square() * self.count_squares
        return squares.clamp(min=0)

    def without_parts(self) -> FeatureMoments:
        """Return the sums alone."""
        return FeatureMoments(**{name: getattr(self, name) for name in (*_COUNTS, *_DTYPES)})

    def shifted(self, by: int) -> FeatureMoments:
        """Return the same with every example's place in its data set moved."""
        moved = {name: getattr(self, name) for name in (*_COUNTS, *_DTYPES, *PARTS)}
        for name in ("top", "sample"):
            moved[name] = None if moved[name] is None else moved[name].shifted(by)
        return FeatureMoments(**moved)

    def sizes(self) -> dict[str, Any]:
        """Return the counts, and the sizes of the parts, as JSON-serialisable data."""
        parts = {name: getattr(self, name).sizes() for name in PARTS if getattr(self, name) is not None}
        return {name: getattr(self, name) for name in _COUNTS} | {"parts": parts}

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors of the file by name."""
        found = {name: getattr(self, name) for name in _DTYPES}
        for kind in PARTS:
            part = getattr(self, kind)
            found |= {} if part is None else {f"{kind}.{name}": tensor for name, tensor in part.tensors().items()}
        return found

    @staticmethod
    def layout(sizes: Mapping[str, Any], d_sae: int, d_in: int | None) -> Layout:
        """Return shape and dtype of every tensor of the file.

        Raises:
            ValueError: a part is of another number of features, or of activations of another width.
        """
        found: Layout = {name: ((d_sae,), dtype) for name, dtype in _DTYPES.items()}
        for kind, part_sizes in sizes["parts"].items():
            if part_sizes.get("d_sae", d_sae) != d_sae:
                raise ValueError(f"{kind} is of {part_sizes['d_sae']} features, and the SAE has {d_sae}")
            if d_in is not None and part_sizes.get("d_in", d_in) != d_in:
                raise ValueError(f"{kind} is of width {part_sizes['d_in']}, and the SAE's is {d_in}")
            found |= {f"{kind}.{name}": header for name, header in PARTS[kind].layout(part_sizes).items()}
        return found

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor], sizes: Mapping[str, Any]) -> FeatureMoments:
        """Read what `tensors` and `sizes` gave.

        Raises:
            ValueError: a part is damaged.
        """
        parts = {}
        for kind, part_sizes in sizes["parts"].items():
            own = {name.split(".", 1)[1]: tensor for name, tensor in tensors.items() if name.startswith(f"{kind}.")}
            parts[kind] = PARTS[kind].from_tensors(own, part_sizes)
        sample = parts.get("sample")
        d_sae = len(tensors["total"])
        if isinstance(sample, ExampleSample) and bool(((sample.features < 0) | (sample.features >= d_sae)).any()):
            raise ValueError("sample with features that the SAE does not have")
        return cls(**{name: sizes[name] for name in _COUNTS}, **{name: tensors[name] for name in _DTYPES}, **parts)  # type: ignore[arg-type]
