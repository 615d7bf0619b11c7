"""Protected features: the update neither reads nor writes them, at no time of an adapter's life."""

import copy
import dataclasses
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

from peft_sae import SaeSubspaceConfig, Subspace, export_lora
from peft_sae.errors import ConfigError, MismatchError, SelectionError
from peft_sae.tuner.factors import ProtectedLinear
from tests.tiny import FAMILIES, make_classifier, make_model, make_subspace

IDS = torch.randint(4, 16, (2, 9), generator=torch.Generator().manual_seed(0))
HOOKS = {"blocks.0.hook_resid_post": 2, "blocks.2.hook_resid_pre": 1}
TARGETS = {
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "gpt_neox": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    "opt": ["q_proj", "out_proj", "fc1", "fc2"],
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "mixtral": ["q_proj", "o_proj"],
    "qwen3_moe": ["q_proj", "o_proj"],
    "bert": ["query", "attention.output.dense", "intermediate.dense", "layer.*output.dense"],
}


def make(family):
    return make_classifier() if family == "bert" else make_model(family)


def config_for(model, *, protected=HOOKS, ranks=None, **fields):
    family = model.config.model_type.replace("_text", "")
    targets = TARGETS.get(family, ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"])
    fields = {"r": 4, "lora_alpha": 8, "target_modules": targets, **fields}
    if family == "bert":
        fields.setdefault("target_modules", r".*\.(query|dense)")
        fields["exclude_modules"] = ["pooler.dense"]
    else:
        fields["task_type"] = "CAUSAL_LM"
    if family == "gpt2":
        fields["fan_in_fan_out"] = True
    return SaeSubspaceConfig(subspace=make_subspace(model, ranks, protected=protected), **fields)


def adapt(model, **fields):
    torch.manual_seed(0)
    return get_peft_model(model, config_for(model, **fields))


def train(adapted, steps=4, check=None):
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.05, weight_decay=0.1)
    losses = []
    for _ in range(steps):
        labels = torch.tensor([0, 2]) if adapted.config.model_type == "bert" else IDS
        loss = adapted(IDS, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if check is not None:
            check(adapted)
    return losses


def layers(model):
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def directions(subspace, model, name):
    """What the module of that name must not read and write, by the derivative of the norm itself.

    The derivative of a norm is its gain times a projection that takes off what lies along its input (and the mean); at
    the input x, a step v across x that has no mean goes to g * v times a factor.
    """
    found = {}
    place = subspace.layout.locate(name)
    stacked = torch.cat([site.directions for site in subspace.protected]).double()
    for role in subspace.layout.roles[place[2]]:
        if role.site in ("z", "mlp_in"):  # not in the stream
            continue
        rows = stacked
        if role.norm is not None:
            norm = copy.deepcopy(model.get_submodule(f"{place[0]}.{role.norm}")).double()
            # At an input much larger than the step the common rescaling is of second order.
            far = torch.randn(1, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) * 1e6
            jacobian = torch.autograd.functional.jacobian(lambda x, norm=norm: norm(x)[0], far)[:, 0]
            # J = (1 / s) (g * (I - mean) - output outer x / n): remove the second part, which is the rescaling
            output = norm(far)[0] - norm(torch.zeros_like(far))[0]
            scale = far.square().mean().sqrt() if _is_rms(norm) else far.std(correction=0)
            centred = far[0] if _is_rms(norm) else far[0] - far.mean()
            linear = jacobian.detach() * scale + torch.outer(output, centred).detach() / scale / 32
            rows = stacked @ linear.T if role.side == "read" else stacked @ linear
        found[role.side] = torch.nn.functional.normalize(rows)
    return found


def _is_rms(norm):
    return "RMS" in type(norm).__name__


def leaks(adapted, subspace, adapter="default"):
    """The largest response of each update to a protected direction, as a share of the update's norm."""
    model = adapted.get_base_model() if isinstance(adapted, PeftModel) else adapted
    found = []
    for name, layer in layers(model).items():
        delta = layer.get_delta_weight(adapter).detach().double()
        delta = delta.T if layer.fan_in_fan_out else delta
        assert delta.norm() > 0
        for side, rows in directions(subspace, model, name).items():
            along = delta @ rows.T if side == "read" else rows @ delta
            found.append(float(along.abs().max() / torch.linalg.matrix_norm(delta, 2)))
    return found


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("family", [*FAMILIES, "bert"])
def test_no_update_uses_a_protected_feature_at_any_step_of_training(family, freeze):
    model = make(family)
    adapted = adapt(model, freeze_basis=freeze)
    subspace = adapted.peft_config["default"].subspace
    steps = []

    losses = train(adapted, check=lambda it: steps.append(max(leaks(it, subspace))))

    assert max(steps) < 1e-6
    assert losses[-1] < losses[0]
    free = adapt(make(family), protect=False, freeze_basis=freeze)
    train(free)
    assert max(leaks(free, subspace)) > 1e-2


def test_the_parameter_itself_leaves_the_constraint_which_is_why_the_product_is_used():
    adapted = adapt(make_model())
    train(adapted)
    layer = next(iter(layers(adapted).values()))
    factor = layer.lora_A["default"]
    along = factor.raw_weight.detach() - factor.weight.detach()
    assert along.norm() > 1e-2 * factor.weight.norm()


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_the_module_answers_a_step_along_a_protected_direction_as_the_base_does(family):
    """In the forward pass: x + c q and x give the same change by the adapter."""
    adapted = adapt(make_model(family))
    train(adapted)
    adapted.eval()
    subspace = adapted.peft_config["default"].subspace
    model = adapted.get_base_model()
    generator = torch.Generator().manual_seed(1)
    for name, layer in layers(model).items():
        x = torch.randn(5, layer.in_features, generator=generator)

        def change(x, layer=layer):
            with torch.no_grad():
                return layer(x) - layer.base_layer(x)

        sides = directions(subspace, model, name)
        if "read" in sides:
            for row in sides["read"].float():
                moved = change(x + 3 * row)
                torch.testing.assert_close(moved, change(x), rtol=0, atol=1e-5 * float(change(x).abs().max()))
        if "write" in sides:
            share = (change(x) @ sides["write"].float().T).abs().max() / change(x).norm(dim=-1).max()
            assert share < 1e-6


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("freeze", [False, True])
def test_it_holds_after_saving_and_loading_and_when_trained_on(tmp_path, freeze, trainable):
    adapted = adapt(make_model(), freeze_basis=freeze)
    train(adapted)
    subspace = adapted.peft_config["default"].subspace
    adapted.save_pretrained(tmp_path)

    again = PeftModel.from_pretrained(make_model(), str(tmp_path), is_trainable=trainable)

    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, adapted.eval()(IDS).logits, rtol=0, atol=1e-5)
    assert max(leaks(again, subspace)) < 1e-6
    again.set_adapter("default")
    trained = [name for name, parameter in again.named_parameters() if parameter.requires_grad]
    if trainable:
        train(again, check=lambda it: leaks(it, subspace))
        assert max(leaks(again, subspace)) < 1e-6
    else:
        assert not trained
        again.save_pretrained(tmp_path / "again")
        next(p for n, p in again.named_parameters() if "lora_A" in n).requires_grad_(True)
        with pytest.raises(ConfigError, match="was made trainable although the adapter protects features"):
            again.save_pretrained(tmp_path / "unfrozen")
        with pytest.raises(ConfigError, match="neither saved nor merged"):
            again.merge_and_unload()


