"""The chosen features as a table to read."""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..artifact import package_versions
from ..errors import ConfigError, MismatchError, SelectionError
from ..escape import in_csv, visible
from ..sae.handle import SaeHandle, as_handles
from ..sae.identity import SaeIdentity
from ..sae.names import feature_name, parse_feature_name
from ..statistics.records import Data
from ..statistics.statistics import FeatureStatistics
from ..writing import check_suffix, write_text
from .select import SelectedFeatures, Selection
from .texts import FeatureExample, read_examples
from .tokens import TokenEffects, token_effects

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_SCHEMA = "peft_sae.features"
_SCHEMA_VERSION = 1
SUFFIXES = (".html", ".md", ".csv", ".json")


@dataclass(frozen=True)
class FeatureRow:
    """A chosen feature.

    Attributes:
        rank: place in the selection of its hook point, from 1.
        block: block of the model.
        hook_name: hook point where its direction lives.
        sae: name of its SAE.
        feature: its id.
        name: hook point and id, by which other calls know it.
        score: its score; of most selectors positive for more on the aligned texts.
        q_value: share of false discoveries among features with as small a q-value.
        aligned_mean: mean activation on the aligned texts.
        unaligned_mean: mean activation on the unaligned texts.
        aligned_rate: share of the aligned observations on which it fires.
        unaligned_rate: share of the unaligned observations on which it fires.
        promoted: tokens whose logits its direction raises most (`token_effects`); empty if unknown.
        suppressed: tokens whose logits it lowers most; empty if unknown.
        examples: texts that activate it most, by class; empty if unknown.
        neuronpedia: address of its dashboard, or None.
        label: what the user's labels call it, or None.
    """

    rank: int
    block: int
    hook_name: str
    sae: str
    feature: int
    name: str
    score: float
    q_value: float
    aligned_mean: float
    unaligned_mean: float
    aligned_rate: float
    unaligned_rate: float
    promoted: tuple[str, ...] = ()
    suppressed: tuple[str, ...] = ()
    examples: tuple[FeatureExample, ...] = ()
    neuronpedia: str | None = None
    label: str | None = None


@dataclass(frozen=True)
class FeatureTable:
    """The chosen features of every hook point, best first.

    Attributes:
        rows: one per feature, by hook point.
        settings: how the features were chosen, and how the statistics behind that were collected.
    """

    rows: tuple[FeatureRow, ...]
    settings: Mapping[str, Any]

    def by_hook(self) -> dict[str, list[FeatureRow]]:
        """Return the rows of every hook point."""
        found: dict[str, list[FeatureRow]] = {}
        for row in self.rows:
            found.setdefault(row.hook_name, []).append(row)
        return found

    def to_pandas(self) -> pd.DataFrame:
        """Return a data frame with the attributes of `FeatureRow` as columns; examples are dictionaries."""
        import pandas as pd

        columns = [field.name for field in fields(FeatureRow)]
        return pd.DataFrame([_plain(row) for row in self.rows], columns=columns)

    def to_markdown(self) -> str:
        """Return a Markdown document with one table per hook point."""
        from .markdown import markdown_page

        return markdown_page(self)

    def to_html(self) -> str:
        """Return one HTML page that needs nothing beside it; a click on a column's head sorts by it."""
        from .html import html_page

        return html_page(self)

    def to_json(self) -> str:
        """Return the rows and the settings as JSON."""
        data = {
            "schema": _SCHEMA,
            "schema_version": _SCHEMA_VERSION,
            "settings": dict(self.settings),
            "rows": [_plain(row) for row in self.rows],
        }
        return json.dumps(data, indent=2, default=str) + "\n"

    def to_csv(self) -> str:
        """Return the rows as comma-separated values; tokens and examples are JSON within their cells."""
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, [field.name for field in fields(FeatureRow)], lineterminator="\n")
        writer.writeheader()
        for row in self.rows:
            cells = _plain(row)
            writer.writerow(
                {name: json.dumps(cell) if isinstance(cell, list) else in_csv(cell) for name, cell in cells.items()}
            )
        return buffer.getvalue()

    def save(self, path: str | Path) -> None:
        """Write the table, whole or not at all, in the format that the file's suffix says.

        Args:
            path: the file, with the suffix .html, .md, .csv or .json. An earlier one is replaced.

        Raises:
            ConfigError: unknown suffix.
            ArtifactError: it cannot be written.
        """
        check_suffix(path, SUFFIXES)
        formats = {".html": self.to_html, ".md": self.to_markdown, ".csv": self.to_csv, ".json": self.to_json}
        write_text(path, formats[Path(path).suffix.lower()]())


