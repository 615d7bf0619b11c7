import pytest

from tests.tiny import make_model

from .dense import double_saes


@pytest.fixture(scope="module")
def saes():
    return double_saes()


@pytest.fixture(scope="module")
def model():
    return make_model().double()
