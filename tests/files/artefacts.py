"""Good artefacts, as small as they can be with all that a file of the kind may hold."""

from __future__ import annotations

import torch
from peft import get_peft_model

from peft_sae import SaeSubspaceConfig
from tests.tiny import make_model, make_subspace, make_tokenizer

EDITS = {
    "schema": "peft_sae.edit",
    "schema_version": 1,
    "edits": [
        {
            "digest": "1" * 64,
            "parent_digest": "0" * 64,
            "kind": kind,
            "features": [{"name": "blocks.1.hook_resid_post:3", "sae": "s", "factor": factor}],
            "saes": [],
            "modules": {},
            "notes": [],
        }
        for kind, factor in (("scale", 0.5), ("keep", 1))
    ],
}

JOBS = {
    "job": {
        "model": "someone/model",
        "data": "texts.jsonl",
        "subspace": "outputs/subspace",
        "output": "outputs/adapter",
        "adapter": {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], "freeze_basis": False, "protect": True},
        "training": {"learning_rate": 2e-4, "max_steps": 3},
        "dtype": "bfloat16",
        "max_length": 128,
    },
    "selection": {
        "model": "someone/model",
        "saes": "release",
        "output": "outputs/subspace",
        "ids": ["a", "b"],
        "layers": [3],
        "aligned": "one.jsonl",
        "unaligned": "two.jsonl",
        "selector": "auroc",
        "top_k": 5,
        "variance": 0.9,
        "direction": "aligned",
        "max_q": 0.05,
        "drop": ["3:1"],
        "measures": ["histograms"],
        "tokens": "response",
        "seed": 1,
    },
}


def make_adapter(folder, **fields):
    """Write a base, in shards, and an adapter of it with random factors and its Subspace; return the folder of both."""
    model = make_model(num_hidden_layers=2)
    model.save_pretrained(folder / "base", max_shard_size="30KB")
    make_tokenizer().save_pretrained(folder / "base")
    fields = {
        "r": 4,
        "lora_alpha": 6,
        "alpha_pattern": {"layers.1.self_attn.q_proj": 9},
        "rank_pattern": {"layers.0.self_attn.o_proj": 3},
        "target_modules": ["q_proj", "o_proj"],
        "task_type": "CAUSAL_LM",
        "subspace": make_subspace(model, {"blocks.1.hook_resid_pre": 3}, protected={"blocks.0.hook_resid_mid": 1}),
        **fields,
    }
    adapted = get_peft_model(type(model).from_pretrained(folder / "base"), SaeSubspaceConfig(**fields))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    adapted.save_pretrained(folder / "adapter")
    return folder
