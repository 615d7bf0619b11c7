import json
import shutil
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification

from peft_sae import SaeSubspaceConfig, export_lora, merge_checkpoint
from peft_sae.errors import ArtifactError, ConfigError, MismatchError
from tests.tiny import make_model, make_subspace, make_tokenizer

IDS = torch.randint(4, 16, (2, 9), generator=torch.Generator().manual_seed(0))


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.fixture
def trained(tmp_path):
    """Folders of a base and of an adapter with random factors, and the adapted model's logits."""

    def make(family="llama", **fields):
        model = make_model(family)
        model.save_pretrained(tmp_path / "base")
        make_tokenizer().save_pretrained(tmp_path / "base")
        fields = {"r": "auto", "target_modules": "all-linear", "task_type": "CAUSAL_LM", **fields}
        if family == "gpt2":
            fields["fan_in_fan_out"] = True
        adapted = get_peft_model(model, SaeSubspaceConfig(subspace=make_subspace(model), **fields))
        generator = torch.Generator().manual_seed(1)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        adapted.save_pretrained(tmp_path / "adapter")
        return tmp_path / "base", tmp_path / "adapter", logits(adapted)

    return make


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "phi3"])
def test_merged_checkpoint_is_plain_and_answers_alike(trained, tmp_path, family):
    base, adapter, expected = trained(family)

    merge_checkpoint(base, adapter, tmp_path / "merged")

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(make_model(family)), expected, atol=1e-2)
    assert (tmp_path / "merged" / "tokenizer.json").is_file()
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    plain = set(AutoModelForCausalLM.from_pretrained(base).state_dict())
    assert set(merged.state_dict()) == plain


def test_merging_into_another_dtype(trained, tmp_path):
    base, adapter, _ = trained()

    merge_checkpoint(base, adapter, tmp_path / "merged", dtype="bfloat16")

    assert {tensor.dtype for tensor in load_file(tmp_path / "merged" / "model.safetensors").values()} == {
        torch.bfloat16
    }


@pytest.mark.parametrize("fields", [{}, {"r": 6, "use_rslora": True}, {"freeze_basis": True}, {"use_dora": True}])
def test_exported_lora_has_identical_logits_with_peft_alone(trained, tmp_path, fields):
    base, adapter, expected = trained(**fields)

    export_lora(adapter, tmp_path / "lora")

    torch.save({"ids": IDS, "expected": expected}, tmp_path / "case.pt")
    code = (
        "import sys, torch\n"
        "sys.modules['peft_sae'] = None\n"  # an import of it would fail
        "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n"
        f"case = torch.load({str(tmp_path / 'case.pt')!r}, weights_only=True)\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(base)!r})\n"
        f"model = PeftModel.from_pretrained(model, {str(tmp_path / 'lora')!r}).eval()\n"
        # another process may add up in another order
        "torch.testing.assert_close(model(case['ids']).logits, case['expected'], rtol=1e-5, atol=1e-5)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    ours, plain = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, tmp_path / "lora"))
    assert ours.keys() == plain.keys()
    assert all(torch.equal(ours[name], plain[name]) for name in ours)
    provenance = json.loads((tmp_path / "lora" / "sae_subspace.json").read_text())
    assert len(provenance["basis_record"]["digest"]) == 64


def test_exported_config_has_none_of_our_fields(trained, tmp_path):
    _, adapter, _ = trained()

    config = json.loads((export_lora(adapter, tmp_path / "lora") / "adapter_config.json").read_text())

    assert config["peft_type"] == "LORA"
    assert not {"subspace", "freeze_basis", "norm_gain", "layer_map", "fill", "sides", "basis_record"} & set(config)


def test_a_tokenizer_that_was_saved_with_the_adapter_goes_along(trained, tmp_path):
    _, adapter, _ = trained()
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["new"])
    tokenizer.save_pretrained(adapter)

    export_lora(adapter, tmp_path / "lora")

    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "lora" / name).read_bytes() == (adapter / name).read_bytes()


