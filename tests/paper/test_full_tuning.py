import pytest
import torch
from safetensors.torch import load_file

from benchmarks.paper.full_tuning import last_complete, train_full
from peft_sae.errors import ArtifactError, ConfigError
from tests.tiny import ALIGNED, make_model, make_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing[a-z_]*` is deprecated:FutureWarning")
SETTINGS = {"max_steps": 4, "learning_rate": 0.01, "per_device_train_batch_size": 2, "use_cpu": True, "seed": 3}


def run(output, **changes):
    train_full(make_model(), make_tokenizer(), ALIGNED, output, progress=False, **{**SETTINGS, **changes})
    return load_file(output / "model.safetensors")


class Stopped(Exception):
    """Stands for a kill."""


def test_all_weights_are_trained_and_the_seed_decides(tmp_path):
    before = make_model().state_dict()
    one, same, other = (run(tmp_path / name, seed=seed) for name, seed in (("a", 3), ("b", 3), ("c", 4)))
    assert all(not torch.equal(one[name], before[name]) for name in one if "weight" in name)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert one.keys() == other.keys()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]
    assert (tmp_path / "a" / "tokenizer.json").is_file()
    assert not list(tmp_path.rglob("*.bin"))


def test_a_stopped_training_goes_on(tmp_path, monkeypatch):
    from transformers import TrainerCallback
    from trl import SFTTrainer

    wanted = run(tmp_path / "whole", save_steps=2)

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise Stopped

    real = SFTTrainer.__init__
    with monkeypatch.context() as patch:
        patch.setattr(SFTTrainer, "__init__", lambda self, *a, **k: real(self, *a, callbacks=[Stop()], **k))
        with pytest.raises(Stopped):
            run(tmp_path / "stopped", save_steps=2)
    assert not (tmp_path / "stopped").exists()
    assert last_complete(tmp_path / "stopped.checkpoints").name == "checkpoint-2"
    with pytest.raises(ConfigError, match=r"are of a job with arguments\.learning_rate=0\.01, and this one has 0\.5"):
        run(tmp_path / "stopped", save_steps=2, learning_rate=0.5)
    found = run(tmp_path / "stopped", save_steps=2)
    assert all(torch.equal(found[name], weight) for name, weight in wanted.items())


def test_torn_checkpoints_do_not_count(tmp_path):
    for number, state in ((2, "{}"), (10, "{}"), (12, None), (14, "{")):
        (tmp_path / f"checkpoint-{number}").mkdir()
        if state is not None:
            (tmp_path / f"checkpoint-{number}" / "trainer_state.json").write_text(state)
    assert last_complete(tmp_path).name == "checkpoint-10"
    assert last_complete(tmp_path / "nowhere") is None


def test_what_is_there_is_not_replaced(tmp_path):
    run(tmp_path / "a")
    with pytest.raises(ArtifactError, match="exists and holds"):
        run(tmp_path / "a")
