"""Whether a merged checkpoint answers as its base does with the adapter."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import base_folder, load_base
from ..errors import ArtifactError
from .merge import Adapters, factors_of
from .updates import apply, read_adapters, resize_for

_PROMPTS = (
    "The quick brown fox jumps over the lazy dog.",
    "Question: What is the capital of France? Answer:",
    "def add(a, b):\n    return a + b",
    "Once upon a time there was",
)
_TOKENS = 32  # per prompt, at most
# Of the largest logit: what the order of sums, and the rounding of merged weights, may make of it.
_TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class MergeCheck:
    """Logits of a merged checkpoint beside those of its base with the adapter, each in the dtype it is stored in.

    Attributes:
        largest_difference: between the two.
        largest_logit: of the base with the adapter.
        largest_effect: what the adapter changes at all: the largest difference to the base without it.
        agreement: share of positions at which the most likely token is the same.
        positions: number of positions.
        tolerance: difference, relative to the largest logit, that rounding explains in this dtype.
    """

    largest_difference: float
    largest_logit: float
    largest_effect: float
    agreement: float
    positions: int
    tolerance: float

    @property
    def agrees(self) -> bool:
        """Whether rounding explains the difference; never where a logit is not finite."""
        return self.largest_difference <= self.tolerance * self.largest_logit

    def __str__(self) -> str:
        """One sentence."""
        return (
            f"Logits differ by at most {self.largest_difference:.3g} (largest logit {self.largest_logit:.3g}; the "
            f"adapter itself changes them by up to {self.largest_effect:.3g}); the most likely token is the same at "
            f"{self.agreement:.1%} of {self.positions} positions."
        )


def verify_merge(base: str | Path, adapter: Adapters, merged: str | Path) -> MergeCheck:
    """Run a few short prompts through a base with its adapter and through the merged checkpoint.

    Both are loaded with transformers, one after the other, so memory holds one model. One adapter of factor 1 runs
    beside its base, unmerged; several, or other factors, are merged in memory.

    Args:
        base: folder or Hub id of the base model.
        adapter: as in `merge_checkpoint`.
        merged: folder of the merged checkpoint.

    Returns:
        What differs.

    Raises:
        ArtifactError, MismatchError, ConfigError: one of them cannot be loaded, or they do not belong together.
    """
    factors = factors_of(adapter)
    weights = read_adapters(factors)
    target = Path(merged)
    if not target.is_dir():
        raise ArtifactError(f"The merged checkpoint '{merged}' is no folder. Give the output of merge_checkpoint.")
    model = load_base(base_folder(base))
    batches = _prompts(target, model)
    without = _logits(model, batches)
    resize_for(model, weights.values())
    expected = _logits(apply(model, weights, factors), batches)
    del model
    gc.collect()
    model = load_base(target)
    found = _logits(model, batches)
    pairs = list(zip(found, expected, strict=True))
    return MergeCheck(
        largest_difference=max(float((a - b).abs().max()) for a, b in pairs),
        largest_logit=max(float(b.abs().max()) for b in expected),
        largest_effect=max(
            float((a - b)[..., : min(a.shape[-1], b.shape[-1])].abs().max())
            for a, b in ((one[..., : two.shape[-1]], two) for one, two in zip(expected, without, strict=True))
        ),
        agreement=sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in pairs)
        / sum(b[..., 0].numel() for b in expected),
        positions=sum(b[..., 0].numel() for b in expected),
        tolerance=_TOLERANCES.get(model.dtype, _TOLERANCES[torch.float32]),
    )


def _prompts(merged: Path, model: Any) -> list[torch.Tensor]:
    """Token ids [1, length] that the base knows; at random where there is no tokenizer."""
    import transformers

    known = int(model.get_input_embeddings().weight.shape[0])
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(merged, trust_remote_code=False)
        ids = [tokenizer(text, return_tensors="pt")["input_ids"][:, :_TOKENS] for text in _PROMPTS]
    except Exception:  # whatever a tokenizer's files make transformers raise: none is needed here
        ids = []
    ids = [batch.clamp(max=known - 1) for batch in ids if batch.numel()]
    generator = torch.Generator().manual_seed(0)
    return ids or [torch.randint(known, (1, _TOKENS // 2), generator=generator) for _ in _PROMPTS]


@torch.inference_mode()
def _logits(model: Any, batches: list[torch.Tensor]) -> list[torch.Tensor]:
    return [model(input_ids=batch).logits.float() for batch in batches]