def test_a_plain_lora_adapter_can_be_merged_too(trained, tmp_path):
    base, adapter, expected = trained()
    export_lora(adapter, tmp_path / "lora")

    merge_checkpoint(base, tmp_path / "lora", tmp_path / "merged")

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)


def test_loading_an_adapter_without_the_package_is_the_keyerror_that_the_readme_tells(trained):
    base, adapter, _ = trained()
    code = (
        "import sys; sys.modules['peft_sae'] = None\n"
        "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n"
        f"PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({str(base)!r}), {str(adapter)!r})\n"
    )

    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert found.returncode == 1
    assert "KeyError: 'SAE_SUBSPACE'" in found.stderr


def damage(adapter, what):
    weights = adapter / "adapter_model.safetensors"
    if what == "no config":
        (adapter / "adapter_config.json").unlink()
    elif what == "bad json":
        (adapter / "adapter_config.json").write_text("{")
    elif what == "other type":
        (adapter / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    elif what == "no weights":
        weights.unlink()
    elif what == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif what == "nan":
        tensors = load_file(weights)
        tensors[next(iter(tensors))][0] = float("nan")
        save_file(tensors, weights)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no config", "has no adapter_config.json, so it is no adapter"),
        ("bad json", "cannot be read as JSON"),
        ("other type", "of type 'IA3', and only SAE_SUBSPACE, LORA"),
        ("no weights", "Pickled weights .* are never read"),
        ("truncated", "damaged or truncated"),
        ("nan", "holds NaN or infinity"),
    ],
)
def test_a_damaged_adapter_is_refused_and_nothing_is_written(trained, tmp_path, what, message):
    base, adapter, _ = trained()
    damage(adapter, what)
    before = sorted(tmp_path.iterdir())

    for export in (
        lambda: export_lora(adapter, tmp_path / "out"),
        lambda: merge_checkpoint(base, adapter, tmp_path / "out"),
    ):
        with pytest.raises(ArtifactError, match=message):
            export()

    assert sorted(tmp_path.iterdir()) == before


def test_outputs_that_would_destroy_something_are_refused(trained, tmp_path):
    base, adapter, _ = trained()
    run = tmp_path / "run"  # as the Trainer leaves it: an adapter with checkpoints beside its files
    shutil.copytree(adapter, run / "checkpoint-5")
    (run / "adapter_config.json").write_text("{}")
    (run / "config.json").write_text("{}")
    before = sorted(path for path in tmp_path.rglob("*"))

    for output in (run, adapter, base, tmp_path):
        for export in (export_lora, lambda adapter, output: merge_checkpoint(base, adapter, output)):
            with pytest.raises(ArtifactError, match="writing there would destroy it"):
                export(run / "checkpoint-5", output)

    assert sorted(path for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("ours", {"num_hidden_layers": 2}),
        ("ours", {"num_hidden_layers": 4}),
        ("ours", {"family": "mistral"}),  # a plain LoRA adapter does not say what it was trained on
        ("lora", {"num_hidden_layers": 2}),
        ("lora", {"num_hidden_layers": 4}),
    ],
    ids=str,
)
def test_a_base_of_another_depth_or_architecture_is_refused(trained, tmp_path, kind, change):
    _, adapter, _ = trained()
    if kind == "lora":
        export_lora(adapter, tmp_path / "lora")
        adapter = tmp_path / "lora"
    sizes = {name: value for name, value in change.items() if name != "family"}
    make_model(change.get("family", "llama"), **sizes).save_pretrained(tmp_path / "other")

    with pytest.raises(MismatchError, match="does not fit the base"):
        merge_checkpoint(tmp_path / "other", adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_classifier_keeps_its_head(tmp_path):
    config = make_model().config
    config.num_labels = 3
    model = LlamaForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path / "base")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS"))
    adapted.save_pretrained(tmp_path / "adapter")

    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")

    merged = LlamaForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert torch.equal(merged.score.weight, adapted.get_base_model().score.modules_to_save["default"].weight)


