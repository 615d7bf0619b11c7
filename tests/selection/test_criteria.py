"""Each criterion on its own and all of them together, against lists made by hand or by brute force."""

import pytest
import torch

from peft_sae import FeatureStatistics, load_saes, select_features
from peft_sae.errors import ConfigError, SelectionError
from peft_sae.selection import Criteria
from peft_sae.selection.contrast import Contrast
from peft_sae.selection.significance import q_values
from peft_sae.statistics import FeatureMoments
from tests.tiny import make_sae

D_SAE = 64
TOKENS = 20


@pytest.fixture(scope="module")
def handle():
    return load_saes(make_sae(features=D_SAE))[0]


def _activations(**features):
    """Activations [tokens, d_sae]: `f3=(2.0, 0.5)` fires with 2.0 on the first half of the tokens."""
    found = torch.zeros(TOKENS, D_SAE)
    for name, (value, share) in features.items():
        found[: round(share * TOKENS), int(name[1:])] = value
    return found


def _statistics(handle, aligned, unaligned, **classes):
    rows = {"aligned": aligned, "unaligned": unaligned, **classes}
    moments = {label: (FeatureMoments.of(activations),) for label, activations in rows.items()}
    return FeatureStatistics((handle.identity,), moments, {})


def _chosen(statistics, criteria=None, top_k=10, **fields):
    selection = select_features(statistics, top_k=top_k, criteria=criteria, **fields)
    return selection.sites[0].features.tolist(), selection


@pytest.fixture
def plain(handle):
    """Aligned means: 3 at 4, 2 at 5; unaligned means: 5 at 6, 1 at 7; and 8 always on in both."""
    aligned = _activations(f4=(3.0, 1.0), f5=(40.0, 0.05), f8=(9.0, 1.0))
    unaligned = _activations(f6=(10.0, 0.5), f7=(2.0, 0.5), f8=(5.0, 1.0))
    return _statistics(handle, aligned, unaligned)


@pytest.mark.parametrize(
    ("criteria", "expected"),
    [
        (Criteria(), [6, 8, 4, 5, 7]),
        (Criteria(direction="aligned"), [8, 4, 5]),
        (Criteria(direction="unaligned"), [6, 7]),
        (Criteria(min_firing_rate=0.05), [6, 8, 4, 5, 7]),  # a rate as large as that is enough
        (Criteria(min_firing_rate=0.06), [6, 8, 4, 7]),
        (Criteria(max_firing_rate=0.99), [6, 4, 5, 7]),  # 4 is always on in one class alone
        (Criteria(max_firing_rate=0.04), [6, 4, 5, 7]),
        (Criteria(exclude=["1:6", "blocks.1.hook_resid_post:5"]), [8, 4, 7]),
        (Criteria(keep=["1:7", "1:30"]), [7, 30, 6, 8, 4, 5]),  # 30 never fires
        (Criteria(keep=["1:5"], min_firing_rate=0.5, direction="unaligned"), [5, 6, 7]),
        (Criteria(min_firing_rate=0.06, max_firing_rate=0.99, exclude=["1:6"], direction="unaligned"), [7]),
    ],
)
def test_criteria(plain, criteria, expected):
    assert _chosen(plain, criteria)[0] == expected


def test_failures_are_counted_by_criterion(plain):
    _, selection = _chosen(plain, Criteria(min_firing_rate=0.06, max_firing_rate=0.99, exclude=["1:6"]))
    assert selection.settings["failed"]["blocks.1.hook_resid_post"] == {
        "never_fires": D_SAE - 5,
        "rare": D_SAE - 4,
        "always_on": 1,
        "excluded": 1,
    }
    assert selection.settings["criteria"]["exclude"] == ["1:6"]


def test_kept_features_count_towards_the_number(plain):
    assert _chosen(plain, Criteria(keep=["1:7"]), top_k=2)[0] == [7, 6]
    assert _chosen(plain, Criteria(keep=["1:7", "1:5", "1:4"]), top_k=2)[0] == [7, 5, 4]


@pytest.mark.parametrize("limit", [0.1, 0.25, 0.4, 1.0])
def test_max_cosine_equals_brute_force(handle, limit):
    generator = torch.Generator().manual_seed(0)
    aligned, unaligned = (torch.randn(TOKENS, D_SAE, generator=generator).relu() for _ in range(2))
    statistics = _statistics(handle, aligned, unaligned)
    rows = torch.nn.functional.normalize(handle.decoder.double(), dim=1)
    order = (aligned.double().mean(0) - unaligned.double().mean(0)).abs().argsort(descending=True).tolist()
    expected = []
    for feature in order:
        if all(abs(float(rows[feature] @ rows[other])) < limit for other in expected):
            expected.append(feature)
    found, selection = _chosen(statistics, Criteria(max_cosine=limit), top_k=D_SAE, saes=[handle])
    assert found == expected
    assert selection.settings["failed"].get("blocks.1.hook_resid_post", {}).get("parallel", 0) == D_SAE - len(expected)
    assert (len(expected) < D_SAE) == (limit < 0.9)


