import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_sae import SaeSubspaceConfig, merge_checkpoint
from peft_sae.errors import ArtifactError
from peft_sae.export import verify_merge
from tests.export.test_merge import lora, save_adapter, save_base
from tests.tiny import make_classifier, make_model, make_subspace


@pytest.fixture
def files(tmp_path):
    model = make_model()
    base = save_base(model, tmp_path / "base")
    config = SaeSubspaceConfig(subspace=make_subspace(model), r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    adapter = save_adapter(model, config, tmp_path / "adapter")
    return base, adapter, merge_checkpoint(base, adapter, tmp_path / "merged")


def test_a_right_merge_differs_by_rounding_alone(files):
    check = verify_merge(*files)

    assert check.agrees
    assert check.largest_difference < 1e-4 * check.largest_logit
    assert check.largest_effect > 100 * check.largest_difference
    assert check.agreement == 1
    assert check.positions > 20


@pytest.mark.parametrize("tokenizer", [True, False])
def test_one_wrong_tensor_is_seen(files, tokenizer, tmp_path):
    base, adapter, merged = files
    path = merged / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name] = load_file(base / "model.safetensors")[name]
    save_file(tensors, path, metadata={"format": "pt"})
    if not tokenizer:
        for file in merged.glob("tokenizer*"):
            file.unlink()

    check = verify_merge(base, adapter, merged)

    assert not check.agrees
    assert check.largest_difference > 1e-2


def test_a_logit_that_is_not_finite_never_agrees(files):
    base, adapter, merged = files
    tensors = load_file(merged / "model.safetensors")
    tensors["model.norm.weight"][0] = math.nan
    save_file(tensors, merged / "model.safetensors", metadata={"format": "pt"})

    assert not verify_merge(base, adapter, merged).agrees


def test_several_adapters_with_factors(files, tmp_path):
    base, adapter, _ = files
    adapters = {adapter: 0.5, lora(make_model(), tmp_path / "lora"): -1}

    check = verify_merge(base, adapters, merge_checkpoint(base, adapters, tmp_path / "both"))

    assert check.agrees
    assert not verify_merge(base, adapters, tmp_path / "merged").agrees


def test_half_precision_and_classifiers(tmp_path):
    base = save_base(make_classifier().to(torch.bfloat16), tmp_path / "base")
    adapter = lora(make_classifier(), tmp_path / "adapter", target_modules=["query"], task_type="SEQ_CLS")

    check = verify_merge(base, adapter, merge_checkpoint(base, adapter, tmp_path / "merged"))

    assert check.agrees
    assert check.tolerance == 0.1


def test_a_merged_checkpoint_that_is_not_there(files, tmp_path):
    base, adapter, _ = files

    with pytest.raises(ArtifactError, match="is no folder"):
        verify_merge(base, adapter, tmp_path / "nowhere")


def test_the_command_tells_the_difference(files, command, tmp_path):
    base, adapter, _ = files

    code, out, _ = command("merge", base, adapter, tmp_path / "again", "--verify", "--quiet")

    assert code == 0
    assert "Logits differ by at most" in " ".join(out.split())


def test_the_command_merges_several(files, command, tmp_path):
    base, adapter, _ = files
    other = lora(make_model(), tmp_path / "lora")

    code, _, errors = command(
        "merge", base, adapter, tmp_path / "both", "--factor", "0.5", "--add", f"{other}=-1", "--quiet"
    )

    assert (code, errors) == (0, "")
    merge_checkpoint(base, {adapter: 0.5, other: -1}, tmp_path / "expected")
    found, expected = (tmp_path / name / "model.safetensors" for name in ("both", "expected"))
    assert found.read_bytes() == expected.read_bytes()


@pytest.mark.parametrize("text", ["other=x", "other="])
def test_the_command_refuses_a_factor_that_is_no_number(files, command, text, tmp_path):
    code, _, errors = command("merge", files[0], files[1], tmp_path / "both", "--add", text)

    assert code == 1
    assert "ends in no number" in errors
