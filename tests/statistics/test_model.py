import pytest
import torch

from peft_sae.errors import MismatchError
from peft_sae.statistics.model import check_same_model, model_description, weights_digest
from tests.tiny import make_model


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_digest_is_of_the_weights_and_not_of_their_dtype(family):
    model = make_model(family)
    digest = weights_digest(model)
    assert weights_digest(make_model(family)) == digest
    assert weights_digest(make_model(family).to(torch.bfloat16)) == digest
    name, parameter = list(model.named_parameters())[-3]
    parameter.data += 0.5
    assert weights_digest(model) != digest, name


def test_weights_that_cannot_be_compared_have_no_digest():
    assert weights_digest(make_model().to("meta")) is None
    assert weights_digest(make_model().half()) is None


def test_another_model_is_refused():
    model = make_model()
    description = model_description(model)
    check_same_model(description, model)
    check_same_model({**description, "digest": None, "name": "elsewhere"}, model)
    with pytest.raises(MismatchError, match=r"another model than .*'num_hidden_layers': \(9, 3\).*Collect them again"):
        check_same_model({**description, "num_hidden_layers": 9}, model)
    model.model.norm.weight.data += 0.5
    with pytest.raises(MismatchError, match="'digest'"):
        check_same_model(description, model)