def test_training_on_without_the_subspace_is_refused(tmp_path):
    adapted = adapt(make_model())
    adapted.save_pretrained(tmp_path)
    for file in (tmp_path / "subspace").iterdir():
        file.unlink()
    (tmp_path / "subspace").rmdir()
    with (
        pytest.warns(UserWarning, match="not beside its configuration"),
        pytest.raises(ConfigError, match=r"protects features in .* is not there.*is_trainable=False"),
    ):
        PeftModel.from_pretrained(make_model(), str(tmp_path), is_trainable=True)


def test_it_holds_for_the_saved_factors_and_the_exported_plain_lora(tmp_path):
    adapted = adapt(make_model())
    train(adapted)
    subspace = adapted.peft_config["default"].subspace
    adapted.save_pretrained(tmp_path / "adapter")
    export_lora(tmp_path / "adapter", tmp_path / "plain")

    plain = PeftModel.from_pretrained(make_model(), str(tmp_path / "plain"))

    assert type(plain.peft_config["default"]) is LoraConfig
    assert max(leaks(plain, subspace)) < 1e-6
    for layer in layers(plain).values():
        assert type(layer.lora_A["default"]) is torch.nn.Linear
    saved = get_peft_model_state_dict(adapted)
    effective = {
        f"base_model.model.{name}.lora_A.weight": layer.lora_A["default"].weight
        for name, layer in layers(adapted.get_base_model()).items()
    }
    assert all(torch.equal(saved[key], value) for key, value in effective.items())


