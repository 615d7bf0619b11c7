"""The edited adapter as an artefact: loading, training on, protection, records, files."""

import json
import os
import shutil
import stat

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize
from transformers import AutoModelForCausalLM

from peft_sae import Subspace, edit_adapter, export_lora, inspect_adapter, merge_checkpoint
from peft_sae.artifact import digest
from peft_sae.edit import read_edits
from peft_sae.errors import ArtifactError
from tests.edit.conftest import train_a_little
from tests.edit.dense import met, updates
from tests.tiny import make_model

IDS = torch.randint(4, 16, (2, 9), generator=torch.Generator().manual_seed(0))
WEIGHTS = "adapter_model.safetensors"


def base_of(tmp_path):
    return AutoModelForCausalLM.from_pretrained(tmp_path / "base")


def along(adapter, directions):
    """Largest share of any module's update along directions of the stream, as norms."""
    shares = []
    for name, matrix in updates(adapter).items():
        side, rows = met("llama", make_model(), name, directions)
        rows = normalize(rows)
        seen = (matrix @ rows.T).norm(dim=0) if side == "read" else (rows @ matrix).norm(dim=1)
        shares.append(float(seen.max() / matrix.norm()))
    return max(shares)


@pytest.mark.parametrize("freeze_basis", [False, True])
def test_no_basis_is_written_over_the_edited_factors(trained, tmp_path, freeze_basis):
    adapter = trained(ranks={"blocks.1.hook_resid_post": 4}, r="auto")
    if freeze_basis:
        config = json.loads((adapter / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(json.dumps({**config, "freeze_basis": True}))
    edit_adapter(adapter, tmp_path / "edited", remove=["1:2"])
    expected = load_file(tmp_path / "edited" / WEIGHTS)

    for load in ({}, {"is_trainable": True}, {"low_cpu_mem_usage": True}):
        model = PeftModel.from_pretrained(base_of(tmp_path), tmp_path / "edited", **load)
        model.save_pretrained(tmp_path / "again")
        found = load_file(tmp_path / "again" / WEIGHTS)
        assert all(torch.equal(found[name], expected[name]) for name in expected)

    base = base_of(tmp_path)
    base.load_adapter(str(tmp_path / "edited"))
    layer = base.model.layers[0].self_attn.q_proj.lora_A["default"].weight
    assert torch.equal(layer.detach(), expected["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"])


def test_a_frozen_factor_keeps_what_was_edited_while_training_on(trained, tmp_path):
    adapter = trained(ranks={"blocks.1.hook_resid_post": 4}, r="auto", freeze_basis=True)
    edit_adapter(adapter, tmp_path / "edited", remove=["1:2"])
    model = PeftModel.from_pretrained(base_of(tmp_path), tmp_path / "edited", is_trainable=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)

    for _ in range(3):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path / "trained_on")

    direction = Subspace.from_pretrained(adapter).sites[0].directions[2:3]
    before, after = updates(tmp_path / "edited"), updates(tmp_path / "trained_on")
    assert all(float((after[name] - before[name]).norm()) > 0.1 for name in before)
    assert along(adapter, direction) > 0.1
    assert along(tmp_path / "trained_on", direction) < 1e-6


@pytest.mark.parametrize(
    "arguments", [{"remove": ["0:3", "0:10"]}, {"scale": {"0:3": 3.0, "2:4": 0.5}}, {"keep": ["0:3"]}]
)
def test_protected_features_stay_protected(trained, tmp_path, saes, arguments):
    adapter = trained(protected={"blocks.1.hook_resid_mid": 2, "blocks.1.hook_resid_post": 1})
    guarded = torch.cat([site.directions for site in Subspace.from_pretrained(adapter).protected])
    assert along(adapter, guarded) < 1e-6
    named = normalize(saes[0].decoder[3:4].float())
    assert float((named @ guarded.T).abs().max()) > 0.05  # so a plain projection would bring something back

    edit_adapter(adapter, tmp_path / "edited", saes=saes, **arguments)

    assert along(tmp_path / "edited", guarded) < 1e-6
    if "remove" in arguments:
        assert along(tmp_path / "edited", named) < 1e-6
    if "scale" in arguments:
        before, after = updates(adapter), updates(tmp_path / "edited")
        for name, matrix in before.items():
            side, rows = met("llama", make_model(), name, named)
            old, new = (
                (matrix @ rows.T, after[name] @ rows.T) if side == "read" else (rows @ matrix, rows @ after[name])
            )
            torch.testing.assert_close(new, 3 * old, rtol=0, atol=1e-5 * float(matrix.norm()))
    model = PeftModel.from_pretrained(base_of(tmp_path), tmp_path / "edited", is_trainable=True)
    train_a_little(model, seed=4)
    model.save_pretrained(tmp_path / "trained_on")
    assert along(tmp_path / "trained_on", guarded) < 1e-6


def test_editing_a_protected_feature_changes_nothing(trained, tmp_path):
    adapter = trained(protected={"blocks.0.hook_resid_mid": 2})

    edit_adapter(adapter, tmp_path / "edited", remove=["0:40"])

    before, after = updates(adapter), updates(tmp_path / "edited")
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_dtype_stays_and_what_rounding_leaves_is_recorded(trained, tmp_path, saes, dtype):
    adapter = trained(kind="LORA")
    save_file({name: tensor.to(dtype) for name, tensor in load_file(adapter / WEIGHTS).items()}, adapter / WEIGHTS)

    edit_adapter(adapter, tmp_path / "edited", remove=["0:3"], saes=saes)

    assert {tensor.dtype for tensor in load_file(tmp_path / "edited" / WEIGHTS).values()} == {dtype}
    edit = read_edits(tmp_path / "edited")[0]
    left = max(module["left"] for module in edit["modules"].values())
    assert along(tmp_path / "edited", saes[0].decoder[3:4]) == pytest.approx(left, rel=0.5, abs=1e-7)
    if dtype == torch.float64:
        assert left < 1e-12
        assert edit["notes"] == []
    else:
        assert left > 1e-6
        assert any("Rounding to the adapter's dtype leaves up to" in note for note in edit["notes"])


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed", "ignore:Adapter 'default'. 6 LoRA tensor")
def test_a_bias_of_a_writing_factor_is_edited_with_it(trained, tmp_path, saes):
    adapter = trained(kind="LORA", target_modules=["o_proj", "q_proj"], lora_bias=True)
    name = "base_model.model.model.layers.1.self_attn.{}_proj.lora_B.bias"
    row = normalize(saes[0].decoder[3].double(), dim=0)

    edit_adapter(adapter, tmp_path / "edited", remove=["0:3"], saes=saes)

    before, after = load_file(adapter / WEIGHTS), load_file(tmp_path / "edited" / WEIGHTS)
    assert float((before[name.format("o")].double() @ row).abs()) > 1e-2
    assert float((after[name.format("o")].double() @ row).abs()) < 1e-6
    assert torch.equal(before[name.format("q")], after[name.format("q")])


def test_the_record_says_what_was_done_to_which_parent(trained, tmp_path, saes):
    adapter = trained()
    original = {path.name: path.read_bytes() for path in adapter.iterdir() if path.is_file()}

    edit_adapter(adapter, tmp_path / "one", remove=["2:4"], scale={"0:3": 0.5}, saes=saes)
    edit_adapter(tmp_path / "one", tmp_path / "two", keep=["1:0", "1:1"])

    assert {path.name: path.read_bytes() for path in adapter.iterdir() if path.is_file()} == original
    assert read_edits(adapter) == []
    first, second = read_edits(tmp_path / "two")
    assert read_edits(tmp_path / "one") == [first]
    assert [(entry["name"], entry["factor"]) for entry in first["features"]] == [
        ("blocks.0.hook_resid_post:3", 0.5),
        ("blocks.2.hook_resid_pre:4", 0.0),
    ]
    assert [entry["sae_digest"] for entry in first["features"]] == [handle.identity.digest for handle in saes]
    assert (first["kind"], second["kind"]) == ("scale", "keep")
    assert first["parent_digest"] == digest(load_file(adapter / WEIGHTS))
    assert first["digest"] == second["parent_digest"] == digest(load_file(tmp_path / "one" / WEIGHTS))
    assert second["digest"] == digest(load_file(tmp_path / "two" / WEIGHTS))
    assert first["subspace_digest"] == Subspace.from_pretrained(adapter).digest
    assert {"peft_sae", "torch"} <= set(first["versions"])
    assert str(tmp_path) not in json.dumps({**first, "base_model": ""})
    data = json.loads((tmp_path / "two" / "edit.json").read_text())
    assert (data["schema"], data["schema_version"]) == ("peft_sae.edit", 1)


def test_weights_that_changed_after_an_edit_are_told(trained, tmp_path, caplog):
    adapter = trained()
    edit_adapter(adapter, tmp_path / "one", remove=["1:0"])
    tensors = load_file(tmp_path / "one" / WEIGHTS)
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, tmp_path / "one" / WEIGHTS)

    edit_adapter(tmp_path / "one", tmp_path / "two", remove=["1:1"])

    assert "changed after its last recorded edit" in caplog.text
    assert read_edits(tmp_path / "two")[1]["notes"] == [record.message for record in caplog.records]


