"""Every pooling of every choice of tokens against all activations at once, in float64."""

import pytest
import torch

from peft_sae.statistics import FeatureMoments

from .dense import activations, collect, make_chats, pool, ratio_standard_error, small_blocks

CHATS = make_chats(9, 0)
POOLINGS = ("token", "mean", "max", "last")


@pytest.fixture(scope="module")
def everything(model, tokenizer, saes):
    """Per SAE and text the features of all tokens."""
    return [[activations(model, tokenizer, handle, " ".join(chat.words)) for chat in CHATS] for handle in saes]


@pytest.mark.parametrize("tokens", ["all", "prompt", "response", "assistant"])
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize(("batch_size", "rows"), [(1, 2), (4, None), (4, 3)])
def test_pooled_statistics_equal_the_dense_oracle(
    model, tokenizer, saes, everything, tokens, pooling, batch_size, rows, monkeypatch
):
    if rows is not None:  # chunks shorter than an example, which also hold parts of two
        small_blocks(monkeypatch, rows, 24)
    data = {"aligned": [chat.record for chat in CHATS]}
    statistics = collect(model, tokenizer, data, saes, tokens=tokens, pooling=pooling, batch_size=batch_size)
    for moments, features in zip(statistics.of("aligned"), everything, strict=True):
        examples = [found[chat.places[tokens]] for found, chat in zip(features, CHATS, strict=True)]
        exact, owners = pool(examples, pooling)
        sizes = torch.bincount(owners)
        assert (moments.count, moments.examples) == (len(exact), len(CHATS))
        assert moments.count_squares == int(sizes.square().sum())
        assert torch.equal(moments.fired, (exact > 0).sum(0))
        assert torch.equal(moments.firing_rate, (exact > 0).double().mean(0))
        torch.testing.assert_close(moments.mean, exact.mean(0), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(moments.variance, exact.var(0, correction=0), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(moments.maximum, exact.amax(0), rtol=1e-10, atol=1e-12)
        # Of a maximum that is the same in all examples, the difference of squares leaves the root of the rounding.
        expected = ratio_standard_error(exact, owners)
        torch.testing.assert_close(moments.standard_error, expected, rtol=1e-8, atol=1e-7)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_examples_without_a_counted_token_are_no_observations(model, tokenizer, saes, pooling):
    records = [{"prompt": "red sea", "completion": end} for end in (" sun moon", "", " hill")]
    options = {"tokens": "response", "pooling": pooling, "batch_size": 2}
    found, without = (collect(model, tokenizer, {"aligned": data}, saes, **options) for data in (records, records[::2]))
    assert found.settings["examples"] == {"aligned": 3}
    for one, other in zip(found.of("aligned"), without.of("aligned"), strict=True):
        assert (one.count, one.examples) == (other.count, other.examples) == (3 if pooling == "token" else 2, 2)
        torch.testing.assert_close(one.total, other.total)
        torch.testing.assert_close(one.standard_error, other.standard_error)


def _clusters(seed, *, examples=60, features=40):
    """Tokens [n, features] whose examples have random offsets and lengths, and the example of each."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 30, (examples,), generator=generator)
    owners = torch.repeat_interleave(torch.arange(examples), sizes)
    offsets = torch.randn(examples, features, generator=generator, dtype=torch.float64)
    noise = torch.randn(len(owners), features, generator=generator, dtype=torch.float64)
    return (3 + offsets[owners] + noise).clamp(min=0), owners


def test_standard_error_of_independent_observations_is_the_textbooks():
    values, _ = _clusters(0)
    moments = FeatureMoments.of(values)
    torch.testing.assert_close(moments.standard_error, values.std(0, correction=1) / len(values) ** 0.5)


def test_standard_error_of_clusters_is_that_of_a_ratio_estimator():
    values, owners = _clusters(1)
    shuffled = torch.randperm(len(values), generator=torch.Generator().manual_seed(0))
    moments = FeatureMoments.of(values[shuffled], owners[shuffled])
    torch.testing.assert_close(moments.standard_error, ratio_standard_error(values, owners), rtol=1e-10, atol=0)


def test_standard_error_of_clusters_is_close_to_the_jackknifes():
    values, owners = _clusters(2)
    means = torch.stack([values[owners != left_out].mean(0) for left_out in range(60)])
    jackknife = (59 / 60 * (means - means.mean(0)).square().sum(0)).sqrt()
    standard_error = FeatureMoments.of(values, owners).standard_error
    torch.testing.assert_close(standard_error, jackknife, rtol=0.04, atol=0)
    naive = values.std(0, correction=1) / len(values) ** 0.5
    assert (standard_error > 2 * naive).all()


def test_standard_error_of_one_example_is_unknown():
    assert FeatureMoments.of(torch.ones(3, 2), torch.zeros(3, dtype=torch.int64)).standard_error.isnan().all()


def test_differences_between_samples_of_one_population_are_as_large_as_standard_error_says():
    first, second = (FeatureMoments.of(*_clusters(seed, examples=150, features=3000)) for seed in (3, 4))

    def spread(first_error, second_error):
        return ((first.mean - second.mean) / (first_error.square() + second_error.square()).sqrt()).std().item()

    assert spread(first.standard_error, second.standard_error) == pytest.approx(1, abs=0.1)
    naive = [(moments.variance / moments.count).sqrt() for moments in (first, second)]
    assert spread(*naive) > 2
