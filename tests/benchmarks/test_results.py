import json
from pathlib import Path

from benchmarks import results
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
