"""Reading an adapter's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from .errors import ArtifactError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_WEIGHT_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
MERGEABLE_TYPES = ("SAE_SUBSPACE", "LORA")


def read_adapter_config(adapter: str | Path) -> dict[str, Any]:
    """Return the configuration of an adapter that this package can export.

    Raises:
        ArtifactError: the folder is no adapter, its weights are missing or not safetensors, or it is of a type that
            is neither ours nor LoRA.
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
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"'{path}' cannot be read as JSON ({error}). Save the adapter again.") from error
    found = config.get("peft_type") if isinstance(config, dict) else None
    if found not in MERGEABLE_TYPES:
        raise ArtifactError(
            f"'{folder}' is an adapter of type {found!r}, and only {', '.join(MERGEABLE_TYPES)} can be handled here."
        )
    if not (folder / WEIGHTS_FILE).is_file():
        raise ArtifactError(
            f"'{folder}' has no {WEIGHTS_FILE}. Pickled weights (adapter_model.bin) are never read: save the adapter "
            "with safe_serialization=True."
        )
    return dict(config)


def read_adapter_weights(adapter: str | Path) -> dict[str, torch.Tensor]:
    """Return the tensors of an adapter.

    Raises:
        ArtifactError: the file is damaged, or a tensor holds NaN or infinity.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(adapter) / WEIGHTS_FILE
    try:
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
