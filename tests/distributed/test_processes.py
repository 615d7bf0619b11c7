"""Training in two processes gives the adapter that one process gives, as for LoRA so for us."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from tests.distributed import worker
from tests.tiny import make_model

ROOT = Path(__file__).parents[2]
REFUSED = "fsdp1-blocks-flat"
DEEPSPEED = find_spec("deepspeed") is not None
TOGETHER = [way for way in worker.WAYS if way != "zero3"]
WAYS = [*(way for way in TOGETHER if way != REFUSED), *(["zero3"] if DEEPSPEED else [])]
CASES = [(way, kind) for way in WAYS for kind in worker.kinds(way)]


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """What all ways of training leave. As starting is what takes long, they share one start; DeepSpeed shares none."""
    folder = tmp_path_factory.mktemp("processes")
    start(folder, TOGETHER)
    if DEEPSPEED:
        start(folder, ["zero3"])
    return folder


def start(folder, ways):
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(worker.PROCESSES)]
    command += ["-m", "tests.distributed.worker", str(folder), *ways]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """What one process leaves."""
    folder = tmp_path_factory.mktemp("alone")
    for kind in worker.KINDS:
        worker.run_loop(kind, folder / "loop" / kind)
        worker.run_trainer(kind, folder / "trainer" / kind)
    for kind in worker.kinds("job"):
        worker.run_job(kind, folder / "job" / kind)
    return folder


@pytest.mark.parametrize(("way", "kind"), CASES)
def test_the_adapter_is_that_of_one_process(output, reference, way, kind):
    found, expected = (
        output / way / kind,
        reference / next((name for name in ("trainer", "job") if name in way), "loop") / kind,
    )
    errors = [file.read_text() for file in found.glob("error-*")]
    assert not errors, errors[0]

    # Processes add up the same float32 numbers in another order, three times; what is trained moves by about 0.1.
    weights, wanted = (load_file(folder / "adapter_model.safetensors") for folder in (found, expected))
    assert {name: weight.shape for name, weight in weights.items()} == {
        name: weight.shape for name, weight in wanted.items()
    }
    for name, weight in weights.items():
        torch.testing.assert_close(
            weight, wanted[name], rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert read_config(found) == read_config(expected)
    with torch.no_grad():
        logits = [PeftModel.from_pretrained(make_model(), folder)(worker.IDS).logits for folder in (found, expected)]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


def read_config(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    config["target_modules"].sort()  # a set, in no order
    del config["base_model_name_or_path"]
    return config


@pytest.mark.parametrize("way", WAYS)
def test_a_frozen_basis_keeps_its_bits(output, way):
    start = worker.adapt("frozen").state_dict()
    trained = load_file(output / way / "frozen" / "adapter_model.safetensors")

    for name, weight in trained.items():
        holds_basis = ("lora_A" in name) != any(writer in name for writer in ("o_proj", "down_proj"))
        assert torch.equal(weight, start[name.replace(".weight", ".default.weight")]) is holds_basis, name


@pytest.mark.parametrize("kind", worker.KINDS)
def test_fsdp1_tells_that_flat_units_must_be_all_trained_or_all_frozen(output, kind):
    for error in (output / REFUSED / kind / f"error-{rank}.txt" for rank in range(worker.PROCESSES)):
        assert "FSDP does not support wrapping such modules when use_orig_params=False" in error.read_text()
