"""What the adapter does to the features' activations on texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..sae.handle import SaeHandle
from ..sae.names import feature_name
from ..selection.texts import FeatureExample, read_examples
from ..selection.tokens import TokenEffects, token_effects
from ..statistics import FeatureStatistics, Measures, collect_statistics
from ..statistics.records import Data
from .adapted import Adapted
from .groups import FeatureGroup

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedTokenizerBase

BEFORE, AFTER = "base", "adapted"

ACTIVATION_COLUMNS = {
    "name": "hook point and id",
    "block": "block of the hook point",
    "hook_name": "hook point",
    "sae": "its SAE",
    "feature": "its id",
    "group": "chosen (in the Subspace's basis), protected, or other",
    "mean_before": "mean activation per token in the base model",
    "mean_after": "the same in the adapted model",
    "change": "mean_after - mean_before",
    "error": "standard error of the change over texts, as if the two runs were of different ones: usually several "
    "times too large; unknown for a single text",
    "rate_before": "share of the tokens on which it fires in the base model",
    "rate_after": "the same in the adapted model",
    "promoted": "tokens whose logits its direction raises most",
    "suppressed": "tokens whose logits it lowers most",
    "examples": "texts that activate it most: in the adapted model if it is stronger there, else in the base model",
    "neuronpedia": "address of its dashboard, or none",
    "label": "what the labels call it, or none",
}


@dataclass(frozen=True)
class _Site:
    """Some features of one SAE, as a selection has them."""

    sae: Any
    features: torch.Tensor


@dataclass(frozen=True)
class _Chosen:
    sites: tuple[_Site, ...]


def compare_activations(
    adapted: Adapted,
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    handles: Sequence[SaeHandle],
    *,
    top_examples: int,
    **settings: Any,
) -> tuple[FeatureStatistics, FeatureStatistics]:
    """Collect statistics on the same texts without and with the adapter."""
    measures = Measures(top_examples=top_examples)
    with adapted.without():
        before = collect_statistics(
            adapted.model, tokenizer, {BEFORE: data}, handles, measures=measures, distributed=False, **settings
        )
    after = collect_statistics(
        adapted.model, tokenizer, {AFTER: data}, handles, measures=measures, distributed=False, **settings
    )
    return before, after


def activation_table(
    before: FeatureStatistics,
    after: FeatureStatistics,
    groups: Sequence[FeatureGroup],
    handles: Sequence[SaeHandle],
    adapted: Adapted,
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    *,
    others: int,
    labels: Mapping[str, str],
    examples: bool,
) -> pd.DataFrame:
    """Return one row per chosen or protected feature, and per feature among the most changed ones.

    Args:
        before: statistics of the class `base`.
        after: statistics of the class `adapted`.
        groups: features with their kinds.
        handles: the SAEs.
        adapted: the model, for the promoted tokens.
        tokenizer: its tokenizer.
        data: the texts, which are read once more for the examples.
        others: how many of the most strengthened and of the most weakened features per hook point.
        labels: what the user calls features, by name.
        examples: whether the statistics say which texts activate a feature most.

    Returns:
        With the columns of `ACTIVATION_COLUMNS`, largest change first, whichever its sign.
    """
    import pandas as pd

    kinds = {group.sae.hook_name: group.kinds for group in groups}
    sites: list[_Site] = []
    rows: list[dict[str, Any]] = []
    for index, handle in enumerate(handles):
        first, second = before.of(BEFORE)[index], after.of(AFTER)[index]
        change = second.mean - first.mean
        known = kinds.get(handle.identity.hook_name, {})
        features = _most_changed(change, known, others)
        site = _Site(handle.identity, torch.tensor(features))
        effects = _effects(handle, site.features, adapted, tokenizer)
        error = (first.standard_error.square() + second.standard_error.square()).sqrt()
        for place, feature in enumerate(features):
            rows.append(
                {
                    "name": feature_name(handle.identity, feature),
                    "block": handle.identity.site.block,
                    "hook_name": handle.identity.hook_name,
                    "sae": handle.identity.name,
                    "feature": feature,
                    "group": known.get(feature, "other"),
                    "mean_before": float(first.mean[feature]),
                    "mean_after": float(second.mean[feature]),
                    "change": float(change[feature]),
                    "error": float(error[feature]),
                    "rate_before": float(first.firing_rate[feature]),
                    "rate_after": float(second.firing_rate[feature]),
                    "promoted": list(effects.promoted[place]),
                    "suppressed": list(effects.suppressed[place]),
                    "examples": [],
                    "neuronpedia": handle.identity.neuronpedia_url(feature),
                    "label": labels.get(feature_name(handle.identity, feature)),
                }
            )
        sites.append(site)
    if examples:
        texts = _texts(before, after, tuple(sites), data, tokenizer)
        at = {handle.identity.hook_name: index for index, handle in enumerate(handles)}
        for row in rows:
            label = AFTER if row["change"] >= 0 else BEFORE
            row["examples"] = texts[label].get((at[row["hook_name"]], row["feature"]), ())
    table = pd.DataFrame(rows, columns=list(ACTIVATION_COLUMNS))
    order = table["change"].abs().sort_values(ascending=False, kind="stable").index
    return table.loc[order].reset_index(drop=True)


def with_tokens(
    features: pd.DataFrame, handles: Sequence[SaeHandle], adapted: Adapted, tokenizer: PreTrainedTokenizerBase
) -> pd.DataFrame:
    """Return a feature table with the promoted tokens of those features of which the Subspace knows none."""
    found: dict[str, list[str]] = {}
    for handle in handles:
        mine = features["hook_name"] == handle.identity.hook_name
        unknown = features.loc[mine & ~features["tokens"].map(bool), "feature"].unique()
        if len(unknown):
            effects = _effects(handle, torch.tensor(unknown.tolist()), adapted, tokenizer)
            for feature, tokens in zip(unknown.tolist(), effects.promoted, strict=True):
                found[feature_name(handle.identity, feature)] = list(tokens)
    said = [known or found.get(name, []) for name, known in zip(features["name"], features["tokens"], strict=True)]
    result = features.copy()
    result["tokens"] = said
    return result


def _most_changed(change: torch.Tensor, kinds: Mapping[int, str], others: int) -> list[int]:
    """Features with a kind of their own, and those that changed most in either direction."""
    order = change.argsort(descending=True, stable=True)
    up = [int(one) for one in order[:others] if change[one] > 0]
    down = [int(one) for one in order.flip(0)[:others] if change[one] < 0]
    return list(dict.fromkeys([*kinds, *up, *down]))


def _effects(
    handle: SaeHandle, features: torch.Tensor, adapted: Adapted, tokenizer: PreTrainedTokenizerBase
) -> TokenEffects:
    with adapted.without():
        directions = handle.decoder[features.to(handle.decoder.device)]
        return token_effects(directions, adapted.model, tokenizer, handle.identity.site.kind)


def _texts(
    before: FeatureStatistics,
    after: FeatureStatistics,
    sites: tuple[_Site, ...],
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Mapping[tuple[int, int], tuple[FeatureExample, ...]]]:
    chosen: Any = _Chosen(sites)
    return {
        BEFORE: read_examples(chosen, before, {BEFORE: data}, tokenizer),
        AFTER: read_examples(chosen, after, {AFTER: data}, tokenizer),
    }
