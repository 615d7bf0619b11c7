"""Reading an adapter's folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .artifact import read_json
from .errors import ArtifactError
from .reading import MEGATRON, check_inside, check_regular, parse_json, read_text

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
EDIT_FILE = "edit.json"
EDIT_SCHEMA, EDIT_SCHEMA_VERSION = "peft_sae.edit", 1
_LARGEST_RECORD = 2**27  # bytes
_LARGEST_FACTOR = 1e300  # also keeps NaN and infinity out
_WEIGHT_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
MERGEABLE_TYPES = ("SAE_SUBSPACE", "LORA")


def read_adapter_config(adapter: str | Path) -> dict[str, Any]:
    """Return the configuration of an adapter that this package can export.

    Raises:
        ArtifactError: the folder is no adapter, its weights are missing or not safetensors, it is of a type that is
            neither ours nor LoRA, or it names code to import.
    """
    folder = Path(adapter)
    path = folder / CONFIG_FILE
    if not path.is_file():
        merged = (folder / "config.json").is_file()
        whole = " It holds a whole model, perhaps a merged checkpoint, in which an update is no longer apart."
        raise ArtifactError(
            f"'{folder}' has no {CONFIG_FILE}, so it is no adapter.{whole if merged else ''} Give the folder that an "
            "adapter's `save_pretrained` wrote."
        )
    check_inside(path, folder)
    try:
        config = parse_json(read_text(path))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"'{path}' cannot be read as JSON ({error}). Save the adapter again.") from error
    found = config.get("peft_type") if isinstance(config, dict) else None
    if found not in MERGEABLE_TYPES:
        raise ArtifactError(
            f"'{folder}' is an adapter of type {found!r}, and only {', '.join(MERGEABLE_TYPES)} can be handled here."
        )
    check_no_code(config)
    if not (folder / WEIGHTS_FILE).is_file():
        raise ArtifactError(
            f"'{folder}' has no {WEIGHTS_FILE}. Pickled weights (adapter_model.bin) are never read: save the adapter "
            "with safe_serialization=True."
        )
    return dict(config)


def check_no_code(config: Mapping[str, Any]) -> None:
    """Refuse a configuration in which PEFT would find the name of a module to import.

    Raises:
        ArtifactError: it names one.
    """
    named = config.get("megatron_core")
    if named not in (None, MEGATRON):
        raise ArtifactError(
            f"megatron_core={str(named)[:80]!r} names a module to import, and no code is run for a file's sake. Set it "
            f"to {MEGATRON!r}."
        )


def read_adapter_weights(adapter: str | Path) -> dict[str, torch.Tensor]:
    """Return the tensors of an adapter.

    Raises:
        ArtifactError: the file is damaged, or a tensor holds NaN or infinity.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(adapter) / WEIGHTS_FILE
    check_inside(path, Path(adapter))
    try:
        check_regular(path)
        tensors: dict[str, torch.Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"'{path}' cannot be read ({error}); it is damaged or truncated. Save it again.") from error
    unusable = sorted({str(t.dtype) for t in tensors.values()} - {str(dtype) for dtype in _WEIGHT_DTYPES})
    if unusable:
        raise ArtifactError(f"'{path}' holds {unusable}, and weights are float32, float64, float16 or bfloat16.")
    broken = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise ArtifactError(f"'{path}' holds NaN or infinity in {broken[:3]}. The training diverged; train again.")
    return tensors


def read_edits(adapter: str | Path) -> list[dict[str, Any]]:
    """Return the edits that made an adapter, the first one first; an adapter that was never edited has none.

    Every edit has `parent_digest` and `digest` (SHA-256 of the weights before and after), `features` (name, SAE and
    `factor`: what is left of it, 0 if it was removed), `kind` (`scale`, of which removing is a case, or `keep`),
    `saes`, `base_model`, `versions`, `modules` (what it did to each), `notes`, and `left_out` (files that were
    not copied).

    Raises:
        ArtifactError: the record is damaged, or of a newer schema.
    """
    path = Path(adapter) / EDIT_FILE
    if not path.is_symlink() and not path.exists():
        return []
    if not path.is_file() or path.stat().st_size > _LARGEST_RECORD:
        raise ArtifactError(f"'{path}' is no record of edits, so earlier edits are not known. Copy the adapter again.")
    edits = read_json(path, schema=EDIT_SCHEMA, newest=EDIT_SCHEMA_VERSION).get("edits")
    known = isinstance(edits, list) and all(
        isinstance(edit, dict)
        and isinstance(edit.get("digest"), str)
        and edit.get("kind") in ("scale", "keep")
        and isinstance(edit.get("features"), list)
        and all(_is_edited_feature(one) for one in edit["features"])
        for edit in edits
    )
    if not known or not edits:
        raise ArtifactError(f"'{path}' is malformed, so earlier edits are not known. Copy the adapter again.")
    return list(edits)


def _is_edited_feature(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        return False
    factor = entry.get("factor")
    return isinstance(factor, (int, float)) and not isinstance(factor, bool) and abs(factor) < _LARGEST_FACTOR
