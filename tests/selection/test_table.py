from dataclasses import replace

import pytest
import torch

from peft_sae.errors import ConfigError, DataError, MismatchError
from peft_sae.selection import FeatureExample, describe_features
from peft_sae.selection.tokens import token_effects
from peft_sae.statistics import FeatureMoments, FeatureStatistics
from peft_sae.statistics.parts import TopExamples
from tests.selection.conftest import DATA, HOOKS
from tests.tiny import WORDS, make_tokenizer


def test_the_numbers_are_those_of_the_selection(selection, table):
    assert [row.hook_name for row in table.rows] == [hook for hook in HOOKS for _ in range(5)]
    assert [row.rank for row in table.rows] == [1, 2, 3, 4, 5] * 2
    assert [row.block for row in table.rows] == [0] * 5 + [2] * 5
    names = {
        "feature": "features",
        "score": "scores",
        "q_value": "q_values",
        "aligned_mean": "aligned_means",
        "unaligned_mean": "unaligned_means",
        "aligned_rate": "aligned_rates",
        "unaligned_rate": "unaligned_rates",
    }
    for name, source in names.items():
        expected = [value for site in selection.sites for value in getattr(site, source).tolist()]
        assert [getattr(row, name) for row in table.rows] == expected
    first = table.rows[0]
    assert first.name == f"{HOOKS[0]}:{first.feature}"
    assert first.neuronpedia == f"https://www.neuronpedia.org/m/0-res/{first.feature}"
    assert table.settings["selector"] == "mean_difference"
    assert table.settings["statistics"]["examples"] == {"aligned": 6, "unaligned": 6}
    assert "torch" in table.settings["versions"]


def test_the_tokens_are_those_of_the_decoder_rows(table, saes, model, tokenizer):
    for row in table.rows:
        (handle,) = [one for one in saes if one.identity.hook_name == row.hook_name]
        effects = token_effects(handle.decoder[[row.feature]], model, tokenizer, "resid_post", count=3)
        assert (row.promoted, row.suppressed) == (effects.promoted[0], effects.suppressed[0])
        assert len(set(row.promoted) | set(row.suppressed)) == 6


@torch.no_grad()
def _peak(text, row, handle, model, tokenizer):
    """Activation and place of the word at which a feature is most active in a text."""
    found = []
    hook = model.model.layers[row.block].register_forward_hook(lambda _, __, output: found.append(output))
    model(tokenizer(text, return_tensors="pt").input_ids)
    hook.remove()
    hidden = found[0].reshape(-1, found[0].shape[-1])
    values = handle.encode(hidden)[1:, row.feature]  # BOS does not count
    return float(values.max()), int(values.argmax())


def test_the_texts_are_those_that_activate_most(table, saes, model, tokenizer):
    for row in table.rows:
        (handle,) = [one for one in saes if one.identity.hook_name == row.hook_name]
        assert [example.label for example in row.examples] == sorted(example.label for example in row.examples)
        for label, texts in DATA.items():
            peaks = [_peak(text, row, handle, model, tokenizer) for text in texts]
            # Texts with the same first word tie there, but for rounding.
            best = sorted(range(6), key=lambda number: (-round(peaks[number][0], 5), number))[:2]
            shown = [example for example in row.examples if example.label == label]
            assert sorted(example.number for example in shown) == sorted(n for n in best if peaks[n][0] > 0)
            assert shown == sorted(shown, key=lambda example: -example.activation)
            for example in shown:
                words, (value, place) = texts[example.number].split(), peaks[example.number]
                assert example.activation == pytest.approx(value, rel=1e-4)
                assert example.token == words[place]
                assert example.before.lstrip("…").split() == words[max(0, place - 12) : place]
                assert example.after.rstrip("…").split() == words[place + 1 : place + 13]
                assert example.before.startswith("…") == (place > 12)
                assert example.after.endswith("…") == (place + 13 < len(words))
    assert any(example.before.startswith("…") for row in table.rows for example in row.examples)


def test_data_are_read_once_and_only_what_is_needed_is_tokenised(selection, statistics, tokenizer, monkeypatch):
    from peft_sae.statistics.data import ExampleReader

    read, tokenise = [], ExampleReader.read
    monkeypatch.setattr(ExampleReader, "read", lambda *args: read.append(args[2]) or tokenise(*args))
    rows = describe_features(
        replace(selection, sites=(selection.sites[0].subset(torch.tensor([0])),)),
        statistics=statistics,
        data={"unaligned": iter(DATA["unaligned"])},
        tokenizer=tokenizer,
    ).rows
    assert sorted(read) == sorted({example.number for example in rows[0].examples})
    assert {example.label for example in rows[0].examples} == {"unaligned"}
    assert rows[0].promoted == ()


def _by_hand(selection, position, *, quantity="activation", examples=1, prepend_bos=True, text_tokens="all"):
    """A selection of one feature and statistics that say where in the first text it is most active."""
    site = selection.sites[0].subset(torch.tensor([0]))
    top = TopExamples.empty(64, 1)
    feature = int(site.features[0])
    top.values[feature], top.examples[feature], top.positions[feature] = 2.5, 0, position
    moments = replace(FeatureMoments.of(torch.ones(2, 64)), top=top)
    settings = {"tokens": text_tokens, "max_length": 40, "prepend_bos": prepend_bos, "quantity": quantity}
    settings["examples"] = {"aligned": examples}
    return replace(selection, sites=(site,)), FeatureStatistics((site.sae,), {"aligned": (moments,)}, settings)


