import csv
import io
import json
import os
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch

from peft_sae import collect_statistics, load_saes, select_features
from peft_sae.errors import ArtifactError, ConfigError, DataError, MismatchError, SelectionError
from peft_sae.selection import FeatureExample, FeatureRow, FeatureTable, describe_features
from peft_sae.selection.tokens import token_effects
from peft_sae.statistics import FeatureMoments, FeatureStatistics
from peft_sae.statistics.measures import Measures
from peft_sae.statistics.parts import TopExamples
from tests.tiny import WORDS, make_model, make_sae, make_tokenizer

HOOKS = ("blocks.0.hook_resid_post", "blocks.2.hook_resid_post")


def _texts(seed, count=6):
    generator = torch.Generator().manual_seed(seed)
    return [
        " ".join(WORDS[index] for index in torch.randint(0, len(WORDS), (3 + 5 * number,), generator=generator))
        for number in range(count)
    ]


DATA = {"aligned": _texts(0), "unaligned": _texts(1)}


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def saes():
    return load_saes([make_sae(hook, seed=seed, neuronpedia_id=f"m/{seed}-res") for seed, hook in enumerate(HOOKS)])


@pytest.fixture(scope="module")
def statistics(model, tokenizer, saes):
    return collect_statistics(
        model, tokenizer, DATA, saes, measures=Measures(top_examples=2), batch_size=4, progress=False
    )


@pytest.fixture(scope="module")
def selection(statistics):
    return select_features(statistics, top_k=5)


@pytest.fixture(scope="module")
def table(selection, saes, model, tokenizer, statistics):
    return describe_features(
        selection, saes=saes, model=model, tokenizer=tokenizer, statistics=statistics, data=DATA, top_tokens=3
    )


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
    with pytest.raises(SelectionError, match="names feature 64, and the SAE"):
        describe_features(selection, labels={"0:64": "x"})


EVIL = [
    "<script>alert(1)</script>",
    "a|b",
    "`x`\n\n# y",
    "**z**",
    '"><img src=x onerror=alert(1)>',
    "\x1b[31m",
    "\ud800\u202e",
]


def _evil_table():
    example = FeatureExample(EVIL[0], 0, 1.0, EVIL[4] + EVIL[1], EVIL[2] + EVIL[0], EVIL[5] + EVIL[6])
    row = FeatureRow(
        *(1, 2, f"blocks.2.hook_resid_post{EVIL[4]}", EVIL[4], 7, "name", 1.5, 0.01, 1.0, 2.0, 0.1, 0.25),
        *(tuple(EVIL), tuple(EVIL), (example,)),
        neuronpedia=f"https://www.neuronpedia.org/{EVIL[4]}) <x>/7",
        label=EVIL[0] + EVIL[2],
    )
    return FeatureTable((row, replace(row, rank=2, label=None, neuronpedia=None)), {"selector": EVIL[0], "x": EVIL})


