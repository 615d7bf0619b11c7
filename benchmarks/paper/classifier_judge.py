"""A judge that is a classifier on this machine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from safetensors import SafetensorError

from benchmarks.paper.generate import put
from benchmarks.paper.judging import Item, Verdict
from benchmarks.paper.specs import ClassifierJudgeSpec
from peft_sae.checkpoint import open_base
from peft_sae.errors import ConfigError


class ClassifierJudge:
    """Reads prompt and answer, and gives the score of the label that it finds most likely.

    It has no rubric: a harmless set's answers get the scores that it was trained for.

    Args:
        spec: model and labels.

    Raises:
        ConfigError: the model cannot be loaded, or its labels are not those that are named.
    """

    def __init__(self, spec: ClassifierJudgeSpec) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self._spec = spec
        config, _ = open_base(spec.model)
        labels = {str(label) for label in config.id2label.values()}
        if labels != set(map(str, spec.labels)):
            raise ConfigError(
                f"judge.labels names {sorted(map(str, spec.labels))}, and '{spec.model}' has {sorted(labels)}, so some "
                "verdicts would have no score. Name all of them."
            )
        device = spec.device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            model: Any = AutoModelForSequenceClassification.from_pretrained(
                spec.model, config=config, trust_remote_code=False, use_safetensors=True
            )
            self._tokenizer: Any = AutoTokenizer.from_pretrained(spec.model, trust_remote_code=False)
        except (OSError, ValueError, SafetensorError) as error:
            raise ConfigError(f"The judge '{spec.model}' cannot be loaded ({error}). Check judge.model.") from error
        self._model, self._scores = model.eval().to(device), {str(key): value for key, value in spec.labels.items()}

    @torch.inference_mode()
    def score(self, items: Sequence[Item]) -> Iterator[tuple[int, Verdict]]:
        """Yield each item's index and verdict, batch by batch."""
        for start in range(0, len(items), self._spec.batch_size):
            batch = items[start : start + self._spec.batch_size]
            texts = [put(self._spec.form, prompt=item.prompt, answer=item.answer) for item in batch]
            lengths = [len(ids) for ids in self._tokenizer(texts)["input_ids"]]
            inputs = self._tokenizer(
                texts, return_tensors="pt", padding=True, truncation=True, max_length=self._spec.max_length
            ).to(self._model.device)
            shares = self._model(**inputs).logits.float().softmax(-1)
            for place, (share, length) in enumerate(zip(shares, lengths, strict=True)):
                label = str(self._model.config.id2label[int(share.argmax())])
                cut = f", of {length} tokens the first {self._spec.max_length} were read"
                reason = f"{label} ({float(share.max()):.3f}){cut if length > self._spec.max_length else ''}"
                yield start + place, Verdict(self._scores[label], reason)
