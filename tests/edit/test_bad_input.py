"""What is refused, with the value, the consequence and the remedy; and nothing is written."""

import json
import math
import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from peft_sae import edit_adapter, load_saes, merge_checkpoint
from peft_sae.errors import ArtifactError, ConfigError, MismatchError, SelectionError
from tests.edit.conftest import HOOKS, train_a_little
from tests.tiny import make_model, make_sae, make_subspace

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def refused(tmp_path):
    """Edit, and check the error and that nothing has appeared or changed."""

    def check(error, message, adapter, output=None, **arguments):
        def state():
            return {path: path.read_bytes() if path.is_file() else None for path in sorted(tmp_path.rglob("*"))}

        before = state()
        with pytest.raises(error, match=re.compile(message, re.S)):
            edit_adapter(adapter, output or tmp_path / "edited", **arguments)
        assert state() == before

    return check


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, r"nothing to do: no feature is to be removed or kept.*Give remove="),
        ({"scale": {"1:0": 1, "1:1": 1.0}}, "nothing to do"),
        ({"remove": "1:0"}, r"remove='1:0' is no list of names. Give one such as"),
        ({"remove": [3]}, r"remove=\[3\] is no list of names"),
        ({"keep": []}, r"keep=\[\] names no feature, so nothing of the update would be left"),
        ({"keep": ["1:0"], "remove": ["1:0"]}, r"keep=\['1:0'\] removes everything but .* contradict or repeat"),
        ({"keep": ["1:0"], "scale": {"1:1": 2.0}}, r"keep=\['1:0'\] .* Edit twice, or leave the others out"),
        ({"scale": {"1:0": math.nan}}, r"scale leaves '1:0' at nan times what it is, which is no finite number"),
        ({"scale": {"1:0": math.inf}}, "no finite number"),
        ({"scale": {"1:0": "0.5"}}, "no finite number"),
        ({"scale": {"1:0": True}}, "no finite number"),
        ({"scale": 0.5}, r"scale=0.5 is no mapping. Give one such as"),
        ({"scale": ["1:0"]}, "is no mapping"),
        ({"remove": ["1:0"], "scale": {"1:0": 0.5}}, r"hook_resid_post:0 is to be left at 0 and at 0.5 times .* once"),
        ({"scale": [("1:0", 0.5), ("blocks.1.hook_resid_post:0", 2.0)]}, "is to be left at 0.5 and at 2 times"),
    ],
    ids=str,
)
def test_wishes_that_make_no_sense(trained, refused, arguments, message):
    refused(ConfigError, message, trained(), **arguments)


def test_the_same_feature_twice_with_the_same_number_is_one_feature(trained, tmp_path):
    edit_adapter(trained(), tmp_path / "edited", remove=["1:0", "blocks.1.hook_resid_post:0"], scale={"1:0": 0.0})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("7:0", r"names an SAE at '7', and there are SAEs at \['blocks.1.hook_resid_post'\] only"),
        ("1:64", r"names feature 64, and the SAE at blocks.1.hook_resid_post has 64"),
        ("1:9", r"'1:9' names feature 9 .* has the features \[0, 1, 2, 3\] there, .* Give the SAE .* saes=load_saes"),
        ("nonsense", "names no feature. Write the hook point and the id"),
    ],
)
def test_unknown_features(trained, refused, name, message):
    refused(SelectionError, message, trained(), remove=[name])


def test_a_plain_lora_has_no_features_without_saes(trained, refused):
    refused(
        ConfigError,
        "'1:0' has no direction: .* no Subspace, and no SAEs .* saes=load_saes",
        trained(kind="LORA"),
        remove=["1:0"],
    )


def test_a_feature_without_a_direction(trained, refused):
    sae = make_sae("blocks.1.hook_resid_post")
    sae.W_dec.data[3] = 0
    refused(
        SelectionError,
        "have a decoder direction of length zero",
        trained(kind="LORA"),
        remove=["1:3"],
        saes=load_saes([sae]),
    )


def test_saes_that_the_adapter_was_not_built_from(trained, refused):
    saes = load_saes([make_sae("blocks.1.hook_resid_post", seed=5)])
    refused(
        MismatchError,
        "has the digest .* equal ids would be different features. Give the SAE",
        trained(),
        remove=["1:0"],
        saes=saes,
    )


