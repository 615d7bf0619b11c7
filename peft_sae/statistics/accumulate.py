"""Running sums of one class for the features of one SAE, on the device of the SAE."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch

from ..errors import ConfigError
from ..sae.handle import SaeHandle
from .batches import Batch
from .measures import Measures
from .moments import FeatureMoments
from .parts import HISTOGRAM_BINS, ActivationHistogram, ExampleSample, RawMoments, TopExamples, sample_order

Pooling: TypeAlias = Literal["token", "mean", "max", "last"]
POOLINGS = ("token", "mean", "max", "last")

# At most this many feature activations exist at a time. What is done to them costs little while they are in the
# processor's cache (8 MiB in float32); a GPU wants more to do at once (256 MiB).
_CHUNK_ELEMENTS = {"cpu": 2**21, "other": 2**26}


class NotFinite(Exception):
    """Activations are NaN or infinite."""


class ClassSums:
    """Sums over one class of text. Only activations other than zero are touched, and few are.

    Args:
        handle: the SAE.
        pooling: what an observation is: a token, or an example's mean, maximum, or last token.
        measures: what else is measured.
    """

    def __init__(self, handle: SaeHandle, pooling: Pooling, measures: Measures) -> None:
        self._handle, self._pooling, self._measures = handle, pooling, measures
        device = torch.device(handle.sae.device)
        if device.type == "cpu":
            _keep_freed_memory()
        self._chunk = _CHUNK_ELEMENTS.get(device.type, _CHUNK_ELEMENTS["other"])
        # Apple's GPUs have no float64.
        self._device = torch.device("cpu") if device.type == "mps" else device
        self._d_sae = handle.identity.d_sae
        self._count = self._examples = self._count_squares = 0
        self._total = torch.zeros(self._d_sae, dtype=torch.float64, device=self._device)
        self._squares, self._maximum = self._total.clone(), self._total.clone()
        self._example_squares, self._example_products = self._total.clone(), self._total.clone()
        self._fired = torch.zeros(self._d_sae, dtype=torch.int64, device=self._device)
        bins = self._d_sae * HISTOGRAM_BINS if measures.histograms else 0
        self._bins = torch.zeros(bins, dtype=torch.int32, device=self._device)
        self._raw = RawMoments.empty(int(handle.sae.W_enc.shape[0]), covariance=measures.covariance)
        self._top = _TopSums(self._d_sae, measures.top_examples, self._device)
        self._sample = ExampleSample.empty(measures.sample)
        self._pending: list[ExampleSample] = []

    @torch.no_grad()
    def add(self, activations: torch.Tensor, batch: Batch, gradients: torch.Tensor | None = None) -> None:
        """Add one batch.

        Args:
            activations: what the SAE reads, [batch, length, d_in].
            batch: says which tokens count.
            gradients: of the objective with respect to the activations, of the same shape: then an observation is not
                the feature's activation but its attribution, activation times gradient along its decoder row.

        Raises:
            NotFinite: an activation of a counted token is NaN or infinite.
        """
        mask = batch.counted.to(activations.device)
        rows, positions = mask.nonzero(as_tuple=True)
        if self._pooling == "last":
            last = torch.ones_like(rows, dtype=torch.bool)
            last[:-1] = rows[1:] != rows[:-1]
            rows, positions = rows[last], positions[last]
        if not len(rows):
            return
        chosen = activations[rows, positions]
        slopes = None if gradients is None else gradients[rows, positions]
        rows, positions = rows.to(self._device), positions.to(self._device)
        lengths = torch.bincount(rows, minlength=len(batch.ids))
        self._add_raw(chosen, rows, lengths)
        sums = torch.zeros(len(batch.ids) * self._d_sae, dtype=torch.float64, device=self._device)
        for part, features, found in self._handle.encode_blocks(chosen, self._chunk):
            if slopes is not None:
                found = found * self._along(slopes[part], features)
            places, ids, values = _entries(found, self._device)
            if not bool(torch.isfinite(values.sum())):
                raise NotFinite
            ids += features.start
            owners = rows[part][places]
            if self._pooling == "token":
                self._observe(ids, values)
            if self._pooling == "max":
                sums.scatter_reduce_(0, owners * self._d_sae + ids, values, "amax")
            else:
                sums.index_add_(0, owners * self._d_sae + ids, values)
            self._top.add(ids, values, batch.numbers.to(self._device)[owners], positions[part][places])
        self._end_batch(sums.view(len(batch.ids), self._d_sae), lengths, batch.numbers)

    def finish(self) -> FeatureMoments:
        """Return the sums so far, which stand until the next `add`: a wide SAE's histograms are too large to copy."""
        sample = sum(self._pending, self._sample)
        return FeatureMoments(
            count=self._count,
            examples=self._examples,
            count_squares=self._count_squares,
            total=self._total.cpu(),
            total_squares=self._squares.cpu(),
            fired=self._fired.cpu(),
            maximum=self._maximum.cpu(),
            example_squares=self._example_squares.cpu(),
            example_products=self._example_products.cpu(),
            histogram=ActivationHistogram(self._bins.view(self._d_sae, -1).cpu()) if len(self._bins) else None,
            raw=self._raw,
            top=self._top.finish() if self._measures.top_examples else None,
            sample=sample if self._measures.sample else None,
        )

    def _along(self, gradients: torch.Tensor, features: slice) -> torch.Tensor:
        """Gradients [tokens, d_in] along the features' decoder rows, [tokens, features]."""
        decoder = self._handle.decoder[features]
        return gradients.to(device=decoder.device, dtype=decoder.dtype) @ decoder.T

    def _observe(self, ids: torch.Tensor, values: torch.Tensor) -> None:
        """Add observations other than zero: feature ids and values, both [entries]."""
        self._total.index_add_(0, ids, values)
        self._squares.index_add_(0, ids, values.square())
        self._fired += torch.bincount(ids, minlength=self._d_sae)
        self._maximum.scatter_reduce_(0, ids, values, "amax")
        if len(self._bins):
            if bool((values < 0).any()):
                raise ConfigError(
                    f"The SAE {self._handle.identity.name!r} has negative activations, of which no histogram is kept. "
                    "Use measures without histograms."
                )
            cells = ids * HISTOGRAM_BINS + ActivationHistogram.bins(values)
            self._bins.index_add_(0, cells, torch.ones_like(cells, dtype=self._bins.dtype))

    def _end_batch(self, sums: torch.Tensor, lengths: torch.Tensor, numbers: torch.Tensor) -> None:
        """Take in the sums (or maxima) [batch, d_sae] over the examples' tokens."""
        live = lengths > 0
        sums, lengths, numbers = sums[live], lengths[live], numbers.to(self._device)[live]
        self._examples += len(lengths)
        if len(self._bins) and self._count + int(lengths.sum()) > torch.iinfo(self._bins.dtype).max:
            self._bins = self._bins.long()
        means = sums if self._pooling == "max" else sums / lengths[:, None]
        if self._pooling == "token":
            self._count += int(lengths.sum())
            self._count_squares += int(lengths.square().sum())
            self._example_squares += sums.square().sum(dim=0)
            self._example_products += (lengths.double()[:, None] * sums).sum(dim=0)
        else:
            self._count += len(lengths)
            self._count_squares += len(lengths)
            _, ids, values = _entries(means, self._device)
            self._observe(ids, values)
            self._example_squares += means.square().sum(dim=0)
            self._example_products += means.sum(dim=0)
        self._add_sample(means, numbers)

    def _add_sample(self, pooled: torch.Tensor, numbers: torch.Tensor) -> None:
        limit = self._measures.sample
        if not limit:
            return
        if len(self._sample.examples) == limit:
            worst = self._sample.ranks.max()
            keep = sample_order(numbers.cpu()).le(worst).to(self._device)
            pooled, numbers = pooled[keep], numbers[keep]
        if len(numbers):
            self._pending.append(ExampleSample.of(pooled, numbers, limit))
        if sum(len(sample.examples) for sample in self._pending) >= limit:
            self._sample = sum(self._pending, self._sample)
            self._pending = []

    def _add_raw(self, chosen: torch.Tensor, rows: torch.Tensor, lengths: torch.Tensor) -> None:
        observed = chosen.detach().float()
        if not bool(torch.isfinite(observed).all()):
            raise NotFinite
        if self._pooling in ("mean", "max"):
            sums = observed.new_zeros(len(lengths), observed.shape[1])
            sums.index_add_(0, rows.to(observed.device), observed)
            live = (lengths > 0).to(observed.device)
            observed = sums[live] / lengths.to(observed.device)[live, None]
        products = (observed.T @ observed).cpu().double() if self._measures.covariance else None
        self._raw = self._raw + RawMoments(len(observed), observed.sum(dim=0).cpu().double(), products)


