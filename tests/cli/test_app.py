import json

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM

from peft_sae import FeatureStatistics, Subspace
from tests.tiny import write_world

COMMANDS = ["demo", "select", "train", "inspect", "edit", "merge", "export-lora", "run"]


@pytest.fixture
def run(command):
    return command


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A folder with a base model, two SAEs and two sets of text, as a user has them."""
    write_world(tmp_path)
    job = {
        "model": "base",
        "data": "aligned.jsonl",
        "subspace": "subspace",
        "output": "adapter",
        "adapter": {"r": "auto", "target_modules": "all-linear"},
        "training": {"max_steps": 3, "learning_rate": 0.01, "per_device_train_batch_size": 2},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    monkeypatch.chdir(tmp_path)
    return tmp_path


SELECT = (
    *("select", "--model", "base", "--saes", "saes", "--aligned", "aligned.jsonl", "--unaligned", "unaligned.jsonl"),
    *("--top-k", 4, "--output", "subspace", "--quiet"),
)


@pytest.mark.filterwarnings("ignore:.*pin_memory.*")
def test_the_stages_by_hand(run, world):
    code, out, err = run(*SELECT, "--statistics", "statistics")
    assert code == 0, err
    assert "blocks.2.hook_resid_post: 4 features" in out
    subspace = Subspace.from_pretrained("subspace")
    assert [len(site.features) for site in subspace.sites] == [4, 4]
    assert set(FeatureStatistics.from_pretrained("statistics").moments) == {"aligned", "unaligned"}

    code, out, err = run("train", "job.yaml", "--quiet")
    assert code == 0, err
    assert "Adapter written to adapter" in out

    assert run("merge", "base", "adapter", "merged")[0] == 0
    assert run("export-lora", "adapter", "lora")[0] == 0
    ids = torch.randint(4, 16, (2, 9), generator=torch.Generator().manual_seed(0))
    base = AutoModelForCausalLM.from_pretrained("base")
    before = base(ids).logits
    merged = AutoModelForCausalLM.from_pretrained("merged")(ids).logits
    lora = PeftModel.from_pretrained(base, "lora")(ids).logits
    assert not torch.allclose(before, merged, atol=1e-3)
    torch.testing.assert_close(lora, merged, rtol=1e-4, atol=1e-4)


def test_select_shows_texts_labels_and_edits(run, world):
    (world / "labels.json").write_text(json.dumps({f"0:{feature}": f"label {feature}" for feature in range(64)}))
    shown = ("--texts", 2, "--labels", "labels.json", "--table", "table.html")
    code, out, err = run(*SELECT, "--statistics", "statistics", *shown)
    assert code == 0, err
    assert "Table written to table.html" in out
    page = (world / "table.html").read_text()
    first, second = Subspace.from_pretrained("subspace").sites[0].features.tolist()[:2]
    assert f"label {first}" in page
    assert "<mark>" in page

    again = ("select", "--model", "base", "--saes", "saes", "--from-statistics", "statistics", "--top-k", 2, "--quiet")
    code, out, err = run(*again, "--output", "other", "--drop", f"0:{first}", "--keep", "2:60", "--table", "table.md")
    assert code == 0, err
    edited = Subspace.from_pretrained("other")
    assert edited.sites[0].features.tolist()[0] == second
    assert edited.sites[1].features.tolist()[0] == 60
    assert f"| {second} |" in (world / "table.md").read_text()
    code, _, err = run(*again, "--output", "third", "--table", "table.pdf")
    assert code == 1
    assert "table.pdf" in err
    assert not (world / "third").exists()


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_an_example(run, name):
    code, out, _ = run(name, "--help")

    assert code == 0
    assert f"Example: peft-sae {name}" in " ".join(out.replace("│", " ").split()).replace("`", "")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("merge",), 2, "Missing argument 'base'"),
        (("select",), 1, "ConfigError: The command lacks the keys ['model', 'saes', 'output']"),
        (("frobnicate",), 2, "No such command"),
        (
            (*SELECT, "--selector", "best"),
            1,
            r"SelectionError: Selector 'best' is unknown. Use one of ['attribution', 'auroc'",
        ),
        (
            (*SELECT, "--tokens", "some"),
            1,
            "ConfigError: Key 'tokens' in the command is 'some', and 'all' or 'prompt' or",
        ),
        ((*SELECT, "--top-k", "0"), 1, "ConfigError: top_k=0 selects nothing"),
        ((*SELECT, "--preferences", "aligned.jsonl"), 1, "ConfigError: It takes two sets of text"),
        ((*SELECT, "--drop", "1:3"), 1, "SelectionError: '1:3' names an SAE at '1', and there are SAEs at"),
        ((*SELECT, "--control", "sae"), 1, "ConfigError: Key 'control' in the command is 'sae', and 'random' or"),
        ((*SELECT, "--variance", "0"), 1, "ConfigError: variance=0.0 is no share"),
        ((*SELECT, "--layer", "7"), 1, "ConfigError: No SAE belongs to the layers [7]"),
        ((*SELECT, "--model", "nowhere"), 1, "ArtifactError: The base model 'nowhere' cannot be loaded"),
        ((*SELECT, "--aligned", "nowhere.jsonl"), 1, "DataError: The aligned data 'nowhere.jsonl' cannot be opened"),
        (("train", "nowhere.yaml"), 1, "ConfigError: 'nowhere.yaml' cannot be opened"),
        (("train", "job.yaml"), 1, "ArtifactError: Subspace 'subspace' is no folder here"),
        (("merge", "base", "nowhere", "out"), 1, "ArtifactError: There is no folder 'nowhere', and as a name on the"),
        (("export-lora", "base", "out"), 1, "ArtifactError: 'base' has no adapter_config.json"),
    ],
)
def test_exit_codes_and_messages(run, world, arguments, code, message):
    before = sorted(path.name for path in world.iterdir())

    found, _, err = run(*arguments)

    assert found == code
    assert message in err.replace("│ ", "")
    assert sorted(path.name for path in world.iterdir()) == before
