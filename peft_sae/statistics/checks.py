"""Checks of what `collect_statistics` is asked for, and of what it found."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import ConfigError, DataError
from ..sae.handle import SaeHandle
from .accumulate import Pooling
from .gradient import Objective
from .measures import Measures
from .statistics import FeatureStatistics

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

_AT_RUN_TIME = ("constant_norm_rescale", "layer_norm")


def check_counts(statistics: FeatureStatistics, tokens: str) -> None:
    """Check that there is something in every class.

    Raises:
        DataError: a class is empty, or no token of it counts.
    """
    for label, moments in statistics.moments.items():
        examples = statistics.settings["examples"][label]
        if examples == 0:
            raise DataError(f"The {label} data set is empty, so it cannot be compared. Give at least one text.")
        if moments[0].count == 0:
            raise DataError(
                f"None of the {examples} {label} texts has a token that counts (tokens={tokens!r}; BOS and "
                "padding never do). Give longer texts or another choice of tokens."
            )


def check_measures(
    measures: Measures, pooling: Pooling, attribute: Objective | None, saes: Sequence[SaeHandle]
) -> None:
    """Check that what is to be measured is defined for attributions, if those are collected.

    Raises:
        ConfigError: it is not.
    """
    if attribute is None:
        return
    if pooling == "max":
        raise ConfigError(
            "pooling='max' takes the largest activation of a text, and attributions have two signs. Use 'mean', 'last' "
            "or 'token'."
        )
    if measures.histograms:
        raise ConfigError(
            "Histograms are of activations, which are not negative, and attributions are. Collect them in a run of "
            "their own."
        )
    scaled = [handle.identity.hook_name for handle in saes if handle.sae.cfg.normalize_activations in _AT_RUN_TIME]
    if scaled:
        raise ConfigError(
            f"The SAEs at {scaled} rescale each token's activations, so their decoder rows are not the effect of a "
            "feature on the stream, and attributions would be wrong. Use another selector."
        )


def prepends_bos(saes: Sequence[SaeHandle]) -> bool:
    """Return whether BOS is put in front of every text; the log tells where SAEs disagree."""
    wanted = {handle.prepend_bos for handle in saes} - {None}
    if len(wanted) == 2:
        without = [handle.identity.hook_name for handle in saes if handle.prepend_bos is False]
        logger.warning(
            "Every text begins with BOS here, as some of the SAEs were trained; those at %s were trained without. Use "
            "SAEs that agree, or collect them apart.",
            without,
        )
    return True in wanted


def context_length(model: PreTrainedModel, max_length: int | None) -> int:
    """Return how many tokens of a text are read.

    Raises:
        ConfigError: `max_length` is out of range.
    """
    limit = int(getattr(model.config.get_text_config(), "max_position_embeddings", 0) or 0) or 2**31
    if max_length is None:
        return limit
    if not 2 <= max_length <= limit:
        raise ConfigError(f"max_length={max_length} is not between 2 and the model's context length {limit}.")
    return max_length
