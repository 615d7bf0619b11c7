"""A collection that was killed goes on from its state, and nothing is run twice."""

import json
import os
import signal
import traceback

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from peft_sae import load_saes
from peft_sae.errors import ArtifactError, ConfigError, DataError
from peft_sae.statistics import Measures, state
from peft_sae.statistics.accumulate import ClassSums, NotFinite
from peft_sae.statistics.gradient import log_likelihood, logit_difference
from tests.tiny import make_model, make_sae

from .dense import HOOKS, assert_same_sums, collect, make_texts

DATA = {"aligned": make_texts(11, 0), "unaligned": make_texts(7, 1)}  # 6 and 4 batches of two
ALL = Measures(histograms=True, covariance=True, top_examples=3, sample=5)


@pytest.fixture(scope="module")
def saes():
    return load_saes([make_sae(hook, seed=seed) for seed, hook in enumerate(HOOKS)])


@pytest.fixture
def passes():
    """The model's forward passes so far."""
    return []


@pytest.fixture
def model(passes):
    model = make_model()
    model.model.embed_tokens.register_forward_hook(lambda *_: passes.append(1))
    return model


@pytest.fixture
def run(model, tokenizer, saes, tmp_path):
    def run(data=DATA, **options):
        options = {"state": tmp_path / "states" / "state", "save_every": 0, "saes": saes, **options}
        return collect(model, tokenizer, data, **{"measures": ALL, "batch_size": 2, **options})

    return run


@pytest.fixture
def file(tmp_path):
    return tmp_path / "states" / "state"


@pytest.fixture
def reference(run, passes):
    statistics = run(state=None)
    assert len(passes) == 10
    passes.clear()
    return statistics


def _in_a_process(action):
    """Run something in a process of its own, and return the signal that ended it; 0 if none did."""
    child = os.fork()
    if child == 0:
        try:
            action()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def _kill_at(holder, name, call):
    """Kill this process when a function is called for the n-th time."""
    original, calls = getattr(holder, name), []

    def counted(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(holder, name, counted)


forks = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
]


def with_forks(test):
    for mark in forks:
        test = mark(test)
    return test


# Every batch is added to two SAEs; a state is written behind each batch, and once more behind each class.
@with_forks
@pytest.mark.parametrize(
    ("holder", "name", "call", "done"),
    [
        (ClassSums, "add", 1, 0),
        (ClassSums, "add", 2, 0),
        (ClassSums, "add", 3, 1),
        (ClassSums, "add", 8, 3),
        (ClassSums, "add", 13, 6),
        (ClassSums, "add", 15, 7),
        (ClassSums, "add", 20, 9),
        (os, "replace", 1, 0),
        (os, "replace", 4, 3),
        (os, "replace", 7, 6),
        (os, "replace", 8, 6),
        (os, "replace", 12, 10),
        (state, "digest", 5, 4),
    ],
)
def test_killed_run_goes_on_where_it_was(run, reference, passes, file, holder, name, call, done):
    def killed():
        _kill_at(holder, name, call)
        run()

    assert _in_a_process(killed) == signal.SIGKILL
    assert file.exists() is (done > 0)
    assert_same_sums(run(), reference)
    assert len(passes) == 10 - done


@with_forks
def test_run_can_be_killed_again_and_again(run, reference, passes, file):
    def killed():
        _kill_at(ClassSums, "add", 6)
        run()

    states = []
    while _in_a_process(killed):
        states.append(file.read_bytes())
    assert len(states) == len(set(states)) == 4  # two batches each
    statistics = run()
    assert_same_sums(statistics, reference)
    assert not passes
    assert statistics.settings == reference.settings


@with_forks
def test_what_a_killed_run_leaves_beside_its_state_does_no_harm(run, reference, file):
    def killed():
        _kill_at(os, "replace", 3)
        run()

    _in_a_process(killed)
    assert len(list(file.parent.iterdir())) == 3  # the state, a lock that its owner has lost, and a scratch file
    assert_same_sums(run(), reference)


def test_finished_run_is_not_run_again(run, reference, passes, file, caplog):
    run()
    before = file.read_bytes()
    assert len(passes) == 10
    passes.clear()
    caplog.clear()
    assert_same_sums(run(), reference)
    assert "Going on from an earlier run: {'aligned': 6, 'unaligned': 4} batches are done" in caplog.text
    assert not passes
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == ["state"]


