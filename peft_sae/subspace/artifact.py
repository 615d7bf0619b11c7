"""The Subspace: everything that an adapter is built from, as one value and one folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..artifact import digest, package_versions, read_json, read_tensors, write_json, write_tensors
from ..errors import ArtifactError
from ..layout import BlockLayout
from ..sae.identity import SaeIdentity
from ..writing import replace_folder
from .protected import ProtectedSite, feature_name
from .sense import check_sense
from .site import SubspaceSite
from .source import JSON_FILE, TENSOR_FILE, find_folder

if TYPE_CHECKING:
    import pandas as pd

SUBSPACE_FILES = (JSON_FILE, TENSOR_FILE)
_SCHEMA = "peft_sae.subspace"
_SCHEMA_VERSION = 1
_MAX_FEATURES = 2**20  # more chosen features than any SAE has: such a file is damaged
_MAX_WIDTH = 2**20


@dataclass(frozen=True, eq=False, repr=False)
class Subspace:
    """Orthonormal bases of chosen SAE features, one per hook point, and features that an update must not use.

    Attributes:
        sites: the bases, in the order of their blocks; none for LoRA that only keeps away from protected features.
        layout: what the modules of the model's blocks read and write.
        model: description of the model (name, model_type, hidden_size, num_hidden_layers).
        settings: selector, its options, tau, and how the statistics were collected.
        versions: versions of the packages that built it.
        protected: the protected features, in the order of their blocks.
    """

    sites: tuple[SubspaceSite, ...]
    layout: BlockLayout
    model: Mapping[str, Any]
    settings: Mapping[str, Any]
    versions: Mapping[str, str] = field(default_factory=package_versions)
    protected: tuple[ProtectedSite, ...] = ()

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the content, as 64 hexadecimal digits."""
        return digest(self._tensors(), self._description())

    @property
    def features(self) -> pd.DataFrame:
        """One row per chosen feature, best first within each hook point.

        Columns: `block`, `hook_name`, `sae`, `rank` (place in the selection, from 1), `feature`, `score`,
        `q_value`, `aligned_mean`, `unaligned_mean`, `aligned_rate`, `unaligned_rate` (shares of tokens on which it
        fires), `tokens` (those that the decoder direction promotes most),
        `weight` (share of the feature's direction that lies in the basis, its squared projection) and
        `neuronpedia` (address of its dashboard or None).
        """
        import pandas as pd

        rows = []
        for site in self.sites:
            weights = (site.directions @ site.basis.T).square().sum(dim=1).tolist()
            for place, feature in enumerate(site.features.tolist()):
                rows.append(
                    {
                        "block": site.sae.site.block,
                        "hook_name": site.sae.hook_name,
                        "sae": site.sae.name,
                        "rank": place + 1,
                        "feature": feature,
                        "score": float(site.scores[place]),
                        "q_value": float(site.q_values[place]),
                        "aligned_mean": float(site.aligned_means[place]),
                        "unaligned_mean": float(site.unaligned_means[place]),
                        "aligned_rate": float(site.aligned_rates[place]),
                        "unaligned_rate": float(site.unaligned_rates[place]),
                        "tokens": list(site.tokens[place]),
                        "weight": weights[place],
                        "neuronpedia": site.sae.neuronpedia_url(feature),
                    }
                )
        return pd.DataFrame(rows)

    @property
    def protected_features(self) -> pd.DataFrame:
        """One row per protected feature: `block`, `hook_name`, `sae`, `feature`, `name`, `tokens`, `neuronpedia`."""
        import pandas as pd

        columns = ["block", "hook_name", "sae", "feature", "name", "tokens", "neuronpedia"]
        rows = [
            (
                site.sae.site.block,
                site.sae.hook_name,
                site.sae.name,
                feature,
                feature_name(site.sae, feature),
                list(tokens),
                site.sae.neuronpedia_url(feature),
            )
            for site in self.protected
            for feature, tokens in zip(site.features.tolist(), site.tokens, strict=True)
        ]
        return pd.DataFrame(rows, columns=columns)

    def __repr__(self) -> str:
        parts = [f"{site.sae.hook_name}: {len(site.features)} features, rank {site.rank}" for site in self.sites]
        parts += [f"{site.sae.hook_name}: {len(site.features)} features protected" for site in self.protected]
        return f"Subspace({', '.join(parts)})"

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the Subspace as a folder of JSON and safetensors, whole or not at all.

        Raises:
            ArtifactError: the folder holds something else or cannot be written.
        """
        with replace_folder(directory, owned=SUBSPACE_FILES) as folder:
            write_tensors(folder / TENSOR_FILE, self._tensors())
            write_json(folder / JSON_FILE, {**self._description(), "digest": self.digest})

    @classmethod
    def from_pretrained(cls, path_or_id: str | Path) -> Subspace:
        """Read a Subspace from a folder, from an adapter's folder, or from the Hugging Face Hub.

        Args:
            path_or_id: a folder written by `save_pretrained`, an adapter's folder (which has its
                Subspace in the sub-folder `subspace`), or the id of a Hub repository of either kind.

        Raises:
            ArtifactError: it is not there, or a file is truncated, of a newer schema, or lacks a
                tensor, or the content does not have the digest that was written with it.
        """
        folder = find_folder(path_or_id)
        description = read_json(folder / JSON_FILE, schema=_SCHEMA, newest=_SCHEMA_VERSION)
        try:
            subspace = _from_description(description, folder / TENSOR_FILE)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            if isinstance(error, ArtifactError):
                raise
            raise ArtifactError(
                f"'{folder / JSON_FILE}' is malformed ({error!r}). Build the Subspace again."
            ) from error
        if subspace.digest != description.get("digest"):
            raise ArtifactError(
                f"The content of '{folder}' has the digest {subspace.digest[:12]}..., and "
                f"{str(description.get('digest'))[:12]}... was written with it: a file was changed or mixed up. Copy "
                "or build the Subspace again."
            )
        check_sense(subspace)
        return subspace

    def _tensors(self) -> dict[str, torch.Tensor]:
        tensors = {
            f"{index}.{name}": getattr(site, name).to(dtype)
            for index, site in enumerate(self.sites)
            for name, (_, dtype) in _site_tensors(site.rank, len(site.features), site.sae.d_in).items()
        }
        for index, site in enumerate(self.protected):
            for name, (_, dtype) in _protected_tensors(len(site.features), site.sae.d_in).items():
                tensors[f"protected.{index}.{name}"] = getattr(site, name).to(dtype)
        return tensors

    def _description(self) -> dict[str, Any]:
        return {
            "schema": _SCHEMA,
            "schema_version": _SCHEMA_VERSION,
            "sites": [
                {
                    "sae": site.sae.to_dict(),
                    "rank": site.rank,
                    "features": len(site.features),
                    "tokens": [list(tokens) for tokens in site.tokens],
                }
                for site in self.sites
            ],
            "protected": [
                {
                    "sae": site.sae.to_dict(),
                    "features": len(site.features),
                    "tokens": [list(tokens) for tokens in site.tokens],
                }
                for site in self.protected
            ],
            "layout": self.layout.to_dict(),
            "model": dict(self.model),
            "settings": dict(self.settings),
            "versions": dict(self.versions),
        }


def _site_tensors(rank: int, features: int, width: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every tensor of one site."""
    return {
        "features": ((features,), torch.int64),
        "scores": ((features,), torch.float64),
        "q_values": ((features,), torch.float64),
        "aligned_means": ((features,), torch.float64),
        "unaligned_means": ((features,), torch.float64),
        "aligned_rates": ((features,), torch.float64),
        "unaligned_rates": ((features,), torch.float64),
        "directions": ((features, width), torch.float32),
        "basis": ((rank, width), torch.float32),
        "coefficients": ((rank, features), torch.float32),
    }


