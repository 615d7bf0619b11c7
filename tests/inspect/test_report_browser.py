"""The report in a real browser."""

import dataclasses
import os

import pytest

from peft_sae.inspect.report import html_report

from . import browser as chromium
from .synthetic import make_empty, make_inspection

_REASON = chromium.why_not()
pytestmark = [pytest.mark.browser, pytest.mark.skipif(_REASON is not None, reason=str(_REASON))]

EVIL = "<script>window.ran = 1</script><img src=x onerror='window.ran = 1'></script>"
LAPTOP, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser():
    with chromium.browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def inspection():
    return make_inspection()


@pytest.fixture
def visit(browser, tmp_path):
    """Opens an inspection's report, and checks at the end that the page neither complained nor asked for anything."""
    contexts, complaints, requests = [], [], []

    def opened(inspection, *, viewport=LAPTOP, scheme="light"):
        path = tmp_path / f"report{len(contexts)}.html"
        path.write_text(html_report(inspection), encoding="utf-8")
        context = browser.new_context(viewport=viewport, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()
    assert complaints == []
    assert [url for url in requests if not url.startswith("file://")] == []
    assert len(requests) == len(contexts)


def _column(page, table, head):
    """The cells of a column, as they are read."""
    return page.eval_on_selector_all(
        f"[data-table={table}] tbody td[data-head='{head}']", "cells => cells.map(cell => cell.innerText.trim())"
    )


def _numbers(cells):
    return [float(cell.rstrip("%×° \u00a0").replace("\N{MINUS SIGN}", "-")) for cell in cells]  # noqa: RUF001


def _head(page, table, head):
    return page.locator(f"[data-table={table}] th button", has_text=head).first


def test_plots_and_tables_are_there(visit, inspection):
    page = visit(inspection)
    page.wait_for_selector("#drift svg .mark")
    assert page.locator("#drift .mark[tabindex]").count() == 52
    assert page.locator("#before-after .mark[tabindex]").count() == len(inspection.activations)
    for name in ("drift", "angles", "before-after", "loss-by-place", "kl-by-place", "training"):
        drawn = page.locator(f"#{name} svg [role=img]")
        assert drawn.count() == 1
        assert drawn.get_attribute("aria-label")
        assert page.locator(f"#{name} svg text.label").count() == 2
    assert page.locator("[data-table=features] tbody tr").count() == 100
    assert page.locator("[data-table=activations] mark").first.inner_text() in ("cannot", "never", "pi", "defendant")


def test_a_click_on_a_head_sorts(visit, inspection):
    page = visit(inspection)
    head = _head(page, "features", "unique")
    head.click()
    assert page.locator("[data-table=features] th[aria-sort=descending]").inner_text().startswith("unique")
    values = _numbers(_column(page, "features", "unique"))
    assert values == sorted(values, reverse=True)
    head.click()
    assert page.locator("[data-table=features] th[aria-sort=ascending]").inner_text().startswith("unique")
    values = _numbers(_column(page, "features", "unique"))
    assert values == sorted(values)
    _head(page, "features", "feature").click()
    blocks = [int(name.split(".")[1]) for name in _column(page, "features", "feature")]
    assert blocks == sorted(blocks)


def test_the_keyboard_sorts(visit, inspection):
    page = visit(inspection)
    head = _head(page, "modules", "drift")
    head.focus()
    page.keyboard.press("Enter")
    values = _numbers(_column(page, "modules", "drift"))
    assert values == sorted(values, reverse=True)
    page.keyboard.press("Space")
    values = _numbers(_column(page, "modules", "drift"))
    assert values == sorted(values)


def test_unknown_values_are_dashes_and_come_last(visit, inspection):
    modules = inspection.modules.copy()
    modules.loc[3, "drift"] = None
    page = visit(dataclasses.replace(inspection, modules=modules))
    for _ in range(2):
        _head(page, "modules", "drift").click()
        cells = _column(page, "modules", "drift")
        assert cells[-1] == "–"  # noqa: RUF001
        assert cells.count("–") == 1  # noqa: RUF001


def test_filters_narrow_the_table(visit, inspection):
    page = visit(inspection)
    known = inspection.features
    page.fill("#features-search", "ReFuSal")
    wanted = known[
        known["label"].fillna("").str.contains("refusal") | known["tokens"].astype(str).str.contains("refusal")
    ]
    status = page.locator("[data-table=features] [role=status]")
    assert str(len(wanted)) in status.inner_text()
    assert page.locator("[data-table=features] tbody tr").count() == min(100, len(wanted))
    page.select_option("#features-side", "write")
    page.select_option("#features-group", "protected")
    wanted = wanted[(wanted["side"] == "write") & (wanted["group"] == "protected")]
    assert page.locator("[data-table=features] tbody tr").count() == len(wanted)
    assert set(_column(page, "features", "side")) == {"writes"}
    page.fill("#features-search", "no such feature")
    assert page.locator("[data-table=features] tbody tr").count() == 0
    assert status.inner_text() == "0 features of 512"
    page.select_option("#activations-change", "down")
    changes = _column(page, "activations", "change")
    assert changes
    assert all(one.startswith("\N{MINUS SIGN}") for one in changes)


def test_more_rows_come_on_demand(visit, inspection):
    page = visit(inspection)
    rows, more = page.locator("[data-table=activations] tbody tr"), page.locator("[data-table=activations] .more")
    assert rows.count() == 100
    more.click()
    assert rows.count() == 200
    more.click()
    assert rows.count() == 256
    assert more.is_hidden()
    assert page.evaluate("document.activeElement.tagName") == "TR"


def test_marks_tell_their_values_to_pointer_and_keyboard(visit, inspection):
    page = visit(inspection)
    mark = page.locator("#before-after .mark[tabindex='0']")
    mark.wait_for()
    mark.focus()
    tip = page.locator("#tip")
    first = tip.inner_text()
    assert "before" in first
    assert "hook_resid_post" in first
    page.keyboard.press("ArrowRight")
    assert tip.inner_text() != first
    assert page.evaluate("document.activeElement.getAttribute('aria-label')").split(", ")[0] in tip.inner_text()
    page.keyboard.press("Escape")
    assert tip.is_hidden()
    page.locator("#drift .mark[tabindex]").nth(7).hover()
    assert "drift" in tip.inner_text()
    assert "random space" in tip.inner_text()


def test_what_comes_from_data_does_not_run(visit, inspection):
    features, activations, modules = (
        inspection.features.copy(),
        inspection.activations.copy(),
        inspection.modules.copy(),
    )
    features.loc[0, ["name", "label", "top_module", "neuronpedia"]] = [EVIL, EVIL, EVIL, "javascript:window.ran=1"]
    features.at[0, "tokens"] = [EVIL, "\u202eabc\n"]
    activations.loc[0, ["name", "label"]] = EVIL
    activations.at[0, "examples"] = [
        {"label": EVIL, "number": 0, "activation": 1.0, "before": EVIL, "token": EVIL, "after": EVIL}
    ]
    modules.loc[0, "module"] = EVIL
    provenance = {"adapter": EVIL, "base_model": EVIL, EVIL: [{EVIL: EVIL}]}
    page = visit(
        dataclasses.replace(
            inspection,
            features=features,
            activations=activations,
            modules=modules,
            provenance=provenance,
            notes=(EVIL,),
        )
    )
    page.wait_for_selector("#before-after svg")
    page.locator("#before-after .mark[tabindex='0']").focus()
    page.keyboard.press("End")
    assert page.evaluate("window.ran") is None
    assert page.locator("img").count() == 0
    row = page.locator("[data-table=features] tbody tr").first
    assert EVIL in row.inner_text()
    assert "\\u202eabc\\n" in row.inner_text()
    assert row.locator("a").count() == 0
    assert page.locator("[data-table=activations] tbody mark").first.inner_text() == EVIL


def test_links_lead_to_neuronpedia(visit, inspection):
    link = visit(inspection).locator("[data-table=features] tbody a").first
    assert link.get_attribute("href") == inspection.features["neuronpedia"][0]
    assert link.get_attribute("rel") == "noopener noreferrer"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [LAPTOP, PHONE], ids=["laptop", "phone"])
