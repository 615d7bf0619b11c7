"""Merging piece by piece equals PEFT's merging of the whole model and transformers' saving of it, bit for bit."""

import errno
import json
import math
import os

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from peft_sae import SaeSubspaceConfig, export_lora, merge_checkpoint
from peft_sae.errors import ArtifactError, ConfigError, MismatchError
from tests.tiny import FAMILIES, make_classifier, make_model, make_subspace, make_tokenizer

IDS = torch.randint(4, 16, (2, 9), generator=torch.Generator().manual_seed(0))
LINEAR = {
    "bert": {"target_modules": ["query", "value", "output.dense"]},
    "gpt2": {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
    "mixtral": {
        "target_modules": ["q_proj", "o_proj"],
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
    },
    "qwen3_moe": {
        "target_modules": ["q_proj", "o_proj"],
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
    },
}


def save_base(model, folder, **options):
    model.save_pretrained(folder, **options)
    make_tokenizer().save_pretrained(folder)
    return folder


def save_adapter(model, config, folder, *, seed=1, scale=0.1):
    """An adapter with random weights in everything that it may train."""
    adapted = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            parameter.data += scale * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    adapted.save_pretrained(folder)
    return folder


def read_folder(folder):
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(path))
    return tensors


def merge_whole(base, adapters, folder, *, cls=None, dtype=None, prepare=lambda model: None, size="50GB"):
    """What PEFT and transformers make of it with everything in memory."""
    cls = cls or getattr(transformers, json.loads((base / "config.json").read_text())["architectures"][0])
    model = cls.from_pretrained(base, dtype=dtype or "auto")
    prepare(model)
    for adapter in adapters:
        model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    model.save_pretrained(folder, max_shard_size=size)
    return read_folder(folder)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("family", [*FAMILIES, "bert"])
@pytest.mark.parametrize("kind", ["ours", "lora"])
def test_every_family_equals_peft_and_transformers_to_the_byte(family, kind, tmp_path):
    model = make_classifier() if family == "bert" else make_model(family)
    base = save_base(model, tmp_path / "base")
    fields = {"target_modules": "all-linear", "task_type": "SEQ_CLS" if family == "bert" else "CAUSAL_LM"}
    fields |= LINEAR.get(family, {})
    config = (
        SaeSubspaceConfig(subspace=make_subspace(model), r=5, **fields) if kind == "ours" else LoraConfig(r=5, **fields)
    )
    adapter = save_adapter(model, config, tmp_path / "adapter")

    merge_checkpoint(base, adapter, tmp_path / "merged")

    expected = merge_whole(base, [adapter], tmp_path / "expected")
    assert_same(read_folder(tmp_path / "merged"), expected)
    changed = [name for name, tensor in read_folder(base).items() if not torch.equal(tensor, expected[name])]
    assert changed  # the adapter does something
    merged, whole = (tmp_path / folder / "model.safetensors" for folder in ("merged", "expected"))
    assert merged.read_bytes() == whole.read_bytes()


OPTIONS = {
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 32}},
    "one bias": {"bias": "lora_only"},
    "modules_to_save": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "one of two tied": {"modules_to_save": ["embed_tokens"]},
    "the other of two tied": {"modules_to_save": ["lm_head"]},
    "norms": {"modules_to_save": ["input_layernorm"]},
    "tokens": {"trainable_token_indices": [3, 7]},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "some layers": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
}


TIED = pytest.mark.filterwarnings("ignore:.*(tie_word_embeddings|no longer tied|save_embedding_layers).*:UserWarning")
# PEFT merges what changes one of two tied modules into both.
PARTED = ("embeddings", "head")


