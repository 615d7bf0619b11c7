"""Merging with the whole model in memory, for what cannot be merged piece by piece."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import load_base
from ..errors import ConfigError
from .plan import is_tied, output_dtypes
from .updates import Layer, attach, check_together, merge_layers, part_tied, resize_for


def merge_in_memory(
    base: Path,
    adapters: Mapping[str, Mapping[str, torch.Tensor]],
    factors: Mapping[str, float],
    dtype: torch.dtype | None,
    folder: Path,
    max_shard_size: int,
) -> None:
    """Load a base model, merge adapters into it and save it.

    A quantised base is merged by PEFT, which rounds the result to the base's few bits again; with a dtype it is
    dequantised first.

    Raises:
        ArtifactError, MismatchError, ConfigError: as in `merge_checkpoint`.
    """
    model = load_base(base)
    quantised = getattr(model, "hf_quantizer", None) is not None
    if quantised and dtype is not None:
        model = _dequantised(model, dtype)
    resize_for(model, adapters.values())
    wanted = {} if dtype is None else output_dtypes(model, dtype)
    dtypes = {id(value): wanted.get(name, value.dtype) for name, value in model.named_parameters()}
    updates = [attach(model, name, adapters[name], factors[name], empty=False) for name in adapters]
    check_together(updates, adapters)
    for name, shared in part_tied(model, updates).items():
        dtypes[id(model.get_parameter(name))] = dtypes[id(shared)]
    by_module: dict[int, list[Layer]] = {}
    for found in updates:
        for layer in found.layers:
            by_module.setdefault(id(layer.module), []).append(layer)
    for layers in by_module.values():
        merge_layers(layers)
        for parameter in layers[0].module.parameters(recurse=False):  # rounded once, behind the last adapter
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtypes.get(id(parameter), parameter.dtype))
    if dtype is not None:
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(wanted[name])
        model.config.dtype = dtype
    if model.config.tie_word_embeddings and not is_tied(model):
        model.config.tie_word_embeddings = False
    # What transformers does to quantised tensors when it loads them it cannot do backwards.
    model.save_pretrained(folder, max_shard_size=max_shard_size, save_original_format=not quantised)


def _dequantised(model: Any, dtype: torch.dtype) -> Any:
    try:
        return model.dequantize(dtype=dtype)
    except Exception as error:  # each method of quantisation has errors of its own
        raise ConfigError(
            f"The base cannot be dequantised to {dtype} ({error}). Give the base that it was made from."
        ) from error
