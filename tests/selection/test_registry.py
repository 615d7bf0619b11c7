"""Selectors that installed packages offer, and how a selector's scores are ranked."""

import sys

import pytest
import torch

from peft_sae import FeatureStatistics, load_saes, register_selector, select_features
from peft_sae.errors import SelectionError
from peft_sae.selection import registry, selector_names
from peft_sae.statistics import FeatureMoments
from tests.tiny import make_sae

D_SAE = 64


@pytest.fixture(autouse=True)
def _registry(monkeypatch):
    monkeypatch.setattr(registry, "_SELECTORS", dict(registry._SELECTORS))


@pytest.fixture
def statistics():
    """Features 1, 2 and 3 fire on the aligned texts, 1 the least and 3 the most."""
    rows = torch.zeros(4, D_SAE)
    rows[:, 1:4] = torch.tensor([1.0, 2.0, 3.0])
    moments = {"aligned": (FeatureMoments.of(rows),), "unaligned": (FeatureMoments.of(torch.zeros(4, D_SAE)),)}
    return FeatureStatistics((load_saes(make_sae(features=D_SAE))[0].identity,), moments, {})


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Return a function that installs a package with an entry point."""

    def install(name, value, code):
        module = value.split(":")[0]
        (tmp_path / f"{module}.py").write_text(code)
        folder = tmp_path / f"{module}-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
        (folder / "entry_points.txt").write_text(f"[peft_sae.selectors]\n{name} = {value}\n")
        monkeypatch.delitem(sys.modules, module, raising=False)

    monkeypatch.syspath_prepend(tmp_path)
    return install


PLUGIN = """
import torch
from peft_sae import register_selector

@register_selector("lowest_id", reference="test", signed=False)
def score(contrast):
    return torch.arange(len(contrast.live), 0, -1)
"""


def test_selectors_of_installed_packages_are_found_by_name(statistics, installed):
    installed("lowest_id", "lowest_plugin:score", PLUGIN)
    assert "lowest_id" in selector_names()
    assert "lowest_plugin" not in sys.modules
    (site,) = select_features(statistics, selector="lowest_id", top_k=2).sites
    assert site.features.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import a_package_that_is_not_there", r"'broken' is offered by 'broken_plugin:score', .*a_package_that_is"),
        ("raise SystemError('no')", r"cannot be imported \(SystemError\('no'\)\)"),
        ("other = 1", r"cannot be imported \(AttributeError"),
        ("def score(contrast): ...", r"does not register it.*@register_selector\('broken', \.\.\.\)"),
    ],
)
def test_broken_entry_points_say_which_package_to_mend(statistics, installed, code, message):
    installed("broken", "broken_plugin:score", code)
    with pytest.raises(SelectionError, match=message):
        select_features(statistics, selector="broken", top_k=1)
    assert select_features(statistics, top_k=1).sites  # others are not harmed


def test_a_selector_may_rank_by_size_or_not(statistics):
    def score(contrast):
        scores = torch.zeros(D_SAE)
        scores[[1, 2, 3]] = torch.tensor([1.0, -5.0, 2.0])
        return scores

    register_selector("signed", reference="test")(score)
    register_selector("unsigned", reference="test", signed=False)(score)
    for name, expected in (("signed", [2, 3, 1]), ("unsigned", [3, 1])):
        assert select_features(statistics, selector=name, top_k=5).sites[0].features.tolist() == expected
