"""The results of an experiment, as data and as a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from benchmarks.paper.experiment import Experiment
from benchmarks.paper.judging import judge_identity

_PACKAGES = ("openai", "nanogcg", "lm-eval", "trl", "datasets", "accelerate")


def describe(experiment: Experiment, before: Mapping[str, Any], methods: Mapping[str, Any]) -> dict[str, Any]:
    """Return what goes into `result.json`.

    Args:
        experiment: what was run.
        before: seed, versions, machine and commit.
        methods: per method what was found; a part that was not run is None.
    """
    settings = asdict(experiment)
    for key in ("output", "estimate", "stand_in", "name", "seed"):
        settings.pop(key)
    settings["judge"].pop("api_key_env", None)
    found = {**before, "versions": {**before["versions"], **_versions()}}
    identity = {kind: judge_identity(experiment.judge, kind) for kind in ("harmful", "harmless")}
    return {
        "benchmark": "paper",
        "name": experiment.name,
        "stand_in": experiment.stand_in,
        **found,
        "experiment": settings,
        "judge": identity,
        "methods": methods,
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def table(result: Mapping[str, Any]) -> str:
    """Return the results as Markdown, with what has no score beside it."""
    rows, left_out = [], []
    for name, found in result["methods"].items():
        trained = found["training"]
        share = "-" if trained is None else f"{100 * trained['trained'] / trained['total']:.2f} %"
        cells = {"method": name, "trained": share}
        parts = {**found["sets"], "GCG": found["attack"]}
        for part, measured in parts.items():
            for measure, value in ({} if measured is None else measured["measures"]).items():
                cells[f"{part}: {measure}"] = _cell(measure, value)
            if measured is not None and measured["scored"] < measured["answers"]:
                left_out.append((name, part, measured))
        for task, value in (found["capability"] or {}).items():
            error = "" if value["stderr"] is None else f" ± {value['stderr']:.3f}"
            cells[f"{task}: {value['metric']}"] = f"{value['value']:.3f}{error}"
        rows.append(cells)
    lines = _markdown(rows)
    if result["stand_in"]:
        lines = ["**Tiny stand-ins for models, data and judge: these numbers mean nothing.**", "", *lines]
    lines += [
        "",
        "Means over scored answers with bootstrap 95 % intervals; capability with standard errors.",
    ]
    if left_out:
        lines += ["", "Answers without a score, and what they could make of the means, at worst and at best:", ""]
        lines += _markdown([_left_out(*entry) for entry in left_out])
    missing = sorted({part for found in result["methods"].values() for part in found["not run"]})
    if missing:
        lines += ["", f"Not run, or not for every method: {', '.join(missing)}."]
    return "\n".join(lines)


def _left_out(name: str, part: str, measured: Mapping[str, Any]) -> dict[str, str]:
    cells = {"method": name, "set": part, "answers": f"{measured['answers']:,}"}
    cells |= {problem: f"{measured[problem]:,}" for problem in ("refused to score", "bad reply")}
    bounds = [
        f"{measure} {_number(measure, value['worst'])} to {_number(measure, value['best'])}"
        for measure, value in measured["measures"].items()
    ]
    return {**cells, "worst to best": ", ".join(bounds)}


def _cell(measure: str, value: Mapping[str, float | None]) -> str:
    if value["mean"] is None:
        return "no scores"
    mean, low, high = (_number(measure, value[key]) for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def _number(measure: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if measure == "harmfulness" else f"{100 * value:.1f} %"


def _markdown(rows: list[dict[str, str]]) -> list[str]:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return lines + [f"| {' | '.join(row.get(column, '-') for column in columns)} |" for row in rows]