@pytest.mark.parametrize("safe", [False, True])
def test_it_holds_after_merging_and_unmerging_gives_the_base_back(safe):
    adapted = adapt(make_model())
    train(adapted)
    subspace, base = adapted.peft_config["default"].subspace, make_model()
    start = {name: p.clone() for name, p in adapted.named_parameters() if "base_layer" in name}
    adapted.merge_adapter(safe_merge=safe)
    adapted.unmerge_adapter()
    for name, parameter in adapted.named_parameters():
        if "base_layer" in name:
            torch.testing.assert_close(parameter, start[name], rtol=0, atol=1e-5)
    names = list(layers(adapted.get_base_model()))

    merged = adapted.merge_and_unload(safe_merge=safe)

    for name in names:
        weight = base.get_submodule(name).weight.double()
        delta = merged.get_submodule(name).weight.double() - weight
        for side, rows in directions(subspace, base, name).items():
            along = delta @ rows.T if side == "read" else rows @ delta
            assert along.abs().max() < 1e-6 * torch.linalg.matrix_norm(weight, 2)


def test_it_holds_in_mixed_batches_and_for_one_of_several_adapters():
    model = make_model()
    adapted = adapt(model)
    adapted.add_adapter("free", config_for(adapted.get_base_model(), protected=None))
    train(adapted)
    adapted.set_adapter("free")
    train(adapted)
    subspace = adapted.peft_config["default"].subspace
    assert max(leaks(adapted, subspace, "default")) < 1e-6
    assert max(leaks(adapted, subspace, "free")) > 1e-2

    adapted.eval()
    with torch.no_grad():
        alone = {}
        for name in ("default", "free"):
            adapted.set_adapter(name)
            alone[name] = adapted(IDS).logits
        mixed = adapted(IDS, adapter_names=["default", "free"]).logits
    torch.testing.assert_close(mixed[0], alone["default"][0], rtol=0, atol=1e-5)
    torch.testing.assert_close(mixed[1], alone["free"][1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["linear", "cat", "svd", "ties", "magnitude_prune_svd"])
def test_a_combination_of_adapters_with_the_same_protection_has_it_too(kind, tmp_path):
    model = make_model()
    adapted = adapt(model)
    adapted.add_adapter("other", config_for(adapted.get_base_model()))
    for name in ("default", "other"):
        adapted.set_adapter(name)
        train(adapted, steps=2)
    subspace = adapted.peft_config["default"].subspace
    options = {"density": 0.5} if kind in ("ties", "magnitude_prune_svd") else {}
    adapted.base_model.add_weighted_adapter(["default", "other"], [0.6, 0.5], "both", combination_type=kind, **options)

    assert max(leaks(adapted, subspace, "both")) < 1e-5
    adapted.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="protects features"):
        PeftModel.from_pretrained(make_model(), str(tmp_path / "both"), is_trainable=True)
    again = PeftModel.from_pretrained(make_model(), str(tmp_path / "both"))
    assert max(leaks(again, subspace)) < 1e-5


