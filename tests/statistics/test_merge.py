"""Statistics of shards together are those of one pass."""

import dataclasses
import re

import pytest
import torch

from peft_sae.errors import MismatchError
from peft_sae.statistics import Measures
from peft_sae.statistics.parts import PARTS, ExampleSample
from tests.tiny import make_model

from .dense import HOOKS, assert_same_sums, collect, double_saes, make_texts

ALL = Measures(histograms=True, covariance=True, top_examples=3, sample=40)
TEXTS = {"aligned": make_texts(21, 0), "unaligned": make_texts(10, 1)}
SHARDS = [
    {"aligned": TEXTS["aligned"][:5], "unaligned": TEXTS["unaligned"][:9]},
    {"aligned": TEXTS["aligned"][5:6], "unaligned": TEXTS["unaligned"][9:]},
    {"aligned": TEXTS["aligned"][6:]},
]


@pytest.fixture(scope="module")
def shards(model, tokenizer, saes):
    return [collect(model, tokenizer, data, saes, measures=ALL, max_length=9) for data in SHARDS]


def _drop_top(statistics):
    """The same without top examples: texts that begin alike tie to rounding."""
    moments = {
        label: tuple(dataclasses.replace(moment, top=None) for moment in found)
        for label, found in statistics.moments.items()
    }
    return dataclasses.replace(statistics, moments=moments)


@pytest.mark.parametrize("pooling", ["token", "mean"])
def test_shards_give_the_statistics_of_one_pass(model, tokenizer, saes, pooling):
    options = {"measures": ALL, "max_length": 9, "pooling": pooling}
    whole = collect(model, tokenizer, TEXTS, saes, **options)
    first, *others = [collect(model, tokenizer, data, saes, **options) for data in SHARDS]
    merged = first.merge(*others)
    assert_same_sums(_drop_top(merged), _drop_top(whole))
    for label in TEXTS:
        for one, other in zip(merged.of(label), whole.of(label), strict=True):
            torch.testing.assert_close(one.top.values, other.top.values, rtol=1e-6, atol=0)
    for name in ("examples", "truncated", "tokens", "pooling", "model", "max_length", "quantity"):
        assert merged.settings[name] == whole.settings[name], name
    assert merged.settings["truncated"]["aligned"] > 0
    assert merged.saes == whole.saes


def test_places_of_examples_are_counted_on(model, tokenizer, saes, shards):
    merged = shards[0].merge(*shards[1:])
    exact = model
    for moments, handle in zip(merged.of("aligned"), saes, strict=True):
        assert set(moments.sample.examples.tolist()) == set(range(21))
        for example, position, value in zip(
            moments.top.examples[:9, 0].tolist(),
            moments.top.positions[:9, 0].tolist(),
            moments.top.values[:9, 0],
            strict=True,
        ):
            if example < 0:
                continue
            feature = int((moments.top.values[:, 0] == value).nonzero()[0])
            ids = torch.tensor([tokenizer(TEXTS["aligned"][example])["input_ids"][:9]])
            with torch.no_grad():
                states = exact(input_ids=ids, output_hidden_states=True).hidden_states
            block = handle.identity.site.block + (handle.identity.site.kind == "resid_post")
            features = handle.encode(states[block][0])
            assert features[position, feature].item() == pytest.approx(value.item(), rel=1e-6)


def test_merging_depends_on_no_grouping(shards):
    one, two, three = shards
    assert_same_sums(one.merge(two, three), one.merge(two).merge(three))
    assert_same_sums(one.merge(two.merge(three)), one.merge(two, three))


def test_merging_changes_none_of_its_arguments(shards):
    before = [{name: tensor.clone() for name, tensor in shard.to_tensors()[0].items()} for shard in shards]
    settings = [str(shard.settings) for shard in shards]
    shards[0].merge(*shards[1:])
    for shard, tensors in zip(shards, before, strict=True):
        for name, tensor in shard.to_tensors()[0].items():
            assert torch.equal(tensor, tensors[name]), name
    assert [str(shard.settings) for shard in shards] == settings


