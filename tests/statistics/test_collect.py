"""Statistics against a dense float64 computation, one text at a time and without hooks of ours."""

import copy

import datasets
import pytest
import torch

from peft_sae import collect_statistics, load_saes
from peft_sae.errors import ConfigError, DataError, MismatchError
from tests.tiny import WORDS, make_model, make_sae

from .dense import small_blocks

HOOKS = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_pre", "blocks.1.hook_resid_post"]


@pytest.fixture(scope="module")
def saes():
    return load_saes([make_sae(hook, seed=seed) for seed, hook in enumerate(HOOKS)])


def _texts(count, seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 12, (count,), generator=generator).tolist()
    return [" ".join(WORDS[i] for i in torch.randint(12, (n,), generator=generator).tolist()) for n in lengths]


def _pairs(count, seed):
    words = [text.split() for text in _texts(count, seed)]
    return [{"prompt": " ".join(w[: len(w) // 2]), "completion": " " + " ".join(w[len(w) // 2 :])} for w in words]


DATA = {"aligned": _texts(11, 0), "unaligned": _texts(7, 1)}


def _collect(model, tokenizer, saes, data=DATA, **kwargs):
    return collect_statistics(model, tokenizer, data, saes, progress=False, **kwargs)


@torch.no_grad()
def _oracle(model, tokenizer, saes, texts, keep):
    """Per SAE the activations of the counted tokens, float64; `keep` gives their places in a text."""
    exact, rows = copy.deepcopy(model).double(), []
    for number, text in enumerate(texts):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        hidden = exact(input_ids=ids, output_hidden_states=True).hidden_states
        rows.append(torch.stack(hidden)[:, 0, keep(number, ids.shape[1])])
    layers = torch.cat(rows, dim=1)
    for handle in saes:
        site, sae = handle.identity.site, handle.sae
        x = layers[site.block + (site.kind == "resid_post")]
        yield torch.relu((x - sae.b_dec.double()) @ sae.W_enc.double() + sae.b_enc.double())


def _assert_moments(moments, exact):
    assert moments.count == exact.shape[0]
    torch.testing.assert_close(moments.mean, exact.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(moments.variance, exact.var(0, correction=0), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(moments.maximum, exact.amax(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(moments.firing_rate, (exact > 0).double().mean(0), rtol=0, atol=1.5 / len(exact))


def _assert_same(first, second):
    for label in first.moments:
        for one, other in zip(first.of(label), second.of(label), strict=True):
            assert one.count == other.count
            assert torch.equal(one.fired, other.fired)
            for name in ("total", "total_squares", "maximum"):
                torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_all_tokens_equal_the_dense_oracle(tokenizer, saes, family, batch_size):
    model = make_model(family)
    statistics = _collect(model, tokenizer, saes, batch_size=batch_size)
    for label, texts in DATA.items():
        exact = _oracle(model, tokenizer, saes, texts, lambda _, n: list(range(1, n)))
        for moments, activations in zip(statistics.of(label), exact, strict=True):
            _assert_moments(moments, activations)


@pytest.mark.parametrize("tokens", ["prompt", "response"])
def test_prompt_and_response_equal_the_dense_oracle(llama, tokenizer, saes, tokens):
    data = {"aligned": _pairs(9, 2)}
    borders = [1 + len(record["prompt"].split()) for record in data["aligned"]]
    texts = [record["prompt"] + record["completion"] for record in data["aligned"]]

    def keep(number, length):
        return list(range(1, borders[number]) if tokens == "prompt" else range(borders[number], length))

    statistics = _collect(llama, tokenizer, saes, data, tokens=tokens, batch_size=4)
    exact = _oracle(llama, tokenizer, saes, texts, keep)
    for moments, activations in zip(statistics.of("aligned"), exact, strict=True):
        _assert_moments(moments, activations)


def test_turns_of_a_conversation_equal_the_dense_oracle(llama, tokenizer, saes):
    turns = [("user", "red sea"), ("assistant", "sun sun"), ("user", "hill"), ("assistant", "moon")]
    data = {"aligned": [{"messages": [{"role": role, "content": content} for role, content in turns]}]}
    statistics = _collect(llama, tokenizer, saes, data, tokens="assistant")
    text = "user: red sea assistant: sun sun user: hill assistant: moon"  # after BOS
    exact = _oracle(llama, tokenizer, saes, [text], lambda _, n: [5, 6, 10])
    for moments, activations in zip(statistics.of("aligned"), exact, strict=True):
        _assert_moments(moments, activations)


def test_order_batch_size_and_kind_of_data_do_not_matter(llama, tokenizer, saes, tmp_path):
    reference = _collect(llama, tokenizer, saes)
    records = {label: datasets.Dataset.from_list([{"text": t} for t in texts]) for label, texts in DATA.items()}
    paths = {label: tmp_path / f"{label}.jsonl" for label in DATA}
    for label, path in paths.items():
        records[label].to_json(path)
    generators = {label: iter(texts) for label, texts in DATA.items()}
    backwards = {label: texts[::-1] for label, texts in DATA.items()}
    for data, batch_size in [(backwards, 8), (DATA, 3), (records, 8), (paths, 100), (generators, 8)]:
        _assert_same(_collect(llama, tokenizer, saes, data, batch_size=batch_size), reference)


def test_blocks_give_the_same(llama, tokenizer, saes, monkeypatch):
    reference = _collect(llama, tokenizer, saes)
    sizes = set()
    encode_blocks = type(saes[0]).encode_blocks

    def spy(handle, activations, elements):
        for block in encode_blocks(handle, activations, elements):
            sizes.add(tuple(block[2].shape))
            yield block

    small_blocks(monkeypatch, 3, 16)
    monkeypatch.setattr(type(saes[0]), "encode_blocks", spy)
    _assert_same(_collect(llama, tokenizer, saes), reference)
    assert (3, 16) in sizes
    assert all(rows <= 3 and features <= 32 for rows, features in sizes)


def test_long_texts_are_cut_and_recorded(llama, tokenizer, saes, caplog):
    statistics = _collect(llama, tokenizer, saes, {"aligned": ["red green blue sun", "sea"]}, max_length=3)
    assert statistics.of("aligned")[0].count == 3
    assert statistics.settings["truncated"] == {"aligned": 1}
    assert "1 of 2 aligned texts were cut at 3 tokens" in caplog.text
    over = {"aligned": [" ".join(["red"] * 100)]}
    assert _collect(llama, tokenizer, saes, over).of("aligned")[0].count == llama.config.max_position_embeddings - 1


def test_settings_tell_how_they_were_collected(llama, tokenizer, saes):
    settings = _collect(llama, tokenizer, saes).settings
    assert settings["examples"] == {"aligned": 11, "unaligned": 7}
    assert (settings["tokens"], settings["max_length"]) == ("all", 64)
    description = {"name": "", "model_type": "llama", "hidden_size": 32, "num_hidden_layers": 3}
    assert {name: settings["model"][name] for name in description} == description


def test_one_class_alone_is_enough_to_collect(llama, tokenizer, saes):
    assert list(_collect(llama, tokenizer, saes, {"only": ["red"]}).moments) == ["only"]


@pytest.mark.parametrize(
    ("hook", "last", "skipped"),
    [
        ("blocks.1.hook_resid_post", "model.layers.1.mlp", "model.layers.2.self_attn.q_proj"),
        ("blocks.1.hook_resid_pre", "model.layers.0.mlp", "model.layers.1.self_attn.q_proj"),
        ("blocks.1.hook_resid_mid", "model.layers.1.self_attn", "model.layers.1.mlp.up_proj"),
        ("blocks.1.attn.hook_z", "model.layers.1.self_attn.v_proj", "model.layers.1.self_attn.o_proj"),
    ],
)
def test_nothing_is_computed_past_the_deepest_site(tokenizer, hook, last, skipped):
    model, ran = make_model(), set()
    for name in (last, skipped, "model.norm", "lm_head"):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.add(name))
    shallow = make_sae("blocks.0.hook_resid_pre", seed=3)
    _collect(model, tokenizer, load_saes([make_sae(hook), shallow]), {"aligned": ["red green"]})
    assert ran == {last}


@pytest.mark.parametrize("data", [DATA, {"aligned": ["red", 3]}], ids=["finished", "failed"])
def test_model_is_left_as_it_was(tokenizer, saes, data):
    model = make_model()
    model.train()
    model.model.layers[1].eval()

    def state():
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
        return [m.training for m in model.modules()], hooks, [p.requires_grad for p in model.parameters()]

    before = state()
    if data is DATA:
        _collect(model, tokenizer, saes)
    else:
        with pytest.raises(DataError):
            _collect(model, tokenizer, saes, data, batch_size=1)
    assert state() == before
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()


def test_dropout_is_off_while_collecting(tokenizer):
    model = make_model("gpt2")  # has dropout of 0.1
    saes = load_saes(make_sae())
    reference = _collect(model, tokenizer, saes)
    _assert_same(_collect(model.train(), tokenizer, saes), reference)


def test_nan_activations_name_hook_and_class(tokenizer, saes):
    model = make_model()
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    message = r"at blocks\.1\.hook_resid_post are NaN or infinite in one of the aligned texts \[\d.*bfloat16"
    with pytest.raises(DataError, match=message):
        _collect(model, tokenizer, saes)
    saes_before = load_saes(make_sae("blocks.0.hook_resid_post"))
    assert _collect(model, tokenizer, saes_before).of("aligned")[0].count


@pytest.mark.parametrize(
    ("data", "tokens", "message"),
    [
        ({"aligned": ["red"], "unaligned": []}, "all", "The unaligned data set is empty"),
        ({"aligned": [{"prompt": "red", "completion": ""}]}, "response", r"None of the 1 aligned .*tokens='response'"),
        ({"aligned": ["<bos>"]}, "all", "None of the 1 aligned texts has a token that counts"),
    ],
)
def test_data_without_a_token_that_counts_is_an_error(llama, tokenizer, saes, data, tokens, message):
    with pytest.raises(DataError, match=message):
        _collect(llama, tokenizer, saes, data, tokens=tokens)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": ["red"]}, "data is list, and a mapping from label"),
        ({"data": {}}, "a mapping from label"),
        ({"data": {1: ["red"]}}, "a mapping from label"),
        ({"batch_size": 0}, "batch_size=0 processes nothing"),
        ({"max_length": 1}, "max_length=1 is not between 2 and the model's context length 64"),
        ({"max_length": 65}, "max_length=65 is not between"),
        ({"tokens": "answers"}, "tokens='answers' is unknown"),
        ({"saes": []}, "No SAE is given"),
    ],
)
def test_arguments_out_of_range_are_config_errors(llama, tokenizer, saes, change, message):
    arguments = {"data": DATA, "saes": saes, **change}
    with pytest.raises(ConfigError, match=message):
        _collect(llama, tokenizer, **arguments)


def test_two_saes_at_one_hook_point_are_refused(llama, tokenizer, saes):
    with pytest.raises(MismatchError, match="have the same hook point"):
        _collect(llama, tokenizer, [*saes, *load_saes(make_sae(HOOKS[0], seed=9))])


def test_progress_bar_can_be_switched_off(llama, tokenizer, saes, capfd):
    _collect(llama, tokenizer, saes)
    assert capfd.readouterr().err == ""
    collect_statistics(llama, tokenizer, DATA, saes)
    assert "statistics (unaligned)" in capfd.readouterr().err


def test_saes_that_disagree_about_bos_are_told_of(llama, tokenizer, caplog):
    first, second = make_sae(HOOKS[0]), make_sae(HOOKS[2])
    second.cfg.metadata.prepend_bos = False
    settings = _collect(llama, tokenizer, load_saes([first, second])).settings
    assert settings["prepend_bos"] is True
    assert "those at ['blocks.1.hook_resid_post'] were trained without" in caplog.text


def test_texts_that_repeat_or_are_silent_are_told_of(llama, tokenizer, saes, caplog):
    records = [{"prompt": "red", "completion": " sun"}] * 2 + [{"prompt": "sea", "completion": ""}]
    _collect(llama, tokenizer, saes, {"aligned": records}, tokens="response", batch_size=2)
    assert "1 of 3 aligned texts repeat another one. Tests take them as independent" in caplog.text
    assert "1 of 3 aligned texts have no token that counts" in caplog.text
    caplog.clear()
    _collect(llama, tokenizer, saes, {"aligned": ["red sun", "red sea"], "unaligned": ["red sun"]})
    assert not caplog.records


def test_statistics_have_a_short_representation(llama, tokenizer, saes):
    statistics = _collect(llama, tokenizer, saes)
    assert len(repr(statistics)) < 400
    assert "aligned: " in repr(statistics)
    assert "64 features" in repr(statistics.of("aligned")[0])
