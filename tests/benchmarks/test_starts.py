"""Every method of the safety benchmark is what its name says, on a tiny model."""

import copy
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from benchmarks.safety import starts, tuning
from benchmarks.safety.setting import Basis

RANK = 2
DATA_DRIVEN = {"eva": starts.eva, "corda": starts.corda, "lora_ga": starts.lora_ga}
DECOMPOSED = {name: partial(starts.lora, init_lora_weights=name) for name in ("pissa", "olora", "mica")}
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:lora with eva initialization used with low_cpu_mem_usage"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),  # those of LoRA-GA
]


def batch_of(llama, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, llama.config.vocab_size, (4, 10), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


@pytest.fixture
def setting(llama, subspace):
    base = SimpleNamespace(load=lambda: copy.deepcopy(llama))
    batches = [batch_of(llama, seed) for seed in range(3)]
    return SimpleNamespace(seed=0, base=base, calibration=batches, subspace=lambda basis: subspace)


def factors(model, letter):
    return {
        name: value.detach().clone() for name, value in model.named_parameters() if f"lora_{letter}.default" in name
    }


@pytest.mark.parametrize("name", [*DATA_DRIVEN, *DECOMPOSED])
def test_an_initialisation_is_not_plain_lora_and_changes_nothing_at_first(name, setting, llama):
    plain = factors(starts.lora(setting, RANK), "A")
    model = ({**DATA_DRIVEN, **DECOMPOSED})[name](setting, RANK).eval()
    found = factors(model, "A") | factors(model, "B")
    own = factors(starts.lora(setting, RANK), "B") | plain
    assert any(not torch.allclose(found[key], own[key]) for key in own if key in found)
    inputs = {"input_ids": batch_of(llama)["input_ids"]}
    with torch.inference_mode():
        torch.testing.assert_close(model(**inputs).logits, llama(**inputs).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("frozen", [True, False])
def test_the_basis_is_the_subspace_s_and_stays_where_it_is_frozen(frozen, setting, llama):
    fields = {"freeze_basis": frozen, "fill": "zeros"}
    model = starts.sae(setting, RANK, basis=Basis(), **fields)
    before = factors(model, "A")
    random = factors(starts.lora(setting, RANK), "A")
    assert all(not torch.allclose(before[name], random[name]) for name in before)
    written = factors(model, "B")
    tuning.fine_tune(model, [batch_of(llama, seed) for seed in range(4)], 1e-2)
    after = factors(model, "A")
    assert all(torch.equal(before[name], after[name]) is frozen for name in before)
    assert all(not torch.equal(value, written[name]) for name, value in factors(model, "B").items())


def test_full_fine_tuning_trains_everything_and_lowers_the_loss(setting, llama):
    model = starts.full(setting)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    batches = [batch_of(llama)] * 10
    first = float(model(**batches[0]).loss.detach())
    assert tuning.fine_tune(model, batches, 1e-2)["loss"] < first - 0.1
    assert all(not torch.equal(value, before[name]) for name, value in model.named_parameters())
    assert not model.training


def test_rates_are_chosen_without_a_look_at_any_test(monkeypatch):
    asked = []

    def behaviour(model, base, which):
        asked.append(which)
        return {"safety": 0.9, "helpfulness": 0.6, "over_refusal": 0.0}

    monkeypatch.setattr(tuning, "behaviour", behaviour)
    assert tuning.validation_score(None, None) == pytest.approx((0.9 + 0.6 + 0.6) / 3)
    assert asked
    assert all(which.startswith("validation") for which in asked)


def test_each_measure_is_of_the_set_that_it_names(monkeypatch):
    values = {"test": 0.1, "swapped": 0.2, "unseen": 0.3, "unseen, swapped": 0.4, "harmless questions": 0.5}

    def behaviour(model, base, which):
        return {"safety": values[which], "helpfulness": values[which] + 0.01, "over_refusal": values[which] + 0.02}

    monkeypatch.setattr(tuning, "behaviour", behaviour)
    monkeypatch.setattr(tuning, "corpus_loss", lambda model, base: 2.5)
    found = tuning.measure(None, None, None)
    assert found["safety"] == 0.1
    assert found["safety, cue swapped"] == 0.2
    assert found["safety, unseen kinds"] == 0.3
    assert found["safety, unseen kinds, cue swapped"] == 0.4
    assert found["helpfulness, cue swapped"] == pytest.approx(0.21)
    assert found["over-refusal, cue swapped"] == pytest.approx(0.22)
    assert found["over-refusal, harmless questions"] == pytest.approx(0.52)
    assert found["harmless questions right"] == pytest.approx(0.51)
    assert found["corpus loss"] == 2.5