def test_merged_statistics_survive_a_file(shards, tmp_path):
    merged = shards[0].merge(*shards[1:])
    merged.save_pretrained(tmp_path / "merged")
    read = type(merged).from_pretrained(tmp_path / "merged")
    assert_same_sums(read, merged, rtol=0)
    assert read.settings == merged.settings


def test_a_class_of_one_shard_alone_is_kept(model, tokenizer, saes, shards):
    other = collect(model, tokenizer, {"third": ["red sea"]}, saes, measures=ALL, max_length=9)
    merged = shards[0].merge(other)
    assert list(merged.moments) == ["aligned", "unaligned", "third"]
    assert merged.of("third")[0].sample.examples.tolist() == [0]
    assert merged.settings["examples"] == {"aligned": 5, "unaligned": 9, "third": 1}
    assert set(merged.settings["data"]) == {"aligned", "unaligned", "third"}


@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_one_shard_lacks_is_left_out(shards, part):
    bare = dataclasses.replace(
        shards[1],
        moments={
            label: tuple(dataclasses.replace(moment, **{part: None}) for moment in found)
            for label, found in shards[1].moments.items()
        },
    )
    for merged in (shards[0].merge(bare), bare.merge(shards[0])):
        for moments in merged.of("aligned"):
            assert [name for name in PARTS if getattr(moments, name) is None] == [part]


def test_parts_of_two_sizes_keep_what_is_known_of_both(model, tokenizer, saes):
    data = {"a": TEXTS["aligned"]}
    wide, narrow = (
        collect(model, tokenizer, data, saes, measures=Measures(top_examples=number, sample=number))
        for number in (5, 2)
    )
    for merged in (wide.merge(narrow), narrow.merge(wide)):
        for moments in merged.of("a"):
            assert moments.top.values.shape[1] == 2
            assert (moments.sample.limit, len(moments.sample.examples)) == (2, 2)


def test_sample_of_merged_shards_prefers_none_of_them():
    shards = [ExampleSample.of(torch.ones(2000, 1), torch.arange(2000), 40) for _ in range(2)]
    merged = shards[0] + shards[1].shifted(2000)
    first = (merged.examples < 2000).sum().item()
    assert 8 <= first <= 32


def test_other_saes_cannot_be_merged(model, tokenizer, saes, shards):
    backwards = collect(model, tokenizer, SHARDS[1], saes[::-1], measures=ALL, max_length=9)
    fewer = collect(model, tokenizer, SHARDS[1], saes[:1], measures=ALL, max_length=9)
    others = collect(model, tokenizer, SHARDS[1], double_saes(HOOKS[::-1]), measures=ALL, max_length=9)
    for other in (backwards, fewer, others):
        with pytest.raises(MismatchError, match=r"cannot be merged: their features .*differ.*same SAEs"):
            shards[0].merge(other)


@pytest.mark.parametrize(
    ("change", "name"),
    [({"pooling": "max"}, "pooling"), ({"max_length": 8}, "max_length"), ({"tokens": "response"}, "tokens")],
)
def test_other_settings_cannot_be_merged(model, tokenizer, saes, shards, change, name):
    data = {"aligned": [{"prompt": "red", "completion": " sea"}]}
    other = collect(model, tokenizer, data, saes, **{"measures": ALL, "max_length": 9, **change})
    ours, theirs = shards[0].settings[name], change[name]
    with pytest.raises(MismatchError, match=re.escape(f"{{{name!r}: ({ours!r}, {theirs!r})}}")):
        shards[0].merge(other)


def test_another_model_cannot_be_merged(tokenizer, saes, shards):
    other = collect(make_model("qwen2").double(), tokenizer, SHARDS[1], saes, measures=ALL, max_length=9)
    with pytest.raises(MismatchError, match=r"'model': \(.*llama.*qwen2"):
        shards[0].merge(other)
