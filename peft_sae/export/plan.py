"""Which tensors belong together when a checkpoint is merged piece by piece."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import ArtifactError
from .conversion import Conversion, Group, check_complete
from .tensor_file import StoredTensor, size_of
from .updates import EMBEDDINGS, Layer, Updates

Shaped = tuple[tuple[int, ...], torch.dtype]


@dataclass(eq=False)
class Unit:
    """Tensors that can be merged without any other.

    Attributes:
        names: in the model.
        groups: what makes them.
        layers: what changes them.
        outputs: what of it is written.
    """

    names: list[str] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)
    layers: list[Layer] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)


@dataclass(eq=False)
class Plan:
    """What is written, and what from.

    Attributes:
        units: in the order of the base's files.
        outputs: shape and dtype of the tensors of the merged checkpoint.
        values: tensors of the model that do not come from the base.
        places: for a tensor that the base gives, the names that it has in the model with the adapters. A trained copy
            may have taken its place under one of two names that were tied.
        saved: names in the model that are written (of tied ones only one is).
        dtypes: by name in the model, of what is written.
        parameters: number of the model's parameters.
    """

    units: list[Unit]
    outputs: dict[str, Shaped]
    values: dict[str, torch.Tensor]
    places: dict[str, list[str]]
    saved: set[str]
    dtypes: dict[str, torch.dtype]
    parameters: int

    @property
    def size(self) -> int:
        """Bytes of the tensors."""
        return sum(size_of(*shaped) for shaped in self.outputs.values())


def make_plan(
    model: Any,
    conversion: Conversion,
    stored: Mapping[str, StoredTensor],
    updates: Iterable[Updates],
    own: Mapping[str, torch.Tensor],
    parted: Mapping[str, torch.Tensor],
    dtype: torch.dtype | None,
) -> Plan:
    """Plan how a model whose weights take no memory is merged.

    Args:
        model: the model, without the adapters.
        conversion: between it and the checkpoint.
        stored: the checkpoint.
        updates: of the adapters.
        own: the tensors that the model had before the adapters.
        parted: names of tensors that have been parted from one of these, see `part_tied`.
        dtype: of what is written; None for that of the base.

    Raises:
        ArtifactError: tensors are missing, or transformers would write others than are planned.
    """
    tensors, known = model.state_dict(keep_vars=True), {id(tensor) for tensor in own.values()}
    values = {
        name: tensor.detach() for name, tensor in tensors.items() if id(tensor) not in known and name not in parted
    }
    modules = {id(module): name for name, module in model.named_modules()}
    for found in updates:
        for module, key, value in found.given:
            if id(module) in modules:  # else a trained copy has taken its place
                values[f"{modules[id(module)]}.{key}"] = value
    by_object: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        by_object.setdefault(id(tensor), []).append(name)
    for names in by_object.values():  # what an adapter gives for one of tied tensors counts for all
        for name in names:
            values.update({other: values[name] for other in names if name in values and other not in values})
    by_origin: dict[int, list[str]] = {}  # as before what was tied was parted
    for name, tensor in tensors.items():
        by_origin.setdefault(id(parted.get(name, tensor)), []).append(name)
    places = {
        target: [name for name in by_origin.get(id(own[target]), ()) if name not in values]
        for group in conversion.groups
        for target in group.targets
    }
    groups = [group for group in conversion.groups if any(places[target] for target in group.targets)]
    check_complete(set(tensors) - set(values) - {name for names in places.values() for name in names})
    saved = _without_tied(model, by_object)
    dtypes = _base_dtypes(tensors, conversion, stored, places) if dtype is None else output_dtypes(model, dtype)
    layers = [layer for found in updates for layer in found.layers]
    units = _make_units(by_object.values(), groups, layers, modules, places, tensors)
    outputs: dict[str, Shaped] = {}
    for unit in units:
        made = conversion.save(_empty(unit.names, tensors, dtypes, saved))
        unit.outputs = list(made)
        outputs.update({name: (tuple(tensor.shape), tensor.dtype) for name, tensor in made.items()})
    whole = conversion.save(_empty(tensors, tensors, dtypes, saved))
    if {name: tuple(tensor.shape) for name, tensor in whole.items()} != {
        name: shape for name, (shape, _) in outputs.items()
    }:
        raise ArtifactError(
            "transformers joins tensors of this architecture that do not belong to one module, so they cannot be "
            "merged one after another. Use the in-memory way (in_memory=True, on the command line --in-memory)."
        )
    order = {name: place for place, name in enumerate(stored)}
    units.sort(key=lambda unit: min((order[name] for group in unit.groups for name in group.names), default=-1))
    parameters = sum(tensors[names[0]].numel() for names in by_object.values())
    return Plan(units, {name: outputs[name] for name in whole}, values, places, saved, dtypes, parameters)


def _without_tied(model: Any, by_object: Mapping[int, list[str]]) -> set[str]:
    """Names that are written: of those that share a tensor the one that transformers expects."""
    copies = set(getattr(model, "all_tied_weights_keys", None) or {})
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    kept = set()
    for names in by_object.values():
        first = [name for name in names if name not in copies] or names[:1]
        kept |= set(first if len(names) > 1 else names) - ignored
    return kept


def output_dtypes(model: Any, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Return the dtype that each tensor of a model has in a checkpoint of another dtype: some stay in float32."""
    exceptions = model._get_dtype_plan(dtype)
    found = {}
    for name, tensor in model.state_dict().items():
        kept = next((wanted for key, wanted in exceptions.items() if re.search(key.replace("*", ".*"), name)), dtype)
        found[name] = kept if tensor.is_floating_point() else tensor.dtype
    return found


