import pytest
import torch
from torch.nn.functional import normalize

from peft_sae.selection.tokens import lens_logits, promoted_tokens, token_effects
from tests.tiny import FAMILIES, WIDTH, make_classifier, make_model, make_tokenizer

NOTHING = ((), (), ())


def _directions(count=3, seed=0):
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _derivative(model, direction):
    """d logits / dt when the stream behind the last block is x + t d, with x orthogonal to d and to the ones."""
    model = model.double()
    # The last norm of the model, found by its name and not as the package finds it.
    names = [name for name, _ in model.named_modules() if name.endswith(("norm", "ln_f"))]
    (norm,) = [model.get_submodule(name) for name in names if ".layers." not in name]
    others = torch.linalg.qr(torch.stack([torch.ones(WIDTH, dtype=torch.float64), direction]).T)[0]
    stream = _directions(1, seed=7)[0]
    stream = stream - others @ (others.T @ stream)

    def logits(step):
        moved = stream + step * direction
        handle = norm.register_forward_pre_hook(lambda _, inputs: (moved.expand(1, 2, WIDTH),))
        try:
            return model(torch.tensor([[1, 5]])).logits[0, -1]
        finally:
            handle.remove()

    return torch.autograd.functional.jacobian(logits, torch.zeros((), dtype=torch.float64))


# Experts cannot be multiplied with in float64; what is behind the last block is Mistral's and Qwen's.
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"mixtral", "qwen3_moe"}))
def test_the_lens_is_the_derivative_of_the_models_own_logits(family):
    changes = {"final_logit_softcapping": None} if family == "gemma2" else {}
    model, directions = make_model(family, **changes), _directions()
    found = lens_logits(directions, model)
    expected = torch.stack([_derivative(model, direction) for direction in directions])

    torch.testing.assert_close(normalize(found.double()), normalize(expected), rtol=0, atol=1e-5)
    plain = directions @ model.get_output_embeddings().weight.detach().T
    assert float((normalize(plain) - normalize(expected)).abs().max()) > 1e-2  # so the gain matters here


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_both_ends_are_named_in_order(family):
    model, tokenizer, directions = make_model(family), make_tokenizer(), _directions()
    logits = lens_logits(directions, model)
    effects = token_effects(directions, model, tokenizer, "resid_post", count=4)

    for row, up, down in zip(logits, effects.promoted, effects.suppressed, strict=True):
        order = sorted(range(len(tokenizer)), key=lambda token: float(row[token]))
        assert up == tuple(tokenizer.decode([token]) for token in order[::-1][:4])
        assert down == tuple(tokenizer.decode([token]) for token in order[:4])
    assert promoted_tokens(directions, model, tokenizer, "resid_post", count=4) == effects.promoted
    opposite = token_effects(-directions, model, tokenizer, "mlp_out", count=4)
    assert (opposite.promoted, opposite.suppressed) == (effects.suppressed, effects.promoted)


def test_rows_of_the_vocabulary_that_are_no_tokens_are_never_named():
    model, tokenizer = make_model(), make_tokenizer()
    effects = token_effects(_directions(), model, tokenizer, "resid_post", count=99)
    assert all(len(words) == len(tokenizer) < model.config.vocab_size for words in effects.promoted)
    assert "" not in {word for words in effects.promoted for word in words}


@pytest.mark.parametrize("family", ["gemma2", "gpt2"])
def test_half_precision_gives_the_logits_of_its_own_weights(family):
    half = make_model(family).to(torch.bfloat16)
    single = make_model(family).to(torch.bfloat16).float()
    torch.testing.assert_close(lens_logits(_directions(), half), lens_logits(_directions(), single))
    assert next(half.parameters()).dtype == torch.bfloat16


def test_what_the_head_cannot_read_has_no_tokens():
    model, tokenizer, directions = make_model(), make_tokenizer(), _directions()
    none = [
        token_effects(directions, model, tokenizer, "z"),
        token_effects(directions, model, tokenizer, "mlp_in"),
        token_effects(directions, model, None, "resid_post"),
        token_effects(directions, model, tokenizer, "resid_post", count=0),
        token_effects(directions, make_classifier(), tokenizer, "resid_post"),
        token_effects(directions, make_model().to("meta"), tokenizer, "resid_post"),
        token_effects(directions[:, :-1], model, tokenizer, "resid_post"),
    ]
    model.lm_head.weight = torch.nn.Parameter(torch.ones(20, WIDTH, dtype=torch.int8), requires_grad=False)
    none.append(token_effects(directions, model, tokenizer, "resid_post"))
    assert all((effects.promoted, effects.suppressed) == (NOTHING, NOTHING) for effects in none)


def test_a_norm_that_is_not_there_leaves_the_tokens_out(caplog):
    model = make_model()
    del model.model.norm
    assert lens_logits(_directions(), model) is None
    assert "no last norm at 'model.norm'" in caplog.text
