"""Attributions against finite differences, and against gradients of the plain model, text by text in float64."""

import pytest
import torch

from peft_sae import load_saes
from peft_sae.errors import ConfigError, DataError, MismatchError
from peft_sae.statistics import Measures
from peft_sae.statistics.gradient import log_likelihood, logit_difference
from tests.tiny import WORDS, make_model, make_sae

from .dense import activations, assert_same_sums, collect, double_saes, make_texts, pool, ratio_standard_error

HOOKS = ("blocks.0.hook_resid_post", "blocks.1.hook_resid_pre", "blocks.1.hook_resid_post")
RECORDS = [
    {"prompt": " ".join(words[: len(words) // 2]), "completion": " " + " ".join(words[len(words) // 2 :])}
    for words in ([*text.split(), "sun"] for text in make_texts(9, 3))
]
POSITIVE, NEGATIVE = ["red", "sea"], ["moon", "hill", "sky"]


@pytest.fixture(scope="module")
def saes():
    return double_saes(HOOKS)


@pytest.fixture(scope="module")
def model():
    return make_model().double()


@pytest.fixture
def difference(tokenizer):
    return logit_difference(tokenizer, POSITIVE, NEGATIVE)


def _whole(record):
    return record["prompt"] + record["completion"]


def _log_likelihood_of_response(logits, ids, record):
    """Of one text: logits [length, vocabulary], token ids with BOS."""
    first = 1 + len(record["prompt"].split())
    return sum(logits[place - 1].log_softmax(-1)[ids[place]] for place in range(first, len(ids)))


def _difference(logits, ids, record):
    places = [[4 + WORDS.index(word) for word in words] for words in (POSITIVE, NEGATIVE)]
    return logits[-1, places[0]].mean() - logits[-1, places[1]].mean()


OBJECTIVES = {"log_likelihood": _log_likelihood_of_response, "difference": _difference}


def _objective(name, difference):
    return log_likelihood if name == "log_likelihood" else difference


def _attributions(model, tokenizer, handle, record, objective):
    """Attributions [tokens, d_sae] of one text, BOS included, by the graph of the plain model."""
    ids = tokenizer(_whole(record))["input_ids"]
    site = handle.identity.site
    out = model(input_ids=torch.tensor([ids]), output_hidden_states=True)
    stream = out.hidden_states[site.block + (site.kind == "resid_post")]
    (gradient,) = torch.autograd.grad(objective(out.logits[0], ids, record), stream)
    features = activations(model, tokenizer, handle, _whole(record))
    return (features * (gradient[0] @ handle.sae.W_dec.T)).detach()


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("pooling", ["token", "mean", "last"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_sums_of_attributions_equal_the_dense_oracle(model, tokenizer, saes, difference, name, pooling, batch_size):
    options = {"tokens": "response", "pooling": pooling, "batch_size": batch_size, "measures": Measures(sample=9)}
    found = collect(model, tokenizer, {"a": RECORDS}, saes, attribute=_objective(name, difference), **options)
    assert found.settings["quantity"] == "attribution"
    for moments, handle in zip(found.of("a"), saes, strict=True):
        examples = [_attributions(model, tokenizer, handle, record, OBJECTIVES[name])[1:] for record in RECORDS]
        exact, owners = pool(examples, pooling)
        tolerance = {"rtol": 1e-5, "atol": 1e-6}  # objectives take logits in float32
        assert (moments.count, moments.examples) == (len(exact), len(RECORDS))
        # Whatever comes behind the last token has no influence; a gradient is exactly zero there.
        assert torch.equal(moments.fired, (exact != 0).sum(0))
        torch.testing.assert_close(moments.mean, exact.mean(0), **tolerance)
        torch.testing.assert_close(moments.variance, exact.var(0, correction=0), **tolerance)
        torch.testing.assert_close(moments.maximum, exact.amax(0).clamp(min=0), **tolerance)
        torch.testing.assert_close(moments.standard_error, ratio_standard_error(exact, owners), **tolerance)
        sample = moments.sample.rows(moments.sample.examples.argsort()).dense(64)
        means = torch.stack([rows[-1] if pooling == "last" else rows.mean(0) for rows in examples])
        torch.testing.assert_close(sample, means.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("index", [0, 2])
def test_attribution_is_the_slope_along_the_decoder_row_times_the_activation(tokenizer, saes, difference, name, index):
    model = make_model("gpt2").double()  # Llama's norms round to float32, which differences would magnify
    handle, record, step = saes[index], RECORDS[0], 1e-5
    ids = tokenizer(_whole(record))["input_ids"]
    features = activations(model, tokenizer, handle, _whole(record))
    block = model.transformer.h[handle.identity.site.block]

    @torch.no_grad()
    def moved(place, feature, by):
        def move(_, __, output):
            shift = torch.zeros(1, len(ids), 32, dtype=torch.float64)
            shift[0, place] = by * handle.sae.W_dec[feature]
            return (output[0] + shift, *output[1:]) if isinstance(output, tuple) else output + shift

        hook = block.register_forward_hook(move)
        try:
            return OBJECTIVES[name](model(input_ids=torch.tensor([ids])).logits[0], ids, record).item()
        finally:
            hook.remove()

    expected = torch.zeros(64, dtype=torch.float64)
    chosen = (features[1:] > 0).sum(0).argsort(descending=True)[:4].tolist()
    for feature in chosen:
        for place in range(1, len(ids)):
            slope = (moved(place, feature, step) - moved(place, feature, -step)) / (2 * step)
            expected[feature] += slope * features[place, feature]
    found = collect(
        model, tokenizer, {"a": [record]}, [handle], tokens="response", attribute=_objective(name, difference)
    )
    assert expected[chosen].abs().min() > 1e-3
    torch.testing.assert_close(found.of("a")[0].total[chosen], expected[chosen], rtol=1e-5, atol=1e-6)


def test_site_without_influence_gets_nothing(tokenizer, saes):
    model = make_model().double()
    model.model.layers[1].register_forward_hook(lambda _, __, output: torch.ones_like(output))
    first, second, third = collect(model, tokenizer, {"a": RECORDS}, saes, attribute=log_likelihood).of("a")
    assert not first.fired.any()
    assert not second.total.any()
    assert third.fired.any()
    assert first.count == second.count == third.count == sum(len(_whole(record).split()) for record in RECORDS)


def test_objective_without_any_influence_is_a_data_error(tokenizer, saes):
    model = make_model().double()
    model.model.norm.register_forward_hook(lambda _, __, output: torch.ones_like(output))
    with pytest.raises(DataError, match="does not depend on the model's activations"):
        collect(model, tokenizer, {"a": ["red sea"]}, saes, attribute=log_likelihood)


def test_objective_without_gradients_is_a_data_error(model, tokenizer, saes):
    with pytest.raises(DataError, match=r"nothing to attribute\. It must be computed from the logits"):
        collect(model, tokenizer, {"a": ["red"]}, saes, attribute=lambda logits, batch: logits.detach().sum())


def test_examples_without_a_counted_token_are_no_observations(model, tokenizer, saes, difference):
    records = [*RECORDS[:3], {"prompt": "red sea sun", "completion": ""}]
    for objective in (log_likelihood, difference):
        one, other, without = (
            collect(model, tokenizer, {"a": data}, saes, tokens="response", attribute=objective, batch_size=size)
            for data, size in ((records, 1), (records, 4), (records[:3], 4))
        )
        for found in (one, other):
            assert_same_sums(found, without, rtol=1e-5, atol=1e-6)


def _state(model):
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    parameters = [(p.requires_grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]
    return [m.training for m in model.modules()], hooks, parameters


def _raise(logits, batch):
    raise RuntimeError("objective of a user")


@pytest.mark.parametrize("fails", [False, True])
def test_model_is_left_as_it_was(tokenizer, saes, fails):
    model = make_model().double().train()
    model.model.layers[1].eval()
    model.model.embed_tokens.weight.requires_grad_(False)
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    before = _state(model)
    if fails:
        with pytest.raises(RuntimeError, match="objective of a user"):
            collect(model, tokenizer, {"a": ["red"]}, saes, attribute=_raise)
    else:
        collect(model, tokenizer, {"a": ["red"]}, saes, attribute=log_likelihood)
    modes, hooks, parameters = _state(model)
    assert (modes, hooks) == before[:2]
    for (needs, grad), (needed, grad_before) in zip(parameters, before[2], strict=True):
        assert needs is needed
        assert (grad is None) is (grad_before is None)
        assert grad is None or torch.equal(grad, grad_before)
    assert all(parameter.grad is None for handle in saes for parameter in handle.sae.parameters())
    assert torch.is_grad_enabled()


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("prepare", ["frozen", "no_grad", "checkpointing"])
def test_how_the_model_trains_does_not_matter(model, tokenizer, saes, prepare):
    reference = collect(model, tokenizer, {"a": RECORDS}, saes, attribute=log_likelihood)
    other = make_model().double()
    if prepare == "frozen":
        other.requires_grad_(False)
    if prepare == "checkpointing":
        other.gradient_checkpointing_enable()
        other.train()
    with torch.set_grad_enabled(prepare != "no_grad"):
        found = collect(other, tokenizer, {"a": RECORDS}, saes, attribute=log_likelihood)
    assert_same_sums(found, reference, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("family", ["gpt2", "opt", "gemma2"])
def test_sites_of_other_families_equal_the_oracle(tokenizer, saes, family):
    model = make_model(family).double()
    found = collect(model, tokenizer, {"a": RECORDS}, saes, tokens="response", attribute=log_likelihood, batch_size=4)
    for moments, handle in zip(found.of("a"), saes, strict=True):
        examples = [
            _attributions(model, tokenizer, handle, record, _log_likelihood_of_response)[1:] for record in RECORDS
        ]
        torch.testing.assert_close(moments.total, torch.cat(examples).sum(0), rtol=1e-4, atol=1e-4)


def test_site_that_the_model_skips_is_a_mismatch_error(tokenizer):
    model = make_model()
    model.model.layers[2].forward = lambda hidden, *args, **kwargs: hidden
    saes = load_saes([make_sae("blocks.2.hook_mlp_out")])
    for objective in (None, log_likelihood):
        with pytest.raises(MismatchError, match=r"does not go through 'model\.layers\.2\.mlp'"):
            collect(model, tokenizer, {"a": ["red sea"]}, saes, attribute=objective)


def test_histograms_of_attributions_are_a_config_error(model, tokenizer, saes):
    measures = Measures(histograms=True)
    with pytest.raises(ConfigError, match=r"Histograms are of activations, .*run of their own"):
        collect(model, tokenizer, {"a": ["red"]}, saes, measures=measures, attribute=log_likelihood)


@pytest.mark.parametrize("scaling", ["constant_norm_rescale", "layer_norm"])
def test_saes_that_rescale_tokens_are_a_config_error(model, tokenizer, scaling):
    saes = load_saes([make_sae(settings={"normalize_activations": scaling})])
    with pytest.raises(ConfigError, match=r"\['blocks\.1\.hook_resid_post'\] rescale each token's activations"):
        collect(model, tokenizer, {"a": ["red"]}, saes, attribute=log_likelihood)
    assert collect(model, tokenizer, {"a": ["red"]}, saes).of("a")[0].count == 1


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ((["red", "red sea"], ["sun"]), r"\['red sea'\] are not single tokens"),
        ((["red"], ["sun hill", "", "sky"]), r"\['sun hill', ''\] are not single tokens"),
        (([], ["sun"]), r"\[\] is no list of tokens"),
        ((["red"], "sun"), "'sun' is no list of tokens"),
    ],
)
def test_texts_that_are_no_tokens_are_config_errors(tokenizer, groups, message):
    with pytest.raises(ConfigError, match=message):
        logit_difference(tokenizer, *groups)


def test_transcoders_are_read_where_they_read_and_attributed_where_they_write(tokenizer):
    model = make_model().double()
    sae = make_sae("blocks.1.mlp.hook_in", kind="transcoder").to(dtype=torch.float64)
    (handle,) = load_saes(sae)
    text = "red sea sun moon"
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    mlp = model.model.layers[1].mlp

    def run(shift=None):
        """Total log-likelihood, and what the MLP reads, with something added to what it writes."""
        read = []
        handles = [mlp.register_forward_pre_hook(lambda _, args: read.append(args[0][0].detach()))]
        if shift is not None:
            handles.append(mlp.register_forward_hook(lambda _, __, out: out + shift))
        logits = model(ids).logits[0, :-1].log_softmax(-1)
        for one in handles:
            one.remove()
        return logits.gather(1, ids[0, 1:, None]).sum().item(), read[0]

    features = handle.encode(run()[1])
    found = collect(model, tokenizer, {"a": [text]}, [handle], attribute=log_likelihood).of("a")[0]
    for feature in features[1:].sum(dim=0).topk(3).indices.tolist():
        exact = 0.0
        for place in range(1, ids.shape[1]):
            step = torch.zeros(1, ids.shape[1], 32).double()
            step[0, place] = 2e-3 * sae.W_dec[feature].detach()
            exact += float(features[place, feature]) * (run(step)[0] - run(-step)[0]) / 4e-3  # norms round to float32
        assert found.total[feature].item() == pytest.approx(exact, rel=1e-3, abs=1e-5)


def test_logit_difference_is_behind_the_tokens_that_count(model, tokenizer, saes, difference):
    options = {"attribute": difference, "batch_size": 3}
    whole = [{**record, "completion": " fish"} for record in RECORDS]
    behind_prompt = collect(model, tokenizer, {"a": whole}, saes, tokens="prompt", **options)
    behind_answer = collect(model, tokenizer, {"a": whole}, saes, tokens="response", **options)
    bare = collect(model, tokenizer, {"a": [record["prompt"] for record in RECORDS]}, saes, **options)
    for one, other, last in zip(behind_prompt.of("a"), bare.of("a"), behind_answer.of("a"), strict=True):
        # A causal model: nothing behind the prompt's last token has a gradient.
        torch.testing.assert_close(one.total, other.total, rtol=1e-4, atol=1e-6)
        assert not torch.allclose(one.total, last.total, rtol=1e-2)
