import csv
import io
import json
import os
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from peft_sae.errors import ArtifactError, ConfigError
from peft_sae.selection import FeatureExample, FeatureRow, FeatureTable, describe_features

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
