"""Runs every ability for every kind of adapter, and writes the table with `--parity-table FILE`."""

from __future__ import annotations

import pytest

from tests.parity.harness import KINDS, Job

_results: dict[str, dict[str, str]] = {}


def pytest_generate_tests(metafunc):
    if "job" in metafunc.fixturenames:
        metafunc.parametrize("job", [Job(kind) for kind in KINDS], ids=["lora", "ours", "frozen"])


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """Where frozen bases are refused, the refusal is the expected outcome."""
    marker = pyfuncitem.get_closest_marker("ability")
    job = getattr(pyfuncitem, "callspec", None) and pyfuncitem.callspec.params.get("job")
    if marker is None or not job or not job.frozen or not marker.kwargs["frozen"]:
        return (yield)
    from peft_sae.errors import ConfigError

    with pytest.raises(ConfigError, match=marker.kwargs["match"]):
        yield
    return True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    marker = item.get_closest_marker("ability")
    if marker is not None and call.when == "call" and hasattr(item, "callspec"):
        job = item.callspec.params["job"]
        refused = job.frozen and marker.kwargs["frozen"]
        outcome = "yes" if report.passed else "**fails**"
        if report.passed and refused:
            outcome = f"refused: {refused}"
        row = _results.setdefault(marker.kwargs["name"], {})
        if row.get(job.kind) != "**fails**":
            row[job.kind] = outcome
    return report


def pytest_sessionfinish(session):
    path = session.config.getoption("--parity-table")
    if path:
        from tests.parity.table import write_table

        write_table(path, _results)
