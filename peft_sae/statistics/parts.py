"""What statistics can hold beside the moments. Each part can be summed over shards and written to a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import torch

# Name to shape and dtype, for the check of a file before it is read.
Layout: TypeAlias = "dict[str, tuple[tuple[int, ...], torch.dtype]]"

_SUB_BINS = 64  # per octave, so a bin is 0.8 to 1.6 % wide
_LOWEST_OCTAVE, _OCTAVES = -11, 24  # 2^-11 to 2^13; what lies outside falls into the outermost bin
HISTOGRAM_BINS = _SUB_BINS * _OCTAVES


@dataclass(frozen=True)
class ActivationHistogram:
    """How often activations of each size occur, per feature.

    A bin is 0.8 to 1.6 % wide, linear within its octave. Ranks between two samples are known exactly across bins, and
    to a half within one: of features whose activations all lie within few per cent of each other little is known.

    Attributes:
        counts: [d_sae, HISTOGRAM_BINS], of activations above zero; int32 as long as that holds them, then int64.
    """

    counts: torch.Tensor

    kind: ClassVar[str] = "histogram"

    @classmethod
    def empty(cls, d_sae: int) -> ActivationHistogram:
        """Return the histogram of nothing."""
        return cls(torch.zeros(d_sae, HISTOGRAM_BINS, dtype=torch.int32))

    @staticmethod
    def bins(values: torch.Tensor) -> torch.Tensor:
        """Return the bin of every value, int64 of the same shape. Values are above zero."""
        mantissa, exponent = torch.frexp(values.double())  # value = mantissa * 2^exponent, mantissa in [0.5, 1)
        within = ((mantissa * 2 - 1) * _SUB_BINS).long()
        return ((exponent.long() - 1 - _LOWEST_OCTAVE) * _SUB_BINS + within).clamp(0, HISTOGRAM_BINS - 1)

    def __add__(self, other: ActivationHistogram) -> ActivationHistogram:
        """Return the histogram of both."""
        if int(self.counts.max()) + int(other.counts.max()) > torch.iinfo(torch.int32).max:
            return ActivationHistogram(self.counts.long() + other.counts.long())
        return ActivationHistogram(self.counts + other.counts)

    def sizes(self) -> dict[str, int]:
        """Return the sizes that the layout of the file depends on."""
        return {"d_sae": self.counts.shape[0], "cells": int((self.counts > 0).sum())}

    @staticmethod
    def layout(sizes: Mapping[str, int]) -> Layout:
        """Return the tensors of the file: most bins are empty, so only the others are written."""
        return {name: ((sizes["cells"],), torch.int64) for name in ("cells", "cell_counts")}

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors of the file."""
        flat = self.counts.reshape(-1)
        cells = flat.nonzero().squeeze(1)
        return {"cells": cells, "cell_counts": flat[cells].long()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor], sizes: Mapping[str, int]) -> ActivationHistogram:
        """Read what `tensors` gave.

        Raises:
            ValueError: a cell lies outside.
        """
        size = sizes["d_sae"] * HISTOGRAM_BINS
        if bool(((tensors["cells"] < 0) | (tensors["cells"] >= size)).any()) or bool(
            (tensors["cell_counts"] < 1).any()
        ):
            raise ValueError("histogram with impossible cells")
        large = bool((tensors["cell_counts"] > torch.iinfo(torch.int32).max).any())
        flat = torch.zeros(size, dtype=torch.int64 if large else torch.int32)
        flat[tensors["cells"]] = tensors["cell_counts"].to(flat.dtype)
        return cls(flat.reshape(sizes["d_sae"], HISTOGRAM_BINS))


