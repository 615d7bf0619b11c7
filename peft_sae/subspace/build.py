"""Building a Subspace from chosen features, and the three stages in one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..errors import ConfigError, MismatchError
from ..sae.handle import SaeHandle, as_handles
from ..sae.placement import check_placement, find_layout
from ..selection.criteria import Criteria
from ..selection.registry import get_selector
from ..selection.select import SelectedFeatures, Selection, select_features
from ..selection.tokens import promoted_tokens
from ..statistics.accumulate import Pooling
from ..statistics.collect import collect_statistics
from ..statistics.data import TokenChoice
from ..statistics.gradient import Objective, log_likelihood
from ..statistics.measures import Measures
from ..statistics.model import check_same_model, model_description
from ..statistics.records import Data, check_data
from ..statistics.statistics import FeatureStatistics
from .artifact import Subspace
from .protect import Protect, find_protected, protected_ids, protected_site, sae_key, select_contrast, without_protected
from .protected import ProtectedSite
from .site import SubspaceSite, principal_basis, unit_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def build_subspace(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    saes: Sequence[SaeHandle],
    aligned: Data,
    unaligned: Data,
    selector: str = "mean_difference",
    top_k: int = 64,
    variance: float = 0.8,
    criteria: Criteria | None = None,
    features: Sequence[str] = (),
    retain: Data | None = None,
    retain_by: Literal["exclude", "protect"] = "exclude",
    protect: Protect | None = None,
    protect_top_k: int = 16,
    protect_max_q: float | None = None,
    tokens: TokenChoice = "all",
    pooling: Pooling = "token",
    attribute: Objective | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
    state: str | Path | None = None,
    distributed: bool | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Subspace:
    """Collect statistics, select features and build their basis: the first stages in one call.

    The method is that of SAILS, arXiv 2512.23260.

    Args:
        model: the plain Hugging Face model.
        tokenizer: its tokenizer.
        saes: from `load_saes`.
        aligned: texts to move towards; see `collect_statistics` for the forms.
        unaligned: texts to move away from.
        selector: name of a registered selector.
        top_k: features per SAE. For a small rank, take about as many as it holds: of many more, the principal
            directions mix what was not asked for into the few that are kept.
        variance: tau, the share of variance that the basis keeps, in (0, 1].
        criteria: what a feature must fulfil beside a good score.
        features: names of the features for the selector `explicit`.
        retain: texts whose features are to be left alone: what they use is passed over.
        retain_by: only `exclude` such features from the basis, or `protect` those that would have been chosen.
        protect: features that the update must neither read nor write: names such as
            `"blocks.12.hook_resid_post:4051"` or `"12:4051"`, or two sets of text that differ only in what it is to
            ignore (a phrasing, a language, a format). Of those the features whose means differ most are protected. A
            feature on both lists is protected, and is taken out of the basis, which the log tells.
        protect_top_k: features per SAE that a pair of sets protects, at most.
        protect_max_q: of those, only features with a q-value up to this; None protects them whatever the evidence.
        tokens: which tokens count: `all`, `prompt`, `response` or `assistant`.
        pooling: what is one observation: a `token`, or an example's `mean`, `max` or `last`.
        attribute: objective for the selector `attribution`; by default the texts' log-likelihood.
        batch_size: texts per forward pass.
        max_length: tokens per text; longer ones are cut. By default the model's context length.
        state: file that the statistics' state is written to now and then, to go on from after the process was killed.
        distributed: see `collect_statistics`.
        seed: for what is random.
        progress: show progress bars.

    Raises:
        DataError, MismatchError, SelectionError, ConfigError: as the single stages do.
    """
    _check_variance(variance)
    check_data(aligned, "aligned")
    check_data(unaligned, "unaligned")

    if retain is not None:
        check_data(retain, "retain")
    if retain_by not in ("exclude", "protect"):
        raise ConfigError(f"retain_by={retain_by!r} is unknown. Use 'exclude' or 'protect'.")
    chosen = get_selector(selector)

    def collect(
        data: Mapping[str, Data], measures: Measures, objective: Objective | None, file: str
    ) -> FeatureStatistics:
        return collect_statistics(
            model,
            tokenizer,
            data,
            saes,
            tokens=tokens,
            pooling=pooling,
            measures=measures,
            attribute=objective,
            batch_size=batch_size,
            max_length=max_length,
            state=None if state is None else Path(state).with_name(Path(state).name + file),
            distributed=distributed,
            progress=progress,
        )

    def contrast(first: Data, second: Data) -> Selection:
        collected = collect({"aligned": first, "unaligned": second}, Measures(), None, ".protect")
        return select_contrast(collected, protect_top_k, protect_max_q)

    guarded = find_protected(protect, saes, contrast)
    data = {"aligned": aligned, "unaligned": unaligned} | ({} if retain is None else {"retain": retain})
    objective = (attribute or log_likelihood) if chosen.attribution else None
    selection = select_features(
        collect(data, chosen.measures, objective, ""),
        selector=selector,
        top_k=top_k,
        criteria=criteria,
        retain=None if retain is None else "retain",
        features=features,
        saes=saes,
        seed=seed,
    )
    return subspace_from_selection(
        model,
        tokenizer,
        selection,
        saes,
        variance=variance,
        protect=guarded,
        protect_retained=retain_by == "protect",
    )


def subspace_from_selection(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    selection: Selection | None,
    saes: Sequence[SaeHandle],
    *,
    variance: float = 0.8,
    protect: Sequence[str] | Selection = (),
    protect_retained: bool = False,
) -> Subspace:
    """Build the basis of features that are already chosen.

    Args:
        model: the plain Hugging Face model; its architecture and unembedding are read.
        tokenizer: names the tokens that features promote; None leaves them out.
        selection: from `select_features`; None for no basis, only protected features.
        saes: the same SAEs that the statistics were collected with.
        variance: tau, the share of variance that the basis keeps, in (0, 1].
        protect: names of features that an update must not use, or a selection of them. They are taken out of the
            features that the basis is built from, which the log tells.
        protect_retained: protect also the features that the selection passed over for the retain texts.

    Raises:
        MismatchError: an SAE of the selection is missing, or another one has its name.
        SelectionError: a protected feature is unknown, or no chosen feature is left.
        ConfigError: `variance` is out of range, or there is neither a selection nor anything to protect.
    """
    _check_variance(variance)
    saes = as_handles(saes)
    check_placement(model, saes)
    by_key = {sae_key(handle.identity): handle for handle in saes}
    guarded = protected_ids(protect, saes)
    if protect_retained and selection is not None:
        for over in selection.retained:
            ids = guarded.setdefault(sae_key(over.sae), [])
            ids.extend(feature for feature in over.features.tolist() if feature not in ids)
    if selection is None and not guarded:
        raise ConfigError("Neither a selection nor features to protect are given, so the Subspace would be empty.")
    sites = []
    for chosen in () if selection is None else selection.sites:
        handle = _find_handle(chosen, by_key)
        chosen = without_protected(chosen, guarded.get(sae_key(chosen.sae), ()))
        sites.append(_build_site(chosen, handle, model, tokenizer, variance))
    protected = [protected_site(by_key[key], ids, model, tokenizer) for key, ids in guarded.items()]
    found_by = dict(protect.settings) if isinstance(protect, Selection) else list(protect)
    settings = {} if selection is None else dict(selection.settings)
    if settings:
        check_same_model(settings["statistics"]["model"], model)
    return Subspace(
        sites=tuple(sorted(sites, key=_place)),
        layout=find_layout(model),
        model=model_description(model),
        settings={**settings, "variance": variance, "protect": found_by, "protect_retained": protect_retained},
        protected=tuple(sorted(protected, key=_place)),
    )


def _place(site: SubspaceSite | ProtectedSite) -> tuple[int, str]:
    return site.sae.site.block, site.sae.hook_name


def _find_handle(chosen: SelectedFeatures, by_key: Mapping[tuple[str, str], SaeHandle]) -> SaeHandle:
    handle = by_key.get(sae_key(chosen.sae))
    if handle is None:
        names = [other.identity.name for other in by_key.values()]
        raise MismatchError(
            f"The selection was made with SAE {chosen.sae.name!r} (digest {chosen.sae.digest[:12]}...), which is "
            f"not among the given ones {names}. Give the same SAEs."
        )
    return handle


def _check_variance(variance: float) -> None:
    if not 0 < variance <= 1:
        raise ConfigError(f"variance={variance} is no share. Use a value in (0, 1], for example 0.8.")


def _build_site(
    chosen: SelectedFeatures,
    handle: SaeHandle,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    variance: float,
) -> SubspaceSite:
    directions = unit_rows(handle.decoder[chosen.features.to(handle.decoder.device)], chosen.sae.name)
    basis, coefficients = principal_basis(directions, variance)
    return SubspaceSite(
        sae=chosen.sae,
        features=chosen.features,
        scores=chosen.scores,
        q_values=chosen.q_values,
        aligned_means=chosen.aligned_means,
        unaligned_means=chosen.unaligned_means,
        aligned_rates=chosen.aligned_rates,
        unaligned_rates=chosen.unaligned_rates,
        directions=directions.float(),
        basis=basis.float(),
        coefficients=coefficients.float(),
        tokens=promoted_tokens(directions, model, tokenizer, chosen.sae.site.kind),
    )
