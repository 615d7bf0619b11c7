"""A whole job in two processes that work together."""

import os
import subprocess
import sys
from pathlib import Path

import torch
import yaml
from peft import PeftModel

from peft_sae import FeatureStatistics
from tests.jobs.conftest import SELECT
from tests.tiny import make_model

ROOT = Path(__file__).parents[2]


def test_two_processes_select_and_train_together(world):
    job = {
        "model": "base",
        "data": "aligned.jsonl",
        "output": "adapter",
        "select": {**SELECT, "statistics": "statistics"},
        "adapter": {"r": 4, "target_modules": ["q_proj", "o_proj"]},
        "training": {"max_steps": 2, "learning_rate": 0.05, "per_device_train_batch_size": 1, "use_cpu": True},
        "report": "report.html",
        "merged": "merged",
    }
    (world / "job.yaml").write_text(yaml.safe_dump(job))
    launcher = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    done = subprocess.run(
        [sys.executable, *launcher, "-m", "peft_sae", "train", "job.yaml", "--quiet"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Adapter written to adapter") == 1
    ids = torch.arange(4, 12)[None]
    with torch.no_grad():
        adapted = PeftModel.from_pretrained(make_model(), "adapter").eval()(ids).logits
        merged = make_model().from_pretrained("merged").eval()(ids).logits
    torch.testing.assert_close(adapted, merged, rtol=1e-4, atol=1e-4)
    # Both read their share of the texts.
    assert FeatureStatistics.from_pretrained("statistics").moments["aligned"][0].count == 10  # tokens
    places = {"base", "saes", "aligned.jsonl", "unaligned.jsonl", "preferences.jsonl", "job.yaml"}
    assert {path.name for path in world.iterdir()} == places | {
        *("adapter", "adapter-subspace", "statistics", "report.html", "merged")
    }
