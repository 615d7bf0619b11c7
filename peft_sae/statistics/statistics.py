"""The statistics of features, and their file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..artifact import digest, package_versions, read_json, read_tensors, write_json, write_tensors
from ..errors import ArtifactError, DataError, MismatchError
from ..sae.identity import SaeIdentity
from ..writing import replace_folder
from .moments import FeatureMoments
from .sense import problems_of

SCHEMA = "peft_sae.statistics"
SCHEMA_VERSION = 1
_JSON_FILE = "statistics.json"
_TENSOR_FILE = "statistics.safetensors"
STATISTICS_FILES = (_JSON_FILE, _TENSOR_FILE)
_MAX_SIZE = 2**31  # of any tensor in the file: such numbers are damage
# What is counted per class, and so adds up over shards.
_COUNTED = ("examples", "truncated")


@dataclass(frozen=True, repr=False)
class FeatureStatistics:
    """What each feature of each SAE does on each class of text.

    Attributes:
        saes: the SAEs, in order.
        moments: class label to one `FeatureMoments` per SAE, in the same order.
        settings: how the statistics were collected (model, tokens, pooling, quantity, and per class the number of
            examples, of truncated ones, and a digest of the token ids).
        versions: versions of the packages that computed them.
    """

    saes: tuple[SaeIdentity, ...]
    moments: Mapping[str, tuple[FeatureMoments, ...]]
    settings: Mapping[str, Any]
    versions: Mapping[str, str] = field(default_factory=package_versions)

    def __repr__(self) -> str:
        saes = ", ".join(f"{sae.hook_name} ({sae.d_sae} features)" for sae in self.saes)
        counts = ", ".join(f"{label}: {one[0].count} observations" for label, one in self.moments.items() if one)
        return f"FeatureStatistics({saes}; {counts})"

    @property
    def has_texts(self) -> bool:
        """Whether the texts that activate a feature most are known."""
        return any(one.top is not None for moments in self.moments.values() for one in moments)

    def of(self, label: str) -> tuple[FeatureMoments, ...]:
        """Return the moments of one class, one per SAE.

        Raises:
            DataError: there is no such class.
        """
        if label not in self.moments:
            raise DataError(
                f"The statistics have no class {label!r}, so it cannot be compared. They have {sorted(self.moments)}; "
                "collect them with data={'aligned': ..., 'unaligned': ...} or name the classes to compare."
            )
        return self.moments[label]

    def merge(self, *others: FeatureStatistics) -> FeatureStatistics:
        """Return the statistics of several shards of data together.

        Sums are added, so the result is that of one pass over all shards, to rounding in float64. An example's place is
        counted on through the shards in their order. Parts that one of them lacks (histograms, for instance) are left
        out of the class.

        Raises:
            MismatchError: they are of different SAEs, of another model, or were collected with other settings.
        """
        merged = self
        for other in others:
            merged = _merge(merged, other, shift=True)
        return merged

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the statistics as a folder of JSON and safetensors.

        Raises:
            ArtifactError: the folder holds something else or cannot be written.
        """
        tensors, description = self.to_tensors()
        with replace_folder(directory, owned=STATISTICS_FILES) as folder:
            write_tensors(folder / _TENSOR_FILE, tensors)
            write_json(folder / _JSON_FILE, {**description, "digest": digest(tensors, description)})

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> FeatureStatistics:
        """Read statistics written by `save_pretrained`.

        Raises:
            ArtifactError: a file is missing, damaged, of a newer schema, or lacks a tensor, or the content has not the
                digest that was written with it.
        """
        folder = Path(directory)
        description = read_json(folder / _JSON_FILE, schema=SCHEMA, newest=SCHEMA_VERSION)
        return cls.from_description(description, folder / _TENSOR_FILE, folder / _JSON_FILE, complete=True)

    def to_tensors(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Return everything as named tensors and JSON-serialisable data."""
        tensors = {
            f"{number}.{index}.{name}": tensor
            for number, moments in enumerate(self.moments.values())
            for index, moment in enumerate(moments)
            for name, tensor in moment.tensors().items()
        }
        description = {
            "schema": SCHEMA,
            "schema_version": SCHEMA_VERSION,
            "saes": [sae.to_dict() for sae in self.saes],
            "labels": list(self.moments),
            "sizes": {label: [moment.sizes() for moment in moments] for label, moments in self.moments.items()},
            "settings": dict(self.settings),
            "versions": dict(self.versions),
        }
        return tensors, description

    @classmethod
    def from_description(
        cls, description: Mapping[str, Any], tensor_file: Path, source: Path, *, complete: bool
    ) -> FeatureStatistics:
        """Read the tensors that a description tells of, and check that both belong together.

        Args:
            description: as from `to_tensors`, with the `digest` of both.
            tensor_file: the safetensors file.
            source: the file that the description is from, for messages.
            complete: they are of all the data, not of a part so far.

        Raises:
            ArtifactError: either is damaged, or they are not of one piece.
        """
        try:
            saes = [SaeIdentity.from_dict(entry) for entry in description["saes"]]
            labels = [str(label) for label in description["labels"]]
            sizes = [[_checked(entry) for entry in description["sizes"][label]] for label in labels]
            if any(len(entries) != len(saes) for entries in sizes) or len(set(labels)) < len(labels):
                raise ValueError("classes and SAEs do not fit each other")
            expected = {
                f"{number}.{index}.{name}": header
                for number, entries in enumerate(sizes)
                for index, (entry, sae) in enumerate(zip(entries, saes, strict=True))
                for name, header in FeatureMoments.layout(entry, sae.d_sae, _width_in(sae)).items()
            }
            statistics = cls.from_tensors(read_tensors(tensor_file, expected), description)
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError, IndexError, RuntimeError) as error:
            if isinstance(error, ArtifactError):
                raise
            raise ArtifactError(f"'{source}' is malformed ({error!r}). Collect the statistics again.") from error
        problems = problems_of(statistics, complete=complete)
        if problems:
            raise ArtifactError(f"'{source}' makes no sense: {'; '.join(problems)}. Collect the statistics again.")
        if digest(*statistics.to_tensors()) != description.get("digest"):
            raise ArtifactError(
                f"The content of '{tensor_file.parent}' has not the digest that was written with it: a file was "
                "changed or mixed up. Collect the statistics again."
            )
        return statistics

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor], description: Mapping[str, Any]) -> FeatureStatistics:
        """Return what `to_tensors` was given from.

        Raises:
            KeyError, TypeError, ValueError: they do not fit each other.
        """
        moments: dict[str, tuple[FeatureMoments, ...]] = {}
        for number, label in enumerate(description["labels"]):
            found = []
            for index, entry in enumerate(description["sizes"][label]):
                prefix = f"{number}.{index}."
                own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
                found.append(FeatureMoments.from_tensors(own, entry))
            moments[str(label)] = tuple(found)
        saes = tuple(SaeIdentity.from_dict(entry) for entry in description["saes"])
        return cls(saes, moments, dict(description["settings"]), dict(description["versions"]))


def merge_shares(shares: Sequence[FeatureStatistics]) -> FeatureStatistics:
    """Return the statistics of one data set that several processes have read in turn."""
    merged = shares[0]
    for share in shares[1:]:
        merged = _merge(merged, share, shift=False)
    return merged


def _merge(first: FeatureStatistics, second: FeatureStatistics, *, shift: bool) -> FeatureStatistics:
    _check_mergeable(first, second)
    moments = {}
    for label in dict.fromkeys([*first.moments, *second.moments]):
        if label not in first.moments or label not in second.moments:
            moments[label] = (first.moments if label in first.moments else second.moments)[label]
            continue
        by = int(first.settings["examples"][label]) if shift else 0
        pairs = zip(first.moments[label], second.moments[label], strict=True)
        moments[label] = tuple(one + (other.shifted(by) if by else other) for one, other in pairs)
    settings = dict(first.settings)
    for name in _COUNTED:
        settings[name] = _sum(first.settings.get(name, {}), second.settings.get(name, {}))
    digests = [statistics.settings.get("data", {}) for statistics in (first, second)]
    settings["data"] = {
        label: add_digests(*(found[label] for found in digests if label in found))
        for label in {**digests[0], **digests[1]}
    }
    return FeatureStatistics(first.saes, moments, settings, first.versions)


def _check_mergeable(first: FeatureStatistics, second: FeatureStatistics) -> None:
    if first.saes != second.saes:
        both = [[sae.name for sae in statistics.saes] for statistics in (first, second)]
        raise MismatchError(
            f"Statistics of the SAEs {both[0]} and of {both[1]} cannot be merged: their features (or weights) differ. "
            "Merge statistics that were collected with the same SAEs in the same order."
        )
    ours, theirs = (dict(statistics.settings) for statistics in (first, second))
    names = sorted({*ours, *theirs} - {*_COUNTED, "data"})
    different = {name: (ours.get(name), theirs.get(name)) for name in names if ours.get(name) != theirs.get(name)}
    if different:
        raise MismatchError(
            f"Statistics that were collected with different settings cannot be merged: {different}. Collect both in "
            "the same way."
        )


def _width_in(sae: SaeIdentity) -> int | None:
    """Width of what an SAE reads; None for a transcoder, whose identity tells the width of what it writes."""
    return sae.d_in if sae.hook_name_in is None else None


def _sum(first: Mapping[str, int], second: Mapping[str, int]) -> dict[str, int]:
    return {label: first.get(label, 0) + second.get(label, 0) for label in {**first, **second}}


def add_digests(*digests: str) -> str:
    """Return the digest of several sets of texts together, which does not depend on their order."""
    return f"{sum(int(entry, 16) for entry in digests) % 2**256:064x}"


def _checked(sizes: Mapping[str, Any]) -> Mapping[str, Any]:
    """Sizes of one class and SAE from a file, after a check that they are numbers that can be."""
    numbers = [sizes["count"], sizes["examples"], sizes["count_squares"]]
    parts = [number for part in sizes["parts"].values() for number in part.values()]
    if any(type(n) is not int or not 0 <= n < 2**62 for n in [*numbers, *parts]) or min(numbers[:2]) < 1:
        raise ValueError(f"impossible counts {dict(sizes)}")
    if any(number > _MAX_SIZE for part in sizes["parts"].values() for number in part.values()):
        raise ValueError("impossible sizes")
    return sizes
