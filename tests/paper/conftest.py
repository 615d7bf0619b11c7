"""The stand-ins of the shipped experiments, made once; nothing is downloaded."""

from functools import lru_cache
from pathlib import Path

import pytest

from benchmarks.paper.cost import estimate_cost
from benchmarks.paper.experiment import read_experiment
from benchmarks.paper.models import load_trained
from benchmarks.paper.stand_in import stand_in

FOLDER = Path("benchmarks/paper")
EXPERIMENTS = sorted(FOLDER.glob("*.yaml"))


@lru_cache
def estimate_of(path):
    """The estimate of a shipped experiment, which takes seconds."""
    return estimate_cost(read_experiment(path))


@pytest.fixture(autouse=True, scope="session")
def quick_harness():
    """Without the list of all installed packages that lm-evaluation-harness has pip make for every result."""
    try:
        import lm_eval.evaluator
    except ImportError:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm_eval.evaluator, "add_env_info", lambda results: None)
        yield


@pytest.fixture(scope="session")
def experiment(tmp_path_factory):
    """Gemma-2-2B's experiment with stand-ins, and an endpoint that misbehaves at first."""
    with stand_in(
        read_experiment(FOLDER / "gemma-2-2b.yaml", output=tmp_path_factory.mktemp("gemma-2-2b"))
    ) as experiment:
        yield experiment


@pytest.fixture(scope="session")
def base(experiment):
    """The base model of that experiment."""
    return load_trained(experiment, "base")
