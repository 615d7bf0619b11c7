"""A plain LoRA adapter that PEFT loads without this package."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from peft import LoraConfig

from ..adapter import CONFIG_FILE, WEIGHTS_FILE, read_adapter_config, read_adapter_weights, read_edits
from ..artifact import replace_folder, write_json
from ..errors import ConfigError
from ..tuner import SaeSubspaceConfig

PROVENANCE_FILE = "sae_subspace.json"


def export_lora(adapter: str | Path, output: str | Path) -> Path:
    """Write a trained adapter as a plain LoRA adapter with the same factors.

    The weights are the same tensors, so logits are identical. What only this package knows (digest of the Subspace,
    sides,
    hook points) goes into `sae_subspace.json`, which PEFT ignores.

    Args:
        adapter: folder of an adapter.
        output: folder to write; missing or empty. What exists is never overwritten.

    Returns:
        The output folder.

    Raises:
        ArtifactError: the adapter is incomplete, damaged or of another type, or the output cannot be written.
        ConfigError: the adapter is a plain LoRA already.
    """
    config = read_adapter_config(adapter)
    if config["peft_type"] == "LORA":
        raise ConfigError(f"'{adapter}' is a plain LoRA adapter already. Use it as it is.")
    tensors = read_adapter_weights(adapter)
    lora_fields = {field.name for field in fields(LoraConfig)}
    own_fields = {field.name for field in fields(SaeSubspaceConfig)} - lora_fields
    plain = {name: value for name, value in config.items() if name not in own_fields}
    edits = read_edits(adapter)
    provenance = {name: config.get(name) for name in sorted(own_fields)}
    with replace_folder(output) as folder:
        from safetensors.torch import save_file

        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        write_json(folder / CONFIG_FILE, {**plain, "peft_type": "LORA"})
        write_json(folder / PROVENANCE_FILE, {**provenance, "edits": edits})
    return Path(output)
