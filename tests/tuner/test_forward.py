"""The fused forward pass is LoRA's, with fewer passes over memory."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_sae import SaeSubspaceConfig
from peft_sae.tuner.forward import FusedLinearVariant
from tests.tiny import make_model, make_subspace

IDS = torch.randint(4, 16, (2, 9), generator=torch.Generator().manual_seed(0))


def adapt(model=None, **fields):
    torch.manual_seed(0)
    model = make_model() if model is None else model
    fields = {"r": 4, "lora_alpha": 7, "target_modules": ["q_proj", "down_proj"], **fields}
    adapted = get_peft_model(model, SaeSubspaceConfig(subspace=make_subspace(make_model()), **fields))
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad and "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    return adapted


def layers(adapted):
    return [module for module in adapted.modules() if hasattr(module, "lora_A")]


def unfused(adapted):
    """The same model with LoRA's own forward pass."""
    twin = copy.deepcopy(adapted)
    for layer in layers(twin):
        layer.lora_variant.clear()
    return twin


def run(model, x_requires_grad=False):
    output = model(IDS, labels=IDS)
    output.loss.backward()
    return output.logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("freeze", [False, True])
def test_results_and_gradients_are_loras_in_float64(freeze):
    adapted = adapt(freeze_basis=freeze).double()
    twin = unfused(adapted)
    assert all(type(layer.lora_variant["default"]) is FusedLinearVariant for layer in layers(adapted))

    (logits, gradients), (expected, wanted) = run(adapted), run(twin)

    torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12)
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape", [(5,), (2, 5), (2, 3, 5), ()])
def test_inputs_of_every_number_of_dimensions(shape):
    layer = layers(adapt())[0]
    x = torch.randn(*shape, 32)
    twin = copy.deepcopy(layer)
    twin.lora_variant.clear()
    torch.testing.assert_close(layer(x), twin(x), rtol=1e-5, atol=1e-5)
    assert layer(x).shape == (*shape, 32)


def test_dropout_is_loras():
    adapted = adapt(lora_dropout=0.5).train()
    twin = unfused(adapted)
    torch.manual_seed(3)
    first = adapted(IDS).logits
    torch.manual_seed(3)
    torch.testing.assert_close(first, twin(IDS).logits, rtol=1e-5, atol=1e-5)


def test_hooks_on_the_factors_are_called():
    adapted = adapt()
    calls = []
    for layer in layers(adapted):
        for factor in (layer.lora_A["default"], layer.lora_B["default"]):
            factor.register_forward_hook(lambda *args: calls.append(args[0]))
    before = unfused(adapted)(IDS).logits
    calls.clear()
    torch.testing.assert_close(adapted(IDS).logits, before, rtol=1e-5, atol=1e-5)
    assert len(calls) == 2 * len(layers(adapted))


@pytest.mark.parametrize("autocast", [False, True])
def test_a_model_in_bfloat16_with_factors_in_float32(autocast):
    adapted = adapt(make_model().to(torch.bfloat16))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found, expected = adapted(IDS).logits, unfused(adapted)(IDS).logits
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


def test_other_variants_and_other_layers_keep_their_own():
    assert all(
        type(layer.lora_variant["default"]).__name__ == "DoraLinearVariant" for layer in layers(adapt(use_dora=True))
    )
    embedding = adapt(target_modules=["embed_tokens"], r=2)
    assert not layers(embedding)[0].lora_variant
    plain = get_peft_model(make_model(), LoraConfig(target_modules=["q_proj"]))
    assert not layers(plain)[0].lora_variant


def test_a_deleted_adapter_leaves_no_variant():
    adapted = adapt()
    adapted.add_adapter(
        "other", SaeSubspaceConfig(subspace=make_subspace(make_model()), r=2, target_modules=["q_proj"])
    )
    adapted.set_adapter("other")
    adapted.delete_adapter("default")
    assert {name for layer in layers(adapted) for name in layer.lora_variant} == {"other"}


def test_a_frozen_reader_keeps_no_input_for_backward():
    """Only what the free factor needs is kept: the thin product, not the input."""
    adapted = adapt(freeze_basis=True, target_modules=["q_proj"])
    layer = layers(adapted)[0]
    x = torch.randn(64, 32, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    assert all(tensor.untyped_storage().data_ptr() != x.untyped_storage().data_ptr() for tensor in kept)
    free = layers(adapt(target_modules=["q_proj"]))[0]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        free(x)
    assert any(tensor.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for tensor in kept)
