"""Which tokens count. Ids: 0 pad, 1 bos, 2 eos, 3 unk, 4 red, 5 green, 6 blue, 7 sun, 8 moon, 9 sea, 10 hill, ..."""

import datasets
import pytest
import torch
from tokenizers import processors

from peft_sae.errors import ConfigError, DataError
from peft_sae.statistics.batches import iterate_batches
from peft_sae.statistics.data import Example, ExampleReader
from peft_sae.statistics.records import check_data, iterate_records, split_preferences
from tests.tiny import make_tokenizer

USER, ASSISTANT = 16, 17
CHAT = [
    {"role": "user", "content": "red green"},
    {"role": "assistant", "content": "sun"},
    {"role": "user", "content": "sea"},
    {"role": "assistant", "content": "moon moon"},
]
CHAT_IDS = [1, USER, 4, 5, ASSISTANT, 7, USER, 9, ASSISTANT, 8, 8]


def _reader(tokens="all", *, tokenizer=None, max_length=64, prepend_bos=False):
    return ExampleReader(tokenizer or make_tokenizer(), tokens=tokens, max_length=max_length, prepend_bos=prepend_bos)


def _places(example):
    return [place for place, counts in enumerate(example.counted) if counts]


@pytest.mark.parametrize("record", ["red green blue", {"text": "red green blue"}, {"text": "red green blue", "id": 3}])
def test_plain_text_counts_all_but_bos(record):
    mask = [False, True, True, True]
    assert _reader().read(record, 5) == Example([1, 4, 5, 6], mask, mask, number=5)


@pytest.mark.parametrize(("tokens", "places"), [("all", [1, 2, 3, 4]), ("prompt", [1, 2]), ("response", [3, 4])])
def test_prompt_and_completion_are_told_apart(tokens, places):
    example = _reader(tokens).read({"prompt": "red green", "completion": " sun moon"}, 0)
    assert example.ids == [1, 4, 5, 7, 8]
    assert _places(example) == places


@pytest.mark.parametrize("form", ["messages", "prompt and completion"])
@pytest.mark.parametrize(
    ("tokens", "places"),
    [
        ("all", list(range(1, 11))),
        ("prompt", list(range(1, 9))),
        ("response", [9, 10]),
        ("assistant", [5, 9, 10]),
    ],
)
def test_turns_of_a_conversation_are_told_apart(form, tokens, places):
    record = {"messages": CHAT} if form == "messages" else {"prompt": CHAT[:3], "completion": CHAT[3:]}
    example = _reader(tokens).read(record, 0)
    assert example.ids == CHAT_IDS
    assert _places(example) == places


def test_token_across_the_border_belongs_to_the_response():
    tokenizer = make_tokenizer()
    example = _reader("response", tokenizer=tokenizer).read({"prompt": "red s", "completion": "un moon"}, 0)
    assert (example.ids, _places(example)) == ([1, 4, 7, 8], [2, 3])


def test_what_the_tokenizer_adds_does_not_count():
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    record = {"prompt": "red", "completion": " sun"}
    counted = {tokens: _places(_reader(tokens, tokenizer=tokenizer).read(record, 0)) for tokens in ("all", "prompt")}
    assert counted == {"all": [1, 2], "prompt": [1]}


def test_eos_in_the_text_counts_even_if_it_also_pads():
    tokenizer = make_tokenizer()
    tokenizer.pad_token = "<eos>"
    assert _places(_reader(tokenizer=tokenizer).read("red <eos>", 0)) == [1, 2]


def test_bos_is_prepended_once_where_the_sae_was_trained_with_it():
    bare = make_tokenizer()
    bare.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A")
    assert _reader(tokenizer=bare).read("red", 0).ids == [4]
    assert _reader(tokenizer=bare, prepend_bos=True).read("red", 0) == Example([1, 4], [False, True], [False, True])
    assert _reader(prepend_bos=True).read("red", 0).ids == [1, 4]


