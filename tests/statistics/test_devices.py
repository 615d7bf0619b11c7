"""Models and SAEs in any dtype, offloaded, or in training give what a plain model gives."""

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model

from peft_sae import load_saes
from peft_sae.statistics import Measures
from peft_sae.statistics.gradient import log_likelihood
from tests.tiny import make_model, make_sae

from .dense import HOOKS, assert_same_sums, collect, make_texts

# No two texts begin alike, so there is no doubt about the best of them.
DATA = {
    "aligned": [f"{word} {text}" for word, text in zip(("red", "sea", "sun", "sky"), make_texts(4, 0), strict=True)]
}
ALL = Measures(histograms=True, covariance=True, top_examples=2, sample=3)


def _saes(dtype=torch.float32, **options):
    return load_saes([make_sae(hook, seed=seed, **options).to(dtype=dtype) for seed, hook in enumerate(HOOKS)])


@pytest.fixture(scope="module")
def reference(tokenizer):
    return collect(make_model(), tokenizer, DATA, _saes(), measures=ALL)


@pytest.fixture(scope="module")
def attributions(tokenizer):
    return collect(make_model(), tokenizer, DATA, _saes(), attribute=log_likelihood)


def _dispatch(model, folder):
    places = {"model.embed_tokens": "disk", "model.layers.0": "disk", "model.layers.1": "cpu", "model.layers.2": "cpu"}
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}
    return dispatch_model(model, places, main_device="cpu", offload_dir=folder)


OFFLOADS = {
    "cpu": lambda model, folder: cpu_offload(model, execution_device="cpu"),
    "disk": lambda model, folder: disk_offload(model, folder, execution_device="cpu"),
    "dispatched": _dispatch,
}


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("quantity", ["activation", "attribution"])
def test_offloaded_models_give_the_same(tokenizer, reference, attributions, tmp_path, offload, quantity):
    model = OFFLOADS[offload](make_model(), tmp_path / "offload")
    assert model.model.embed_tokens.weight.device.type == "meta"
    model.lm_head.weight.requires_grad_(False)
    before = {name: (p.device.type, p.requires_grad, p.is_inference()) for name, p in model.named_parameters()}
    if quantity == "activation":
        assert_same_sums(collect(model, tokenizer, DATA, _saes(), measures=ALL), reference, rtol=1e-6)
    else:
        found = collect(model, tokenizer, DATA, _saes(), attribute=log_likelihood)
        assert_same_sums(found, attributions, rtol=1e-6, atol=1e-9)
    assert {name: (p.device.type, p.requires_grad, p.is_inference()) for name, p in model.named_parameters()} == before
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("offload", OFFLOADS)
def test_offloaded_models_can_be_run_both_ways_in_turn(tokenizer, reference, attributions, tmp_path, offload):
    model, saes = OFFLOADS[offload](make_model(), tmp_path / "offload"), _saes()
    for _ in range(2):
        assert_same_sums(collect(model, tokenizer, DATA, saes, measures=ALL), reference, rtol=1e-6)
        found = collect(model, tokenizer, DATA, saes, attribute=log_likelihood)
        assert_same_sums(found, attributions, rtol=1e-6, atol=1e-9)


def _relative(found, expected):
    """How far means are from the expected ones, as a share of the mean activation of a feature."""
    return (found.mean - expected.mean).abs().max() / expected.mean.mean()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("half", ["model", "sae", "both"])
def test_half_precision_gives_the_same_to_rounding(tokenizer, reference, dtype, half):
    model = make_model().to(torch.float32 if half == "sae" else dtype)
    saes = _saes(torch.float32 if half == "model" else dtype)
    found = collect(model, tokenizer, DATA, saes, measures=ALL)
    limit = 0.2 if dtype == torch.bfloat16 else 0.03
    for one, other in zip(found.of("aligned"), reference.of("aligned"), strict=True):
        assert (one.count, one.examples) == (other.count, other.examples)
        assert one.total.dtype == one.maximum.dtype == torch.float64
        assert 0 < _relative(one, other) < limit
        assert (one.fired - other.fired).abs().max() <= 2
        torch.testing.assert_close(one.histogram.counts.sum(1), one.fired)
        torch.testing.assert_close(one.sample.values.isfinite().all(), torch.tensor(True))
    # The SAEs are what is compared, not how they are stored: their rounded weights are others.
    assert (found.saes == reference.saes) is (half == "model")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_saes_are_summed_up_exactly(tokenizer, dtype):
    """Sums are those of the rounded activations, whatever the rounding."""
    model, (handle, _) = make_model(), _saes(dtype)
    found = collect(model, tokenizer, DATA, [handle], batch_size=1).of("aligned")[0]
    rows = []
    for text in DATA["aligned"]:
        with torch.inference_mode():
            out = model(input_ids=torch.tensor([tokenizer(text)["input_ids"]]), output_hidden_states=True)
        rows.append(handle.encode(out.hidden_states[1][0, 1:]).double())
    exact = torch.cat(rows)
    assert torch.equal(found.fired, (exact > 0).sum(0))
    assert torch.equal(found.maximum, exact.amax(0))
    torch.testing.assert_close(found.total, exact.sum(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(found.total_squares, exact.square().sum(0), rtol=1e-12, atol=0)


def test_attributions_in_half_precision_are_the_same_to_rounding(tokenizer, attributions):
    for model_dtype, sae_dtype in [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)]:
        model = make_model().to(model_dtype)
        found = collect(model, tokenizer, DATA, _saes(sae_dtype), attribute=log_likelihood)
        for one, other in zip(found.of("aligned"), attributions.of("aligned"), strict=True):
            assert one.count == other.count
            assert torch.corrcoef(torch.stack([one.total, other.total]))[0, 1] > 0.99


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_model_in_training_with_checkpointing_gives_the_same(tokenizer, reference):
    model = make_model()
    model.gradient_checkpointing_enable()
    model.train()
    assert_same_sums(collect(model, tokenizer, DATA, _saes(), measures=ALL), reference, rtol=0)
    assert model.training
    assert model.model.layers[0].gradient_checkpointing


@pytest.mark.parametrize("kind", ["jumprelu", "topk", "gated"])
def test_saes_of_other_kinds_equal_what_sae_lens_computes(tokenizer, kind):
    model, (handle, _) = make_model(), _saes(kind=kind)
    before = copy.deepcopy(handle.sae.state_dict())
    found = collect(model, tokenizer, DATA, [handle], batch_size=1).of("aligned")[0]
    with torch.inference_mode():
        states = [
            model(input_ids=torch.tensor([tokenizer(text)["input_ids"]]), output_hidden_states=True).hidden_states
            for text in DATA["aligned"]
        ]
        features = handle.sae.encode(torch.cat([state[1][0, 1:] for state in states]))
    exact = (features.to_dense() if features.is_sparse else features).double()
    assert torch.equal(found.fired, (exact > 0).sum(0))
    torch.testing.assert_close(found.total, exact.sum(0), rtol=1e-5, atol=1e-6)
    assert all(torch.equal(weight, before[name]) for name, weight in handle.sae.state_dict().items())
