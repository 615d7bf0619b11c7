"""The texts that activate features most, read again from the data."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from ..errors import ConfigError, DataError, MismatchError
from ..sae.identity import SaeIdentity
from ..statistics.data import Example, ExampleReader
from ..statistics.records import Data, iterate_records
from ..statistics.statistics import FeatureStatistics
from .select import Selection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CONTEXT = 12  # tokens on either side
_OTHER_DATA = "so these are not the data that the statistics were collected from. Give those, in the same order."


@dataclass(frozen=True)
class FeatureExample:
    """A text that activates a feature, around the token that does so most.

    Attributes:
        label: class of the text.
        number: place of the text in the data of its class, from 0.
        activation: activation at the token.
        before: text before the token; begins with an ellipsis if there is more.
        token: the token.
        after: text behind it; ends with an ellipsis if there is more.
    """

    label: str
    number: int
    activation: float
    before: str
    token: str
    after: str


class _Wanted(NamedTuple):
    """One entry of the statistics: whose it is, its rank there, and the token."""

    key: tuple[int, int]  # number of the hook point, and feature
    rank: int
    position: int
    activation: float


def read_examples(
    selection: Selection,
    statistics: FeatureStatistics,
    data: Mapping[str, Data],
    tokenizer: PreTrainedTokenizerBase,
) -> dict[tuple[int, int], tuple[FeatureExample, ...]]:
    """Return the texts that activate each chosen feature most, by the number of its hook point and its id.

    The data are read once, in order, and only the texts that are needed are tokenised.

    Args:
        selection: the chosen features.
        statistics: collected with `Measures(top_examples=n)`.
        data: class label to data set, as it was given to `collect_statistics`. A class may be left out.
        tokenizer: the same tokenizer.

    Returns:
        For every feature the texts of each class in the order of `data`, those of the largest activation first.

    Raises:
        ConfigError: the statistics do not say which texts these are.
        DataError: the data are not those of the statistics.
        MismatchError: the selection is of other SAEs.
    """
    places = [_place(statistics, site.sae) for site in selection.sites]
    found: dict[tuple[int, int], list[FeatureExample]] = defaultdict(list)
    for label, records in data.items():
        wanted = _wanted(selection, statistics, places, label)
        reader = _reader(statistics, tokenizer)
        cut: dict[tuple[tuple[int, int], int], FeatureExample] = {}
        number = -1
        for number, record in enumerate(iterate_records(records, label)):
            if number not in wanted:
                continue
            try:
                example = reader.read(record, number)
            except DataError as error:
                raise DataError(f"In the {label} data: {error}") from error
            for entry in wanted.pop(number):
                cut[entry.key, entry.rank] = _cut(example, entry, label, statistics, tokenizer)
        expected = statistics.settings["examples"][label]
        if number + 1 != expected:
            raise DataError(f"The {label} data has {number + 1} examples instead of {expected}, {_OTHER_DATA}")
        for (key, _), text in sorted(cut.items(), key=lambda item: item[0]):
            found[key].append(text)
    return {key: tuple(texts) for key, texts in found.items()}


def _place(statistics: FeatureStatistics, sae: SaeIdentity) -> int:
    for index, other in enumerate(statistics.saes):
        if (other.digest, other.hook_name) == (sae.digest, sae.hook_name):
            return index
    raise MismatchError(
        f"The selection is of the SAE {sae.name!r} at {sae.hook_name}, and the statistics are of "
        f"{[other.name for other in statistics.saes]}. Give the statistics that it was made from."
    )


def _wanted(
    selection: Selection, statistics: FeatureStatistics, places: Sequence[int], label: str
) -> dict[int, list[_Wanted]]:
    """What is to be read, by the example's place in the data."""
    moments = statistics.of(label)
    wanted: dict[int, list[_Wanted]] = defaultdict(list)
    for index, (site, place) in enumerate(zip(selection.sites, places, strict=True)):
        top = moments[place].top
        if top is None:
            raise ConfigError(
                "The statistics do not say which texts activate a feature most. Collect them again with "
                "measures=Measures(top_examples=3), or leave out `data`."
            )
        for feature in site.features.tolist():
            entries = zip(top.examples[feature].tolist(), top.positions[feature].tolist(), strict=True)
            for rank, (number, position) in enumerate(entries):
                if number >= 0:
                    wanted[number].append(_Wanted((index, feature), rank, position, float(top.values[feature, rank])))
    return dict(wanted)


def _reader(statistics: FeatureStatistics, tokenizer: PreTrainedTokenizerBase) -> ExampleReader:
    settings = statistics.settings
    missing = sorted({"tokens", "max_length", "prepend_bos", "examples"} - set(settings))
    if missing:
        raise ConfigError(
            f"The statistics do not say how their texts were read ({missing} are missing from their settings). Collect "
            "them with `collect_statistics`, or leave out `data`."
        )
    return ExampleReader(
        tokenizer, tokens=settings["tokens"], max_length=settings["max_length"], prepend_bos=settings["prepend_bos"]
    )


def _cut(
    example: Example,
    entry: _Wanted,
    label: str,
    statistics: FeatureStatistics,
    tokenizer: PreTrainedTokenizerBase,
) -> FeatureExample:
    place = entry.position
    # An attribution observes every token of the text, not only those that its objective is about.
    observed = example.counted if statistics.settings.get("quantity") != "attribution" else example.ordinary
    if not 0 <= place < len(example.ids) or not observed[place]:
        raise DataError(
            f"Example {example.number} of the {label} data has no token at place {place} that counts, {_OTHER_DATA}"
        )
    start, end = example.spans[place]
    # What the tokenizer adds is not in the text. Tokens of a few bytes share a character.
    around = example.spans[max(0, place - _CONTEXT) : place + _CONTEXT + 1]
    real = [span for span in around if span[0] < span[1]]
    first, last = min([start, *(span[0] for span in real)]), max([end, *(span[1] for span in real)])
    before, token, after = example.text[first:start], example.text[start:end], example.text[end:last]
    return FeatureExample(
        label=label,
        number=example.number,
        activation=entry.activation,
        before=("…" if first > 0 else "") + before,
        token=token or str(tokenizer.decode([example.ids[place]])),
        after=after + ("…" if last < len(example.text) else ""),
    )
