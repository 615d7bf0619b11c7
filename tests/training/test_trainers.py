"""transformers' Trainer, its own adapter calls, and LoRA+."""

import pytest
import torch
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer
from transformers import AutoModelForCausalLM, EarlyStoppingCallback, Trainer, TrainingArguments

from tests.tiny import make_model
from tests.training.kinds import (
    IDS,
    KINDS,
    adapt,
    arguments,
    assert_base_untouched,
    assert_frozen,
    assert_trained,
    factors,
    is_frozen,
    logits,
    losses,
    make_config,
    randomise,
)

pytestmark = pytest.mark.parametrize("kind", KINDS)

ROWS = [{"input_ids": ids, "labels": ids} for ids in IDS]


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, kind):
    saving = arguments(TrainingArguments, tmp_path / "whole", save_strategy="steps", save_steps=3)
    whole = Trainer(adapt(kind, lora_dropout=0.2), saving, train_dataset=ROWS)
    whole.train()
    again = adapt(kind, lora_dropout=0.2)
    randomise(again)
    resumed = Trainer(again, arguments(TrainingArguments, tmp_path / "resumed"), train_dataset=ROWS)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))

    assert len(set(losses(whole))) == 6
    assert losses(resumed) == losses(whole)
    expected = factors(whole.model)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in factors(resumed.model).items())
    assert_trained(kind, whole.model)
    assert_trained(kind, resumed.model)


def test_the_best_checkpoint_comes_back_after_an_early_stop(tmp_path, kind):
    scores = iter([1.0, 3.0, 2.0, 2.0])
    trainer = Trainer(
        adapt(kind),
        arguments(
            TrainingArguments,
            tmp_path,
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="steps",
            save_steps=1,
            load_best_model_at_end=True,
            metric_for_best_model="score",
        ),
        train_dataset=ROWS,
        eval_dataset=ROWS[:4],
        compute_metrics=lambda _: {"score": next(scores, 0.0)},
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
    )
    trainer.train()

    assert trainer.state.global_step == 4
    evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(set(evaluated)) == 4
    assert trainer.evaluate()["eval_loss"] == pytest.approx(evaluated[1], rel=1e-6)
    best = PeftModel.from_pretrained(make_model(), tmp_path / "checkpoint-2")
    assert torch.equal(logits(trainer.model), logits(best))
    assert_trained(kind, trainer.model)
    trainer.save_model(str(tmp_path / "out"))
    assert torch.equal(logits(PeftModel.from_pretrained(make_model(), tmp_path / "out")), logits(best))


def test_accumulated_gradients_are_those_of_the_large_batch(tmp_path, kind):
    found = []
    for size, count in [(8, 1), (2, 4)]:
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": count, "max_steps": 2}
        trainer = Trainer(adapt(kind), arguments(TrainingArguments, tmp_path, **settings), train_dataset=ROWS)
        trainer.train()
        assert_trained(kind, trainer.model)
        found.append(trainer)

    assert losses(found[0]) == pytest.approx(losses(found[1]), rel=1e-4)
    torch.testing.assert_close(logits(found[0].model), logits(found[1].model), rtol=1e-3, atol=1e-3)


def test_a_bfloat16_model_is_trained_through_float32_factors(tmp_path, kind):
    trainer = Trainer(
        adapt(kind, make_model().to(torch.bfloat16)), arguments(TrainingArguments, tmp_path), train_dataset=ROWS
    )
    trainer.train()

    assert {tensor.dtype for tensor in factors(trainer.model).values()} == {torch.float32}
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.1
    assert_frozen(kind, trainer.model)


# The supported versions of transformers share only the old name.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_no_gradient(kind, reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = adapt(kind)
        randomise(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.train()(IDS, labels=IDS).loss.backward()
        assert model.get_base_model().model.layers[0].gradient_checkpointing is checkpointing
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})

    plain, recomputed = gradients
    assert plain.keys() == recomputed.keys()
    assert {name.removeprefix("base_model.model.") for name in plain} == {
        name for name in factors(model) if not is_frozen(kind, name)
    }
    for name, gradient in plain.items():
        assert gradient.abs().max() > 1e-4, name
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-5, atol=1e-7)


