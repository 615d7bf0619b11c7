"""What the adapter does to texts, against plain forward passes of the merged model."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoModelForCausalLM

from peft_sae import inspect_adapter
from peft_sae.errors import ConfigError, DataError
from peft_sae.inspect import language
from tests.statistics.dense import ratio_standard_error
from tests.tiny import make_model, make_tokenizer

from .dense import train

TEXTS = [
    "red green blue sun moon",
    "sea hill",
    "tree bird fish stone sky red",
    "moon sea sea hill tree",
    "sky",
    "sun sun",
]
QUIET = {"progress": False, "batch_size": 4}


def _merged(trained):
    return copy.deepcopy(trained.model).merge_and_unload().double()


def _base(trained):
    return AutoModelForCausalLM.from_pretrained(trained.base).double()


def _log_probabilities(model, ids):
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([ids])).logits[0], dim=-1)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "phi3", "opt"])
@pytest.mark.parametrize("logits", [7, 2**22])
def test_loss_and_divergence_are_those_of_the_merged_model(tmp_path, family, logits, monkeypatch):
    monkeypatch.setitem(language._LOGITS, "cpu", logits)
    changes = {"final_logit_softcapping": 5.0} if family == "gemma2" else {}
    trained = train(tmp_path, family)
    if changes:
        config = json.loads((trained.base / "config.json").read_text())
        (trained.base / "config.json").write_text(json.dumps({**config, **changes}))
        trained.model.get_base_model().config.final_logit_softcapping = 5.0
    found = inspect_adapter(trained.adapter, data=TEXTS, **QUIET)
    base, merged, tokenizer = _base(trained), _merged(trained), make_tokenizer()
    rows = {}
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        before, after = _log_probabilities(base, ids), _log_probabilities(merged, ids)
        for place, token in enumerate(ids[1:], start=1):
            divergence = (before[place - 1].exp() * (before[place - 1] - after[place - 1])).sum()
            entry = (-before[place - 1, token], -after[place - 1, token], divergence)
            rows.setdefault(place, []).append(torch.stack(entry))
    table = found.positions.set_index("position")
    assert set(table.index) == set(rows)
    for place, entries in rows.items():
        before, after, divergence = torch.stack(entries).mean(0).tolist()
        assert table.loc[place, "tokens"] == len(entries)
        assert table.loc[place, "loss_before"] == pytest.approx(before, rel=1e-4)
        assert table.loc[place, "loss_after"] == pytest.approx(after, rel=1e-4)
        assert table.loc[place, "kl"] == pytest.approx(divergence, rel=1e-3, abs=1e-6)
    means = torch.stack([entry for entries in rows.values() for entry in entries]).mean(0).tolist()
    summary = [found.summary[name] for name in ("loss_before", "loss_after", "kl")]
    assert summary == pytest.approx(means, rel=1e-3)
    assert found.summary["loss_change"] == pytest.approx(means[1] - means[0], abs=1e-4)
    assert found.summary["kl"] > 1e-3


def test_logits_that_the_head_does_not_give_are_taken_whole(tmp_path, monkeypatch):
    """A model that does something behind its head which is not known here."""
    trained = train(tmp_path)
    kind = type(trained.model.get_base_model())
    forward = kind.forward

    def scaled(self, *args, **kwargs):
        found = forward(self, *args, **kwargs)
        found.logits = 3 * found.logits
        return found

    plain = inspect_adapter(trained.model, data=TEXTS, tokenizer=make_tokenizer(), **QUIET)
    monkeypatch.setattr(kind, "forward", scaled)
    found = inspect_adapter(trained.model, data=TEXTS, tokenizer=make_tokenizer(), **QUIET)
    assert abs(found.summary["loss_before"] - plain.summary["loss_before"]) > 0.1
    base, tokenizer = trained.model, make_tokenizer()
    with base.disable_adapter():
        losses = [
            -_log_probabilities(base, ids)[:-1].gather(1, torch.tensor(ids[1:])[:, None])
            for ids in (tokenizer(text)["input_ids"] for text in TEXTS)
        ]
    assert found.summary["loss_before"] == pytest.approx(float(torch.cat(losses).mean()), rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_activations_are_those_of_base_and_merged_model(tmp_path, family):
    trained = train(tmp_path, family)
    found = inspect_adapter(trained.adapter, data=TEXTS, saes=trained.saes, others=64, **QUIET)
    tokenizer, models = make_tokenizer(), (_base(trained), _merged(trained))
    for number, handle in enumerate(trained.saes):  # both read the stream behind block 0 or 1
        sums = []
        for model in models:
            with torch.no_grad():
                states = [
                    model(torch.tensor([tokenizer(text)["input_ids"]]), output_hidden_states=True).hidden_states
                    for text in TEXTS
                ]
            place = 1 if number == 0 else 2
            sums.append(handle.encode(torch.cat([state[place][0, 1:] for state in states]).float()).double())
        table = found.activations[found.activations["hook_name"] == handle.identity.hook_name].set_index("feature")
        before, after = (one.mean(0) for one in sums)
        owners = torch.cat([torch.full((len(tokenizer(text)["input_ids"]) - 1,), n) for n, text in enumerate(TEXTS)])
        errors = torch.stack([ratio_standard_error(one, owners) for one in sums]).norm(dim=0)
        for feature in table.index:
            row = table.loc[feature]
            assert row["mean_before"] == pytest.approx(float(before[feature]), rel=1e-4, abs=1e-5)
            assert row["mean_after"] == pytest.approx(float(after[feature]), rel=1e-4, abs=1e-5)
            assert row["change"] == pytest.approx(row["mean_after"] - row["mean_before"])
            assert row["error"] == pytest.approx(float(errors[feature]), rel=1e-3, abs=1e-6)
            assert row["rate_before"] == pytest.approx(float((sums[0][:, feature] > 0).double().mean()), abs=0.06)
            assert row["rate_after"] == pytest.approx(float((sums[1][:, feature] > 0).double().mean()), abs=0.06)
        silent = ((after - before) == 0).nonzero().squeeze(1).tolist()
        assert set(range(64)) - set(table.index) <= set(silent)
        for feature in table.index[:5]:
            for example in table.loc[feature, "examples"]:
                assert f"{example.before}{example.token}{example.after}".strip("…") in TEXTS[example.number]
    promoted = found.activations.set_index("name")["promoted"]
    for row in found.features.itertuples():
        assert row.tokens
        assert row.group == "chosen" or row.tokens == promoted.get(row.name, row.tokens)
    changes = found.activations["change"].abs()
    assert changes.is_monotonic_decreasing
    assert changes.max() > 0.05
    json.loads(found.to_json())


def _state(model):
    """What must not change; hooks by their keys, tuner layers by what they do."""
    modules = dict(model.named_modules())
    layers = {name: module for name, module in modules.items() if isinstance(module, BaseTunerLayer)}
    return (
        {name: (id(module), module.training) for name, module in modules.items()},
        {name: (id(value), value.requires_grad, value._version) for name, value in model.named_parameters()},
        [(list(module._forward_hooks), list(module._forward_pre_hooks)) for module in modules.values()],
        {name: id(value) for name, value in vars(model).items()},
        {
            name: (list(layer.active_adapters), layer.disable_adapters, dict(layer.scaling))
            for name, layer in layers.items()
        },
        getattr(model, "active_adapter", None) if isinstance(model, PeftModel) else None,
    )


@pytest.mark.filterwarnings("ignore:`[a-z_]*gradient_checkpointing[a-z_]*` is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", ["base", "checkpointing", "in memory", "two active", "disabled", "another active"])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(tmp_path, kind, fails, monkeypatch):
    trained = train(tmp_path)
    expected = inspect_adapter(trained.adapter, data=TEXTS, **QUIET).summary["kl"]
    adapter, model = (trained.adapter, make_model()) if kind in ("base", "checkpointing") else (trained.model, None)
    held = trained.model if model is None else model
    if kind == "checkpointing":
        held.gradient_checkpointing_enable()
        held.enable_input_require_grads()
    if kind in ("two active", "another active"):
        held.add_adapter("other", LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
        if kind == "two active":
            held.base_model.set_adapter(["default", "other"])
        else:
            held.set_adapter("other")
    if kind == "disabled":
        held.base_model.disable_adapter_layers()
    held.train()
    next(module for name, module in held.named_modules() if name.endswith("layers.1")).eval()
    next(held.parameters()).requires_grad_(False)
    if fails:
        monkeypatch.setattr("peft_sae.inspect.inspection.compare_activations", lambda *_, **__: 1 / 0)
    before = _state(held)
    options = {"data": TEXTS, "saes": trained.saes, "tokenizer": make_tokenizer(), "adapter_name": "default", **QUIET}
    if fails:
        with pytest.raises(ZeroDivisionError):
            inspect_adapter(adapter, model, **options)
    else:
        assert inspect_adapter(adapter, model, **options).summary["kl"] == pytest.approx(expected, rel=1e-4)
    assert _state(held) == before


def test_a_base_that_holds_adapters_is_refused(tmp_path):
    trained = train(tmp_path)
    model = make_model()
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), adapter_name="mine")
    before = _state(model)
    with pytest.raises(ConfigError, match=r"holds adapters already \(at 'model.layers.0.self_attn.q_proj'\)"):
        inspect_adapter(trained.adapter, model, data=TEXTS, tokenizer=make_tokenizer(), **QUIET)
    assert _state(model) == before
    with pytest.raises(ConfigError, match="given as a LlamaForCausalLM, and a folder or a PeftModel is needed"):
        inspect_adapter(model)


def test_data_may_be_given_once(tmp_path):
    trained = train(tmp_path)
    first = inspect_adapter(trained.adapter, data=TEXTS, saes=trained.saes, **QUIET)
    second = inspect_adapter(trained.adapter, data=iter(TEXTS), saes=trained.saes, **QUIET)
    assert first.activations["change"].tolist() == second.activations["change"].tolist()
    assert first.provenance["data"] == second.provenance["data"]


def test_answers_alone_can_count(tmp_path):
    trained = train(tmp_path)
    data = [{"prompt": "red green", "completion": " sun moon"}, {"prompt": "sea", "completion": " hill"}]
    found = inspect_adapter(trained.adapter, data=data, tokens="response", **QUIET)
    assert found.positions["position"].tolist() == [2, 3, 4]
    assert found.summary["predicted_tokens"] == 3


def test_without_saes_the_notes_say_what_is_missing(tmp_path):
    found = inspect_adapter(train(tmp_path).adapter, data=TEXTS, **QUIET)
    assert found.activations is None
    assert any("No SAEs were given" in note for note in found.notes)


def test_texts_without_a_token_to_predict_are_refused(tmp_path):
    trained = train(tmp_path)
    with pytest.raises(DataError):
        inspect_adapter(trained.adapter, data=[""], **QUIET)
    with pytest.raises(DataError, match="No token"):
        inspect_adapter(trained.adapter, data=[], **QUIET)


def test_factors_that_are_no_numbers_are_told(tmp_path):
    trained = train(tmp_path)
    next(p for n, p in trained.model.named_parameters() if "q_proj.lora_B" in n).data.fill_(torch.inf)
    with pytest.raises(ConfigError, match=r"q_proj' hold NaN or infinity.*diverged"):
        inspect_adapter(trained.model)


def test_logits_that_are_no_numbers_are_told(tmp_path):
    trained = train(tmp_path)
    trained.model.get_base_model().model.norm.weight.data.fill_(torch.inf)
    with pytest.raises(DataError, match=r"logits are NaN"):
        inspect_adapter(trained.model, data=TEXTS, tokenizer=make_tokenizer(), **QUIET)
