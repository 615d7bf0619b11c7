"""Every method of the safety benchmark is what its name says, on a tiny model."""

import copy
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from benchmarks.safety import starts, tuning
from benchmarks.safety.setting import Basis, _turned, varimax

RANK = 2
DATA_DRIVEN = {
    "eva": starts.eva,
    "corda": starts.corda,
    "corda, ipm": partial(starts.corda, method="ipm"),
    "lora_ga": starts.lora_ga,
}
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
    return SimpleNamespace(
        seed=0, base=base, calibration=lambda neutral=False: batches, subspace=lambda basis: subspace
    )


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


def test_both_modes_of_corda_begin_apart(setting):
    first, second = (factors(starts.corda(setting, RANK, method=each), "A") for each in ("kpm", "ipm"))
    assert all(not torch.allclose(first[name], second[name]) for name in first)


def test_a_penalty_keeps_a_trained_basis_near_its_span(setting, llama):
    batches = [batch_of(llama, seed) for seed in range(6)]
    left = {}
    for penalty in (0.0, 100.0):
        model = starts.sae(setting, RANK, basis=Basis(), freeze_basis=False, fill="zeros")
        distance = tuning.stay_near(model)
        assert float(distance().detach()) == pytest.approx(0.0, abs=1e-6)
        tuning.fine_tune(model, batches, 3e-2, penalty=penalty)
        left[penalty] = float(distance().detach())
    assert left[0.0] > 0.01
    assert left[100.0] < 0.5 * left[0.0]


def test_the_distance_from_a_span_is_the_share_of_squares_across_it():
    model = torch.nn.ModuleDict({"lora_A": torch.nn.ModuleDict({"default": torch.nn.Linear(3, 1, bias=False)})})
    factor = model["lora_A"]["default"].weight
    factor.data = torch.tensor([[2.0, 0.0, 0.0]])
    distance = tuning.stay_near(model)
    factor.data = torch.tensor([[3.0, 4.0, 0.0]])
    assert float(distance().detach()) == pytest.approx(16 / 25)


def test_varimax_finds_the_features_that_a_basis_was_mixed_from():
    generator = torch.Generator().manual_seed(0)
    plain = torch.eye(4, dtype=torch.float64).repeat(3, 1) * torch.rand(12, 1, generator=generator, dtype=torch.float64)
    mixing = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64))[0]
    rotation = varimax(plain @ mixing)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(4, dtype=torch.float64))
    again = (plain @ mixing @ rotation).abs()
    assert all(int((row > 1e-6).sum()) == 1 for row in again)


def test_a_turned_basis_has_the_same_span_and_still_consists_of_its_features(subspace):
    for site in subspace.sites:
        turned = _turned(site, 2)
        assert turned.rank == 2
        own, other = (each.T @ each for each in (site.basis[:2], turned.basis))
        torch.testing.assert_close(own, other, atol=1e-5, rtol=0)
        torch.testing.assert_close(turned.coefficients @ site.directions, turned.basis, atol=1e-4, rtol=0)
