"""Fixtures that are built once; nothing is downloaded."""

import os
import sys
import threading

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from tqdm import tqdm

from peft_sae import build_subspace, load_saes

from . import tiny

# Models this small spend far more on waking threads than on arithmetic, above all on a busy machine.
torch.set_num_threads(1)
# For tests that fork and kill: tqdm's own lock is shared by forks, and its monitor is a thread that may hold it.
tqdm.set_lock(threading.RLock())
tqdm.monitor_interval = 0


@pytest.fixture(scope="session")
def llama():
    return tiny.make_model()


@pytest.fixture(scope="session")
def tokenizer():
    return tiny.make_tokenizer()


@pytest.fixture(scope="session")
def saes():
    hooks = ["blocks.0.hook_resid_post", "blocks.2.hook_resid_pre"]
    return load_saes([tiny.make_sae(hook, seed=seed) for seed, hook in enumerate(hooks)])


@pytest.fixture(scope="session")
def subspace(llama, tokenizer, saes):
    return build_subspace(
        llama, tokenizer, saes=saes, aligned=tiny.ALIGNED, unaligned=tiny.UNALIGNED, top_k=6, progress=False
    )


@pytest.fixture
def command(monkeypatch, capsys):
    """Run a command in this process; returns its exit code, what it printed, and its errors on one line."""
    from peft_sae.cli import main

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["peft-sae", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        printed = capsys.readouterr()
        return code, printed.out, " ".join(printed.err.split())

    return call


def pytest_addoption(parser):
    parser.addoption("--parity-table", help="write the table of abilities (tests/parity) to this file")
