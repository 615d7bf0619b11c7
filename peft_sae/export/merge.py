"""A merged checkpoint that knows nothing of adapters."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapter import read_adapter_config
from ..checkpoint import CONFIG_NAME, base_folder
from ..errors import ArtifactError, ConfigError, suggest
from ..writing import check_space, check_target, replace_folder
from .companions import copy_companions, copy_tokenizer

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

_PATTERN = "model{suffix}.safetensors"
_INDEX = "model.safetensors.index.json"
_DTYPES = ("float32", "bfloat16", "float16", "float64")
Adapters = str | Path | Sequence[str | Path] | Mapping[Any, float]


def merge_checkpoint(
    base: str | Path,
    adapter: Adapters,
    output: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    max_shard_size: str | int = "5GB",
    in_memory: bool = False,
    progress: bool = False,
) -> Path:
    """Merge adapters into their base model and write a plain checkpoint with its tokenizer.

    The weights are read, merged and written one module at a time, so that memory holds the largest module that an
    adapter changes and no model. Half-precision weights are merged in float32 and rounded once. In float32 the result
    equals PEFT's `merge_and_unload` and transformers' `save_pretrained` bit for bit, with one exception: where an
    update changes the head or the embedding of a model that ties the two, PEFT merges it into both. Here the other one
    stays as it is, as in the adapted model, so the merged model ties them no more. Configuration, tokenizer, chat
    template and code files are copied as they are (the tokenizer from the adapter, if it was saved with one). The
    output folder appears when it is complete, or not at all.

    Args:
        base: folder or Hub id of the base model, in safetensors.
        adapter: folder or Hub id of the adapter, ours or a plain LoRA. Several are merged one after another; a mapping
            gives each a factor, W + sum of factor times update.
        output: folder to write; missing or empty. What exists is never overwritten.
        dtype: dtype of the merged checkpoint, for example `"bfloat16"`; by default each tensor keeps that of the base.
        max_shard_size: largest size of one file, as in `PreTrainedModel.save_pretrained`.
        in_memory: load the whole model and let PEFT merge it: for what cannot be merged piece by piece, such as a
            quantised base.
        progress: show a progress bar.

    Returns:
        The output folder.

    Raises:
        ArtifactError: base or adapter cannot be read, or the output cannot be written.
        MismatchError: the adapter is of another model.
        ConfigError: an adapter's configuration is damaged, or an argument or a combination of adapters cannot work.
    """
    check_target(output)
    limit, wanted = _shard_size(max_shard_size), _dtype(dtype)
    factors = factors_of(adapter)
    from .updates import read_adapters

    weights = read_adapters(factors)
    source = base_folder(base)
    _check_apart(Path(output), [source, *map(Path, factors)])
    _tell_other_base(base, factors)
    quantised = _quantisation(source)
    if quantised is not None and not in_memory:
        raise ConfigError(
            f"The base '{base}' is quantised ({quantised}), and merging would round its weights to few bits again. "
            "Give the base that it was made from; or merge in memory (in_memory=True, on the command line "
            "--in-memory), with dtype='bfloat16' for a result that is not quantised."
        )
    with replace_folder(output) as folder:
        if in_memory:
            from .in_memory import merge_in_memory

            copy_companions(source, folder, {})
            merge_in_memory(source, weights, factors, wanted, folder, limit)
        else:
            changes = _merge_streamed(source, weights, factors, wanted, folder, limit, progress)
            copy_companions(source, folder, changes)
        copied = [name for name in factors if copy_tokenizer(Path(name), folder)]
        if copied:
            logger.info("The tokenizer is that of the adapter '%s'.", copied[-1])
    return Path(output)


def _check_apart(output: Path, sources: Iterable[Path]) -> None:
    """Refuse an output within what is read: a base that holds another model is none that loaders understand."""
    for source in sources:
        if source.resolve() in output.resolve().parents:
            raise ConfigError(
                f"The output '{output}' lies inside '{source}', which is read and stays as it is. Choose a folder "
                "beside it."
            )


def _tell_other_base(base: str | Path, adapters: Iterable[str]) -> None:
    """Warn of adapters that name another base; whoever keeps a copy of it calls the folder alike."""
    for adapter in adapters:
        named = read_adapter_config(adapter).get("base_model_name_or_path")
        if isinstance(named, str) and named and Path(named).name != Path(base).resolve().name:
            logger.warning(
                "The adapter '%s' was trained on %r, and is merged into '%s'. If that is another model and no copy, "
                "the result is of no use.",
                adapter,
                named,
                base,
            )


def _merge_streamed(
    source: Path,
    weights: Mapping[str, Mapping[str, torch.Tensor]],
    factors: Mapping[str, float],
    dtype: torch.dtype | None,
    folder: Path,
    limit: int,
    progress: bool,
) -> dict[str, Any]:
    import torch
    from huggingface_hub import split_torch_state_dict_into_shards
    from tqdm import tqdm

    from .stream import StreamedMerge, write_index

    merge = StreamedMerge(source, weights, factors, dtype)
    plan = merge.plan
    if merge.unknown:
        logger.warning(
            "%d tensors of '%s' have no place in its class and are left out, as `save_pretrained` does; the first is "
            "%r.",
            len(merge.unknown),
            source,
            merge.unknown[0],
        )
    check_space(folder, plan.size)
    shaped = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in plan.outputs.items()}
    split = split_torch_state_dict_into_shards(shaped, filename_pattern=_PATTERN, max_shard_size=limit)
    with tqdm(total=plan.size, unit="B", unit_scale=True, desc="Merging", disable=not progress) as bar:
        for count in merge.write(folder, split.filename_to_tensors):
            bar.update(count)
    if split.is_sharded:
        write_index(folder / _INDEX, split.tensor_to_filename, size=plan.size, parameters=plan.parameters)
    changes: dict[str, Any] = {}
    if merge.tokens is not None:
        changes["vocab_size"] = merge.tokens
    if merge.tied is False:
        changes["tie_word_embeddings"] = False
    if dtype is not None:
        changes["dtype"] = str(dtype).removeprefix("torch.")
    return changes


def factors_of(adapter: Adapters) -> dict[str, float]:
    """Return the folders of adapters and the factors of their updates.

    Raises:
        ConfigError: there is none, or a factor is no finite number.
        ArtifactError: one is neither a folder nor to be had from the Hub.
    """
    if isinstance(adapter, Mapping):
        found = {str(name): factor for name, factor in adapter.items()}
    else:
        names: Iterable[str | Path] = [adapter] if isinstance(adapter, (str, Path)) else adapter
        found = dict.fromkeys(map(str, names), 1.0)
        if not isinstance(adapter, (str, Path)) and len(found) < len(adapter):
            raise ConfigError(f"adapter={[str(name) for name in adapter]} names one twice. Give a factor of 2 instead.")
    if not found:
        raise ConfigError(f"adapter={adapter!r} names no adapter, so there is nothing to merge. Give a folder.")
    for name, factor in found.items():
        if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not math.isfinite(factor):
            raise ConfigError(f"The factor {factor!r} of '{name}' is no finite number. Use for example 0.5.")
    return {str(base_folder(name, what="adapter")): float(factor) for name, factor in found.items()}


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    import torch

    name = None if dtype is None else str(dtype).removeprefix("torch.")
    if name is None:
        return None
    if name not in _DTYPES:
        raise ConfigError(
            f"dtype={str(dtype)!r} is none that weights are merged in.{suggest(name, _DTYPES)} Use one of "
            f"{', '.join(_DTYPES)}."
        )
    return getattr(torch, name)  # type: ignore[no-any-return]


def _shard_size(size: str | int) -> int:
    from huggingface_hub.serialization._base import parse_size_to_int

    try:
        found = size if isinstance(size, int) else parse_size_to_int(size)
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"max_shard_size={size!r} is no size ({error}). Use for example '5GB'.") from error
    if found < 1:
        raise ConfigError(f"max_shard_size={size!r} has no room for anything. Use for example '5GB'.")
    return found


def _quantisation(base: Path) -> str | None:
    """The method that a checkpoint is quantised by."""
    try:
        config = json.loads((base / CONFIG_NAME).read_text(encoding="utf-8"))
        found = config.get("quantization_config") or config.get("compression_config")
    except (OSError, ValueError, RecursionError, AttributeError) as error:
        raise ArtifactError(
            f"'{base}' has no {CONFIG_NAME} that could be read ({error}), so it is no model. Check the path."
        ) from error
    return (
        None
        if not found
        else str(found.get("quant_method", "by an unknown method") if isinstance(found, dict) else found)
    )
