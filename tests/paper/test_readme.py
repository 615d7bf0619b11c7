"""What the folder's README says of costs is what the estimate says."""

import re

import pytest

pytest.importorskip("openai", reason="the extra 'paper' is not installed")

from tests.paper.conftest import EXPERIMENTS, FOLDER, estimate_of


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_costs(path):
    (row,) = re.findall(rf"\| `{path.name}` \|(.*)\|", (FOLDER / "README.md").read_text())
    told = [int(number) for number in re.findall(r"\d+", row)]
    rows = estimate_of(path)
    attack = sum(each.gpu_hours for each in rows if each.what.startswith("GCG"))
    memory = max(each.memory for each in rows if each.memory)
    totals = [sum(each.gpu_hours for each in rows), attack, sum(each.price for each in rows)]
    assert told == [round(value) for value in [*totals, sum(each.disk for each in rows) / 1e9, memory / 1e9]]
