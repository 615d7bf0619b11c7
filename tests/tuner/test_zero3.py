"""Injection where weights are partitioned and must be gathered, with a stand-in for DeepSpeed.

`tests/distributed` does it with DeepSpeed itself, where that is installed.
"""

import sys
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils import integrations

from peft_sae import SaeSubspaceConfig
from tests.tiny import make_model, make_subspace


@pytest.fixture
def partition(monkeypatch):
    """Make a model's weights have size 0 except while they are gathered, as ZeRO-3 does."""
    whole = {}

    @contextmanager
    def gathered(weights, modifier_rank=None, fwd_module=None):
        weights = [weights] if isinstance(weights, torch.nn.Parameter) else weights
        weights = [weight for weight in weights if weight in whole]
        for weight in weights:
            weight.data = whole[weight]
        yield
        for weight in weights:
            weight.data = torch.empty(0)

    def partition(model):
        for weight in model.parameters():
            whole[weight], weight.data = weight.data, torch.empty(0)
        return model

    module = ModuleType("deepspeed")
    module.__spec__ = ModuleSpec("deepspeed", None)
    module.zero = SimpleNamespace(GatheredParameters=gathered)
    monkeypatch.setitem(sys.modules, "deepspeed", module)
    monkeypatch.setattr(integrations, "check_deepspeed_zero3_enabled", lambda: True)
    return partition


@pytest.mark.parametrize("kind", ["lora", "free", "frozen"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "opt"])
def test_partitioned_weights_give_the_same_factors(partition, family, kind):
    fields = {"r": 4, "target_modules": ["q_proj", "o_proj", "out_proj", "down_proj", "fc2"]}

    def factors(model):
        torch.manual_seed(0)
        config = LoraConfig(**fields)
        if kind != "lora":
            subspace = make_subspace(make_model(family))
            config = SaeSubspaceConfig(subspace=subspace, freeze_basis=kind == "frozen", **fields)
        return {name: weight for name, weight in get_peft_model(model, config).named_parameters() if "lora_" in name}

    found, expected = factors(partition(make_model(family))), factors(make_model(family))

    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name
        assert found[name].requires_grad is weight.requires_grad
