"""What a job's file may say; every mistake is named before anything is loaded."""

import pytest
import yaml

from peft_sae.errors import ConfigError
from peft_sae.jobs import read_job
from tests.jobs.conftest import SELECT

JOB = {"model": "base", "data": "aligned.jsonl", "subspace": "subspace", "output": "adapter", "adapter": {"r": 4}}


def write(folder, job):
    (folder / "job.yaml").write_text(yaml.safe_dump(job))
    return folder / "job.yaml"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adaptor": {}}, "unknown key 'adaptor'.* Did you mean 'adapter'"),
        ({"model": None}, r"lacks the keys \['model'\]"),
        ({"adapter": []}, r"Key 'adapter' .* is \[\], and a mapping is needed"),
        ({"adapter": {"rank": 3}}, "no field 'rank'"),
        ({"adapter": {"subspace": "x"}}, "Put it at the top"),
        ({"training": {"learning_rat": 1}}, "no argument 'learning_rat'.* Did you mean 'learning_rate'"),
        ({"training": {"learning_rate": "fast"}}, "'training.learning_rate' .* is 'fast', and a number is needed"),
        ({"training": {"max_steps": 2.5}}, "'training.max_steps' .* is 2.5, and a whole number is needed"),
        ({"training": {"bf16": "yes"}}, "'training.bf16' .* is 'yes', and true or false .*is needed"),
        ({"training": {"optim": 3}}, "'training.optim' .* is 3, and text is needed"),
        ({"training": {"output_dir": "x"}}, "training.output_dir is decided elsewhere.* goes to `output`"),
        ({"training": {"completion_only_loss": True}}, "completion_only_loss would have no effect.*`learn`"),
        ({"method": "ppo"}, "Key 'method' .* is 'ppo', and 'sft' or 'dpo' is needed"),
        ({"subspace": None}, "lacks the key 'subspace'.*section 'select'"),
        ({"select": {"topk": 3, "saes": "saes"}}, "unknown key 'select.topk'.* Did you mean 'top_k'"),
        ({"select": {"saes": "saes", "model": "other"}}, "'select.model' .* is that of the job itself"),
        ({"select": {"top_k": 3}}, r"lacks the keys \['select.saes'\]"),
        ({"select": {**SELECT, "top_k": 0}}, "top_k=0 selects nothing"),
        ({"data": {"split": "train"}}, "data lacks 'path'"),
        ({"data": {"path": "x", "splitt": "train"}}, "data.splitt is no key.* Did you mean 'split'"),
        ({"merged": "adapter/merged"}, "lie in one another"),
        ({"model": ".", "merged": "merged"}, "lies in the model's folder"),
        ({"select": {**SELECT, "statistics": "adapter/statistics"}}, "lie in one another"),
        ({"report": "report.pdf"}, "no HTML file"),
        ({"merged": "merged", "report": "merged/report.html"}, "lies in merged='merged', which is written as a whole"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "both load_in_4bit and load_in_8bit"),
        ({"architecture": {"hidden_size": 8}}, "lacks 'model_type'"),
        ({"max_length": 1}, "leaves no text"),
    ],
)
def test_a_job_is_checked_before_anything_is_loaded(tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        read_job(write(tmp_path, {**JOB, **change}))


def test_every_mistake_is_named_at_once(tmp_path):
    wrong = {
        "modle": "x",
        "dtype": 3,
        "adapter": {"rnk": 2, "lora_alfa": 1},
        "training": {"epochs": 2},
        "select": {"saes": "s", "topk": 1},
    }
    with pytest.raises(ConfigError) as caught:
        read_job(write(tmp_path, {**JOB, **wrong}))

    told = str(caught.value).split("\n- ")
    assert told[0].endswith("has 6 mistakes:")
    for key in ("'modle'", "'dtype'", "'rnk'", "'lora_alfa'", "'epochs'", "'select.topk'"):
        assert sum(key in line for line in told[1:]) == 1, key


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a0: &a0 [x, x]\n" + "".join(f"a{n + 1}: &a{n + 1} [*a{n}, *a{n}]\n" for n in range(40)), "100,000 values"),
        ("select: &a {saes: *a}\n", "100,000 values"),
        ("adapter: " + "[" * 200 + "]" * 200, "nested more than 100 deep"),
        ("adapter: {1: 2, null: 3, r: 4}\ntraining: {1: 2}\nselect: {1: 2}\n", "has no field 1,"),
        ("? [1, 2]\n: 3\n", "cannot be read as YAML|unknown key"),
        ("1: 2\n", "unknown key '1'"),
    ],
)
def test_no_file_takes_forever_or_breaks_the_check(tmp_path, text, message):
    (tmp_path / "job.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_job(tmp_path / "job.yaml")


def test_values_of_every_kind_are_taken(tmp_path):
    training = {"learning_rate": 1, "optim": "sgd", "report_to": ["none"], "lr_scheduler_kwargs": {"a": 1}, "debug": ""}
    training |= {"eval_strategy": "steps", "eval_steps": 0.5, "max_grad_norm": None, "bf16": False, "save_steps": 10}
    assert read_job(write(tmp_path, {**JOB, "training": training})).training == training


def test_numbers_as_people_write_them(tmp_path):
    (tmp_path / "job.yaml").write_text(
        "{model: a, data: b, subspace: c, output: d, training: {learning_rate: 2e-4, optim: adamw_torch}}"
    )

    assert read_job(tmp_path / "job.yaml").training == {"learning_rate": 2e-4, "optim": "adamw_torch"}


def test_the_method_says_which_arguments_there_are(tmp_path):
    assert read_job(write(tmp_path, {**JOB, "method": "dpo", "training": {"beta": 0.2}})).method == "dpo"
    with pytest.raises(ConfigError, match=r"SFTConfig has no argument 'beta'"):
        read_job(write(tmp_path, {**JOB, "training": {"beta": 0.2}}))


def test_the_selection_takes_what_the_job_says(tmp_path):
    job = read_job(write(tmp_path, {**JOB, "subspace": None, "dtype": "bfloat16", "select": SELECT}))
    selection = job.selection()
    assert (selection.model, selection.output, selection.dtype) == ("base", "adapter-subspace", "bfloat16")
    assert job.adapter_config().subspace == "adapter-subspace"
