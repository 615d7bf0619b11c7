import json
from pathlib import Path

import pytest

from benchmarks import results
from benchmarks.safety.shares import CONFIGS
from benchmarks.speed.report import Ratio, ratios, table


def test_every_ratio_is_read_from_a_file_that_says_where_it_ran():
    found = ratios()
    assert {each.stage for each in found} >= {"training", "selection", "merge"}
    for each in found:
        assert each.ratio > 0
        assert json.loads(each.source.read_text())["device"] == each.device


def test_the_report_says_what_was_missed():
    source = Path(results.HERE, "merge/result-qv-cpu.json")
    lines = table([Ratio("merge", "time", "copy", value, source, "cpu", 1.25) for value in (1.2, 1.3)]).splitlines()
    assert "≤ 1.25: met" in lines[2]
    assert "≤ 1.25: missed" in lines[3]


def test_the_page_is_the_one_that_the_results_give():
    assert (results.HERE / "RESULTS.md").read_text() == results.text()


def test_a_difference_is_open_where_its_interval_holds_both_answers():
    spans = [(0.1, 0.3), (-0.1, 0.3), (-0.3, -0.1)]
    found = [results._at_least({"mean": 0.1, "low": low, "high": high}, 0.0) for low, high in spans]
    assert found == [True, None, False]
    assert [results._verdict("x", each)[:7] for each in found] == ["- **Met", "- **Ope", "- **Mis"]


def rows_of(name, safety, loss=1.0):
    """Of three bases, a little apart."""
    return [
        {
            "method": name,
            "base": base,
            "draw": 0,
            "dangerous": 8,
            "trained": 64 if "frozen" in name else 100,
            "validation": safety,
            "measures": {results.OUT: safety + 0.01 * base, results.OUT_HELP: 0.9, "corpus loss": loss},
        }
        for base in range(3)
    ]


def groups_of(only=""):
    safety = {
        "full fine-tuning": 0.5,
        "LoRA": 0.6,
        "OLoRA": 0.7,
        "random, frozen": 0.4,
        "mean difference": 0.75,
        "SAE, requests": 0.8,
        "SAE, requests, frozen": 0.9,
    }
    frozen = {name: name.replace(", frozen", "") for name in safety}
    named = {f"{plain}{only}{', frozen' if name != plain else ''}": safety[name] for name, plain in frozen.items()}
    return {name: rows_of(name, value, 1.2 if name.startswith("full") else 1.0) for name, value in named.items()}


@pytest.mark.parametrize("only", ["", results.ONLY])
def test_a_method_is_compared_with_the_best_of_those_on_the_same_data(only):
    groups = {**groups_of(), **groups_of(results.ONLY)}
    name = f"SAE, requests{only}, frozen"
    found = results.Compared(name, groups)
    assert found.full == f"full fine-tuning{only}"
    assert (found.peer, len(found.peers)) == (f"OLoRA{only}", 2)
    assert found.control == f"mean difference{only}"
    assert found.apart
    assert not results.Compared("SAE, requests", {**groups, "SAE, requests": rows_of("SAE, requests", 0.71)}).apart
    assert found.minus(found.full)["mean"] == pytest.approx(0.4)
    assert results._best_by_validation(groups, neutral=bool(only)) == name


def test_each_line_of_what_was_asked_has_its_own_verdict(monkeypatch):
    monkeypatch.setattr(results, "_groups", groups_of)
    monkeypatch.setattr(results, "_best_by_validation", lambda groups, neutral: "SAE, requests, frozen")
    text = "\n".join(results._safety_verdicts())
    assert text.count("**Met.**") == 2 * 4
    worse = {**groups_of(), "SAE, requests, frozen": rows_of("SAE, requests, frozen", 0.55, loss=1.5)}
    monkeypatch.setattr(results, "_groups", lambda: worse)
    lines = next(text for text in results._safety_verdicts() if "Safety on" in text).splitlines()
    assert [line.split(".")[0] for line in lines[:4]] == ["- **Missed", "- **Missed", "- **Met", "- **Missed"]
    monkeypatch.setattr(results, "_groups", groups_of)
    assert [line[:9] for line in results._frozen_verdicts()] == ["- **Met.*"]


def test_every_shipped_configuration_trains_as_little_as_was_asked():
    found = json.loads(Path(results.HERE, "safety/result-shares.json").read_text())["configurations"]
    assert set(found) == {path.stem for path in CONFIGS.glob("*.yaml")}
    for name in found:
        shipped = "frozen" if found[name]["frozen as shipped"] else "trainable"
        assert 100 * found[name][shipped]["share"] <= 0.25
