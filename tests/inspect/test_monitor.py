import pytest
import torch
from peft import LoraConfig, get_peft_model

from peft_sae import inspect_adapter
from peft_sae.errors import ConfigError
from peft_sae.inspect.monitor import SubspaceMonitor
from tests.tiny import make_model

from .dense import train


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("frozen", [False, True])
def test_it_measures_what_an_inspection_measures(tmp_path, family, frozen):
    model = train(tmp_path, family, freeze_basis=frozen, noise=0.0).model
    monitor = SubspaceMonitor(model)
    assert monitor.measure().in_basis is None
    for _ in range(2):
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_" in name:
                parameter.data += 0.1 * torch.randn_like(parameter)
        found, full = monitor.measure(), inspect_adapter(model)
        assert found.norm == pytest.approx(full.summary["norm"], rel=1e-4)
        assert found.in_basis == pytest.approx(full.summary["in_basis"], rel=1e-4)
        table = full.features.set_index(["name", "side"])["share"]
        assert set(found.shares) == set(table.index)
        for key, share in found.shares.items():
            assert share == pytest.approx(table[key], rel=1e-3, abs=1e-7)


def test_nothing_in_the_model_changes(tmp_path):
    model = train(tmp_path).model
    before = {name: (parameter.requires_grad, parameter._version) for name, parameter in model.named_parameters()}
    SubspaceMonitor(model).measure()
    assert before == {name: (p.requires_grad, p._version) for name, p in model.named_parameters()}


def test_an_adapter_without_a_subspace_is_refused():
    model = get_peft_model(make_model(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match="no Subspace at hand"):
        SubspaceMonitor(model)
