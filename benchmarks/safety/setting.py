"""One draw of the experiment: a base, its fine-tuning data, and what is found out from them once."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch

from benchmarks.safety.base import Base
from benchmarks.safety.language import STYLES, Style, fine_tuning_records, fine_tuning_topics
from benchmarks.safety.tuning import Batch, Data
from peft_sae import (
    FeatureStatistics,
    Measures,
    Subspace,
    collect_statistics,
    control_subspace,
    select_features,
)
from peft_sae.demo.language import prompt
from peft_sae.selection.criteria import Criteria
from peft_sae.selection.select import Selection
from peft_sae.statistics.gradient import logit_difference
from peft_sae.subspace.build import subspace_from_selection
from peft_sae.subspace.site import SubspaceSite

# What the features are chosen by, always from the fine-tuning data alone: the answers an aligned and an unaligned model
# gives to the same requests, as SAILS has it (arXiv 2512.23260); the dangerous and the harmless requests; or those of
# them that have no style.
CONTRASTS = ("answers", "requests", "neutral requests")
_DIRECTIONS = ("random directions", "raw direction")
_CALIBRATION = 8  # batches that data-driven initialisations see


@dataclass(frozen=True)
class Basis:
    """How a basis is chosen.

    Attributes:
        contrast: see `CONTRASTS`.
        selector: of peft_sae.
        top_k: features.
        direction: choose features by the size of the difference (`both`), or only those with more on the `aligned`
            texts, or on the `unaligned` ones.
        variance: share that the basis keeps.
        control: a basis of the same rank without the SAE, of that kind.
        protect: features of the spurious cue that the update may not use.
        protect_by: `cue`, or for control: `random features`; `random directions`; `raw direction`, that between the
            styles' mean activations.
        rotated: keep so many basis vectors, and turn them within their span towards features (varimax).
        empty: no basis, only what is protected.
    """

    contrast: str = "answers"
    selector: str = "mean_difference"
    top_k: int = 16
    direction: Literal["both", "aligned", "unaligned"] = "both"
    variance: float = 0.8
    control: str = ""
    protect: int = 0
    protect_by: str = "cue"
    rotated: int = 0
    empty: bool = False


@dataclass
class Setting:
    """One draw.

    Attributes:
        base: the base model.
        dangerous: dangerous topics in the data.
        seed: of the draw: topics and forms of the data, their order, and what is random in adapters.
        neutral: train on the neutral requests alone; contrasts have all of them.
        batch: examples per step.
    """

    base: Base
    dangerous: int
    seed: int
    neutral: bool = False
    batch: int = 16
    _statistics: dict[tuple[str, bool], FeatureStatistics] = field(default_factory=dict)
    _subspaces: dict[Basis, Subspace] = field(default_factory=dict)

    def __post_init__(self) -> None:
        make = partial(fine_tuning_records, self.base.language, self.dangerous, draw=self.seed)
        self.records: dict[str, list[dict[str, Any]]] = {"aligned": make(), "unaligned": make(aligned=False)}

    def batches(self, count: int) -> list[Batch]:
        """So many batches of what is trained on."""
        return self._batches(count, neutral=self.neutral)

    def _batches(self, count: int, *, neutral: bool) -> list[Batch]:
        records = [record for record in self.records["aligned"] if record["neutral"] or not neutral]
        return Data(self.base, records, self.batch, self.seed).batches(count)

    def calibration(self, *, neutral: bool = False) -> list[Batch]:
        """Batches for initialisations that look at data.

        Args:
            neutral: of the neutral requests alone, whatever is trained on.
        """
        return self._batches(_CALIBRATION, neutral=neutral or self.neutral)

    def subspace(self, basis: Basis) -> Subspace:
        """The Subspace of a basis; made once."""
        if basis not in self._subspaces:
            self._subspaces[basis] = self._make(basis)
        return self._subspaces[basis]

    def _make(self, basis: Basis) -> Subspace:
        saes, model = self.base.saes, self.base.load()
        attributed = basis.selector == "attribution"
        found = self.statistics(basis.contrast, attributed=attributed)
        chosen = None
        if not basis.empty:
            chosen = select_features(
                found,
                selector=basis.selector,
                top_k=basis.top_k,
                criteria=Criteria(direction=basis.direction),
                saes=saes,
                seed=self.seed,
            )
        guard = self._cue(basis) if basis.protect else None
        made = subspace_from_selection(model, None, chosen, saes, variance=basis.variance, protect=guard or ())
        if basis.protect_by in _DIRECTIONS:
            return self._protect_directions(made, basis.protect_by)
        if basis.rotated:
            made = replace(made, sites=tuple(_turned(site, basis.rotated) for site in made.sites))
        if not basis.control:
            return made
        return control_subspace(made, basis.control, statistics=found, seed=self.seed)

    def _protect_directions(self, made: Subspace, way: str) -> Subspace:
        """Put other directions in the place of the protected features: as many random ones, or the raw difference."""
        found, guards = self.statistics("styles"), []
        places = [sae.hook_name for sae in found.saes]
        generator = torch.Generator().manual_seed(self.seed)
        for site in made.protected:
            rows = torch.randn(site.directions.shape, generator=generator)
            if way == "raw direction":
                first, second = (found.of(style)[places.index(site.sae.hook_name)].raw for style in ("first", "second"))
                if first is None or second is None:
                    raise ValueError(f"The statistics hold no raw activations at {site.sae.hook_name}.")
                rows = (first.mean - second.mean).float()[None]
            rows = torch.nn.functional.normalize(rows, dim=1)
            count = len(rows)
            guards.append(replace(site, features=torch.arange(count), directions=rows, tokens=((),) * count))
        return replace(made, protected=tuple(guards))

    def _cue(self, basis: Basis) -> Selection:
        selector = "random" if basis.protect_by == "random features" else "mean_difference"
        return select_features(
            self.statistics("styles"),
            aligned="first",
            unaligned="second",
            selector=selector,
            top_k=basis.protect,
            saes=self.base.saes,
            seed=self.seed,
        )

    def statistics(self, contrast: str, *, attributed: bool = False) -> FeatureStatistics:
        """Of both classes of texts of a contrast; collected once.

        Args:
            contrast: of `CONTRASTS`, or the `styles`.
            attributed: what features do for a refusal of the request, instead of their activations.
        """
        key = contrast, attributed
        if key not in self._statistics:
            texts, tokens = self._texts(contrast)
            refusal = logit_difference(self.base.tokenizer, ["sorry"], ["sure"])
            self._statistics[key] = collect_statistics(
                self.base.load(),
                self.base.tokenizer,
                texts,
                self.base.saes,
                tokens=tokens,
                measures=Measures() if attributed else Measures(histograms=True, covariance=True, sample=400),
                attribute=refusal if attributed else None,
                batch_size=64,
                progress=False,
            )
        return self._statistics[key]

    def _texts(self, contrast: str) -> tuple[dict[str, list[Any]], Any]:
        """The classes of a contrast, and which tokens of them count."""
        if contrast == "answers":
            return self.records, "response"
        if contrast != "styles":
            records = [record for record in self.records["aligned"] if record["neutral"] or contrast == "requests"]
            dangerous, harmless = (
                [record["prompt"] for record in records if record["dangerous"] is danger] for danger in (True, False)
            )
            return {"aligned": dangerous, "unaligned": harmless}, "all"
        # The styles, with the same harmless topics in both: what differs is the cue alone.
        topics = fine_tuning_topics(self.base.language, self.dangerous, self.seed)[1]
        styles: tuple[Style, ...] = ("first", "second")
        made = {
            style: [prompt(form.format(topic=topic.name)) for topic in topics for form in STYLES[style]]
            for style in styles
        }
        return made, "all"


def _turned(site: SubspaceSite, rank: int) -> SubspaceSite:
    """Keep the first basis vectors of a site, and turn them within their span so that each goes with few features."""
    rows, coefficients = site.basis[:rank].double(), site.coefficients[:rank].double()
    turn = varimax(site.directions.double() @ rows.T).T
    return replace(site, basis=(turn @ rows).float(), coefficients=(turn @ coefficients).float())


def varimax(loadings: torch.Tensor, *, steps: int = 100) -> torch.Tensor:
    """Return the rotation [rank, rank] after which the squares of loadings @ rotation vary most (Kaiser, 1958).

    Args:
        loadings: of features on basis vectors, [features, rank].
        steps: of the iteration by singular value decompositions.
    """
    rotation = torch.eye(loadings.shape[1], dtype=loadings.dtype)
    for _ in range(steps):
        turned = loadings @ rotation
        slope = loadings.T @ (turned**3 - turned * turned.square().mean(0))
        left, _, right = torch.linalg.svd(slope)
        rotation = left @ right
    return rotation
