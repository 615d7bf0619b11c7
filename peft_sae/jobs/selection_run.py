"""Carrying a selection out, from texts to a Subspace on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, MismatchError
from ..sae.handle import SaeHandle
from ..sae.load import load_saes
from ..selection.criteria import ids_by_hook
from ..selection.registry import get_selector
from ..selection.select import Selection, select_features
from ..statistics.collect import collect_statistics
from ..statistics.gradient import log_likelihood
from ..statistics.measures import Measures
from ..statistics.model import check_same_model
from ..statistics.records import Data
from ..statistics.share import Share
from ..statistics.state import state_path
from ..statistics.statistics import STATISTICS_FILES, FeatureStatistics
from ..subspace.artifact import SUBSPACE_FILES, Subspace
from ..subspace.build import subspace_from_selection
from ..subspace.controls import control_subspace
from ..subspace.protect import find_protected, protected_ids, select_contrast
from ..writing import check_target, check_writable, discard
from .models import load_model
from .selection import MEASURES, SelectionJob

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class SelectionResult:
    """What a selection has made.

    Attributes:
        subspace: the Subspace, as it was written.
        selection: the chosen features.
        statistics: what they were chosen from.
        model: the base model.
        tokenizer: its tokenizer.
        saes: the SAEs.
        data: the texts by class; none if the statistics were there already and no texts are given.
    """

    subspace: Subspace
    selection: Selection
    statistics: FeatureStatistics
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    saes: Sequence[SaeHandle]
    data: dict[str, Data]


def run_selection(job: SelectionJob, *, progress: bool = True) -> SelectionResult:
    """Collect (or read) statistics, select features, build their basis and write the Subspace.

    Args:
        job: what to do.
        progress: show progress bars.

    Raises:
        ConfigError, DataError, ArtifactError, MismatchError, SelectionError: the job cannot be carried out. What can be
            known before the model is loaded is told before.
    """
    selector = get_selector(job.selector)
    check_target(job.output, owned=SUBSPACE_FILES)
    check_writable(job.output)
    if job.statistics is not None:
        check_target(job.statistics, owned=STATISTICS_FILES)
        check_writable(job.statistics)
    data = job.open_data()
    kept = None if job.from_statistics is None else FeatureStatistics.from_pretrained(job.from_statistics)
    device = "cpu" if job.device == "auto" else job.device
    handles = load_saes(job.saes, ids=job.ids or None, layers=job.layers or None, device=device)
    if kept is not None:
        _check_same_saes(kept, handles, job)
        _check_same_settings(kept, job, has_data=bool(data))
    protected_ids(job.protect, handles)
    ids_by_hook([*job.drop, *job.keep, *job.features], _identities(handles))
    model, tokenizer = load_model(job.model, dtype=job.dtype, device=job.device)
    collector = _Collector(job, data, model, tokenizer, handles, progress)
    guarded = find_protected(tuple(job.protect_contrast) or list(job.protect), handles, collector.protected)
    if kept is not None:
        check_same_model(kept.settings["model"], model)
    statistics = collector.statistics(selector.measures, selector.attribution) if kept is None else kept
    selection = select_features(
        statistics,
        selector=job.selector,
        top_k=job.top_k,
        criteria=job.criteria,
        retain="retain" if "retain" in statistics.moments else None,
        features=job.features,
        saes=handles,
        seed=job.seed,
    )
    subspace = subspace_from_selection(
        model,
        tokenizer,
        selection,
        handles,
        variance=job.variance,
        protect=guarded,
        protect_retained=job.retain_by == "protect",
    )
    if job.control is not None:
        subspace = control_subspace(subspace, job.control, statistics=statistics, seed=job.seed)
    if Share.of_this_process(None).rank == 0:
        subspace.save_pretrained(job.output)
    return SelectionResult(subspace, selection, statistics, model, tokenizer, handles, data)


def _check_same_saes(statistics: FeatureStatistics, handles: Sequence[SaeHandle], job: SelectionJob) -> None:
    theirs, ours = ({(sae.hook_name, sae.digest) for sae in saes} for saes in (statistics.saes, _identities(handles)))
    if not theirs <= ours:
        raise MismatchError(
            f"The statistics in '{job.from_statistics}' are of the SAEs {[sae.name for sae in statistics.saes]}, and "
            f"'{job.saes}' gives {[handle.identity.name for handle in handles]}, with other hook points or weights "
            "(digests). Give the same SAEs, or collect the statistics again."
        )


def _check_same_settings(statistics: FeatureStatistics, job: SelectionJob, *, has_data: bool) -> None:
    """Refuse what would have no effect on statistics that are there already."""
    told = {"tokens": (job.tokens, "all"), "pooling": (job.pooling, "token"), "max_length": (job.max_length, None)}
    different = {
        name: (value, statistics.settings.get(name))
        for name, (value, default) in told.items()
        if value not in (default, statistics.settings.get(name))
    }
    if different:
        raise ConfigError(
            f"{different} (asked for, collected with) cannot be changed in the statistics in '{job.from_statistics}'. "
            "Collect them again, or leave these options out."
        )
    if job.measures or (job.texts and not (has_data and statistics.has_texts)):
        raise ConfigError(
            f"measures={list(job.measures)} and texts={job.texts} are about collecting, and the statistics in "
            f"'{job.from_statistics}' are collected{'' if statistics.has_texts else ', without texts'}. Leave them "
            "out; texts that statistics name are shown if the data are given beside them."
        )


def _identities(handles: Sequence[SaeHandle]) -> list[Any]:
    return [handle.identity for handle in handles]


class _Collector:
    """Runs the model over the job's texts."""

    def __init__(
        self,
        job: SelectionJob,
        data: dict[str, Data],
        model: Any,
        tokenizer: Any,
        handles: Sequence[SaeHandle],
        progress: bool,
    ) -> None:
        self._job, self._data, self._model, self._tokenizer = job, data, model, tokenizer
        self._handles, self._progress = handles, progress

    def statistics(self, measures: Measures, attribution: bool) -> FeatureStatistics:
        """Collect, and write if that is asked for; the state of a killed run is used up then."""
        job = self._job
        wanted = Measures(top_examples=job.texts, covariance=job.control == "difference_pca")
        for name in job.measures:
            wanted |= MEASURES[name]
        state = None if job.statistics is None else Path(f"{job.statistics}.state")
        found = self._collect(self._data, measures | wanted, attribution, state)
        if job.statistics is not None and state is not None:
            share = Share.of_this_process(None)
            if share.rank == 0:
                found.save_pretrained(job.statistics)
            discard(state_path(state, share))
        return found

    def protected(self, first: Data, second: Data) -> Selection:
        """Select the features in which two sets differ most."""
        pair = {"aligned": str(first), "unaligned": str(second)}
        collected = self._collect(pair, Measures(), False, None)
        return select_contrast(collected, self._job.protect_top_k, self._job.protect_max_q)

    def _collect(
        self, data: dict[str, Data] | dict[str, str], measures: Measures, attribution: bool, state: Path | None
    ) -> FeatureStatistics:
        job = self._job
        return collect_statistics(
            self._model,
            self._tokenizer,
            data,
            self._handles,
            tokens=job.tokens,
            pooling=job.pooling,
            measures=measures,
            attribute=log_likelihood if attribution else None,
            batch_size=job.batch_size,
            max_length=job.max_length,
            state=state,
            progress=self._progress,
        )
