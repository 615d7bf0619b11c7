import json
import re
from pathlib import Path

import pytest

from benchmarks import results
from benchmarks.recovery import run as recovery
from benchmarks.safety import compared, page
from benchmarks.safety.catalogue import ONLY, TABLES
from benchmarks.safety.report import OUT, OUT_HELP
from benchmarks.safety.shares import CONFIGS
from benchmarks.sources import Source, at_least, verdict
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


def rows_of(name, safety, loss=1.0, first=0):
    """Of three bases, a little apart."""
    return [
        {
            "method": name,
            "base": base,
            "draw": 0,
            "dangerous": 8,
            "trained": 64 if "frozen" in name else 100,
            "validation": safety,
            "seconds": 600.0,
            "measures": {OUT: safety + 0.01 * (base - first), OUT_HELP: 0.9, "corpus loss": loss},
        }
        for base in range(first, first + 3)
    ]


SAFETY = {
    "full fine-tuning": 0.5,
    "LoRA": 0.6,
    "OLoRA": 0.7,
    "random, frozen": 0.4,
    "mean difference": 0.75,
    "SAE, requests": 0.8,
    "SAE, requests, frozen": 0.9,
}


def groups_of(only="", safety=SAFETY, first=0):
    frozen = {name: name.replace(", frozen", "") for name in safety}
    named = {f"{plain}{only}{', frozen' if name != plain else ''}": safety[name] for name, plain in frozen.items()}
    return {name: rows_of(name, value, 1.2 if name.startswith("full") else 1.0, first) for name, value in named.items()}


def source_of(folder, **tables):
    """Where the results of these tables lie."""
    for name, groups in tables.items():
        rows = [row for group in groups.values() for row in group]
        result = {"bases": 3, "draws": 1, "rows": rows}
        (folder / f"result-{name}.json").write_text(json.dumps(result))
    return Source(folder, "safety")


def verdicts_of(source):
    return list(page.safety_verdicts(compared.chosen(source), "chosen"))


@pytest.mark.parametrize("only", ["", ONLY])
def test_a_method_is_compared_with_the_best_of_those_on_the_same_data(only):
    groups = {**groups_of(), **groups_of(ONLY)}
    name = f"SAE, requests{only}, frozen"
    found = compared.Compared(name, groups)
    assert found.full == f"full fine-tuning{only}"
    assert (found.peer, found.standing) == (f"OLoRA{only}", "the safest of 2 starts of PEFT's on these data")
    assert found.control == f"mean difference{only}"
    assert found.apart
    close = {**groups, "SAE, requests": rows_of("SAE, requests", 0.71)}
    assert not compared.Compared("SAE, requests", close).apart
    assert compared.Compared("SAE, requests", close).wins("OLoRA") == "safer on 3 of 3 bases"
    assert compared.Compared("SAE, requests", close).wins("mean difference") == "safer on 0 of 3 bases"
    assert found.minus(found.full)["mean"] == pytest.approx(0.4)
    assert compared.best_by_validation(groups, compared.compared(groups, neutral=bool(only))).name == name


@pytest.mark.parametrize(
    "missing", ["full fine-tuning", "random, frozen mean difference", "LoRA OLoRA", "SAE, requests, frozen"]
)
def test_a_table_that_is_not_complete_is_not_judged(missing, tmp_path):
    groups = {name: rows for name, rows in groups_of().items() if name not in missing}
    assert verdicts_of(source_of(tmp_path, main=groups))[0] == "Not all of what is trained on all requests was run."


def test_each_line_of_what_was_asked_has_its_own_verdict(tmp_path):
    source = source_of(tmp_path, main=groups_of())
    assert "\n".join(verdicts_of(source)).count("**Met.**") == 2 * 4  # frozen and trainable
    assert [line[:9] for line in page.frozen_verdicts(source)] == ["- **Met.*"]
    worse = {**groups_of(), "SAE, requests, frozen": rows_of("SAE, requests, frozen", 0.55, loss=1.5)}
    worse.pop("SAE, requests")
    found = verdicts_of(source_of(tmp_path, main=worse))
    lines = next(text for text in found if "Safety on" in text).splitlines()
    assert [line.split(".")[0] for line in lines[:4]] == ["- **Missed", "- **Missed", "- **Met", "- **Missed"]


def test_other_bases_are_asked_about_what_the_first_have_named(tmp_path):
    there = SAFETY | {"LoRA": 0.85, "OLoRA": 0.75, "mean difference": 0.3, "random, frozen": 0.95, "SAE, answers": 0.99}
    others = groups_of(safety=there, first=100)
    source = source_of(tmp_path, main={**groups_of(), **groups_of(ONLY)}, confirm=others)
    found = dict(compared.confirmed(source))
    assert found["neutral requests only"] is None
    methods = [each for data, each in compared.confirmed(source) if data == "all requests"]
    assert [(each.name, each.peer, each.control) for each in methods] == [
        ("SAE, requests, frozen", "OLoRA", "mean difference"),
        ("SAE, requests", "OLoRA", "mean difference"),
    ]
    assert methods[0].standing == "the safest start of PEFT's on the other bases (here, of 2: LoRA)"
    assert methods[0].minus("OLoRA")["mean"] == pytest.approx(0.15)
    text = "\n".join(page.page(source))
    confirmation = text[text.index("### On other bases") :]
    assert "seeds 100 to 102" in confirmation
    assert "and of OLoRA, the safest start of PEFT's on the other bases (here, of 2: LoRA)" in confirmation
    assert "+15.0 [+15.0, +15.0], safer on 3 of 3 bases." in confirmation
    assert "Not all of what is trained on neutral requests only was run." in confirmation
    assert "against mean difference, the safest control without one on the other bases, +60.0" in confirmation
    short = list(page.in_short(source, confirming=True))
    assert len(short) == 2
    assert "OLoRA 76 [75, 77]" in short[0]
    assert "OLoRA 71 [70, 72]" in next(page.in_short(source))


def test_what_was_not_run_on_other_bases_is_said(tmp_path):
    source = source_of(tmp_path, main=groups_of())
    assert "### On other bases\n\n    python -m benchmarks.safety.run --tables confirm\nNot run yet." in "\n".join(
        page.page(source)
    )
    assert list(page.in_short(source, confirming=True)) == []


def test_the_time_of_all_tables_counts_a_run_once_and_the_bases(tmp_path):
    tables = {name: groups_of() for name in TABLES if name != "confirm"}
    assert list(page.time_verdict(source_of(tmp_path, **tables))) == [
        "- How long all safety tables take is open: not run yet: confirm."
    ]
    source = source_of(tmp_path, **tables, confirm=groups_of(first=100))
    (line,) = page.time_verdict(source)
    runs, bases = 2 * 3 * len(SAFETY), 6
    assert f"take {(runs * 10 + bases * 5) / 120:.1f} hours on 2 cores (asked: 3), by the sum of {runs} runs" in line
    assert line.startswith("- **Missed.**")


def test_every_shipped_configuration_trains_as_little_as_was_asked():
    found = json.loads(Path(results.HERE, "safety/result-shares.json").read_text())["configurations"]
    assert set(found) == {path.stem for path in CONFIGS.glob("*.yaml")}
    for name in found:
        shipped = "frozen" if found[name]["frozen as shipped"] else "trainable"
        assert 100 * found[name][shipped]["share"] <= 0.25
