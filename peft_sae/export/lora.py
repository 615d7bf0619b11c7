"""A plain LoRA adapter that PEFT loads without this package."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from peft import LoraConfig

from ..adapter import CONFIG_FILE, WEIGHTS_FILE, read_adapter_config, read_adapter_weights, read_edits
from ..artifact import write_json
from ..errors import ConfigError
from ..tuner import SaeSubspaceConfig
from ..writing import replace_folder
from .companions import copy_tokenizer
from .uniform import with_one_rank

PROVENANCE_FILE = "sae_subspace.json"


def export_lora(adapter: str | Path, output: str | Path, *, uniform: bool = False) -> Path:
    """Write a trained adapter as a plain LoRA adapter with the same factors.

    The weights are the same tensors, so logits are identical. What only this package knows (digest of the Subspace,
    sides, hook points) goes into `sae_subspace.json`, which PEFT ignores. A tokenizer that was saved with the adapter
    goes along.

    Args:
        adapter: folder of an adapter; with `uniform` also of a plain LoRA.
        output: folder to write; missing or empty. What exists is never overwritten.
        uniform: give all modules one rank (filled up with zeros) and the scaling 1, for servers that read neither
            `rank_pattern`, nor `alpha_pattern`, nor `use_rslora`; see docs/serving.md. The updates are the same, up to
            one rounding of the factors.

    Returns:
        The output folder.

    Raises:
        ArtifactError: the adapter is incomplete, damaged or of another type, or the output cannot be written.
        ConfigError: the adapter is a plain LoRA already and is not to be made uniform, or `uniform` cannot say the same
            as its variant (DoRA).
    """
    config = read_adapter_config(adapter)
    plain_already = config["peft_type"] == "LORA"
    if plain_already and not uniform:
        raise ConfigError(f"'{adapter}' is a plain LoRA adapter already. Use it as it is.")
    tensors = read_adapter_weights(adapter)
    lora_fields = {field.name for field in fields(LoraConfig)}
    own_fields = {field.name for field in fields(SaeSubspaceConfig)} - lora_fields
    plain = {name: value for name, value in config.items() if name not in own_fields}
    if uniform:
        tensors, plain = with_one_rank(tensors, plain)
    edits = read_edits(adapter)
    provenance = {name: config.get(name) for name in sorted(own_fields)}
    with replace_folder(output) as folder:
        from safetensors.torch import save_file

        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        write_json(folder / CONFIG_FILE, {**plain, "peft_type": "LORA"})
        if not plain_already:
            write_json(folder / PROVENANCE_FILE, {**provenance, "edits": edits})
        copy_tokenizer(Path(adapter), folder)
    return Path(output)