@TIED
@pytest.mark.parametrize(
    ("option", "tied"),
    [(option, tied) for option in OPTIONS for tied in (False, True) if not (tied and option in PARTED)],
)
def test_every_option_of_lora_equals_peft(option, tied, tmp_path):
    model = make_model(tie_word_embeddings=tied, attention_bias=True)
    base = save_base(model, tmp_path / "base")
    fields = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **OPTIONS[option]}
    adapter = save_adapter(model, LoraConfig(**fields), tmp_path / "adapter")

    merge_checkpoint(base, adapter, tmp_path / "merged")

    assert_same(read_folder(tmp_path / "merged"), merge_whole(base, [adapter], tmp_path / "expected"))
    merged, whole = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / folder) for folder in ("merged", "expected")
    )
    assert torch.equal(merged(IDS).logits, whole(IDS).logits)
    assert merged.config.tie_word_embeddings == whole.config.tie_word_embeddings


@TIED
@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (LoraConfig, OPTIONS["embeddings"]),
        (LoraConfig, OPTIONS["head"]),
        (LoraConfig, {"target_modules": ["lm_head", "embed_tokens"]}),
        (LoraConfig, {"target_modules": ["lm_head", "embed_tokens"], "ensure_weight_tying": True}),
        (SaeSubspaceConfig, {"target_modules": ["lm_head", "o_proj"]}),
    ],
)
def test_what_changes_one_of_two_tied_modules_stays_there(kind, fields, dtype, in_memory, tmp_path):
    model = make_model(tie_word_embeddings=True)
    base = save_base(model.to(dtype), tmp_path / "base")
    model = make_model(tie_word_embeddings=True)
    fields = {"r": 4, "task_type": "CAUSAL_LM", **fields}
    if kind is SaeSubspaceConfig:
        fields["subspace"] = make_subspace(model)
    adapter = save_adapter(model, kind(**fields), tmp_path / "adapter")
    adapted = PeftModel.from_pretrained(type(model).from_pretrained(base, dtype=torch.float32), adapter).eval()
    with torch.no_grad():
        expected = adapted(IDS).logits

    merged = merge_checkpoint(base, adapter, tmp_path / "merged", in_memory=in_memory)

    tensors = read_folder(merged)
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= tensors.keys()
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    assert loaded.config.tie_word_embeddings is False
    tolerance = 1e-5 if dtype is torch.float32 else 0.05
    torch.testing.assert_close(loaded(IDS).logits, expected, rtol=tolerance, atol=tolerance)


