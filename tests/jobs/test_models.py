"""Models are loaded from safetensors alone, and nothing that a file names is run."""

import json

import pytest
import torch

from peft_sae.errors import ArtifactError, ConfigError
from peft_sae.jobs.models import load_model
from tests.tiny import make_model, make_tokenizer


@pytest.fixture
def base(tmp_path):
    make_model().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def change(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_model_and_its_tokenizer_are_as_they_were_saved(base, dtype):
    model, tokenizer = load_model(base, dtype=dtype)

    assert model.dtype is (torch.bfloat16 if dtype else torch.float32)
    for name, weight in make_model().state_dict().items():
        assert torch.equal(model.state_dict()[name], weight.to(model.dtype)), name
    assert tokenizer("red sun")["input_ids"] == make_tokenizer()("red sun")["input_ids"]


def test_pickled_weights_are_not_read(base):
    (base / "model.safetensors").unlink()
    torch.save(make_model().state_dict(), base / "pytorch_model.bin")

    with pytest.raises(ConfigError, match=r"cannot be loaded .*safetensors"):
        load_model(base)


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("config.json", {"auto_map": {"AutoConfig": "code.Config"}, "model_type": "own"}, "brings code of its own"),
        ("config.json", {"_attn_implementation": "someone/kernel"}, "which is code from elsewhere"),
        ("config.json", {"model_type": "no such"}, "cannot be loaded"),
    ],
)
def test_nothing_that_a_file_names_is_run(base, file, values, message):
    (base / "code.py").write_text(f"open({str(base / 'ran')!r}, 'w')\n")
    change(base / file, **values)

    with pytest.raises(ArtifactError, match=message):
        load_model(base)
    assert not (base / "ran").exists()
