"""Histograms, top examples and samples against computations that see everything at once."""

import pytest
import torch
from sklearn.metrics import roc_auc_score

from peft_sae.errors import ConfigError
from peft_sae.statistics import FeatureMoments, Measures
from peft_sae.statistics.accumulate import ClassSums
from peft_sae.statistics.batches import Batch
from peft_sae.statistics.parts import HISTOGRAM_BINS, ActivationHistogram, ExampleSample, TopExamples, sample_order

from .dense import activations, assert_same_parts, collect, make_texts, pool, small_blocks

TEXTS = make_texts(23, 0)


@pytest.fixture(scope="module")
def everything(model, tokenizer, saes):
    """Per SAE and text the features of the tokens that count, BOS not among them."""
    return [[activations(model, tokenizer, handle, text)[1:] for text in TEXTS] for handle in saes]


def _classes(shape, seed):
    """Two classes of examples [n, length, 4] of a feature of some shape, of which one is larger."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(2, 400, 9, 4, generator=generator, dtype=torch.float64)
    normal = torch.randn(2, 400, 9, 4, generator=generator, dtype=torch.float64)
    scale = torch.tensor([1.0, 1.3]).view(2, 1, 1, 1)
    return {
        "exponential": -uniform.log() * scale,
        "gamma": -(uniform.log() + uniform.flip(1).log()) * scale,
        "lognormal": (1.5 * normal).exp() * scale,
        "narrow": (10 + normal).clamp(min=0) * scale**0.2,
        "sparse": torch.where(uniform < 0.01 * scale**4, normal.abs() * scale, 0.0),
        "relu": (normal + scale - 1.5).relu(),
        "zero": torch.zeros_like(uniform),
    }[shape]


class _Identity:
    """An SAE whose features are what it reads."""

    def __init__(self, width):
        self.identity = type("Identity", (), {"d_sae": width})
        self.sae = type("Sae", (), {"device": "cpu", "W_enc": torch.eye(width)})

    def encode_blocks(self, values, elements):
        for start in range(0, len(values), max(1, elements // values.shape[1])):
            rows = slice(start, start + max(1, elements // values.shape[1]))
            yield rows, slice(0, values.shape[1]), values[rows]


def _sum_up(values, pooling):
    """Moments of features [examples, length, d_sae] as the pass over a data set sums them up."""
    sums = ClassSums(_Identity(values.shape[-1]), pooling, Measures(histograms=True))
    for numbers in torch.arange(len(values)).split(32):
        ids = torch.zeros(len(numbers), values.shape[1], dtype=torch.int64)
        everything = torch.ones_like(ids, dtype=torch.bool)
        sums.add(values[numbers], Batch(ids, ids + 1, everything, everything, numbers))
    return sums.finish()


def _auroc(first, second):
    """The area under the ROC curve, that `second` is the larger one, from histograms; ties count half."""
    zeros = [(moments.count - moments.fired)[:, None] for moments in (first, second)]
    low, high = (
        torch.cat([zero, moments.histogram.counts], dim=1).double() / moments.count
        for zero, moments in zip(zeros, (first, second), strict=True)
    )
    return (high * (low.cumsum(1) - low / 2)).sum(1)


@pytest.mark.parametrize("pooling", ["token", "mean"])
@pytest.mark.parametrize("shape", ["exponential", "gamma", "lognormal", "narrow", "sparse", "relu", "zero"])
def test_area_under_the_curve_from_histograms_is_sklearns(shape, pooling):
    values = _classes(shape, 0)
    found = _auroc(*(_sum_up(one, pooling) for one in values))
    observations = [pool(list(one), pooling)[0] for one in values]
    labels = torch.cat([torch.full((len(one),), label) for label, one in enumerate(observations)])
    expected = torch.tensor([roc_auc_score(labels, column) for column in torch.cat(observations).T]).double()
    # Means that vary by 3 % lie in few bins, whose ties take something off.
    atol = 0.015 if (shape, pooling) == ("narrow", "mean") else 0.005
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)
    assert (expected - 0.5).abs().max() > (0.05 if shape not in ("zero", "sparse") else -1)


def test_bins_are_sixty_fourths_of_an_octave():
    values = torch.logspace(-11, 13, 40001, base=2, dtype=torch.float64)[:-1]
    bins = ActivationHistogram.bins(values)
    assert (bins.diff() >= 0).all()
    assert torch.equal(bins.unique(), torch.arange(HISTOGRAM_BINS))
    octaves = torch.arange(-11, 13)
    assert torch.equal(ActivationHistogram.bins(2.0**octaves), 64 * (octaves + 11))
    inside = 2.0 ** octaves[:, None] * (1 + torch.arange(64) / 64)
    assert torch.equal(ActivationHistogram.bins(inside).flatten(), torch.arange(HISTOGRAM_BINS))
    below = torch.nextafter(inside[1:].flatten(), torch.tensor(0.0))
    assert torch.equal(ActivationHistogram.bins(below), torch.arange(63, HISTOGRAM_BINS - 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_values_past_the_outermost_bins_fall_into_them(dtype):
    limits = torch.finfo(dtype)
    values = torch.tensor([limits.smallest_normal, limits.tiny / 2, 2.0**-12, 2.0**13, limits.max], dtype=dtype)
    assert ActivationHistogram.bins(values).tolist() == [0, 0, 0, *[HISTOGRAM_BINS - 1] * 2]


def test_values_next_to_an_edge_stay_on_their_side():
    below = torch.nextafter(torch.tensor(1.0, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64))
    assert ActivationHistogram.bins(torch.stack([below, torch.ones_like(below)])).tolist() == [11 * 64 - 1, 11 * 64]


@pytest.mark.parametrize("pooling", ["token", "mean", "max", "last"])
def test_histograms_count_every_observation_that_fires(model, tokenizer, saes, everything, pooling):
    measures = Measures(histograms=True)
    found = collect(model, tokenizer, {"aligned": TEXTS}, saes, measures=measures, pooling=pooling, batch_size=4)
    for moments, features in zip(found.of("aligned"), everything, strict=True):
        exact, _ = pool(features, pooling)
        edges = (2.0 ** torch.arange(-11, 13)[:, None] * (1 + torch.arange(64) / 64)).flatten().double()
        for feature in range(64):
            fired = exact[:, feature][exact[:, feature] > 0]
            bins = (torch.searchsorted(edges, fired, right=True) - 1).clamp(min=0)
            assert torch.equal(moments.histogram.counts[feature].long(), torch.bincount(bins, minlength=HISTOGRAM_BINS))


def _best(features, number):
    """Per feature the examples with the largest activations: values, places of the examples and of the tokens."""
    table = []
    for feature in range(features[0].shape[1]):
        largest = [(rows[:, feature].max().item(), example) for example, rows in enumerate(features) if len(rows)]
        largest = [(value, example) for value, example in largest if value > 0]
        chosen = sorted(largest, key=lambda entry: (-entry[0], entry[1]))[:number]
        chosen = [(value, example, int(features[example][:, feature].argmax()) + 1) for value, example in chosen]
        table.append(chosen + [(0.0, -1, -1)] * (number - len(chosen)))
    values, examples, positions = zip(*(zip(*row, strict=True) for row in table), strict=True)
    return torch.tensor(values), torch.tensor(examples), torch.tensor(positions)


def _assert_best(top, features, number):
    values, examples, _ = _best(features, number)
    torch.testing.assert_close(top.values, values, rtol=1e-6, atol=0)
    # Texts that begin alike have the same activations there to rounding, so any of them may be the one.
    assert torch.equal(top.examples < 0, examples < 0)
    for feature, row in enumerate(top.examples):
        chosen = row[row >= 0].tolist()
        assert len(set(chosen)) == len(chosen)
        places = zip(chosen, top.positions[feature].tolist(), strict=False)
        there = torch.tensor([features[example][place - 1, feature] for example, place in places])
        torch.testing.assert_close(top.values[feature, : len(chosen)], there.float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("number", [1, 3, 40])
@pytest.mark.parametrize(("batch_size", "rows"), [(1, 2), (4, None), (4, 3)])
def test_top_examples_are_those_of_a_list_of_all(
    model, tokenizer, saes, everything, number, batch_size, rows, monkeypatch
):
    if rows is not None:
        small_blocks(monkeypatch, rows, 64)
    measures = Measures(top_examples=number)
    found = collect(model, tokenizer, {"aligned": TEXTS}, saes, measures=measures, batch_size=batch_size)
    for moments, features in zip(found.of("aligned"), everything, strict=True):
        _assert_best(moments.top, features, number)


# Few values, so most are tied, among examples and within one.
TIED = torch.randint(0, 4, (12, 6, 5), generator=torch.Generator().manual_seed(0)).double()


def _tops(order, batch_size, number=3, rows=None):
    handle = _Identity(5)
    sums = ClassSums(handle, "token", Measures(top_examples=number))
    sums._chunk = 5 * (rows or 1000)
    for numbers in torch.tensor(order).split(batch_size):
        ids = torch.zeros(len(numbers), 6, dtype=torch.int64)
        everything = torch.ones_like(ids, dtype=torch.bool)
        sums.add(TIED[numbers], Batch(ids, ids + 1, everything, everything, numbers))
    return sums.finish().top


@pytest.mark.parametrize("rows", [1, 4, None])
@pytest.mark.parametrize("order", [list(range(12)), list(range(12))[::-1], [7, 2, 9, 4, 0, 11, 5, 1, 10, 3, 8, 6]])
def test_ties_go_to_the_earlier_example_and_token(order, rows):
    values, examples, positions = _best(list(TIED), 3)
    top = _tops(order, 5, rows=rows)
    torch.testing.assert_close(top.values, values, rtol=0, atol=0)
    assert torch.equal(top.examples, examples)
    assert torch.equal(top.positions, positions - 1)  # there is no BOS here


def test_sums_of_top_examples_depend_on_no_order():
    parts = [_tops(numbers, 5) for numbers in ([0, 3, 7], [1, 2, 11, 4], [5], [6, 8, 9, 10])]
    whole = _tops(list(range(12)), 5)
    for order in ((0, 1, 2, 3), (3, 1, 0, 2), (2, 3, 1, 0)):
        top = sum((parts[place] for place in order), TopExamples.empty(5, 3))
        for name in ("values", "examples", "positions"):
            assert torch.equal(getattr(top, name), getattr(whole, name)), name


def _assert_sample(sample, features, limit):
    """The kept examples are the first ones of the fixed order, with their means over tokens."""
    kept = sample_order(torch.arange(len(features))).argsort()[:limit].sort().values
    sample = sample.rows(sample.examples.argsort())
    assert torch.equal(sample.examples, kept)
    exact = torch.stack([features[number].mean(0) for number in kept.tolist()])
    torch.testing.assert_close(sample.dense(64), exact.float(), rtol=1e-6, atol=0)
    assert len(sample.values) == (exact > 0).sum()


@pytest.mark.parametrize("limit", [1, 7, 23, 50])
@pytest.mark.parametrize("batch_size", [1, 4, 9])
def test_sample_holds_means_of_the_same_examples_always(model, tokenizer, saes, everything, limit, batch_size):
    measures = Measures(sample=limit)
    for pooling in ("token", "mean"):
        found = collect(model, tokenizer, {"a": TEXTS}, saes, measures=measures, batch_size=batch_size, pooling=pooling)
        for moments, features in zip(found.of("a"), everything, strict=True):
            _assert_sample(moments.sample, features, limit)


def _samples(limit, shards):
    values = torch.rand(30, 64, generator=torch.Generator().manual_seed(0)).sub(0.7).relu()
    values[4] = 0  # a row without entries
    return values, [ExampleSample.of(values[numbers], numbers, limit) for numbers in shards]


@pytest.mark.parametrize("limit", [5, 30])
def test_samples_of_shards_add_up_to_that_of_the_whole(limit):
    shards = list(torch.randperm(30, generator=torch.Generator().manual_seed(1)).split([4, 13, 1, 12]))
    values, samples = _samples(limit, shards)
    for order in ((0, 1, 2, 3), (2, 0, 3, 1)):
        _assert_sample(
            sum((samples[place] for place in order), ExampleSample.empty(limit)), list(values[:, None]), limit
        )


def test_rows_and_dense_pick_and_unfold_rows():
    values, (sample,) = _samples(30, [torch.arange(30)])
    assert torch.equal(sample.dense(64), values)
    keep = torch.tensor([9, 4, 9, 0])
    assert torch.equal(sample.rows(keep).dense(64), values[keep])
    assert torch.equal(sample.rows(keep).examples, keep)
    assert sample.rows(keep[:0]).dense(64).shape == (0, 64)


def test_order_of_the_sample_looks_random_and_repeats_nothing():
    order = sample_order(torch.arange(4096))
    assert len(order.unique()) == 4096
    ranks = order.argsort().argsort().double()
    assert torch.corrcoef(torch.stack([ranks, torch.arange(4096).double()]))[0, 1].abs() < 0.05
    assert torch.corrcoef(torch.stack([ranks[1:], ranks[:-1]]))[0, 1].abs() < 0.05
    # splitmix64 of the places 1 and 2, as its author's code gives it from the state 0
    assert [value % 2**64 for value in sample_order(torch.tensor([1, 2])).tolist()] == [
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F4,
    ]


def test_raw_moments_are_those_of_what_the_sae_reads(model, tokenizer, saes):
    measures = Measures(covariance=True)
    for pooling in ("token", "mean", "last"):
        found = collect(model, tokenizer, {"a": TEXTS}, saes, measures=measures, pooling=pooling, batch_size=4)
        for moments, handle in zip(found.of("a"), saes, strict=True):
            with torch.no_grad():
                states = [
                    model(input_ids=torch.tensor([tokenizer(text)["input_ids"]]), output_hidden_states=True)
                    for text in TEXTS
                ]
            block = handle.identity.site.block + (handle.identity.site.kind == "resid_post")
            exact, _ = pool([state.hidden_states[block][0, 1:] for state in states], pooling)
            assert moments.raw.count == len(exact)
            torch.testing.assert_close(moments.raw.mean, exact.mean(0), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(moments.raw.products, exact.T @ exact, rtol=1e-5, atol=1e-4)


def test_measures_that_were_not_asked_for_are_not_there(model, tokenizer, saes):
    moments = collect(model, tokenizer, {"a": TEXTS}, saes).of("a")[0]
    assert (moments.histogram, moments.top, moments.sample, moments.raw.products) == (None,) * 4


@pytest.mark.parametrize("change", [{"top_examples": -1}, {"sample": True}, {"sample": 1.5}])
def test_impossible_measures_are_config_errors(change):
    with pytest.raises(ConfigError, match=f"{next(iter(change))}=.* is no number of examples"):
        Measures(**change)


def test_measures_of_two_selectors_join():
    joined = Measures(histograms=True, sample=3) | Measures(covariance=True, sample=2, top_examples=1)
    assert joined == Measures(histograms=True, covariance=True, top_examples=1, sample=3)


def test_parts_that_one_side_lacks_are_left_out_of_a_sum(model, tokenizer, saes):
    full, bare = (
        collect(model, tokenizer, {"a": TEXTS}, saes, measures=measures).of("a")[0]
        for measures in (Measures(True, True, 2, 3), Measures())
    )
    for both in (full + bare, bare + full):
        assert (both.histogram, both.top, both.sample, both.raw.products) == (None,) * 4
        assert both.count == 2 * full.count
    assert isinstance(full + full, FeatureMoments)
    assert torch.equal((full + full).histogram.counts, 2 * full.histogram.counts)
    assert_same_parts(full, full.shifted(0))


def test_memory_depends_on_no_amount_of_data():
    def held(examples):
        sums = ClassSums(_Identity(16), "token", Measures(True, True, 2, 8))
        generator = torch.Generator().manual_seed(0)
        for numbers in torch.arange(examples).split(4):
            ids = torch.zeros(len(numbers), 5, dtype=torch.int64)
            everything = torch.ones_like(ids, dtype=torch.bool)
            values = torch.rand(len(numbers), 5, 16, generator=generator)
            sums.add(values, Batch(ids, ids + 1, everything, everything, numbers))
        return _size(vars(sums)), sums.finish()

    (small, _), (large, moments) = held(80), held(800)
    assert moments.examples == 800
    assert large <= small * 1.05


def _size(entry):
    """Bytes of all tensors within."""
    if isinstance(entry, torch.Tensor):
        return entry.untyped_storage().nbytes()
    if isinstance(entry, dict):
        return sum(_size(part) for part in entry.values())
    if isinstance(entry, list | tuple):
        return sum(_size(part) for part in entry)
    return _size(vars(entry)) if hasattr(entry, "__dict__") and not isinstance(entry, type | _Identity) else 0
