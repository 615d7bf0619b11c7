"""Kills a job again and again at random moments; run by test_kill.py in a process of its own.

Everything is imported once; each trial is a fork, which costs milliseconds.
"""

import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import torch
from tqdm import tqdm

torch.set_num_threads(1)
# tqdm's own lock is a semaphore that forks share: a child that is killed while it holds it would stop all that follow.
tqdm.set_lock(threading.RLock())
tqdm.monitor_interval = 0  # and no thread may hold a lock in the moment of a fork

from peft import get_peft_model  # noqa: E402

from peft_sae import FeatureStatistics, SaeSubspaceConfig, Subspace, merge_checkpoint  # noqa: E402
from peft_sae.adapter import read_adapter_config, read_adapter_weights  # noqa: E402
from peft_sae.artifact import digest  # noqa: E402
from peft_sae.checkpoint import load_base  # noqa: E402
from peft_sae.jobs.selection import SelectionJob  # noqa: E402
from peft_sae.jobs.selection_run import run_selection  # noqa: E402
from peft_sae.training import train_adapter  # noqa: E402
from tests import tiny  # noqa: E402

KILLS = 30
LONGEST = 120.0  # seconds for a job that takes less than one
TARGET = "target"
# Shares of the job's duration.
MOMENTS = {"merge": (0, 1), "select": (0, 1), "train": (0.2, 1)}


def merge_job(place):
    model = tiny.make_model()
    model.save_pretrained(place / "base", max_shard_size="20KB")
    config = SaeSubspaceConfig(subspace=tiny.make_subspace(model), r=4, target_modules="all-linear")
    get_peft_model(model, config).save_pretrained(place / "adapter")

    def run(target):
        merge_checkpoint(place / "base", place / "adapter", target, max_shard_size="20KB")

    def check(target):
        assert load_base(target) is not None
        return {path.name: len(path.read_bytes()) for path in target.iterdir()}

    return run, check


def select_job(place):
    tiny.make_model().save_pretrained(place / "base")
    tiny.make_tokenizer().save_pretrained(place / "base")
    tiny.make_sae().save_model(str(place / "sae"))
    for name, records in (("aligned", tiny.ALIGNED), ("unaligned", tiny.UNALIGNED)):
        (place / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records * 8)))
    paths = {name: str(place / f"{name}.jsonl") for name in ("aligned", "unaligned")}

    def run(target):
        job = SelectionJob(
            str(place / "base"),
            str(place / "sae"),
            str(target),
            top_k=4,
            batch_size=2,
            statistics=f"{target}-s",
            **paths,
        )
        run_selection(job, progress=False)

    def check(target):
        statistics = FeatureStatistics.from_pretrained(f"{target}-s")
        return [Subspace.from_pretrained(target).digest, digest(statistics.to_tensors()[0])]

    return run, check


def train_job(place):
    model, tokenizer = tiny.make_model(), tiny.make_tokenizer()
    config = SaeSubspaceConfig(subspace=tiny.make_subspace(model), r=4, target_modules=["q_proj"])

    def run(target):
        options = {"num_train_epochs": 1, "seed": 0, "save_steps": 1, "per_device_train_batch_size": 2}
        train_adapter(model, tokenizer, tiny.ALIGNED * 2, config, target, progress=False, **options)

    def check(target):
        read_adapter_config(target)
        Subspace.from_pretrained(target)
        return digest(read_adapter_weights(target))

    return run, check


JOBS = {"merge": merge_job, "select": select_job, "train": train_job}


def forked(run, target):
    """Start the job in a process of its own."""
    child = os.fork()
    if child:
        return child
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        run(target)
        os._exit(0)
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(1)


def wait_for(child):
    """Return the status of a child; one that hangs is killed, and an error."""
    deadline = time.monotonic() + LONGEST
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise AssertionError(f"the job hangs: it takes more than {LONGEST} s")


def wait_for_scratch(child, place):
    """Wait until the job is writing, or done: few of the random moments fall into so short a time."""
    while not any(path.name.startswith(f".{TARGET}") for path in place.iterdir()):
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return


def clean(place, kept):
    for path in set(place.iterdir()) - kept:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def main(kind, place):
    chance = random.Random(0)
    run, check = JOBS[kind](place)
    kept = set(place.iterdir())
    target = place / TARGET
    run(target)  # here, so that no child has to import anything
    for _ in range(2):
        clean(place, kept)
        started = time.monotonic()
        assert wait_for(forked(run, target)) == 0
        duration = time.monotonic() - started
    expected = check(target)
    complete = {path.name for path in place.iterdir()}
    killed, absent, leftovers, trial = 0, 0, 0, 0
    while killed < KILLS:  # some trials are done before their moment
        trial += 1
        if trial % 2 == 0:
            clean(place, kept)  # every other trial finds an earlier version, where one may be replaced
        elif kind != "select":
            shutil.rmtree(target, ignore_errors=True)
        child = forked(run, target)
        time.sleep(duration * chance.uniform(*MOMENTS[kind]))
        if trial % 3 == 0:
            wait_for_scratch(child, place)
        os.kill(child, signal.SIGKILL)
        killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
        leftovers += bool({path.name for path in place.iterdir() if path.name.startswith(".")})
        if target.exists():
            if kind != "select" or Path(f"{target}-s").exists():
                assert check(target) == expected, f"trial {trial}: torn"
            else:
                Subspace.from_pretrained(target)
            if kind != "select":
                shutil.rmtree(target)
        else:
            absent += 1
        assert wait_for(forked(run, target)) == 0, f"trial {trial}: a rerun fails"
        assert check(target) == expected, f"trial {trial}: a rerun differs"
        names = {path.name for path in place.iterdir()}
        assert names == complete, f"trial {trial}: {sorted(names ^ complete)} is left"
    found = {"killed": killed, "trials": trial, "absent": absent, "leftovers": leftovers, "seconds": duration}
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
