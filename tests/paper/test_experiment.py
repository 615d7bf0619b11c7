"""The shipped files, and what is said of wrong ones."""

import pytest
import yaml

pytest.importorskip("openai", reason="the extra 'paper' is not installed")

from benchmarks.paper.experiment import read_experiment
from benchmarks.paper.specs import ClassifierJudgeSpec, OpenAIJudgeSpec
from peft_sae.errors import ConfigError
from tests.paper.conftest import EXPERIMENTS, FOLDER


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_shipped_files_are_the_published_experiment(path):
    found = read_experiment(path)
    assert found.job.model.split("/")[-1].lower() == path.stem
    assert {spec.kind for spec in found.methods.values()} == {"base", "full", "lora", "sae_subspace"}
    frozen = [found.adapted_job(name).adapter.get("freeze_basis", False) for name in list(found.methods)[3:5]]
    assert frozen == [False, True]
    batches = {
        tuple(found.adapted_job(name).training.get(key) for key in ("num_train_epochs", "gradient_accumulation_steps"))
        for name in found.methods
    }
    assert len(batches) == 1  # the same data and steps for all
    assert {found.adapted_job(name).training["seed"] for name in found.methods} == {0}
    assert [spec.form for spec in found.sets.values()] == ["hh_rlhf", "hex_phi", "column"]
    assert found.generation.prompt_form == "\n\nHuman: {prompt}\n\nAssistant:"
    assert path.read_text().startswith("# The published experiment (SAILS")


def test_there_are_three():
    assert [path.stem for path in EXPERIMENTS] == ["gemma-2-2b", "gemma-2-9b", "llama-3.1-8b"]


def write(folder, change):
    data = yaml.safe_load((FOLDER / "gemma-2-2b.yaml").read_text())
    data["job"] = str((FOLDER / data["job"]).resolve())
    change(data)
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def test_names_and_places_come_from_the_file(tmp_path):
    path = write(tmp_path, lambda data: data.pop("output"))
    found = read_experiment(path)
    assert (found.name, str(found.output)) == ("mine", "outputs/paper/mine")
    assert read_experiment(path, output=tmp_path).output == tmp_path
    job = found.adapted_job("lora")
    assert job.output == "outputs/paper/mine/methods/lora/adapter"
    assert (job.merged, job.select, job.subspace) == (None, None, "outputs/paper/mine/subspace")


def test_methods_of_one_selection_share_a_subspace(tmp_path):
    by_requests = {
        "kind": "sae_subspace",
        "select": {"preferences": None, "aligned": "a.jsonl", "unaligned": "b.jsonl"},
    }
    more = {"first": by_requests, "second": by_requests, "third": {"kind": "sae_subspace", "select": {"top_k": 9}}}
    more["fourth"] = {"kind": "sae_subspace", "select": {"variance": 0.8}}  # as the job has it
    found = read_experiment(write(tmp_path, lambda data: data["methods"].update(more)))
    folders = {name: str(found.subspace(name).relative_to(found.output)) for name in found.methods}
    assert folders["first"] == folders["second"] == "methods/first/subspace"
    assert folders["third"] == "methods/third/subspace"
    assert folders["fourth"] == folders["sae-subspace"] == "subspace"
    assert "preferences" not in found.selection("first")
    assert found.selection("third")["preferences"] == "Anthropic/hh-rlhf"


def test_a_classifier_is_a_judge_too(tmp_path):
    judge = {"kind": "classifier", "model": "some/one", "labels": {"safe": 1, "unsafe": 5}}
    found = read_experiment(write(tmp_path, lambda data: data.update(judge=judge)))
    assert isinstance(found.judge, ClassifierJudgeSpec)
    assert isinstance(read_experiment(EXPERIMENTS[0]).judge, OpenAIJudgeSpec)


