import pytest
import torch

from peft_sae import FeatureStatistics, load_saes, register_selector, select_features
from peft_sae.errors import ConfigError, DataError, SelectionError
from peft_sae.selection import registry, selector_names
from peft_sae.statistics import FeatureMoments
from tests.tiny import make_sae

D_SAE = 64


@pytest.fixture(autouse=True)
def _registry(monkeypatch):
    monkeypatch.setattr(registry, "_SELECTORS", dict(registry._SELECTORS))


def _statistics(aligned, unaligned, hooks=("blocks.1.hook_resid_post",)):
    """Statistics of the same activations [tokens, d_sae] at every hook point."""
    saes = tuple(load_saes(make_sae(hook))[0].identity for hook in hooks)
    both = {"aligned": aligned, "unaligned": unaligned}
    moments = {label: tuple(FeatureMoments.of(activations) for _ in saes) for label, activations in both.items()}
    return FeatureStatistics(saes, moments, {"tokens": "all"})


def _columns(**columns):
    """Activations [2, d_sae] that are 0 but for some features: `_columns(f3=(1.0, 2.0))`."""
    activations = torch.zeros(2, D_SAE)
    for name, values in columns.items():
        activations[:, int(name[1:])] = torch.tensor(values)
    return activations


def test_mean_difference_equals_the_hand_calculation():
    aligned = _columns(f3=(1.0, 2.0), f7=(4.0, 0.0), f9=(1.0, 1.0))
    unaligned = _columns(f3=(0.5, 0.5), f7=(0.0, 10.0), f9=(1.0, 0.5))
    (site,) = select_features(_statistics(aligned, unaligned), top_k=2).sites
    assert site.features.tolist() == [7, 3]  # |2 - 5| = 3, |1.5 - 0.5| = 1, |1 - 0.75| = 0.25
    assert site.scores.tolist() == [-3.0, 1.0]
    assert site.aligned_means.tolist() == [2.0, 1.5]
    assert site.unaligned_means.tolist() == [5.0, 0.5]
    assert site.aligned_rates.tolist() == [0.5, 1.0]
    assert site.unaligned_rates.tolist() == [0.5, 1.0]
    assert site.features.dtype == torch.int64
    assert site.scores.dtype == torch.float64


def test_planted_features_are_found():
    generator = torch.Generator().manual_seed(0)
    aligned, unaligned = (torch.randn(500, D_SAE, generator=generator).relu() for _ in range(2))
    aligned[:, [5, 41]] += 1.0
    unaligned[:, [17]] += 2.0
    (site,) = select_features(_statistics(aligned, unaligned), top_k=3).sites
    assert site.features[0] == 17
    assert sorted(site.features.tolist()) == [5, 17, 41]


def test_every_sae_selects_for_itself():
    statistics = _statistics(
        _columns(f1=(1.0, 1.0)), _columns(), ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post")
    )
    second = {
        label: FeatureMoments.of(_columns(f2=(value, 0.0))) for label, value in [("aligned", 0.0), ("unaligned", 3.0)]
    }
    for label, moments in statistics.moments.items():
        statistics.moments[label] = (moments[0], second[label])
    sites = select_features(statistics, top_k=1).sites
    assert [(site.sae.hook_name, site.features.tolist()) for site in sites] == [
        ("blocks.0.hook_resid_post", [1]),
        ("blocks.1.hook_resid_post", [2]),
    ]


def test_ties_go_to_the_lower_id():
    same = {f"f{feature}": (1.0, 1.0) for feature in (60, 2, 33, 10)}
    (site,) = select_features(_statistics(_columns(**same), _columns()), top_k=3).sites
    assert site.features.tolist() == [2, 10, 33]


def test_dead_features_are_never_chosen(caplog):
    @register_selector("constant", reference="test")
    def constant(contrast):
        return torch.ones(D_SAE)

    statistics = _statistics(_columns(f20=(1.0, 0.0)), _columns(f30=(0.0, 1.0)))
    (site,) = select_features(statistics, selector="constant", top_k=3).sites
    assert site.features.tolist() == [20, 30]
    assert "2 instead of 3 features at blocks.1.hook_resid_post" in caplog.text


def test_identical_sets_are_an_error():
    activations = _columns(f3=(1.0, 2.0))
    with pytest.raises(SelectionError, match=r"No feature of .* differs .*best score 0\.0.*Check that the sets differ"):
        select_features(_statistics(activations, activations), top_k=1)


