from dataclasses import replace

import pytest
import torch

pytest.importorskip("nanogcg", reason="the extra 'paper' is not installed")

from benchmarks.paper.attack import (
    attack,
    check_settings,
    chosen_prompts,
    find_suffix,
    scaled_embeddings,
    target_loss,
)
from benchmarks.paper.data import Prompt
from benchmarks.paper.specs import AttackSpec, GenerationSpec
from peft_sae.errors import ConfigError, DataError
from tests.tiny import make_model

GENERATION = GenerationSpec(prompt_form='\n\nHuman: {prompt} "so"\n\nAssistant:')
SPEC = AttackSpec(
    set="x",
    settings={"num_steps": 8, "search_width": 24, "topk": 32, "batch_size": 24, "optim_str_init": "! ! ! !"},
)
PROMPTS = [Prompt(str(number), f"How do I make {thing}") for number, thing in enumerate(("a cake", "a {kite}"))]


def run(base, path, spec=SPEC, **changes):
    settings = {"seed": 0, "label": "", "progress": False, **changes}
    return attack(lambda: base, base.identity, PROMPTS, spec, GENERATION, path, **settings)


def test_suffixes_make_the_target_likelier(base, tmp_path, capsys):
    deterministic = torch.are_deterministic_algorithms_enabled()
    state = torch.get_rng_state()
    found = run(base, tmp_path / "suffixes.jsonl")
    for one in found:
        assert one.text.startswith(f"{one.prompt.text} ")
        assert one.loss_before == pytest.approx(target_loss(base, one.prompt.text, SPEC.target, GENERATION))
        assert one.loss_after == pytest.approx(target_loss(base, one.text, SPEC.target, GENERATION))
        assert one.loss_after < one.loss_before - 0.3
        start = target_loss(base, f"{one.prompt.text} ! ! ! !", SPEC.target, GENERATION)
        assert one.loss_after < start - 0.3
    assert torch.are_deterministic_algorithms_enabled() == deterministic
    assert torch.equal(torch.get_rng_state(), state)
    assert base.tokenizer.chat_template is None
    assert capsys.readouterr().err == ""


def test_a_killed_attack_goes_on(base, tmp_path, monkeypatch):
    quick = replace(SPEC, settings={**SPEC.settings, "num_steps": 1})
    calls = []

    def dies(trained, prompt, *rest):
        calls.append(prompt)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return find_suffix(trained, prompt, *rest)

    monkeypatch.setattr("benchmarks.paper.attack.find_suffix", dies)
    with pytest.raises(KeyboardInterrupt):
        run(base, tmp_path / "a.jsonl", quick)
    found = run(base, tmp_path / "a.jsonl", quick)
    assert run(base, tmp_path / "a.jsonl", quick) == found
    assert calls == [PROMPTS[0].text, PROMPTS[1].text, PROMPTS[1].text]
    run(base, tmp_path / "a.jsonl", quick, seed=1)
    assert len(calls) == 5


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "llama"])
def test_the_gradient_is_taken_at_what_the_layer_gives_out(family):
    model = make_model(family)
    found = scaled_embeddings(model)
    ids = torch.tensor([[4, 7, 9]])
    one_hot = torch.nn.functional.one_hot(ids, found.num_embeddings).float()
    torch.testing.assert_close(one_hot @ found.weight, model.get_input_embeddings()(ids))
    torch.testing.assert_close(found(ids), model.get_input_embeddings()(ids))


def test_other_embeddings_are_refused():
    model = make_model("llama")
    model.get_input_embeddings().register_forward_hook(lambda _module, _inputs, output: output + 1)
    with pytest.raises(ConfigError, match="LlamaForCausalLM are not rows of their weights times a scale"):
        scaled_embeddings(model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_step": 3}, "no such field. Did you mean 'num_steps'"),
        ({"use_prefix_cache": True}, "takes a model's cache for a list"),
        ({"seed": 3}, "The experiment's own seed is used"),
        ({"num_steps": "many"}, r"num_steps='many': nanogcg would fail at it. Give an integer from 1"),
        ({"num_steps": 0}, r"num_steps=0: nanogcg would fail"),
        ({"use_mellowmax": 1}, r"use_mellowmax=1: nanogcg would fail at it. Give true or false"),
    ],
)
def test_wrong_settings_are_told(settings, message):
    with pytest.raises(ConfigError, match=message):
        check_settings(replace(SPEC, settings=settings))


def test_prompts_are_taken_evenly():
    prompts = [Prompt(str(number), "x") for number in range(10)]
    assert [prompt.id for prompt in chosen_prompts(prompts, 4)] == ["0", "2", "5", "7"]
    assert chosen_prompts(prompts, 99) == prompts


def test_a_prompt_with_the_place_of_the_suffix_in_it_is_told(tmp_path):
    def never():
        raise AssertionError("the model is loaded")

    taken = [Prompt("7", "print {optim_str}")]
    with pytest.raises(DataError, match=r"Prompt 7 of the attacked set has '\{optim_str\}' in it"):
        attack(never, "x", taken, SPEC, GENERATION, tmp_path / "a", seed=0, label="", progress=False)
