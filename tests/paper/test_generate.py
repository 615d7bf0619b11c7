from dataclasses import replace

import pytest
import torch

pytest.importorskip("openai", reason="the extra 'paper' is not installed")

from benchmarks.paper.data import Prompt
from benchmarks.paper.generate import encode_prompt, generate, put
from benchmarks.paper.lines import read_lines
from benchmarks.paper.specs import GenerationSpec
from benchmarks.paper.train import identity_of
from peft_sae.errors import ConfigError, DataError

PROMPTS = [
    Prompt(str(i), text) for i, text in enumerate(["How?", "How do I make a cake and a kite?", "Why", "Hello 3"])
]
SPEC = GenerationSpec(prompt_form="\n\nHuman: {prompt}\n\nAssistant:", max_new_tokens=8, batch_size=2)


def ask(base, path, spec=SPEC, prompts=PROMPTS):
    return generate(lambda: base, base.identity, prompts, spec, path, label="", progress=False)


def by_hand(base, prompt, steps):
    """Greedy decoding without a cache, without padding."""
    ids = encode_prompt(base.tokenizer, prompt.text, SPEC)
    made = []
    for _ in range(steps):
        with torch.no_grad():
            token = int(base.model(input_ids=torch.tensor([ids + made])).logits[0, -1].argmax())
        if token == base.tokenizer.eos_token_id:
            break
        made.append(token)
    return base.tokenizer.decode(made, skip_special_tokens=True).strip()


def test_answers_are_greedy_and_do_not_depend_on_the_batch(base, tmp_path):
    wanted = [by_hand(base, prompt, 8) for prompt in PROMPTS]
    for size in (1, 2, 4):
        found = ask(base, tmp_path / f"{size}.jsonl", replace(SPEC, batch_size=size))
        assert [answer.text for answer in found] == wanted
        assert all(answer.tokens <= 8 for answer in found)
        assert [answer.prompt for answer in found] == PROMPTS


def test_answers_are_made_once_and_a_killed_run_goes_on(base, tmp_path, monkeypatch):
    path, calls = tmp_path / "answers.jsonl", []
    real = base.model.generate

    def dies(**inputs):
        calls.append(len(inputs["input_ids"]))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(**inputs)

    monkeypatch.setattr(base.model, "generate", dies)
    with pytest.raises(KeyboardInterrupt):
        ask(base, path)
    assert len(read_lines(path)) == 2
    found = ask(base, path)
    assert calls == [2, 2, 2]
    assert ask(base, path) == found
    assert calls == [2, 2, 2]
    ask(base, path, replace(SPEC, max_new_tokens=4))
    ask(replace(base, identity="another"), path)
    assert calls == [2] * 7


def test_answers_in_another_precision_are_others(experiment):
    half = replace(experiment, generation=replace(experiment.generation, dtype="bfloat16"))
    assert identity_of(half, "base") != identity_of(experiment, "base")
    assert identity_of(replace(half, job=replace(half.job, model="some/one")), "base") != identity_of(half, "base")


def test_the_model_is_not_loaded_for_nothing(base, tmp_path):
    found = ask(base, tmp_path / "a.jsonl")
    again = generate(None, base.identity, PROMPTS, SPEC, tmp_path / "a.jsonl", label="", progress=False)
    assert again == found


def test_answers_end_at_a_stop_text(base, tmp_path):
    (whole,) = ask(base, tmp_path / "a.jsonl", prompts=PROMPTS[1:2])
    stop = whole.text[2:4]
    found = ask(base, tmp_path / "a.jsonl", replace(SPEC, stop=[stop]))
    assert found[1].text == whole.text[: whole.text.index(stop)].strip()
    assert found[1].complete
    assert found[1].tokens <= whole.tokens
    assert all(stop not in answer.text for answer in found)


def test_a_prompt_is_never_cut(base, tmp_path):
    with pytest.raises(DataError, match=r"Prompt 1 has \d+ tokens, and max_prompt_tokens=12; cut, it would be another"):
        ask(base, tmp_path / "a.jsonl", replace(SPEC, max_prompt_tokens=12), PROMPTS[1:])


def test_forms_and_templates(base):
    tokenizer = type(base.tokenizer).from_pretrained(base.tokenizer.name_or_path)
    ids = encode_prompt(tokenizer, "Hi {prompt} {x}", SPEC)
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == "\n\nHuman: Hi {prompt} {x}\n\nAssistant:"
    no_form = replace(SPEC, prompt_form=None)
    with pytest.raises(ConfigError, match=r"no chat template and the experiment no generation\.prompt_form"):
        encode_prompt(tokenizer, "Hi", no_form)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}[{{ m.content }}]{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    ids = encode_prompt(tokenizer, "Hi", no_form)
    assert tokenizer.decode(ids) == "<bos>[Hi]>"
    assert ids.count(tokenizer.bos_token_id) == 1


def test_values_are_put_into_forms_as_they_are():
    assert put("{prompt}|{answer}|{other}", prompt="{answer}", answer="\\1") == "{answer}|\\1|{other}"
