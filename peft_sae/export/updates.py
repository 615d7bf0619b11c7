"""The updates of adapters as PEFT's own layers, apart from the model that they belong to.

PEFT's layers do the arithmetic, so what is merged is what PEFT would merge: DoRA, rank-stabilised scaling, experts,
trained tokens and protected factors included. A layer needs only the weights of the one module that it changes.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

from ..adapter import read_adapter_config, read_adapter_weights
from ..errors import ArtifactError, ConfigError, MismatchError
from ..tuner.forward import FusedLinearVariant

_HALF = (torch.float16, torch.bfloat16)
_PREFIX = "base_model.model."
_REPEATED = re.compile(r"\.(modules_to_save|original_module)(?=\.)")
EMBEDDINGS = ("get_input_embeddings", "get_output_embeddings")


@dataclass(eq=False)
class Layer:
    """What one adapter does to one module.

    Attributes:
        tuner: PEFT's layer.
        module: the module that it changes.
        name: of the module.
        adapter: folder of the adapter.
    """

    tuner: Any
    module: nn.Module
    name: str
    adapter: str


@dataclass(eq=False)
class Updates:
    """What adapters do to a model.

    Attributes:
        layers: in the order in which they are merged.
        given: for tensors of the base that an adapter brings along whole (trained biases, resized embeddings): the
            module, the key in it, and the value.
        whole: names of the modules of these, and of those that an adapter trained as a whole.
    """

    layers: list[Layer] = field(default_factory=list)
    given: list[tuple[nn.Module, str, torch.Tensor]] = field(default_factory=list)
    whole: set[str] = field(default_factory=set)


def read_adapters(adapters: Iterable[str]) -> dict[str, dict[str, torch.Tensor]]:
    """Check the tensors of adapters and return their shapes, by their folders, as tensors that take no memory.

    Raises:
        ArtifactError: one is missing, damaged, of another type, or holds NaN.
    """
    for adapter in adapters:
        read_adapter_config(adapter)
    return {
        adapter: {name: tensor.to("meta") for name, tensor in read_adapter_weights(adapter).items()}
        for adapter in adapters
    }


def resize_for(model: Any, weights: Iterable[Mapping[str, torch.Tensor]]) -> int | None:
    """Give the model as many tokens as the adapters were trained with, if they bring the embeddings along.

    Returns:
        The new number of tokens; None if it stays.
    """
    names = [name for name in (_embedding_name(model, which) for which in EMBEDDINGS) if name is not None]
    whole = re.compile(rf"{re.escape(_PREFIX)}({'|'.join(map(re.escape, names))})(\.base_layer)?\.weight")
    rows = {tensor.shape[0] for tensors in weights for key, tensor in tensors.items() if whole.fullmatch(key)}
    now = model.get_input_embeddings().weight.shape[0] if names else 0
    if not rows or rows == {now}:
        return None
    if len(rows) > 1:
        raise MismatchError(
            f"The adapters bring embeddings of {sorted(rows)} tokens along, which do not fit one another. Merge one, "
            "and train the other on the result."
        )
    (count,) = rows
    model.resize_token_embeddings(count, mean_resizing=False)
    return int(count)


def _embedding_name(model: Any, which: str) -> str | None:
    wanted = getattr(model, which)()
    return next((name for name, module in model.named_modules() if module is wanted), None)


def attach(model: Any, adapter: str, weights: Mapping[str, torch.Tensor], weight: float, *, empty: bool) -> Updates:
    """Put an adapter on a model, take its layers, and take it off again.

    Modules that the adapter trained as a whole stay in their place in the model.

    Args:
        model: the base model, its modules are used.
        adapter: folder of the adapter.
        weights: its tensors.
        weight: factor of its update.
        empty: the model's tensors have no values.

    Raises:
        MismatchError: the adapter is of another model.
        ConfigError: the update cannot be weighed.
    """
    own = [(module, key, value) for module in model.modules() for key, value in module._parameters.items()]
    adapted = _load(model, adapter, empty)
    _check_fit(adapted, adapter, weights)
    found = Updates()
    for module, key, value in own:
        loaded = module._parameters.get(key)
        if empty and loaded is not value and loaded is not None:
            module._parameters[key] = value
            found.given.append((module, key, loaded.detach()))
    whole = [name for name, module in adapted.named_modules() if isinstance(module, ModulesToSaveWrapper)]
    found.whole = {name.removeprefix(_PREFIX) for name in whole}
    embeddings = {_embedding_name(model, which) for which in EMBEDDINGS}  # which PEFT saves as they were, too
    brought = (key for key in adapted.get_base_model().state_dict() if f"{_PREFIX}{key}" in weights)
    modules = {key.replace(".base_layer", "").rpartition(".")[0] for key in brought if ".lora_" not in key}
    found.whole |= modules - embeddings
    for name, module in adapted.named_modules():
        if isinstance(module, BaseTunerLayer):
            _weigh(module, weight, adapter, name)
            base = module.get_base_layer()
            found.layers.append(Layer(module, base, name.removeprefix(_PREFIX), adapter))
            if isinstance(base, nn.MultiheadAttention) and empty:
                raise ConfigError(
                    f"{name!r} is a MultiheadAttention, whose weights PEFT merges as one with those of a module "
                    "inside. Use the in-memory way (in_memory=True, on the command line --in-memory)."
                )
    if weight != 1.0 and (whole or found.given):
        raise ConfigError(
            f"'{adapter}' trained modules as a whole ({(whole or ['biases or embeddings'])[0]!r}), which have no "
            f"update that could be weighed by {weight}. Use the weight 1."
        )
    adapted.unload()
    return found


def apply(model: Any, weights: Mapping[str, Mapping[str, torch.Tensor]], factors: Mapping[str, float]) -> Any:
    """Return a model that runs with adapters: one of factor 1 beside it, several merged into it.

    Args:
        model: the base model with its weights.
        weights: of the adapters, by folder.
        factors: of their updates.
    """
    if list(factors.values()) == [1.0]:
        (adapter,) = factors
        return _load(model, adapter, False).eval()
    for adapter, factor in factors.items():
        found = attach(model, adapter, weights[adapter], factor, empty=False)
        part_tied(model, [found])
        merge_layers(found.layers)
    return model.float()


def _load(model: Any, adapter: str, empty: bool) -> PeftModel:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found missing adapter keys")  # an error later on
            return PeftModel.from_pretrained(model, adapter, low_cpu_mem_usage=empty, torch_device="cpu")
    except (ConfigError, ArtifactError, MemoryError):
        raise  # the adapter's own configuration is at fault, not the base
    except Exception as error:  # whatever PEFT makes of a configuration that may hold anything
        raise MismatchError(
            f"The adapter '{adapter}' does not fit the base ({error}). Give the base that it was trained on."
        ) from error


def _check_fit(adapted: PeftModel, adapter: str, weights: Mapping[str, torch.Tensor]) -> None:
    """PEFT passes over tensors that have no place in the model, and over places that have no tensor."""
    places = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    # Besides its own, an adapter may bring tensors of the base along.
    base = {f"{_PREFIX}{name}" for name in adapted.get_base_model().state_dict()}
    # Saving embeddings, PEFT writes those of `modules_to_save` a second and a third time.
    surplus = {key for key in set(weights) - places - base if _REPEATED.sub("", key) not in places}
    unlike = sorted((places - set(weights)) | surplus)
    if unlike:
        raise MismatchError(
            f"The adapter '{adapter}' does not fit the base: {len(unlike)} tensors have no counterpart, the first is "
            f"{unlike[0]!r}. Give the base that it was trained on."
        )


def _weigh(tuner: Any, weight: float, adapter: str, name: str) -> None:
    if weight == 1.0:
        return
    if not _adds(tuner):
        kind = "DoRA or another variant" if isinstance(tuner, LoraLayer) else type(tuner).__name__
        raise ConfigError(
            f"{name!r} of '{adapter}' is {kind}, whose update cannot be weighed by {weight}. Use the weight 1."
        )
    for key in tuner.scaling:
        tuner.scaling[key] *= weight


def check_together(updates: list[Updates], adapters: Iterable[str]) -> None:
    """Check that several adapters can be merged one after another.

    Raises:
        ConfigError: the order would count.
    """
    if len(updates) < 2:
        return
    changed: dict[str, str] = {}
    kept: dict[str, str] = {}
    for found, adapter in zip(updates, adapters, strict=True):
        special = [layer.name for layer in found.layers if not _adds(layer.tuner)]
        if special:
            raise ConfigError(
                f"{special[0]!r} of '{adapter}' does not add to the weights (DoRA, another variant, trained tokens), "
                "so several adapters cannot be merged with it. Merge it alone."
            )
        own = {layer.name for layer in found.layers} | found.whole
        twice = sorted((found.whole & changed.keys()) | (own & kept.keys()))
        if twice:
            raise ConfigError(
                f"'{adapter}' and '{changed[twice[0]]}' both change {twice[0]!r}, and one of them brings it along as a "
                "whole, so the other's work would be lost. Merge one, and train the other on the result."
            )
        changed.update(dict.fromkeys(own, adapter))
        kept.update(dict.fromkeys(found.whole, adapter))


def part_tied(model: Any, updates: Iterable[Updates]) -> dict[str, torch.Tensor]:
    """Give the head, or the embedding, weights of its own where an update changes one of the two and they are tied.

    While it runs, an update changes what its module does, and not what another one does with the same weights. PEFT
    merges it into both (and into both twice where `ensure_weight_tying` puts it on both), with a warning.

    Args:
        model: the model, without the adapters.
        updates: of the adapters.

    Returns:
        The name of each tensor that was parted, with the one that it shared.

    Raises:
        ConfigError: other modules share weights in a way that a checkpoint cannot tell.
    """
    owners: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for prefix, module in model.named_modules():
        for key, value in module._parameters.items():
            if value is not None:
                owners.setdefault(id(value), []).append((f"{prefix}.{key}" if prefix else key, module, key))
    embeddings = [getattr(model, which)() for which in EMBEDDINGS]
    found: dict[str, torch.Tensor] = {}
    for layer in (layer for update in updates for layer in update.layers):
        if not isinstance(layer.tuner, LoraLayer):
            continue  # trained tokens are those of both
        for key, value in list(layer.module._parameters.items()):
            sharing = owners.get(id(value), [])
            if value is None or len(sharing) < 2 or not any(module is layer.module for _, module, _ in sharing):
                continue
            if len(sharing) > 2 or not all(any(module is one for one in embeddings) for _, module, _ in sharing):
                others = sorted(name for name, module, _ in sharing if module is not layer.module)
                raise ConfigError(
                    f"'{layer.adapter}' changes {layer.name!r}, whose weights are also those of {others}, and in no "
                    "checkpoint of this architecture could the two differ. Serve the adapter beside its base "
                    "(export_lora)."
                )
            name = next(name for name, module, _ in sharing if module is layer.module)
            part = value.data if value.data.stride() == (0,) * value.ndim else value.data.clone()
            layer.module._parameters[key] = nn.Parameter(part, requires_grad=False)
            owners[id(value)] = [entry for entry in sharing if entry[0] != name]
            found[name] = value
    return found


def _adds(tuner: Any) -> bool:
    """Whether the merged weights are the base's plus something."""
    variants = tuner.lora_variant.values() if isinstance(tuner, LoraLayer) else [tuner]
    return all(isinstance(variant, FusedLinearVariant) for variant in variants)


def merge_layers(layers: Iterable[Layer]) -> None:
    """Merge layers into their modules, with half-precision weights in float32 meanwhile, which they stay.

    Raises:
        ArtifactError: the result is not finite.
    """
    for layer in layers:
        for value in layer.module._parameters.values():
            if value is not None and value.dtype in _HALF:
                value.data = value.data.float()
        try:
            # Without a model around it nothing says which adapter is active but the layer itself.
            layer.tuner.merge(safe_merge=True)
        except ValueError as error:  # the check of safe_merge
            raise ArtifactError(
                f"Merging '{layer.adapter}' into {layer.name!r} gives NaN or infinity ({error}). One of the two holds "
                "such values, or the update is too large; train again with a lower learning rate."
            ) from error
