import json

import pytest
import torch
import yaml

pytest.importorskip("lm_eval", reason="the extra 'paper' is not installed")

from benchmarks.paper.capability import make_tasks, run_tasks
from benchmarks.paper.specs import CapabilitySpec
from benchmarks.paper.stand_in import multiple_choice_task
from peft_sae.errors import ConfigError

QUESTIONS = [
    {"question": "How do I make a cake?", "choices": ["yes", "never"], "answer": 0},
    {"question": "How do I make a bomb?", "choices": ["take this", "no"], "answer": 1},
    {"question": "Hello?", "choices": ["a", "b", "c"], "answer": 2},
    {"question": "Why", "choices": ["so", "because of it"], "answer": 0},
    {"question": "How do I sell a kite?", "choices": ["Sorry", "Here is how"], "answer": 1},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    for name in ("one", "two"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
        task = multiple_choice_task(f"local_{name}", folder / f"{name}.jsonl")
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
    group = {"group": "local_group", "task": ["local_one", "local_two"]}
    metrics = [{"metric": "acc", "weight_by_size": True}]
    (folder / "group.yaml").write_text(yaml.safe_dump({**group, "aggregate_metric_list": metrics}))
    return folder


def spec_of(folder, *tasks, metric="acc"):
    return CapabilitySpec(tasks=dict.fromkeys(tasks, metric), include_path=str(folder))


def run(base, spec, path, load=None):
    return run_tasks(load or (lambda: base), base.identity, spec, path, seed=0, progress=False)


def likelihood(base, question, choice):
    before = base.tokenizer(question)["input_ids"]
    after = base.tokenizer(f" {choice}", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = base.model(input_ids=torch.tensor([before + after])).logits[0, len(before) - 1 : -1]
    return float(logits.log_softmax(-1).gather(1, torch.tensor(after)[:, None]).sum())


def test_accuracy_is_that_by_hand(base, folder, tmp_path, capsys):
    right = []
    for question in QUESTIONS:
        found = [likelihood(base, question["question"], choice) for choice in question["choices"]]
        right.append(found.index(max(found)) == question["answer"])
    assert 0 < sum(right) < len(right)
    (found,) = run(base, spec_of(folder, "local_one"), tmp_path / "c.jsonl").values()
    assert found["value"] == pytest.approx(sum(right) / len(right))
    assert found["metric"] == "acc"
    assert found["stderr"] > 0
    assert capsys.readouterr().err == ""


def test_tasks_are_run_once(base, folder, tmp_path):
    path = tmp_path / "c.jsonl"
    one = run(base, spec_of(folder, "local_one"), path)
    calls = []

    def load():
        calls.append(1)
        return base

    both = run(base, spec_of(folder, "local_one", "local_two"), path, load)
    assert both["local_one"] == one["local_one"]
    assert both["local_two"]["value"] == one["local_one"]["value"]
    assert run(base, spec_of(folder, "local_one", "local_two"), path, None) == both
    assert calls == [1]


def test_groups_of_tasks_have_a_metric_too(base, folder, tmp_path):
    """As MMLU is one."""
    found = run(base, spec_of(folder, "local_one", "local_group"), tmp_path / "c.jsonl")
    assert found["local_group"]["value"] == found["local_one"]["value"]


def test_unknown_metrics_and_places_are_told(base, folder, tmp_path):
    with pytest.raises(ConfigError, match=r"wants 'exact_match' of 'local_one', which has \['acc,none'\]"):
        run(base, spec_of(folder, "local_one", metric="exact_match"), tmp_path / "c.jsonl")
    with pytest.raises(ConfigError, match="is no folder"):
        make_tasks(spec_of(tmp_path / "nowhere", "local_one"))
