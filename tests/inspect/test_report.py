import base64
import dataclasses
import hashlib
import json
import math
import re
from html.parser import HTMLParser

import pandas as pd
import pytest

from peft_sae.inspect.report import html_report
from peft_sae.inspect.report.figures import figures
from peft_sae.inspect.report.page import embedded
from peft_sae.inspect.report.summary import cards, highlights
from peft_sae.inspect.report.tables import TABLES
from peft_sae.inspect.report.wording import number, percent, signed

from .synthetic import make_empty, make_inspection

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)> \u2028 \u202e \ud800 \"'&"


class Page(HTMLParser):
    """What a browser would see of a page: ids, texts, and the contents of its scripts."""

    _VOID = ("meta", "input", "br", "wbr", "link")

    def __init__(self, text):
        super().__init__()
        self.ids, self.tags, self.attributes, self.scripts, self.text = [], [], [], {}, ""
        self._open = []
        self.feed(text)
        self.close()
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        self.attributes.append(attrs)
        if "id" in attrs:
            self.ids.append(attrs["id"])
        if tag == "script":
            self.script = attrs.get("id", "code")
            self.scripts[self.script] = ""
        if tag not in self._VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] == "script":
            self.scripts[self.script] += data
        else:
            self.text += data

    def policy(self):
        return next(one["content"] for one in self.attributes if one.get("http-equiv") == "Content-Security-Policy")


@pytest.fixture(scope="module")
def inspection():
    return make_inspection()


@pytest.fixture(scope="module")
def text(inspection):
    return html_report(inspection)


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def test_page_has_a_section_for_all_that_is_known(page):
    sections = {"summary", "notes", "moved", "features", "activations", "predictions", "training-loss", "modules"}
    assert sections | {"provenance"} <= set(page.ids)
    assert {"drift", "angles", "before-after", "loss-by-place", "kl-by-place", "training"} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    named = {one[key] for one in page.attributes for key in ("aria-labelledby", "aria-describedby") if key in one}
    assert named <= set(page.ids)


def test_page_holds_every_value_of_the_tables(page, inspection):
    held, found = json.loads(page.scripts["inspection"]), inspection.to_dict()
    assert held == {key: found[key] for key in held}
    assert set(found) - set(held) == {"module_features", "coefficients", "training"}


def test_page_is_small(text):
    assert len(text.encode()) < 2e6


