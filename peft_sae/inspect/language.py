"""What an adapter does to the model's predictions: next-token loss, and how far the distributions move."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from ..errors import DataError
from ..statistics.batches import Batch, iterate_batches
from ..statistics.capture import evaluating, input_device
from ..statistics.data import ExampleReader
from ..statistics.records import Data, iterate_records
from .adapted import Adapted

if TYPE_CHECKING:
    import pandas as pd

_LOGITS = {"cpu": 2**22, "other": 2**26}  # at a time
_TOLERANCE = 1e-3

POSITION_COLUMNS = {
    "position": "place of the predicted token in its text, from 0",
    "tokens": "number of tokens predicted there",
    "loss_before": "mean negative log-likelihood of the token under the base model, nats",
    "loss_after": "the same under the adapted model",
    "kl": "mean Kullback-Leibler divergence of the adapted model's distribution from the base model's, nats",
}


@dataclass(frozen=True, eq=False)
class LanguageChange:
    """Sums per position.

    Attributes:
        count: predicted tokens, int64 [positions].
        before: sum of the base model's losses, float64 [positions].
        after: sum of the adapted model's, float64 [positions].
        divergence: sum of KL(base || adapted), float64 [positions].
    """

    count: torch.Tensor
    before: torch.Tensor
    after: torch.Tensor
    divergence: torch.Tensor

    def summary(self) -> dict[str, Any]:
        """Return the means over all tokens."""
        number = int(self.count.sum())
        return {
            "predicted_tokens": number,
            "loss_before": float(self.before.sum()) / number,
            "loss_after": float(self.after.sum()) / number,
            "loss_change": float(self.after.sum() - self.before.sum()) / number,
            "kl": float(self.divergence.sum()) / number,
        }

    def table(self) -> pd.DataFrame:
        """Return the means per position, with the columns of `POSITION_COLUMNS`."""
        import pandas as pd

        places = self.count.nonzero().squeeze(1)
        count = self.count[places]
        columns = [places, count, *(sums[places] / count for sums in (self.before, self.after, self.divergence))]
        return pd.DataFrame(dict(zip(POSITION_COLUMNS, (column.tolist() for column in columns), strict=True)))


def measure_language(
    adapted: Adapted, data: Data, reader: ExampleReader, *, batch_size: int, pad_id: int, progress: bool
) -> LanguageChange:
    """Predict every counted token with and without the adapter.

    Logits are computed for some tokens at a time, so memory does not grow with vocabulary times text.

    Args:
        adapted: the model.
        data: one data set.
        reader: says which tokens count.
        batch_size: texts per forward pass.
        pad_id: token id to pad with.
        progress: show a progress bar.

    Raises:
        DataError: no counted token has one before it, or logits are not finite.
    """
    sums = {name: torch.zeros(0, dtype=torch.float64) for name in ("count", "before", "after", "divergence")}
    examples = (reader.read(record, number) for number, record in enumerate(iterate_records(data, "inspected")))
    with evaluating(adapted.model), torch.no_grad():
        for batch in tqdm(
            iterate_batches(examples, batch_size=batch_size, pad_id=pad_id),
            desc="predictions",
            unit=" batches",
            disable=not progress,
        ):
            for places, before, after, divergence in _compare(adapted, batch):
                for name, values in zip(sums, (torch.ones_like(before), before, after, divergence), strict=True):
                    if int(places.max()) >= len(sums[name]):
                        grown = torch.zeros(2 * int(places.max()) + 1, dtype=torch.float64)
                        grown[: len(sums[name])] = sums[name]
                        sums[name] = grown
                    sums[name].index_add_(0, places, values)
    if not float(sums["count"].sum()):
        raise DataError("No token of the data can be predicted from one before it. Give longer texts.")
    count = sums.pop("count").long()
    return LanguageChange(count, **sums)


def _compare(adapted: Adapted, batch: Batch) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Positions, losses before and after, and divergences of the predicted tokens, some at a time."""
    rows, places = batch.counted[:, 1:].nonzero(as_tuple=True)
    if not len(rows):
        return
    targets = batch.ids[rows, places + 1]
    with adapted.without():
        before = _Predictions(adapted.model, batch, rows, places)
    after = _Predictions(adapted.model, batch, rows, places)
    for part in before.parts():
        with adapted.without():  # the head may be adapted as well
            first = before.log_probabilities(part)
        second = after.log_probabilities(part)
        wanted = targets[part].to(first.device)[:, None]
        yield (
            places[part] + 1,
            -first.gather(1, wanted).squeeze(1).double().cpu(),
            -second.gather(1, wanted).squeeze(1).double().cpu(),
            (first.exp() * (first - second)).sum(dim=1).double().cpu(),
        )


class _Predictions:
    """What one forward pass predicts at some places.

    Logits are made later, from the last hidden states, where the head (and a soft cap) gives the model's own logits.
    Where it does not, all logits of the batch are kept.
    """

    def __init__(self, model: Any, batch: Batch, rows: torch.Tensor, places: torch.Tensor) -> None:
        device = input_device(model)
        given = {"input_ids": batch.ids.to(device), "attention_mask": batch.attention.to(device), "use_cache": False}
        self._softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        self._head = model.get_output_embeddings()
        hidden = None if self._head is None else self._hidden(model, given)
        if hidden is None:
            self._head, hidden = None, model(**given).logits
        self._found = hidden[rows.to(hidden.device), places.to(hidden.device)]

    def _hidden(self, model: Any, given: dict[str, Any]) -> torch.Tensor | None:
        """The last hidden states of one pass, if the logits of the last place follow from them."""
        kept: list[Any] = []
        handle = model.get_decoder().register_forward_hook(lambda _, __, output: kept.append(output[0]))
        try:
            last = model(**given, logits_to_keep=1).logits[:, -1]
        except TypeError:  # a model that always makes all logits
            return None
        finally:
            handle.remove()
        if len(kept) != 1:
            return None
        ours = self._logits(kept[0][:, -1])
        scale = last.float().abs().max().clamp(min=1e-6)
        agrees = ours.shape == last.shape and bool((ours - last.float()).abs().max() <= _TOLERANCE * scale)
        hidden: torch.Tensor = kept[0]
        return hidden if agrees else None

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = hidden.float() if self._head is None else self._head(hidden).float()
        if self._head is not None and self._softcap is not None:
            found = torch.tanh(found / self._softcap) * self._softcap
        return found

    def parts(self) -> Iterator[slice]:
        """Some places at a time."""
        vocabulary = self._found.shape[-1] if self._head is None else self._head.weight.shape[0]
        rows = max(1, _LOGITS["cpu" if self._found.device.type == "cpu" else "other"] // int(vocabulary))
        for start in range(0, len(self._found), rows):
            yield slice(start, start + rows)

    def log_probabilities(self, part: slice) -> torch.Tensor:
        """Float32 [places of the part, vocabulary]."""
        found = torch.log_softmax(self._logits(self._found[part]), dim=-1)
        if not bool(torch.isfinite(found).all()):
            raise DataError(
                "The model's logits are NaN or infinite, so its predictions cannot be compared. Load it in bfloat16 or "
                "float32 instead of float16."
            )
        return found