def test_max_cosine_drops_opposite_directions_too():
    sae = make_sae(features=D_SAE)
    sae.W_dec.data[4], sae.W_dec.data[5] = -3 * sae.W_dec.data[6], sae.W_dec.data[6]
    statistics = _statistics(
        load_saes(sae)[0], _activations(f4=(3.0, 1.0), f5=(2.0, 1.0), f6=(1.0, 1.0)), _activations()
    )
    assert _chosen(statistics, Criteria(max_cosine=0.99), saes=[sae])[0] == [4]
    assert _chosen(statistics, Criteria(max_cosine=0.99, keep=["1:6", "1:5"]), saes=[sae])[0] == [6, 5]
    with pytest.raises(SelectionError, match="needs the SAEs' decoder directions"):
        _chosen(statistics, Criteria(max_cosine=0.99))


def test_max_q_drops_what_is_not_sure(handle):
    generator = torch.Generator().manual_seed(0)
    aligned, unaligned = (torch.randn(60, D_SAE, generator=generator).relu() for _ in range(2))
    aligned[:, [5, 41]] += 1.0
    statistics = _statistics(handle, aligned, unaligned)
    (q,) = q_values([Contrast(handle.identity, statistics.of("aligned")[0], statistics.of("unaligned")[0])])
    found, selection = _chosen(statistics, Criteria(max_q=0.05))
    assert sorted(found) == [5, 41]
    assert selection.sites[0].q_values.tolist() == q[found].tolist()
    everything, _ = _chosen(statistics, Criteria(max_q=float(q[7])), top_k=D_SAE)
    assert sorted(everything) == (q <= q[7]).nonzero()[:, 0].tolist()  # as large as that is allowed
    with pytest.raises(SelectionError, match=r"No feature of .* is left: \{.*'q_value': 64\}.*Loosen them"):
        _chosen(_statistics(handle, aligned[:3], unaligned[:3]), Criteria(max_q=0.05))


@pytest.mark.parametrize(("ratio", "expected"), [(0.5, [6, 5, 7]), (0.2, [5, 7]), (1.5, [6, 8, 4, 5, 7])])
def test_what_the_retain_texts_use_is_passed_over(handle, plain, ratio, expected):
    """On the retain texts 6 has 0.4 of its mean on the unaligned ones, 4 and 8 all of it, 7 none."""
    retained = _activations(f4=(3.0, 1.0), f6=(4.0, 0.5), f8=(9.0, 1.0))
    moments = {**plain.moments, "retain": (FeatureMoments.of(retained),)}
    statistics = FeatureStatistics(plain.saes, moments, {})
    found, selection = _chosen(statistics, Criteria(retain_ratio=ratio), retain="retain")
    assert found == expected
    over = [site.features.tolist() for site in selection.retained]
    assert over == ([] if ratio > 1 else [[feature for feature in [6, 8, 4] if feature not in expected]])
    assert selection.settings["failed"]["blocks.1.hook_resid_post"].get("retained", 0) == sum(map(len, over))
    kept, _ = _chosen(statistics, Criteria(retain_ratio=ratio, keep=["1:4"]), retain="retain")
    assert kept == [4, *(feature for feature in expected if feature != 4)]


def test_retain_texts_that_use_everything_leave_nothing(plain):
    with pytest.raises(SelectionError, match=r"retain texts use all of the 3 features.*raise retain_ratio"):
        _chosen(plain, Criteria(direction="aligned"), retain="aligned")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"direction": "up"}, r"direction='up' is unknown. Use 'both', 'aligned' or 'unaligned'"),
        ({"min_firing_rate": -0.1}, r"min_firing_rate=-0.1 is no share. Use a value from 0 to 1"),
        ({"max_q": 5}, "max_q=5 is no share"),
        ({"max_cosine": float("nan")}, "max_cosine=nan is no share"),
        ({"min_firing_rate": 0.5, "max_firing_rate": 0.4}, r"min_firing_rate=0.5 is above .*Swap them"),
        ({"retain_ratio": 0.0}, "retain_ratio=0.0 would drop every feature"),
        ({"keep": "1:3"}, r"keep='1:3' is one text. Give a list of names"),
        ({"exclude": "1:3"}, "exclude='1:3' is one text"),
    ],
)
def test_impossible_criteria_are_an_error(fields, message):
    with pytest.raises(ConfigError, match=message):
        Criteria(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"keep": ["1:3"], "exclude": ["1:3"]}, r"\[3\] at blocks.1.hook_resid_post are both to keep and to exclude"),
        ({"exclude": ["1:64"]}, "64"),
        ({"keep": ["2:3"]}, "2:3"),
        ({"min_firing_rate": 1.0, "max_firing_rate": 1.0, "exclude": ["1:4", "1:8"]}, "is left: .*'rare': 62"),
    ],
)
def test_criteria_that_do_not_suit_the_statistics_are_an_error(plain, fields, message):
    with pytest.raises(SelectionError, match=message):
        _chosen(plain, Criteria(**fields))
