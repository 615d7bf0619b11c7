"""SIGKILL at 30 random moments of each job: what is there is complete, and a rerun completes and leaves nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="each trial is a fork, which this system does not have")
@pytest.mark.parametrize("kind", ["merge", "select", "train"])
def test_a_kill_leaves_nothing_torn(kind, tmp_path):
    command = [sys.executable, "-W", "ignore", "-m", "tests.files.kill_worker", kind, str(tmp_path)]

    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600)

    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["killed"] == 30
    assert found["absent"] > 5
    assert found["leftovers"] > 0  # so there was something to tidy up