def test_a_combination_with_another_protection_is_refused():
    adapted = adapt(make_model())
    adapted.add_adapter("free", config_for(adapted.get_base_model(), protected=None))
    with pytest.raises(ConfigError, match="protect different features"):
        adapted.base_model.add_weighted_adapter(["default", "free"], [1, 1], "both", combination_type="linear")
    assert "both" not in adapted.peft_config


def test_hot_swapping_into_an_adapter_in_training_is_refused_and_works_when_it_is_only_run(tmp_path):
    adapted = adapt(make_model())
    train(adapted)
    adapted.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="being trained with protected features"):
        hotswap_adapter(adapted, str(tmp_path), adapter_name="default", torch_device="cpu")
    run = PeftModel.from_pretrained(make_model(), str(tmp_path))
    hotswap_adapter(run, str(tmp_path), adapter_name="default", torch_device="cpu")
    assert max(leaks(run, adapted.peft_config["default"].subspace)) < 1e-6


def test_transformers_loads_a_protected_adapter_to_be_trained_on(tmp_path):
    adapted = adapt(make_model())
    train(adapted)
    adapted.save_pretrained(tmp_path)
    model = make_model()
    model.load_adapter(str(tmp_path), is_trainable=True)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, adapted.eval()(IDS).logits, rtol=0, atol=1e-5)
    train(model)
    assert max(leaks(model, adapted.peft_config["default"].subspace)) < 1e-6


def test_a_model_without_weights_cannot_be_protected():
    with torch.device("meta"):
        model = make_model()
    with pytest.raises(ConfigError, match="on the meta device, where nothing can be protected"):
        adapt(model)


def test_intruder_reduction_is_refused():
    from peft.tuners.lora.intruders import reduce_intruder_dimension

    with pytest.raises(ConfigError, match="would subtract parts of the base weights"):
        reduce_intruder_dimension(adapt(make_model()), logging_sink=None)


def test_a_model_in_bfloat16_is_protected_exactly_in_its_float32_factors():
    adapted = adapt(make_model().to(torch.bfloat16))
    subspace = adapted.peft_config["default"].subspace
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            train(adapted, steps=1)
        assert max(leaks(adapted, subspace)) < 1e-6
    factor = next(iter(layers(adapted).values())).lora_A["default"]
    exact = factor.weight
    with torch.autocast("cpu", dtype=torch.bfloat16):  # which would round the product
        assert torch.equal(factor.weight, exact)


def test_copies_and_compilation_keep_it():
    adapted = adapt(make_model())
    train(adapted)
    subspace = adapted.peft_config["default"].subspace
    again = copy.deepcopy(adapted)
    train(again)
    assert max(leaks(again, subspace)) < 1e-6
    torch._dynamo.reset()
    compiled = torch.compile(adapted.eval(), backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(IDS).logits, adapted(IDS).logits, rtol=0, atol=1e-5)


def test_heads_are_protected_in_their_own_block_only():
    model = make_model()
    subspace = make_subspace(model, {"blocks.1.hook_resid_post": 4}, protected={"blocks.1.attn.hook_z": 2})
    config = SaeSubspaceConfig(subspace=subspace, r=4, target_modules=["down_proj", "o_proj"])
    adapted = get_peft_model(model, config)
    counts = {
        name: (entry["protected_read"], entry["protected_write"])
        for name, entry in adapted.peft_config["default"].basis_record["modules"].items()
    }
    assert counts.pop("model.layers.1.self_attn.o_proj") == (2, 0)
    assert set(counts.values()) == {(0, 0)}
    for target in ("q_proj", "v_proj"):
        config = SaeSubspaceConfig(subspace=subspace, r=4, target_modules=[target])
        with pytest.raises(ConfigError, match=rf"What 'model.layers.1.self_attn.{target}' computes becomes the heads'"):
            get_peft_model(make_model(), config)


def update(adapted, name):
    return adapted.get_base_model().get_submodule(name).get_delta_weight("default").detach()


