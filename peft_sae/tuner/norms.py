"""The gains of a model's norms, each measured once."""

from __future__ import annotations

import torch
from peft.utils.integrations import gather_params_ctx
from torch import nn

from ..errors import ConfigError, MismatchError
from .basis import NormGain, measure_norm


class NormGains:
    """Measures norms of one model."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._norms: dict[str, NormGain] = {}

    def get(self, name: str | None, width: int) -> NormGain | None:
        """Return the gain of a norm, None for no norm.

        Args:
            name: path of the norm in the model, or None.
            width: its number of channels.

        Raises:
            MismatchError: there is no such norm.
            ConfigError: its weights are not there.
        """
        if name is None:
            return None
        if name not in self._norms:
            try:
                norm = self._model.get_submodule(name)
            except AttributeError as error:
                raise MismatchError(
                    f"The Subspace expects a norm at {name!r}, and the model has none: it is of another architecture. "
                    "Use a Subspace of this model, or norm_gain=False."
                ) from error
            # DeepSpeed's ZeRO-3 leaves weights of size 0 in the module and gathers them on request.
            with gather_params_ctx(list(norm.parameters()), modifier_rank=None):
                known = list(norm.parameters()) or "norm" in type(norm).__name__.lower()
                if not known or any(parameter.shape != (width,) for parameter in norm.parameters()):
                    raise MismatchError(
                        f"The Subspace names {name!r} ({type(norm).__name__}) as a norm of width {width}, which it is "
                        "not. Use a Subspace of this model, or norm_gain=False."
                    )
                gain = self._measure(name, norm, width)
            if gain is None:
                raise ConfigError(
                    f"The norm {name!r} is on the meta device while modules behind it are not, so its gain cannot be "
                    "had. Load the model without offloading, or use norm_gain=False."
                )
            self._norms[name] = gain
        return self._norms[name]

    @staticmethod
    def _measure(name: str, norm: nn.Module, width: int) -> NormGain | None:
        try:
            gain = measure_norm(norm, width)
        except (TypeError, RuntimeError, IndexError, AttributeError) as error:
            raise MismatchError(
                f"The Subspace names {name!r} ({type(norm).__name__}) as a norm, and it is none ({error}). Use a "
                "Subspace of this model, or norm_gain=False."
            ) from error
        if gain is not None and not bool(torch.isfinite(gain.gain).all()):
            raise MismatchError(f"The norm {name!r} returns NaN or infinity, so the model's weights are damaged.")
        return gain
