"""Two processes that read one data set together both get what one process gets."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from peft_sae import FeatureStatistics
from peft_sae.statistics.share import Share

from . import share_worker as worker
from .dense import assert_same_sums

ROOT = Path(__file__).parents[2]
RANKS = range(worker.PROCESSES)


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """What all cases leave; starting is what takes long, so they share one start."""
    folder = tmp_path_factory.mktemp("shares")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(worker.PROCESSES)]
    command += ["-m", "tests.statistics.share_worker", str(folder)]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=150
    )
    assert done.returncode == 0, done.stderr
    return folder


def _read(folder, rank):
    error = folder / f"error-{rank}.txt"
    assert not error.exists(), error.read_text()
    return FeatureStatistics.from_pretrained(folder / f"statistics-{rank}")


def _errors(folder):
    return [(folder / f"error-{rank}.txt").read_text() for rank in RANKS]


def _passes(folder):
    return [int((folder / f"passes-{rank}.json").read_text()) for rank in RANKS]


ALIKE = {
    "whole": worker.run,
    "mean": lambda: worker.run(pooling="mean"),
    "cut": lambda: worker.run(max_length=6),
    "generators": worker.run,
    "attribution": worker.run_attribution,
    "few": lambda: worker.run(worker.FEW),
    "resumed": worker.run,
    "resumed-few": lambda: worker.run(worker.FEW),
}


@pytest.mark.parametrize("case", ALIKE)
def test_every_process_gets_the_statistics_of_one(output, case):
    alone = ALIKE[case]()
    for rank in RANKS:
        found = _read(output / case, rank)
        # Batches are of other lengths, so the model rounds otherwise; gradients are sums that cancel.
        tolerance = 1e-5 if case == "attribution" else 1e-6
        assert_same_sums(found, alone, rtol=tolerance, atol=tolerance)
        assert found.settings == alone.settings
        assert found.saes == alone.saes
    assert (alone.settings["truncated"]["aligned"] > 0) is (case == "cut")


@pytest.mark.parametrize("case", ALIKE)
def test_all_processes_get_the_same_bits(output, case):
    first, *others = [
        [(output / case / f"statistics-{rank}" / f"statistics.{end}").read_bytes() for end in ("json", "safetensors")]
        for rank in RANKS
    ]
    assert all(other == first for other in others)


def test_each_process_runs_its_share(output):
    assert _passes(output / "whole") == [3 + 2, 3 + 2]  # 6 and 5, 4 and 4 texts in batches of two
    assert _passes(output / "few") == [1 + 1, 1]


def test_process_that_is_told_to_be_alone_reads_everything(output):
    assert _passes(output / "alone")[0] == 6 + 4
    assert_same_sums(_read(output / "alone", 0), worker.run(), rtol=0)
    assert not (output / "alone" / "statistics-1").exists()


@pytest.mark.parametrize(("case", "number", "rank"), [("broken-first", 4, 0), ("broken-second", 5, 1)])
def test_error_in_one_process_ends_all(output, case, number, rank):
    error = f"DataError: In the aligned data: Example {number} has int"
    errors = _errors(output / case)
    assert errors.pop(rank).startswith(error)
    (other,) = errors
    told = f"DataError: The statistics were not finished in another process (process {rank}: {error}"
    assert other.startswith(told)


def test_empty_class_is_an_error_in_all(output):
    for error in _errors(output / "empty"):
        assert error.startswith("DataError: The unaligned data set is empty")


def test_each_process_goes_on_from_its_own_state(output):
    folder = output / "resumed"
    assert {path.name for path in folder.glob("state*")} == {"state.0-of-2", "state.1-of-2"}
    stopped, told = ((folder / f"first-{rank}.txt").read_text() for rank in (1, 0))
    assert stopped == "RuntimeError: no more electricity"
    assert told.startswith("DataError: The statistics were not finished in another process (process 1: RuntimeError")
    assert _passes(folder) == [0, 1]  # the first had finished, the second had done four of five
    assert _passes(output / "resumed-few") == [0, 0]


def test_state_of_another_run_in_one_process_ends_all(output):
    first, second = _errors(output / "foreign")
    assert second.startswith("ConfigError: '")
    assert "is the state of another run" in second
    assert first.startswith("DataError: The statistics were not finished in another process (process 1: ConfigError")


def test_shares_are_a_partition():
    for world in (1, 2, 5):
        shares = [Share(rank, world) for rank in range(world)]
        assert all(sum(share.has(number) for share in shares) == 1 for number in range(20))
