"""A selection described by a YAML file or by options of the command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..artifact import check_target, check_writable
from ..errors import ConfigError, MismatchError
from ..sae.handle import SaeHandle
from ..sae.load import load_saes
from ..selection.criteria import Criteria, ids_by_hook
from ..selection.registry import get_selector
from ..selection.select import Selection, select_features
from ..statistics.collect import collect_statistics
from ..statistics.gradient import log_likelihood
from ..statistics.measures import Measures
from ..statistics.model import check_same_model
from ..statistics.records import Data, check_data, split_preferences
from ..statistics.statistics import STATISTICS_FILES, FeatureStatistics
from ..subspace.artifact import SUBSPACE_FILES, Subspace
from ..subspace.build import subspace_from_selection
from ..subspace.controls import CONTROLS, control_subspace
from ..subspace.protect import find_protected, protected_ids, select_contrast
from .fields import read_fields
from .job import load_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


_MEASURES = {
    "histograms": Measures(histograms=True),
    "sample": Measures(sample=2000),
    "covariance": Measures(covariance=True),
}


@dataclass(frozen=True)
class SelectionJob:
    """What `peft-sae select` does. Every field is an option of the command and a key of the YAML file.

    Attributes:
        model: folder or Hub id of the base model.
        saes: sae-lens release, or folder of SAEs.
        output: folder that the Subspace is written to.
        ids: SAEs of the release.
        layers: blocks, instead of `ids`.
        aligned: JSONL file of texts to move towards.
        unaligned: JSONL file of texts to move away from.
        preferences: instead of both, JSONL file of records with `chosen` and `rejected`.
        from_statistics: folder of statistics of an earlier run: the model is not run again. Texts beside it are only
            read for those that the statistics name as most active.
        statistics: folder that the statistics are written to. While they are collected their state is beside it, and a
            killed run goes on from there.
        retain: JSONL file of texts whose features are to be left alone.
        retain_by: `exclude` or `protect`, see `build_subspace`.
        retain_ratio: see `Criteria`.
        selector: how features are scored.
        top_k: features per SAE.
        variance: share of variance that the basis keeps.
        features: names of features, for the selector `explicit`.
        direction, min_firing_rate, max_firing_rate, max_cosine, max_q: see `Criteria`.
        drop: names of features never to choose.
        keep: names of features to choose first, whatever their score.
        protect: names of features that the update must not use.
        protect_contrast: two JSONL files that differ only in what the update is to ignore.
        protect_top_k: features per SAE that the contrast protects, at most.
        protect_max_q: of those, only features with a q-value up to this; None protects them whatever the evidence.
        tokens: tokens that count.
        pooling: what one observation is.
        batch_size: texts per forward pass.
        max_length: tokens per text; longer ones are cut.
        measures: more to keep in the statistics, for later selections: `histograms`, `sample`, `covariance`.
        texts: texts to remember per feature and class, those that activate it most.
        control: write a basis without an SAE instead, of the same ranks, see `control_subspace`.
        dtype: dtype that the model is loaded in; by default as stored.
        device: device for model and SAEs; `auto` spreads the model over all.
        seed: for what is random.
    """

    model: str
    saes: str
    output: str
    ids: Sequence[str] = ()
    layers: Sequence[int] = ()
    aligned: str | None = None
    unaligned: str | None = None
    preferences: str | None = None
    from_statistics: str | None = None
    statistics: str | None = None
    retain: str | None = None
    retain_by: Literal["exclude", "protect"] = "exclude"
    retain_ratio: float = 0.5
    selector: str = "mean_difference"
    top_k: int = 64
    variance: float = 0.8
    features: Sequence[str] = ()
    direction: Literal["both", "aligned", "unaligned"] = "both"
    min_firing_rate: float = 0.0
    max_firing_rate: float = 1.0
    max_cosine: float | None = None
    max_q: float | None = None
    drop: Sequence[str] = ()
    keep: Sequence[str] = ()
    protect: Sequence[str] = ()
    protect_contrast: Sequence[str] = ()
    protect_top_k: int = 16
    protect_max_q: float | None = None
    tokens: Literal["all", "prompt", "response", "assistant"] = "all"
    pooling: Literal["token", "mean", "max", "last"] = "token"
    batch_size: int = 8
    max_length: int | None = None
    measures: Sequence[str] = ()
    texts: int = 0
    control: Literal["random", "neurons", "difference_pca", "mean_difference"] | None = None
    dtype: str | None = None
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.protect and self.protect_contrast:
            raise ConfigError("--protect and --protect-contrast both say what is protected. Use one of the two.")
        if len(self.protect_contrast) not in (0, 2):
            raise ConfigError(f"protect_contrast={list(self.protect_contrast)} is no pair of files. Give two.")
        pair = self.aligned is not None and self.unaligned is not None
        sets = pair + (self.preferences is not None)
        half = not pair and (self.aligned is not None or self.unaligned is not None)
        if half or sets > 1 or (sets == 0 and self.from_statistics is None):
            raise ConfigError(
                "It takes two sets of text: --aligned with --unaligned, or --preferences; or --from-statistics. Given "
                f"are aligned={self.aligned!r}, unaligned={self.unaligned!r}, preferences={self.preferences!r}, "
                f"from_statistics={self.from_statistics!r}."
            )
        if self.from_statistics is not None and (self.retain or self.statistics):
            raise ConfigError(
                "--from-statistics reads what an earlier run has collected, so --retain and --statistics have no place "
                "beside it. A class 'retain' in the statistics is used as it was then."
            )
        if self.control is not None and self.control not in CONTROLS:
            raise ConfigError(f"control={self.control!r} is unknown. Choose one of {CONTROLS}.")
        if self.top_k < 1:
            raise ConfigError(f"top_k={self.top_k} selects nothing. Use 1 or more.")
        if bool(self.features) != (self.selector == "explicit"):
            raise ConfigError(
                f"features={list(self.features)} and selector={self.selector!r} do not go together: name features for "
                "the selector 'explicit', and for no other; `keep` chooses some beside it."
            )
        if self.statistics is not None:
            output, statistics = Path(self.output).absolute(), Path(self.statistics).absolute()
            if output == statistics or output in statistics.parents or statistics in output.parents:
                raise ConfigError(
                    f"output={self.output!r} and statistics={self.statistics!r} lie in one another, and each takes a "
                    "folder of its own. Give two folders."
                )
        unknown = sorted(set(self.measures) - set(_MEASURES))
        if unknown:
            raise ConfigError(f"measures={unknown} are unknown. Choose among {sorted(_MEASURES)}.")
        self.criteria  # noqa: B018  (for its checks)

    @property
    def criteria(self) -> Criteria:
        """What a feature must fulfil beside a good score."""
        return Criteria(
            direction=self.direction,
            min_firing_rate=self.min_firing_rate,
            max_firing_rate=self.max_firing_rate,
            max_cosine=self.max_cosine,
            max_q=self.max_q,
            exclude=tuple(self.drop),
            keep=tuple(self.keep),
            retain_ratio=self.retain_ratio,
        )

    @property
    def data(self) -> dict[str, Data]:
        """The texts by class; none if there are only statistics."""
        if self.preferences is not None:
            aligned, unaligned = split_preferences(self.preferences)
            found: dict[str, Data] = {"aligned": aligned, "unaligned": unaligned}
        else:
            found = {name: text for name in ("aligned", "unaligned") if (text := getattr(self, name)) is not None}
        return found | ({} if self.retain is None else {"retain": self.retain})


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
    """

    subspace: Subspace
    selection: Selection
    statistics: FeatureStatistics
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    saes: Sequence[SaeHandle]


