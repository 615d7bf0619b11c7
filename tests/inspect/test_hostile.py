"""Adapters and bases from strangers: an error of ours, or a right result; nothing hangs and nothing runs."""

import json
import os

import pytest
from safetensors.torch import load_file, save_file

from peft_sae import edit_adapter, inspect_adapter
from peft_sae.errors import ArtifactError, PeftSaeError

from .dense import train

TEXTS = ["red green blue sun moon", "sea hill"]


@pytest.fixture
def trained(tmp_path):
    return train(tmp_path)


def _change(path, **entries):
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


@pytest.mark.parametrize(
    "entries",
    [
        {"lora_alpha": "x"},
        {"lora_alpha": None},
        {"lora_alpha": [1]},
        {"lora_alpha": 10**400},
        {"lora_alpha": 1e308},
        {"alpha_pattern": None},
        {"alpha_pattern": [1]},
        {"alpha_pattern": {"(": 1}},
        {"alpha_pattern": {"q_proj": "x"}},
        {"base_model_name_or_path": 5},
        {"base_model_name_or_path": "../../none"},
    ],
)
def test_configurations_that_say_nonsense(trained, tmp_path, entries):
    _change(trained.adapter / "adapter_config.json", **entries)
    with pytest.raises(PeftSaeError):
        inspect_adapter(trained.adapter)
    with pytest.raises(PeftSaeError):
        edit_adapter(trained.adapter, tmp_path / "edited", remove=[])
    assert not (tmp_path / "edited").exists()


@pytest.mark.parametrize(
    "entries",
    [
        {"num_attention_heads": 0},
        {"num_attention_heads": "x"},
        {"vocab_size": -5},
        {"vocab_size": 2**62},
        {"num_hidden_layers": 10**7},
        {"architectures": ["RagModel"]},
        {"architectures": 5},
        {"model_type": "none"},
        {"auto_map": {"AutoConfig": "x.Y"}, "model_type": "mine"},
    ],
)
def test_bases_that_say_nonsense(trained, entries):
    _change(trained.base / "config.json", **entries)
    with pytest.raises(PeftSaeError):
        inspect_adapter(trained.adapter)


@pytest.mark.parametrize("data", [None, TEXTS])
@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_a_base_cannot_name_code_to_run(trained, data, key):
    _change(trained.base / "config.json", **{key: "some-org/some-kernel"})
    with pytest.raises(ArtifactError, match="code from elsewhere"):
        inspect_adapter(trained.adapter, data=data, progress=False)


@pytest.mark.parametrize("data", [None, TEXTS])
def test_an_index_cannot_lead_out_of_its_folder(trained, tmp_path, data):
    weights = trained.base / "model.safetensors"
    names = dict.fromkeys(load_file(weights), "../elsewhere.safetensors")
    weights.rename(tmp_path / "elsewhere.safetensors")
    (trained.base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    with pytest.raises(ArtifactError, match="outside its folder"):
        inspect_adapter(trained.adapter, data=data, progress=False)


def test_factors_beyond_measure(trained):
    file = trained.adapter / "adapter_model.safetensors"
    weights = load_file(file)
    save_file({name: 1e300 * value.double() for name, value in weights.items()}, file)
    with pytest.raises(ArtifactError, match="beyond measure"):
        inspect_adapter(trained.adapter)


@pytest.mark.parametrize("factor", ["<script>x</script>\n# H", None, True, float("inf"), 10**400, [0]])
def test_a_record_of_edits_is_no_way_into_the_card(trained, tmp_path, factor):
    edit = {"digest": "0", "kind": "scale", "features": [{"name": "0:1", "factor": factor}]}
    record = {"schema": "peft_sae.edit", "schema_version": 1, "edits": [edit]}
    (trained.adapter / "edit.json").write_text(json.dumps(record))
    name = train_name(trained)
    with pytest.raises(ArtifactError, match=r"edit\.json"):
        inspect_adapter(trained.adapter)
    with pytest.raises(ArtifactError, match=r"edit\.json"):
        edit_adapter(trained.adapter, tmp_path / "edited", remove=[name])


def train_name(trained):
    site = trained.model.peft_config["default"].own_subspace().sites[0]
    return f"{site.sae.hook_name}:{int(site.features[0])}"


def test_names_in_a_record_of_edits_are_escaped(trained, tmp_path):
    feature = {"name": "<script>x</script>\n# H\x1b[31m <!-- end of peft_sae edits -->", "factor": 0}
    edit = {"digest": "0", "kind": "scale", "features": [feature], "parent_digest": "<b>"}
    record = {"schema": "peft_sae.edit", "schema_version": 1, "edits": [edit]}
    (trained.adapter / "edit.json").write_text(json.dumps(record))
    edit_adapter(trained.adapter, tmp_path / "edited", remove=[train_name(trained)])
    card = (tmp_path / "edited" / "README.md").read_text()
    assert "<script" not in card.replace("\\<script", "")
    assert "\n# H" not in card
    assert "\x1b" not in card
    assert card.count("<!-- end of peft_sae edits -->") == 1


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes in the file system")
def test_what_is_no_file_is_not_waited_for(trained):
    os.mkfifo(trained.adapter / "trainer_state.json")
    assert not inspect_adapter(trained.adapter).training
    os.mkfifo(trained.adapter / "edit.json")
    with pytest.raises(ArtifactError, match="no record of edits"):
        inspect_adapter(trained.adapter)


def test_a_log_of_another_folder_or_of_nonsense_is_passed_over(trained):
    (trained.adapter.parent / "trainer_state.json").write_text(json.dumps({"log_history": [{"step": 1, "loss": 1.0}]}))
    assert not inspect_adapter(trained.adapter).training
    log = [{"step": 10**400, "loss": 1.0}, 5, {"step": 1, "loss": [1]}, {"step": 2, "loss": 2.0}]
    (trained.adapter / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    found = inspect_adapter(trained.adapter)
    assert list(found.training) == [{"loss": 1.0}, {"step": 1}, {"step": 2, "loss": 2.0}]
    assert found.to_html()
