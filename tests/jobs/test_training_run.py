"""Whole jobs on a tiny model: from the selection to the merged checkpoint, also when they are stopped midway."""

import json
import os
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from peft_sae import FeatureStatistics, SaeSubspaceConfig, Subspace
from peft_sae.errors import ArtifactError, ConfigError, DataError
from peft_sae.jobs import TrainingJob, request, run_job, selection_run, training_run
from peft_sae.training import train as training_of_adapters
from peft_sae.training import train_adapter
from peft_sae.writing import alone
from tests.jobs.conftest import SELECT
from tests.tiny import make_model, make_subspace, make_tokenizer

SAE = "saes/blocks.0.hook_resid_post/cfg.json"
IDS = torch.randint(4, 16, (2, 9), generator=torch.Generator().manual_seed(0))
TRAINING = {"max_steps": 4, "learning_rate": 0.05, "per_device_train_batch_size": 2, "gradient_checkpointing": False}
ADAPTER = {"r": 4, "target_modules": ["q_proj", "o_proj"]}

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing[a-z_]*` is deprecated:FutureWarning")


def job(**changes):
    fields = {"adapter": ADAPTER, "training": TRAINING, "select": SELECT, **changes}
    return TrainingJob(fields.pop("model", "base"), fields.pop("data", "aligned.jsonl"), "adapter", **fields)


def run(**changes):
    return run_job(job(**changes), progress=False)


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def test_everything_that_is_asked_for_is_written(world):
    result = run(report="report.html", merged="merged", lora="lora")

    adapted = PeftModel.from_pretrained(make_model(), result.adapter)
    wanted = logits(adapted)
    assert not torch.allclose(wanted, logits(make_model()), atol=1e-3)
    merged = AutoModelForCausalLM.from_pretrained("merged")
    torch.testing.assert_close(logits(merged), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(make_model(), "lora")), wanted, rtol=1e-5, atol=1e-5)
    assert "<html" in (world / "report.html").read_text()[:300]
    assert Subspace.from_pretrained("adapter-subspace").digest == Subspace.from_pretrained("adapter/subspace").digest
    assert not any(path.suffix in (".bin", ".pt", ".pth") for path in (world / "adapter").rglob("*"))
    left = {"adapter", "adapter-subspace", "merged", "lora", "report.html"}
    assert {path.name for path in world.iterdir()} == left | {
        *("base", "saes", "aligned.jsonl", "unaligned.jsonl", "preferences.jsonl")
    }


@pytest.mark.parametrize(("data", "method"), [("preferences.jsonl", "dpo"), ("preferences.jsonl", "sft")])
def test_preferences_are_compared_or_the_chosen_ones_learned(world, data, method):
    run(data=data, method=method)
    by_preferences = load_file("adapter/adapter_model.safetensors")
    assert all(weight.abs().sum() > 0 for weight in by_preferences.values())
    if method == "sft":  # the chosen answers are those of aligned.jsonl
        (world / "adapter").rename(world / "first")
        (world / "adapter-subspace").rename(world / "second")
        run()
        again = load_file("adapter/adapter_model.safetensors")
        assert all(torch.equal(again[name], weight) for name, weight in by_preferences.items())


class Stopped(Exception):
    """Stands for a kill."""


def stop_in(monkeypatch, name, module=training_run):
    def stop(*_, **__):
        raise Stopped

    monkeypatch.setattr(module, name, stop)


def test_a_job_goes_on_where_it_was_stopped(world, monkeypatch):
    run(report="report.html", merged="merged")
    wanted = load_file("merged/model.safetensors")
    for name in ("adapter", "adapter-subspace", "merged"):
        (world / name).rename(world / f"{name}-before")
    (world / "report.html").unlink()

    for place in ("run_selection", "train_adapter", "inspect_adapter", "merge_checkpoint"):
        with monkeypatch.context() as patch:
            stop_in(patch, place)
            with pytest.raises(Stopped):
                run(report="report.html", merged="merged")
    # What was done before each stop is not done again.
    for place in ("run_selection", "train_adapter"):
        stop_in(monkeypatch, place)
    run(report="report.html", merged="merged")

    found = load_file("merged/model.safetensors")
    assert all(torch.equal(found[name], weight) for name, weight in wanted.items())
    assert not (world / "adapter.checkpoints").exists()


def test_a_training_goes_on_from_its_last_complete_checkpoint(world):
    training = {**TRAINING, "max_steps": 6, "save_steps": 2, "seed": 3}
    run(training=training)
    wanted = load_file("adapter/adapter_model.safetensors")
    (world / "adapter").rename(world / "whole")
    checkpoints = world / "adapter.checkpoints"
    # As a kill leaves it: the last checkpoint is torn, and nothing was written after.
    (checkpoints / "checkpoint-6" / "trainer_state.json").write_text('{"log_hist')
    before = (checkpoints / "checkpoint-4" / "trainer_state.json").stat().st_mtime_ns
    (world / "adapter-subspace").rename(world / "subspace")

    run(training=training, select=None, subspace="subspace")

    found = load_file("adapter/adapter_model.safetensors")
    assert all(torch.equal(found[name], weight) for name, weight in wanted.items())
    assert (checkpoints / "checkpoint-4" / "trainer_state.json").stat().st_mtime_ns == before
    state = json.loads((checkpoints / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["global_step"] == 6


def test_checkpoints_that_a_stop_left_behind_go_with_the_job(world, monkeypatch):
    with monkeypatch.context() as patch:
        stop_in(patch, "finish", training_of_adapters)
        with pytest.raises(Stopped):
            run()
    assert (world / "adapter").is_dir()
    left = world / "adapter.checkpoints"
    assert any(left.glob("checkpoint-*"))
    assert (left / "final").is_dir()
    (left / "statistics.state.0-of-2").write_text("")
    stop_in(monkeypatch, "train_adapter")

    run()

    assert not left.exists()


def test_texts_are_not_read_again_when_only_the_choice_changes(world, monkeypatch):
    before = {**SELECT, "top_k": 3, "texts": 1}
    with monkeypatch.context() as patch:
        stop_in(patch, "subspace_from_selection", selection_run)
        with pytest.raises(Stopped):
            run(select=before)
    for change in ({"tokens": "response"}, {"unaligned": "aligned.jsonl"}, {"measures": ["histograms"]}):
        with monkeypatch.context() as patch:
            stop_in(patch, "collect_statistics", selection_run)
            patch.setattr(request.Request, "write", lambda self: None)
            with pytest.raises(Stopped):
                run(select={**before, **change})
    with monkeypatch.context() as patch:
        stop_in(patch, "collect_statistics", selection_run)
        run(select={**before, "top_k": 2})

    assert not (world / "adapter.checkpoints").exists()
    found = Subspace.from_pretrained("adapter-subspace").digest
    (world / "adapter").rename(world / "first")
    (world / "adapter-subspace").rename(world / "second")
    run(select={**SELECT, "top_k": 2})
    assert Subspace.from_pretrained("adapter-subspace").digest == found


@pytest.mark.parametrize("kept", [{}, {"statistics": "kept"}])
def test_statistics_of_another_job_never_pass_for_this_ones(world, monkeypatch, kept):
    other = {**SELECT, **kept, "aligned": "unaligned.jsonl", "unaligned": "aligned.jsonl", "top_k": 2}
    with monkeypatch.context() as patch:
        stop_in(patch, "subspace_from_selection", selection_run)
        with pytest.raises(Stopped):
            run(select=other)
    with monkeypatch.context() as patch:
        stop_in(patch, "collect_statistics", selection_run)
        for _ in range(2):  # the first of these has written down what it was to do
            with pytest.raises(Stopped):
                run(select={**SELECT, **kept, "top_k": 2})


@pytest.mark.parametrize("name", ["checkpoint-500/model.safetensors", "final/thesis.txt", "README.md"])
def test_nothing_of_others_is_touched(world, name):
    place = world / "adapter.checkpoints" / name
    place.parent.mkdir(parents=True)
    place.write_text("years of work")
    with pytest.raises(ConfigError, match=r"and no job\.json that says of which job.*Move them away"):
        run()
    assert place.read_text() == "years of work"
    assert not (world / "adapter").exists()


def test_no_folder_of_checkpoints_stays_where_none_are_written(world):
    run(training={**TRAINING, "save_strategy": "no"})
    assert not (world / "adapter.checkpoints").exists()


def test_what_lies_beside_a_jobs_own_files_stays(world):
    folder = world / "adapter.checkpoints"
    folder.mkdir()
    for name in ("my_statistics.txt", "statistics.final", "notes"):
        (folder / name).write_text("mine")
    run()
    assert {path.name for path in folder.iterdir()} == {"my_statistics.txt", "statistics.final", "notes"}


def test_a_link_in_the_place_of_what_is_saved_is_not_followed(world, monkeypatch):
    with monkeypatch.context() as patch:
        stop_in(patch, "_save", training_of_adapters)
        with pytest.raises(Stopped):
            run()
    (world / "mine").mkdir()
    (world / "mine" / "thesis.txt").write_text("years of work")
    (world / "adapter.checkpoints" / "final").symlink_to(world / "mine")
    run()
    assert (world / "mine" / "thesis.txt").read_text() == "years of work"
    assert not (world / "adapter" / "thesis.txt").exists()
    assert not (world / "adapter.checkpoints").exists()


def test_two_processes_never_do_one_job(world):
    with alone(world / "adapter.checkpoints"), pytest.raises(ArtifactError, match="Another process is writing"):
        run()
    run()
    assert not any(path.name.startswith(".") for path in world.iterdir())


def test_what_is_asked_for_later_replaces_nothing(world, monkeypatch):
    with monkeypatch.context() as patch:
        stop_in(patch, "merge_checkpoint")
        with pytest.raises(Stopped):
            run(merged="merged")
    (world / "foreign").mkdir()
    (world / "foreign" / "thesis.txt").write_text("years of work")
    for place in ("merged", "lora"):
        with pytest.raises(ArtifactError, match="writing there would destroy it"):
            run(**{place: "foreign"})
    run(merged="merged", lora="lora")
    assert (world / "merged" / "model.safetensors").is_file()


def test_a_slash_at_the_end_changes_nothing(world):
    fields = {"adapter": ADAPTER, "training": TRAINING, "select": SELECT}
    run_job(TrainingJob("base", "aligned.jsonl", "adapter/", **fields), progress=False)
    assert {"adapter", "adapter-subspace"} < {path.name for path in world.iterdir()}
    assert not any(path.name.startswith(".") for path in (world / "adapter").iterdir())


def test_a_damaged_request_says_what_to_remove(world):
    (world / "adapter.checkpoints").mkdir()
    (world / "adapter.checkpoints" / "request.json").write_text("{")
    with pytest.raises(ConfigError, match=r"Remove 'adapter\.checkpoints' to begin anew"):
        run()


@pytest.mark.parametrize("name", ["aligned.jsonl", "unaligned.jsonl", "base/generation_config.json", SAE])
def test_files_that_changed_since_the_stop_are_noticed(world, monkeypatch, name):
    with monkeypatch.context() as patch:
        stop_in(patch, "merge_checkpoint")
        with pytest.raises(Stopped):
            run(merged="merged")
    before = (world / name).read_text()
    (world / name).write_text(before + before.splitlines()[0] if name.endswith("l") else before + " ")
    with pytest.raises(ArtifactError, match=r"adapter' exists and holds"):
        run(merged="merged")
    (world / name).write_text(before)
    run(merged="merged", training={**TRAINING, "logging_steps": 1}, watch=False, lora="lora")
    assert (world / "merged").is_dir()
    assert (world / "lora").is_dir()


def test_an_empty_folder_is_not_taken_for_what_is_asked(world):
    for name in ("merged", "lora", "adapter"):
        (world / name).mkdir()
    run(merged="merged", lora="lora")
    assert (world / "merged" / "model.safetensors").is_file()
    assert (world / "lora" / "adapter_model.safetensors").is_file()


def test_torn_checkpoints_are_told_and_begun_anew(world, monkeypatch, caplog):
    make_subspace(make_model()).save_pretrained("subspace")
    with monkeypatch.context() as patch:
        stop_in(patch, "_save", training_of_adapters)
        with pytest.raises(Stopped):
            run(select=None, subspace="subspace", training={**TRAINING, "save_steps": 2, "max_steps": 2})
    torn = world / "adapter.checkpoints" / "checkpoint-2"
    (torn / "trainer_state.json").unlink()
    with pytest.raises(ConfigError, match="are of a job with"):
        run(select=None, subspace="subspace")
    caplog.clear()
    run(select=None, subspace="subspace", training={**TRAINING, "save_steps": 2, "max_steps": 2})
    assert "No checkpoint in 'adapter.checkpoints' is complete (['checkpoint-2'])" in caplog.text
    assert (torn / "trainer_state.json").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"training": {"learning_rate": 0.01}},
        {"data": "unaligned.jsonl"},
        {"eval_data": "unaligned.jsonl"},
        {"adapter": {"lora_alpha": 99}},
        {"max_length": 4},
        {"model": "other"},
        {"processes": 2},
    ],
)
def test_checkpoints_of_another_job_are_refused(world, change):
    make_subspace(make_model()).save_pretrained("subspace")
    settings = {"select": None, "subspace": "subspace", "training": {**TRAINING, "save_steps": 2}}
    run(**settings)
    (world / "adapter").rename(world / "first")
    if "training" in change:
        change = {"training": {**settings["training"], **change["training"]}}
    if "adapter" in change:
        change = {"adapter": {**ADAPTER, **change["adapter"]}}

    if "model" in change:
        save_other_base(world / "other")
    if change.pop("processes", None):  # as if two had written them
        path = world / "adapter.checkpoints" / "job.json"
        path.write_text(path.read_text().replace('"processes": 1', '"processes": 2'))

    with pytest.raises(ConfigError, match=r"checkpoints in .* are of a job with .*remove the folder to begin anew"):
        run(**{**settings, **change})

    assert not (world / "adapter").exists()
    if not change:
        return
    run(**{**settings, "training": {**settings["training"], "logging_steps": 1}})  # changes nothing of the result


def save_other_base(folder):
    """The same sizes and the same configuration, with other weights."""
    torch.manual_seed(9)
    other = make_model()
    with torch.no_grad():
        for weight in other.parameters():
            weight += 0.01
    other.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def test_a_configuration_can_be_used_again(world):
    """What injection writes into it does not make it another one."""
    config = SaeSubspaceConfig(subspace=make_subspace(make_model()), r="auto", target_modules="all-linear")
    settings = {"max_steps": 2, "save_steps": 1, "use_cpu": True, "progress": False}
    for name in ("one", "two"):
        train_adapter(make_model(), make_tokenizer(), ["red sun"], config, name, **settings)
    shutil.rmtree("one")
    train_adapter(make_model(), make_tokenizer(), ["red sun"], config, "one", **settings)  # goes on at its end
    assert (config.r, config.target_modules) == ("auto", "all-linear")


def test_what_is_there_is_never_replaced(world):
    run()
    with pytest.raises(ArtifactError, match="writing there would destroy it"):
        run()
    (world / "adapter").rename(world / "first")
    with pytest.raises(ConfigError, match=r"'adapter-subspace' is there already, and not from this job.*'select'"):
        run()
    run(select=None, subspace="adapter-subspace")
    assert (world / "adapter").is_dir()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"data": "nowhere.jsonl"}, DataError, "cannot be opened"),
        ({"data": "no-such/set"}, DataError, "no file here, and cannot be loaded as a data set"),
        ({"data": "preferences.jsonl", "method": "dpo", "learn": "all"}, ConfigError, "about method: sft"),
        ({"method": "dpo"}, DataError, "DPO needs 'chosen' and 'rejected'"),
        ({"architecture": {"model_type": "llama", "hidden_size": 7}}, ConfigError, "hidden_size=7, and 'base' has 32"),
        ({"adapter": {"r": 4, "target_modules": ["lm_head"]}}, ConfigError, "SFTTrainer refuses the job"),
        ({"select": None, "subspace": "nowhere/else/sub"}, ArtifactError, "nowhere"),
        ({"training": {"max_steps": "many"}}, ConfigError, "refuses"),
        ({"training": {"save_only_model": True}}, ConfigError, "none that a training could go on from"),
    ],
)
def test_what_cannot_be_done_is_told_and_leaves_no_adapter(world, changes, error, message):
    with pytest.raises(error, match=message):
        run(**changes)
    assert not (world / "adapter").exists()


def test_statistics_that_are_asked_for_stay(world):
    run(select={**SELECT, "statistics": "kept"})
    assert FeatureStatistics.from_pretrained("kept").saes


def test_data_files_of_a_mapping_are_looked_at(tmp_path):
    path = tmp_path / "data.json"
    found = set()
    for content in ("[1]", "[2]"):
        path.write_text(content)
        found |= {request._digest({"path": "json", "data_files": one}) for one in (str(path), [str(path)])}
    assert len(found) == 4


def test_large_files_are_told_apart_by_size_and_time(tmp_path, monkeypatch):
    monkeypatch.setattr(request, "_LONGEST_READ", 3)
    (tmp_path / "set").mkdir()
    path = tmp_path / "set" / "data.arrow"
    found = set()
    for content, time in ((b"aaaa", 1), (b"aaaa", 2), (b"aaaaa", 2), (b"aaa", 2), (b"bbb", 2), (b"bbb", 3)):
        path.write_bytes(content)
        os.utime(path, (time, time))
        found.add(request._digest(str(tmp_path / "set")))
    assert len(found) == 5  # the last two are read, and are the same
    assert request._digest("someone/set") is None
