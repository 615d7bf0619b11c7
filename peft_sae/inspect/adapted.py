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

from ..errors import ConfigError, MismatchError


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
def with_adapter(model: Any, adapter: str | Path | None, adapter_name: str) -> Iterator[Adapted]:
    """Put an adapter into a model, and take it out again: modules, hooks, flags and modes are as they were afterwards.

    Args:
        model: a base model without adapters; or a `PeftModel` that has the adapter already.
        adapter: the adapter's folder, for a base model.
        adapter_name: the adapter's name in a `PeftModel`: it alone is active inside.

    Raises:
        MismatchError: the adapter is of another model.
        ConfigError: a base model holds adapters already.
    """
    before = _State(model)
    try:
        if isinstance(model, PeftModel):
            with _alone(model, adapter_name):
                yield Adapted(model.get_base_model(), model.disable_adapter)
        else:
            _refuse_adapters(model)
            adapted = _load(model, adapter)
            yield Adapted(model, adapted.disable_adapter)
    finally:
        before.restore()


def _load(model: Any, adapter: str | Path | None) -> PeftModel:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Found missing adapter keys")
        try:
            return PeftModel.from_pretrained(model, str(adapter))
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise MismatchError(
                f"The adapter '{adapter}' does not fit the model ({error}). Give the base that it was trained on."
            ) from error


def _refuse_adapters(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            raise ConfigError(
                f"The base model holds adapters already (at {name!r}), and another one cannot be put in and taken out "
                "without touching them. Give the PeftModel as the adapter, or a base without adapters."
            )


@contextmanager
def _alone(model: PeftModel, adapter_name: str) -> Iterator[None]:
    """Make one adapter the only active one, whether or not adapters are disabled."""
    own, active = model.active_adapter, list(model.active_adapters)
    disabled = any(module.disable_adapters for module in model.modules() if isinstance(module, BaseTunerLayer))
    try:
        if disabled:
            model.base_model.enable_adapter_layers()
        model.base_model.set_adapter([adapter_name], inference_mode=True)
        yield
    finally:
        model.base_model.set_adapter(active)
        model.active_adapter = own
        if disabled:
            model.base_model.disable_adapter_layers()


class _State:
    """What a model is made of, to be put back."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._attributes = dict(vars(model))
        self._flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        self._children = [(module, dict(module._modules)) for module in model.modules()]
        self._training = [(module, module.training) for module in model.modules()]
        self._hooks = [(hooks, set(hooks)) for module in model.modules() for hooks in _hooks_of(module)]

    def restore(self) -> None:
        """Put everything back."""
        for module, children in self._children:
            for name, child in children.items():
                if module._modules.get(name) is not child:
                    module._modules[name] = child
            for name in set(module._modules) - set(children):
                del module._modules[name]
        for hooks, known in self._hooks:
            for key in set(hooks) - known:
                del hooks[key]
        for parameter, wanted in self._flags:
            if parameter.requires_grad is not wanted:
                parameter.requires_grad_(wanted)
        for module, training in self._training:
            module.training = training
        state = vars(self._model)
        for name in set(state) - set(self._attributes):
            del state[name]
        for name, value in self._attributes.items():
            if state.get(name) is not value:
                state[name] = value


def _hooks_of(module: nn.Module) -> list[Any]:
    return [module._forward_hooks, module._forward_pre_hooks, module._forward_hooks_with_kwargs]
