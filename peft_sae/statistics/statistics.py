"""The statistics of features, and their file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..artifact import digest, package_versions, read_json, read_tensors, replace_folder, write_json, write_tensors
from ..errors import ArtifactError, DataError
from ..sae.identity import SaeIdentity

_SCHEMA = "peft_sae.statistics"
_SCHEMA_VERSION = 1
_JSON_FILE = "statistics.json"
_TENSOR_FILE = "statistics.safetensors"
STATISTICS_FILES = (_JSON_FILE, _TENSOR_FILE)
_DTYPES = {
    "total": torch.float64,
    "total_squares": torch.float64,
    "fired": torch.int64,
    "maximum": torch.float64,
}


@dataclass(frozen=True)
class FeatureMoments:
    """Sums over the tokens of one class, for the features of one SAE.

    Attributes:
        count: number of tokens.
        total: sum of activations, float64 [d_sae].
        total_squares: sum of squared activations, float64 [d_sae].
        fired: number of tokens with an activation above zero, int64 [d_sae].
        maximum: largest activation, float64 [d_sae]; 0 where the feature never fired.
    """

    count: int
    total: torch.Tensor
    total_squares: torch.Tensor
    fired: torch.Tensor
    maximum: torch.Tensor

    @classmethod
    def empty(cls, d_sae: int) -> FeatureMoments:
        """Return the moments of no tokens."""
        return cls(count=0, **{name: torch.zeros(d_sae, dtype=dtype) for name, dtype in _DTYPES.items()})

    @classmethod
    def of(cls, activations: torch.Tensor) -> FeatureMoments:
        """Return the moments of activations of shape [tokens, d_sae]."""
        single = activations.float()
        return cls(
            count=activations.shape[0],
            total=single.sum(dim=0).double().cpu(),
            total_squares=single.square().sum(dim=0).double().cpu(),
            fired=(single > 0).sum(dim=0).cpu(),
            maximum=single.amax(dim=0).clamp(min=0).double().cpu(),
        )

    def __add__(self, other: FeatureMoments) -> FeatureMoments:
        """Return the moments of both sets of tokens together."""
        return FeatureMoments(
            count=self.count + other.count,
            total=self.total + other.total,
            total_squares=self.total_squares + other.total_squares,
            fired=self.fired + other.fired,
            maximum=torch.maximum(self.maximum, other.maximum),
        )

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
        """Share of tokens on which each feature fires, float64 [d_sae]."""
        return self.fired.double() / self.count


@dataclass(frozen=True)
class FeatureStatistics:
    """What each feature of each SAE does on each class of text.

    Attributes:
        saes: the SAEs, in order.
        moments: class label to one `FeatureMoments` per SAE, in the same order.
        settings: how the statistics were collected (model, tokens, examples, truncated texts).
        versions: versions of the packages that computed them.
    """

    saes: tuple[SaeIdentity, ...]
    moments: Mapping[str, tuple[FeatureMoments, ...]]
    settings: Mapping[str, Any]
    versions: Mapping[str, str] = field(default_factory=package_versions)

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

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the statistics as a folder of JSON and safetensors.

        Raises:
            ArtifactError: the folder holds something else or cannot be written.
        """
        tensors, description = self._tensors(), self._description()
        with replace_folder(directory, owned=STATISTICS_FILES) as folder:
            write_tensors(folder / _TENSOR_FILE, tensors)
            write_json(folder / _JSON_FILE, {**description, "digest": digest(tensors, description)})

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {
            f"{number}.{index}.{name}": getattr(moment, name)
            for number, moments in enumerate(self.moments.values())
            for index, moment in enumerate(moments)
            for name in _DTYPES
        }

    def _description(self) -> dict[str, Any]:
        return {
            "schema": _SCHEMA,
            "schema_version": _SCHEMA_VERSION,
            "saes": [sae.to_dict() for sae in self.saes],
            "labels": list(self.moments),
            "counts": {label: [moment.count for moment in moments] for label, moments in self.moments.items()},
            "settings": dict(self.settings),
            "versions": dict(self.versions),
        }

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> FeatureStatistics:
        """Read statistics written by `save_pretrained`.

        Raises:
            ArtifactError: a file is missing, damaged, of a newer schema, or lacks a tensor, or the content has not the
                digest that was written with it.
        """
        folder = Path(directory)
        description = read_json(folder / _JSON_FILE, schema=_SCHEMA, newest=_SCHEMA_VERSION)
        try:
            saes = tuple(SaeIdentity.from_dict(entry) for entry in description["saes"])
            labels = [str(label) for label in description["labels"]]
            counts = {label: [int(count) for count in description["counts"][label]] for label in labels}
            settings, versions = dict(description["settings"]), dict(description["versions"])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            if isinstance(error, ArtifactError):
                raise
            raise ArtifactError(
                f"'{folder / _JSON_FILE}' is malformed ({error!r}). Collect the statistics again."
            ) from error
        if any(len(counts[label]) != len(saes) or min(counts[label], default=0) < 1 for label in labels):
            raise ArtifactError(f"'{folder / _JSON_FILE}' gives impossible counts. Collect the statistics again.")
        expected = {
            f"{number}.{index}.{name}": ((sae.d_sae,), dtype)
            for number in range(len(labels))
            for index, sae in enumerate(saes)
            for name, dtype in _DTYPES.items()
        }
        tensors = read_tensors(folder / _TENSOR_FILE, expected)
        moments = {
            label: tuple(
                FeatureMoments(
                    count=counts[label][index], **{name: tensors[f"{number}.{index}.{name}"] for name in _DTYPES}
                )
                for index in range(len(saes))
            )
            for number, label in enumerate(labels)
        }
        statistics = cls(saes=saes, moments=moments, settings=settings, versions=versions)
        if digest(tensors, statistics._description()) != description.get("digest"):
            raise ArtifactError(
                f"The content of '{folder}' has not the digest that was written with it: a file was changed or mixed "
                "up. Collect the statistics again."
            )
        return statistics