def test_long_texts_are_cut_and_counted():
    reader = _reader(max_length=3)
    assert reader.read("red green blue sun", 0) == Example(
        [1, 4, 5], [False, True, True], [False, True, True], cut=True
    )
    reader.read("red green", 1)
    assert reader.truncated == 1


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("  \n", "Example 7 is empty"),
        ({"messages": []}, "Example 7 is empty"),
        (3, "Example 7 has int, and none of the known forms"),
        ({"question": "a", "answer": "b"}, r"Example 7 has \['answer', 'question'\], and none of the known forms"),
        ({"text": None}, "none of the known forms"),
        ({"prompt": "red", "completion": None}, "prompt of type str and a completion of type NoneType"),
        ({"prompt": "red", "completion": CHAT[1:2]}, "prompt of type str and a completion of type list"),
        ({"messages": "red"}, "Example 7 has malformed messages"),
        ({"messages": [{"role": "user"}]}, "malformed messages.*'role' and 'content'"),
    ],
)
def test_malformed_records_are_data_errors(record, message):
    with pytest.raises(DataError, match=message):
        _reader().read(record, 7)


def test_plain_text_has_no_response():
    with pytest.raises(DataError, match=r"tokens='response' cannot be told apart.*tokens='all'"):
        _reader("response").read("red green", 0)


def test_conversation_needs_a_chat_template():
    with pytest.raises(DataError, match=r"no chat template.*Set `tokenizer\.chat_template`"):
        _reader(tokenizer=make_tokenizer(chat=False)).read({"messages": CHAT}, 0)


def test_template_that_refuses_a_conversation_is_a_data_error():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(DataError, match=r"Example 4 does not suit .*chat template \(System role not supported\)"):
        _reader(tokenizer=tokenizer).read({"messages": CHAT}, 4)


def test_template_that_rewrites_earlier_turns_is_a_data_error():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ messages|length }} {{ m.content }} {% endfor %}"
    with pytest.raises(DataError, match=r"changes earlier turns.*Use tokens='all'"):
        _reader("assistant", tokenizer=tokenizer).read({"messages": CHAT}, 0)
    assert _reader("all", tokenizer=tokenizer).read({"messages": CHAT}, 0).ids


def test_template_can_mark_the_assistants_tokens_itself():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{{ '<bos>' }}{% for m in messages %}{% if m.role == 'assistant' %}{% if not loop.last %}{{ 'hill ' }}{% endif "
        "%}{% generation %}{{ m.content }}{% endgeneration %}{{ ' ' }}{% else %}{{ m.content }} {% endif %}{% endfor %}"
    )
    example = _reader("assistant", tokenizer=tokenizer).read({"messages": CHAT}, 0)
    assert example.ids == [1, 4, 5, 10, 7, 9, 8, 8]
    assert _places(example) == [4, 6, 7]


def test_unknown_choice_and_slow_tokenizer_are_config_errors():
    with pytest.raises(ConfigError, match=r"tokens='answer' is unknown.*'response'"):
        _reader("answer")

    class Slow:
        is_fast = False

    with pytest.raises(ConfigError, match=r"Slow is a slow tokenizer.*use_fast=True"):
        _reader(tokenizer=Slow())


def test_data_sets_of_every_kind_give_the_same_records(tmp_path):
    records = [{"prompt": "red", "completion": " sun"}, {"prompt": "sea", "completion": " möön"}]
    path = tmp_path / "data.jsonl"
    datasets.Dataset.from_list(records).to_json(path)
    path.write_text(path.read_text() + "\n\n")
    sources = [records, (record for record in records), datasets.Dataset.from_list(records), path, str(path)]
    assert [list(iterate_records(source, "aligned")) for source in sources] == [records] * 5


def test_broken_files_are_data_errors(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "red"}\n{"text": "gre\n')
    with pytest.raises(DataError, match=r"Line 2 of '.*data\.jsonl' is not JSON"):
        list(iterate_records(path, "aligned"))
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="is not UTF-8 text"):
        list(iterate_records(path, "aligned"))
    with pytest.raises(DataError, match=r"aligned data '.*nowhere' cannot be opened \(No such file"):
        list(iterate_records(tmp_path / "nowhere", "aligned"))