@pytest.mark.parametrize(
    ("sae", "message"),
    [
        (make_sae(width=16), "takes activations of width 16, and .* has width 32"),
        (make_sae("blocks.9.hook_resid_post"), "has 3 blocks"),
        (make_sae(model_name="gpt2"), "was trained on 'gpt2', and the model is"),
    ],
    ids=["width", "depth", "name"],
)
def test_saes_of_another_model(trained, refused, sae, message):
    saes = load_saes([sae])
    name = f"{saes[0].identity.hook_name}:0"
    refused(MismatchError, message, trained(kind="LORA"), remove=[name], saes=saes)


def test_saes_that_are_only_named(trained, refused):
    refused(ConfigError, "names SAEs that are not loaded", trained(), remove=["1:0"], saes="gemma-scope")


@pytest.mark.parametrize("kind", ["SAE_SUBSPACE", "LORA"])
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"hidden_size": 64}),
        ("llama", {"num_hidden_layers": 2}),
        ("llama", {"num_hidden_layers": 4}),
        ("gpt2", {}),
    ],
    ids=str,
)
def test_an_adapter_of_another_model(trained, refused, tmp_path, saes, kind, family, changes):
    adapter = trained(kind=kind)
    make_model(family, **changes).save_pretrained(tmp_path / "other")
    arguments = {"remove": ["0:3"], "saes": saes, "model": tmp_path / "other"}
    message = "another model|no such module|would mean nothing|takes activations of width|does not exist"
    refused(MismatchError, message, adapter, **arguments)
    refused(MismatchError, message, adapter, **{**arguments, "model": make_model(family, **changes)})


def test_a_merged_checkpoint_in_place_of_an_adapter(trained, refused, tmp_path):
    merge_checkpoint(tmp_path / "base", trained(), tmp_path / "merged")
    message = "has no adapter_config.json, .* holds a whole model, perhaps a merged checkpoint, .* Give the folder"
    refused(ArtifactError, message, tmp_path / "merged", remove=["1:0"])


def damage(adapter, what):
    weights = adapter / WEIGHTS
    tensors = load_file(weights)
    first = next(key for key in tensors if "lora_A" in key)
    if what == "nothing there":
        for path in sorted(adapter.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
    elif what == "no weights":
        weights.unlink()
    elif what == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif what == "nan":
        tensors[first][0] = math.nan
        save_file(tensors, weights)
    elif what == "half":
        save_file({key: tensor for key, tensor in tensors.items() if key != first}, weights)
    elif what == "unlike":
        save_file({**tensors, first: tensors[first][:2].clone()}, weights)
    elif what == "bad config":
        (adapter / "adapter_config.json").write_text("{")
    elif what == "empty":
        save_file({}, weights)
    elif what == "bad subspace":
        (adapter / "subspace" / "subspace.json").write_text("{}")
    elif what == "other subspace":
        make_subspace(make_model(), seed=9).save_pretrained(adapter / "subspace")
    elif what == "bad record":
        (adapter / "edit.json").write_text('{"schema": "peft_sae.edit", "schema_version": 1, "edits": [1]}')
    elif what == "new record":
        (adapter / "edit.json").write_text('{"schema": "peft_sae.edit", "schema_version": 99, "edits": []}')


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("nothing there", "has no adapter_config.json, so it is no adapter"),
        ("no weights", "has no adapter_model.safetensors"),
        ("truncated", "damaged or truncated"),
        ("nan", "holds NaN or infinity"),
        ("half", "has only one of the two factors"),
        ("unlike", "which do not belong together"),
        ("empty", "has no low-rank update, so there is nothing to edit"),
        ("bad config", "cannot be read as JSON"),
        ("bad subspace", "does not describe a peft_sae.subspace"),
        ("other subspace", "has the digest .* and the adapter was built from .* Put its own Subspace back"),
        ("bad record", "edit.json' is malformed, so earlier edits are not known"),
        ("new record", "has schema version 99"),
    ],
)
def test_damaged_adapters(trained, refused, what, message):
    adapter = trained()
    damage(adapter, what)
    refused((ArtifactError, ConfigError), message, adapter, remove=["1:0"])


