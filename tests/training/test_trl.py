"""TRL's trainers with `peft_config=SaeSubspaceConfig(...)`."""

import math

import pytest
import torch
from datasets import Dataset
from peft import PeftModel

from tests.tiny import make_model, make_tokenizer
from tests.training.kinds import (
    KINDS,
    adapt,
    arguments,
    assert_trained,
    factors,
    is_frozen,
    logits,
    losses,
    make_config,
    randomise,
)

trl = pytest.importorskip("trl")

pytestmark = [
    pytest.mark.parametrize("kind", KINDS),
    # TRL calls it by its old name.
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing[a-z_]*` is deprecated:FutureWarning"),
]

PAIRS = [
    {"prompt": "red green blue", "chosen": " sun moon sky", "rejected": " fish bird"},
    {"prompt": "sea", "chosen": " sun sun moon", "rejected": " stone fish fish"},
] * 2
SETTINGS = {"max_steps": 3, "bf16": False}


def assert_reloads(trainer, folder):
    trainer.save_model(str(folder))
    loaded = PeftModel.from_pretrained(make_model(), folder)
    assert torch.equal(logits(loaded), logits(trainer.model))
    assert not torch.allclose(logits(loaded), logits(make_model()), atol=1e-2)


def test_sft(tmp_path, kind):
    rows = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in PAIRS]
    trainer = trl.SFTTrainer(
        make_model(),
        args=arguments(trl.SFTConfig, tmp_path, **SETTINGS),
        train_dataset=Dataset.from_list(rows),
        processing_class=make_tokenizer(),
        peft_config=make_config(kind),
    )
    trainer.train()

    assert losses(trainer)[-1] < 0.9 * losses(trainer)[0]
    assert_trained(kind, trainer.model)
    assert_reloads(trainer, tmp_path / "out")


def make_dpo(folder, model, **settings):
    return trl.DPOTrainer(
        model,
        args=arguments(trl.DPOConfig, folder, **SETTINGS),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=make_tokenizer(),
        **settings,
    )


def completion_log_probs(model, batch):
    with torch.no_grad():
        found = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    taken = found.log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
    return (taken * batch["completion_mask"][:, 1:]).sum(1)


def assert_refers_to(trainer, model):
    batch = next(iter(trainer.get_train_dataloader()))
    found = torch.cat(trainer.compute_ref_log_probs(trainer.model, batch))
    torch.testing.assert_close(found, completion_log_probs(model, batch), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, completion_log_probs(trainer.model, batch), atol=1e-2)


def test_dpo_refers_to_the_base_model(tmp_path, kind):
    trainer = make_dpo(tmp_path, make_model(), peft_config=make_config(kind))
    trainer.train()

    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-4)
    assert losses(trainer)[-1] < 0.6
    assert_refers_to(trainer, make_model())
    assert_trained(kind, trainer.model)
    assert_reloads(trainer, tmp_path / "out")


def test_dpo_refers_to_the_loaded_adapter_that_it_goes_on_training(tmp_path, kind):
    first = adapt(kind)
    randomise(first)
    first.save_pretrained(tmp_path / "first")
    loaded = PeftModel.from_pretrained(make_model(), tmp_path / "first", is_trainable=True)

    trainer = make_dpo(tmp_path, loaded)
    trainer.train()

    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-4)
    assert losses(trainer)[-1] < 0.65
    assert_refers_to(trainer, first)
    start, found = factors(first), factors(trainer.model)
    for name, tensor in start.items():
        assert torch.equal(found[name.replace(".default.", ".ref.")], tensor), name
        assert torch.equal(found[name], tensor) is is_frozen(kind, name), name
    assert {name for name in found if trainer.model.get_parameter(f"base_model.model.{name}").requires_grad} == {
        name for name in start if not is_frozen(kind, name)
    }
    assert_reloads(trainer, tmp_path / "out")


def test_grpo(tmp_path, kind):
    def count_suns(completions, **_):
        return [text.split().count("sun") + 0.1 * len(set(text)) for text in completions]

    trainer = trl.GRPOTrainer(
        make_model(),
        reward_funcs=count_suns,
        args=arguments(
            trl.GRPOConfig,
            tmp_path,
            **SETTINGS,
            num_generations=2,
            max_completion_length=4,
            beta=0.1,
        ),
        train_dataset=Dataset.from_list([{"prompt": pair["prompt"]} for pair in PAIRS]),
        processing_class=make_tokenizer(),
        peft_config=make_config(kind),
    )
    trainer.train()

    divergences = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert divergences[0] == 0  # against the base model, which the adapter starts from
    assert divergences[-1] > 0.01
    assert_trained(kind, trainer.model)
    assert_reloads(trainer, tmp_path / "out")