def describe_features(
    selection: Selection,
    *,
    saes: Sequence[SaeHandle] | None = None,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    statistics: FeatureStatistics | None = None,
    data: Mapping[str, Data] | None = None,
    labels: Mapping[str, str] | None = None,
    top_tokens: int = 8,
) -> FeatureTable:
    """Return the chosen features with all that is known of them.

    Args:
        selection: from `select_features`.
        saes: the SAEs, whose decoder directions are read for the tokens.
        model: the plain Hugging Face model, for the tokens that a direction promotes and suppresses.
        tokenizer: its tokenizer, for tokens and texts.
        statistics: those that the selection was made from, collected with `Measures(top_examples=n)`, for the texts
            that activate a feature most.
        data: class label to data set, as given to `collect_statistics`; it is read once more for those texts.
        labels: name to label, from `read_labels` or `fetch_labels`. Labels of other features do no harm.
        top_tokens: tokens per feature and side.

    Raises:
        ConfigError: what tokens or texts need is given in part only.
        MismatchError: SAEs or statistics are not those of the selection.
        DataError: the data are not those of the statistics.
        SelectionError: a label names a feature that could be of two SAEs.
    """
    if top_tokens < 0:
        raise ConfigError(f"top_tokens={top_tokens} is no number of tokens. Use 0 or more.")
    if data is not None and (statistics is None or tokenizer is None):
        raise ConfigError("data=... is read for the texts that statistics=... name, with tokenizer=... Give all three.")
    if data is not None and not isinstance(data, Mapping):
        raise ConfigError(
            f"data is {type(data).__name__}, and a mapping from label to data set is needed, as for collect_statistics."
        )
    examples: dict[tuple[int, int], tuple[FeatureExample, ...]] = {}
    if data is not None and statistics is not None and tokenizer is not None:
        examples = read_examples(selection, statistics, data, tokenizer)
    handles = None if saes is None else as_handles(saes)
    names = _labels(labels or {}, [site.sae for site in selection.sites])
    rows: list[FeatureRow] = []
    for index, site in enumerate(selection.sites):
        effects = _effects(site, handles, model, tokenizer, top_tokens)
        rows += _rows(
            site, effects, {feature: texts for (at, feature), texts in examples.items() if at == index}, names
        )
    if labels and not any(row.label for row in rows):
        logger.warning("None of the %d labels is of a chosen feature.", len(labels))
    return FeatureTable(tuple(rows), {**selection.settings, "versions": package_versions()})


def _effects(
    site: SelectedFeatures,
    handles: Sequence[SaeHandle] | None,
    model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
    count: int,
) -> TokenEffects:
    if handles is None or model is None or tokenizer is None:
        return TokenEffects(((),) * len(site.features), ((),) * len(site.features))
    key = (site.sae.digest, site.sae.hook_name)
    handle = next((one for one in handles if (one.identity.digest, one.identity.hook_name) == key), None)
    if handle is None:
        raise MismatchError(
            f"The selection was made with SAE {site.sae.name!r} at {site.sae.hook_name}, which is not among the given "
            f"ones {[one.identity.name for one in handles]}. Give the same SAEs."
        )
    directions = handle.decoder[site.features.to(handle.decoder.device)]
    return token_effects(directions, model, tokenizer, site.sae.site.kind, count=count)


def numbers_of(site: Any, place: int) -> dict[str, Any]:
    """Return the fields of a row that a chosen feature has by itself, wherever it is kept.

    Args:
        site: `SelectedFeatures`, or a site of a Subspace, which has the same fields.
        place: the feature's place in it, from 0.
    """
    feature = int(site.features[place])
    return {
        "rank": place + 1,
        "block": site.sae.site.block,
        "hook_name": site.sae.hook_name,
        "sae": site.sae.name,
        "feature": feature,
        "name": feature_name(site.sae, feature),
        "score": float(site.scores[place]),
        "q_value": float(site.q_values[place]),
        "aligned_mean": float(site.aligned_means[place]),
        "unaligned_mean": float(site.unaligned_means[place]),
        "aligned_rate": float(site.aligned_rates[place]),
        "unaligned_rate": float(site.unaligned_rates[place]),
    }


def _rows(
    site: SelectedFeatures,
    effects: TokenEffects,
    examples: Mapping[int, tuple[FeatureExample, ...]],
    labels: Mapping[str, str],
) -> list[FeatureRow]:
    return [
        FeatureRow(
            **numbers_of(site, place),
            promoted=effects.promoted[place],
            suppressed=effects.suppressed[place],
            examples=examples.get(feature, ()),
            neuronpedia=site.sae.neuronpedia_url(feature),
            label=labels.get(feature_name(site.sae, feature)),
        )
        for place, feature in enumerate(site.features.tolist())
    ]


def _labels(labels: Mapping[str, str], saes: Sequence[SaeIdentity]) -> dict[str, str]:
    """Labels by the features' full names; those of other SAEs are left out, the fuller of two names wins."""
    places = {place for sae in saes for place in (str(sae.site.block), sae.hook_name)}
    sources = {sae.neuronpedia_id: sae for sae in saes}
    hooks = {sae.hook_name for sae in saes}
    found: dict[str, str] = {}
    exact: dict[str, str] = {}
    for name, label in labels.items():
        place, _, number = (part.strip() for part in name.rpartition(":"))
        if place in places:
            try:
                (exact if place in hooks else found)[feature_name(*parse_feature_name(name, saes))] = label
            except SelectionError as error:  # of another SAE at that block, perhaps
                logger.warning("The label of %s is left out: %s", visible(name), visible(str(error)))
        elif place in sources:
            found.setdefault(f"{sources[place].hook_name}:{number}", label)
    return {**found, **exact}


def _plain(row: FeatureRow) -> dict[str, Any]:
    """A row as JSON-serialisable data."""
    data = asdict(row)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in data.items()}