def test_the_result_is_a_whole_adapter(trained, tmp_path):
    adapter = trained()
    (adapter / "tokenizer.json").write_text("{}")
    (adapter / "notes").mkdir()
    (adapter / "notes" / "a.txt").write_text("a")
    (adapter / "trainer_state.json").write_text('{"log_history": []}')
    with safe_open(adapter / WEIGHTS, framework="pt") as file:
        metadata = file.metadata()

    edited = edit_adapter(str(adapter), str(tmp_path / "deep" / "edited"), remove=["1:0"])

    files = {path.relative_to(adapter) for path in adapter.rglob("*") if path.is_file()}
    found = {path.relative_to(edited) for path in edited.rglob("*") if path.is_file()}
    assert {str(path) for path in found - files} == {"edit.json"}
    assert files <= found
    same = [path for path in files if (adapter / path).read_bytes() == (edited / path).read_bytes()]
    assert {str(path) for path in files - set(same)} == {WEIGHTS, "README.md"}
    assert stat.S_IMODE((edited / WEIGHTS).stat().st_mode) == stat.S_IMODE((edited / "edit.json").stat().st_mode)
    with safe_open(edited / WEIGHTS, framework="pt") as file:
        assert file.metadata() == metadata
    merge_checkpoint(tmp_path / "base", edited, tmp_path / "merged")
    export_lora(edited, tmp_path / "lora")
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()(IDS).logits
        loaded = PeftModel.from_pretrained(base_of(tmp_path), tmp_path / "lora").eval()(IDS).logits
    torch.testing.assert_close(merged, loaded, rtol=1e-4, atol=1e-4)
    table = inspect_adapter(edited).features.set_index("name")
    assert float(table.loc["blocks.1.hook_resid_post:0", "share"].max()) < 1e-12


