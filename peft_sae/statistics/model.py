"""What tells one model apart from another."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from ..errors import MismatchError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SAMPLES = 16  # values of each parameter that enter the digest


def model_description(model: PreTrainedModel) -> dict[str, Any]:
    """Return what identifies a model: name, model_type, hidden_size, num_hidden_layers, and a digest of its weights."""
    config, text = model.config, model.config.get_text_config()
    return {
        "name": str(getattr(config, "_name_or_path", "") or ""),
        "model_type": str(config.model_type),
        "hidden_size": int(getattr(text, "hidden_size", 0) or 0),
        "num_hidden_layers": int(getattr(text, "num_hidden_layers", 0) or 0),
        "digest": weights_digest(model),
    }


@torch.no_grad()
def weights_digest(model: PreTrainedModel, *, exact: bool = False) -> str | None:
    """Return a SHA-256 over a few values of every parameter, or None where they are not to be had.

    The values are rounded to bfloat16, so that a checkpoint has the same digest in float32 and in bfloat16. Quantised,
    offloaded and half-precision (float16) weights have none.

    Args:
        model: the model.
        exact: take the values as they are, of any dtype: for a run on the very same weights.
    """
    parameters = [(name, parameter) for name, parameter in model.named_parameters()]
    comparable = (torch.float32, torch.bfloat16, torch.float64)
    if any(p.is_meta or (p.dtype not in comparable and not exact) for _, p in parameters):
        return None
    sha = hashlib.sha256()
    for name, parameter in parameters:
        flat = parameter.detach().reshape(-1)
        step = max(1, len(flat) // _SAMPLES)
        values = flat[::step][:_SAMPLES]
        values = values.double().cpu() if exact else values.to(torch.bfloat16).float().cpu()
        sha.update(f"{name}:{tuple(parameter.shape)}:{values.tolist()}".encode())
    return sha.hexdigest()


def check_same_model(description: Mapping[str, Any], model: PreTrainedModel) -> None:
    """Check that a model is the one that statistics were collected on.

    Args:
        description: from `model_description`; digests are compared where both have one.
        model: the model at hand.

    Raises:
        MismatchError: it is another architecture, size, or has other weights.
    """
    own = model_description(model)
    names = ["model_type", "hidden_size", "num_hidden_layers"]
    if description.get("digest") and own["digest"]:
        names.append("digest")
    different = {name: (description.get(name), own[name]) for name in names if description.get(name) != own[name]}
    if different:
        raise MismatchError(
            f"The statistics were collected on another model than {own['name'] or type(model).__name__!r}: "
            f"{different} (then, now). Their features would be those of the other one. Collect them again."
        )
