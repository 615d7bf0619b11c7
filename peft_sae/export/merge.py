"""A merged checkpoint that knows nothing of adapters."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapter import read_adapter_config, read_adapter_weights
from ..artifact import check_target, replace_folder
from ..checkpoint import load_base
from ..errors import ArtifactError, ConfigError, MismatchError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


def merge_checkpoint(
    base: str | Path,
    adapter: str | Path,
    output: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    max_shard_size: str = "5GB",
) -> Path:
    """Merge an adapter into its base model and write a plain checkpoint with its tokenizer.

    The model is loaded into memory and merged by PEFT with its check for NaN. The output folder appears when it is
    complete,
    or not at all.

    Args:
        base: folder or Hub id of the base model.
        adapter: folder of the adapter, ours or a plain LoRA.
        output: folder to write; missing or empty. What exists is never overwritten.
        dtype: dtype of the merged checkpoint, for example `"bfloat16"`; by default that of the base.
        max_shard_size: as in `PreTrainedModel.save_pretrained`.

    Returns:
        The output folder.

    Raises:
        ArtifactError: base or adapter cannot be read, or the output cannot be written.
        MismatchError: the adapter is of another model.
        ConfigError: the adapter's configuration is damaged.
    """
    check_target(output)
    read_adapter_config(adapter)
    weights = read_adapter_weights(adapter)
    with replace_folder(output) as folder:
        merged = _merge(load_base(base, dtype=dtype or "auto"), base, adapter, weights)
        merged.save_pretrained(folder, max_shard_size=max_shard_size)
        _copy_tokenizer(base, folder)
    return Path(output)


def _merge(model: Any, base: str | Path, adapter: str | Path, weights: Mapping[str, torch.Tensor]) -> Any:
    from peft import PeftModel, get_peft_model_state_dict

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found missing adapter keys")  # an error below
            adapted = PeftModel.from_pretrained(model, str(adapter))
    except ConfigError:
        raise  # the adapter's own configuration is at fault, not the base
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise MismatchError(
            f"The adapter '{adapter}' does not fit the base '{base}' ({error}). Give the base that it was trained on."
        ) from error
    # PEFT passes over tensors that have no place in the model, and over places that have no tensor.
    unlike = sorted(set(weights) ^ set(get_peft_model_state_dict(adapted)))
    if unlike:
        raise MismatchError(
            f"The adapter '{adapter}' does not fit the base '{base}': {len(unlike)} tensors have no counterpart, the "
            f"first is {unlike[0]!r}. Give the base that it was trained on."
        )
    try:
        return adapted.merge_and_unload(safe_merge=True)
    except ValueError as error:  # the check of safe_merge
        raise ArtifactError(
            f"Merging '{adapter}' into '{base}' gives NaN or infinity ({error}). One of the two holds such values, or "
            "the update is too large; train again with a lower learning rate."
        ) from error


def _copy_tokenizer(base: str | Path, folder: Path) -> None:
    import transformers

    try:
        transformers.AutoTokenizer.from_pretrained(base, trust_remote_code=False).save_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        logger.warning("The base '%s' has no tokenizer that could go along (%s).", base, error)
