import json
import re
from pathlib import Path

import pytest

from benchmarks import results
from benchmarks.recovery import run as recovery
from benchmarks.safety import page
from benchmarks.safety.catalogue import ONLY
from benchmarks.safety.report import OUT, OUT_HELP
from benchmarks.safety.shares import CONFIGS
from benchmarks.sources import Source, at_least, verdict
from benchmarks.speed.report import Ratio, ratios, table

NOWHERE = Source(Path("nowhere"), "nowhere")


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
    sources = [Source(results.HERE / name, name) for name in ("safety", "recovery")]
    assert (results.HERE / "RESULTS.md").read_text() == results.text(*sources)


def test_a_page_elsewhere_links_to_its_results(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["results", "--output", str(tmp_path / "pages" / "mine.md")])
    (tmp_path / "pages").mkdir()
    results.main()
    links = re.findall(r"!\[[^]]*\]\(([^)]*)\)", (tmp_path / "pages" / "mine.md").read_text())
    assert len(links) >= 5
    assert all((tmp_path / "pages" / link).resolve().is_file() for link in links)


def test_no_page_is_made_of_a_quick_run(tmp_path, monkeypatch):
    (tmp_path / "result.json").write_text('{"quick": true, "rows": []}')
    monkeypatch.setattr("sys.argv", ["results", "--recovery", str(tmp_path), "--output", str(tmp_path / "page.md")])
    with pytest.raises(SystemExit, match=r"result\.json' is the result of a quick run.*without --quick"):
        results.main()
    assert not (tmp_path / "page.md").exists()


def test_a_quick_run_does_not_take_the_place_of_a_full_one(tmp_path, monkeypatch):
    (tmp_path / "result.json").write_text('{"quick": false, "rows": []}')
    monkeypatch.setattr("sys.argv", ["run", "--quick", "--output", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"holds the result of a full run.*another --output"):
        recovery.main()


def test_a_difference_is_open_where_its_interval_holds_both_answers():
    spans = [(0.1, 0.3), (-0.1, 0.3), (-0.3, -0.1)]
    found = [at_least({"mean": 0.1, "low": low, "high": high}, 0.0) for low, high in spans]
    assert found == [True, None, False]
    assert [verdict("x", each)[:7] for each in found] == ["- **Met", "- **Ope", "- **Mis"]


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
            "measures": {OUT: safety + 0.01 * base, OUT_HELP: 0.9, "corpus loss": loss},
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


@pytest.mark.parametrize("only", ["", ONLY])
def test_a_method_is_compared_with_the_best_of_those_on_the_same_data(only):
    groups = {**groups_of(), **groups_of(ONLY)}
    name = f"SAE, requests{only}, frozen"
    found = page.Compared(name, groups)
    assert found.full == f"full fine-tuning{only}"
    assert (found.peer, len(found.peers)) == (f"OLoRA{only}", 2)
    assert found.control == f"mean difference{only}"
    assert found.apart
    assert not page.Compared("SAE, requests", {**groups, "SAE, requests": rows_of("SAE, requests", 0.71)}).apart
    assert found.minus(found.full)["mean"] == pytest.approx(0.4)
    assert page.best_by_validation(groups, page.compared(groups, neutral=bool(only))).name == name


def test_a_table_that_is_not_complete_is_not_judged(monkeypatch):
    for missing in ("full fine-tuning", "random, frozen mean difference", "LoRA OLoRA", "SAE, requests, frozen"):
        groups = {name: rows for name, rows in groups_of().items() if name not in missing}
        monkeypatch.setattr(page, "groups_of", lambda *_, groups=groups: groups)
        assert next(page.safety_verdicts(NOWHERE)) == "Not all of what is trained on all requests was run."


def test_each_line_of_what_was_asked_has_its_own_verdict(monkeypatch):
    monkeypatch.setattr(page, "groups_of", lambda *_: groups_of())
    text = "\n".join(page.safety_verdicts(NOWHERE))
    assert text.count("**Met.**") == 2 * 4  # frozen and trainable
    worse = {**groups_of(), "SAE, requests, frozen": rows_of("SAE, requests, frozen", 0.55, loss=1.5)}
    worse.pop("SAE, requests")
    monkeypatch.setattr(page, "groups_of", lambda *_: worse)
    lines = next(text for text in page.safety_verdicts(NOWHERE) if "Safety on" in text).splitlines()
    assert [line.split(".")[0] for line in lines[:4]] == ["- **Missed", "- **Missed", "- **Met", "- **Missed"]
    monkeypatch.setattr(page, "groups_of", lambda *_: groups_of())
    assert [line[:9] for line in page.frozen_verdicts(NOWHERE)] == ["- **Met.*"]


def test_every_shipped_configuration_trains_as_little_as_was_asked():
    found = json.loads(Path(results.HERE, "safety/result-shares.json").read_text())["configurations"]
    assert set(found) == {path.stem for path in CONFIGS.glob("*.yaml")}
    for name in found:
        shipped = "frozen" if found[name]["frozen as shipped"] else "trainable"
        assert 100 * found[name][shipped]["share"] <= 0.25
