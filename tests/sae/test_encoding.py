import copy

import pytest
import torch
from sae_lens import StandardSAE

from peft_sae import load_saes
from tests.tiny import WIDTH, make_sae

from .blocks import from_blocks, small_blocks

SEPARABLE = ("standard", "jumprelu", "gated", "transcoder", "skip_transcoder")
SEPARABLE += ("jumprelu_transcoder", "jumprelu_skip_transcoder")
INSEPARABLE = ("topk", "matching_pursuit")
INPUTS = 2 + torch.randn(23, WIDTH, generator=torch.Generator().manual_seed(0))


def _shapes(sae, elements):
    return [tuple(found.shape) for _, _, found in load_saes(sae)[0].encode_blocks(INPUTS, elements)]


@pytest.mark.parametrize("kind", SEPARABLE + INSEPARABLE)
@pytest.mark.parametrize("elements", [1, 40, 100, 700, 10**6])
def test_blocks_are_what_sae_lens_encodes(kind, elements, monkeypatch):
    small_blocks(monkeypatch)
    sae = make_sae(kind=kind)
    with torch.no_grad():
        expected = sae.encode(INPUTS)
    assert expected.count_nonzero() > len(INPUTS)
    found = from_blocks(load_saes(sae)[0], INPUTS, elements)
    torch.testing.assert_close(found, expected, rtol=0, atol=4e-6)


@pytest.mark.parametrize("kind", SEPARABLE)
def test_blocks_hold_all_tokens_of_some_features(kind, monkeypatch):
    small_blocks(monkeypatch)
    assert _shapes(make_sae(kind=kind), 23 * 16) == [(23, 16)] * 4


@pytest.mark.parametrize("kind", INSEPARABLE)
def test_blocks_hold_all_features_where_one_depends_on_the_others(kind, monkeypatch):
    small_blocks(monkeypatch)
    assert _shapes(make_sae(kind=kind), 8 * 64) == [(7, 64), (8, 64), (8, 64)]


def test_many_tokens_are_split_as_well():
    inputs = torch.zeros(5000, WIDTH)
    shapes = [found.shape for _, _, found in load_saes(make_sae(features=3000))[0].encode_blocks(inputs, 2**21)]
    assert len(shapes) == 9
    assert all(rows * features <= 2**21 for rows, features in shapes)
    assert sum(a * b for a, b in shapes) == 5000 * 3000


class _Competing(StandardSAE):
    def encode(self, x):
        features = super().encode(x)
        return features * (features == features.max(dim=-1, keepdim=True).values)


def _competing():
    sae = make_sae()
    sae.__class__ = _Competing
    return sae


def _softmax():
    sae = make_sae()
    sae.activation_fn = torch.nn.Softmax(dim=-1)
    return sae


def _hooked():
    sae = make_sae()
    sae.hook_sae_acts_post.add_hook(lambda found, hook: found * (found == found.max(dim=-1, keepdim=True).values))
    return sae


@pytest.mark.parametrize("make", [_competing, _softmax, _hooked])
def test_an_encoder_that_is_not_sae_lens_own_is_run_whole(make, monkeypatch):
    small_blocks(monkeypatch)
    sae = make()
    with torch.no_grad():
        expected = sae.encode(INPUTS)
    torch.testing.assert_close(from_blocks(load_saes(sae)[0], INPUTS, 40), expected, rtol=0, atol=4e-6)
    assert {features for _, features in _shapes(sae, 40)} == {64}


@pytest.mark.parametrize("scaling", ["layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("stop", [False, True])
def test_the_sae_is_as_it_was_between_and_after_blocks(scaling, stop, monkeypatch):
    small_blocks(monkeypatch)
    sae = make_sae("blocks.1.attn.hook_z", settings={"normalize_activations": scaling, "reshape_activations": "hook_z"})
    (handle,) = load_saes(sae)
    before, weights = dict(vars(sae)), copy.deepcopy(sae.state_dict())
    for _ in handle.encode_blocks(INPUTS, 40):
        assert all(vars(sae)[name] is value for name, value in before.items())
        assert set(vars(sae)) == set(before)
        if stop:
            break
    assert set(vars(sae)) == set(before)
    assert all(torch.equal(weight, weights[name]) for name, weight in sae.state_dict().items())
    assert {name: weight.requires_grad for name, weight in sae.named_parameters()} == dict.fromkeys(weights, True)


def test_a_product_is_not_cut_below_what_is_fast():
    assert _shapes(make_sae(), 1) == [(23, 64)]
