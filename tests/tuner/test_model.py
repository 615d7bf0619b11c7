"""Injection, and what follows it in an adapter's life."""

import copy
import json
import re
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from peft_sae import MissingSubspaceWarning, SaeSubspaceConfig, SaeSubspaceModel
from peft_sae.errors import ArtifactError, ConfigError, MismatchError
from tests.tiny import FAMILIES, make_classifier, make_model, make_subspace

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
IDS = torch.randint(4, 16, (2, 9), generator=torch.Generator().manual_seed(0))


def adapt(model, *, subspace=None, **fields) -> PeftModel:
    fields = {"r": "auto", "target_modules": "all-linear", "task_type": "CAUSAL_LM", **fields}
    if model.config.model_type == "gpt2":
        fields.setdefault("fan_in_fan_out", True)
    if model.config.model_type in ("mixtral", "qwen3_moe") and fields["target_modules"] == "all-linear":
        fields["target_modules"] = ATTENTION  # the experts are parameters, and get no basis
    return get_peft_model(model, SaeSubspaceConfig(subspace=subspace or make_subspace(model), **fields))


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def train(model, steps=3, rate=0.5):
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=rate)
    for _ in range(steps):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def base_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The base model's tensors, under their own names, whether it is adapted or not."""
    return {
        name.replace("base_model.model.", "").replace(".base_layer", ""): tensor.clone()
        for name, tensor in model.state_dict().items()
        if "lora_" not in name
    }


