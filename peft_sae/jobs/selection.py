"""A selection described by a YAML file or by options of the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import ConfigError
from ..selection.criteria import Criteria
from ..statistics.measures import Measures
from ..statistics.records import Data, split_preferences
from ..subspace.controls import CONTROLS
from .data import open_data
from .fields import read_fields

MEASURES = {
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
        aligned: texts to move towards: a file or a data set of the Hub, see `open_data`.
        unaligned: texts to move away from.
        preferences: instead of both, records with `chosen` and `rejected`.
        from_statistics: folder of statistics of an earlier run: the model is not run again. Texts beside it are only
            read for those that the statistics name as most active.
        statistics: folder that the statistics are written to. While they are collected their state is beside it, and a
            killed run goes on from there.
        retain: texts whose features are to be left alone.
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
    aligned: str | Mapping[str, Any] | None = None
    unaligned: str | Mapping[str, Any] | None = None
    preferences: str | Mapping[str, Any] | None = None
    from_statistics: str | None = None
    statistics: str | None = None
    retain: str | Mapping[str, Any] | None = None
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
        unknown = sorted(set(self.measures) - set(MEASURES))
        if unknown:
            raise ConfigError(f"measures={unknown} are unknown. Choose among {sorted(MEASURES)}.")
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

    def open_data(self) -> dict[str, Data]:
        """Return the texts by class; none if there are only statistics.

        Raises:
            DataError: a file or a data set cannot be read.
        """
        found: dict[str, Data] = {}
        if self.preferences is not None:
            found["aligned"], found["unaligned"] = split_preferences(open_data(self.preferences, "preference"))
        for name in ("aligned", "unaligned", "retain"):
            source = getattr(self, name)
            if source is not None:
                found[name] = open_data(source, name)
        return found


def read_selection(path: str | Path | None, **overrides: Any) -> SelectionJob:
    """Read a selection from YAML, and check every key before anything is loaded.

    Args:
        path: the YAML file, or None for what is given here alone.
        **overrides: values that take the place of the file's; those that are None do not.

    Raises:
        ConfigError: the file cannot be read, a key is unknown or missing, or a value has the wrong type.
    """
    return SelectionJob(**read_fields(SelectionJob, path, overrides))