def test_state_is_written_at_the_end_of_each_class_at_least(run, file, monkeypatch):
    written = []
    write = state.StateFile.write
    monkeypatch.setattr(
        state.StateFile, "write", lambda self, progress: (written.append(dict(progress.batches)), write(self, progress))
    )
    run(save_every=1e9)
    assert written == [{"aligned": 6}, {"aligned": 6, "unaligned": 4}]


def _stop_at_add(monkeypatch, call, error):
    add, calls = ClassSums.add, []

    def stopping(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise error
        return add(self, *args, **kwargs)

    monkeypatch.setattr(ClassSums, "add", stopping)


@pytest.mark.parametrize(("error", "raised"), [(NotFinite(), DataError), (KeyboardInterrupt(), KeyboardInterrupt)])
def test_error_midway_leaves_the_state_of_the_batches_before(run, reference, passes, file, monkeypatch, error, raised):
    with monkeypatch.context() as patch:
        _stop_at_add(patch, 16, error)
        with pytest.raises(raised):
            run()
    assert [path.name for path in file.parent.iterdir()] == ["state"]
    passes.clear()
    assert_same_sums(run(), reference)
    assert len(passes) == 3


def test_broken_record_can_be_mended(run, reference, passes):
    with pytest.raises(DataError, match="In the unaligned data: Example 3"):
        run({**DATA, "unaligned": [*DATA["unaligned"][:3], 7, *DATA["unaligned"][4:]]})
    passes.clear()
    assert_same_sums(run(), reference)
    assert len(passes) == 4


def test_class_without_tokens_can_be_mended(run, passes):
    records = {"aligned": [("red", " sea"), ("sun", " hill sky")], "unaligned": [("red", " moon"), ("sea", " sun")]}
    data = {label: [{"prompt": start, "completion": end} for start, end in pairs] for label, pairs in records.items()}
    empty = [{**record, "completion": ""} for record in data["aligned"]]
    with pytest.raises(DataError, match="None of the 2 aligned texts"):
        run({**data, "aligned": empty}, tokens="response")
    passes.clear()
    assert_same_sums(run(data, tokens="response"), run(data, tokens="response", state=None))
    assert len(passes) == 1 + 2


def _interrupt(run, monkeypatch, call=16, data=DATA):
    """Let a run end in the second class."""
    with monkeypatch.context() as patch:
        _stop_at_add(patch, call, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            run(data)


@pytest.mark.parametrize(
    ("change", "different"),
    [
        ({"batch_size": 3}, "batch_size"),
        ({"pooling": "mean"}, "pooling"),
        ({"max_length": 20}, "max_length"),
        ({"measures": Measures(sample=5)}, "measures"),
        ({"saes": load_saes([make_sae(HOOKS[0], seed=7), make_sae(HOOKS[1], seed=1)])}, "saes"),
        ({"data": dict(reversed(DATA.items()))}, "labels"),
        ({"data": {**DATA, "more": ["red"]}}, "labels"),
        ({"tokens": "prompt"}, "tokens"),
        ({"attribute": log_likelihood, "measures": Measures()}, "objective"),
    ],
    ids=lambda change: change if isinstance(change, str) else "",
)
def test_state_of_another_run_is_a_config_error_and_stays(run, passes, file, monkeypatch, change, different):
    _interrupt(run, monkeypatch)
    before = file.read_bytes()
    passes.clear()
    with pytest.raises(ConfigError, match=rf"'.*state' is the state of another run, .*{different}"):
        run(**change)
    assert file.read_bytes() == before
    assert not passes


def test_state_of_another_model_is_a_config_error(run, tokenizer, saes, file, monkeypatch):
    _interrupt(run, monkeypatch)
    with pytest.raises(ConfigError, match=r"differs in \['model', 'weights'\]"):
        collect(make_model("qwen2"), tokenizer, DATA, saes, measures=ALL, batch_size=2, state=file)


def test_state_of_another_logit_difference_is_a_config_error(run, tokenizer):
    options = {"measures": Measures()}
    run(attribute=logit_difference(tokenizer, ["red"], ["sea"]), **options)
    run(attribute=logit_difference(tokenizer, ["red"], ["sea"]), **options)
    with pytest.raises(ConfigError, match=r"differs in \['objective'\]"):
        run(attribute=logit_difference(tokenizer, ["red"], ["sun"]), **options)


@pytest.mark.parametrize(
    "change",
    [
        lambda texts: ["red", *texts[1:]],
        lambda texts: texts[1:],
        lambda texts: texts[:3],
        lambda texts: [],
        lambda texts: [texts[1], texts[0], *texts[2:]],
        lambda texts: ["moon", *texts],
    ],
)
@pytest.mark.parametrize("label", DATA)
def test_changed_data_are_a_data_error(run, file, monkeypatch, label, change):
    _interrupt(run, monkeypatch, call=19)  # three batches of the second class are done
    before = file.read_bytes()
    with pytest.raises(DataError, match=f"The {label} data are not those of the run that the state is of"):
        run({**DATA, label: change(DATA[label])})
    assert file.read_bytes() == before


def _rewrite(file, change):
    """Change the description in a state."""
    with safe_open(file, framework="pt") as opened:
        entry = json.loads(opened.metadata()["peft_sae.state"])
    change(entry)
    save_file(load_file(file), file, {"peft_sae.state": json.dumps(entry)})


def _flip(file):
    tensors = load_file(file)
    tensors["0.0.total"][5] += 1
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    save_file(tensors, file, metadata)


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(file.read_bytes()[:-9]),
        lambda file: file.write_bytes(file.read_bytes()[:100]),
        lambda file: file.write_text("my notes, which took long to write"),
        lambda file: save_file({"weight": torch.ones(3)}, file),
        lambda file: save_file({"weight": torch.ones(3)}, file, {"format": "pt"}),
        lambda file: save_file({"weight": torch.ones(3)}, file, {"peft_sae.state": "[1]"}),
        lambda file: save_file({"weight": torch.ones(3)}, file, {"peft_sae.state": "{"}),
        _flip,
        lambda file: _rewrite(file, lambda entry: entry.pop("batches")),
        lambda file: _rewrite(file, lambda entry: entry.update(batches=None)),
        lambda file: _rewrite(file, lambda entry: entry.update(batches={"aligned": "six"})),
        lambda file: _rewrite(file, lambda entry: entry.update(batches={"aligned": 6, "other": 1})),
        lambda file: _rewrite(file, lambda entry: entry.update(batches={"aligned": -1})),
        lambda file: _rewrite(file, lambda entry: entry.pop("run")),
        lambda file: _rewrite(file, lambda entry: entry.update(labels=["aligned"])),
        lambda file: _rewrite(file, lambda entry: entry["sizes"]["aligned"][0].update(count=3)),
        lambda file: (file.unlink(), file.mkdir()),
    ],
)
def test_damaged_and_foreign_files_are_artifact_errors_and_stay(run, passes, file, monkeypatch, damage):
    _interrupt(run, monkeypatch)
    damage(file)
    before = file.read_bytes() if file.is_file() else None
    passes.clear()
    with pytest.raises(ArtifactError, match=r"state"):
        run()
    assert not passes
    assert (file.read_bytes() if file.is_file() else None) == before
    assert [path.name for path in file.parent.iterdir()] == ["state"]


def test_state_that_cannot_be_written_is_an_artifact_error(run, tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(ArtifactError, match=r"Cannot write .*Check the path, the space and the rights"):
        run(state=tmp_path / "taken" / "state")


def test_state_stays_as_it_was_where_the_next_cannot_be_written(run, reference, passes, file, monkeypatch):
    replace, states = os.replace, []

    def full(source, target):
        if len(states) == 4:
            raise OSError(28, "No space left on device")
        replace(source, target)
        states.append(file.read_bytes())

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(ArtifactError, match="No space left on device"):
            run()
    assert [path.name for path in file.parent.iterdir()] == ["state"]
    assert file.read_bytes() == states[-1]
    passes.clear()
    assert_same_sums(run(), reference)
    assert len(passes) == 10 - 4


def test_attributions_go_on_too(run, passes, monkeypatch):
    options = {"attribute": log_likelihood, "measures": Measures(top_examples=2, sample=3), "state": None}
    reference = run(**options)
    passes.clear()
    del options["state"]
    with monkeypatch.context() as patch:
        _stop_at_add(patch, 9, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            run(**options)
    assert_same_sums(run(**options), reference)
    assert len(passes) == 10 + 1
