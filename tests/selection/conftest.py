"""A table of features from tiny models, for the tests of the table and of its formats."""

import pytest
import torch

from peft_sae import collect_statistics, load_saes, select_features
from peft_sae.selection import describe_features
from peft_sae.statistics.measures import Measures
from tests.tiny import WORDS, make_model, make_sae, make_tokenizer

HOOKS = ("blocks.0.hook_resid_post", "blocks.2.hook_resid_post")


def _texts(seed, count=6):
    generator = torch.Generator().manual_seed(seed)
    return [
        " ".join(WORDS[index] for index in torch.randint(0, len(WORDS), (3 + 5 * number,), generator=generator))
        for number in range(count)
    ]


DATA = {"aligned": _texts(0), "unaligned": _texts(1)}


@pytest.fixture(scope="session")
def model():
    return make_model()


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def saes():
    return load_saes([make_sae(hook, seed=seed, neuronpedia_id=f"m/{seed}-res") for seed, hook in enumerate(HOOKS)])


@pytest.fixture(scope="session")
def statistics(model, tokenizer, saes):
    return collect_statistics(
        model, tokenizer, DATA, saes, measures=Measures(top_examples=2), batch_size=4, progress=False
    )


@pytest.fixture(scope="session")
def selection(statistics):
    return select_features(statistics, top_k=5)


@pytest.fixture(scope="session")
def table(selection, saes, model, tokenizer, statistics):
    return describe_features(
        selection, saes=saes, model=model, tokenizer=tokenizer, statistics=statistics, data=DATA, top_tokens=3
    )
