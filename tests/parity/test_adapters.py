"""Several adapters in one model, and what is made of them."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftMixedModel, PeftModel, get_peft_model
from peft.tuners.lora.intruders import reduce_intruder_dimension
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

from peft_sae import SaeSubspaceConfig
from tests.parity.harness import ability, assert_close, assert_differs, logits, train
from tests.tiny import make_model


def alone(job, folder, **fields):
    """Save an adapter and return what a model with it alone computes."""
    torch.manual_seed(0)
    adapted = job.adapt(**fields)
    adapted.save_pretrained(folder)
    return logits(adapted)


def pair(job, tmp_path):
    """A model with two different trained adapters, and what each computes alone."""
    outputs = {"first": alone(job, tmp_path / "first"), "second": alone(job, tmp_path / "second", lora_alpha=40)}
    model = PeftModel.from_pretrained(make_model(), str(tmp_path / "first"), adapter_name="first")
    model.load_adapter(str(tmp_path / "second"), adapter_name="second")
    assert_differs(outputs["first"], outputs["second"])
    return model.eval(), outputs


@ability("Several adapters: `load_adapter`, `set_adapter`, `disable_adapter`, `delete_adapter`")
def test_several(job, tmp_path):
    model, outputs = pair(job, tmp_path)
    for name in ("second", "first"):
        model.set_adapter(name)
        assert_close(logits(model), outputs[name])
    with model.disable_adapter():
        assert_close(logits(model), logits(make_model()))
    model.set_adapter("second")
    model.delete_adapter("first")
    assert set(model.peft_config) == {"second"}
    assert_close(logits(model), outputs["second"])


@ability("Adding a fresh adapter beside a trained one")
def test_adding(job):
    model = job.adapt()
    before = logits(model)
    model.add_adapter("fresh", job.config(model.get_base_model()))
    assert_close(logits(model), before)
    model.set_adapter("fresh")
    with model.disable_adapter():
        base = logits(model)
    assert_close(logits(model), base)
    train(model)
    model.set_adapter("default")
    assert_close(logits(model), before)


@ability("Mixed batches (`adapter_names`)")
def test_mixed_batches(job, tmp_path):
    model, outputs = pair(job, tmp_path)
    found = logits(model, adapter_names=["first", "__base__", "second", "first"])
    expected = torch.stack([outputs["first"][0], logits(make_model())[1], outputs["second"][2], outputs["first"][3]])
    assert_close(found, expected)


COMBINATIONS = [
    "linear",
    "cat",
    "svd",
    "ties",
    "ties_svd",
    "dare_linear",
    "dare_linear_svd",
    "dare_ties",
    "dare_ties_svd",
]
COMBINATIONS += ["magnitude_prune", "magnitude_prune_svd"]


@ability("`add_weighted_adapter`, each combination type")
@pytest.mark.parametrize("kind", COMBINATIONS)
def test_combinations(job, tmp_path, kind):
    model, _ = pair(job, tmp_path)
    options = {} if kind in ("linear", "cat", "svd") else {"density": 0.5}
    torch.manual_seed(0)
    model.base_model.add_weighted_adapter(["first", "second"], [0.7, 0.4], "both", combination_type=kind, **options)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    found = layer.get_delta_weight("both")
    if kind in ("cat", "svd"):  # svd at the sources' rank is exact only where they share a factor
        expected = 0.7 * layer.get_delta_weight("first") + 0.4 * layer.get_delta_weight("second")
        assert_close(found, expected) if kind == "cat" else assert_differs(found, 0 * found)
    model.set_adapter("both")
    assert_differs(logits(model), logits(make_model()))

    plain = get_peft_model(make_model(), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "o_proj"]), "first")
    plain.add_adapter("second", LoraConfig(r=4, lora_alpha=40, target_modules=["q_proj", "o_proj"]))
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "both" not in k})
    torch.manual_seed(0)
    plain.base_model.add_weighted_adapter(["first", "second"], [0.7, 0.4], "both", combination_type=kind, **options)
    twin = plain.get_base_model().model.layers[0].self_attn.q_proj
    assert_close(found, twin.get_delta_weight("both"))


@ability("Merging several adapters at once, and unmerging")
def test_merging_several(job, tmp_path):
    model, _ = pair(job, tmp_path)
    weight = model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight
    start = weight.clone()
    model.base_model.merge_adapter(["first", "second"], safe_merge=True)
    assert_differs(weight, start)
    model.base_model.unmerge_adapter()
    assert_close(weight, start, 1e-6)


@ability("A LORA adapter beside it in one model")
@pytest.mark.parametrize("lora_first", [True, False])
def test_beside_lora(job, tmp_path, lora_first):
    plain = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = make_model()
    ours = job.config(model)
    first, second = (plain, ours) if lora_first else (ours, plain)
    adapted = get_peft_model(model, first, "first")
    adapted.add_adapter("second", second)
    outputs = {}
    for name in ("first", "second"):
        adapted.set_adapter(name)
        assert_close(logits(adapted), logits(make_model()))  # step 0 of each
        train(adapted)
        outputs[name] = logits(adapted.eval())
    adapted.save_pretrained(tmp_path)
    for name in ("first", "second"):
        again = PeftModel.from_pretrained(make_model(), str(tmp_path / name))
        assert_close(logits(again), outputs[name])
    again.load_adapter(str(tmp_path / "first"), adapter_name="first")
    again.set_adapter("first")
    assert_close(logits(again), outputs["first"])
    if job.kind != "LORA":
        name = "second" if lora_first else "first"
        layer = adapted.get_base_model().model.layers[0].self_attn.q_proj
        assert layer.lora_A[name].weight.requires_grad is (adapted.active_adapter == name and not job.frozen)
        assert adapted.peft_config[name].basis_record["modules"]


@ability("`PeftMixedModel`")
def test_mixed_model(job):
    from peft import LoHaConfig

    model = make_model()
    adapted = get_peft_model(model, job.config(model, task_type=None), "first", mixed=True)
    assert isinstance(adapted, PeftMixedModel)
    assert_close(logits(adapted), logits(make_model()))
    adapted.add_adapter("second", LoHaConfig(r=2, target_modules=["v_proj"]))
    adapted.set_adapter(["first", "second"])
    train(adapted)
    after = logits(adapted.eval())
    assert_differs(after, logits(make_model()))
    layer = adapted.base_model.model.model.layers[0].self_attn.q_proj
    if job.kind != "LORA":
        basis = adapted.peft_config["first"].subspace.sites[0].basis
        norm = adapted.base_model.model.model.layers[0].input_layernorm.weight
        span = torch.linalg.qr((basis * norm).T)[0]
        rows = layer.lora_A["first"].weight
        if job.frozen:
            assert not rows.requires_grad
            assert_close((rows @ span) @ span.T, rows)
    assert_close(logits(adapted.merge_and_unload()), after)


@ability("Hot swapping (PEFT)")
def test_hotswap(job, tmp_path):
    outputs = {name: alone(job, tmp_path / name, lora_alpha=alpha) for name, alpha in [("first", 8), ("second", 40)]}
    model = PeftModel.from_pretrained(make_model(), str(tmp_path / "first")).eval()
    assert_close(logits(model), outputs["first"])
    hotswap_adapter(model, str(tmp_path / "second"), adapter_name="default", torch_device="cpu")
    assert_close(logits(model), outputs["second"])
    if job.kind != "LORA":
        config = model.peft_config["default"]
        assert config.subspace == str(tmp_path / "second" / "subspace")
        assert config.basis_record["modules"]


@ability("Hot swapping ranks in a compiled model (`prepare_model_for_compiled_hotswap`)")
def test_compiled_hotswap(job, tmp_path):
    outputs = {name: alone(job, tmp_path / name, r=rank) for name, rank in [("first", 4), ("second", 2)]}
    model = PeftModel.from_pretrained(make_model(), str(tmp_path / "first")).eval()
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    model = torch.compile(model, backend="aot_eager")
    assert_close(logits(model), outputs["first"])
    hotswap_adapter(model, str(tmp_path / "second"), adapter_name="default", torch_device="cpu")
    assert_close(logits(model), outputs["second"])


@ability("Hot swapping (transformers)")
def test_hotswap_in_transformers(job, tmp_path):
    outputs = {name: alone(job, tmp_path / name, lora_alpha=8) for name in ("first", "second")}
    model = make_model()
    model.load_adapter(str(tmp_path / "first"))
    assert_close(logits(model.eval()), outputs["first"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.zero_()
    model.load_adapter(str(tmp_path / "second"), hotswap=True, adapter_name="default")
    assert_close(logits(model.eval()), outputs["second"])


@ability("Arrow routing over several adapters (`create_arrow_model`)")
def test_arrow(job, tmp_path):
    from peft.tuners.lora.arrow import create_arrow_model
    from peft.tuners.lora.config import ArrowConfig

    outputs = [alone(job, tmp_path / str(number), lora_alpha=8 * number) for number in (1, 2)]
    config = ArrowConfig(top_k=1, use_gks=False)
    model = create_arrow_model(make_model(), [str(tmp_path / "1"), str(tmp_path / "2")], config).eval()
    found = logits(model)
    assert_differs(found, logits(make_model()))
    assert not any(torch.equal(found, output) for output in outputs)
    model.set_adapter("task_0")
    assert_close(logits(model), outputs[0])


@ability("Reducing intruder dimensions (`reduce_intruder_dimension`)")
def test_intruders(job):
    adapted = job.adapt(lora_alpha=40)
    before = logits(adapted)
    reduce_intruder_dimension(adapted, new_adapter_name="reduced", threshold_epsilon=0.0, logging_sink=None)
    assert_close(logits(adapted), before)  # no dimension is an intruder
    reduce_intruder_dimension(adapted, new_adapter_name="other", threshold_epsilon=0.99, logging_sink=None)
    assert adapted.active_adapter == "other"
    assert_differs(logits(adapted), before)
    adapted.set_adapter("default")
    assert_close(logits(adapted), before)
    if isinstance(adapted.peft_config["default"], SaeSubspaceConfig):
        assert not adapted.peft_config["reduced"].basis_record["modules"]
        assert adapted.peft_config["default"].basis_record["modules"]


@ability("The same configuration used for two models")
def test_config_used_twice(job):
    config = job.config(make_model())
    first, second = (get_peft_model(make_model(), copy.deepcopy(config) if n else config) for n in range(2))
    third = get_peft_model(make_model(), config)
    for model in (first, second, third):
        assert_close(logits(model), logits(make_model()))
        train(model, steps=1)