def _protected_tensors(features: int, width: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every tensor of one protected site."""
    return {"features": ((features,), torch.int64), "directions": ((features, width), torch.float32)}


def _read_entry(entry: Mapping[str, Any], place: str) -> tuple[SaeIdentity, tuple[tuple[str, ...], ...]]:
    """The SAE of a site and the tokens of its features, after a check of the sizes that the file claims."""
    sae, rank, features = SaeIdentity.from_dict(entry["sae"]), int(entry.get("rank", 1)), int(entry["features"])
    if not (1 <= rank <= sae.d_in <= _MAX_WIDTH and 1 <= features <= min(sae.d_sae, _MAX_FEATURES)):
        raise ArtifactError(f"{place} has impossible sizes (rank {rank}, {features} features). Build it again.")
    if len(entry["tokens"]) != features:
        raise ArtifactError(f"{place} has tokens for {len(entry['tokens'])} of {features} features.")
    return sae, tuple(tuple(str(token) for token in tokens) for tokens in entry["tokens"])


def _from_description(description: Mapping[str, Any], tensor_file: Path) -> Subspace:
    expected: dict[str, Any] = {}
    identities, guarded = [], []
    for index, entry in enumerate(description["sites"]):
        identities.append(_read_entry(entry, f"Site {index}"))
        for name, header in _site_tensors(entry["rank"], entry["features"], identities[-1][0].d_in).items():
            expected[f"{index}.{name}"] = header
    for index, entry in enumerate(description["protected"]):
        guarded.append(_read_entry(entry, f"Protected site {index}"))
        for name, header in _protected_tensors(entry["features"], guarded[-1][0].d_in).items():
            expected[f"protected.{index}.{name}"] = header
    if not identities and not guarded:
        raise ArtifactError("The Subspace has no sites, so no module could get a basis. Build it again.")
    tensors = read_tensors(tensor_file, expected)
    protected = tuple(
        ProtectedSite(
            sae=sae,
            tokens=tokens,
            **{name: tensors[f"protected.{index}.{name}"] for name in _protected_tensors(1, 1)},
        )
        for index, (sae, tokens) in enumerate(guarded)
    )
    sites = tuple(
        SubspaceSite(sae=sae, tokens=tokens, **{name: tensors[f"{index}.{name}"] for name in _site_tensors(1, 1, 1)})
        for index, (sae, tokens) in enumerate(identities)
    )
    return Subspace(
        sites=sites,
        layout=BlockLayout.from_dict(description["layout"]),
        model=dict(description["model"]),
        settings=dict(description["settings"]),
        versions=dict(description["versions"]),
        protected=protected,
    )