def test_outputs_that_cannot_be(trained, refused, tmp_path):
    adapter = trained()
    (tmp_path / "link").symlink_to(adapter)
    for output in (adapter, adapter / "edited", tmp_path / "link", adapter / ".." / "adapter"):
        refused(
            ArtifactError,
            "is the adapter .* or lies in it, .* never changes the original. Give another",
            adapter,
            output,
            remove=["1:0"],
        )
    refused(ArtifactError, "writing there would destroy it", adapter, tmp_path / "base", remove=["1:0"])
    refused(ArtifactError, "writing there would destroy it", adapter, tmp_path, remove=["1:0"])
    (tmp_path / "file").write_text("")
    refused(ArtifactError, "is a file; writing there would destroy it", adapter, tmp_path / "file", remove=["1:0"])
    refused(
        ArtifactError, "cannot be written|Nothing can be written", adapter, tmp_path / "file" / "out", remove=["1:0"]
    )


def test_a_place_without_the_right_to_write(trained, refused, monkeypatch):
    adapter = trained()

    def forbid(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", forbid)
    refused(
        ArtifactError, r"Nothing can be written at .*Permission denied.* Give another place", adapter, remove=["1:0"]
    )


def test_a_full_disk_leaves_nothing(trained, refused, monkeypatch):
    adapter = trained()

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfile", fail)
    refused(ArtifactError, r"Cannot write .*No space left", adapter, remove=["1:0"])


def test_a_base_that_is_not_there(trained, refused, tmp_path):
    adapter = trained()
    refused(ArtifactError, "'nowhere' cannot be opened", adapter, remove=["1:0"], model="nowhere")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    refused(ConfigError, "does not name its base model, .* Give it with model=", adapter, remove=["1:0"])
    peft_model = get_peft_model(make_model(), LoraConfig(r=1, target_modules=["q_proj"]))
    refused(ConfigError, r"model is a PeftModel, .*get_base_model\(\)", adapter, remove=["1:0"], model=peft_model)


def lora(tmp_path, model=None, **fields):
    """The folder of a plain LoRA of any configuration."""
    (model or make_model()).save_pretrained(tmp_path / "base")
    fields = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **fields}
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), LoraConfig(**fields))
    train_a_little(adapted)
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_dora": True}, "was trained with use_dora: its magnitudes rescale what the base weights do with edited"),
        ({"bias": "lora_only"}, "was trained with bias='lora_only': .* Train with bias='none'"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "lora_embedding_.*an embedding writes the stream"),
    ],
    ids=str,
)
def test_updates_that_have_other_parts(refused, tmp_path, saes, fields, message):
    adapter = lora(tmp_path, **fields)
    refused(ConfigError, message, adapter, remove=["0:3"], saes=saes)
    refused(ConfigError, message, adapter, keep=["0:3"], saes=saes)


def test_parameters_as_targets(refused, tmp_path, saes):
    adapter = lora(tmp_path)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "target_parameters": ["experts.up"]}))
    refused(ConfigError, r"adapts the parameters \['experts.up'\]", adapter, remove=["0:3"], saes=saes)


def test_modules_whose_place_is_not_known(refused, tmp_path, saes):
    adapter = lora(tmp_path, make_model("opt", word_embed_proj_dim=16), target_modules=["q_proj", "project_in"])
    for arguments in ({"remove": ["0:3"]}, {"keep": ["0:3"]}, {"scale": {"0:3": 0.5}}):
        message = r"not known what 'model.decoder.project_in' \(Linear\) reads and writes.* Edit an adapter without"
        refused(ConfigError, message, adapter, saes=saes, **arguments)


@pytest.mark.filterwarnings(
    "ignore:Model with `tie_word_embeddings=True`", "ignore:Model has `tie_word_embeddings=True`"
)
def test_a_head_that_is_the_embedding_too(refused, tmp_path, saes):
    adapter = lora(tmp_path, make_model("gemma2"), target_modules=["q_proj", "lm_head"])
    refused(ConfigError, "'lm_head' shares its weights with the input embedding", adapter, remove=["0:3"], saes=saes)


def test_norms_that_the_adapter_replaces(refused, tmp_path, saes):
    adapter = lora(tmp_path, modules_to_save=["input_layernorm"])
    refused(
        ConfigError,
        "holds a norm of its own in place of 'model.layers.0.input_layernorm'",
        adapter,
        remove=["0:3"],
        saes=saes,
    )