def test_other_classes_can_be_compared():
    statistics = _statistics(_columns(f1=(1.0, 1.0)), _columns(f2=(3.0, 3.0)))
    selection = select_features(statistics, top_k=1, aligned="unaligned", unaligned="aligned")
    assert selection.sites[0].aligned_means.tolist() == [3.0]
    assert (selection.settings["aligned"], selection.settings["unaligned"]) == ("unaligned", "aligned")
    with pytest.raises(DataError, match="no class 'harmful'"):
        select_features(statistics, top_k=1, aligned="harmful")


def test_one_sided_statistics_are_an_error():
    statistics = _statistics(_columns(f1=(1.0, 1.0)), _columns())
    del statistics.moments["unaligned"]
    with pytest.raises(DataError, match=r"no class 'unaligned'.*\['aligned'\]"):
        select_features(statistics, top_k=1)


def test_settings_record_the_method():
    selection = select_features(_statistics(_columns(f1=(1.0, 1.0)), _columns()), top_k=1)
    assert selection.settings["selector"] == "mean_difference"
    assert "2512.23260" in selection.settings["reference"]
    assert (selection.settings["top_k"], selection.settings["statistics"]) == (1, {"tokens": "all"})


def test_custom_selector_is_used():
    @register_selector("last", reference="test")
    def last(contrast):
        return torch.arange(D_SAE) * (contrast.aligned.fired > 0)

    statistics = _statistics(_columns(f3=(9.0, 9.0), f50=(0.1, 0.0)), _columns())
    assert select_features(statistics, selector="last", top_k=1).sites[0].features.tolist() == [50]
    assert {"last", "mean_difference", "auroc", "random"} <= set(selector_names())


def test_unknown_selector_lists_the_known_ones():
    statistics = _statistics(_columns(f1=(1.0, 1.0)), _columns())
    message = r"'mean_diff' is unknown. Did you mean 'mean_difference'\? Use one of \['attribution', 'auroc'"
    with pytest.raises(SelectionError, match=message):
        select_features(statistics, selector="mean_diff", top_k=1)


def test_name_is_registered_once():
    with pytest.raises(SelectionError, match="'mean_difference' exists already"):
        register_selector("mean_difference", reference="test")(lambda contrast: contrast.aligned.mean)


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (lambda c: c.aligned.mean[:-1], r"returned \(63,\) .* shape \(64,\), is needed"),
        (lambda c: c.aligned.mean.mean(), r"returned \(\) for"),
        (lambda c: c.aligned.mean.tolist(), "returned list for"),
        (lambda c: c.aligned.mean / 0, "returned NaN or infinity for"),
    ],
)
def test_wrong_scores_are_an_error(score, message):
    register_selector("wrong", reference="test")(score)
    with pytest.raises(SelectionError, match=message):
        select_features(_statistics(_columns(f1=(1.0, 1.0)), _columns()), selector="wrong", top_k=1)


def test_at_least_one_feature_is_asked_for():
    with pytest.raises(SelectionError, match="top_k=0 selects nothing"):
        select_features(_statistics(_columns(f1=(1.0, 1.0)), _columns()), top_k=0)


def test_few_texts_are_told_of(caplog):
    select_features(_statistics(_columns(f1=(1.0, 2.0)), _columns(f2=(1.0, 1.0))), top_k=1)
    assert "A class has 2 texts only" in caplog.text


def test_wrong_kinds_of_arguments_are_told_of():
    statistics = _statistics(_columns(f1=(1.0, 1.0)), _columns())
    with pytest.raises(ConfigError, match=r"criteria is a dict. Give Criteria"):
        select_features(statistics, criteria={"max_q": 0.05})
    with pytest.raises(SelectionError, match=r"is no name. Register your function with @register_selector"):
        select_features(statistics, selector=lambda contrast: contrast.aligned.mean)


def test_an_sae_without_features_can_be_left_out(caplog):
    statistics = _statistics(
        _columns(f1=(1.0, 1.0)), _columns(), ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post")
    )
    same = FeatureMoments.of(_columns(f2=(1.0, 1.0)))
    for label, moments in statistics.moments.items():
        statistics.moments[label] = (moments[0], same)
    with pytest.raises(SelectionError, match=r"No feature of .* differs"):
        select_features(statistics, top_k=1)
    selection = select_features(statistics, top_k=1, allow_empty=True)
    assert [site.sae.hook_name for site in selection.sites] == ["blocks.0.hook_resid_post"]
    with pytest.raises(SelectionError, match=r"No feature of .* differs"):
        select_features(statistics, top_k=1, unaligned="aligned", allow_empty=True)
