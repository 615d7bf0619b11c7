"""A few numbers of an adapter in training, cheap enough to be taken now and then."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel

from ..errors import ConfigError
from ..layout import Side
from ..sae.names import feature_name
from ..tuner.basis import unseen_through_norm
from .groups import feature_groups
from .places import find_places, layout_of
from .source import source_of_model


@dataclass(frozen=True)
class Snapshot:
    """An adapter at one moment.

    Attributes:
        norm: Frobenius norm of all updates together.
        in_basis: share of their energy that lies in the bases they started from; None before the first step.
        shares: for every chosen feature and side, such as `("12:4051", "read")`, the share of the energy of the modules
            nearest to it that lies along it.
    """

    norm: float
    in_basis: float | None
    shares: Mapping[tuple[str, Side], float]

    @property
    def drift(self) -> float | None:
        """The share outside the bases."""
        return None if self.in_basis is None else 1 - self.in_basis


@dataclass(eq=False)
class _Module:
    """What is measured of one module; directions are unit vectors, float32 on the device of its factors."""

    layer: Any
    side: Side
    start: torch.Tensor | None
    features: list[tuple[str, Side]] = field(default_factory=list)
    directions: torch.Tensor | None = None


class SubspaceMonitor:
    """Measures an adapter in a model again and again; where its modules are is found once.

    Args:
        model: a `PeftModel` with an SAE_SUBSPACE adapter that has its Subspace.
        adapter_name: which one; by default the active one.

    Raises:
        ConfigError: the model has no such adapter, or the adapter has no Subspace.
    """

    def __init__(self, model: PeftModel, adapter_name: str | None = None) -> None:
        source = source_of_model(model, adapter_name)
        if source.subspace is None:
            raise ConfigError(
                f"The adapter {source.name!r} has no Subspace at hand, so there is nothing to measure it against. "
                "Build it with subspace=..., or load it from a folder that holds its Subspace."
            )
        self._name = source.name
        groups = feature_groups(source.subspace, [])
        base = model.get_base_model()
        places = find_places(source, base, *layout_of(source, base), [group.sae for group in groups])
        met: dict[tuple[str, Side, str | None], torch.Tensor] = {}
        self._modules: list[_Module] = []
        for place in places:
            layer = base.get_submodule(place.update.name)
            device = layer.lora_A[self._name].weight.device
            if place.side is None or place.sae is None:
                self._modules.append(_Module(layer, "read", None))
                continue
            group = next(group for group in groups if group.sae == place.sae)
            chosen = group.of_kind("chosen")
            key = (place.sae.hook_name, place.side, place.norm_name)
            if key not in met:
                rows = unseen_through_norm(group.directions[chosen], place.norm, place.side)
                met[key] = torch.nn.functional.normalize(rows, dim=-1).float().to(device)
            names = [feature_name(place.sae, int(group.ids[one])) for one in chosen]
            start = None if place.start is None else place.start.float().to(device)
            self._modules.append(
                _Module(layer, place.side, start, [(name, place.side) for name in names], met[key].to(device))
            )

    @torch.no_grad()
    def measure(self) -> Snapshot | None:
        """Return the adapter's numbers, or None if its factors are sharded in a way that hides their values.

        Costs thin products of the factors with the bases and features. With FSDP2 the factors are gathered, so every
        process must call this.
        """
        total, known, inside = 0.0, 0.0, 0.0
        sums: dict[tuple[str, Side], float] = {}
        sizes: dict[tuple[str, Side], float] = {}
        found = list(self._energies())
        if any(entry is None for entry in found):
            return None
        for module, energy, in_start, along in (entry for entry in found if entry is not None):
            total += energy
            if in_start is not None:
                known, inside = known + energy, inside + in_start
            for key, value in zip(module.features, along, strict=True):
                sums[key], sizes[key] = sums.get(key, 0.0) + value, sizes.get(key, 0.0) + energy
        shares = {key: value / sizes[key] if sizes[key] else 0.0 for key, value in sums.items()}
        return Snapshot(total**0.5, inside / known if known else None, shares)

    def _energies(self) -> Iterator[tuple[_Module, float, float | None, list[float]] | None]:
        for module in self._modules:
            factors = (module.layer.lora_A[self._name].weight, module.layer.lora_B[self._name].weight)
            a, b = (_whole(factor) for factor in factors)
            if a is None or b is None:
                yield None
                continue
            a, b, scale = a.float(), b.float(), float(module.layer.scaling[self._name]) ** 2
            energy = scale * float(((a @ a.T) * (b.T @ b)).sum())
            rows = [one for one in (module.start, module.directions) if one is not None]
            along: list[float] = []
            if rows:
                directions = torch.cat(rows)
                seen = (directions @ a.T) @ b.T if module.side == "read" else (directions @ b) @ a
                along = (scale * seen.square().sum(dim=1)).tolist()
            count = 0 if module.start is None else len(module.start)
            yield module, energy, sum(along[:count]) if count else None, along[count:]


def _whole(factor: torch.Tensor) -> torch.Tensor | None:
    """A factor's values, gathered where it is distributed; None if they are not to be had."""
    gather: Any = getattr(factor, "full_tensor", None)
    if gather is not None:
        factor = gather()
    return factor.detach() if factor.ndim == 2 and factor.numel() and not factor.is_meta else None