@dataclass(frozen=True)
class RawMoments:
    """Sums of the activations themselves, before the SAE.

    Attributes:
        count: number of observations.
        total: sum, float64 [d_in].
        products: sum of outer products, float64 [d_in, d_in]; None if they were not asked for.
    """

    count: int
    total: torch.Tensor
    products: torch.Tensor | None = None

    kind: ClassVar[str] = "raw"

    @classmethod
    def empty(cls, d_in: int, *, covariance: bool) -> RawMoments:
        """Return the sums of nothing."""
        products = torch.zeros(d_in, d_in, dtype=torch.float64) if covariance else None
        return cls(0, torch.zeros(d_in, dtype=torch.float64), products)

    @property
    def mean(self) -> torch.Tensor:
        """Mean activation, float64 [d_in]."""
        return self.total / self.count

    def __add__(self, other: RawMoments) -> RawMoments:
        """Return the sums of both."""
        both = self.products is not None and other.products is not None
        products = self.products + other.products if both else None  # type: ignore[operator]
        return RawMoments(self.count + other.count, self.total + other.total, products)

    def sizes(self) -> dict[str, int]:
        """Return the sizes that the layout of the file depends on."""
        return {"count": self.count, "d_in": self.total.shape[0], "covariance": int(self.products is not None)}

    @staticmethod
    def layout(sizes: Mapping[str, int]) -> Layout:
        """Return the tensors of the file."""
        width = sizes["d_in"]
        found: Layout = {"total": ((width,), torch.float64)}
        return found | ({"products": ((width, width), torch.float64)} if sizes["covariance"] else {})

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors of the file."""
        return {"total": self.total} | ({} if self.products is None else {"products": self.products})

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor], sizes: Mapping[str, int]) -> RawMoments:
        """Read what `tensors` gave."""
        return cls(sizes["count"], tensors["total"], tensors.get("products"))


@dataclass(frozen=True)
class TopExamples:
    """The examples that activate each feature most, largest activation first.

    Attributes:
        values: largest activation of the feature in the example, float32 [d_sae, n]; 0 where there are fewer examples.
        examples: the example's place in its data set, int64 [d_sae, n]; -1 where there are fewer.
        positions: the token's place in the example, int64 [d_sae, n], BOS included.
    """

    values: torch.Tensor
    examples: torch.Tensor
    positions: torch.Tensor

    kind: ClassVar[str] = "top"

    @classmethod
    def empty(cls, d_sae: int, number: int) -> TopExamples:
        """Return the best of nothing."""
        missing = torch.full((d_sae, number), -1)
        return cls(torch.zeros(d_sae, number), missing, missing.clone())

    def __add__(self, other: TopExamples) -> TopExamples:
        """Return the best of both, as many as both have: further ones are not known."""
        number = min(self.values.shape[1], other.values.shape[1])
        values, examples, positions = (
            torch.cat([getattr(self, name), getattr(other, name)], dim=1)
            for name in ("values", "examples", "positions")
        )
        # Ties go to the earlier example, whichever side it comes from.
        by_place = torch.argsort(torch.where(examples < 0, torch.iinfo(torch.int64).max, examples), dim=1, stable=True)
        order = by_place.gather(1, torch.argsort(values.gather(1, by_place), dim=1, descending=True, stable=True))
        order = order[:, :number]
        return TopExamples(values.gather(1, order), examples.gather(1, order), positions.gather(1, order))

    def shifted(self, by: int) -> TopExamples:
        """Return the same with every example's place moved, as when its data set is put behind another."""
        return TopExamples(self.values, torch.where(self.examples < 0, -1, self.examples + by), self.positions)

    def sizes(self) -> dict[str, int]:
        """Return the sizes that the layout of the file depends on."""
        return {"d_sae": self.values.shape[0], "number": self.values.shape[1]}

    @staticmethod
    def layout(sizes: Mapping[str, int]) -> Layout:
        """Return the tensors of the file."""
        shape = (sizes["d_sae"], sizes["number"])
        return {"values": (shape, torch.float32), "examples": (shape, torch.int64), "positions": (shape, torch.int64)}

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors of the file."""
        return {"values": self.values, "examples": self.examples, "positions": self.positions}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor], sizes: Mapping[str, int]) -> TopExamples:
        """Read what `tensors` gave."""
        return cls(**tensors)


@dataclass(frozen=True)
class ExampleSample:
    """Features of some examples, pooled over their tokens, as the rows of a sparse matrix.

    Which examples are kept is decided by a fixed pseudo-random order of their places in the data; so processes that
    share one data set keep the same ones as a single pass. An example carries its rank along into merged statistics,
    where each data set has the same chance.

    Attributes:
        limit: examples to keep at most.
        examples: places in the data set, int64 [n].
        ranks: places in the fixed order, int64 [n]; the smallest are kept.
        ends: where each row ends in the next two, int64 [n].
        features: ids of the features that are not zero, int64 [nonzero].
        values: their pooled activations, float32 [nonzero].
    """

    limit: int
    examples: torch.Tensor
    ranks: torch.Tensor
    ends: torch.Tensor
    features: torch.Tensor
    values: torch.Tensor

    kind: ClassVar[str] = "sample"

    @classmethod
    def empty(cls, limit: int) -> ExampleSample:
        """Return the sample of nothing."""
        none = torch.zeros(0, dtype=torch.int64)
        return cls(limit, none, none, none, none, torch.zeros(0))

    @classmethod
    def of(cls, pooled: torch.Tensor, examples: torch.Tensor, limit: int) -> ExampleSample:
        """Return the sample of pooled features [n, d_sae] of the examples at the places [n]."""
        rows, features = pooled.nonzero(as_tuple=True)
        ends = torch.bincount(rows, minlength=pooled.shape[0]).cumsum(0)
        values = pooled[rows, features].float()
        places = examples.cpu()
        return cls(limit, places, sample_order(places), ends.cpu(), features.cpu(), values.cpu())._shortened()

    def __add__(self, other: ExampleSample) -> ExampleSample:
        """Return the sample of both, with the lower limit."""
        offset = self.ends[-1] if len(self.ends) else 0
        return ExampleSample(
            min(self.limit, other.limit),
            torch.cat([self.examples, other.examples]),
            torch.cat([self.ranks, other.ranks]),
            torch.cat([self.ends, other.ends + offset]),
            torch.cat([self.features, other.features]),
            torch.cat([self.values, other.values]),
        )._shortened()

    def _shortened(self) -> ExampleSample:
        if len(self.examples) <= self.limit:
            return self
        keep = self.ranks.argsort(stable=True)[: self.limit].sort().values
        return self.rows(keep)

    def rows(self, keep: torch.Tensor) -> ExampleSample:
        """Return the sample of some of the rows, int64 [m]."""
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), self.ends])[:-1]
        lengths = (self.ends - starts)[keep]
        ends = lengths.cumsum(0)
        entries = torch.arange(int(lengths.sum())) + torch.repeat_interleave(starts[keep] - (ends - lengths), lengths)
        return ExampleSample(
            self.limit, self.examples[keep], self.ranks[keep], ends, self.features[entries], self.values[entries]
        )

    def shifted(self, by: int) -> ExampleSample:
        """Return the same with every example's place moved, as when its data set is put behind another."""
        return ExampleSample(self.limit, self.examples + by, self.ranks, self.ends, self.features, self.values)

    def dense(self, d_sae: int) -> torch.Tensor:
        """Return the rows as a dense matrix, float32 [n, d_sae]."""
        lengths = torch.diff(self.ends, prepend=torch.zeros(1, dtype=torch.int64))
        rows = torch.repeat_interleave(torch.arange(len(self.examples)), lengths)
        matrix = torch.zeros(len(self.examples), d_sae)
        matrix[rows, self.features] = self.values
        return matrix

    def sizes(self) -> dict[str, int]:
        """Return the sizes that the layout of the file depends on."""
        return {"limit": self.limit, "rows": len(self.examples), "entries": len(self.features)}

    @staticmethod
    def layout(sizes: Mapping[str, int]) -> Layout:
        """Return the tensors of the file."""
        rows, entries = (sizes["rows"],), (sizes["entries"],)
        return {
            "examples": (rows, torch.int64),
            "ranks": (rows, torch.int64),
            "ends": (rows, torch.int64),
            "features": (entries, torch.int64),
            "values": (entries, torch.float32),
        }

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors of the file."""
        return {name: getattr(self, name) for name in ("examples", "ranks", "ends", "features", "values")}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor], sizes: Mapping[str, int]) -> ExampleSample:
        """Read what `tensors` gave.

        Raises:
            ValueError: the rows do not end where the entries do.
        """
        ends = tensors["ends"]
        if bool((torch.diff(ends, prepend=torch.zeros(1, dtype=torch.int64)) < 0).any()) or (
            int(ends[-1]) if len(ends) else 0
        ) != len(tensors["features"]):
            raise ValueError("sample with impossible rows")
        return cls(sizes["limit"], **tensors)


def sample_order(examples: torch.Tensor) -> torch.Tensor:
    """Return a fixed pseudo-random rank of every place in a data set, int64 (the finaliser of splitmix64)."""
    mixed = examples * -7046029254386353131
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        mixed = (mixed ^ ((mixed >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return mixed ^ ((mixed >> 31) & ((1 << 33) - 1))


Part: TypeAlias = "ActivationHistogram | RawMoments | TopExamples | ExampleSample"
PARTS: dict[str, type[ActivationHistogram] | type[RawMoments] | type[TopExamples] | type[ExampleSample]] = {
    part.kind: part for part in (ActivationHistogram, RawMoments, TopExamples, ExampleSample)
}