def _base_dtypes(
    tensors: Mapping[str, torch.Tensor],
    conversion: Conversion,
    stored: Mapping[str, StoredTensor],
    places: Mapping[str, list[str]],
) -> dict[str, torch.dtype]:
    """The dtype of every tensor as it is stored; what the base lacks takes the one that most have."""
    known = {
        name: stored[group.names[0]].dtype
        for group in conversion.groups
        for target in group.targets
        for name in (target, *places[target])
    }
    floats = [dtype for dtype in known.values() if dtype.is_floating_point] or [torch.float32]
    usual = max(set(floats), key=floats.count)
    return {
        name: known.get(name, usual if tensor.is_floating_point() else tensor.dtype) for name, tensor in tensors.items()
    }


def is_tied(model: Any) -> bool:
    """Return whether input and output embeddings are one tensor."""
    inner, outer = (getattr(getattr(model, which)(), "weight", None) for which in EMBEDDINGS)
    return inner is not None and inner is outer


def _empty(
    names: Iterable[str],
    tensors: Mapping[str, torch.Tensor],
    dtypes: Mapping[str, torch.dtype],
    saved: set[str],
) -> dict[str, torch.Tensor]:
    return {
        name: torch.empty(tensors[name].shape, dtype=dtypes[name], device="meta") for name in names if name in saved
    }


def _make_units(
    tied: Iterable[list[str]],
    groups: Iterable[Group],
    layers: Iterable[Layer],
    modules: Mapping[int, str],
    places: Mapping[str, list[str]],
    tensors: Mapping[str, torch.Tensor],
) -> list[Unit]:
    """Join what shares a tensor, is made together, or is changed by one layer."""
    groups, layers = list(groups), list(layers)
    changed = [[f"{modules[id(layer.module)]}.{key}" for key in layer.module._parameters] for layer in layers]
    changed = [[name for name in names if name in tensors] for names in changed]
    leader = {name: name for name in tensors}

    def find(name: str) -> str:
        while leader[name] != name:
            leader[name] = name = leader[leader[name]]
        return name

    made = [[name for target in group.targets for name in places[target]] for group in groups]
    for names in [*tied, *made, *changed]:
        for name in names[1:]:
            leader[find(name)] = find(names[0])
    units: dict[str, Unit] = {}
    for name in tensors:
        units.setdefault(find(name), Unit()).names.append(name)
    for group, names in zip(groups, made, strict=True):
        units[find(names[0])].groups.append(group)
    for layer, names in zip(layers, changed, strict=True):
        units[find(names[0])].layers.append(layer)
    return list(units.values())