def test_loraplus_gives_b_the_higher_rate_and_frozen_factors_none(kind):
    model = adapt(kind)
    optimizer = create_loraplus_optimizer(model, torch.optim.SGD, lr=0.1, loraplus_lr_ratio=16)
    names = {parameter: name for name, parameter in model.named_parameters()}
    rates = {names[parameter]: group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    assert rates == {
        name: 1.6 if "lora_B" in name else 0.1
        for name in names.values()
        if "lora_" in name and not is_frozen(kind, name)
    }

    for _ in range(2):  # where one factor is zero, the other moves in the second step only
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_trained(kind, model)


@pytest.fixture
def saved(tmp_path, kind):
    """An adapter's folder that names the base model's folder, and the adapter's logits."""
    make_model().save_pretrained(tmp_path / "base")
    model = adapt(kind, AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    randomise(model)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", logits(PeftModel.from_pretrained(make_model(), tmp_path / "adapter"))


def test_transformers_loads_what_peft_has_saved(kind, saved):
    folder, expected = saved
    before = logits(make_model())
    assert not torch.allclose(expected, before, atol=1e-2)

    model = make_model()
    info = model.load_adapter(str(folder))
    assert not info.missing_keys
    assert not info.unexpected_keys
    assert not any(parameter.requires_grad for name, parameter in model.named_parameters() if "lora_" in name)
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), expected)
    model.disable_adapters()
    assert torch.equal(logits(model), before)
    model.enable_adapters()
    assert torch.equal(logits(model), expected)
    assert_frozen(kind, model)


def test_what_transformers_adds_is_trained_and_saved(tmp_path, kind):
    model = make_model()
    torch.manual_seed(0)
    model.add_adapter(make_config(kind))
    trainer = Trainer(model, arguments(TrainingArguments, tmp_path), train_dataset=ROWS)
    trainer.train()

    assert_trained(kind, model)
    trainer.save_model(str(tmp_path / "out"))
    assert torch.equal(logits(PeftModel.from_pretrained(make_model(), tmp_path / "out")), logits(model))
    assert torch.equal(logits(load(tmp_path / "out")), logits(model))


def load(folder, **settings):
    model = make_model()
    model.load_adapter(str(folder), **settings)
    return model


def files(folder) -> set[str]:
    """What belongs to an adapter; the others come from PEFT or transformers alone."""
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return found - {"README.md", "generation_config.json"}


@pytest.mark.parametrize("trainable", [False, True])
def test_what_transformers_loads_is_saved_again_in_full(tmp_path, kind, saved, trainable):
    folder, expected = saved
    assert any("subspace" in name for name in files(folder)) is (kind != "lora")

    load(folder, is_trainable=trainable).save_pretrained(tmp_path / "again")

    assert files(tmp_path / "again") == files(folder)
    assert torch.equal(logits(PeftModel.from_pretrained(make_model(), tmp_path / "again")), expected)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_what_transformers_loads_for_training_keeps_its_frozen_factors(tmp_path, kind, saved, low_cpu_mem_usage):
    folder, expected = saved
    model = load(folder, is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(model), expected)
    start = factors(model)

    Trainer(model, arguments(TrainingArguments, tmp_path / "run"), train_dataset=ROWS).train()

    assert {name for name, tensor in factors(model).items() if torch.equal(tensor, start[name])} == {
        name for name in start if is_frozen(kind, name)
    }
    assert_frozen(kind, model)
    assert_base_untouched(model)


# transformers' own call for a second adapter makes PEFT warn of a second adapter.
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute in the model:UserWarning")
def test_adapters_side_by_side_in_transformers(kind, saved):
    folder, expected = saved
    model, before = make_model(), logits(make_model())
    model.load_adapter(str(folder), "loaded")
    model.add_adapter(make_config(kind, r=2), "new")
    assert model.active_adapters() == ["new"]
    assert torch.equal(logits(model), before)
    model.load_adapter(str(folder), "trained", is_trainable=True)
    for name in ("loaded", "trained"):
        model.set_adapter(name)
        assert torch.equal(logits(model), expected)

    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name in factors(model) if ".trained." in name and not is_frozen(kind, name)}
    model.set_adapter("loaded")
    model.delete_adapter(["new", "trained"])
    assert set(model.peft_config) == {"loaded"}
    assert not any(".new." in name or ".trained." in name for name in model.state_dict())
    assert torch.equal(logits(model), expected)
    model.delete_adapter("loaded")
    assert torch.equal(logits(model), before)
    assert_base_untouched(model)