def test_what_holds_only_for_the_weights_of_before_stays_behind(trained, tmp_path):
    adapter = trained()
    shutil.copytree(adapter, adapter / "other")
    for name in ("checkpoint-5", ".git"):
        (adapter / name).mkdir()
        (adapter / name / WEIGHTS).write_bytes((adapter / WEIGHTS).read_bytes())
    for name in ("optimizer.pt", "adapter_model.bin", "rng_state.pth", "scheduler.pt"):
        (adapter / name).write_bytes(b"0")

    edited = edit_adapter(adapter, tmp_path / "edited", remove=["1:0"])

    left_out = {".git", "adapter_model.bin", "checkpoint-5", "optimizer.pt", "other", "rng_state.pth", "scheduler.pt"}
    assert not left_out & {path.name for path in edited.iterdir()}
    assert set(read_edits(edited)[0]["left_out"]) == left_out


def test_links_are_not_followed_out_of_the_folder(trained, tmp_path):
    adapter = trained()
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key").write_text("secret")
    (adapter / "key").symlink_to(tmp_path / "secret" / "key")
    (adapter / "folder").symlink_to(tmp_path / "secret")
    (adapter / "loop").symlink_to(adapter)
    (adapter / "gone").symlink_to(adapter / "nowhere")
    os.mkfifo(adapter / "pipe")
    (adapter / "inside").symlink_to(adapter / "adapter_config.json")

    edited = edit_adapter(adapter, tmp_path / "edited", remove=["1:0"])

    assert read_edits(edited)[0]["left_out"] == ["folder", "gone", "key", "loop", "pipe"]
    assert (edited / "inside").is_file()
    assert not (edited / "inside").is_symlink()
    assert not any(path.is_symlink() for path in edited.rglob("*"))