class _TopSums:
    """The examples that activate each feature most, so far."""

    def __init__(self, d_sae: int, number: int, device: torch.device) -> None:
        self._number, self._d_sae = number, d_sae
        empty = TopExamples.empty(d_sae, number)
        self._values = empty.values.double().to(device)
        self._examples, self._positions = empty.examples.to(device), empty.positions.to(device)

    def add(self, ids: torch.Tensor, values: torch.Tensor, examples: torch.Tensor, positions: torch.Tensor) -> None:
        """Take in activations: feature ids, values, places of the examples and of the tokens, all [entries]."""
        if not self._number:
            return
        # Soon hardly any activation is among the best of its feature. Equal ones may come from an earlier example.
        high = values >= self._values[ids, -1].clamp(min=torch.finfo(torch.float64).tiny)
        ids, values, examples, positions = ids[high], values[high], examples[high], positions[high]
        if not len(ids):
            return
        touched = torch.unique(ids)
        owners = touched.repeat_interleave(self._number)
        ids = torch.cat([ids, owners])
        values = torch.cat([values, self._values[touched].flatten()])
        examples = torch.cat([examples, self._examples[touched].flatten()])
        positions = torch.cat([positions, self._positions[touched].flatten()])
        # By feature, then by value, then by place; afterwards only the first entry of each example counts.
        order = torch.argsort(positions, stable=True)
        order = order[torch.argsort(examples[order], stable=True)]
        order = order[torch.argsort(values[order], descending=True, stable=True)]
        order = order[torch.argsort(ids[order], stable=True)]
        ids, values, examples, positions = ids[order], values[order], examples[order], positions[order]
        first = _first_of_pairs(ids, examples) & (examples >= 0)
        ids, values, examples, positions = ids[first], values[first], examples[first], positions[first]
        starts = torch.searchsorted(ids, ids)
        rank = torch.arange(len(ids), device=ids.device) - starts
        best = rank < self._number
        ids, rank = ids[best], rank[best]
        self._values[ids, rank] = values[best]
        self._examples[ids, rank] = examples[best]
        self._positions[ids, rank] = positions[best]

    def finish(self) -> TopExamples:
        """Return the best so far."""
        return TopExamples(self._values.float().cpu(), self._examples.cpu(), self._positions.cpu())


def _keep_freed_memory() -> None:
    """Let freed memory stay with the process, enough of it for the tensors that an encoder makes of a chunk.

    glibc gives back what is free beyond twice the largest block that was ever freed (of those up to 32 MiB), and to get
    a chunk's memory page by page from the system anew takes as long as half of the encoder's matrix product.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)


def _first_of_pairs(ids: torch.Tensor, examples: torch.Tensor) -> torch.Tensor:
    """Whether each entry is the first with its pair of feature and example."""
    pairs, order = torch.sort(ids * (int(examples.max()) + 2) + examples, stable=True)  # the place of none is -1
    first = torch.ones_like(pairs, dtype=torch.bool)
    first[order[1:]] = pairs[1:] != pairs[:-1]
    return first


def _entries(features: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Row, feature id and value (float64) of everything in [rows, d_sae] that is not zero."""
    width = features.shape[1]
    flat = features.reshape(-1)
    places = flat.nonzero().squeeze(1)
    values = flat[places].to(device)  # before the change of dtype, which not every device has
    places = places.to(device)
    return places.div(width, rounding_mode="floor"), places % width, values.double()