def test_the_mlps_input_is_protected_where_its_own_block_reads_it():
    model = make_model()
    hooks = {"blocks.1.mlp.hook_in": 2, "blocks.0.hook_resid_post": 1}
    subspace = make_subspace(model, {"blocks.1.hook_resid_post": 4}, protected=hooks)
    torch.manual_seed(0)
    config = SaeSubspaceConfig(subspace=subspace, r=4, target_modules=["gate_proj", "q_proj"], task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    train(adapted)
    record = adapted.peft_config["default"].basis_record["modules"]
    counts = {name: entry["protected_read"] for name, entry in record.items()}
    assert counts.pop("model.layers.1.mlp.gate_proj") == 3
    assert set(counts.values()) == {1}
    own, other = (update(adapted, f"model.layers.{block}.mlp.gate_proj") for block in (1, 2))
    directions = subspace.protected[0].directions
    assert (own @ directions.T).abs().max() < 1e-6 * own.norm() < 1e-2 * (other @ directions.T).abs().max()
    stream = subspace.protected[1].directions * model.model.layers[1].post_attention_layernorm.weight.detach()
    assert (own @ stream.T).abs().max() < 1e-6 * own.norm()


@pytest.mark.parametrize(
    ("family", "target", "refused"),
    [
        ("llama", "model.layers.0.mlp.down_proj", True),
        ("llama", "model.layers.1.self_attn.o_proj", True),
        ("llama", "model.layers.1.mlp.down_proj", False),
        ("llama", "model.layers.2.self_attn.o_proj", False),
        ("gpt_neox", "gpt_neox.layers.0.mlp.dense_4h_to_h", True),
        ("gpt_neox", "gpt_neox.layers.1.attention.dense", False),  # beside the MLP, not before it
    ],
)
def test_what_writes_before_an_mlp_cannot_be_kept_from_features_of_its_input(family, target, refused):
    model = make_model(family)
    subspace = make_subspace(model, {"blocks.1.hook_resid_post": 4}, protected={"blocks.1.mlp.hook_in": 2})
    config = SaeSubspaceConfig(subspace=subspace, r=4, target_modules=[target])
    if not refused:
        get_peft_model(model, config)
        return
    with pytest.raises(ConfigError, match=rf"What '{target}' writes reaches the MLP of block 1 through its norm"):
        get_peft_model(model, config)


def test_the_spaces_of_one_side_together_leave_something():
    model = make_model()
    hooks = {"blocks.1.mlp.hook_in": 20, "blocks.0.hook_resid_post": 20}
    subspace = make_subspace(model, {"blocks.1.hook_resid_post": 4}, protected=hooks)
    config = SaeSubspaceConfig(subspace=subspace, r=4, target_modules=["gate_proj"])
    with pytest.raises(ConfigError, match=r"fill all 32 dimensions that 'model\.layers\.1\.mlp\.gate_proj' reads"):
        get_peft_model(model, config)


def test_an_empty_basis_with_protection_is_lora_that_ignores_features():
    model = make_model()
    adapted = adapt(model, ranks={})
    subspace = adapted.peft_config["default"].subspace
    assert not subspace.sites
    losses = train(adapted)
    assert losses[-1] < losses[0]
    assert max(leaks(adapted, subspace)) < 1e-6
    for fields, message in [({"freeze_basis": True}, "freeze_basis=True could freeze"), ({"r": "auto"}, "r='auto'")]:
        with pytest.raises(ConfigError, match=message):
            adapt(make_model(), ranks={}, **fields)


def test_features_can_be_protected_by_name_in_the_configuration():
    model = make_model()
    adapted = adapt(model, protect=["0:41", "blocks.1.hook_resid_post:2"])
    records = adapted.peft_config["default"].basis_record["modules"].values()
    assert {entry["protected_read"] + entry["protected_write"] for entry in records} == {2}
    assert {entry["basis"] for entry in records} == {3}  # the fourth direction of the basis is the feature itself
    assert {entry["filled"] for entry in records} == {1}


BAD = [
    ({"protect": ["1:99"]}, SelectionError, "names feature 99, and the SAE at blocks.1.hook_resid_post has 64"),
    ({"protect": ["1:50"]}, MismatchError, r"names '1:50'.*has the features \[0, 1, 2, 3\] only"),
    ({"protect": ["7:1"]}, SelectionError, "an SAE at '7', and there are SAEs at"),
    ({"protect": ["nonsense"]}, SelectionError, "'nonsense' names no feature"),
    ({"protected": {"blocks.0.hook_resid_post": 32}}, ConfigError, "fill all 32 dimensions"),
    ({"modules_to_save": ["input_layernorm"]}, ConfigError, "modules_to_save trains the norm .*input_layernorm"),
    ({"use_dora": True}, ConfigError, "use_dora and protected features.*magnitude rescales"),
    ({"bias": "lora_only"}, ConfigError, "trains biases of the base model"),
    ({"target_modules": ["embed_tokens"]}, ConfigError, r"'model.embed_tokens' \(Embedding\) reads and writes"),
    ({"r": 30}, ConfigError, "r=30 exceeds the 29 dimensions .* not protected"),
    (
        {"protect": [f"1:{feature}" for feature in range(4)]},
        ConfigError,
        "All of the basis at blocks.1.hook_resid_post lies in what is protected",
    ),
]


@pytest.mark.parametrize(("fields", "error", "message"), BAD)
def test_what_cannot_be_protected_is_refused_and_leaves_the_model_as_it_was(fields, error, message):
    model = make_model()
    with pytest.raises(error, match=message):
        adapt(model, **fields)
    assert not layers(model)


def test_experts_cannot_be_protected():
    with pytest.raises(ConfigError, match=r"target_parameters=.*cannot be kept"):
        adapt(make_model("mixtral"), target_parameters=["mlp.experts.down_proj"])


@pytest.mark.parametrize("protect", [3, "1:2", [1], None])
def test_protect_that_names_nothing_is_refused(protect):
    with pytest.raises(ConfigError, match=r"protect=.* names no features"):
        SaeSubspaceConfig(subspace=make_subspace(make_model()), protect=protect)


def test_protected_features_travel_with_the_subspace(tmp_path):
    subspace = make_subspace(make_model(), protected=HOOKS)
    subspace.save_pretrained(tmp_path)
    again = Subspace.from_pretrained(tmp_path)
    assert again.digest == subspace.digest
    assert again.protected_features["name"].tolist() == [
        "blocks.0.hook_resid_post:40",
        "blocks.0.hook_resid_post:41",
        "blocks.2.hook_resid_pre:40",
    ]
    assert "2 features protected" in repr(again)
    assert again.digest != make_subspace(make_model()).digest


def test_a_bias_of_a_writing_module_is_protected_too():
    linear = torch.nn.Linear(4, 6)
    unseen = torch.nn.functional.normalize(torch.randn(1, 6))
    guarded = ProtectedLinear(linear, unseen, "write")
    x = torch.randn(3, 4)
    assert (guarded(x) @ unseen.T).abs().max() < 1e-6
    assert (linear(x) @ unseen.T).abs().max() > 1e-2


def test_what_is_saved_of_a_bias_is_what_takes_effect(tmp_path):
    model = make_model("gpt2")  # its c_proj has a bias to merge into
    adapted = adapt(model, lora_bias=True)
    train(adapted)
    state = get_peft_model_state_dict(adapted)
    subspace = adapted.peft_config["default"].subspace
    checked = 0
    for key, value in state.items():
        if key.endswith("c_proj.lora_B.bias"):
            name = key.removeprefix("base_model.model.").removesuffix(".lora_B.bias")
            along = directions(subspace, adapted.get_base_model(), name)["write"] @ value.double()
            assert along.abs().max() < 1e-6 * value.norm()
            raw = adapted.get_base_model().get_submodule(name).lora_B["default"].raw_bias
            checked += not torch.allclose(raw, value)
    assert checked == 6


def test_adapters_loaded_only_to_be_run_are_not_combined_as_protected(tmp_path):
    adapted = adapt(make_model())
    train(adapted)
    adapted.save_pretrained(tmp_path)
    run = PeftModel.from_pretrained(make_model(), str(tmp_path))
    run.load_adapter(str(tmp_path), adapter_name="other")
    with pytest.raises(ConfigError, match="'default' was loaded only to be run"):
        run.base_model.add_weighted_adapter(["default", "other"], [1, 1], "both", combination_type="ties", density=0.5)


def test_padding_for_hot_swapping_is_refused_in_training():
    with pytest.raises(ConfigError, match="being trained with protected features"):
        prepare_model_for_compiled_hotswap(adapt(make_model()), target_rank=8)


def test_hot_swapping_in_transformers_is_refused_in_training(tmp_path):
    adapt(make_model()).save_pretrained(tmp_path)
    model = make_model()
    model.load_adapter(str(tmp_path), is_trainable=True)
    with pytest.raises(ConfigError, match="being trained with protected features"):
        model.load_adapter(str(tmp_path), adapter_name="default", hotswap=True)


def test_swapping_in_an_adapter_without_protection_is_refused(tmp_path):
    for name, protected in (("guarded", HOOKS), ("free", None)):
        adapt(make_model(), protected=protected).save_pretrained(tmp_path / name)
    run = PeftModel.from_pretrained(make_model(), str(tmp_path / "guarded"))
    with pytest.raises(ConfigError, match="protected features: True, and the one to be swapped in: False"):
        hotswap_adapter(run, str(tmp_path / "free"), adapter_name="default", torch_device="cpu")


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "bert"])
def test_behind_a_post_norm_the_update_only_rescales_what_the_base_writes(family):
    """Along a protected direction the norm's output changes by the factor that everything changes by."""
    model = make(family)
    target = "attention.output.dense" if family == "bert" else "o_proj"
    adapted = adapt(model, target_modules=[target])
    train(adapted)
    adapted.eval()
    subspace, base = adapted.peft_config["default"].subspace, adapted.get_base_model()
    rows = torch.cat([site.directions for site in subspace.protected])
    path = {"bert": "bert.encoder.layer.1.attention.output.LayerNorm"}
    norm = base.get_submodule(path.get(family, "model.layers.1.post_attention_layernorm"))
    layer = next(layer for name, layer in layers(base).items() if ".1." in name)
    x = torch.randn(7, layer.in_features, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        written = layer.base_layer(x)
        zero = norm(torch.zeros_like(written))
        off, on = norm(written) - zero, norm(layer(x)) - zero
    factor = ((on @ rows.T) / (off @ rows.T)).double()
    assert (on - off).abs().max() > 1e-2
    torch.testing.assert_close(factor, factor[:, :1].expand_as(factor), rtol=2e-3, atol=0)


def test_a_module_whose_weights_are_offloaded_is_refused_wherever_it_stands():
    from accelerate import cpu_offload

    model = make_model()
    cpu_offload(model.model.layers[2], execution_device="cpu")
    with pytest.raises(ConfigError, match=r"'model.layers.2.self_attn.o_proj' is on the meta device"):
        adapt(model, target_modules=["o_proj"])


def test_a_head_that_is_the_embedding_cannot_be_protected():
    with pytest.raises(ConfigError, match="'lm_head' shares its weights with the input embedding"):
        adapt(make_model("llama", tie_word_embeddings=True), target_modules=["lm_head"])
    adapted = adapt(make_model(), target_modules=["lm_head"])
    assert adapted.peft_config["default"].basis_record["modules"]["lm_head"]["protected_read"] == 3


def test_names_in_the_configuration_that_leave_out_protected_features_are_told(caplog):
    adapt(make_model(), protect=["0:41"])
    assert "2 that the Subspace protects are not among them" in caplog.text
    assert "blocks.0.hook_resid_post:40" in caplog.text


def test_what_lies_along_protected_features_is_left_out_of_the_basis():
    """Of a feature that is nearly protected no basis is made up."""
    model = make_model()
    subspace = make_subspace(model, protected={"blocks.0.hook_resid_post": 1})
    near = torch.nn.functional.normalize(subspace.sites[0].basis[:1] + 1e-3 * torch.randn(1, 32), dim=1)
    guard = dataclasses.replace(subspace.protected[0], directions=near)
    subspace = dataclasses.replace(subspace, protected=(guard,))
    config = SaeSubspaceConfig(subspace=subspace, r="auto", freeze_basis=True, target_modules=["down_proj"])
    adapted = get_peft_model(model, config)
    for layer in layers(adapted).values():
        columns = layer.lora_B["default"].weight
        span = subspace.sites[0].basis
        assert columns.shape == (32, 3)
        torch.testing.assert_close(span.T @ (span @ columns), columns, rtol=0, atol=1e-2)


def test_protected_features_of_another_width_are_refused():
    model = make_model()
    subspace = make_subspace(model, protected={"blocks.0.hook_resid_post": 1})
    guard = subspace.protected[0]
    narrow = dataclasses.replace(guard, sae=dataclasses.replace(guard.sae, d_in=16), directions=torch.ones(1, 16) / 4)
    config = SaeSubspaceConfig(
        subspace=dataclasses.replace(subspace, protected=(narrow,)), r=4, target_modules=["o_proj"]
    )
    with pytest.raises(MismatchError, match=r"32 wide on its write side, and the protected features at .* are 16 wide"):
        get_peft_model(model, config)


def test_a_saved_protection_cannot_be_switched_off_in_the_file(tmp_path):
    adapt(make_model()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "protect": False}))
    with pytest.raises(ConfigError, match="protect=False would let it use them"):
        PeftModel.from_pretrained(make_model(), str(tmp_path), is_trainable=True)


