import json
from functools import partial

import pytest

from peft_sae import inspect_adapter
from tests.inspect.dense import train

TEXTS = ["red green blue sun moon", "sea hill tree", "bird fish stone sky red"]


@pytest.fixture
def run(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    return partial(command, "inspect")


def test_the_terminal_shows_drift_and_features(run, tmp_path):
    trained = train(tmp_path)
    code, out, _ = run(trained.adapter)
    assert code == 0
    assert "of the update lies in the basis of features" in out
    assert "Drift by block" in out
    name = inspect_adapter(trained.adapter).features["name"][0]  # the block's only hook point needs no name
    assert f"{name.split('.')[1]}:{name.split(':')[1]} " in out
    assert "hook_resid" not in out
    assert "mean activation changed" not in out


def test_files_and_texts(run, tmp_path):
    trained = train(tmp_path)
    for handle in trained.saes:
        handle.sae.save_model(tmp_path / "saes" / handle.identity.hook_name)
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (tmp_path / "labels.json").write_text(json.dumps({"blocks.0.hook_resid_post:1": "first [red]words[/red]"}))
    options = ["--data", tmp_path / "texts.jsonl", "--saes", tmp_path / "saes", "--json", tmp_path / "found.json"]
    options += ["--labels", tmp_path / "labels.json", "--others", "64", "--rows", "200", "--quiet"]
    code, out, err = run(trained.adapter, *options)
    assert code == 0, err
    assert "mean activation changed most" in out
    assert "first [red]words[/red]" in out
    assert "Loss on 13 tokens" in out
    data = json.loads((tmp_path / "found.json").read_text())
    assert len(data["activations"]) > 20
    assert data["provenance"]["data"]["examples"] == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--html", "report.json"], "does not end in .html"),
        (["--json", "base/config.json/found.json"], "base/config.json"),
        (["--data", "none.jsonl"], "none.jsonl"),
        (["--base", "nowhere"], "nowhere"),
        (["--labels", "none.json"], "none.json"),
    ],
)
def test_wrong_options_are_told(run, tmp_path, options, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(train(tmp_path).adapter, *options)
    assert code == 1
    assert message in err


def test_what_is_no_adapter_is_told(run, tmp_path):
    code, _, err = run(tmp_path)
    assert code == 1
    assert "no adapter_config.json" in err
