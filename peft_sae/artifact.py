"""What artefacts consist of: JSON and safetensors, with a schema, expected sizes and a digest."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from .errors import ArtifactError
from .reading import LARGEST_JSON, check_inside, check_regular, parse_json, read_text
from .writing import check_space

_VERSIONED_PACKAGES = ("peft_sae", "peft", "torch", "transformers", "sae_lens", "transformer_lens")


def package_versions() -> dict[str, str]:
    """Return the versions of the packages that shape an artefact; missing ones are left out."""
    found = {}
    for name in _VERSIONED_PACKAGES:
        try:
            found[name] = version(name.replace("_", "-"))
        except PackageNotFoundError:
            continue
    return found


def looks_like_path(text: str) -> bool:
    """Return whether a text can only be a path, and not the id of a Hub repository."""
    return Path(text).is_absolute() or text.startswith((".", "~")) or text.replace(os.sep, "/").count("/") > 1


def write_json(path: Path, data: Any) -> None:
    """Write `data` as indented JSON with a stable order of keys."""
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_json(path: Path, *, schema: str, newest: int, largest: int = LARGEST_JSON) -> dict[str, Any]:
    """Read the JSON file of an artefact and check its kind and schema version.

    Args:
        path: the file.
        schema: the kind of artefact, as its `schema` entry must say.
        newest: the newest schema version that this code reads.
        largest: bytes that it may have.

    Raises:
        ArtifactError: the file is missing, not JSON, too large, a link out of its folder, of another kind, or of a
            newer schema.
    """
    check_inside(path, path.parent)
    try:
        data = parse_json(read_text(path, largest=largest))
    except FileNotFoundError as error:
        raise ArtifactError(
            f"'{path}' does not exist, so there is no {schema} in '{path.parent}'. Check the path."
        ) from error
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"'{path}' cannot be read as JSON ({error}); it is damaged or truncated. Write it again."
        ) from error
    if not isinstance(data, dict) or data.get("schema") != schema:
        raise ArtifactError(f"'{path}' does not describe a {schema}. Check the path.")
    found = data.get("schema_version")
    if type(found) is not int or not 1 <= found <= newest:
        raise ArtifactError(
            f"'{path}' has schema version {found!r}, and this peft_sae reads versions 1 to {newest}. "
            "Upgrade peft_sae with `pip install -U peft-sae`."
        )
    return data


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors as safetensors; tensors that share memory are written apart.

    Raises:
        ArtifactError: the file cannot be written.
    """
    from safetensors.torch import save_file

    check_space(path.parent, sum(tensor.nbytes for tensor in tensors.values()))
    try:
        save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:
        raise ArtifactError(f"Cannot write '{path}' ({error}). Check the space and the rights there.") from error


def read_tensors(path: Path, expected: Mapping[str, tuple[Sequence[int], torch.dtype]]) -> dict[str, torch.Tensor]:
    """Read tensors from a safetensors file after checking names, shapes and dtypes in its header.

    Args:
        path: the file.
        expected: name to shape and dtype. Every name must be there, and no other.

    Raises:
        ArtifactError: the file is missing, truncated, or a link out of its folder, or a tensor is missing, unexpected,
            of another shape or dtype, or not finite.
    """
    from safetensors import safe_open

    check_inside(path, path.parent)
    try:
        check_regular(path)
        with safe_open(path, framework="pt", device="cpu") as file:
            _check_names(path, set(file.keys()), set(expected))
            for name, (shape, dtype) in expected.items():
                _check_header(path, name, file.get_slice(name), shape, dtype)
            tensors = {name: file.get_tensor(name) for name in expected}
    except FileNotFoundError as error:
        raise ArtifactError(f"'{path}' does not exist, so the folder is incomplete. Write it again.") from error
    except (SafetensorError, OSError) as error:
        if isinstance(error, ArtifactError):
            raise
        raise ArtifactError(
            f"'{path}' cannot be read as safetensors ({error}); it is damaged or truncated. Write it again."
        ) from error
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ArtifactError(f"Tensor '{name}' in '{path}' holds NaN or infinity. Write the file again.")
    return tensors


def _check_names(path: Path, found: set[str], expected: set[str]) -> None:
    missing, surplus = sorted(expected - found), sorted(found - expected)
    if missing or surplus:
        raise ArtifactError(
            f"'{path}' lacks the tensors {missing} and has unexpected ones {surplus}; it does not fit "
            "the JSON file beside it. Write the folder again."
        )


_HEADER_DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.int64: "I64"}


def _check_header(path: Path, name: str, header: Any, shape: Sequence[int], dtype: torch.dtype) -> None:
    if list(header.get_shape()) != list(shape) or header.get_dtype() != _HEADER_DTYPES[dtype]:
        raise ArtifactError(
            f"Tensor '{name}' in '{path}' is {header.get_dtype()} {list(header.get_shape())}, and "
            f"{_HEADER_DTYPES[dtype]} {list(shape)} was expected. Write the folder again."
        )


def digest(tensors: Mapping[str, torch.Tensor], description: Any = None) -> str:
    """Return the SHA-256 of named tensors and of JSON-serialisable data, as 64 hexadecimal digits."""
    sha = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        sha.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()