def test_a_factor_is_computed_once_in_a_forward_pass_and_anew_in_the_next(llama):
    adapted = adapt(copy.deepcopy(llama), target_modules=["q_proj"], protected={"blocks.0.hook_resid_post": 2})
    (factor, *_) = (module for module in adapted.modules() if isinstance(module, ProtectedLinear))
    train(adapted, steps=2)  # so that B is not zero
    calls, effective = [], ProtectedLinear.effective

    def spy(self, raw):
        calls.append(self)
        return effective(self, raw)

    ProtectedLinear.effective = spy
    try:
        for step in (1, 2):  # also where nothing was updated in between, as when gradients are accumulated
            adapted(IDS, labels=IDS).loss.backward()
            assert calls.count(factor) == step
        calls.clear()
        with torch.no_grad():
            factor.raw_weight.mul_(2)
        first = adapted(IDS).logits
        assert calls.count(factor) == 1
    finally:
        ProtectedLinear.effective = effective
    for no_grad in (False, True):
        assert factor.weight.requires_grad  # somebody asks, and does not use it: the next pass must not
        with torch.no_grad():
            factor.raw_weight.mul_(3)
        expected = copy.deepcopy(adapted)(IDS).logits
        with torch.set_grad_enabled(not no_grad):
            found = adapted(IDS).logits
        assert torch.equal(found, expected)
        assert not torch.equal(found, first)
    factor.weight.sum().backward()
    adapted(IDS, labels=IDS).loss.backward()


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_a_compiled_pass_takes_no_factor_of_before(llama):
    adapted = adapt(copy.deepcopy(llama), target_modules=["q_proj"], protected={"blocks.0.hook_resid_post": 2})
    train(adapted, steps=2)
    (factor, *_) = (module for module in adapted.modules() if isinstance(module, ProtectedLinear))
    assert factor.weight.requires_grad
    with torch.no_grad():
        factor.raw_weight.mul_(3)
    expected = copy.deepcopy(adapted)(IDS).logits
    torch.testing.assert_close(torch.compile(adapted, backend="aot_eager")(IDS).logits, expected)