class _Page(HTMLParser):
    VOID = ("meta",)

    def __init__(self, page):
        super().__init__()
        self.tags, self.open, self.text, self.scripts = [], [], [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        (self.scripts if self.open[-1:] in (["script"], ["style"]) else self.text).append(data)


def test_html_is_well_formed_and_harmless(table):
    evil, good = _Page(_evil_table().to_html()), _Page(table.to_html())
    assert evil.scripts == good.scripts  # the page's own, unchanged by the content
    allowed = {tag for tag, _ in good.tags}
    assert {tag for tag, _ in evil.tags} == allowed
    for tag, attributes in evil.tags:
        assert not {name for name in attributes if name.startswith("on") or name == "src"}
        assert tag != "link"
        assert attributes.get("href", "https://www.neuronpedia.org/").startswith("https://www.neuronpedia.org/")
    text = "".join(evil.text)
    for word in EVIL[:5]:
        assert word.replace("\n", "\\n") in text
    assert not re.search(r"[\x00-\x09\x0b-\x1f\ud800-\udfff\u202e]", _evil_table().to_html())
    (policy,) = [a["content"] for tag, a in evil.tags if tag == "meta" and "http-equiv" in a]
    assert policy.startswith("default-src 'none';")
    assert "'unsafe-inline'" not in policy.split("script-src")[1]


def test_html_allows_its_own_script_alone(table):
    import base64
    import hashlib

    page = table.to_html()
    (script,) = re.findall(r"<script>(.*?)</script>", page, flags=re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page
    assert "http://" not in page
    assert set(re.findall(r"https://[^/\"]*", page)) == {"https://www.neuronpedia.org"}


def test_html_shows_every_value_under_its_head(table):
    page = _Page(table.to_html())
    heads = [attributes for tag, attributes in page.tags if tag == "th"]
    cells = [attributes for tag, attributes in page.tags if tag == "td"]
    rows = [cells[start : start + len(heads)] for start in range(0, len(cells), len(heads))]
    assert len(rows) == len(table.rows)
    assert all(head["aria-sort"] == "none" and head["scope"] == "col" for head in heads)
    assert [tag for tag, _ in page.tags].count("button") == len(heads)
    by_text = {cell["data-head"] for head, cell in zip(heads, rows[0], strict=True) if head["data-sort"] == "text"}
    assert by_text == {"hook point", "promotes", "suppresses"}
    for row, found in zip(table.rows, rows, strict=True):
        values = {cell["data-head"]: cell["data-value"] for cell in found}
        assert (int(values["rank"]), int(values["layer"]), int(values["feature"])) == (row.rank, row.block, row.feature)
        assert float(values["score"]) == row.score
        assert float(values["texts"]) == max(example.activation for example in row.examples)
    assert [tag for tag, _ in page.tags].count("mark") == sum(len(row.examples) for row in table.rows)


def test_html_sorts_by_every_head(table, tmp_path):
    """The page's script, run by node on a page of stand-ins."""
    import shutil
    import subprocess

    if shutil.which("node") is None:
        pytest.skip("needs node")
    page = table.to_html()
    (script,) = re.findall(r"<script>(.*?)</script>", page, flags=re.S)
    program = tmp_path / "page.mjs"
    program.write_text(
        """
const head = (sort) => ({ dataset: { sort }, state: { "aria-sort": "none" },
  getAttribute(name) { return this.state[name]; }, setAttribute(name, value) { this.state[name] = value; },
  firstElementChild: { addEventListener(_, call) { this.click = call; } } });
const row = (...values) => ({ cells: values.map((value) => ({ dataset: { value } })) });
const ths = [head("number"), head("text")];
const tbody = { rows: [row("10", "b"), row("9.5", "a"), row("-1", "c")], append(...rows) { this.rows = rows; } };
const document = { querySelectorAll: () => ths, querySelector: () => tbody };
"""
        + script
        + """
const seen = [];
for (const place of [0, 0, 1]) {
  ths[place].firstElementChild.click();
  seen.push([tbody.rows.map((one) => one.cells[1].dataset.value).join(""), ths.map((one) => one.state["aria-sort"])]);
}
console.log(JSON.stringify(seen));
"""
    )
    found = subprocess.run(["node", program], check=True, capture_output=True, text=True).stdout
    assert json.loads(found) == [
        ["cab", ["ascending", "none"]],
        ["bac", ["descending", "none"]],
        ["abc", ["none", "ascending"]],
    ]


def test_markdown_keeps_its_shape_whatever_the_words(table):
    for one, hooks in ((table, 2), (_evil_table(), 1)):
        text = one.to_markdown()
        lines = text.split("\n")
        cells = [len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in lines if line.startswith("|")]
        assert len(set(cells)) == 1
        assert len(cells) == len(one.rows) + 2 * hooks
        assert not re.search(r"(?<!\\)<(?!br>|https://www\.neuronpedia\.org/)", text.split("## Settings")[0])
        assert not re.search(r"(?<!\\)`", text.split("## Settings")[0])
        assert not re.search(r"[\x00-\x09\x0b-\x1f\ud800-\udfff\u202e]", text)
        assert all(line.startswith("    ") for line in text.split("## Settings\n\n")[1].rstrip("\n").split("\n"))
    row = table.rows[0]
    assert f"[{row.feature}](<{row.neuronpedia}>)" in table.to_markdown()
    assert f"**{row.examples[0].token}**" in table.to_markdown()


def test_spaces_of_a_token_stay_outside_the_stars():
    row = replace(_evil_table().rows[0], examples=(), label=None, promoted=(" sun",), suppressed=(" ",))
    for token, shown in ((" sun", "x **sun**y"), ("sun ", "x**sun** y"), (" ", "x**␣**y")):
        shown_row = replace(row, examples=(FeatureExample("a", 0, 1.0, "x", token, "y"),))
        text = FeatureTable((shown_row,), {}).to_markdown()
        assert f"a 1: {shown} |" in text
        assert "| sun | ␣ |" in text


def test_columns_that_would_be_empty_are_left_out(selection):
    bare = describe_features(selection)
    assert "promotes" not in bare.to_markdown()
    assert 'data-head="texts"' not in bare.to_html()


def test_pandas_json_and_csv_hold_everything(table):
    frame, data = table.to_pandas(), json.loads(table.to_json())
    records = list(csv.DictReader(io.StringIO(table.to_csv())))
    assert data["settings"]["selector"] == "mean_difference"
    assert (data["schema"], data["schema_version"]) == ("peft_sae.features", 1)
    for place, row in enumerate(table.rows):
        assert frame.loc[place, "score"] == data["rows"][place]["score"] == float(records[place]["score"]) == row.score
        assert frame.loc[place, "promoted"] == data["rows"][place]["promoted"] == list(row.promoted)
        assert json.loads(records[place]["suppressed"]) == list(row.suppressed)
        assert data["rows"][place]["examples"][0]["token"] == row.examples[0].token
        assert json.loads(records[place]["examples"]) == data["rows"][place]["examples"]
    assert list(FeatureTable((), {}).to_pandas().columns) == list(frame.columns)


@pytest.mark.parametrize("suffix", [".html", ".md", ".csv", ".JSON"])
def test_the_suffix_says_the_format(table, tmp_path, suffix):
    path = tmp_path / "deep" / f"features.v1{suffix}"
    for one in (_evil_table(), table):
        one.save(path)
        method = {".html": one.to_html, ".md": one.to_markdown, ".csv": one.to_csv, ".json": one.to_json}[
            suffix.lower()
        ]
        content = path.read_bytes().decode()
        assert content == method().encode("utf-8", "backslashreplace").decode()
        assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_table_is_written_whole_or_not_at_all(table, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"suffix '\.htm', so .* Did you mean '\.html'\?"):
        table.save(tmp_path / "features.htm")
    (tmp_path / "folder.md").mkdir()
    with pytest.raises(ArtifactError, match=r"Cannot write .*Check the path"):
        table.save(tmp_path / "folder.md")
    (tmp_path / "old.md").write_text("old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(ArtifactError, match="disk full"):
        table.save(tmp_path / "old.md")
    assert (tmp_path / "old.md").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.md", "old.md"]
