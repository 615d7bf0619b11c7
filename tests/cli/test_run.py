"""Scripts that know nothing of this package, run by it: in processes of their own, as people start them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from peft import PeftModel
from safetensors.torch import load_file

from tests.tiny import ALIGNED, make_model, make_subspace, make_tokenizer

ROOT = Path(__file__).parents[2]

PEFT_SCRIPT = """
import json, sys
from peft import get_peft_config, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import helper  # beside the script

if __name__ == "__main__":
    with open(sys.argv[sys.argv.index("--config") + 1]) as file:
        settings = helper.parse(file.read())
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(settings["model"]), get_peft_config(settings["peft"]))
    rows = []
    with open(settings["data"]) as file:
        for line in file:
            ids = tokenizer(json.loads(line)["prompt"] + json.loads(line)["completion"])["input_ids"][:5]
            rows.append({"input_ids": ids, "labels": ids})
    arguments = TrainingArguments(settings["output"] + "/run", report_to=[], save_strategy="no", max_steps=2,
                                  learning_rate=0.05, use_cpu=True, disable_tqdm=True, per_device_train_batch_size=1)
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    trainer.save_model(settings["output"])
"""

TRL_SCRIPT = """
from dataclasses import dataclass, field

from datasets import load_dataset
from peft import get_peft_config
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer, TrlParser


@dataclass
class ScriptArguments:
    model: str = field(default="")
    data: str = field(default="")
    peft: dict = field(default_factory=dict)


if __name__ == "__main__":
    script, training = TrlParser((ScriptArguments, SFTConfig)).parse_args_and_config()
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(script.model),
        args=training,
        train_dataset=load_dataset("json", data_files=script.data, split="train", cache_dir=training.output_dir),
        processing_class=AutoTokenizer.from_pretrained(script.model),
        peft_config=get_peft_config(script.peft),
    )
    trainer.train()
    trainer.save_model(training.output_dir)
"""

ECHO = """
import signal
import sys
print(__name__, __file__, sys.argv, sys.path[0])
if "--interrupt" in sys.argv:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs that a shell runs in the background ignore it
    signal.raise_signal(signal.SIGINT)
if "--fail" in sys.argv:
    raise KeyError("of the script")
sys.exit(7 if "--code" in sys.argv else None)
"""


@pytest.fixture
def world(tmp_path):
    make_model().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    make_subspace(make_model()).save_pretrained(tmp_path / "subspace")
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in ALIGNED * 2))
    (tmp_path / "scripts").mkdir()
    for name, text in (("peft_way", PEFT_SCRIPT), ("trl_way", TRL_SCRIPT), ("echo", ECHO)):
        (tmp_path / "scripts" / f"{name}.py").write_text(text)
    (tmp_path / "scripts" / "helper.py").write_text("import yaml\nparse = yaml.safe_load\n")
    return tmp_path


def start(world, *arguments, program=("-m", "peft_sae")):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *program, *map(str, arguments)]
    return subprocess.run(command, cwd=world, env=environment, capture_output=True, text=True, timeout=300)


PEFT = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "o_proj"], "task_type": "CAUSAL_LM"}
KINDS = {
    "LORA": {"peft_type": "LORA", **PEFT},
    "SAE_SUBSPACE": {"peft_type": "SAE_SUBSPACE", "subspace": "subspace", **PEFT},
}
TRL = {
    "max_steps": 2,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "learning_rate": 0.05,
}


def write_config(world, script, kind):
    if script == "trl_way":
        settings = {"model": "base", "data": "data.jsonl", "peft": KINDS[kind], "output_dir": "out", **TRL}
    else:
        settings = {"model": "base", "data": "data.jsonl", "output": "out", "peft": KINDS[kind]}
    text = json.dumps(settings) if script == "peft_way" else yaml.safe_dump(settings)
    (world / "config").write_text(text)


def assert_is_adapter(folder, kind):
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == kind
    assert (folder / "subspace").is_dir() is (kind == "SAE_SUBSPACE")
    weights = load_file(folder / "adapter_model.safetensors")
    assert all(weight.abs().sum() > 0 for weight in weights.values())
    PeftModel.from_pretrained(make_model(), folder)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("script", ["peft_way", "trl_way"])
def test_a_script_trains_what_its_config_file_names(world, script, kind):
    write_config(world, script, kind)
    done = start(world, "run", f"scripts/{script}.py", "--config", "config")
    assert done.returncode == 0, done.stderr
    assert_is_adapter(world / "out", kind)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_script_runs_under_a_launcher(world, processes):
    write_config(world, "peft_way", "SAE_SUBSPACE")
    launcher = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", processes, "--num_machines", 1]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", 0]
    done = start(
        world, "-m", "peft_sae", "scripts/peft_way.py", "--config", "config", program=tuple(map(str, launcher))
    )
    assert done.returncode == 0, done.stderr
    assert_is_adapter(world / "out", "SAE_SUBSPACE")


def test_a_script_is_run_as_python_runs_it(world):
    wanted = start(world, "scripts/echo.py", "--help", "-m", "x", program=())
    for way in ([], ["run"]):
        done = start(world, *way, "scripts/echo.py", "--help", "-m", "x")
        assert (done.returncode, done.stdout) == (0, wanted.stdout)
    assert "'--help', '-m', 'x'" in wanted.stdout

    assert start(world, "scripts/echo.py", "--code").returncode == 7
    stopped = start(world, "scripts/echo.py", "--interrupt")
    assert stopped.returncode == 130
    assert stopped.stderr.rstrip().endswith("KeyboardInterrupt")
    failed, plain = start(world, "scripts/echo.py", "--fail"), start(world, "scripts/echo.py", "--fail", program=())
    assert failed.returncode == plain.returncode == 1
    # Optional packages may have something to say on import, before the script begins.
    assert failed.stderr.endswith(plain.stderr)
    assert "KeyError: 'of the script'" in failed.stderr


def test_a_module_is_run_as_python_runs_it(world):
    (world / "package").mkdir()
    (world / "package" / "__init__.py").write_text("")
    (world / "package" / "tool.py").write_text("import sys\nprint(__name__, __spec__.name, sys.argv, sys.path[0])\n")
    wanted = start(world, "-m", "package.tool", "--epochs", "3", program=())
    assert "'--epochs', '3'" in wanted.stdout
    for way in ([], ["run"]):
        done = start(world, *way, "-m", "package.tool", "--epochs", "3")
        assert (done.returncode, done.stdout) == (0, wanted.stdout), done.stderr


def test_a_command_wins_and_what_is_neither_is_told(world):
    (world / "merge").write_text("print('a file with the name of a command')")
    assert "Usage" in start(world, "merge", "--help").stdout
    assert "a file with the name" in start(world, "./merge", "--help").stdout

    done = start(world, "trian", "job.yaml")
    told = " ".join(done.stderr.split())
    assert done.returncode == 2
    assert "'trian' is neither a command nor a file" in told
    assert "Did you mean 'train'?" in told
    done = start(world, "scripts/ecko.py")
    assert done.returncode == 2
    assert "neither a command nor a file" in done.stderr


def test_what_cannot_be_run_is_told(command):
    assert "does not exist" in command("run", "nothing.py")[2]
    assert "No module named 'no_such'" in command("run", "-m", "no_such")[2]
    assert "names no script" in command("run", "--epochs", "3")[2]
    code, printed, _ = command("run", "--help")
    assert code == 0
    assert "SCRIPT" in printed
