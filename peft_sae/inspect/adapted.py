"""A base model with an adapter for the time of a `with` block."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..errors import MismatchError


@dataclass(frozen=True, eq=False)
class Adapted:
    """A model that can be run with and without an adapter.

    Attributes:
        model: the base model with the adapter's layers in it.
        without: makes a context in which the adapter has no effect.
    """

    model: Any
    without: Callable[[], AbstractContextManager[Any]]


@contextmanager
def with_adapter(model: Any, adapter: str | Path | None, adapter_name: str | None = None) -> Iterator[Adapted]:
    """Put an adapter into a model, and take it out again: modules, flags and modes are as they were afterwards.

    Args:
        model: a base model; or a `PeftModel` that has the adapter already, which is used as it is.
        adapter: the adapter's folder, for a base model.
        adapter_name: the adapter's name in a `PeftModel`; by default the active one.

    Raises:
        MismatchError: the adapter is of another model.
    """
    if isinstance(model, PeftModel):
        active = list(model.active_adapters)
        flags = _flags(model)
        try:
            if adapter_name is not None and active != [adapter_name]:
                model.set_adapter(adapter_name, inference_mode=True)
            yield Adapted(model.get_base_model(), model.disable_adapter)
        finally:
            if list(model.active_adapters) != active:
                model.base_model.set_adapter(active)
            _restore(model, flags)
        return
    attributes, flags = set(vars(model)), _flags(model)
    layers = {name: module for name, module in model.named_modules() if not isinstance(module, BaseTunerLayer)}
    training = [module for module in model.modules() if module.training]
    adapted = None
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found missing adapter keys")
            try:
                adapted = PeftModel.from_pretrained(model, str(adapter))
            except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise MismatchError(
                    f"The adapter '{adapter}' does not fit the model ({error}). Give the base that it was trained on."
                ) from error
        yield Adapted(model, adapted.disable_adapter)
    finally:
        _put_back(model, layers)
        _restore(model, flags)
        for name in set(vars(model)) - attributes:
            delattr(model, name)
        for module in model.modules():
            module.training = False
        for module in training:
            module.training = True


def _flags(model: nn.Module) -> list[tuple[nn.Parameter, bool]]:
    return [(parameter, parameter.requires_grad) for parameter in model.parameters()]


def _restore(model: nn.Module, flags: list[tuple[nn.Parameter, bool]]) -> None:
    for parameter, wanted in flags:
        if parameter.requires_grad is not wanted:
            parameter.requires_grad_(wanted)


def _put_back(model: nn.Module, layers: dict[str, nn.Module]) -> None:
    """Put the modules of before where adapters' layers stand now."""
    for name, module in layers.items():
        if not name:
            continue
        parent, _, last = name.rpartition(".")
        owner = layers.get(parent)
        if owner is not None and owner._modules.get(last) is not module:
            owner._modules[last] = module
