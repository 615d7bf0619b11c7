"""What the tests of statistics compare with: all activations of a data set at once, in float64, text by text."""

import copy
from dataclasses import dataclass

import torch

from peft_sae import collect_statistics, load_saes
from peft_sae.sae import encoding
from peft_sae.statistics import accumulate
from tests.tiny import WORDS, make_sae

HOOKS = ("blocks.0.hook_resid_post", "blocks.1.hook_resid_pre")


@dataclass(frozen=True)
class Text:
    """A record, and the tokens of the text made from it, by words; BOS is the token 0."""

    record: object
    words: list[str]
    places: dict[str, list[int]]  # of the tokens that each choice counts


def make_texts(count, seed, *, longest=11):
    """Plain texts of 1 to `longest` words."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [" ".join(WORDS[i] for i in torch.randint(12, (n,), generator=generator).tolist()) for n in lengths]


def make_chats(count, seed):
    """Conversations of one to three rounds."""
    words = iter(make_texts(6 * count, seed, longest=5))
    found = []
    for number in range(count):
        messages, tokens, turns = [], ["<bos>"], []
        for role in ("user", "assistant") * (1 + number % 3):
            said = next(words).split()
            messages.append({"role": role, "content": " ".join(said)})
            begin = len(tokens) + 1
            tokens += [f"{role}:", *said]
            turns.append(list(range(begin, len(tokens))))
        everything = list(range(1, len(tokens)))
        places = {
            "all": everything,
            "prompt": [place for place in everything if place < turns[-1][0]],
            "response": turns[-1],
            "assistant": [place for turn in turns[1::2] for place in turn],
        }
        found.append(Text({"messages": messages}, tokens[1:], places))
    return found


def double_saes(hooks=HOOKS, **options):
    """SAEs in float64, which leave no doubt about which feature fires."""
    return load_saes([make_sae(hook, seed=seed, **options).to(dtype=torch.float64) for seed, hook in enumerate(hooks)])


def small_blocks(monkeypatch, rows, features):
    """Have activations computed for so few tokens and features at a time."""
    monkeypatch.setattr(encoding, "_LEAST_ROWS", 1)
    monkeypatch.setattr(encoding, "_LEAST_FEATURES", features)
    monkeypatch.setitem(accumulate._CHUNK_ELEMENTS, "cpu", rows * features)


def collect(model, tokenizer, data, saes, **options):
    return collect_statistics(model, tokenizer, data, saes, **{"progress": False, **options})


@torch.no_grad()
def activations(model, tokenizer, handle, text):
    """Features of one text's tokens, BOS included, float64 [tokens, d_sae]."""
    exact = copy.deepcopy(model).double()
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    hidden = exact(input_ids=ids, output_hidden_states=True).hidden_states
    site, sae = handle.identity.site, handle.sae
    x = hidden[site.block + (site.kind == "resid_post")][0]
    return torch.relu((x - sae.b_dec.double()) @ sae.W_enc.double() + sae.b_enc.double())


def pool(examples, pooling):
    """Observations [n, d_sae], and the number of the example that each comes from, of examples [tokens, d_sae]."""
    kept = [(number, rows) for number, rows in enumerate(examples) if len(rows)]
    if pooling == "token":
        owners = torch.tensor([number for number, rows in kept for _ in rows])
        return torch.cat([rows for _, rows in kept]), owners
    one = {"mean": lambda rows: rows.mean(0), "max": lambda rows: rows.amax(0), "last": lambda rows: rows[-1]}[pooling]
    return torch.stack([one(rows) for _, rows in kept]), torch.tensor([number for number, _ in kept])


def ratio_standard_error(observations, owners):
    """Cochran, Sampling Techniques, (6.13) without the finite-population correction, written out."""
    sums = {}
    for row, owner in zip(observations, owners.tolist(), strict=True):
        total, count = sums.get(owner, (torch.zeros_like(row), 0))
        sums[owner] = (total + row, count + 1)
    ratio = sum(total for total, _ in sums.values()) / sum(count for _, count in sums.values())
    clusters = len(sums)
    residual = sum((total - ratio * count) ** 2 for total, count in sums.values()) / (clusters - 1)
    average = sum(count for _, count in sums.values()) / clusters
    return (residual / clusters).sqrt() / average


def assert_same_sums(first, second, *, rtol=1e-12, atol=0.0):
    """The same counts exactly, and the same sums, parts included."""
    assert list(first.moments) == list(second.moments)
    for label in first.moments:
        for one, other in zip(first.of(label), second.of(label), strict=True):
            assert (one.count, one.examples, one.count_squares) == (other.count, other.examples, other.count_squares)
            assert torch.equal(one.fired, other.fired)
            for name in ("total", "total_squares", "maximum", "example_squares", "example_products"):
                torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=rtol, atol=atol)
            assert_same_parts(one, other, rtol=rtol, atol=atol)


def assert_same_parts(one, other, *, rtol=1e-12, atol=0.0):
    for name in ("histogram", "raw", "top", "sample"):
        assert (getattr(one, name) is None) is (getattr(other, name) is None), name
    if one.histogram is not None:
        assert torch.equal(one.histogram.counts, other.histogram.counts)
    if one.raw is not None:
        assert one.raw.count == other.raw.count
        torch.testing.assert_close(one.raw.total, other.raw.total, rtol=1e-5, atol=1e-5)
        if one.raw.products is not None:
            torch.testing.assert_close(one.raw.products, other.raw.products, rtol=1e-5, atol=1e-5)
    if one.top is not None:
        assert torch.equal(one.top.examples, other.top.examples)
        assert torch.equal(one.top.positions, other.top.positions)
        torch.testing.assert_close(one.top.values, other.top.values, rtol=max(rtol, 1e-6), atol=atol)
    if one.sample is not None:
        ours, theirs = (part.rows(part.examples.argsort()) for part in (one.sample, other.sample))
        assert torch.equal(ours.examples, theirs.examples)
        assert torch.equal(ours.ends, theirs.ends)
        assert torch.equal(ours.features, theirs.features)
        torch.testing.assert_close(ours.values, theirs.values, rtol=max(rtol, 1e-6), atol=atol)
