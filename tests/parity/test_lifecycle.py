"""Saving, loading, merging, and what else happens to an adapted model."""

import copy
import json
import pickle

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    PeftConfig,
    PeftModel,
    get_layer_status,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.optimizers import create_loraplus_optimizer
from transformers import AutoModelForCausalLM

from tests.parity.harness import IDS, ability, assert_close, assert_differs, logits, reload, train
from tests.tiny import make_model


@ability("Saving and loading, `low_cpu_mem_usage` too")
@pytest.mark.parametrize("low", [False, True])
def test_loading(job, tmp_path, low):
    adapted = job.adapt()
    assert_close(logits(reload(adapted, tmp_path, make_model(), low_cpu_mem_usage=low)), logits(adapted), 1e-6)


@ability("Loading to train on (`is_trainable=True`)")
def test_training_on(job, tmp_path):
    adapted = job.adapt()
    again = reload(adapted, tmp_path, make_model(), is_trainable=True)
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert {name for name, parameter in again.named_parameters() if parameter.requires_grad} == trained
    assert train(again) == pytest.approx(train(adapted), rel=1e-5)


@ability("`PeftConfig.from_pretrained` on an adapter's folder")
def test_config_of_an_adapter(job, tmp_path):
    job.adapt().save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(str(tmp_path))
    config.inference_mode = False
    adapted = get_peft_model(make_model(), config)
    before = logits(make_model())
    assert_close(logits(adapted), before)
    train(adapted)
    assert_differs(logits(adapted), before)


@ability("`AutoPeftModelForCausalLM`, `AutoModelForCausalLM` on an adapter's folder")
def test_auto_classes(job, tmp_path):
    make_model().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted = job.adapt(base)
    adapted.save_pretrained(tmp_path / "adapter")
    for model_cls in (AutoPeftModelForCausalLM, AutoModelForCausalLM):
        assert_close(logits(model_cls.from_pretrained(tmp_path / "adapter").eval()), logits(adapted))


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
@ability("transformers' `add_adapter`, `load_adapter`, `set_adapter`, `delete_adapter`")
def test_transformers(job, tmp_path):
    adapted = job.adapt()
    adapted.save_pretrained(tmp_path)
    model = make_model()
    before = logits(model)
    model.add_adapter(job.config(model), adapter_name="fresh")
    assert_close(logits(model), before)
    model.load_adapter(str(tmp_path), adapter_name="trained")
    model.set_adapter("trained")
    assert_close(logits(model.eval()), logits(adapted))
    model.delete_adapter("fresh")
    assert_close(logits(model), logits(adapted))


@ability("`inject_adapter_in_model`, `get_` and `set_peft_model_state_dict`, injection by a state dict")
def test_injection(job):
    adapted = job.adapt()
    state = get_peft_model_state_dict(adapted)
    model = make_model()
    model = inject_adapter_in_model(job.config(model), model)
    set_peft_model_state_dict(model, state)
    assert_close(logits(model), logits(adapted))
    fewer = {key.removeprefix("base_model.model."): value for key, value in state.items() if ".1." in key}
    model = make_model()
    model = inject_adapter_in_model(job.config(model, layers_to_transform=[1]), model, state_dict=fewer)
    assert sum(hasattr(module, "lora_A") for module in model.modules()) == 2


@ability("`save_embedding_layers`")
def test_saving_embeddings(job, tmp_path):
    adapted = job.adapt()
    with torch.no_grad():
        adapted.get_input_embeddings().weight.mul_(1.1)
    adapted.save_pretrained(tmp_path, save_embedding_layers=True)
    assert_close(logits(PeftModel.from_pretrained(make_model(), str(tmp_path)).eval()), logits(adapted))


