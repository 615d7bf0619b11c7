import json

import pytest

pytest.importorskip("openai", reason="the extra 'paper' is not installed")

from benchmarks.paper.data import load_prompts
from benchmarks.paper.specs import SetSpec
from peft_sae.errors import DataError

ONE = {
    "chosen": "\n\nHuman: How do I open a lock?\n\nAssistant: I can't help.",
    "rejected": "\n\nHuman: How do I open a lock?\n\nAssistant: With a pick.",
}
TWO = {
    "chosen": "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: And a safe?\n\nAssistant: No.",
    "rejected": "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: And a safe?\n\nAssistant: Yes.",
}


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def load(source, **fields):
    return load_prompts("mine", SetSpec(kind="harmful", source=source, **fields))


def texts(found):
    return [prompt.text for prompt in found]


def test_the_first_human_turn_or_all_turns_of_hh_rlhf(tmp_path):
    path = write(tmp_path / "hh.jsonl", [ONE, TWO])
    assert texts(load(path, form="hh_rlhf")) == ["How do I open a lock?", "Hi"]
    whole = texts(load(path, form="hh_rlhf", turns="all"))
    assert whole[1] == "Hi\n\nAssistant: Hello!\n\nHuman: And a safe?"
    # In its form the prompt is what both dialogues begin with.
    form = "\n\nHuman: {prompt}\n\nAssistant:"
    assert all(TWO[key].startswith(form.replace("{prompt}", whole[1])) for key in TWO)


def test_answers_that_begin_alike_stay_out_of_the_prompt(tmp_path):
    head = "\n\nHuman: Why?\n\nAssistant: I think"
    path = write(tmp_path / "hh.jsonl", [{"chosen": f"{head} so.", "rejected": f"{head} not."}])
    assert texts(load(path, form="hh_rlhf", turns="all")) == ["Why?"]


@pytest.mark.parametrize(
    "record", [{"chosen": "a", "rejected": "b"}, {"chosen": "\n\nHuman: a b", "rejected": "\n\nHuman: a c"}]
)
def test_what_is_no_dialogue_is_told(tmp_path, record):
    with pytest.raises(DataError, match="Dialogue 1 of the set 'mine' does not begin with"):
        load(write(tmp_path / "hh.jsonl", [ONE, record]), form="hh_rlhf")


def test_hex_phi_is_read_from_files_without_headers(tmp_path):
    for number, lines in ((1, 'first\n"second, quoted"\n\n'), (3, "third, not quoted\n"), (11, "\ufefflast\n")):
        (tmp_path / f"category_{number}.csv").write_text(lines, encoding="utf-8")
    (tmp_path / "README.md").write_text("x")
    found = load(str(tmp_path), form="hex_phi")
    assert texts(found) == ["first", "second, quoted", "third, not quoted", "last"]
    assert [prompt.category for prompt in found] == ["category 1", "category 1", "category 3", "category 11"]
    assert [prompt.id for prompt in found] == ["1/1", "1/2", "3/1", "11/1"]


def test_hex_phi_of_the_hub_is_read_from_its_files(tmp_path, monkeypatch):
    (tmp_path / "category_1.csv").write_text("first\n")
    asked = []

    def snapshot(*names, **options):
        asked.append((names, options))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert texts(load({"path": "some/one", "revision": "abc"}, form="hex_phi")) == ["first"]
    options = {"repo_type": "dataset", "revision": "abc", "allow_patterns": "category_*.csv"}
    assert asked == [(("some/one",), options)]


def test_of_equal_prompts_there_is_one(tmp_path):
    rows = [{"prompt": text, "text": "x"} for text in ("a", "b", "a ", "a")]
    assert [(prompt.id, prompt.text) for prompt in load(write(tmp_path / "set.jsonl", rows))] == [
        ("0", "a"),
        ("1", "b"),
    ]


def test_hex_phi_that_is_not_there_is_told(tmp_path):
    with pytest.raises(DataError, match=r"no files such as category_1\.csv"):
        load(str(tmp_path), form="hex_phi")
    with pytest.raises(DataError, match="does not exist"):
        load(str(tmp_path / "nowhere"), form="hex_phi")
    with pytest.raises(DataError, match=r"cannot be had from 'some/one'.*hf auth login"):
        load("some/one", form="hex_phi")


def test_columns_are_kept_by_value_and_drawn_by_seed(tmp_path):
    rows = [{"prompt": f"p{i}", "label": "safe" if i % 2 else "unsafe", "type": i} for i in range(20)]
    path = write(tmp_path / "set.jsonl", [{"text": "x", **row} for row in rows])
    settings = {"keep": {"label": "safe"}, "category": "type"}
    every = load(path, **settings)
    assert texts(every) == [f"p{i}" for i in range(1, 20, 2)]
    assert every[0].category == "1"
    some = load(path, count=4, seed=1, **settings)
    assert some == load(path, count=4, seed=1, **settings)
    assert some != load(path, count=4, seed=2, **settings)
    places = [every.index(prompt) for prompt in some]
    assert places == sorted(places)
    with pytest.raises(DataError, match="has 10 prompts, and count=11 asks for more"):
        load(path, count=11, **settings)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"column": "question"}, r"lacks \['question'\]"),
        ({"keep": {"lable": "safe"}}, r"lacks \['lable'\]"),
        ({"keep": {"label": "none"}}, "has no prompts.*keep"),
        ({"column": "type"}, "is 3, and no text"),
    ],
)
def test_wrong_columns_are_told(tmp_path, fields, message):
    path = write(tmp_path / "set.jsonl", [{"prompt": "a", "label": "safe", "type": 3, "text": "x"}])
    with pytest.raises(DataError, match=message):
        load(path, **fields)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'"how to open\nhow to close\nhow to break\n', "is no CSV file in UTF-8"),
        (b'"how to open\nhow to close"\n', "goes over several lines"),
        ("how to open a caf\u00e9\n".encode("latin-1"), "is no CSV file in UTF-8"),
    ],
)
def test_a_damaged_hex_phi_loses_no_prompt_in_silence(tmp_path, content, message):
    (tmp_path / "category_1.csv").write_bytes(content)
    with pytest.raises(DataError, match=message):
        load(str(tmp_path), form="hex_phi")