def read_selection(path: str | Path | None, **overrides: Any) -> SelectionJob:
    """Read a selection from YAML, and check every key before anything is loaded.

    Args:
        path: the YAML file, or None for what is given here alone.
        **overrides: values that take the place of the file's; those that are None do not.

    Raises:
        ConfigError: the file cannot be read, a key is unknown or missing, or a value has the wrong type.
    """
    return SelectionJob(**read_fields(SelectionJob, path, overrides))


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
    files = dict(job.data)
    if job.preferences is not None:
        files |= {"preference": job.preferences}
    for label, data in files.items():
        check_data(data, label)
    kept = None if job.from_statistics is None else FeatureStatistics.from_pretrained(job.from_statistics)
    device = "cpu" if job.device == "auto" else job.device
    handles = load_saes(job.saes, ids=job.ids or None, layers=job.layers or None, device=device)
    if kept is not None:
        _check_same_saes(kept, handles, job)
        _check_same_settings(kept, job)
    protected_ids(job.protect, handles)
    ids_by_hook([*job.drop, *job.keep, *job.features], _identities(handles))
    model, tokenizer = load_model(job.model, dtype=job.dtype, device=job.device)
    collector = _Collector(job, model, tokenizer, handles, progress)
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
    subspace.save_pretrained(job.output)
    return SelectionResult(subspace, selection, statistics, model, tokenizer, handles)


def _check_same_saes(statistics: FeatureStatistics, handles: Sequence[SaeHandle], job: SelectionJob) -> None:
    theirs, ours = ({(sae.hook_name, sae.digest) for sae in saes} for saes in (statistics.saes, _identities(handles)))
    if not theirs <= ours:
        raise MismatchError(
            f"The statistics in '{job.from_statistics}' are of the SAEs {[sae.name for sae in statistics.saes]}, and "
            f"'{job.saes}' gives {[handle.identity.name for handle in handles]}, with other hook points or weights "
            "(digests). Give the same SAEs, or collect the statistics again."
        )


def _check_same_settings(statistics: FeatureStatistics, job: SelectionJob) -> None:
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
    if job.measures or (job.texts and not (job.data and statistics.has_texts)):
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
        self, job: SelectionJob, model: Any, tokenizer: Any, handles: Sequence[SaeHandle], progress: bool
    ) -> None:
        self._job, self._model, self._tokenizer = job, model, tokenizer
        self._handles, self._progress = handles, progress

    def statistics(self, measures: Measures, attribution: bool) -> FeatureStatistics:
        """Collect, and write if that is asked for; the state of a killed run is used up then."""
        job = self._job
        wanted = Measures(top_examples=job.texts, covariance=job.control == "difference_pca")
        for name in job.measures:
            wanted |= _MEASURES[name]
        state = None if job.statistics is None else Path(f"{job.statistics}.state")
        found = self._collect(job.data, measures | wanted, attribution, state)
        if job.statistics is not None and state is not None:
            found.save_pretrained(job.statistics)
            state.unlink(missing_ok=True)
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
