"""One test, run on LoRA and on SAE_SUBSPACE, and the table of what came out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from peft_sae import SaeSubspaceConfig
from tests.tiny import make_model, make_subspace

KINDS = ("LORA", "SAE_SUBSPACE", "SAE_SUBSPACE, frozen")
IDS = torch.randint(4, 16, (4, 9), generator=torch.Generator().manual_seed(0))


def ability(name: str, *, frozen: str | None = None, match: str = "freeze_basis") -> Callable[[Any], Any]:
    """Mark a test as a row of the table.

    Args:
        name: what a user can do.
        frozen: why it cannot go together with `freeze_basis=True`; the refusal is then what is tested there.
        match: what the refusal must say.
    """
    return pytest.mark.ability(name=name, frozen=frozen, match=match)


@dataclass(frozen=True)
class Job:
    """A user's job, in which only the type of the adapter differs."""

    kind: str

    @property
    def frozen(self) -> bool:
        return self.kind.endswith("frozen")

    def config(self, model, **fields):
        """A configuration with the same fields for either type; modules that read and that write are targets."""
        fields = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "o_proj"], "task_type": "CAUSAL_LM", **fields}
        if self.kind == "LORA":
            return LoraConfig(**fields)
        return SaeSubspaceConfig(subspace=make_subspace(model), freeze_basis=self.frozen, **fields)

    def adapt(self, model=None, *, trained: bool = True, **fields) -> PeftModel:
        """An adapted model whose adapter does something."""
        torch.manual_seed(0)
        model = make_model() if model is None else model
        adapted = get_peft_model(model, self.config(model, **fields))
        if trained:
            train(adapted)
        return adapted.eval()


def logits(model, ids=IDS, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, **kwargs).logits


def train(model, *, steps: int = 3, rate: float = 0.3, ids=IDS) -> list[float]:
    """Steps of gradient descent without dropout; returns the losses."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert trained
    optimizer = torch.optim.SGD(trained, lr=rate)
    losses = []
    for _ in range(steps):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def assert_close(first, second, tolerance=1e-5):
    torch.testing.assert_close(first, second, rtol=tolerance, atol=tolerance)


def assert_differs(first, second, tolerance=1e-4):
    assert (first - second).abs().max() > tolerance


def reload(adapted: PeftModel, folder, base, **kwargs) -> PeftModel:
    adapted.save_pretrained(folder)
    return PeftModel.from_pretrained(base, str(folder), **kwargs).eval()
