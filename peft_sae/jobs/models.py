"""The models that jobs load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..checkpoint import open_base
from ..errors import ConfigError


def load_model(
    name: str | Path,
    *,
    dtype: str | None = None,
    device: str | None = None,
    attn_implementation: str | None = None,
    bits: int | None = None,
) -> tuple[Any, Any]:
    """Load a causal language model, from safetensors, and its tokenizer.

    Args:
        name: folder or Hub id.
        dtype: for example `"bfloat16"`; by default as stored.
        device: for example `"cuda"`; `"auto"` spreads the model over all devices.
        attn_implementation: for example `"flash_attention_2"`; by default transformers' choice.
        bits: 4 (NF4, double quantisation) or 8 to quantise it with bitsandbytes; None for its own dtype.

    Raises:
        ConfigError: it cannot be loaded in this way.
        ArtifactError: there is no such model, or its configuration names code to run.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config, _ = open_base(name)
    options: dict[str, Any] = {"dtype": dtype or "auto", "device_map": device, "config": config}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if bits is not None:
        options["quantization_config"] = _quantisation(bits, dtype)
    try:
        # Weights that are not in safetensors would be unpickled.
        model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=False, use_safetensors=True, **options)
        return model, AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, AttributeError, ImportError, SafetensorError) as error:
        raise ConfigError(f"The model '{name}' cannot be loaded ({error}). Check the path or the id.") from error


def _quantisation(bits: int, dtype: str | None) -> Any:
    import torch
    from transformers import BitsAndBytesConfig

    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype or "bfloat16"),
    )
