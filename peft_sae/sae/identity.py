"""What identifies an SAE wherever its features are used later."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..errors import ArtifactError
from ..layout import Site


@dataclass(frozen=True)
class SaeIdentity:
    """Which SAE it is, without its weights.

    Attributes:
        name: unique short name, `release/sae_id` or the folder's name.
        hook_name: TransformerLens name of the hook point whose activations its decoder rebuilds: the place where its
            features' directions live.
        d_in: width of the decoder's directions, which is that of the activations at `hook_name`. For a transcoder
            sae-lens calls this `d_out`; what its encoder takes may have another width.
        d_sae: number of features.
        model_name: the model that it was trained on, as its metadata says; None if unknown.
        neuronpedia_id: id of its dashboard on Neuronpedia; None if it has none.
        digest: SHA-256 of its parameters.
        hook_name_in: TransformerLens name of the hook point that its encoder reads, if it is a transcoder; None if it
            is `hook_name`.
    """

    name: str
    hook_name: str
    d_in: int
    d_sae: int
    model_name: str | None
    neuronpedia_id: str | None
    digest: str
    hook_name_in: str | None = None

    @property
    def site(self) -> Site:
        """Where its decoder's directions live."""
        return Site.from_hook_name(self.hook_name)

    @property
    def site_in(self) -> Site:
        """Where its encoder reads: the same place, except for a transcoder."""
        return self.site if self.hook_name_in is None else Site.from_hook_name(self.hook_name_in, encoder=True)

    def neuronpedia_url(self, feature: int) -> str | None:
        """Return the address of a feature's dashboard, or None."""
        if self.neuronpedia_id is None:
            return None
        return f"https://www.neuronpedia.org/{self.neuronpedia_id}/{feature}"

    def to_dict(self) -> dict[str, Any]:
        """Return the identity as JSON-serialisable data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Any) -> SaeIdentity:
        """Build an identity from the data of `to_dict`.

        Raises:
            ArtifactError: an entry is missing, unknown, or of the wrong type.
        """
        optional = ("model_name", "neuronpedia_id", "hook_name_in")
        types: dict[str, Any] = {"d_in": int, "d_sae": int, **dict.fromkeys(optional, (str, type(None)))}
        names = [field.name for field in fields(cls)]
        if isinstance(data, Mapping):
            data = {"hook_name_in": None, **data}  # files of before there were transcoders lack it
        if not isinstance(data, Mapping) or set(data) != set(names):
            raise ArtifactError(f"An SAE's identity needs the entries {names}; found {data!r}.")
        for name in names:
            if not isinstance(data[name], types.get(name, str)) or isinstance(data[name], bool):
                raise ArtifactError(f"Entry {name!r} of an SAE's identity is {data[name]!r}, of a wrong type.")
        if data["d_in"] < 1 or data["d_sae"] < 1:
            raise ArtifactError(f"An SAE of width {data['d_in']} x {data['d_sae']} cannot exist.")
        return cls(**data)