def layers(model):
    return {name: module for name, module in model.get_base_model().named_modules() if hasattr(module, "lora_A")}


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_step_zero_is_the_base_model_and_base_weights_keep_their_bits(family, freeze):
    model = make_model(family)
    before, weights = logits(model), base_weights(model)

    adapted = adapt(model, freeze_basis=freeze)
    assert torch.equal(logits(adapted), before)
    train(adapted)

    assert not torch.allclose(logits(adapted), before)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in base_weights(adapted).items())
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), before)
    assert torch.equal(logits(adapted.unload()), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_modules_are_on_the_side_that_the_architecture_says(family):
    adapted = adapt(make_model(family))

    written = {
        name.split(".", 3)[-1] for name, layer in layers(adapted).items() if not layer.lora_A["default"].weight.any()
    }
    read = {
        name.split(".", 3)[-1] for name, layer in layers(adapted).items() if not layer.lora_B["default"].weight.any()
    }

    assert not written & read
    assert {name.split(".")[-1] for name in written} == {
        "gpt2": {"c_proj"},
        "gpt_neox": {"dense", "dense_4h_to_h"},
        "opt": {"out_proj", "fc2"},
        "mixtral": {"o_proj"},
        "qwen3_moe": {"o_proj"},
    }.get(family, {"o_proj", "down_proj"})


@pytest.mark.parametrize("freeze", [False, True])
def test_only_the_free_factor_is_trained_when_the_basis_is_frozen(freeze):
    adapted = adapt(make_model("gemma2"), freeze_basis=freeze)
    start = {name: parameter.clone() for name, parameter in adapted.named_parameters() if "lora_" in name}

    train(adapted)

    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            holds_basis = ("lora_A" in name) != bool(re.search("o_proj|down_proj", name))
            frozen = freeze and holds_basis
            assert parameter.requires_grad is not frozen, name
            assert torch.equal(parameter, start[name]) is frozen, name


def test_frozen_stays_frozen_when_adapters_are_switched():
    adapted = adapt(make_model(), freeze_basis=True)
    adapted.add_adapter("free", SaeSubspaceConfig(subspace=make_subspace(adapted), r=2, target_modules=["q_proj"]))
    query = adapted.get_base_model().model.layers[0].self_attn.q_proj

    adapted.set_adapter("free")
    assert query.lora_A["free"].weight.requires_grad
    adapted.set_adapter("default")
    assert not query.lora_A["default"].weight.requires_grad
    assert query.lora_B["default"].weight.requires_grad
    adapted.set_requires_grad("default")
    assert not query.lora_A["default"].weight.requires_grad


def test_a_name_used_again_after_deletion_is_not_frozen():
    adapted = adapt(make_model(), freeze_basis=True)
    free = SaeSubspaceConfig(subspace=make_subspace(adapted), r=2, target_modules=["q_proj"])
    adapted.add_adapter("other", copy.deepcopy(free))
    adapted.set_adapter("other")
    adapted.delete_adapter("default")
    adapted.add_adapter("default", copy.deepcopy(free))
    adapted.set_adapter("default")

    assert adapted.get_base_model().model.layers[0].self_attn.q_proj.lora_A["default"].weight.requires_grad


def test_auto_rank_is_each_sites_own_and_is_recorded():
    model = make_model()
    subspace = make_subspace(model, {"blocks.0.hook_resid_post": 2, "blocks.1.hook_resid_post": 5})

    adapted = adapt(model, subspace=subspace, target_modules=["q_proj"])

    config = adapted.peft_config["default"]
    ranks = {name: layer.r["default"] for name, layer in layers(adapted).items()}
    assert list(ranks.values()) == [2, 2, 5]  # a block reads what the one before it has left
    assert config.r == 5
    assert {name: entry["basis"] for name, entry in config.basis_record["modules"].items()} == ranks


def test_the_basis_is_cut_in_order_of_importance_where_r_is_smaller():
    model = make_model()
    subspace = make_subspace(model, {"blocks.0.hook_resid_post": 6})

    adapted = adapt(model, subspace=subspace, r=2, norm_gain=False, target_modules=["q_proj"])

    for layer in layers(adapted).values():
        torch.testing.assert_close(layer.lora_A["default"].weight, subspace.sites[0].basis[:2])


def test_norm_gain_carries_the_basis_through_the_norm():
    model = make_model("gemma2")
    subspace = make_subspace(model)
    gain = 1 + model.model.layers[1].input_layernorm.weight.detach()
    post_gain = 1 + model.model.layers[1].post_attention_layernorm.weight.detach()

    adapted = adapt(model, subspace=subspace, target_modules=["q_proj", "o_proj"])

    attention = adapted.get_base_model().model.layers[1].self_attn
    for found, expected in [
        (attention.q_proj.lora_A["default"].weight, subspace.sites[0].basis * gain),
        (attention.o_proj.lora_B["default"].weight.T, subspace.sites[0].basis / post_gain),
    ]:
        torch.testing.assert_close(found @ found.T, torch.eye(4), rtol=0, atol=1e-5)
        torch.testing.assert_close((expected @ found.T) @ found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("fill", "filled_norm"), [("orthogonal", 1.0), ("zeros", 0.0)])
def test_directions_beyond_the_basis_are_filled_and_recorded(fill, filled_norm):
    adapted = adapt(make_model(), r=6, fill=fill, target_modules=["q_proj", "o_proj"])

    for name, layer in layers(adapted).items():
        factor = layer.lora_A["default"].weight if "q_proj" in name else layer.lora_B["default"].weight.T
        torch.testing.assert_close(factor[4:].norm(dim=1), torch.full((2,), filled_norm))
        torch.testing.assert_close(factor[:4] @ factor[4:].T, torch.zeros(4, 2), rtol=0, atol=1e-6)
        entry = adapted.peft_config["default"].basis_record["modules"][name]
        assert (entry["basis"], entry["filled"]) == (4, 2)


def test_exact_layer_map_leaves_other_blocks_alone():
    model = make_model()
    subspace = make_subspace(model, {"blocks.0.hook_resid_post": 2})

    adapted = adapt(model, subspace=subspace, layer_map="exact")

    assert set(layers(adapted)) == {
        *(f"model.layers.0.{path}" for path in ("self_attn.o_proj", "mlp.down_proj")),
        *(f"model.layers.1.{path}" for path in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        *(f"model.layers.1.mlp.{path}" for path in ("gate_proj", "up_proj")),
    }


def test_exact_layer_map_loads_as_it_was(tmp_path):
    subspace = make_subspace(make_model(), {"blocks.0.hook_resid_post": 2})
    adapted = adapt(make_model(), subspace=subspace, layer_map="exact", target_modules=["q_proj"])
    train(adapted)
    adapted.save_pretrained(tmp_path)

    loaded = PeftModel.from_pretrained(make_model(), tmp_path)

    assert set(layers(loaded)) == set(layers(adapted))
    assert torch.equal(logits(loaded), logits(adapted))


def test_an_sae_on_the_heads_gives_the_output_projection_a_read_basis():
    model = make_model()
    subspace = make_subspace(model, {"blocks.1.attn.hook_z": 3})

    adapted = adapt(model, subspace=subspace, target_modules=["o_proj"], layers_to_transform=[1])

    (layer,) = layers(adapted).values()
    torch.testing.assert_close(layer.lora_A["default"].weight, subspace.sites[0].basis, rtol=1e-5, atol=1e-6)


def test_an_sae_on_the_mlps_input_gives_its_readers_a_basis_without_a_norms_gain():
    model = make_model()
    subspace = make_subspace(model, {"blocks.1.mlp.hook_in": 3})
    targets = ["gate_proj", "up_proj"]

    adapted = adapt(model, subspace=subspace, target_modules=targets, layers_to_transform=[1])

    assert len(layers(adapted)) == 2
    for layer in layers(adapted).values():
        torch.testing.assert_close(layer.lora_A["default"].weight, subspace.sites[0].basis, rtol=1e-5, atol=1e-6)
    for name in ("down_proj", "o_proj", "q_proj"):
        with pytest.raises(MismatchError, match=r"can get no basis from SAEs at \['mlp_in'\] alone"):
            adapt(make_model(), subspace=subspace, target_modules=[name], layers_to_transform=[1])
    with pytest.raises(MismatchError, match=r"layers\.0\.mlp\.gate_proj' can get no basis .* it reads resid_mid"):
        adapt(make_model(), subspace=subspace, target_modules=targets)


def test_an_sae_on_the_mlps_input_changes_nothing_where_there_is_one_of_the_stream():
    plans = []
    for hooks in ({"blocks.1.hook_resid_post": 3}, {"blocks.1.hook_resid_post": 3, "blocks.1.mlp.hook_in": 2}):
        model = make_model()
        adapted = adapt(model, subspace=make_subspace(model, hooks), target_modules=["gate_proj", "down_proj"])
        plans.append(adapted.peft_config["default"].basis_record["modules"])

    assert plans[0] == plans[1]
    assert {entry["hook_name"] for entry in plans[0].values()} == {"blocks.1.hook_resid_post"}


def test_sides_override_the_architecture():
    adapted = adapt(
        make_model(), r=3, target_modules=["q_proj", "v_proj", "lm_head"], sides={"v_proj": "none", "lm_head": "read"}
    )

    record = adapted.peft_config["default"].basis_record["modules"]
    assert {name.split(".")[-1]: entry["side"] for name, entry in record.items()} == {
        "q_proj": "read",
        "v_proj": "none",
        "lm_head": "read",
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_adapters_load_where_the_subspace_has_gone(tmp_path, family):
    model = make_model(family)
    make_subspace(model).save_pretrained(tmp_path / "source")
    adapted = adapt(model, subspace=str(tmp_path / "source"), freeze_basis=True)
    train(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    shutil.rmtree(tmp_path / "source")
    shutil.move(tmp_path / "adapter", tmp_path / "moved")

    loaded = PeftModel.from_pretrained(make_model(family), tmp_path / "moved")
    assert torch.equal(logits(loaded), logits(adapted))

    shutil.rmtree(tmp_path / "moved" / "subspace")
    bare = PeftModel.from_pretrained(make_model(family), tmp_path / "moved")
    assert torch.equal(logits(bare), logits(adapted))


def test_training_goes_on_after_loading_with_the_same_factors_frozen(tmp_path):
    adapted = adapt(make_model(), freeze_basis=True)
    train(adapted)
    adapted.save_pretrained(tmp_path)

    loaded = PeftModel.from_pretrained(make_model(), tmp_path, is_trainable=True)

    assert torch.equal(logits(loaded), logits(adapted))
    expected = {name: parameter.requires_grad for name, parameter in adapted.named_parameters()}
    assert {name: parameter.requires_grad for name, parameter in loaded.named_parameters()} == expected
    train(loaded)
    train(adapted)
    torch.testing.assert_close(logits(loaded), logits(adapted))


def test_a_name_that_no_module_has_is_told(caplog):
    adapted = adapt(make_model(), target_modules=["q_proj", "v_prj"])
    assert "target_modules has ['v_prj'], and the model no module of that name" in caplog.text
    assert "Did you mean 'v_proj'" in caplog.text
    assert any("q_proj.lora_A" in name for name, _ in adapted.named_parameters())
    caplog.clear()
    adapt(make_model(), target_modules=["layers.1.self_attn.q_proj", "o_proj"])
    assert not caplog.text


def test_no_memory_is_taken_for_ranks_that_no_module_can_have(tmp_path):
    adapt(make_model()).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "r": 60_000, "rank_pattern": {}}))

    with pytest.raises(ConfigError, match=r"r=60000 exceeds the \d+ dimensions that .* no basis had so many"):
        PeftModel.from_pretrained(make_model(), tmp_path)


def test_loading_for_training_without_the_subspace_warns_and_still_freezes(tmp_path):
    adapted = adapt(make_model(), freeze_basis=True)
    adapted.save_pretrained(tmp_path)
    shutil.rmtree(tmp_path / "subspace")

    with pytest.warns(MissingSubspaceWarning, match="not beside its configuration"):
        loaded = PeftModel.from_pretrained(make_model(), tmp_path, is_trainable=True)

    assert torch.equal(logits(loaded), logits(adapted))
    query = loaded.get_base_model().model.layers[0].self_attn.q_proj
    assert not query.lora_A["default"].weight.requires_grad


@pytest.mark.parametrize("record", [True, False])
def test_an_adapter_that_is_loaded_to_be_run_looks_up_nothing_that_its_file_names(tmp_path, monkeypatch, record):
    adapted = adapt(make_model(), r=3)
    adapted.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = {**json.loads(path.read_text()), "subspace": "somebody/tracker"}
    path.write_text(json.dumps(config if record else {**config, "basis_record": None}))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the Hub"))

    loaded = PeftModel.from_pretrained(make_model(), tmp_path)
    assert torch.equal(logits(loaded), logits(adapted))
    loaded.save_pretrained(tmp_path / "again")


def test_a_record_that_would_unfreeze_the_basis_is_refused(tmp_path):
    adapt(make_model(), freeze_basis=True).save_pretrained(tmp_path)
    shutil.rmtree(tmp_path / "subspace")
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    config["basis_record"]["modules"] = {}
    path.write_text(json.dumps(config))

    with pytest.raises(ConfigError, match="basis_record says nothing of the basis"):
        PeftModel.from_pretrained(make_model(), tmp_path)


def test_saving_a_loaded_adapter_carries_the_subspace_on(tmp_path):
    adapted = adapt(make_model())
    adapted.save_pretrained(tmp_path / "first")

    PeftModel.from_pretrained(make_model(), tmp_path / "first").save_pretrained(tmp_path / "second")
    shutil.rmtree(tmp_path / "first")

    config = SaeSubspaceConfig.from_pretrained(str(tmp_path / "second"))
    from peft_sae import Subspace

    assert Subspace.from_pretrained(config.subspace).digest == adapted.peft_config["default"].basis_record["digest"]
    assert Subspace.from_pretrained(tmp_path / "second").digest == Subspace.from_pretrained(config.subspace).digest


def test_a_saved_config_is_a_template_for_a_new_adapter(tmp_path):
    first = adapt(make_model(), freeze_basis=True)
    train(first)
    first.save_pretrained(tmp_path)

    config = SaeSubspaceConfig.from_pretrained(str(tmp_path))
    config.inference_mode = False
    second = get_peft_model(make_model(), config)

    fresh = adapt(make_model(), freeze_basis=True)
    for (name, mine), expected in zip(second.named_parameters(), fresh.parameters(), strict=True):
        if "lora_A" in name or ("lora_B" in name and re.search("o_proj|down_proj", name)):
            assert torch.equal(mine, expected), name
        assert mine.requires_grad is expected.requires_grad


def test_automatic_ranks_are_found_anew_when_a_config_is_used_again():
    model = make_model()
    subspace = make_subspace(model, {"blocks.0.hook_resid_post": 2, "blocks.1.hook_resid_post": 5})
    config = SaeSubspaceConfig(subspace=subspace, r="auto", target_modules=["q_proj"])
    get_peft_model(model, config)
    config.target_modules = {"k_proj"}

    again = get_peft_model(make_model(), config)

    record = again.peft_config["default"].basis_record["modules"]
    assert [(entry["basis"], entry["filled"], entry["dropped"]) for entry in record.values()] == [
        (2, 0, 0),
        (2, 0, 0),
        (5, 0, 0),
    ]


def test_a_rank_that_the_user_sets_later_is_kept():
    model = make_model()
    config = SaeSubspaceConfig(subspace=make_subspace(model), r="auto", target_modules=["q_proj"])
    get_peft_model(model, config)
    config.r = 2

    again = get_peft_model(make_model(), config)

    assert {layer.r["default"] for layer in layers(again).values()} == {2}


def test_the_users_rank_pattern_goes_before_the_automatic_rank():
    adapted = adapt(make_model(), target_modules=["q_proj", "v_proj"], rank_pattern={"layers.0.self_attn.q_proj": 2})

    assert [layer.r["default"] for layer in layers(adapted).values()] == [2, 4, 4, 4, 4, 4]
    assert adapted.peft_config["default"].rank_pattern["layers.0.self_attn.q_proj"] == 2


def test_directions_that_do_not_fit_the_rank_are_told_and_recorded(caplog):
    adapted = adapt(make_model(), r=3, target_modules=["q_proj"])

    assert "r=3 keeps 3 of the 4 directions" in caplog.text
    record = adapted.peft_config["default"].basis_record["modules"]
    assert {(entry["basis"], entry["dropped"]) for entry in record.values()} == {(3, 1)}


@pytest.mark.parametrize("kind", ["linear", "cat", "svd"])
def test_weighted_adapters_are_what_lora_makes_of_the_same_factors(kind, tmp_path):
    """The same factors in plain LoRA adapters, combined by PEFT, give the same logits."""
    adapted = adapt(make_model(), r=3, freeze_basis=True, target_modules=["q_proj", "o_proj"])
    other = SaeSubspaceConfig(subspace=make_subspace(adapted, seed=5), r=3, target_modules=["q_proj", "o_proj"])
    adapted.add_adapter("other", other)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    plain = {"r": 3, "target_modules": ["q_proj", "o_proj"]}
    lora = get_peft_model(make_model(), LoraConfig(**plain, task_type="CAUSAL_LM"))
    lora.add_adapter("other", LoraConfig(**plain))
    lora.load_state_dict(adapted.state_dict())

    for model in (adapted, lora):
        model.add_weighted_adapter(["default", "other"], [0.7, 0.5], "both", combination_type=kind)
        model.set_adapter("both")

    torch.testing.assert_close(logits(adapted), logits(lora), rtol=1e-4, atol=1e-4)
    config = adapted.peft_config["both"]
    assert (config.subspace, config.freeze_basis, config.basis_record["digest"]) == (None, False, None)
    assert adapted.peft_config["default"].freeze_basis
    assert all(p.requires_grad for n, p in adapted.named_parameters() if "lora_" in n and ".both." in n)
    before = logits(adapted)
    adapted.save_pretrained(tmp_path, selected_adapters=["both"])
    adapted.load_adapter(tmp_path / "both", "both")
    assert torch.equal(logits(adapted), before)


def test_a_failed_combination_leaves_no_name_behind():
    adapted = adapt(make_model(), target_modules=["q_proj"])
    adapted.add_adapter("other", SaeSubspaceConfig(subspace=make_subspace(adapted), r=2, target_modules=["v_proj"]))

    with pytest.raises(ValueError, match="combination_type"):
        adapted.add_weighted_adapter(["default", "other"], [1.0, 1.0], "both", combination_type="stir")
    assert set(adapted.peft_config) == {"default", "other"}


@pytest.mark.parametrize(
    "fields",
    [
        {"use_dora": True},
        {"use_rslora": True},
        {"lora_dropout": 0.5},
        {"modules_to_save": ["lm_head"]},
        {"alpha_pattern": {"q_proj": 3}},
        {"exclude_modules": ["v_proj"]},
        {"target_modules": r".*\.1\.self_attn\.[qo]_proj"},
        {"target_modules": None},
    ],
    ids=str,
)
def test_step_zero_holds_with_loras_options(fields):
    model = make_model()
    before = logits(model)

    adapted = adapt(model, **fields).eval()

    assert torch.equal(logits(adapted), before)


def test_init_lora_weights_false_leaves_the_other_factor_random():
    adapted = adapt(make_model(), init_lora_weights=False, norm_gain=False, target_modules=["q_proj", "o_proj"])

    attention = adapted.get_base_model().model.layers[1].self_attn
    basis = adapted.peft_config["default"].subspace.sites[0].basis
    torch.testing.assert_close(attention.q_proj.lora_A["default"].weight, basis, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(attention.o_proj.lora_B["default"].weight.T, basis, rtol=1e-5, atol=1e-6)
    assert attention.q_proj.lora_B["default"].weight.abs().min() > 0
    assert attention.o_proj.lora_A["default"].weight.abs().min() > 0


def test_a_config_of_another_import_is_refused():
    config = SaeSubspaceConfig(subspace=make_subspace(make_model()), r=2, target_modules=["q_proj"])
    config.__class__ = type("SaeSubspaceConfig", (LoraConfig,), {"__module__": "an.earlier.import"})

    with pytest.raises(ConfigError, match="before peft_sae was imported anew"):
        get_peft_model(make_model(), config)


@pytest.mark.parametrize(
    ("family", "changes"), [("mistral", {}), ("gemma2", {}), ("llama", {"num_hidden_layers": 2})], ids=str
)
def test_a_subspace_of_another_model_is_refused(family, changes):
    with pytest.raises(MismatchError, match="was built on a model with"):
        adapt(make_model(family, **changes), subspace=make_subspace(make_model()), target_modules=["q_proj"])


def test_an_adapter_of_another_model_is_refused_when_loaded(tmp_path):
    adapt(make_model(), target_modules=["q_proj"]).save_pretrained(tmp_path)

    with pytest.raises(MismatchError, match="model_type='llama', and this one has 'mistral'"):
        PeftModel.from_pretrained(make_model("mistral"), tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_merging_and_unmerging(family):
    adapted = adapt(make_model(family))
    train(adapted)
    trained, weights = logits(adapted), base_weights(adapted)

    adapted.merge_adapter()
    torch.testing.assert_close(logits(adapted), trained, rtol=1e-4, atol=1e-4)
    adapted.unmerge_adapter()
    for name, tensor in base_weights(adapted).items():
        torch.testing.assert_close(tensor, weights[name], rtol=1e-5, atol=1e-6)
    merged = adapted.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(logits(merged), trained, rtol=1e-4, atol=1e-4)
    assert not any("lora_" in name for name, _ in merged.named_parameters())


def test_adapters_side_by_side_do_not_touch_each_other():
    model = make_model()
    first = make_subspace(model, {"blocks.0.hook_resid_post": 3})
    second = make_subspace(model, {"blocks.2.hook_resid_post": 2}, seed=5)
    adapted = adapt(model, subspace=first)
    train(adapted)
    alone = logits(adapted)

    adapted.add_adapter("second", SaeSubspaceConfig(subspace=second, r=4, target_modules=["q_proj", "down_proj"]))
    adapted.set_adapter("second")
    assert torch.equal(logits(adapted), logits(make_model()))
    train(adapted)
    adapted.set_adapter("default")
    assert torch.equal(logits(adapted), alone)
    adapted.delete_adapter("second")
    assert torch.equal(logits(adapted), alone)


def test_adapters_side_by_side_are_saved_and_loaded(tmp_path):
    adapted = adapt(make_model())
    adapted.add_adapter(
        "second", SaeSubspaceConfig(subspace=make_subspace(adapted, seed=5), r=4, target_modules=["q_proj"])
    )
    adapted.save_pretrained(tmp_path)

    loaded = PeftModel.from_pretrained(make_model(), tmp_path)
    loaded.load_adapter(tmp_path / "second", "second")

    for name in ("default", "second"):
        loaded.set_adapter(name)
        adapted.set_adapter(name)
        assert torch.equal(logits(loaded), logits(adapted))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_basis_of_a_low_precision_model_is_exact(dtype):
    model = make_model().to(dtype)
    subspace = make_subspace(model)
    before = logits(model)

    adapted = adapt(model, subspace=subspace, norm_gain=False, target_modules=["q_proj", "o_proj"])

    for name, layer in layers(adapted).items():
        factor = layer.lora_A["default"].weight if "q_proj" in name else layer.lora_B["default"].weight.T
        assert factor.dtype is torch.float32
        torch.testing.assert_close(factor, subspace.sites[0].basis, rtol=0, atol=1e-6)
    assert torch.equal(logits(adapted), before)


def test_without_a_subspace_it_is_lora_and_says_so():
    torch.manual_seed(0)
    with pytest.warns(MissingSubspaceWarning, match="No subspace is given, so the adapter starts as plain LoRA"):
        ours = get_peft_model(make_model(), SaeSubspaceConfig(r=4, target_modules=["q_proj"]))
    torch.manual_seed(0)
    lora = get_peft_model(make_model(), LoraConfig(r=4, target_modules=["q_proj"]))

    for (name, mine), theirs in zip(ours.named_parameters(), lora.parameters(), strict=True):
        assert torch.equal(mine, theirs), name


def test_a_config_used_without_a_subspace_takes_one_later():
    config = SaeSubspaceConfig(r=4, target_modules=["q_proj"])
    with pytest.warns(MissingSubspaceWarning):
        get_peft_model(make_model(), config)
    model = make_model()
    config.subspace = make_subspace(model)

    adapted = get_peft_model(model, config)

    assert all(entry["basis"] == 4 for entry in adapted.peft_config["default"].basis_record["modules"].values())


def test_low_cpu_mem_usage_loads_the_same(tmp_path):
    adapted = adapt(make_model(), freeze_basis=True)
    train(adapted)
    adapted.save_pretrained(tmp_path)

    loaded = PeftModel.from_pretrained(make_model(), tmp_path, low_cpu_mem_usage=True)

    assert torch.equal(logits(loaded), logits(adapted))


def test_transformers_own_adapter_calls(tmp_path):
    model = make_model()
    before = logits(model)
    model.add_adapter(SaeSubspaceConfig(subspace=make_subspace(model), r="auto", target_modules=["q_proj"]), "mine")
    assert torch.equal(logits(model), before)
    torch.nn.init.normal_(model.model.layers[1].self_attn.q_proj.lora_B["mine"].weight)
    model.save_pretrained(tmp_path)

    other = make_model()
    other.load_adapter(str(tmp_path), "mine")

    assert torch.equal(logits(other), logits(model))
    assert not torch.allclose(logits(other), before)
    other.delete_adapter("mine")


def test_the_class_can_be_used_without_get_peft_model():
    model = make_model()
    before = logits(model)

    tuner = SaeSubspaceModel(
        model, SaeSubspaceConfig(subspace=make_subspace(model), r=3, target_modules=["q_proj"]), "x"
    )

    assert torch.equal(logits(tuner), before)


BAD = [
    ({"target_modules": ["nothing"]}, ValueError, "Target modules .*nothing.* not found in the base model"),
    ({"r": 33, "target_modules": ["q_proj"]}, ConfigError, "r=33 exceeds the 32 dimensions"),
    ({"r": 5, "fill": "error"}, ConfigError, "r=5 exceeds the 4 directions .* fill='error' forbids"),
    ({"r": 5, "freeze_basis": True}, ConfigError, "r=5 exceeds the 4 directions .* outside the features' span"),
    (
        {"target_modules": ["embed_tokens"]},
        ConfigError,
        r"'model.embed_tokens' \(Embedding\) has no basis, so r='auto'",
    ),
    (
        {"target_modules": ["embed_tokens"], "r": 2, "freeze_basis": True},
        ConfigError,
        "no basis that freeze_basis=True",
    ),
    (
        {"layer_map": "exact", "target_modules": ["q_proj"], "layers_to_transform": [0]},
        MismatchError,
        "layer_map='exact', and the target 'model.layers.0.self_attn.q_proj' touches none of the Subspace's sites",
    ),
    ({"rank_pattern": {"q_proj": 9}, "freeze_basis": True}, ConfigError, "r=9 exceeds the 4 directions .*q_proj"),
    ({"rank_pattern": {"q_proj": 99}}, ConfigError, "r=99 exceeds the 32 dimensions .*q_proj"),
    ({"lora_bias": True, "freeze_basis": True}, ConfigError, "lora_bias=True adds a trained bias .*o_proj"),
    ({"subspace": "no/where"}, ArtifactError, "no folder here"),
    ({"sides": {"q_prj": "none"}}, ConfigError, "sides names 'q_prj', which is the end of no target's name"),
    ({"target_modules": ["q_proj", "input_layernorm"]}, ConfigError, "LlamaRMSNorm, which LoRA cannot adapt"),
    ({"target_parameters": ["q_proj.weight"], "target_modules": []}, ConfigError, "target_parameters=.* get none"),
]


@pytest.mark.parametrize(("fields", "error", "message"), BAD)
def test_what_cannot_work_is_refused_and_leaves_the_model_as_it_was(fields, error, message):
    model = make_model()
    modules = [name for name, _ in model.named_modules()]
    fields = {"subspace": make_subspace(model), "r": "auto", "target_modules": "all-linear", **fields}
    config = SaeSubspaceConfig(**fields)
    before = copy.deepcopy({name: value for name, value in vars(config).items() if name != "subspace"})

    with pytest.raises(error, match=message):
        get_peft_model(model, config)

    assert [name for name, _ in model.named_modules()] == modules
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert {name: value for name, value in vars(config).items() if name != "subspace"} == before


def test_a_module_of_unknown_role_is_refused():
    model = make_classifier()
    config = SaeSubspaceConfig(subspace=make_subspace(model), target_modules=["pooler.dense"])
    with pytest.raises(ConfigError, match=r"'bert.pooler.dense' is not known to read or to write"):
        get_peft_model(model, config)


@pytest.mark.parametrize(("family", "norm"), [("gemma2", "model.norm"), ("gpt2", "transformer.ln_f")])
def test_the_head_reads_the_last_block_through_the_final_norm(family, norm):
    model = make_model(family, tie_word_embeddings=False)
    subspace = make_subspace(model, {"blocks.0.hook_resid_post": 3, "blocks.2.hook_resid_post": 4})
    gain, basis = model.get_submodule(norm).weight.detach(), subspace.sites[1].basis
    carried = basis * (1 + gain) if family == "gemma2" else (basis - basis.mean(1, keepdim=True)) * gain

    adapted = adapt(model, subspace=subspace, target_modules=["lm_head"], layer_map="exact", fan_in_fan_out=False)

    rows = adapted.get_base_model().lm_head.lora_A["default"].weight.detach()
    span = torch.linalg.qr(carried.T)[0]
    assert rows.shape == (4, 32)
    torch.testing.assert_close((rows @ span) @ span.T, rows, rtol=0, atol=1e-5)
    assert adapted.peft_config["default"].basis_record["modules"]["lm_head"]["hook_name"] == "blocks.2.hook_resid_post"


def test_a_subspace_of_another_width_is_refused():
    other = make_subspace(make_model())
    narrow = copy.deepcopy(other.sites[0])
    object.__setattr__(narrow, "sae", type(narrow.sae)("s", "blocks.1.hook_resid_post", 16, 64, None, None, "0" * 64))
    object.__setattr__(narrow, "basis", narrow.basis[:, :16])
    object.__setattr__(other, "sites", (narrow,))

    with pytest.raises(MismatchError, match=r"is 32 wide on its read side, and the basis .* is 16 wide"):
        adapt(make_model(), subspace=other, target_modules=["q_proj"])


def test_a_subspace_of_heads_only_cannot_serve_readers_of_the_stream():
    model = make_model()

    with pytest.raises(MismatchError, match=r"can get no basis from SAEs at \['z'\] alone"):
        adapt(model, subspace=make_subspace(model, {"blocks.1.attn.hook_z": 3}), target_modules=["q_proj"])


def test_another_subspace_in_an_adapters_config_is_refused():
    model = make_model()
    adapted = adapt(model)
    config = adapted.peft_config["default"]
    config.subspace = make_subspace(model, seed=9)

    with pytest.raises(ConfigError, match="set basis_record=None"):
        get_peft_model(make_model(), config)


@pytest.mark.parametrize(
    ("config", "share"),
    [
        (
            {
                "hidden_size": 2304,
                "num_hidden_layers": 26,
                "num_attention_heads": 8,
                "num_key_value_heads": 4,
                "intermediate_size": 9216,
            },
            0.24,
        ),
        (
            {
                "hidden_size": 3584,
                "num_hidden_layers": 42,
                "num_attention_heads": 16,
                "num_key_value_heads": 8,
                "intermediate_size": 14336,
            },
            0.19,
        ),
    ],
    ids=["gemma-2-2b", "gemma-2-9b"],
)
def test_share_of_trainable_parameters_on_the_published_shapes(config, share):
    """SAILS, arXiv 2512.23260, abstract: 0.24 % of the parameters on Gemma-2-2B and 0.19 % on Gemma-2-9B."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    with torch.device("meta"):
        model = Gemma2ForCausalLM(Gemma2Config(**config, head_dim=256, vocab_size=256000))
    layer_count = config["num_hidden_layers"]
    subspace = make_subspace(model, {f"blocks.{layer_count // 2}.hook_resid_post": 20})

    adapted = adapt(model, subspace=subspace, r=32, target_modules=["q_proj", "v_proj"])

    trained, total = adapted.get_nb_trainable_parameters()
    assert round(100 * trained / total, 2) == share
