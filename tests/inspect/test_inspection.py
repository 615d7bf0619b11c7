"""The call as a whole: what is refused, what is imported, what is written."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_sae import edit_adapter, export_lora, inspect_adapter, merge_checkpoint
from peft_sae.errors import ArtifactError, ConfigError, MismatchError
from tests.tiny import make_model

from .dense import train


@pytest.fixture
def trained(tmp_path):
    return train(tmp_path)


def test_the_summary_is_that_of_the_tables(trained):
    found = inspect_adapter(trained.adapter)
    norms = torch.tensor(found.modules["norm"].tolist())
    inside = torch.tensor(found.modules["in_basis"].astype(float).tolist())
    assert found.summary["norm"] == pytest.approx(float(norms.norm()))
    assert found.summary["in_basis"] == pytest.approx(float((inside * norms**2).sum() / (norms**2).sum()))
    assert found.summary["parameters"] == sum(p.numel() for n, p in trained.model.named_parameters() if "lora_" in n)


def test_json_has_everything_and_no_number_that_json_lacks(trained, tmp_path):
    found = inspect_adapter(trained.adapter)
    found.save(tmp_path / "found.json")
    data = json.loads((tmp_path / "found.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert data["schema"] == "peft_sae.inspection"
    assert len(data["modules"]) == len(found.modules)
    assert data["modules"][0]["singular_values"] == found.modules["singular_values"][0]
    assert data["activations"] is None
    assert data["provenance"]["subspace"]["digest"] == trained.model.peft_config["default"].basis_record["digest"]


def test_the_trainers_log_goes_along(trained):
    log = [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 2.0}]
    (trained.adapter / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    assert list(inspect_adapter(trained.adapter).training) == log
    (trained.adapter / "trainer_state.json").write_text("{")
    assert list(inspect_adapter(trained.adapter).training) == []


def test_no_sae_library_is_imported_without_saes(trained):
    code = (
        "import sys; from peft_sae import inspect_adapter\n"
        f"inspect_adapter({str(trained.adapter)!r})\n"
        "print(sorted({'sae_lens', 'transformer_lens', 'datasets', 'trl'} & set(sys.modules)))"
    )
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert printed.strip() == "[]"


def test_an_adapter_of_another_model_is_refused(trained):
    with pytest.raises(MismatchError, match=r"no such module.*another model"):
        inspect_adapter(trained.adapter, make_model("gpt2"))


@pytest.mark.parametrize(
    ("other", "message"), [("gpt2", "no such module.*another model"), ("wide", "is 24 wide.*another model")]
)
def test_a_lora_of_another_model_is_refused(tmp_path, other, message):
    trained = train(tmp_path, kind="lora")
    model = make_model("gpt2") if other == "gpt2" else make_model(intermediate_size=24)
    with pytest.raises(MismatchError, match=message):
        inspect_adapter(trained.adapter, model)


def test_a_merged_checkpoint_is_no_adapter(trained, tmp_path):
    merge_checkpoint(trained.base, trained.adapter, tmp_path / "merged")
    with pytest.raises(ArtifactError, match=r"no adapter_config.json.*whole model, perhaps a merged"):
        inspect_adapter(tmp_path / "merged")


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_missing_files_are_named(trained, missing):
    (trained.adapter / missing).unlink()
    with pytest.raises(ArtifactError, match=missing):
        inspect_adapter(trained.adapter)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "subspace/subspace.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"\x00" * 64, b"[1, 2]"])
def test_damaged_files_are_told(trained, name, content):
    (trained.adapter / name).write_bytes(content)
    with pytest.raises((ArtifactError, ConfigError)):
        inspect_adapter(trained.adapter)


def test_a_factor_without_its_other_is_told(trained):
    weights = load_file(trained.adapter / "adapter_model.safetensors")
    weights.pop(next(name for name in weights if name.endswith("q_proj.lora_B.weight")))
    save_file(weights, trained.adapter / "adapter_model.safetensors")
    with pytest.raises(ArtifactError, match="only one of the two factors"):
        inspect_adapter(trained.adapter)


def test_the_subspace_of_another_adapter_is_refused(trained, tmp_path):
    (tmp_path / "b").mkdir()
    other = train(tmp_path / "b", build_protect=["blocks.0.hook_resid_post:3"])
    shutil.rmtree(trained.adapter / "subspace")
    shutil.copytree(other.adapter / "subspace", trained.adapter / "subspace")
    with pytest.raises(ArtifactError, match="was built from"):
        inspect_adapter(trained.adapter)


def test_a_missing_subspace_is_told(trained):
    shutil.rmtree(trained.adapter / "subspace")
    with pytest.raises(ArtifactError, match=r"'subspace' is missing.*Put it back"):
        inspect_adapter(trained.adapter)


def test_edits_are_told(trained, tmp_path):
    name = inspect_adapter(trained.adapter).features["name"][0]
    edit_adapter(trained.adapter, tmp_path / "edited", remove=[name])
    found = inspect_adapter(tmp_path / "edited")
    assert found.provenance["edits"][0]["features"][0]["name"] == name
    assert any("edited after training" in note and name in note for note in found.notes)
    assert inspect_adapter(trained.adapter).provenance["edits"] == []
    export_lora(tmp_path / "edited", tmp_path / "lora")
    record = json.loads((tmp_path / "lora" / "sae_subspace.json").read_text())
    assert record["edits"][0]["features"][0]["name"] == name


def test_another_base_of_the_same_shape_is_told(trained, tmp_path):
    make_model(seed=7).save_pretrained(tmp_path / "other")
    own, other = inspect_adapter(trained.adapter), inspect_adapter(trained.adapter, tmp_path / "other")
    assert own.provenance["norms_digest"] != other.provenance["norms_digest"]
    assert own.provenance["norms_digest"] == inspect_adapter(trained.adapter, make_model()).provenance["norms_digest"]
    assert other.provenance["base_used"].endswith("other")
    assert any("other' was used" in note for note in other.notes)
    assert not own.notes


def test_a_merged_adapter_is_refused(trained):
    trained.model.merge_adapter()
    with pytest.raises(ConfigError, match=r"merged into .*unmerge_adapter"):
        inspect_adapter(trained.model)


def test_a_base_that_is_not_there_is_told_with_the_remedy(trained):
    shutil.rmtree(trained.base)
    with pytest.raises((ArtifactError, ConfigError), match=r"model=\.\.\."):
        inspect_adapter(trained.adapter)
    assert len(inspect_adapter(trained.adapter, make_model()).modules)


def test_a_base_without_its_norms_is_told(trained):
    weights = load_file(trained.base / "model.safetensors")
    save_file(
        {name: value for name, value in weights.items() if "norm" not in name}, trained.base / "model.safetensors"
    )
    with pytest.raises(ArtifactError, match="norm"):
        inspect_adapter(trained.adapter)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_what_is_no_matrix_is_left_out_and_told(tmp_path):
    trained = train(
        tmp_path, kind="lora", targets=["q_proj", "embed_tokens"], modules_to_save=["lm_head"], use_dora=True
    )
    for adapter in (trained.adapter, trained.model):
        found = inspect_adapter(adapter)
        assert len(found.modules) == 3
        notes = " ".join(found.notes)
        assert "embedding reads token ids" in notes
        assert "modules_to_save" in notes
        assert "DoRA" in notes


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed", "ignore:Adapter 'default'. 21 LoRA tensor")
@pytest.mark.parametrize("in_memory", [False, True])
def test_a_bias_beside_the_factors_is_told(tmp_path, in_memory):
    trained = train(tmp_path, kind="lora", lora_bias=True)
    (note, _) = inspect_adapter(trained.model if in_memory else trained.adapter).notes
    assert "lora_B.bias and 20 more: a bias writes whatever is read" in note


@pytest.mark.parametrize("options", [{"others": -1}, {"top_examples": -1}, {"batch_size": 0}])
def test_options_out_of_range_are_refused(trained, options):
    with pytest.raises(ConfigError, match=str(next(iter(options.values())))):
        inspect_adapter(trained.adapter, **options)


def test_a_peft_model_beside_a_folder_is_refused(trained):
    with pytest.raises(ConfigError, match="Give the PeftModel as the adapter"):
        inspect_adapter(trained.adapter, trained.model)
    with pytest.raises(ConfigError, match="no adapter 'other'"):
        inspect_adapter(trained.model, adapter_name="other")


def test_a_report_of_an_unknown_kind_is_refused(trained, tmp_path):
    found = inspect_adapter(trained.adapter)
    with pytest.raises(ConfigError, match=r"suffix '.htm'.*Did you mean"):
        found.save(tmp_path / "report.htm")
    (tmp_path / "closed").write_text("")
    with pytest.raises(ArtifactError):
        found.save(tmp_path / "closed" / "report.json")
