"""Adapters of tiny models with random factors, and SAEs whose features can be edited."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from peft_sae import SaeSubspaceConfig, load_saes
from tests.tiny import make_model, make_sae, make_subspace

HOOKS = ("blocks.0.hook_resid_post", "blocks.2.hook_resid_pre")


def train_a_little(adapted, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


@pytest.fixture
def saes():
    return load_saes([make_sae(hook, seed=seed) for seed, hook in enumerate(HOOKS)])


@pytest.fixture
def trained(tmp_path):
    """Make the folders of a base and of an adapter: SAE_SUBSPACE, or LORA where no Subspace is wanted."""

    def make(
        family="llama", *, kind="SAE_SUBSPACE", name="adapter", subspace=None, ranks=None, protected=None, **fields
    ):
        model = make_model(family)
        base = tmp_path / "base"
        if not base.exists():
            model.save_pretrained(base)
        model = type(model).from_pretrained(base)
        fields = {"r": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "lora_alpha": 9, **fields}
        if family == "gpt2":
            fields["fan_in_fan_out"] = True
        if kind == "LORA":
            config = LoraConfig(**fields)
        else:
            subspace = subspace or make_subspace(model, ranks, protected=protected)
            config = SaeSubspaceConfig(subspace=subspace, **fields)
        adapted = get_peft_model(model, config)
        train_a_little(adapted)
        adapted.save_pretrained(tmp_path / name)
        return tmp_path / name

    return make
