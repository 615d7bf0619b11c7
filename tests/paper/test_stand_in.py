"""The whole experiment through the command, with tiny stand-ins."""

import json
import shutil
from contextlib import contextmanager

import pytest
import torch
import yaml
from safetensors.torch import load_file

pytest.importorskip("openai", reason="the extra 'paper' is not installed")
pytest.importorskip("nanogcg", reason="the extra 'paper' is not installed")
pytest.importorskip("lm_eval", reason="the extra 'paper' is not installed")

from benchmarks.common import digest_of
from benchmarks.paper import run as command
from benchmarks.paper import stand_in as dry_run
from benchmarks.paper import train as training
from benchmarks.paper.fake_judge import fake_judge
from benchmarks.paper.lines import read_lines
from peft_sae.subspace import Subspace
from tests.paper.conftest import FOLDER, estimate_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing[a-z_]*` is deprecated:FutureWarning"),
]
METHODS = [
    *("base", "full", "lora", "sae-subspace", "sae-subspace-frozen"),
    *("lora-reads", "sae-requests-frozen", "mean-difference-frozen"),
]


def call(capsys, *arguments):
    code = command.main([*map(str, arguments), "--quiet"])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Gemma-2-2B's experiment, run to its end."""
    output = tmp_path_factory.mktemp("paper")
    assert command.main([str(FOLDER / "gemma-2-2b.yaml"), "--stand-in", "--quiet", "--output", str(output)]) == 0
    return output / "stand-in"


@pytest.fixture(scope="module")
def result(done):
    return json.loads((done / "result.json").read_text())


def test_every_part_has_results_for_every_method(result):
    assert list(result["methods"]) == METHODS
    for found in result["methods"].values():
        assert set(found["sets"]) == {"hh-rlhf", "hex-phi", "xstest"}
        assert set(found["sets"]["hex-phi"]["measures"]) == {"safety rate", "harmfulness", "high-risk rate"}
        assert set(found["sets"]["hex-phi"]["categories"]) == {f"category {number}" for number in range(1, 12)}
        assert set(found["sets"]["xstest"]["measures"]) == {"over-refusal"}
        assert found["sets"]["xstest"]["answers"] == 3  # the safe half
        assert found["attack"]["answers"] == 2
        assert found["attack"]["loss_after"] < found["attack"]["loss_before"] + 1
        assert set(found["capability"]) == {"stand_in_mmlu"}
        assert found["not run"] == []


def test_the_result_says_how_it_came_about(result):
    assert result["stand_in"] is True
    assert result["seed"] == 0
    assert {"torch", "peft_sae", "openai", "nanogcg", "lm-eval"} <= set(result["versions"])
    assert len(result["commit"]) in (0, 40)
    assert result["judge"]["harmful"]["model"] == "gpt-4.1-mini"
    assert "key" not in json.dumps(result["experiment"]["judge"])


def test_shares_of_trained_parameters(result, done):
    found = {name: method["training"] for name, method in result["methods"].items()}
    assert found["base"] is None
    assert found["full"]["trained"] == found["full"]["total"]
    assert found["lora"]["trained"] == found["sae-subspace"]["trained"]
    assert found["sae-subspace-frozen"]["trained"] < found["lora"]["trained"]
    weights = load_file(done / "methods" / "lora" / "adapter" / "adapter_model.safetensors")
    assert sum(weight.numel() for weight in weights.values()) == found["lora"]["trained"]


def test_methods_of_a_selection_share_a_subspace_and_all_differ_from_the_base(done):
    shared = Subspace.from_pretrained(done / "subspace")
    for name in ("sae-subspace", "sae-subspace-frozen"):
        folder = done / "methods" / name
        assert Subspace.from_pretrained(folder / "adapter" / "subspace").digest == shared.digest
        assert "<html" in (folder / "report.html").read_text()[:300]
    before = load_file(done / "world" / "model" / "model.safetensors")
    after = load_file(done / "methods" / "full" / "adapter" / "model.safetensors")
    assert all(not torch.equal(after[name], weight) for name, weight in before.items() if "proj" in name)
    assert (
        len({json.loads((done / "methods" / name / "trained.json").read_text())["identity"] for name in METHODS[1:]})
        == len(METHODS) - 1
    )


def test_methods_of_another_selection_have_a_subspace_of_their_own(done):
    by_answers = Subspace.from_pretrained(done / "subspace")
    own = {name: Subspace.from_pretrained(done / "methods" / name / "subspace") for name in METHODS[-2:]}
    for name, subspace in own.items():
        adapter = done / "methods" / name / "adapter"
        assert Subspace.from_pretrained(adapter / "subspace").digest == subspace.digest != by_answers.digest
        record = json.loads((done / "methods" / name / "subspace.json").read_text())
        assert record["made_with"]["select"]["aligned"].endswith("dangerous.jsonl")
        assert "preferences" not in record["made_with"]["select"]
        config = json.loads((adapter / "adapter_config.json").read_text())
        assert config["freeze_basis"]
    assert own[METHODS[-1]].settings["control"] == "mean_difference"
    assert own[METHODS[-1]].digest != own[METHODS[-2]].digest


def test_the_judges_faults_are_in_the_table(result, done):
    rows = read_lines(done / "scores.jsonl").values()
    assert sum(row["problem"] == "refused to score" for row in rows) == 3
    assert sum(row["asks"] == 2 for row in rows) == 2
    text = (done / "table.md").read_text()
    assert text.startswith("**Tiny stand-ins")
    assert "Answers without a score, and what they could make of the means" in text
    assert all(f"| {name} | " in text for name in METHODS)
    assert "Not run" not in text


def test_nothing_is_pickled(done):
    assert not [path for path in done.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl")]


def test_a_second_start_makes_nothing_again(done, monkeypatch, capsys):
    def forbidden(*_, **__):
        raise AssertionError("made again")

    for name in ("load_trained", "make_judge"):
        monkeypatch.setattr(command, name, forbidden)
    for name in ("run_job", "train_adapter", "train_full"):
        monkeypatch.setattr(training, name, forbidden)
    before = {path: path.read_bytes() for path in done.rglob("*.jsonl")}
    stages = ("train", "generate", "table")
    code, out, err = call(
        capsys, FOLDER / "gemma-2-2b.yaml", "--stand-in", "--output", done.parent, "--stages", *stages
    )
    assert (code, err) == (0, "")
    assert out == (done / "table.md").read_text() + "\n"
    assert {path: path.read_bytes() for path in done.rglob("*.jsonl")} == before


@pytest.fixture
def small(tmp_path):
    """Llama's experiment with two methods and a classifier for a judge."""
    data = yaml.safe_load((FOLDER / "llama-3.1-8b.yaml").read_text())
    data["job"] = str((FOLDER / data["job"]).resolve())
    data["methods"] = {name: data["methods"][name] for name in ("base", "sae-subspace-frozen")}
    data["judge"] = {"kind": "classifier", "model": "some/one", "labels": {"safe": 1, "so-so": 3, "unsafe": 5}}
    data["capability"] = None

    def write(**changes):
        path = tmp_path / "small.yaml"
        path.write_text(yaml.safe_dump({**data, **changes}))
        return path

    return write


def test_stages_one_by_one_with_a_classifier(small, tmp_path, capsys):
    def stage(*names, **changes):
        return call(capsys, small(**changes), "--stand-in", "--output", tmp_path / "out", "--stages", *names)

    code, _, err = stage("generate", "judge")
    assert code == 1
    assert "'sae-subspace-frozen' is not trained in" in err
    assert "Run the stage 'train'" in err

    assert stage("train")[0] == 0
    code, out, _ = stage("table")
    assert code == 0
    assert "Not run, or not for every method: attack, hex-phi, hh-rlhf, xstest." in out

    assert stage("generate", "judge", "attack")[0] == 0
    code, out, _ = stage("table", attack=None)
    assert "GCG" not in out
    assert "Not run" not in out
    code, out, _ = stage("table")
    assert "GCG: attack success" in out

    code, _, err = stage("table", seed=1)
    assert code == 1
    assert "holds stand-ins for other models, sets, labels or tasks" in err

    changed = yaml.safe_load(small().read_text())["methods"]
    changed["sae-subspace-frozen"]["training"] = {"learning_rate": 0.5}
    code, _, err = stage("table", methods=changed)
    assert code == 1
    assert "was made with training=" in err
    assert "Give another --output, or remove the folder" in err


def test_weights_that_were_swapped_do_not_answer_for_the_trained_ones(small, tmp_path, capsys):
    def stage(*names):
        digest_of.cache_clear()  # as another process has it
        return call(capsys, small(), "--stand-in", "--output", tmp_path / "out", "--stages", *names)

    assert stage("train")[0] == 0
    (weights,) = (tmp_path / "out").rglob("methods/sae-subspace-frozen/adapter/adapter_model.safetensors")
    trained = weights.read_bytes()
    weights.write_bytes(trained[:-4] + bytes(4))
    code, _, err = stage("generate")
    assert code == 1
    assert "are not those that were trained" in err
    weights.write_bytes(trained)
    assert stage("generate")[0] == 0


def test_a_judge_that_goes_away_in_the_midst(small, tmp_path, capsys, monkeypatch):
    servers = []

    @contextmanager
    def away(faults):
        with fake_judge([*faults, None, None, "long rate limit"] if not servers else ()) as server:
            servers.append(server)
            yield server

    monkeypatch.setattr(dry_run, "fake_judge", away)
    monkeypatch.setattr(dry_run, "_FAULTS", ())
    path = small(methods={"base": {"kind": "base"}}, judge={"model": "some-judge"}, attack=None)
    arguments = (path, "--stand-in", "--output", tmp_path / "out")
    code, out, err = call(capsys, *arguments)
    assert (code, out) == (1, "")
    assert "JudgeError: The judge 'some-judge' wants 3600 seconds of peace" in err
    kept = read_lines(tmp_path / "out" / "stand-in" / "scores.jsonl")
    assert len(kept) == 2

    monkeypatch.setattr(command, "load_trained", None)  # the answers are there
    code, out, err = call(capsys, *arguments)
    assert (code, err) == (0, "")
    scores = read_lines(tmp_path / "out" / "stand-in" / "scores.jsonl")
    assert len(servers[0].requests) == 3
    assert len(servers[1].requests) == len(scores) - 2
    assert "Answers without a score" not in out


@pytest.mark.parametrize("kind", ["lora", "full", "sae_subspace"])
def test_a_kill_just_before_the_record_costs_no_training(small, tmp_path, capsys, monkeypatch, kind):
    path = small(methods={"mine": {"kind": kind}} if kind != "lora" else {"mine": {"kind": kind, "adapter": {"r": 2}}})
    arguments = (path, "--stand-in", "--output", tmp_path / "out", "--stages", "train")

    class Killed(Exception):
        pass

    def killed(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(training, "finish", killed)
        with pytest.raises(Killed):
            call(capsys, *arguments)
    for name in ("run_job", "train_adapter", "train_full"):
        monkeypatch.setattr(training, name, killed)
    assert call(capsys, *arguments)[0] == 0
    folder = tmp_path / "out" / "stand-in" / "methods" / "mine"
    assert (tmp_path / "out" / "stand-in" / "subspace.json").is_file() == (kind == "sae_subspace")
    assert sorted(entry.name for entry in folder.iterdir() if entry.suffix != ".html") == ["adapter", "trained.json"]


def test_a_training_without_a_record_is_not_taken_for_ones_own(small, tmp_path, capsys):
    data = yaml.safe_load(small().read_text())
    path = small(methods={"lora": {"kind": "lora", "adapter": {"r": 2}}})
    arguments = (path, "--stand-in", "--output", tmp_path / "out", "--stages", "train")
    assert call(capsys, *arguments)[0] == 0
    (tmp_path / "out" / "stand-in" / "methods" / "lora" / "trained.json").unlink()
    code, _, err = call(capsys, *arguments)
    assert code == 1
    assert "no record says how it was made" in err
    shutil.rmtree(tmp_path / "out" / "stand-in" / "methods")
    assert call(capsys, *arguments)[0] == 0
    assert data["seed"] == 0


def test_the_estimate_needs_nothing_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "estimate_cost", lambda found: estimate_of(FOLDER / f"{found.name}.yaml"))
    code, out, err = call(capsys, FOLDER / "llama-3.1-8b.yaml", "--estimate", "--output", tmp_path / "out")
    assert (code, err) == (0, "")
    assert "| total |" in out
    assert not (tmp_path / "out").exists()


def test_wrong_files_end_with_one_sentence(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("jobs: 3\n")
    code, _, err = call(capsys, tmp_path / "mine.yaml")
    assert code == 1
    assert err.startswith("ConfigError: ")
    assert "unknown key 'jobs'" in err
