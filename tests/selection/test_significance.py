"""p- and q-values against scipy, and under texts that do not differ."""

import numpy as np
import pytest
import torch
from scipy import stats

from peft_sae.sae.identity import SaeIdentity
from peft_sae.selection.contrast import Contrast
from peft_sae.selection.significance import p_values, q_values
from peft_sae.statistics import FeatureMoments

FEATURES = 200


def _contrast(*classes):
    """A contrast of two classes, each given as activations [observations, features] or with their examples beside."""
    moments = [FeatureMoments.of(*(one if isinstance(one, tuple) else (one,))) for one in classes]
    width = moments[0].total.shape[0]
    return Contrast(SaeIdentity("sae", "blocks.0.hook_resid_pre", 8, width, None, None, "0" * 64), *moments)


@pytest.mark.parametrize(("counts", "spreads"), [((30, 12), (1.0, 0.2)), ((30, 12), (0.2, 1.0)), ((8, 8), (1.0, 1.0))])
def test_p_values_are_the_larger_of_scipys_two_tests(counts, spreads):
    generator = torch.Generator().manual_seed(0)
    first, second = (
        spread * torch.randn(count, FEATURES, generator=generator, dtype=torch.float64)
        for count, spread in zip(counts, spreads, strict=True)
    )
    first[:, :20] += 1.5
    welch, student = (stats.ttest_ind(first, second, equal_var=equal).pvalue for equal in (False, True))
    floor = 2 / stats.binom(sum(counts), 0.5).pmf(counts[0]) / 2.0 ** sum(counts)
    expected = np.maximum(np.maximum(welch, student), floor)
    np.testing.assert_allclose(p_values(_contrast(first, second)), expected, rtol=1e-9)
    if counts[0] != counts[1]:  # each test is the larger one in its turn, mostly
        assert np.mean((welch > student) == (spreads[1] > spreads[0])) > 0.9


def test_examples_of_equal_length_count_once_each():
    """Tokens of an example that are all the same tell no more than one of them."""
    generator = torch.Generator().manual_seed(1)
    classes = [torch.randn(count, FEATURES, generator=generator, dtype=torch.float64) for count in (20, 14)]
    once = p_values(_contrast(*classes))
    owners = [torch.arange(len(rows)).repeat_interleave(7) for rows in classes]
    often = p_values(_contrast(*((rows[place], place) for rows, place in zip(classes, owners, strict=True))))
    torch.testing.assert_close(often, once, rtol=1e-9, atol=0)


def test_one_long_example_is_little_evidence():
    """Eight examples of which one has almost all tokens: about one effective example, whatever its tokens say."""
    generator = torch.Generator().manual_seed(2)
    owners = torch.cat([torch.zeros(500, dtype=torch.int64), torch.arange(1, 8)])
    first, second = (torch.randn(len(owners), FEATURES, generator=generator) for _ in range(2))
    first[owners == 0] += 0.5
    assert p_values(_contrast((first, owners), (second, owners))).min() > 0.05


def test_silence_on_a_few_examples_proves_nothing():
    """Of a feature that fires on every third example, 20 without it are no wonder (3 in 10,000); Welch: 1e-8."""
    first, second = torch.zeros(100, 1, dtype=torch.float64), torch.zeros(20, 1, dtype=torch.float64)
    first[::3] = 1.0
    assert stats.ttest_ind(first, second, equal_var=False).pvalue < 1e-7
    assert p_values(_contrast(first, second)) > 0.001


def test_constant_features_are_told_apart_as_far_as_there_are_examples():
    first, second = torch.ones(5, 2), torch.ones(5, 2)
    second[:, 1] = 2.0
    assert p_values(_contrast(first, second)).tolist() == pytest.approx([1.0, 2 / 252])


def test_a_single_example_proves_nothing():
    contrast = _contrast(torch.ones(1, 3), torch.zeros(9, 3))
    assert p_values(contrast).tolist() == [1.0, 1.0, 1.0]
    assert q_values([contrast])[0].tolist() == [1.0, 1.0, 1.0]


def test_q_values_are_scipys_over_live_features_of_all_saes_together():
    generator = torch.Generator().manual_seed(3)
    contrasts = []
    for dead in (50, 120):
        first, second = (torch.rand(30, FEATURES, generator=generator) for _ in range(2))
        first[:, :10] += 0.4
        first[:, -dead:], second[:, -dead:] = 0, 0
        contrasts.append(_contrast(first, second))
    expected = stats.false_discovery_control(np.concatenate([p_values(one)[one.live] for one in contrasts]))
    found = q_values(contrasts)
    np.testing.assert_allclose(torch.cat([q[one.live] for q, one in zip(found, contrasts, strict=True)]), expected)
    assert [int((q == 1).sum()) >= dead for q, dead in zip(found, (50, 120), strict=True)] == [True, True]


def _texts(count, generator, shift=0.0, tails=1.0):
    """Clustered, log-normal and mostly silent features of texts of unequal length, with the text of each token."""
    lengths = (20 * (0.7 * torch.randn(count, generator=generator)).exp()).long().clamp(3, 200)
    owners = torch.repeat_interleave(torch.arange(count), lengths)
    odds = torch.linspace(-6, -0.5, FEATURES) + torch.randn(count, FEATURES, generator=generator)
    odds[:, ::20] += shift
    fires = torch.rand(len(owners), FEATURES, generator=generator) < odds.sigmoid()[owners]
    strength = torch.randn(count, FEATURES, generator=generator)[owners]
    return fires * (tails * (strength + torch.randn(len(owners), FEATURES, generator=generator))).exp(), owners


@pytest.mark.parametrize("counts", [(100, 20), (10, 150), (20, 20), (5, 5)])
def test_texts_that_do_not_differ_give_no_discoveries(counts):
    """At q = 0.1 at most a tenth of the runs may have any: of 30, more than 7 would have a chance below 1 %."""
    generator = torch.Generator().manual_seed(4)
    runs = [
        bool((q_values([_contrast(*(_texts(count, generator) for count in counts))])[0] <= 0.1).any())
        for _ in range(30)
    ]
    assert sum(runs) <= 7


@pytest.mark.parametrize("counts", [(100, 20), (40, 40)])
def test_planted_features_are_found_with_few_others(counts):
    generator = torch.Generator().manual_seed(5)
    planted = torch.zeros(FEATURES, dtype=torch.bool)
    planted[::20] = True
    false, found = [], []
    for _ in range(10):
        first, second = (
            _texts(count, generator, shift, tails=0.3) for count, shift in zip(counts, (3.0, 0.0), strict=True)
        )
        (q,) = q_values([_contrast(first, second)])
        chosen = q <= 0.1
        false.append(int((chosen & ~planted).sum()) / max(1, int(chosen.sum())))
        found.append(float(chosen[planted].double().mean()))
    assert np.mean(false) <= 0.1
    assert np.mean(found) >= 0.25
