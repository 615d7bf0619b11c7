"""The base model without its weights: shapes for everything, values only for the norms.

What a feature looks like to a module depends on the norm between stream and module, and on nothing else of the base. So
an adapter of a model of any size can be inspected from the norms alone, read one by one from the checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import nn

from ..checkpoint import build_skeleton, tensor_files
from ..errors import ArtifactError

_NORM = "norm"
_LARGEST_NORM = 2**20  # elements; a norm has one value per channel


def open_skeleton(base: str | Path) -> nn.Module:
    """Build a causal language model whose weights take no memory, and read its norms from the checkpoint.

    Args:
        base: folder, or Hub id whose files are in the local cache or can be fetched.

    Returns:
        The model in eval mode. Every parameter but those of norms is a zero that is shown in the parameter's shape.

    Raises:
        ArtifactError: the base is not there, or its norms are not among its weights.
    """
    model: nn.Module = build_skeleton(base)
    norms = [name for name, module in model.named_modules() if _is_norm(module)]
    values = _read_norms(base, model, norms)
    for name, module in model.named_modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            full = f"{name}.{key}" if name else key
            given = values.get(full)
            if given is None:  # no memory, and no device that would mean "not loaded"
                given = torch.zeros((), dtype=torch.float32).expand(parameter.shape)
            module._parameters[key] = nn.Parameter(given, requires_grad=False)
        for key, buffer in list(module.named_buffers(recurse=False)):
            module._buffers[key] = torch.zeros((), dtype=buffer.dtype).expand(buffer.shape)
    return model.eval()


def _is_norm(module: nn.Module) -> bool:
    return _NORM in type(module).__name__.lower() and not any(True for _ in module.children())


def _read_norms(base: str | Path, model: nn.Module, norms: list[str]) -> dict[str, torch.Tensor]:
    """Values of the norms' parameters by their names in the model, float32."""
    wanted = {f"{name}.{key}" for name in norms for key, _ in model.get_submodule(name).named_parameters()}
    shapes = {name: model.get_parameter(name).shape for name in wanted}
    found: dict[str, torch.Tensor] = {}
    for name, tensor in _matching(tensor_files(base), wanted, getattr(model, "base_model_prefix", "")):
        if tensor.shape != shapes[name]:
            raise ArtifactError(
                f"The norm {name!r} of '{base}' has the shape {tuple(tensor.shape)}, and {tuple(shapes[name])} fits "
                "its configuration: the checkpoint is damaged or of another model."
            )
        found[name] = tensor.float()
    missing = sorted(wanted - set(found))
    if missing:
        raise ArtifactError(
            f"The weights of '{base}' lack {missing[0]!r} ({len(missing)} of {len(wanted)} norms' parameters), so what "
            "modules behind it read is not known. Give the loaded model with model=..."
        )
    return found


def _matching(files: Mapping[str, Path], wanted: set[str], prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of the checkpoint by their names in the model: a checkpoint of the bare model lacks the prefix."""
    from safetensors import SafetensorError, safe_open

    by_file: dict[Path, list[tuple[str, str]]] = {}
    for name in wanted:
        for key in (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"):
            if key in files:
                by_file.setdefault(files[key], []).append((name, key))
                break
    for path, pairs in by_file.items():
        try:
            with safe_open(path, framework="pt") as file:
                for name, key in pairs:
                    if file.get_slice(key).get_shape() and max(file.get_slice(key).get_shape()) > _LARGEST_NORM:
                        raise ArtifactError(f"'{path}' has a norm {key!r} of an impossible size. It is damaged.")
                    yield name, file.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise ArtifactError(f"'{path}' cannot be read ({error}); it is damaged or truncated.") from error
