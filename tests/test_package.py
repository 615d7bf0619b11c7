"""What the package as a whole promises: light imports, one direction, true documents."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import peft_sae

PACKAGE = Path(peft_sae.__file__).parent
ROOT = PACKAGE.parent

# Later stages may import earlier ones. What is not a stage is at the bottom.
ORDER = [
    "errors",
    "escape",
    "layout",
    "reading",
    "scratch",
    "writing",
    "artifact",
    "adapter",
    "checkpoint",
    "sae",
    "statistics",
    "selection",
    "subspace",
    "tuner",
    "inspect",
    "edit",
    "training",
    "export",
    "jobs",
    "cli",
    "demo",
]
HEAVY = ("sae_lens", "transformer_lens", "datasets", "pandas", "trl", "typer")


def all_imports(path):
    """Stages of this package that a module imports, at the top or inside a function."""
    package = path.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            target = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            yield next((part for part in target if part), "")


MODULES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.parent != PACKAGE or path.stem in ORDER]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_stage_knows_nothing_of_later_stages(path):
    stage = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    imports = set(all_imports(path)) - {""}
    if stage == "cli":  # the command `demo` imports the demo when it is called
        imports -= {"demo"}

    assert all(ORDER.index(name) <= ORDER.index(stage) for name in imports), imports


@pytest.mark.parametrize("path", sorted((PACKAGE / "tuner").glob("*.py")), ids=lambda path: path.name)
def test_the_tuner_imports_nothing_but_the_subspace(path):
    assert set(all_imports(path)) <= {*ORDER[: ORDER.index("artifact") + 1], "subspace", "tuner"}


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_importing_the_package_is_light():
    code = (
        "import peft, sys; old = set(sys.modules); import peft_sae\n"
        f"print(sorted(({set(HEAVY)} & set(sys.modules)) - old))"
    )

    assert run_python(code).strip() == "[]"


def test_loading_and_running_an_adapter_imports_no_sae_library(tmp_path):
    from peft import get_peft_model

    from tests.tiny import make_model, make_subspace

    model = make_model()
    model.save_pretrained(tmp_path / "base")
    config = peft_sae.SaeSubspaceConfig(subspace=make_subspace(model), r=2, target_modules=["q_proj"])
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    code = (
        "import sys, torch, peft_sae\n"
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'base')!r})\n"
        f"model = PeftModel.from_pretrained(model, {str(tmp_path / 'adapter')!r})\n"
        "model(torch.tensor([[1, 5, 6]]))\n"
        "print([m for m in ('sae_lens', 'transformer_lens') if m in sys.modules])"
    )

    assert run_python(code).strip() == "[]"


def test_public_names_are_all_there():
    for name in peft_sae.__all__:
        assert getattr(peft_sae, name) is not None
    assert peft_sae.load_saes is __import__("peft_sae.sae", fromlist=["load_saes"]).load_saes
    with pytest.raises(AttributeError, match="has no attribute 'load_sae'"):
        peft_sae.load_sae  # noqa: B018


def test_errors_are_of_the_promised_kinds():
    from peft_sae import errors

    kinds = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]
    for kind in kinds:
        if issubclass(kind, peft_sae.PeftSaeError) and kind is not peft_sae.PeftSaeError:
            assert issubclass(kind, (ValueError, OSError, ImportError))


# transformers 5.23 renames the argument; the old name is the one that every supported version knows.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "path", [*sorted((ROOT / "configs").glob("*.yaml")), PACKAGE / "demo" / "job.yaml"], ids=lambda path: path.name
)
def test_every_shipped_job_passes_its_schema_and_trainings_own(path, tmp_path):
    from transformers import TrainingArguments

    from peft_sae.jobs import read_job

    job = read_job(path)

    assert job.adapter_config().peft_type == "SAE_SUBSPACE"
    TrainingArguments(output_dir=str(tmp_path), **{**job.training, "bf16": False})


README = (ROOT / "README.md").read_text()


def test_the_readmes_python_is_true_to_the_signatures():
    """Every keyword that the README's Python gives to a public name exists."""
    import inspect

    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    calls = 0
    for block in blocks:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("peft_sae."):
                name = ast.unparse(node.func).removeprefix("peft_sae.")
                parameters = inspect.signature(getattr(peft_sae, name)).parameters
                assert {keyword.arg for keyword in node.keywords} <= set(parameters), name
                calls += 1
    assert calls >= 4


def test_the_readmes_json_is_a_config():
    from peft import get_peft_config

    (block,) = re.findall(r"```json\n(.*?)```", README, flags=re.S)

    assert get_peft_config(json.loads(block)).subspace == "outputs/subspace"


def test_the_readme_names_every_field_and_command():
    from dataclasses import fields

    from peft import LoraConfig

    own = {field.name for field in fields(peft_sae.SaeSubspaceConfig)} - {field.name for field in fields(LoraConfig)}
    assert all(f"| `{name}` |" in README for name in own)
    assert all(f"peft-sae {command}" in README for command in ("demo", "select", "train", "merge", "export-lora"))


def test_the_constraints_pin_what_the_project_needs():
    constraints = (ROOT / "constraints.txt").read_text().lower()
    assert "torch==2.13.0" in constraints.split()
    assert yaml.safe_load((ROOT / "configs" / "gemma-2-2b.yaml").read_text())["adapter"]["r"] == 32