def test_merging_into_shards(trained, tmp_path):
    base, adapter, expected = trained()

    merge_checkpoint(base, adapter, tmp_path / "merged", max_shard_size="20KB")

    assert len(list((tmp_path / "merged").glob("model-*.safetensors"))) > 1
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), expected, rtol=1e-4, atol=1e-4
    )


def test_a_base_that_does_not_fit_is_refused(trained, tmp_path):
    _, adapter, _ = trained()
    make_model("gpt2").save_pretrained(tmp_path / "other")

    with pytest.raises(MismatchError, match="does not fit the base"):
        merge_checkpoint(tmp_path / "other", adapter, tmp_path / "merged")
    with pytest.raises(ArtifactError, match=r"has no config\.json"):
        merge_checkpoint(tmp_path / "nowhere", adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_exporting_a_lora_adapter_again_is_refused(trained, tmp_path):
    _, adapter, _ = trained()
    export_lora(adapter, tmp_path / "lora")

    with pytest.raises(ConfigError, match="is a plain LoRA adapter already"):
        export_lora(tmp_path / "lora", tmp_path / "again")


def test_a_loaded_export_is_lora(trained, tmp_path):
    base, adapter, expected = trained()
    export_lora(adapter, tmp_path / "lora")

    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "lora")

    assert loaded.peft_config["default"].peft_type == "LORA"
    assert torch.equal(logits(loaded), expected)


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
@pytest.mark.parametrize(
    "fields",
    [
        {"r": "auto", "lora_alpha": 24},
        {"r": 6, "use_rslora": True, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 5, "o_proj": 40}},
        {"r": 4, "lora_bias": True, "modules_to_save": ["lm_head"]},
    ],
)
def test_one_rank_without_scaling_says_the_same(trained, tmp_path, fields):
    base, adapter, expected = trained(**fields)

    export_lora(adapter, tmp_path / "lora", uniform=True)

    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"]
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    assert not config["use_rslora"]
    factors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert {tensor.shape[0] for name, tensor in factors.items() if "lora_A" in name} == {config["r"]}
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "lora")
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)


def test_a_plain_lora_gets_one_rank_too(tmp_path):
    fields = {"use_rslora": True, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"o_proj": 40}}
    torch.manual_seed(0)
    adapted = get_peft_model(
        make_model(), LoraConfig(r=6, target_modules=["q_proj", "o_proj"], init_lora_weights=False, **fields)
    )
    expected = logits(adapted)
    adapted.save_pretrained(tmp_path / "rslora")

    export_lora(tmp_path / "rslora", tmp_path / "lora", uniform=True)

    loaded = PeftModel.from_pretrained(make_model(), tmp_path / "lora")
    assert not loaded.peft_config["default"].use_rslora
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-5, atol=1e-5)
    assert {path.name for path in (tmp_path / "lora").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.parametrize("fields", [{"use_dora": True}, {"target_modules": ["embed_tokens", "q_proj"], "r": 4}])
def test_one_rank_is_refused_where_it_would_say_something_else(trained, tmp_path, fields):
    _, adapter, _ = trained(**fields)

    with pytest.raises(ConfigError, match=r"is no pair of matrices.*Merge the adapter instead"):
        export_lora(adapter, tmp_path / "lora", uniform=True)

    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize("kept", [(), ("lora_B",)])
def test_one_rank_needs_pairs_of_factors(trained, tmp_path, kept):
    _, adapter, _ = trained()
    path = adapter / "adapter_model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(path).items() if any(part in name for part in kept)}
    save_file(tensors, path)

    with pytest.raises(ConfigError, match="has no pair of factors"):
        export_lora(adapter, tmp_path / "lora", uniform=True)

    assert not (tmp_path / "lora").exists()