def test_a_needed_file_that_leads_out_is_refused(trained, tmp_path):
    adapter = trained()
    shutil.move(adapter / "subspace", tmp_path / "elsewhere")
    (adapter / "subspace").symlink_to(tmp_path / "elsewhere")
    before = sorted(tmp_path.iterdir())

    with pytest.raises(ArtifactError, match=r"subspace\.json' is a link that leads out .* Put the file itself there"):
        edit_adapter(adapter, tmp_path / "edited", remove=["1:0"])
    assert sorted(tmp_path.iterdir()) == before


def test_a_snapshot_in_the_hubs_cache_is_a_whole_adapter(trained, tmp_path):
    adapter = trained()
    cache = tmp_path / "models--a--b"
    snapshot = cache / "snapshots" / "0123"
    (cache / "blobs").mkdir(parents=True)
    for number, path in enumerate(sorted(path for path in adapter.rglob("*") if path.is_file())):
        shutil.copyfile(path, cache / "blobs" / str(number))
        place = snapshot / path.relative_to(adapter)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(os.path.relpath(cache / "blobs" / str(number), place.parent))

    edited = edit_adapter(snapshot, tmp_path / "edited", remove=["1:0"])

    assert read_edits(edited)[0]["left_out"] == []
    assert Subspace.from_pretrained(edited).digest == Subspace.from_pretrained(adapter).digest


def test_modules_trained_as_a_whole_are_told_and_stay(trained, tmp_path, saes, caplog):
    model = make_model()
    model.save_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    adapted = get_peft_model(base_of(tmp_path), config)
    train_a_little(adapted)
    adapted.save_pretrained(tmp_path / "adapter")

    edited = edit_adapter(tmp_path / "adapter", tmp_path / "edited", remove=["0:3"], saes=saes)

    assert "1 tensors that were trained as a whole (base_model.model.lm_head.weight ...) are not edited" in caplog.text
    before, after = load_file(tmp_path / "adapter" / WEIGHTS), load_file(edited / WEIGHTS)
    assert torch.equal(before["base_model.model.lm_head.weight"], after["base_model.model.lm_head.weight"])


def test_the_card_of_the_copy_says_that_it_was_edited(trained, tmp_path):
    adapter = trained(ranks={"blocks.1.hook_resid_post": 4}, r="auto")
    original = (adapter / "README.md").read_text()
    edit_adapter(adapter, tmp_path / "one", remove=["1:2"])
    edit_adapter(tmp_path / "one", tmp_path / "two", scale={"1:3": 0.5})
    card = (tmp_path / "two" / "README.md").read_text()
    assert card.count("## Edited after training") == 1
    assert card.count(" removed; of the weights") == card.count(" times 0.5; of the weights") == 1
    assert "## Features" in card
    assert (adapter / "README.md").read_text() == original
