"""Which tensors of a checkpoint make which tensors of a model, and back.

transformers renames, joins and splits tensors between the two (experts of a mixture, for one). Its own transforms are
used, on a few tensors at a time instead of on all.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import ArtifactError, MismatchError
from .tensor_file import StoredTensor


@dataclass(eq=False)
class Group:
    """Tensors of a checkpoint that together make some of a model.

    Attributes:
        transform: what makes them, of transformers; None where one tensor becomes one, unchanged.
        sources: for each tensor of the checkpoint its name, its name in the model and the pattern that found it.
        targets: names in the model.
    """

    transform: Any
    sources: list[tuple[str, str, str]] = field(default_factory=list)
    targets: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        """The tensors of the checkpoint."""
        return [source for source, _, _ in self.sources]


class Conversion:
    """The way between a checkpoint and a model.

    Args:
        model: a model of transformers; its tensors may be on the meta device.
        stored: the tensors of the checkpoint.

    Attributes:
        groups: what makes the model's tensors.
        unknown: names in the checkpoint that have no place in the model.

    Raises:
        MismatchError: a tensor has another shape than in the model.
        ArtifactError: the tensors cannot be put together.
    """

    def __init__(self, model: Any, stored: Mapping[str, StoredTensor]) -> None:
        self._model = model
        self._stored = stored
        self.groups: list[Group] = []
        self.unknown: list[str] = []
        transforms = self._find_groups()
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        for group in self.groups:
            made = self.load(group, lambda name: _empty(stored[name].shape, stored[name].dtype))
            group.targets = tuple(name for name in made if name in shapes)
            for name in group.targets:
                if made[name].shape != shapes[name]:
                    raise MismatchError(
                        f"{name!r} has the shape {tuple(made[name].shape)} in the checkpoint, and "
                        f"{tuple(shapes[name])} fits its configuration: it is damaged, or config.json is of another "
                        "model. Get the checkpoint again."
                    )
        # As after `from_pretrained`, which is what transformers goes by when it saves.
        model._weight_conversions = [transform for transform in transforms if transform.was_used()]

    def _find_groups(self) -> list[Any]:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )

        transforms = list(get_model_conversion_mapping(self._model))
        renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
        by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
        known, prefix = self._model.state_dict(), self._model.base_model_prefix
        groups: dict[str, Group] = {}
        for name in sorted(self._stored, key=dot_natural_key):
            target, pattern = rename_source_key(name, renamings, converters, prefix, known)
            if target not in known and name in known:  # it has the model's own name already
                target, pattern = rename_source_key(name, [], [], prefix, known)
            if target not in known:
                self.unknown.append(name)
                continue
            if target not in groups:
                groups[target] = Group(None if pattern is None else by_pattern[pattern])
            elif pattern is None:
                raise ArtifactError(
                    f"{name!r} and {groups[target].names[0]!r} both stand for {target!r} of the model, so it is not "
                    "known which one counts. Use the in-memory way (in_memory=True, on the command line --in-memory)."
                )
            groups[target].sources.append((name, target, pattern or name))
        self.groups = list(groups.values())
        return transforms

    def load(self, group: Group, read: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return tensors of the model by their names.

        Args:
            group: what makes them.
            read: gives a tensor of the checkpoint.

        Raises:
            ArtifactError: the checkpoint's tensors do not fit together.
        """
        if group.transform is None:
            ((source, target, _),) = group.sources
            return {target: read(source)}
        transform = deepcopy(group.transform)
        for source, target, pattern in group.sources:
            transform.add_tensor(target, source, pattern, lambda source=source: read(source))
        try:
            made = transform.convert(group.sources[0][1], model=self._model, config=self._model.config)
        except Exception as error:  # whatever an operation makes of tensors that do not belong together
            raise ArtifactError(
                f"{group.names[0]!r} and {len(group.sources) - 1} more tensors cannot be put together ({error}): some "
                "are missing or of another shape. Get the checkpoint again, or use the in-memory way (in_memory=True, "
                "on the command line --in-memory)."
            ) from error
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def save(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the tensors that a checkpoint has for some of the model, in the order in which they are saved."""
        from transformers.core_model_loading import dot_natural_key, revert_weight_conversion

        if not self._model._weight_conversions:
            return {name: tensors[name] for name in sorted(tensors, key=dot_natural_key)}
        found: dict[str, torch.Tensor] = revert_weight_conversion(self._model, dict(tensors))
        return found


def check_complete(missing: Collection[str]) -> None:
    """Check that every tensor of the model comes from somewhere.

    Args:
        missing: names of those that do not.

    Raises:
        ArtifactError: there are some.
    """
    if missing:
        raise ArtifactError(
            f"The checkpoint lacks {min(missing)!r} ({len(missing)} of the model's tensors in all), so the merged one "
            "would be random there. Get the checkpoint again, or save it with the class that the adapter was trained "
            "on."
        )


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