@pytest.mark.parametrize("position", range(1, 9))
def test_a_character_of_several_tokens_is_shown_whole(selection, position):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend = Tokenizer(models.BPE({char: place for place, char in enumerate(sorted(alphabet))}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.add_special_tokens(["<bos>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>")
    chosen, statistics = _by_hand(selection, position)
    text = "aé😀b"  # 1, 2, 4 and 1 bytes behind BOS

    (row,) = describe_features(chosen, statistics=statistics, data={"aligned": [text]}, tokenizer=tokenizer).rows

    place = [0, 1, 1, 2, 2, 2, 2, 3][position - 1]
    assert row.examples == (FeatureExample("aligned", 0, 2.5, text[:place], text[place], text[place + 1 :]),)


def test_what_the_tokenizer_adds_is_not_shown(selection):
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    words = (WORDS * 3)[:30]
    chosen, statistics = _by_hand(selection, 30)
    data = {"aligned": [" ".join(words)]}
    (row,) = describe_features(chosen, statistics=statistics, data=data, tokenizer=tokenizer).rows

    (example,) = row.examples
    assert (example.before, example.token, example.after) == (f"…{' '.join(words[17:29])} ", words[29], "")


@pytest.mark.parametrize(
    ("position", "data", "message"),
    [
        (3, ["red green"], "no token at place 3 that counts, so these are not the data"),
        (0, ["red green"], "no token at place 0 that counts"),
        (1, [], "has 0 examples instead of 1"),
        (1, ["red", "green"], "has 2 examples instead of 1"),
        (1, [{"txt": "red"}], "In the aligned data: Example 0 has"),
        (1, "nowhere.jsonl", "'nowhere.jsonl' cannot be opened"),
    ],
)
def test_other_data_are_noticed(selection, tokenizer, position, data, message):
    chosen, statistics = _by_hand(selection, position)
    with pytest.raises(DataError, match=message):
        describe_features(chosen, statistics=statistics, data={"aligned": data}, tokenizer=tokenizer)


def test_only_tokens_that_were_observed_can_be_shown(selection, tokenizer):
    record = {"prompt": "red green", "completion": " sun"}
    for quantity, fails in (("activation", True), ("attribution", False)):
        chosen, statistics = _by_hand(selection, 1, quantity=quantity, text_tokens="response")
        arguments = {"statistics": statistics, "data": {"aligned": [record]}, "tokenizer": tokenizer}
        if fails:
            with pytest.raises(DataError, match="no token at place 1 that counts"):
                describe_features(chosen, **arguments)
        else:
            (example,) = describe_features(chosen, **arguments).rows[0].examples
            assert (example.before, example.token, example.after) == ("", "red", " green sun")


def test_what_does_not_go_together_is_refused(selection, statistics, tokenizer, saes, model):
    bare = replace(statistics, moments={k: tuple(m.without_parts() for m in v) for k, v in statistics.moments.items()})
    with pytest.raises(ConfigError, match=r"Measures\(top_examples=3\), or leave out `data`") as caught:
        describe_features(selection, statistics=bare, data=DATA, tokenizer=tokenizer)
    assert "measures=" in str(caught.value)
    with pytest.raises(ConfigError, match=r"with tokenizer=\.\.\. Give all three"):
        describe_features(selection, statistics=statistics, data=DATA)
    with pytest.raises(ConfigError, match="data is list, and a mapping"):
        describe_features(selection, statistics=statistics, data=DATA["aligned"], tokenizer=tokenizer)
    with pytest.raises(ConfigError, match=r"\['examples', 'max_length'"):
        describe_features(selection, statistics=replace(statistics, settings={}), data=DATA, tokenizer=tokenizer)
    with pytest.raises(ConfigError, match="top_tokens=-1 is no number"):
        describe_features(selection, top_tokens=-1)
    with pytest.raises(DataError, match="no class 'good'"):
        describe_features(selection, statistics=statistics, data={"good": []}, tokenizer=tokenizer)
    with pytest.raises(MismatchError, match="which is not among the given ones"):
        describe_features(selection, saes=saes[:1], model=model, tokenizer=tokenizer)
    other = _by_hand(selection, 1)[1]
    with pytest.raises(MismatchError, match="Give the statistics that it was made from"):
        describe_features(selection, statistics=other, data={"aligned": []}, tokenizer=tokenizer)


def test_labels_are_found_by_every_kind_of_name(selection, caplog):
    first, second = (site.features.tolist() for site in selection.sites)
    labels = {
        f"0:{first[0]}": "by block",
        f"{HOOKS[0]}:{first[1]}": "by hook point",
        f"m/1-res:{second[0]}": "by source",
        f"0:{first[1]}": "by block, so weaker",
        "7:3": "of another block",
        "other/1-res:3": "of another model",
    }
    rows = describe_features(selection, labels=labels).rows
    found = {row.name: row.label for row in rows if row.label}
    assert found == {
        f"{HOOKS[0]}:{first[0]}": "by block",
        f"{HOOKS[0]}:{first[1]}": "by hook point",
        f"{HOOKS[1]}:{second[0]}": "by source",
    }
    assert caplog.text == ""
    assert not any(row.label for row in describe_features(selection, labels={"7:3": "x"}).rows)
    assert "None of the 1 labels is of a chosen feature" in caplog.text
    describe_features(selection, labels={"0:64": "x"})
    assert "names feature 64, and the SAE" in caplog.text
