import pytest

from peft_sae.edit import read_edits
from tests.edit.conftest import HOOKS
from tests.tiny import make_sae


@pytest.fixture
def run(command):
    def call(*arguments):
        code, out, err = command("edit", *arguments)
        return code, " ".join(out.split()), " ".join(err.replace("│", " ").split())

    return call


def test_edit(run, trained, tmp_path):
    adapter = trained()
    code, out, err = run(adapter, "--remove", "1:0", "--remove", "1:2", "--scale", "1:1=-0.5", "-o", tmp_path / "out")

    assert code == 0, err
    assert "blocks.1.hook_resid_post:0: removed" in out
    assert "blocks.1.hook_resid_post:1: multiplied by -0.5" in out
    assert "3 read" in out
    assert "Edited adapter written to" in out
    factors = {entry["name"][-1]: entry["factor"] for entry in read_edits(tmp_path / "out")[0]["features"]}
    assert factors == {"0": 0.0, "1": -0.5, "2": 0.0}


def test_edit_with_saes_and_another_base(run, trained, tmp_path):
    adapter = trained(kind="LORA")
    (tmp_path / "base").rename(tmp_path / "moved")
    for hook in HOOKS:
        make_sae(hook).save_model(tmp_path / "saes" / hook)
    options = ("--base", tmp_path / "moved", "--saes", tmp_path / "saes", "--ids", HOOKS[0], "-o", tmp_path / "out")

    code, out, err = run(adapter, "--keep", "0:3", "--keep", "0:4", *options)

    assert code == 0, err
    assert f"{HOOKS[0]}:4: kept" in out
    assert read_edits(tmp_path / "out")[0]["kind"] == "keep"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "Missing option"),
        (("-o", "out"), 1, "ConfigError: There is nothing to do"),
        (("-o", "out", "--scale", "1:0"), 1, "ConfigError: --scale '1:0' is no feature with a number"),
        (("-o", "out", "--scale", "1:0=x"), 1, "Write for example --scale 20:77=0.5"),
        (("-o", "out", "--scale", "1:0=nan"), 1, "no finite number"),
        (("-o", "out", "--scale", "1:0=2", "--scale", "1:0=3"), 1, "is to be left at 2 and at 3 times"),
        (("-o", "out", "--remove", "1:9"), 1, "on the command line --saes"),
        (("-o", "out", "--remove", "1:0", "--id", "x"), 1, "--saes does not say of which release"),
        (("-o", "out", "--remove", "1:0", "--base", "nowhere"), 1, "ArtifactError: The base model 'nowhere'"),
    ],
    ids=str,
)
def test_messages(run, trained, tmp_path, monkeypatch, arguments, code, message):
    adapter = trained()
    monkeypatch.chdir(tmp_path)

    found, _, err = run(adapter, *arguments)

    assert found == code
    assert message in err
    assert not (tmp_path / "out").exists()
