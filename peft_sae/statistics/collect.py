"""One streaming pass over labelled texts."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence, Sized
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from ..errors import ConfigError, DataError
from ..sae.handle import SaeHandle, as_handles, check_distinct
from ..sae.placement import Tap, check_placement, find_tap
from .accumulate import POOLINGS, ClassSums, NotFinite, Pooling
from .batches import Batch, iterate_batches
from .capture import Capture, capturing
from .checks import check_counts, check_measures, context_length, prepends_bos
from .data import Example, ExampleReader, TokenChoice
from .gradient import GradientCapture, Objective, capturing_gradients
from .measures import Measures
from .model import model_description, weights_digest
from .moments import FeatureMoments
from .records import Data, iterate_records
from .share import Share, join
from .state import Progress, StateFile
from .statistics import FeatureStatistics, add_digests

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_MOST_TEXTS = 2**18  # beyond, repeated texts are not looked for: memory stays what it is


def collect_statistics(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Mapping[str, Data],
    saes: Sequence[SaeHandle],
    *,
    tokens: TokenChoice = "all",
    pooling: Pooling = "token",
    measures: Measures | None = None,
    attribute: Objective | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
    state: str | Path | None = None,
    save_every: float = 60.0,
    distributed: bool | None = None,
    progress: bool = True,
) -> FeatureStatistics:
    """Run a model over labelled texts and sum up what every SAE feature does on each label.

    Each text goes through the model once, up to the deepest SAE and no further. Nothing is kept per
    token, so memory does not grow with the data. Padding, BOS (or the first token, where there is no BOS) and
    what else the tokenizer adds around a text do not count; the words of a chat template do. The model is left as it
    was found.

    Args:
        model: the plain Hugging Face model, on any device or several, in any dtype.
        tokenizer: its tokenizer (a fast one).
        data: label to data set, usually `{"aligned": ..., "unaligned": ...}`. A data set is a
            `datasets.Dataset`, an iterable, or the path of a JSONL file. Its records are strings, or
            mappings with `text`, with `prompt` and `completion`, or with `messages`.
        saes: from `load_saes`; SAE objects of sae-lens will do.
        tokens: count `all` tokens, those of the `response` (the completion, or the assistant's last turn), of the
            `prompt` before it, or of every turn of the `assistant`.
        pooling: what is one observation: each `token`; or each example, by the `mean` or the `max` over its counted
            tokens, or by the `last` of them (behind a chat template often the one that ends the turn). With `token`,
            long texts count for more. Raw activations are averaged with `max`, too.
        measures: what else is measured: histograms for `auroc`, a sample of examples for `probe`, the texts that
            activate each feature most, the covariance of the raw activations.
        attribute: instead of activations, sum up attributions: each feature's activation times the gradient, along its
            decoder row, of this objective (`log_likelihood`, `logit_difference(...)` of `peft_sae.statistics.gradient`,
            or a function of your own). It is the first-order estimate of what the objective would lose without the
            feature (attribution patching, arXiv 2310.10348; on SAE features arXiv 2403.19647). `tokens` then says which
            tokens the objective is about, and every token of the text is observed. Needs a whole forward and backward
            pass.
        batch_size: texts per forward pass.
        max_length: tokens per text; longer texts are cut at the end, and their number is recorded and
            logged. By default the model's context length.
        state: file to write the state to now and then. If it is there, the run goes on from it; texts that are done are
            read and tokenised again, to see that they are the same, but not run. Remove it when you have saved the
            statistics.
        save_every: seconds between two states.
        distributed: where `torch.distributed` is initialised (by accelerate, for instance), each process reads its
            share of the records and all get the whole result, so all must call this. False makes this process read them
            all.
        progress: show a progress bar (in the first process).

    Returns:
        Per label and SAE the count, sum, sum of squares, firing count and maximum of each feature.

    Raises:
        DataError: a data set is empty or malformed, no token of it counts, activations are not
            finite, or the data are not those of the state.
        MismatchError: an SAE does not belong to the model.
        ConfigError: an argument is out of range, or `state` is of another run.
        ArtifactError: `state` is damaged or cannot be written. It is left as it was.
    """
    if not isinstance(data, Mapping) or not data or not all(isinstance(label, str) for label in data):
        raise ConfigError(
            f"data is {type(data).__name__}, and a mapping from label to data set is needed, for example "
            "{'aligned': ..., 'unaligned': ...}."
        )
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size} processes nothing. Use 1 or more.")
    if pooling not in POOLINGS:
        raise ConfigError(f"pooling={pooling!r} is unknown. Choose one of {POOLINGS}.")
    share = Share.of_this_process(distributed)
    try:
        saes = as_handles(saes)
        check_distinct(saes)
        taps = check_placement(model, saes)
        limit = context_length(model, max_length)
        prepend_bos = prepends_bos(saes)
        settings = {
            "model": model_description(model),
            "tokens": tokens,
            "pooling": pooling,
            "quantity": "activation" if attribute is None else "attribution",
            "objective": None if attribute is None else getattr(attribute, "__qualname__", type(attribute).__name__),
            "max_length": limit,
            "prepend_bos": prepend_bos,
        }
        collection = _Collection(saes, settings, measures or Measures(), share, batch_size, progress)
        check_measures(collection.measures, pooling, attribute, saes)
        identities = [handle.identity.to_dict() for handle in saes]
        run = {"labels": list(data), "saes": identities, "batch_size": batch_size, "share": [share.rank, share.world]}
        run |= {
            **settings,
            "measures": asdict(collection.measures),
        }
        run |= {"dtype": str(model.dtype), "weights": weights_digest(model, exact=True)}
        if state is not None and attribute is not None and "<" in str(settings["objective"]):
            raise ConfigError(
                f"The objective {settings['objective']!r} is a function without a name of its own, so a state could "
                "not tell it from another. Define it at the top of a module, or leave the state out."
            )
        file = StateFile(state, run, share, save_every)
        collection.resume(file)
        with _capturing(model, taps, saes, attribute) as capture:
            for label, records in data.items():
                reader = ExampleReader(tokenizer, tokens=tokens, max_length=limit, prepend_bos=prepend_bos)
                collection.read(label, records, reader, tokenizer.pad_token_id or 0, capture)
        own: FeatureStatistics | Exception = collection.statistics
    except Exception as error:
        own = error
    statistics = join(own, share)
    check_counts(statistics, tokens)
    return statistics


def _capturing(
    model: PreTrainedModel, taps: Sequence[Tap], saes: Sequence[SaeHandle], attribute: Objective | None
) -> AbstractContextManager[Capture]:
    if attribute is None:
        return capturing(model, taps)
    written = [find_tap(model, handle.identity.site) for handle in saes]
    return capturing_gradients(model, taps, written, attribute)


class _Collection:
    """The statistics of one run, as far as it has come."""

    def __init__(
        self,
        saes: Sequence[SaeHandle],
        settings: Mapping[str, Any],
        measures: Measures,
        share: Share,
        batch_size: int,
        progress: bool,
    ) -> None:
        self.measures = measures
        self._saes, self._settings, self._share = saes, settings, share
        self._batch_size, self._progress = batch_size, progress and share.rank == 0
        self._counted: dict[str, dict[str, Any]] = {"examples": {}, "truncated": {}, "data": {}}
        self._moments: dict[str, tuple[FeatureMoments, ...]] = {}
        self._batches: dict[str, int] = {}
        self._texts: set[int] = set()  # what has been read of a class, by hash
        self._earlier: Progress | None = None
        self._file: StateFile | None = None

    @property
    def statistics(self) -> FeatureStatistics:
        """What is summed up so far."""
        counted = {name: dict(found) for name, found in self._counted.items()}
        return FeatureStatistics(
            tuple(handle.identity for handle in self._saes), dict(self._moments), {**self._settings, **counted}
        )

    def resume(self, file: StateFile) -> None:
        """Go on from what a file holds, and write to it."""
        self._file, self._earlier = file, file.read()
        if self._earlier is not None:
            done = dict(self._earlier.batches)
            logger.warning("Going on from an earlier run: %s batches are done.", done)

    def read(self, label: str, data: Data, reader: ExampleReader, pad_id: int, capture: Capture) -> None:
        """Run all texts of one class, except those that an earlier run has done."""
        done = 0 if self._earlier is None else int(self._earlier.batches.get(label, 0))
        sums = [ClassSums(handle, self._settings["pooling"], self.measures) for handle in self._saes]
        earlier = self._earlier.statistics.moments[label] if self._earlier is not None and done else None
        self._counted["examples"][label], self._counted["data"][label] = 0, f"{0:064x}"
        self._texts.clear()
        batches = iterate_batches(self._examples(data, label, reader), batch_size=self._batch_size, pad_id=pad_id)
        number = 0
        with tqdm(total=_length(data), desc=f"statistics ({label})", unit=" texts", disable=not self._progress) as bar:
            for number, batch in enumerate(batches, start=1):
                self._count(label, batch)
                self._counted["truncated"][label] = reader.truncated
                if number == done:
                    self._check_same(label)
                if number > done:
                    self._add(sums, batch, capture, label)
                bar.update(len(batch.ids) * self._share.world)
                if number > done and self._file is not None and self._file.due:
                    self._finish(label, number, sums, earlier)
        if number < done:
            raise DataError(_CHANGED.format(label))
        self._counted["truncated"][label] = reader.truncated
        self._finish(label, number, sums, earlier)
        self._tell(label, reader)

    def _tell(self, label: str, reader: ExampleReader) -> None:
        """Warn of what the user may not know about a class."""
        examples, limit = self._counted["examples"][label], self._settings["max_length"]
        if reader.truncated:
            logger.warning("%d of %d %s texts were cut at %d tokens.", reader.truncated, examples, label, limit)
        silent = examples - self._moments[label][0].examples
        if 0 < silent < examples:
            logger.warning("%d of %d %s texts have no token that counts.", silent, examples, label)
        repeated = examples - len(self._texts)
        if repeated and len(self._texts) < _MOST_TEXTS:
            logger.warning(
                "%d of %d %s texts repeat another one. Tests take them as independent, so q-values are too small.",
                repeated,
                examples,
                label,
            )

    def _examples(self, data: Data, label: str, reader: ExampleReader) -> Iterator[Example]:
        for number, record in enumerate(iterate_records(data, label)):
            if not self._share.has(number):
                continue
            try:
                yield reader.read(record, number)
            except DataError as error:
                raise DataError(f"In the {label} data: {error}") from error

    def _count(self, label: str, batch: Batch) -> None:
        self._counted["examples"][label] += len(batch.ids)
        entries = [self._counted["data"][label]]
        masks = batch.counted.tolist()
        lengths, numbers = batch.attention.sum(1).tolist(), batch.numbers.tolist()
        for row, length, number, mask in zip(batch.ids.tolist(), lengths, numbers, masks, strict=True):
            entry = f"{number}:{row[:length]}:{mask[:length]}"
            entries.append(hashlib.sha256(entry.encode()).hexdigest())
            if len(self._texts) < _MOST_TEXTS:
                self._texts.add(hash(tuple(row[:length])))
        self._counted["data"][label] = add_digests(*entries)

    def _add(self, sums: list[ClassSums], batch: Batch, capture: Capture, label: str) -> None:
        if not bool(batch.counted.any()):
            return
        gradients: Sequence[torch.Tensor | None] = [None] * len(sums)
        if isinstance(capture, GradientCapture):
            activations, gradients = capture.run_with_gradients(batch)
            # Texts of which nothing counts are observed no more than if they had been in a batch of their own.
            observed = batch.ordinary & batch.counted.any(dim=1, keepdim=True)
            batch = replace(batch, counted=observed)
        else:
            activations = capture.run(batch.ids, batch.attention)
        for handle, one, activation, gradient in zip(self._saes, sums, activations, gradients, strict=True):
            try:
                one.add(activation, batch, gradient)
            except NotFinite as error:
                numbers = sorted(batch.numbers.tolist())
                raise DataError(
                    f"Activations at {handle.identity.hook_name} are NaN or infinite in one of the {label} texts "
                    f"{numbers}. Load the model in bfloat16 or float32 instead of float16, or remove the text."
                ) from error

    def _check_same(self, label: str) -> None:
        assert self._earlier is not None
        if self._earlier.statistics.settings["data"].get(label) != self._counted["data"][label]:
            raise DataError(_CHANGED.format(label))

    def _finish(
        self, label: str, number: int, sums: list[ClassSums], earlier: tuple[FeatureMoments, ...] | None
    ) -> None:
        """Put down what there is of a class, in the file too."""
        found = tuple(one.finish() for one in sums)
        if earlier is not None:
            found = tuple(before + now for before, now in zip(earlier, found, strict=True))
        fresh = number > (0 if self._earlier is None else int(self._earlier.batches.get(label, 0)))
        self._moments[label], self._batches[label] = found, number
        if self._file is not None and fresh and found[0].count:
            # A class, or a share of one, in which nothing counts has no sums; nor does it cost anything to read again.
            moments = {label: found for label, found in self._moments.items() if found[0].count}
            batches = {label: self._batches[label] for label in moments}
            self._file.write(Progress(replace(self.statistics, moments=moments), batches))


_CHANGED = (
    "The {} data are not those of the run that the state is of, so its sums cannot be continued. Give the same data, "
    "or remove the state to begin anew."
)


def _length(records: Data) -> int | None:
    try:
        return len(records) if isinstance(records, Sized) and not isinstance(records, str) else None
    except TypeError:
        return None