def test_dictionary_of_splits_is_a_data_error():
    splits = datasets.DatasetDict(train=datasets.Dataset.from_list([{"text": "red"}]))
    with pytest.raises(DataError, match=r"aligned data is a mapping with the keys \['train'\].*one of its splits"):
        list(iterate_records(splits, "aligned"))


def test_batches_hold_every_example_once_with_little_padding():
    examples = [
        Example([1, *[4] * length], [False, *[True] * length], [False, *[True] * length], number)
        for number, length in enumerate((5, 1, 4, 2, 3))
    ]
    batches = list(iterate_batches(examples, batch_size=2, pad_id=0))
    assert [batch.ids.shape for batch in batches] == [(2, 3), (2, 5), (1, 6)]
    pairs = [pair for batch in batches for pair in zip(batch.ids, batch.attention, strict=True)]
    rows = [row[mask.bool()].tolist() for row, mask in pairs]
    assert sorted(rows) == sorted(example.ids for example in examples)
    assert [batch.numbers.tolist() for batch in batches] == [[1, 3], [4, 2], [0]]
    first = batches[0]
    assert first.ids.tolist() == [[1, 4, 0], [1, 4, 4]]
    assert first.attention.tolist() == [[1, 1, 0], [1, 1, 1]]
    assert torch.equal(first.counted, torch.tensor([[False, True, False], [False, True, True]]))


def test_batches_are_made_lazily():
    def endless():
        while True:
            yield Example([1, 4], [False, True], [False, True])

    batch = next(iterate_batches(endless(), batch_size=3, pad_id=0, pool=2))
    assert batch.ids.shape == (3, 2)


PREFERENCES = [
    ({"prompt": "red", "chosen": " sun", "rejected": " moon"}, ("red", " sun", " moon")),
    ({"chosen": "red sea sun", "rejected": "red sea moon hill"}, ("red sea", " sun", " moon hill")),
    ({"chosen": "red moonlit", "rejected": "red moon"}, ("red", " moonlit", " moon")),
    ({"chosen": "sun", "rejected": "sun"}, ("", "sun", "sun")),
    ({"chosen": CHAT[:2], "rejected": [CHAT[0], CHAT[3]]}, (CHAT[:1], CHAT[1:2], CHAT[3:])),
]


@pytest.mark.parametrize(("record", "parts"), PREFERENCES)
def test_preferences_become_two_sets_that_can_be_read_twice(record, parts):
    prompt, chosen, rejected = parts
    aligned, unaligned = split_preferences([record])
    for _ in range(2):
        assert list(aligned) == [{"prompt": prompt, "completion": chosen}]
        assert list(unaligned) == [{"prompt": prompt, "completion": rejected}]
    assert len(aligned) == 1


@pytest.mark.parametrize("record", ["red", {"chosen": "red"}, {"chosen": "red", "rejected": ["red"]}, {"text": "red"}])
def test_other_records_are_no_preferences(record):
    with pytest.raises(DataError, match=r"Example 0 has .*'chosen' and 'rejected' are needed"):
        list(split_preferences([record])[0])


def test_first_token_does_not_count_even_without_bos():
    bare = make_tokenizer()
    bare.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A")
    example = _reader(tokenizer=bare).read("red green", 0)
    assert (example.ids, example.counted) == ([4, 5], [False, True])


@pytest.mark.parametrize(
    ("last", "message"),
    [
        ('{"text": "gre', "Line 3 of .* is not JSON"),
        ('{"text": "  "}', "Record 2 of the aligned data .* is empty"),
        ('{"question": "red"}', "Record 2 of the aligned data .* has no text"),
        ("3", "Record 2 of the aligned data .* is of type int"),
    ],
)
def test_files_are_read_through_before_the_long_work(tmp_path, last, message):
    path = tmp_path / "data.jsonl"
    path.write_text(f'{{"text": "red"}}\n{{"prompt": "red", "completion": ""}}\n{last}\n')
    with pytest.raises(DataError, match=message):
        check_data(path, "aligned")
    path.write_text("\n")
    with pytest.raises(DataError, match=r"The aligned data .* is empty"):
        check_data(path, "aligned")