def setter(*keys, to):
    def change(data):
        for key in keys[:-1]:
            data = data[key]
        data[keys[-1]] = to

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (setter("metods", to={}), "unknown key 'metods'.*Did you mean 'methods'"),
        (setter("methods", "lora", "select", to={"top_k": 3}), r"methods\.lora\.select.*has no Subspace"),
        (setter("methods", "sae-subspace", "select", to={"topk": 3}), r"methods\.sae-subspace\.select\.topk.*'top_k'"),
        (
            setter("methods", "sae-subspace", "select", to={"aligned": "a.txt"}),
            r"sae-subspace\.select: It takes two sets",
        ),
        (setter("methods", "lora", "adaptor", to={}), r"'methods\.lora\.adaptor'.*Did you mean 'adapter'"),
        (setter("methods", "lora", "adapter", to={"rank": 3}), r"methods\.lora\.adapter\.rank.*no such field"),
        (setter("methods", "lora", "adapter", to={"freeze_basis": True}), r"adapter\.freeze_basis.*no such field"),
        (setter("methods", "lora", "training", to={"learning_rat": 1.0}), "Did you mean 'learning_rate'"),
        (setter("methods", "lora", "kind", to="dora"), r"'methods\.lora\.kind'.*'dora'.*'sae_subspace'"),
        (setter("methods", "base", "training", to={"seed": 1}), "the base, which is not trained"),
        (setter("methods", "a/b", to={"kind": "base"}), "name 'a/b', and it names files"),
        (setter("methods", to={}), "'methods' in .* is empty"),
        (setter("methods", "lora", to=3), r"'methods\.lora' in .* is 3, and a mapping"),
        (setter("sets", "hex-phi", "form", to="hexphi"), r"'sets\.hex-phi\.form'"),
        (setter("sets", "xstest", "source", to={"path": "a", "splt": "b"}), "splt is no key of a data set"),
        (setter("sets", "xstest", "count", to=0), r"sets\.xstest\.count=0 is too small"),
        (setter("generation", "prompt_form", to="Human:"), "no place for the prompt"),
        (setter("generation", "max_new_tokens", to="many"), r"'generation\.max_new_tokens'.*a whole number"),
        (setter("judge", "base_url", to="http://me:pw@here/v1"), "holds a user or password"),
        (setter("judge", "parameters", to={"model": "x"}), "given elsewhere"),
        (setter("judge", "api_key", to="sk-1"), r"unknown key 'judge\.api_key'"),
        (setter("judge", to={"kind": "classifier", "model": "x", "labels": {"a": 7}}), r"judge\.labels has {'a': 7}"),
        (setter("attack", "set", to="hexphi"), "attack.set='hexphi' is none of the sets. Did you mean 'hex-phi'"),
        (setter("attack", "set", to="xstest"), "attack.set='xstest' is harmless, so compliance is no success"),
        (setter("attack", "success", to=1), "no score from 2 to 5"),
        (setter("capability", "task", to=[]), r"'capability\.task'.*Did you mean 'tasks'"),
        (setter("generation", "stop", to=[""]), "would end every answer"),
        (setter("judge", "base_url", to="http://here/v1"), "the key for OpenAI would go there"),
        (setter("judge", "longest_wait", to=-1), r"judge\.longest_wait=-1 is too small"),
        (setter("judge", "timeout", to=float("nan")), r"judge\.timeout=nan is too small"),
        (setter("attack", "target", to=" "), r"attack\.target is empty"),
        (setter("capability", "batch_size", to=0), r"capability\.batch_size=0 is too small"),
        (setter("estimate", "training_flops", to=0), r"estimate\.training_flops=0 is too small"),
        (setter("estimate", to={}), "lacks the keys .*estimate.train_examples"),
        (setter("job", to="nowhere.yaml"), "nowhere.yaml' cannot be opened"),
    ],
)
def test_wrong_files_are_told(tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        read_experiment(write(tmp_path, change))


def test_all_mistakes_are_told_at_once(tmp_path):
    def change(data):
        data["methods"]["lora"]["a"] = data["judge"]["b"] = data["sets"]["xstest"]["c"] = 1

    with pytest.raises(ConfigError, match=r"3 mistakes(?s:.*)lora\.a(?s:.*)xstest\.c(?s:.*)judge\.b"):
        read_experiment(write(tmp_path, change))


def test_full_fine_tuning_is_for_weights_that_are_not_quantised(tmp_path):
    job = yaml.safe_load((FOLDER / "../../configs/gemma-2-2b.yaml").read_text())
    (tmp_path / "job.yaml").write_text(yaml.safe_dump({**job, "load_in_4bit": True}))
    path = write(tmp_path, setter("job", to=str(tmp_path / "job.yaml")))
    with pytest.raises(ConfigError, match=r"methods\.full trains all weights, and the job has.*4 bits per weight"):
        read_experiment(path)


def test_a_rank_that_plain_lora_lacks_is_told(tmp_path):
    path = FOLDER / "llama-3.1-8b.yaml"
    data = yaml.safe_load(path.read_text())
    data["job"] = str((FOLDER / data["job"]).resolve())
    del data["methods"]["lora"]["adapter"]
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(data))
    with pytest.raises(ConfigError, match=r"methods\.lora has r=auto.*Give adapter\.r a number"):
        read_experiment(tmp_path / "mine.yaml")