def test_nothing_is_wider_than_the_screen(visit, inspection, viewport, scheme):
    features = inspection.features.copy()
    features.loc[0, ["name", "label", "top_module"]] = "W" * 300
    features.at[1, "tokens"] = ["W" * 300]
    long = {"adapter": "W" * 300, "subspace": {"W" * 300: "W" * 300}}
    page = visit(dataclasses.replace(inspection, features=features, provenance=long), viewport=viewport, scheme=scheme)
    page.wait_for_selector("#drift svg .mark")
    page.eval_on_selector_all("details", "all => all.forEach(one => { one.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") == viewport["width"]
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(23, 24, 27)"
    assert dark == (scheme == "dark")
    clipped = page.eval_on_selector_all(
        ".plot > svg text",
        """texts => texts.filter((text) => {
            const [own, whole] = [text.getBoundingClientRect(), text.closest("svg").getBoundingClientRect()];
            return own.left < whole.left - 1 || own.right > whole.right + 1 || own.bottom > whole.bottom + 1;
        }).map((text) => text.textContent)""",
    )
    assert clipped == []
    if os.environ.get("REPORT_SHOTS"):
        page.screenshot(path=f"{os.environ['REPORT_SHOTS']}/{viewport['width']}-{scheme}.png")


def test_plots_follow_the_width(visit, inspection):
    page = visit(inspection)
    page.wait_for_selector("#drift .plot > svg")
    page.set_viewport_size(PHONE)
    page.wait_for_selector("#drift .plot > svg[width='358']")
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]


def test_an_empty_inspection_opens(visit):
    page = visit(make_empty())
    assert page.locator("h1").inner_text() == "Inside an adapter"
    assert page.locator("table").count() == 0


def test_one_value_of_everything_opens(visit, inspection):
    one = dataclasses.replace(
        inspection,
        modules=inspection.modules.head(1),
        features=inspection.features.head(1),
        activations=inspection.activations.head(1).assign(mean_before=0.0, mean_after=0.0),
        positions=inspection.positions.head(1),
        training=[{"step": 1, "loss": 0.0}],
    )
    page = visit(one)
    page.wait_for_selector("#training svg .mark", state="attached")
    assert page.locator(".plot > svg").count() == 6
    assert "NaN" not in page.content().split("<script")[0]
