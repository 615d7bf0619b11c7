"""Every selector against an oracle of its own on dense activations: numpy, scipy and scikit-learn in float64."""

import numpy as np
import pytest
import sklearn
import torch
from packaging.version import Version
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from peft_sae import FeatureStatistics, load_saes, select_features
from peft_sae.errors import MismatchError, SelectionError
from peft_sae.selection import selectors
from peft_sae.selection.contrast import Contrast
from peft_sae.selection.significance import p_values
from peft_sae.statistics import FeatureMoments, Measures
from peft_sae.statistics.accumulate import ClassSums
from peft_sae.statistics.batches import Batch
from tests.tiny import WIDTH, make_sae

D_SAE = 64
# The argument's name before and since scikit-learn 1.8.
LASSO = {"penalty": "l1"} if Version(sklearn.__version__) < Version("1.8") else {"l1_ratio": 1.0}
EXAMPLES = 40
PLANTED = [3, 17, 42]


@pytest.fixture(scope="module")
def handle():
    return load_saes(make_sae(features=D_SAE))[0]


@pytest.fixture(scope="module")
def streams():
    """Per class the stream [examples, length, width] and how many tokens of each example count."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for label, shift in (("aligned", 0.6), ("unaligned", 0.0)):
        stream = torch.randn(EXAMPLES, 9, WIDTH, generator=generator)
        stream += 0.7 * torch.randn(EXAMPLES, 1, WIDTH, generator=generator)  # what the tokens of an example share
        stream[..., :5] += shift
        found[label] = (stream, torch.randint(1, 10, (EXAMPLES,), generator=generator))
    return found


@pytest.fixture(scope="module")
def dense(handle, streams):
    """Per class the activations [tokens, d_sae], float64, the example of each, and the stream [tokens, width]."""
    found = {}
    for label, (stream, lengths) in streams.items():
        keep = torch.arange(9) < lengths[:, None]
        tokens = stream[keep]
        found[label] = (handle.encode(tokens).double().numpy(), keep.nonzero()[:, 0].numpy(), tokens.double().numpy())
    return found


def _collected(handle, streams, pooling="token", measures=None):
    """The statistics that the engine makes of the streams, in batches of 16 examples."""
    moments = {}
    for label, (stream, lengths) in streams.items():
        sums = ClassSums(handle, pooling, measures or Measures())
        for rows in torch.arange(len(stream)).split(16):
            keep = torch.arange(stream.shape[1]) < lengths[rows][:, None]
            sums.add(stream[rows], Batch(torch.zeros_like(keep).long(), keep.long(), keep, keep, rows))
        moments[label] = (sums.finish(),)
    return FeatureStatistics((handle.identity,), moments, {"tokens": "all"})


def _contrast(statistics, **fields):
    (first,), (second,) = statistics.of("aligned"), statistics.of("unaligned")
    return Contrast(statistics.saes[0], first, second, **fields)


def _of(handle, first, second, quantity="activation"):
    """Statistics of activations [examples, d_sae] that are at hand, one observation per example."""
    moments = {"aligned": (FeatureMoments.of(first),), "unaligned": (FeatureMoments.of(second),)}
    return FeatureStatistics((handle.identity,), moments, {"quantity": quantity})


def _close(found, expected, tolerance=1e-5):
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, torch.from_numpy(np.asarray(expected)), rtol=tolerance, atol=tolerance)


def test_mean_difference(handle, streams, dense):
    expected = dense["aligned"][0].mean(0) - dense["unaligned"][0].mean(0)
    _close(selectors.mean_difference(_contrast(_collected(handle, streams))), expected)


def test_effect_size_is_cohens_d(handle, streams, dense):
    first, second = (dense[label][0] for label in ("aligned", "unaligned"))
    pooled = (len(first) - 1) * first.var(0, ddof=1) + (len(second) - 1) * second.var(0, ddof=1)
    expected = (first.mean(0) - second.mean(0)) / np.sqrt(pooled / (len(first) + len(second) - 2))
    _close(selectors.effect_size(_contrast(_collected(handle, streams))), expected)


def test_firing_rate(handle, streams, dense):
    expected = (dense["aligned"][0] > 0).mean(0) - (dense["unaligned"][0] > 0).mean(0)
    _close(selectors.firing_rate(_contrast(_collected(handle, streams))), expected)


@pytest.mark.parametrize("pooling", ["mean", "last", "max"])
def test_welch_t_and_p_values_of_pooled_examples_are_scipys(handle, streams, dense, pooling):
    pool = {"mean": lambda rows: rows.mean(0), "last": lambda rows: rows[-1], "max": lambda rows: rows.max(0)}[pooling]
    rows = [
        np.stack([pool(activations[owners == example]) for example in range(EXAMPLES)])
        for activations, owners, _ in (dense["aligned"], dense["unaligned"])
    ]
    contrast = _contrast(_collected(handle, streams, pooling))
    _close(selectors.welch_t(contrast), stats.ttest_ind(*rows, equal_var=False).statistic, 1e-4)
    expected = np.maximum(*(stats.ttest_ind(*rows, equal_var=equal).pvalue for equal in (False, True)))
    _close(p_values(contrast), expected, 1e-4)


def test_welch_t_of_tokens_counts_examples(handle, streams, dense):
    """The error of the mean over tokens, from the residuals of whole examples."""
    means, errors = [], []
    for activations, owners, _ in (dense["aligned"], dense["unaligned"]):
        mean = activations.mean(0)
        residuals = np.stack([(activations[owners == e] - mean).sum(0) for e in range(EXAMPLES)])
        means.append(mean)
        errors.append(EXAMPLES / (EXAMPLES - 1) * (residuals**2).sum(0) / len(activations) ** 2)
    _close(
        selectors.welch_t(_contrast(_collected(handle, streams))), (means[0] - means[1]) / np.sqrt(sum(errors)), 1e-4
    )


def test_auroc_is_scikit_learns_within_a_bin(handle, streams, dense):
    first, second = (dense[label][0] for label in ("aligned", "unaligned"))
    classes = np.repeat([1, 0], [len(first), len(second)])
    expected = [roc_auc_score(classes, column) for column in np.concatenate([first, second]).T]
    contrast = _contrast(_collected(handle, streams, measures=Measures(histograms=True)))
    areas = selectors.area_under_curve(contrast)
    assert np.abs(areas.numpy() - expected).max() <= 0.005
    assert np.ptp(expected) > 0.2
    assert torch.equal(selectors.auroc(contrast), 2 * areas - 1)


def test_probe_is_scikit_learns_on_the_dense_matrix(handle, streams, dense):
    rows = np.concatenate(
        [
            np.stack([activations[owners == example].mean(0) for example in range(EXAMPLES)])
            for activations, owners, _ in (dense["aligned"], dense["unaligned"])
        ]
    )
    spread = rows.std(0)
    used = (spread > 0) & ((rows != 0).sum(0) >= 2)
    model = LogisticRegression(**LASSO, solver="liblinear", class_weight="balanced", max_iter=1000, random_state=0)
    model.fit(rows[:, used] / spread[used], np.repeat([1, 0], EXAMPLES))
    expected = np.zeros(D_SAE)
    expected[used] = model.coef_[0]
    _close(selectors.probe(_contrast(_collected(handle, streams, measures=Measures(sample=1000)))), expected, 0.02)
    assert 3 <= np.count_nonzero(expected) < D_SAE


def _sampled(handle, rows):
    """Moments of activations [examples, d_sae] with all examples in the sample."""
    from dataclasses import replace

    from peft_sae.statistics.parts import ExampleSample

    sample = ExampleSample.of(rows, torch.arange(len(rows)), len(rows))
    return replace(FeatureMoments.of(rows), sample=sample)


def test_probe_gives_separable_features_the_largest_weights(handle):
    generator = torch.Generator().manual_seed(1)
    first, second = (torch.randn(60, D_SAE, generator=generator).relu() for _ in range(2))
    first[:, PLANTED] += 2.5
    second[:, 60:] = 0
    first[:, 60:] = 0
    first[5, 60] = 100.0  # of one example alone: it could only name that example
    contrast = Contrast(handle.identity, _sampled(handle, first), _sampled(handle, second))
    weights = selectors.probe(contrast)
    assert sorted(weights.argsort(descending=True)[:3].tolist()) == PLANTED
    assert bool((weights[60:] == 0).all())


def test_cosine_is_that_of_the_raw_difference(handle, streams, dense):
    difference = dense["aligned"][2].mean(0) - dense["unaligned"][2].mean(0)
    rows = handle.decoder.double().numpy()
    expected = rows @ difference / np.linalg.norm(rows, axis=1) / np.linalg.norm(difference)
    _close(selectors.cosine(_contrast(_collected(handle, streams), decoder=handle.decoder)), expected, 1e-5)


def test_cosine_needs_the_saes(handle, streams):
    statistics = _collected(handle, streams)
    assert len(select_features(statistics, selector="cosine", top_k=5, saes=[handle]).sites[0].features) == 5
    with pytest.raises(SelectionError, match=r"needs the SAEs' decoder directions.*Give saes="):
        select_features(statistics, selector="cosine", top_k=5)
    other = load_saes(make_sae(features=D_SAE, seed=1))
    with pytest.raises(MismatchError, match="name, hook point and digest must be the same"):
        select_features(statistics, selector="cosine", top_k=5, saes=other)


def test_cosine_needs_raw_activations(handle):
    statistics = _of(handle, torch.ones(3, D_SAE), torch.zeros(3, D_SAE))
    with pytest.raises(SelectionError, match=r"have no raw activations. Collect them"):
        select_features(statistics, selector="cosine", top_k=5, saes=[handle])


def test_cosine_of_a_transcoder_is_an_error():
    sae = make_sae("blocks.1.mlp.hook_in", kind="transcoder", features=D_SAE, out=WIDTH)
    handle = load_saes(sae)[0]
    generator = torch.Generator().manual_seed(0)
    lengths = torch.full((4,), 3)
    streams = {label: (torch.randn(4, 3, WIDTH, generator=generator), lengths) for label in ("aligned", "unaligned")}
    with pytest.raises(SelectionError, match=r"reads blocks\.1\.mlp\.hook_in and writes blocks\.1\.hook_mlp_out"):
        select_features(_collected(handle, streams), selector="cosine", top_k=5, saes=[handle])


def test_attribution_needs_attributions(handle):
    rows = torch.zeros(2, 2, D_SAE)
    rows[0, :, 7], rows[1, :, 9] = -3.0, 2.0
    with pytest.raises(SelectionError, match=r"needs attributions. Collect them again with attribute=log_likelihood"):
        select_features(_of(handle, *rows), selector="attribution", top_k=2)
    (site,) = select_features(_of(handle, *rows, quantity="attribution"), selector="attribution", top_k=2).sites
    assert (site.features.tolist(), site.scores.tolist()) == ([7, 9], [-3.0, -2.0])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("auroc", r"no histograms.*measures=Measures\(histograms=True\)"),
        ("probe", r"no sample of examples.*measures=Measures\(sample=2000\)"),
    ],
)
def test_missing_measures_are_an_error(handle, name, message):
    with pytest.raises(SelectionError, match=message):
        select_features(_of(handle, torch.ones(3, D_SAE), torch.zeros(3, D_SAE)), selector=name, top_k=2)


def test_explicit_keeps_the_callers_order(handle, streams, caplog):
    statistics = _collected(handle, streams)
    live = (statistics.of("aligned")[0].fired > 0).nonzero()[:, 0].tolist()
    wanted = [live[20], live[3], live[11]]
    names = [f"1:{wanted[0]}", f"blocks.1.hook_resid_post:{wanted[1]}", f"1:{wanted[2]}", f"1:{wanted[0]}"]
    dead = (statistics.of("aligned")[0].fired + statistics.of("unaligned")[0].fired == 0).nonzero()[:, 0].tolist()
    for top_k in (2, 10):
        (site,) = select_features(statistics, selector="explicit", top_k=top_k, features=names).sites
        assert site.features.tolist() == wanted
    assert not caplog.records
    (site,) = select_features(
        statistics, selector="explicit", features=[*names, *(f"1:{one}" for one in dead[:1])]
    ).sites
    assert site.features.tolist() == wanted + dead[:1]


@pytest.mark.parametrize(("selector", "features"), [("explicit", ()), ("mean_difference", ("1:3",))])
def test_names_belong_to_explicit_alone(handle, streams, selector, features):
    with pytest.raises(SelectionError, match="do not go together"):
        select_features(_collected(handle, streams), selector=selector, features=features, top_k=2)


def test_random_depends_on_seed_and_sae_alone(handle, streams):
    statistics = _collected(handle, streams)

    def chosen(which, seed):
        return select_features(which, selector="random", top_k=10, seed=seed).sites[0].features.tolist()

    assert chosen(statistics, 4) == chosen(_collected(handle, streams), 4)
    assert chosen(statistics, 4) != chosen(statistics, 5)
    twin = load_saes(make_sae(features=D_SAE, seed=1))[0]
    assert chosen(_collected(twin, streams), 4) != chosen(statistics, 4)
    two = load_saes([make_sae(f"blocks.{block}.hook_resid_post", features=D_SAE, seed=block) for block in (0, 1)])
    moments = {label: 2 * _collected(handle, streams).of(label) for label in streams}
    sites = select_features(
        FeatureStatistics(tuple(one.identity for one in two), moments, {}), selector="random", top_k=10
    ).sites
    assert sites[0].features.tolist() != sites[1].features.tolist()


def test_random_takes_every_live_feature_equally_often(handle):
    rows = torch.zeros(1, D_SAE)
    rows[:, :8] = 1.0
    statistics = _of(handle, rows, rows)
    counts = torch.zeros(D_SAE)
    for seed in range(400):
        counts[select_features(statistics, selector="random", top_k=2, seed=seed).sites[0].features] += 1
    assert counts[8:].sum() == 0
    assert stats.chisquare(counts[:8].numpy()).pvalue > 0.001  # the seeds are fixed, so this holds always


@pytest.mark.parametrize(("scale", "spread"), [(1e-5, 0.3), (1e5, 0.3), (100.0, 0.001)])
def test_auroc_that_is_known_coarsely_is_told_of(handle, caplog, scale, spread):
    from peft_sae.selection.selectors import area_error

    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 400, D_SAE, generator=generator)
    classes = scale * (1 + spread * (noise + torch.tensor([1.0, 0.0])[:, None, None])).clamp(min=0.01).double()
    contrast = _histogram_contrast(handle, classes)
    exact = [roc_auc_score([1] * 400 + [0] * 400, classes[:, :, feature].flatten()) for feature in range(4)]
    found = (selectors.auroc(contrast) + 1) / 2
    bound = area_error(contrast)
    assert "AUROC is known to" in caplog.text
    for feature, value in enumerate(exact):
        assert abs(float(found[feature]) - value) <= float(bound[feature]) + 1e-9


def _histogram_contrast(handle, classes):
    from dataclasses import replace

    from peft_sae.selection import Contrast
    from peft_sae.statistics.parts import HISTOGRAM_BINS, ActivationHistogram

    moments = []
    for values in classes:
        cells = torch.arange(D_SAE) * HISTOGRAM_BINS + ActivationHistogram.bins(values)
        counts = torch.bincount(cells.flatten(), minlength=D_SAE * HISTOGRAM_BINS).view(D_SAE, -1).int()
        moments.append(replace(FeatureMoments.of(values), histogram=ActivationHistogram(counts)))
    return Contrast(handle.identity, *moments)
