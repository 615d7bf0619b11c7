"""Protected features stay out of the update in runs of the trainers that users have."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from peft_sae import SaeSubspaceConfig
from peft_sae.tuner.basis import measure_norm, orthonormal_rows
from tests.tiny import make_model, make_subspace
from tests.training.kinds import IDS, arguments, logits, losses

ROWS = [{"input_ids": ids, "labels": ids} for ids in IDS]


def adapt():
    torch.manual_seed(0)
    model = make_model()
    subspace = make_subspace(model, protected={"blocks.1.hook_resid_pre": 3})
    fields = {"r": 4, "target_modules": ["q_proj", "o_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    return get_peft_model(model, SaeSubspaceConfig(subspace=subspace, **fields))


def leak(model) -> float:
    """The largest part of an update along a protected direction, as a share of the update."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    directions = make_subspace(base, protected={"blocks.1.hook_resid_pre": 3}).protected[0].directions.double()
    worst = 0.0
    for block in base.model.layers:
        gain = measure_norm(block.input_layernorm, 32).gain
        read = orthonormal_rows(directions * gain)
        written = orthonormal_rows(directions)
        for module, side in [
            (block.self_attn.q_proj, read),
            (block.self_attn.o_proj, None),
            (block.mlp.down_proj, None),
        ]:
            delta = module.get_delta_weight("default").detach().double()
            along = delta @ side.T if side is not None else written @ delta
            worst = max(worst, float(along.norm() / delta.norm()))
    return worst


class Watch(TrainerCallback):
    """Measures after every step."""

    def __init__(self):
        self.leaks = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.leaks.append(leak(model))


def test_a_run_of_the_trainer_keeps_to_its_protection_at_every_step_and_resumes(tmp_path):
    watch = Watch()
    saving = arguments(TrainingArguments, tmp_path / "whole", save_strategy="steps", save_steps=3, weight_decay=0.1)
    whole = Trainer(adapt(), saving, train_dataset=ROWS, callbacks=[watch])
    whole.train()
    assert len(watch.leaks) == 6
    assert max(watch.leaks) < 1e-6

    again = Watch()
    rest = arguments(TrainingArguments, tmp_path / "rest", weight_decay=0.1)
    resumed = Trainer(adapt(), rest, train_dataset=ROWS, callbacks=[again])
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert losses(resumed) == pytest.approx(losses(whole), rel=1e-5)
    assert max(again.leaks) < 1e-6
    torch.testing.assert_close(logits(resumed.model), logits(whole.model), rtol=1e-4, atol=1e-4)


# TRL calls it by its old name.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing[a-z_]*` is deprecated:FutureWarning")
def test_preference_training_with_the_adapter_off_as_the_reference(tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    from tests.tiny import make_tokenizer

    rows = [{"prompt": "red green", "chosen": " sun moon", "rejected": " fish bird"}] * 4
    watch = Watch()
    trainer = trl.DPOTrainer(
        make_model(),
        args=arguments(trl.DPOConfig, tmp_path / "out", max_steps=3, bf16=False),
        train_dataset=Dataset.from_list(rows),
        processing_class=make_tokenizer(),
        peft_config=adapt().peft_config["default"],
        callbacks=[watch],
    )
    trainer.train()
    assert max(watch.leaks) < 1e-6
    assert len(set(losses(trainer))) == 3