@TIED
@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"target_modules": ["q_proj", "lm_head"]}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
        (*[{"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}] * 2,),
        (*[{"target_modules": ["q_proj"], "bias": "all"}] * 2,),
    ],
    ids=["head and its copy", "two copies", "biases"],
)
def test_no_adapter_loses_its_work_to_another(first, second, in_memory, tmp_path):
    model = make_model(attention_bias=True)
    base = save_base(model, tmp_path / "base")
    adapters = [
        lora(make_model(attention_bias=True), tmp_path / name, seed=seed, **fields)
        for seed, (name, fields) in enumerate({"one": first, "two": second}.items())
    ]

    for order in (adapters, adapters[::-1]):
        with pytest.raises(ConfigError, match=r"both change .* brings it along as a whole.*Merge one"):
            merge_checkpoint(base, order, tmp_path / "merged", in_memory=in_memory)
    assert not (tmp_path / "merged").exists()


@TIED
@pytest.mark.parametrize("tied", [False, True])
def test_two_adapters_of_the_head_add_up(tied, tmp_path):
    base = save_base(make_model(tie_word_embeddings=tied), tmp_path / "base")
    adapters = [
        lora(make_model(tie_word_embeddings=tied), tmp_path / name, seed=seed, target_modules=["lm_head"])
        for seed, name in enumerate(("one", "two"))
    ]
    before = make_model(tie_word_embeddings=tied).lm_head.weight.detach()

    merged = read_folder(merge_checkpoint(base, adapters, tmp_path / "merged"))

    alone = [read_folder(merge_checkpoint(base, name, tmp_path / f"{name.name}-merged")) for name in adapters]
    wanted = before + sum(tensors["lm_head.weight"] - before for tensors in alone)
    torch.testing.assert_close(merged["lm_head.weight"], wanted, rtol=1e-6, atol=1e-6)
    embedding = make_model(tie_word_embeddings=tied).get_input_embeddings().weight
    assert torch.equal(merged["model.embed_tokens.weight"], embedding)


@pytest.mark.parametrize("protected", [None, {"blocks.1.hook_resid_post": 2}])
@pytest.mark.parametrize("fields", [{}, {"freeze_basis": True, "r": "auto"}, {"sides": {"q_proj": "none"}}])
def test_ours_with_its_options_equals_peft(fields, protected, tmp_path):
    model = make_model("gemma2")
    base = save_base(model, tmp_path / "base")
    subspace = make_subspace(model, protected=protected)
    fields = {"r": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **fields}
    config = SaeSubspaceConfig(subspace=subspace, **fields)
    adapter = save_adapter(model, config, tmp_path / "adapter")

    merge_checkpoint(base, adapter, tmp_path / "merged")

    assert_same(read_folder(tmp_path / "merged"), merge_whole(base, [adapter], tmp_path / "expected"))


def lora(model, folder, *, seed=1, **fields):
    fields = {"r": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", **fields}
    return save_adapter(model, LoraConfig(**fields), folder, seed=seed)


@pytest.mark.parametrize("size", ["3KB", "20KB", "5GB"])
def test_shards_come_and_go(size, tmp_path):
    model = make_model()
    base = save_base(model, tmp_path / "base", max_shard_size="30KB")
    assert len(list(base.glob("*.safetensors"))) > 1
    adapter = lora(model, tmp_path / "adapter")

    merge_checkpoint(base, adapter, tmp_path / "merged", max_shard_size=size)

    expected = merge_whole(base, [adapter], tmp_path / "expected", size=size)
    assert_same(read_folder(tmp_path / "merged"), expected)
    theirs = {path.name: path.read_bytes() for path in (tmp_path / "expected").glob("*.safetensors*")}
    ours = {path.name: path.read_bytes() for path in (tmp_path / "merged").glob("*.safetensors*")}
    index = "model.safetensors.index.json"
    assert (index in theirs) == (size != "5GB")
    if index in theirs:
        assert json.loads(ours.pop(index)) == json.loads(theirs.pop(index))
    assert ours == theirs


def test_half_precision_is_rounded_once(tmp_path):
    model = make_model()
    base = save_base(model.to(torch.bfloat16), tmp_path / "base")
    adapter = lora(make_model(), tmp_path / "adapter")

    merge_checkpoint(base, adapter, tmp_path / "merged")

    exact = merge_whole(base, [adapter], tmp_path / "expected", dtype=torch.float32)
    found = read_folder(tmp_path / "merged")
    assert_same(found, {name: tensor.to(torch.bfloat16) for name, tensor in exact.items()})
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("in_memory", [False, True])
def test_another_dtype_is_the_exact_result_rounded_once(stored, wanted, in_memory, tmp_path):
    base = save_base(make_model().to(stored), tmp_path / "base")
    adapter = lora(make_model(), tmp_path / "adapter")

    merge_checkpoint(base, adapter, tmp_path / "merged", dtype=wanted, in_memory=in_memory)

    exact = merge_whole(base, [adapter], tmp_path / "expected", dtype=torch.float32)
    dtype = getattr(torch, wanted)
    assert_same(read_folder(tmp_path / "merged"), {name: tensor.to(dtype) for name, tensor in exact.items()})
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == wanted


def test_each_tensor_keeps_its_own_dtype(tmp_path):
    base = save_base(make_model(), tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    half = {n: t if "norm" in n else t.to(torch.bfloat16) for n, t in tensors.items()}
    save_file(half, base / "model.safetensors", metadata={"format": "pt"})
    adapter = lora(make_model(), tmp_path / "adapter")

    merge_checkpoint(base, adapter, tmp_path / "merged")

    found = read_folder(tmp_path / "merged")
    assert {name: tensor.dtype for name, tensor in found.items()} == {n: t.dtype for n, t in half.items()}


def test_factors_weigh_several_adapters_of_both_types(tmp_path):
    model = make_model()
    base = save_base(model, tmp_path / "base")
    one = lora(make_model(), tmp_path / "one")
    config = SaeSubspaceConfig(subspace=make_subspace(model), r=4, target_modules=["q_proj", "o_proj"])
    two = save_adapter(make_model(), config, tmp_path / "two", seed=2)

    merge_checkpoint(base, {one: 0.5, two: -2.0}, tmp_path / "merged")

    before, found = read_folder(base), read_folder(tmp_path / "merged")
    for name, tensor in before.items():
        exact = tensor.double()
        for adapter, factor in ((one, 0.5), (two, -2.0)):
            weights = load_file(adapter / "adapter_model.safetensors")
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            if f"{stem}.lora_A.weight" in weights:
                a, b = (weights[f"{stem}.lora_{which}.weight"].double() for which in "AB")
                exact = exact + factor * 8 / 4 * (b @ a)
        torch.testing.assert_close(found[name].double(), exact, rtol=1e-6, atol=1e-6)


def test_several_adapters_without_factors_equal_peft_one_after_the_other(tmp_path):
    model = make_model()
    base = save_base(model, tmp_path / "base")
    adapters = [lora(make_model(), tmp_path / name, seed=seed) for seed, name in enumerate(("one", "two"))]

    merge_checkpoint(base, adapters, tmp_path / "merged")

    assert_same(read_folder(tmp_path / "merged"), merge_whole(base, adapters, tmp_path / "expected"))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("fields", [{}, {"modules_to_save": ["embed_tokens", "lm_head"]}])
@pytest.mark.parametrize("in_memory", [False, True])
@TIED
def test_added_tokens(fields, tied, in_memory, tmp_path):
    base = save_base(make_model(tie_word_embeddings=tied), tmp_path / "base")
    model = make_model(tie_word_embeddings=tied)
    model.resize_token_embeddings(23, mean_resizing=False)
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", **fields)
    adapted = get_peft_model(model, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["new", "newer", "newest"])
    tokenizer.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = adapted.eval()(IDS).logits

    merge_checkpoint(base, tmp_path / "adapter", tmp_path / "merged", in_memory=in_memory)

    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.vocab_size == 23
    torch.testing.assert_close(merged(IDS).logits, expected, rtol=1e-5, atol=1e-5)
    assert "newest" in transformers.AutoTokenizer.from_pretrained(tmp_path / "merged").get_vocab()


def test_a_checkpoint_of_the_bare_model_gets_the_names_that_transformers_saves(tmp_path):
    model = make_model()
    base = save_base(model, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(bare, base / "model.safetensors", metadata={"format": "pt"})
    adapter = lora(model, tmp_path / "adapter")

    merge_checkpoint(base, adapter, tmp_path / "merged")

    assert_same(read_folder(tmp_path / "merged"), merge_whole(base, [adapter], tmp_path / "expected"))


@pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied:UserWarning")
@pytest.mark.parametrize("equal", [True, False])
def test_tied_weights_that_are_stored_twice(equal, tmp_path):
    model = make_model(tie_word_embeddings=True)
    base = save_base(model, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    save_file({**tensors, "lm_head.weight": head if equal else head + 1}, base / "model.safetensors", {"format": "pt"})
    adapter = lora(model, tmp_path / "adapter")

    merge_checkpoint(base, adapter, tmp_path / "merged")

    found = read_folder(tmp_path / "merged")
    assert ("lm_head.weight" in found) is not equal
    assert_same(found, merge_whole(base, [adapter], tmp_path / "expected"))


def test_tensors_without_a_place_are_left_out_and_told(tmp_path, caplog):
    model = make_model()
    base = save_base(model, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    save_file({**tensors, "mtp.0.weight": torch.ones(2)}, base / "model.safetensors", {"format": "pt"})
    adapter = lora(model, tmp_path / "adapter")

    merge_checkpoint(base, adapter, tmp_path / "merged")

    assert_same(read_folder(tmp_path / "merged"), merge_whole(base, [adapter], tmp_path / "expected"))
    assert "'mtp.0.weight'" in caplog.text


def test_what_lies_beside_the_weights_goes_along_as_it_is(tmp_path):
    model = make_model()
    base = save_base(model, tmp_path / "base")
    for name in ("modeling_own.py", "chat_template.jinja", "LICENSE.txt", "generation_config.json"):
        (base / name).write_text(f'{{"of": "{name}"}}')
    (base / "pytorch_model.bin").write_bytes(b"pickled")
    (base / "README.md").write_text("the base's card")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool.jinja").write_text("{{ tool }}")
    adapter = lora(model, tmp_path / "adapter")

    merge_checkpoint(base, adapter, tmp_path / "merged")

    merged = tmp_path / "merged"
    kept = {path.relative_to(merged) for path in merged.rglob("*") if path.is_file()}
    theirs = {path.relative_to(base) for path in base.rglob("*") if path.is_file()}
    assert {str(path) for path in theirs - kept} == {"pytorch_model.bin", "README.md"}
    for path in kept:
        if path.suffix != ".safetensors":
            assert (merged / path).read_bytes() == (base / path).read_bytes()


def test_nothing_beside_an_adapter_leads_out_of_it(tmp_path):
    model = make_model()
    base = save_base(model, tmp_path / "base")
    config = SaeSubspaceConfig(subspace=make_subspace(model), r=4, target_modules=["q_proj"])
    adapter = save_adapter(model, config, tmp_path / "adapter")
    make_tokenizer().save_pretrained(adapter)
    (tmp_path / "secret").write_text("of the machine")
    (adapter / "tokenizer.model").symlink_to(tmp_path / "secret")

    with pytest.raises(ArtifactError, match=r"tokenizer\.model' is a link that leads out of"):
        merge_checkpoint(base, adapter, tmp_path / "merged")
    with pytest.raises(ArtifactError, match=r"tokenizer\.model' is a link that leads out of"):
        export_lora(adapter, tmp_path / "lora")
    assert not (tmp_path / "merged").exists()
    assert not (tmp_path / "lora").exists()


def test_a_tokenizer_that_names_code_is_left_behind(tmp_path):
    model = make_model()
    base = save_base(model, tmp_path / "base")
    adapter = lora(model, tmp_path / "adapter")
    make_tokenizer(chat=False).save_pretrained(adapter)
    settings = json.loads((adapter / "tokenizer_config.json").read_text())
    (adapter / "tokenizer_config.json").write_text(
        json.dumps({**settings, "auto_map": {"AutoTokenizer": ["x.Y", None]}})
    )

    merge_checkpoint(base, adapter, tmp_path / "merged")

    assert (tmp_path / "merged" / "tokenizer_config.json").read_bytes() == (base / "tokenizer_config.json").read_bytes()


def damage_base(base, what):
    path = base / "model.safetensors"
    tensors = load_file(path)
    key = "model.layers.1.mlp.down_proj.weight"
    if what == "missing tensor":
        tensors.pop(key)
    elif what == "other shape":
        tensors[key] = tensors[key][:, :-1].contiguous()
    elif what == "nan":
        tensors[key][0, 0] = math.nan
    elif what == "two names":
        tensors[key.removeprefix("model.")] = tensors[key].clone()
    save_file(tensors, path, metadata={"format": "pt"})
    if what == "truncated":
        path.write_bytes(path.read_bytes()[:-10])
    elif what == "deep index":
        path.rename(base / "model-00001-of-00001.safetensors")
        (base / "model.safetensors.index.json").write_text('{"weight_map": ' + "[" * 100_000 + "]" * 100_000 + "}")
    elif what == "link":
        (base.parent / "secret").write_text("of the machine")
        (base / "LICENSE").symlink_to(base.parent / "secret")
    elif what == "quantised":
        config = json.loads((base / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
        (base / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("what", "error", "message"),
    [
        ("missing tensor", ArtifactError, "lacks 'model.layers.1.mlp.down_proj.weight'"),
        ("other shape", MismatchError, "has the shape"),
        ("nan", ArtifactError, "NaN or infinity"),
        ("two names", ArtifactError, "both stand for .*--in-memory"),
        ("truncated", ArtifactError, "cannot be read"),
        ("deep index", ArtifactError, "nested too deeply"),
        ("link", ArtifactError, "LICENSE' is a link that leads out of .*Put the file itself there"),
        ("quantised", ConfigError, "is quantised .gptq.*--in-memory"),
    ],
)
def test_a_base_that_cannot_be_merged_is_refused_and_nothing_is_left(what, error, message, tmp_path):
    model = make_model()
    base = save_base(model, tmp_path / "base")
    adapter = lora(model, tmp_path / "adapter")
    damage_base(base, what)
    before = {path.name for path in tmp_path.iterdir()}

    with pytest.raises(error, match=message):
        merge_checkpoint(base, adapter, tmp_path / "merged")

    assert {path.name for path in tmp_path.iterdir()} == before


def test_a_folder_of_links_to_the_hubs_cache_is_a_base(tmp_path):
    model = make_model()
    real = save_base(model, tmp_path / "real", max_shard_size="30KB")
    adapter, base, blobs = lora(model, tmp_path / "adapter"), tmp_path / "base", tmp_path / "models--a--b" / "blobs"
    base.mkdir()
    blobs.mkdir(parents=True)
    for number, path in enumerate(sorted(real.iterdir())):
        blob = blobs / f"{number:064x}"
        blob.write_bytes(path.read_bytes())
        (base / path.name).symlink_to(blob)

    wanted = read_folder(merge_checkpoint(real, adapter, tmp_path / "wanted"))
    merged = read_folder(merge_checkpoint(base, adapter, tmp_path / "merged"))

    assert all(torch.equal(merged[key], tensor) for key, tensor in wanted.items())
    assert not any(path.is_symlink() for path in (tmp_path / "merged").iterdir())
    shard = sorted(base.glob("*.safetensors"))[1]
    shard.unlink()
    shard.symlink_to(real / shard.name)
    with pytest.raises(ArtifactError, match=f"{shard.name}' is a link that leads out of"):
        merge_checkpoint(base, adapter, tmp_path / "again")


def test_a_missing_shard_is_named(tmp_path):
    model = make_model()
    base = save_base(model, tmp_path / "base", max_shard_size="30KB")
    gone = sorted(base.glob("*.safetensors"))[1]
    gone.unlink()

    with pytest.raises(ArtifactError, match=f"lacks '{gone.name}'"):
        merge_checkpoint(base, lora(model, tmp_path / "adapter"), tmp_path / "merged")


@pytest.mark.parametrize("changes", [{"hidden_size": 40, "head_dim": 10}, {"num_hidden_layers": 2}, {"family": "opt"}])
def test_an_adapter_of_another_model_is_refused(changes, tmp_path):
    adapter = lora(make_model(), tmp_path / "adapter")
    family = changes.pop("family", "llama")
    base = save_base(make_model(family, **changes), tmp_path / "base")

    with pytest.raises(MismatchError, match="does not fit the base"):
        merge_checkpoint(base, adapter, tmp_path / "merged")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_dora": True}, "DoRA or another variant"),
        ({"modules_to_save": ["lm_head"]}, "trained modules as a whole"),
        ({"trainable_token_indices": [3]}, "TrainableTokensLayer"),
    ],
)
def test_what_has_no_update_cannot_be_weighed(fields, message, tmp_path):
    model = make_model()
    base = save_base(model, tmp_path / "base")
    adapter = lora(model, tmp_path / "adapter", **fields)

    with pytest.raises(ConfigError, match=message):
        merge_checkpoint(base, {adapter: 0.5}, tmp_path / "merged")


@pytest.mark.parametrize("fields", [{"use_dora": True}, {"trainable_token_indices": [3]}])
def test_what_does_not_add_is_merged_alone(fields, tmp_path):
    base = save_base(make_model(), tmp_path / "base")
    adapters = [lora(make_model(), tmp_path / "one"), lora(make_model(), tmp_path / "two", **fields)]

    with pytest.raises(ConfigError, match=r"does not add to the weights.*Merge it alone"):
        merge_checkpoint(base, adapters, tmp_path / "merged")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "bfloat"}, "Did you mean 'bfloat16'"),
        ({"dtype": "int8"}, "none that weights are merged in"),
        ({"max_shard_size": "5 gigs"}, "no size"),
        ({"max_shard_size": 0}, "no room"),
        ({"adapter": []}, "names no adapter"),
        ({"adapter": {"a": "1"}}, "no finite number"),
        ({"adapter": {"a": math.nan}}, "no finite number"),
        ({"adapter": ["a", "a"]}, "names one twice"),
    ],
)
def test_arguments_that_cannot_work(arguments, message, tmp_path):
    (tmp_path / "a").mkdir()
    arguments = {"adapter": "a", **arguments}

    with pytest.raises(ConfigError, match=message):
        merge_checkpoint(tmp_path, arguments.pop("adapter"), tmp_path / "merged", **arguments)


def test_a_full_disk_is_told_before_anything_is_written(tmp_path, monkeypatch):
    import shutil

    model = make_model()
    base = save_base(model, tmp_path / "base")
    adapter = lora(model, tmp_path / "adapter")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))

    with pytest.raises(ArtifactError, match=r"0\.0 MB free, and 0\.\d MB are needed"):
        merge_checkpoint(base, adapter, tmp_path / "merged")

    assert not (tmp_path / "merged").exists()