@ability("`merge_and_unload(safe_merge=True)` in float32, float16, bfloat16; NaN is refused")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 0.02), (torch.bfloat16, 0.1)])
def test_safe_merge(job, dtype, tolerance):
    adapted = job.adapt(make_model().to(dtype), trained=False)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and "lora_" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    after = logits(adapted).float()
    broken = copy.deepcopy(adapted)
    merged = adapted.merge_and_unload(safe_merge=True)
    assert {parameter.dtype for parameter in merged.parameters()} == {dtype}
    assert_differs(after, logits(make_model().to(dtype)).float())
    assert (logits(merged).float() - after).abs().max() < tolerance * after.abs().max()
    with torch.no_grad():
        next(p for p in broken.parameters() if p.requires_grad)[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaNs detected"):
        broken.merge_and_unload(safe_merge=True)


@ability("`merge_adapter`, `unmerge_adapter`, `unload`")
def test_unmerging(job):
    adapted = job.adapt()
    after = logits(adapted)
    for _ in range(2):
        adapted.merge_adapter()
        assert_close(logits(adapted), after)
        adapted.unmerge_adapter()
        assert_close(logits(adapted), after)
    assert_close(logits(adapted.unload()), logits(make_model()))


@ability("`convert_to_lora`")
def test_conversion(job, tmp_path):
    from peft import convert_to_lora, save_as_lora

    adapted = job.adapt()
    if job.kind == "LORA":
        with pytest.warns(UserWarning, match="already a LoRA"):
            config, _ = convert_to_lora(adapted, rank=4, progressbar=False)
        return
    config, _ = convert_to_lora(adapted, rank=4, progressbar=False)
    assert config.peft_type == "LORA"
    save_as_lora(tmp_path, adapted, rank=4, progressbar=False)
    assert_close(logits(PeftModel.from_pretrained(make_model(), str(tmp_path))), logits(adapted), 1e-4)


@ability("`get_model_status`, `get_layer_status`")
def test_status(job):
    adapted = job.adapt()
    status = get_model_status(adapted)
    assert status.base_model_type == "LlamaForCausalLM"
    assert status.adapter_model_type == type(adapted.base_model).__name__
    assert status.enabled is True
    assert status.active_adapters == ["default"]
    assert status.devices == {"default": ["cpu"]}
    assert status.num_adapter_layers == 6
    assert {layer.module_type for layer in get_layer_status(adapted)} == {"lora.Linear"}


@ability("`torch.compile`")
def test_compile(job):
    adapted = job.adapt()
    torch._dynamo.reset()
    compiled = torch.compile(adapted, backend="aot_eager")
    assert_close(logits(compiled), logits(adapted))
    plain = copy.deepcopy(adapted)
    plain(IDS, labels=IDS).loss.backward()
    compiled(IDS, labels=IDS).loss.backward()
    for (name, first), second in zip(adapted.named_parameters(), plain.parameters(), strict=True):
        assert (first.grad is None) == (second.grad is None), name
        if first.grad is not None:
            assert_close(first.grad, second.grad)


@ability("Pickling and `deepcopy`")
def test_copies(job):
    adapted = job.adapt()
    for again in (copy.deepcopy(adapted), pickle.loads(pickle.dumps(adapted))):
        assert torch.equal(logits(again), logits(adapted))
        trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
        assert [name for name, parameter in again.named_parameters() if parameter.requires_grad] == trained
        train(again)
        assert_differs(logits(again), logits(adapted))


@ability("Generation")
def test_generation(job):
    adapted = job.adapt()
    found = adapted.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4, do_sample=False)
    expected = IDS
    for _ in range(4):
        expected = torch.cat([expected, logits(adapted, expected)[:, -1:].argmax(-1)], dim=1)
    ends = (expected == 2).cumsum(1).cumsum(1) > 1  # what follows an end is padding
    assert torch.equal(found, expected.masked_fill(ends, 0)[:, : found.shape[1]])


@ability("LoRA+ (`create_loraplus_optimizer`)")
def test_loraplus(job):
    adapted = job.adapt()
    optimizer = create_loraplus_optimizer(adapted, torch.optim.AdamW, lr=0.01, loraplus_lr_ratio=10)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            assert rates[id(parameter)] == (0.1 if "lora_B" in name else 0.01)
    before = logits(adapted)
    adapted(IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert_differs(logits(adapted), before)


@ability("A checkpoint that was not gathered is told when it is saved (ZeRO-3, FSDP)")
def test_ungathered(job, tmp_path):
    adapted = job.adapt()
    next(p for n, p in adapted.named_parameters() if "lora_A" in n).data = torch.empty(0)
    with pytest.warns(UserWarning, match="were not gathered"):
        get_peft_model_state_dict(adapted)


@ability("A model card that names the type")
def test_model_card(job, tmp_path):
    job.adapt().save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == job.kind.split(",")[0]
    if job.kind == "LORA":
        assert "- lora" in card
    else:
        assert "- sae-subspace" in card
        assert "- lora\n" not in card
        assert "import peft_sae" in card
