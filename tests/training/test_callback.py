import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from peft_sae import SaeSubspaceConfig, SubspaceCallback, inspect_adapter
from peft_sae.errors import ConfigError
from tests.inspect.dense import train
from tests.tiny import make_model, make_tokenizer
from tests.training.kinds import arguments

IDS = [[1, 4, 5, 6, 7], [1, 8, 9, 4, 5]]
ROWS = [{"input_ids": ids, "labels": ids} for ids in IDS]
SETTINGS = {"max_steps": 7, "logging_steps": 2}


class Reporter(TrainerCallback):
    """What a reporter (TensorBoard, wandb) is handed."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append((state.global_step, dict(logs)))


def _entries(seen):
    return {step: logs for step, logs in seen if "subspace/norm" in logs}


def test_reporters_and_history_get_the_entries(tmp_path):
    model = train(tmp_path, noise=0.0).model
    reporter = Reporter()
    trainer = Trainer(
        model, arguments(TrainingArguments, tmp_path / "run", **SETTINGS), train_dataset=ROWS, callbacks=[reporter]
    )
    trainer.add_callback(SubspaceCallback(trainer, every=3, top=2))
    trainer.train()
    entries = _entries(reporter.seen)
    assert list(entries) == [1, 3, 6, 7]
    shown = set()
    for number, logs in enumerate(entries.values(), start=1):
        assert logs["subspace/drift"] == pytest.approx(1 - logs["subspace/in_basis"])
        features = {name for name in logs if name.startswith(("subspace/read/", "subspace/write/"))}
        assert 2 <= len(features) <= 2 * number
        assert shown <= features  # so that they make curves
        shown = features
    history = {entry["step"]: entry for entry in trainer.state.log_history if "subspace/norm" in entry}
    assert history.keys() == entries.keys()
    full = inspect_adapter(model)
    assert entries[7]["subspace/norm"] == pytest.approx(full.summary["norm"], rel=1e-4)
    assert entries[7]["subspace/drift"] == pytest.approx(full.summary["drift"], rel=1e-3)


def test_the_trainers_own_entries_are_as_without_it(tmp_path):
    histories = []
    for watched in (False, True):
        torch.manual_seed(0)
        (tmp_path / str(watched)).mkdir()
        model = train(tmp_path / str(watched), noise=0.0).model
        trainer = Trainer(model, arguments(TrainingArguments, tmp_path / "run", **SETTINGS), train_dataset=ROWS)
        if watched:
            trainer.add_callback(SubspaceCallback(trainer, every=2))
        trainer.train()
        losses = [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
        factors = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        histories.append((losses, factors))
    (losses, factors), (watched_losses, watched_factors) = histories
    assert [step for step, _ in losses] == [2, 4, 6]
    assert losses == watched_losses
    assert all(torch.equal(factors[name], watched_factors[name]) for name in factors)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing[a-z_]*` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_trl_keeps_its_own_numbers(tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    trained = train(tmp_path, noise=0.0)
    config = SaeSubspaceConfig(subspace=trained.adapter, r="auto", target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = trl.SFTTrainer(
        make_model(),
        arguments(trl.SFTConfig, tmp_path / "run", **SETTINGS, max_length=16),
        train_dataset=datasets.Dataset.from_list([{"text": "red green blue"}, {"text": "sun moon sea"}]),
        processing_class=make_tokenizer(),
        peft_config=config,
    )
    trainer.add_callback(SubspaceCallback(trainer, every=1))
    trainer.train()
    steps = [entry["step"] for entry in trainer.state.log_history if "subspace/norm" in entry]
    assert steps == [1, 2, 3, 4, 5, 6, 7]
    own = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in own] == [2, 4, 6]
    assert all("mean_token_accuracy" in entry for entry in own)


def test_a_model_without_an_adapter_is_refused(tmp_path):
    trainer = Trainer(make_model(), arguments(TrainingArguments, tmp_path, **SETTINGS), train_dataset=ROWS)
    trainer.add_callback(SubspaceCallback(trainer))
    with pytest.raises(ConfigError, match="LlamaForCausalLM, and SubspaceCallback watches a PeftModel"):
        trainer.train()


@pytest.mark.parametrize("options", [{"every": 0}, {"top": -1}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigError, match="must be"):
        SubspaceCallback(None, **options)
