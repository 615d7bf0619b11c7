"""Building a Subspace from chosen features, and the three stages in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ..errors import ConfigError, MismatchError
from ..sae.load import SaeHandle, as_handles
from ..sae.placement import check_placement, find_layout
from ..selection.select import SelectedFeatures, Selection, select_features
from ..statistics.collect import collect_statistics
from ..statistics.data import Data, TokenChoice
from .artifact import Subspace
from .site import SubspaceSite, principal_basis, unit_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_TOKENS_PER_FEATURE = 8


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
    tokens: TokenChoice = "all",
    batch_size: int = 8,
    max_length: int | None = None,
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
        top_k: features per SAE.
        variance: tau, the share of variance that the basis keeps, in (0, 1].
        tokens: which tokens count: `all`, `prompt` or `response`.
        batch_size: texts per forward pass.
        max_length: tokens per text; longer ones are cut. By default the model's context length.
        progress: show progress bars.

    Raises:
        DataError, MismatchError, SelectionError, ConfigError: as the single stages do.
    """
    _check_variance(variance)
    statistics = collect_statistics(
        model,
        tokenizer,
        {"aligned": aligned, "unaligned": unaligned},
        saes,
        tokens=tokens,
        batch_size=batch_size,
        max_length=max_length,
        progress=progress,
    )
    selection = select_features(statistics, selector=selector, top_k=top_k)
    return subspace_from_selection(model, tokenizer, selection, saes, variance=variance)


def subspace_from_selection(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    selection: Selection,
    saes: Sequence[SaeHandle],
    *,
    variance: float = 0.8,
) -> Subspace:
    """Build the basis of features that are already chosen.

    Args:
        model: the plain Hugging Face model; its architecture and unembedding are read.
        tokenizer: names the tokens that features promote; None leaves them out.
        selection: from `select_features`.
        saes: the same SAEs that the statistics were collected with.
        variance: tau, the share of variance that the basis keeps, in (0, 1].

    Raises:
        MismatchError: an SAE of the selection is missing, or another one has its name.
        ConfigError: `variance` is out of range.
    """
    _check_variance(variance)
    saes = as_handles(saes)
    check_placement(model, saes)
    by_digest = {handle.identity.digest: handle for handle in saes}
    sites = []
    for chosen in selection.sites:
        handle = by_digest.get(chosen.sae.digest)
        if handle is None:
            raise MismatchError(
                f"The selection was made with SAE {chosen.sae.name!r} (digest {chosen.sae.digest[:12]}...), which is "
                f"not among the given ones {[other.identity.name for other in saes]}. Give the same SAEs."
            )
        sites.append(_build_site(chosen, handle, model, tokenizer, variance))
    statistics = dict(selection.settings["statistics"])
    settings = {**selection.settings, "variance": variance}
    return Subspace(
        sites=tuple(sorted(sites, key=lambda site: (site.sae.site.block, site.sae.hook_name))),
        layout=find_layout(model),
        model=statistics["model"],
        settings=settings,
    )


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
        aligned_means=chosen.aligned_means,
        unaligned_means=chosen.unaligned_means,
        aligned_rates=chosen.aligned_rates,
        unaligned_rates=chosen.unaligned_rates,
        directions=directions.float(),
        basis=basis.float(),
        coefficients=coefficients.float(),
        tokens=_promoted_tokens(directions, model, tokenizer, chosen.sae.site.kind),
    )


@torch.no_grad()
def _promoted_tokens(
    directions: torch.Tensor, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, kind: str
) -> tuple[tuple[str, ...], ...]:
    """The tokens with the largest logits when a direction goes straight through the unembedding."""
    unembedding = model.get_output_embeddings()
    # The heads' outputs are not in the residual stream, which is all that the unembedding can read.
    if tokenizer is None or unembedding is None or kind == "z" or unembedding.weight.is_meta:
        return ((),) * directions.shape[0]
    weight = unembedding.weight
    if weight.shape[-1] != directions.shape[-1]:  # quantised, or behind a projection
        return ((),) * directions.shape[0]
    logits = directions.to(device=weight.device, dtype=weight.dtype) @ weight.T
    best = logits.topk(min(_TOKENS_PER_FEATURE, logits.shape[-1]), dim=-1).indices.tolist()
    return tuple(tuple(tokenizer.decode([token]) for token in row) for row in best)