def test_a_disk_that_fills_up_in_the_midst_of_it_leaves_nothing(tmp_path, monkeypatch):
    from peft_sae.export.tensor_file import TensorWriter

    model = make_model()
    base = save_base(model, tmp_path / "base")
    adapter = lora(model, tmp_path / "adapter")
    written, original = [], TensorWriter.copy

    def copy(self, name, stored, reader):
        written.append(name)
        if len(written) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(self, name, stored, reader)

    monkeypatch.setattr(TensorWriter, "copy", copy)

    with pytest.raises(ArtifactError, match=r"No space left on device.*nothing is left of it.*Make room there"):
        merge_checkpoint(base, adapter, tmp_path / "merged")

    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_an_output_that_cannot_be_written_is_told(number, tmp_path, monkeypatch):
    """As root every folder can be written, so the system's answer is put in its place."""
    from peft_sae import writing

    def refuse(target):
        raise OSError(number, os.strerror(number), str(target))

    model = make_model()
    base = save_base(model, tmp_path / "base")
    adapter = lora(model, tmp_path / "adapter")
    monkeypatch.setattr(writing, "scratch_folder", refuse)

    with pytest.raises(ArtifactError, match=rf"Cannot write beside .*{os.strerror(number)}.*Give a writable folder"):
        merge_checkpoint(base, adapter, tmp_path / "merged")

    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_only_one_module_is_in_memory(tmp_path, monkeypatch):
    from peft_sae.export import stream

    model = make_model()
    base = save_base(model, tmp_path / "base")
    adapter = lora(model, tmp_path / "adapter", target_modules=["q_proj"])
    read = []
    original = stream.TensorReader.read
    monkeypatch.setattr(
        stream.TensorReader, "read", lambda self, stored: read.append(stored.shape) or original(self, stored)
    )

    merge_checkpoint(base, adapter, tmp_path / "merged")

    assert sorted(shape for shape in read if len(shape) > 1) == [(32, 32)] * 3  # the three q_proj; the rest is copied


def test_an_output_within_the_base_is_refused(tmp_path):
    model = make_model()
    base = save_base(model, tmp_path / "base")
    adapter = save_adapter(model, LoraConfig(target_modules=["q_proj"]), tmp_path / "adapter")
    before = sorted(path.name for path in base.iterdir())
    with pytest.raises(ConfigError, match="lies inside"):
        merge_checkpoint(base, adapter, base / "merged")
    assert sorted(path.name for path in base.iterdir()) == before


@pytest.mark.parametrize(("named", "told"), [("some/base", False), ("elsewhere/base", False), ("some/other", True)])
def test_another_base_than_the_adapters_is_told_of(named, told, tmp_path, caplog):
    model = make_model()
    base = save_base(model, tmp_path / "base")
    adapter = save_adapter(model, LoraConfig(target_modules=["q_proj"]), tmp_path / "adapter")
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": named}))
    merge_checkpoint(base, adapter, tmp_path / "merged")
    assert ("If that is another model" in caplog.text) == told