def test_plain_modules_are_not_kept_to_features(trained, refused):
    adapter = trained(sides={"o_proj": "none"})
    refused(ConfigError, "sides says that 'model.layers.0.self_attn.o_proj' is plain LoRA", adapter, keep=["1:0"])


def test_a_plain_module_whose_place_is_known_is_edited_all_the_same(trained, tmp_path):
    edit_adapter(trained(sides={"o_proj": "none"}), tmp_path / "edited", remove=["1:0"])
    a, b = (load_file(tmp_path / name / WEIGHTS) for name in ("adapter", "edited"))
    key = "base_model.model.model.layers.0.self_attn.o_proj.lora_B.weight"
    assert not torch.equal(a[key], b[key])


def test_what_heads_and_norms_mix(trained, refused):
    saes = load_saes([make_sae("blocks.1.attn.hook_z"), make_sae("blocks.2.mlp.hook_in")])
    adapter = trained(kind="LORA", target_modules=["v_proj", "o_proj"])
    refused(
        ConfigError,
        "becomes the heads' output of block 1, where features are edited",
        adapter,
        remove=["1:0"],
        saes=saes,
    )
    refused(ConfigError, "reaches the MLP of block 2 through its norm", adapter, remove=["2:0"], saes=saes)


def test_a_protected_adapter_without_its_subspace(trained, refused, tmp_path, saes):
    adapter = trained(protected={"blocks.1.hook_resid_mid": 2})
    (adapter / "subspace").rename(tmp_path / "elsewhere")
    refused(
        ArtifactError,
        "'subspace' is missing.* Put it back",
        adapter,
        remove=["0:3"],
        saes=saes,
    )


def test_parallel_directions_with_different_scales(trained, refused):
    sae = make_sae("blocks.1.hook_resid_post")
    sae.W_dec.data[1] = 2 * sae.W_dec.data[0]
    sae.W_dec.data[2] = sae.W_dec.data[0] + 1e-3 * sae.W_dec.data[3]
    arguments = {"adapter": trained(kind="LORA"), "saes": load_saes([sae])}
    refused(
        ConfigError,
        r"depend linearly on each other.*post:0 at 0, .*post:1 at 0.5",
        remove=["1:0"],
        scale={"1:1": 0.5},
        **arguments,
    )
    refused(
        ConfigError,
        r"post:0 and .*post:2 are almost parallel \(cosine 0.9999.*times larger",
        scale={"1:0": 0.5, "1:2": 2.0},
        **arguments,
    )


def test_a_result_too_large_for_its_dtype(trained, refused, saes):
    adapter = trained(kind="LORA")
    save_file({key: tensor.half() for key, tensor in load_file(adapter / WEIGHTS).items()}, adapter / WEIGHTS)
    refused(
        ConfigError,
        r"has values up to .*, too large for torch.float16. Scale by smaller",
        adapter,
        scale={"0:3": 1e6},
        saes=saes,
    )


def test_two_saes_at_one_place(trained, refused):
    saes = [make_sae(HOOKS[0]), make_sae(HOOKS[0], seed=1)]
    refused(MismatchError, "have the same hook point", trained(kind="LORA"), remove=["0:1"], saes=saes)


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
def test_keeping_features_beside_a_bias_is_refused(trained, tmp_path):
    adapter = trained(kind="SAE_SUBSPACE", ranks={"blocks.1.hook_resid_post": 4}, lora_bias=True)
    with pytest.raises(ConfigError, match=r"bias .*writes whatever is read"):
        edit_adapter(adapter, tmp_path / "edited", keep=["1:2"])


def test_edits_without_effect_and_beyond_measure_are_told(trained, tmp_path, caplog):
    adapter = trained(ranks={"blocks.1.hook_resid_post": 4}, r="auto")
    edit_adapter(adapter, tmp_path / "one", remove=["1:2"])
    edit_adapter(tmp_path / "one", tmp_path / "two", remove=["1:2"])
    assert "Nothing changed" in caplog.text
    edit_adapter(adapter, tmp_path / "large", scale={"1:2": 1000.0})
    assert "1:2 by 1000" in caplog.text