def test_policy_allows_the_one_script_and_nothing_else(page):
    digest = base64.b64encode(hashlib.sha256(page.scripts["code"].encode()).digest()).decode()
    rules = dict(rule.strip().split(" ", 1) for rule in page.policy().split(";"))
    assert rules == {
        "default-src": "'none'",
        "style-src": "'unsafe-inline'",
        "script-src": f"'sha256-{digest}'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    assert not {"img", "link", "iframe", "base", "object"} & set(page.tags)
    assert not [one for one in page.attributes if any(key.startswith("on") or key == "src" for key in one)]


def test_summary_says_what_the_numbers_are_beside_chance(page, inspection):
    inside = inspection.summary["in_basis"]
    assert "Inside the basis" in page.text
    assert percent(inside) in page.text
    assert percent(inspection.summary["in_random"]) in page.text
    assert f"{number(inside / inspection.summary['in_random'], 2)} times" in page.text
    assert "It predicts these texts better." in page.text
    assert "48\u202f211 tokens" in page.text


def test_highlights_name_the_features_that_stand_out(inspection):
    lines = dict(highlights(inspection.to_dict()))
    changes = inspection.activations.set_index("name")["change"]
    assert str(changes.idxmax()) in lines["Strengthened most"]
    assert str(changes.idxmin()) in lines["Weakened most"]
    reads = inspection.features[inspection.features["side"] == "read"].set_index("name")["share"]
    assert str(reads.idxmax()) in lines["Read most"]


def test_provenance_and_notes_are_shown(page, inspection):
    assert inspection.provenance["adapter_digest"] in page.text
    assert inspection.provenance["data"]["data"] in page.text
    assert inspection.provenance["saes"][0]["name"] in page.text
    assert "6.54.12" in page.text
    assert inspection.notes[0] in page.text


def test_every_column_of_the_tables_exists(inspection):
    for name, table in TABLES.items():
        known = set(getattr(inspection, name).columns)
        assert {column.key for column in table.columns} <= known
        assert {column.second for column in table.columns if column.second} <= known
        assert {key for _, key, _ in table.picks} <= known
        assert {column.key for column in table.columns} <= set(table.meanings)


def test_what_comes_from_data_is_never_markup(inspection):
    features, activations = inspection.features.copy(), inspection.activations.copy()
    modules = inspection.modules.copy()
    in_column = EVIL.replace("\ud800", "")  # pandas' columns of strings cannot hold it; lists can
    for table, columns in ((features, ("name", "label", "top_module")), (activations, ("name", "label"))):
        for column in columns:
            table.loc[0, column] = in_column
    modules.loc[0, "module"] = in_column
    features.at[0, "tokens"] = [EVIL]
    activations.at[0, "examples"] = [
        {"label": EVIL, "number": 0, "activation": 1.0, "before": EVIL, "token": EVIL, "after": EVIL}
    ]
    features.loc[0, "neuronpedia"] = "javascript:alert(3)"
    bad = dataclasses.replace(
        inspection,
        features=features,
        activations=activations,
        modules=modules,
        notes=(EVIL,),
        provenance={"adapter": EVIL, "base_model": EVIL, EVIL: {EVIL: [EVIL]}, "saes": [{EVIL: EVIL}]},
    )
    text = html_report(bad)
    page = Page(text)
    assert page.tags.count("script") == 3
    assert "img" not in page.tags
    assert "\u202e" not in page.text
    text.encode("utf-8")
    held = json.loads(page.scripts["inspection"])
    assert held["features"][0]["tokens"] == [EVIL]
    assert held["activations"][0]["examples"][0]["token"] == EVIL
    assert not re.search("[<>&\u2028\u2029]", page.scripts["inspection"] + page.scripts["views"])


@pytest.mark.parametrize("value", [EVIL, {"a": [1, None, "<!--"]}, "拒否 🙂"])
def test_embedded_data_comes_back_as_it_was(value):
    assert json.loads(embedded(value)) == value


def test_what_was_not_measured_has_no_section(inspection):
    bare = dataclasses.replace(inspection, activations=None, positions=None, training=(), notes=())
    page = Page(html_report(bare))
    assert not {"activations", "before-after", "predictions", "training-loss", "training", "notes"} & set(page.ids)
    links = {one["href"] for one in page.attributes if one.get("href", "").startswith("#")}
    assert links <= {f"#{one}" for one in page.ids}
    assert json.loads(page.scripts["inspection"])["activations"] is None


def test_empty_tables_make_a_page():
    page = Page(html_report(make_empty()))
    assert "summary" in page.ids
    assert "Size of the update" in page.text
    assert not {"modules", "features", "drift", "provenance"} & set(page.ids)
    assert json.loads(page.scripts["views"]) == {"plots": [], "tables": {}}


def test_plots_of_nothing_but_unknowns_are_left_out(inspection):
    modules = inspection.modules.assign(drift=None, in_basis=None, mean_angle=math.nan, largest_angle=None)
    lora = dataclasses.replace(inspection, modules=modules, summary={**inspection.summary, "in_basis": None})
    page = Page(html_report(lora))
    assert not {"drift", "angles", "moved"} & set(page.ids)
    assert "Inside the basis" not in page.text
    keys = {column["key"] for column in json.loads(page.scripts["views"])["tables"]["modules"]["columns"]}
    assert "norm" in keys
    assert "drift" not in keys


def test_unknown_numbers_are_dashes(inspection):
    summary = {**inspection.summary, "in_random": None, "kl": math.nan, "loss_change": None}
    found = dataclasses.replace(inspection, summary=summary).to_dict()
    shown = {card.head: card for card in cards(found)}
    assert shown["Divergence"].value == shown["Next-token loss"].value == "–"  # noqa: RUF001
    assert "None" not in " ".join(f"{card.value} {card.words}" for card in shown.values())
    assert "nan" not in " ".join(card.value for card in shown.values())


def _plots(inspection):
    return {plot["id"]: plot for plot in figures(inspection.to_dict())}


def test_plots_have_words_and_units(inspection):
    plots = _plots(inspection)
    for plot in plots.values():
        assert plot["title"]
        assert plot["about"]
        assert plot["alt"]
        assert plot["x"]["label"]
        assert plot["y"]["label"]
    assert "share" in plots["drift"]["y"]["label"]
    assert "degrees" in plots["angles"]["y"]["label"]
    assert "nats" in plots["kl-by-place"]["y"]["label"]


def test_drift_plot_shows_every_module_and_its_control(inspection):
    plot = _plots(inspection)["drift"]
    assert [(one["name"], one["hollow"]) for one in plot["series"]] == [
        ("q_proj (reads)", False),
        ("v_proj (writes)", True),
    ]
    drawn = [point for one in plot["series"] for point in one["points"]]
    assert sorted(point[1] for point in drawn) == sorted(inspection.modules["drift"])
    assert {round(point[0]) for point in drawn} == set(range(26))
    assert [point[1] for point in plot["control"]["points"]] == [1 - one for one in inspection.modules["in_random"]]
    assert drawn[0][2][0] == "model.layers.0.self_attn.q_proj (reads)"


def test_angle_plot_reaches_from_the_mean_to_the_largest(inspection):
    point = _plots(inspection)["angles"]["series"][0]["points"][0]
    first = inspection.modules.iloc[0]
    assert (point[1], point[3]) == (first["mean_angle"], first["largest_angle"])


def test_head_and_rare_kinds_of_modules_have_a_place(inspection):
    first = inspection.modules.iloc[0].to_dict()
    rows = [{**first, "module": f"model.layers.0.kind{index}"} for index in range(9)]
    rows.append({**first, "module": "lm_head", "block": None})
    modules = pd.DataFrame(rows).astype({"block": "Int64"})
    plot = _plots(dataclasses.replace(inspection, modules=modules))["drift"]
    assert plot["x"]["names"] == [[1, "head"]]
    assert len(plot["series"]) == 7
    assert plot["series"][-1]["name"] == "other modules"
    assert plot["series"][-1]["points"][-1][0] == 1
    assert sum(len(one["points"]) for one in plot["series"]) == 10


def test_activation_plot_shows_every_feature(inspection):
    plot = _plots(inspection)["before-after"]
    assert [one["name"] for one in plot["series"]] == ["chosen features", "protected features", "other features"]
    points = [point for one in plot["series"] for point in one["points"]]
    known = inspection.activations
    assert sorted(point[:2] for point in points) == sorted(map(list, zip(known.mean_before, known.mean_after)))  # noqa: B905
    assert plot["x"]["scale"] == "root"
    even = known.assign(mean_before=1.0, mean_after=2.0)
    assert _plots(dataclasses.replace(inspection, activations=even))["before-after"]["x"]["scale"] == "linear"


def test_long_lines_become_means_of_neighbours(inspection):
    positions = pd.DataFrame(
        {
            "position": range(1, 1001),
            "tokens": [1, 3] * 500,
            "loss_before": 1.0,
            "loss_after": [0.0, 4.0] * 500,
            "kl": None,
        }
    )
    plots = _plots(dataclasses.replace(inspection, positions=positions))
    before, after = plots["loss-by-place"]["series"]
    assert len(after["points"]) == 334
    assert after["points"][0][1] == pytest.approx((0 + 3 * 4 + 0) / 5)
    assert {point[1] for point in before["points"]} == {1.0}
    assert "drawn as one" in plots["loss-by-place"]["about"]
    assert "kl-by-place" not in plots


def test_training_plot_takes_what_was_logged(inspection):
    log = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": math.nan}, {"step": 2, "eval_loss": 3.0}, {"loss": 1.0}, {}]
    plot = _plots(dataclasses.replace(inspection, training=log))["training"]
    assert [[point[:2] for point in one["points"]] for one in plot["series"]] == [[[1.0, 2.0]], [[2.0, 3.0]]]
    assert "training" not in _plots(dataclasses.replace(inspection, training=[{"step": 1, "loss": "high"}]))


def test_numbers_are_written_for_people():
    assert [number(one) for one in (None, 0, 0.12345, 12, 48211)] == ["–", "0", "0.123", "12", "48\u202f211"]  # noqa: RUF001
    assert [percent(one) for one in (0.5, None)] == ["50 %", "–"]  # noqa: RUF001
    assert [signed(one) for one in (0.5, -0.5, 0.0)] == ["+0.5", "\N{MINUS SIGN}0.5", "0"]
