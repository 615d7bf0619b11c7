"""What LoraConfig's fields do."""

import math

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from peft_sae import MissingSubspaceWarning, SaeSubspaceConfig
from tests.parity.harness import IDS, ability, assert_close, assert_differs, logits, reload, train
from tests.tiny import make_model


def layers(adapted):
    return {name: layer for name, layer in adapted.get_base_model().named_modules() if hasattr(layer, "lora_A")}


@ability("DoRA", frozen="its magnitude rescales the base weights, so the change leaves the basis", match="use_dora")
def test_dora(job, tmp_path):
    before = logits(make_model())
    adapted = job.adapt(use_dora=True)
    after = logits(adapted)
    assert_differs(after, before)
    assert_close(logits(reload(adapted, tmp_path, make_model())), after)
    assert_close(logits(adapted.merge_and_unload(safe_merge=True)), after)


@ability("rsLoRA")
def test_rslora(job):
    adapted = job.adapt(use_rslora=True, lora_alpha=6)
    assert {layer.scaling["default"] for layer in layers(adapted).values()} == {6 / math.sqrt(4)}
    after = logits(adapted)
    assert_close(logits(adapted.merge_and_unload()), after)


# PEFT takes every bias for a tensor that was not gathered.
@pytest.mark.filterwarnings("ignore:Adapter 'default'.*invalid shape:UserWarning")
@ability("`lora_bias`")
def test_lora_bias(job, tmp_path):
    model = make_model("qwen2")  # its q_proj has a bias to merge into
    adapted = job.adapt(model, lora_bias=True, target_modules=["q_proj"])
    after = logits(adapted)
    assert layers(adapted)["model.layers.0.self_attn.q_proj"].lora_B["default"].bias.abs().max() > 0
    assert_close(logits(reload(adapted, tmp_path, make_model("qwen2"))), after)
    assert_close(logits(adapted.merge_and_unload()), after)


@ability("Dropout")
def test_dropout(job):
    adapted = job.adapt(lora_dropout=0.5)
    assert torch.equal(logits(adapted), logits(adapted))
    adapted.train()
    torch.manual_seed(1)
    assert_differs(logits(adapted), logits(adapted))


@ability('`bias="lora_only"`', frozen="a trained bias on a writing module leaves the basis", match="bias='lora_only'")
def test_trained_bias(job, tmp_path):
    adapted = job.adapt(make_model("qwen2"), bias="lora_only", target_modules=["q_proj"])
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad and name.endswith("base_layer.bias")}
    assert len(trained) == 3
    assert_close(logits(reload(adapted, tmp_path, make_model("qwen2"))), logits(adapted))


@ability("`modules_to_save`")
def test_modules_to_save(job, tmp_path):
    adapted = job.adapt(modules_to_save=["lm_head"])
    head = adapted.get_base_model().lm_head
    assert_differs(head.modules_to_save["default"].weight, head.original_module.weight)
    after = logits(adapted)
    assert_close(logits(reload(adapted, tmp_path, make_model())), after)
    assert_close(logits(adapted.merge_and_unload()), after)


@ability("`trainable_token_indices`")
def test_trainable_tokens(job, tmp_path):
    adapted = job.adapt(trainable_token_indices={"embed_tokens": [5, 7]})
    after = logits(adapted)
    assert_close(logits(reload(adapted, tmp_path, make_model())), after)
    merged = adapted.merge_and_unload()
    assert_close(logits(merged), after)
    changed = (merged.model.embed_tokens.weight != make_model().model.embed_tokens.weight).any(dim=1)
    assert changed.nonzero().flatten().tolist() == [5, 7]


@ability("`rank_pattern` and `alpha_pattern`")
def test_patterns(job, tmp_path):
    adapted = job.adapt(rank_pattern={"1.self_attn.q_proj": 2}, alpha_pattern={"o_proj": 5})
    found = layers(adapted)
    assert found["model.layers.1.self_attn.q_proj"].lora_A["default"].weight.shape[0] == 2
    assert found["model.layers.0.self_attn.q_proj"].lora_A["default"].weight.shape[0] == 4
    assert found["model.layers.0.self_attn.o_proj"].scaling["default"] == 5 / 4
    after = logits(adapted)
    assert_close(logits(reload(adapted, tmp_path, make_model())), after)
    assert_close(logits(adapted.merge_and_unload()), after)


@ability("`layers_to_transform` and `exclude_modules`")
def test_which_layers(job):
    adapted = job.adapt(layers_to_transform=[0, 2], exclude_modules=r".*\.2\.self_attn\.o_proj")
    assert set(layers(adapted)) == {
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.o_proj",
        "model.layers.2.self_attn.q_proj",
    }


@ability("`init_lora_weights=False` starts from a random update")
def test_random_start(job):
    before = logits(make_model())
    adapted = job.adapt(init_lora_weights=False, trained=False)
    assert_differs(logits(adapted), before)


@ability("aLoRA (`alora_invocation_tokens`)")
def test_activated_lora(job):
    """The adapter acts from the invocation on, and not before it."""
    invocation = [17, 18]
    adapted = job.adapt(alora_invocation_tokens=invocation, init_lora_weights=False, trained=False)
    ids = torch.cat([IDS, torch.tensor([invocation]).expand(4, -1), IDS], dim=1)
    start = IDS.shape[1]
    with adapted.disable_adapter():
        base = logits(adapted, ids)
    active = logits(adapted, ids)
    assert_close(active[:, :start], base[:, :start])
    assert_differs(active[:, start:], base[:, start:])


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@ability("Gradient checkpointing")
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(job, reentrant):
    def gradients(checkpointing):
        adapted = job.adapt().train()
        if checkpointing:
            adapted.gradient_checkpointing_enable({"use_reentrant": reentrant})
            adapted.enable_input_require_grads()
        adapted(IDS, labels=IDS, use_cache=False).loss.backward()
        return {name: p.grad for name, p in adapted.named_parameters() if p.grad is not None}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        assert_close(checkpointed[name], gradient)


@ability("A model in bfloat16 or float16, the adapter in float32")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(job, dtype):
    model = make_model().to(dtype)
    adapted = get_peft_model(model, job.config(model))
    assert {p.dtype for n, p in adapted.named_parameters() if "lora_" in n} == {torch.float32}
    losses = []
    for _ in range(4):
        with torch.autocast("cpu", dtype=dtype):  # it keeps casts of weights until its end
            losses += train(adapted, steps=1)
    assert losses[-1] < losses[0]
    after = logits(adapted.eval())
    merged = logits(adapted.merge_and_unload(safe_merge=True))
    assert merged.dtype == dtype
    assert (merged.float() - after.float()).abs().max() < 0.05 * after.float().abs().max()


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights:UserWarning")
@ability(
    "PiSSA, saved as plain LoRA by `path_initial_model_for_weight_conversion`; without `subspace`",
    frozen="no basis is there to freeze",
)
def test_pissa_conversion(job, tmp_path):
    fields = {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": "pissa", "task_type": "CAUSAL_LM"}
    model = make_model()
    if job.kind == "LORA":
        adapted = get_peft_model(model, LoraConfig(**fields))
    elif job.frozen:
        SaeSubspaceConfig(**fields, freeze_basis=True)
    else:
        with pytest.warns(MissingSubspaceWarning):
            adapted = get_peft_model(model, SaeSubspaceConfig(**fields))
    adapted.save_pretrained(tmp_path / "start")
    train(adapted)
    after = logits(adapted.eval())
    adapted.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    plain = PeftModel.from_pretrained(make_model(), str(tmp_path / "plain"))
    assert_close(logits(plain.eval()), after, 1e-4)
