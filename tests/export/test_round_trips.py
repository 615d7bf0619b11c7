"""There and back, for every family in float32 and bfloat16: merged, exported, loaded elsewhere, as configuration."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftConfig, PeftModel, get_peft_config, get_peft_model
from safetensors.torch import load_file, save_file

from peft_sae import SaeSubspaceConfig, export_lora, merge_checkpoint
from tests.tiny import FAMILIES, make_classifier, make_model, make_subspace, make_tokenizer

ROOT = Path(__file__).parents[2]
IDS = torch.randint(4, 16, (2, 9), generator=torch.Generator().manual_seed(0))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Half an ulp of rounding to nearest, as a share of the value, and what the logits may differ by in each dtype: sums are
# taken in another order there, over a few blocks.
HALF_ULP = {"fp32": 2**-24, "bf16": 2**-8}
TOLERANCE = {"fp32": 1e-5, "bf16": 5e-2}
# Of merged weights, which are rounded themselves.
MERGED = {"fp32": 1e-5, "bf16": 0.1}
KINDS = {"free": {}, "frozen": {"freeze_basis": True, "r": "auto"}, "protected": {}}
CASES = [
    (family, dtype, list(KINDS)[(number + place) % 3])
    for number, family in enumerate([*FAMILIES, "bert"])
    for place, dtype in enumerate(DTYPES)
]
TARGETS = {
    "gpt2": {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
    "bert": {"target_modules": ["query", "value", "attention.output.dense"], "task_type": "SEQ_CLS"},
    "mixtral": {"target_modules": ["q_proj", "v_proj", "o_proj"]},
    "qwen3_moe": {"target_modules": ["q_proj", "v_proj", "o_proj"]},
}


def name_of(case):
    return "-".join(case)


def make_base(family):
    return make_classifier() if family == "bert" else make_model(family)


def build(case, folder):
    """Write base, adapter, exported LoRA and the adapted model's logits."""
    family, dtype, kind = case
    model = make_base(family)
    protected = {"blocks.1.hook_resid_post": 2} if kind == "protected" else None
    subspace = make_subspace(model, protected=protected)
    model = model.to(DTYPES[dtype])
    model.save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    fields = {
        "r": 4,
        "target_modules": "all-linear",
        "task_type": "CAUSAL_LM",
        **TARGETS.get(family, {}),
        **KINDS[kind],
    }
    adapted = get_peft_model(model, SaeSubspaceConfig(subspace=subspace, **fields))
    generator = torch.Generator().manual_seed(1)
    for _, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    adapted.save_pretrained(folder / "adapter")
    export_lora(folder / "adapter", folder / "lora")
    with torch.no_grad():
        logits = adapted.eval()(IDS).logits
    save_file({"ids": IDS, "logits": logits.contiguous()}, folder / "expected.safetensors")


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    root = tmp_path_factory.mktemp("cases")
    for case in CASES:
        (root / name_of(case)).mkdir()
        build(case, root / name_of(case))
    return root


def tensors_of(folder):
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_adapter_to_merged_checkpoint_to_plain_transformers(case, cases, tmp_path):
    family, dtype, _ = case
    folder = cases / name_of(case)

    merge_checkpoint(folder / "base", folder / "adapter", tmp_path / "merged")

    plain = type(make_base(family)).from_pretrained(tmp_path / "merged", dtype="auto").eval()
    assert not any("lora_" in name for name, _ in plain.named_parameters())
    expected = load_file(folder / "expected.safetensors")["logits"]
    with torch.no_grad():
        found = plain(IDS).logits
    assert found.dtype == DTYPES[dtype]
    assert float((found - expected).float().norm()) <= MERGED[dtype] * float(expected.float().norm())
    # Every weight against the same sum in float64: one rounding away from it.
    exact = type(plain).from_pretrained(folder / "base", dtype=torch.float64)
    PeftModel.from_pretrained(exact, folder / "adapter", autocast_adapter_dtype=False).double().merge_and_unload()
    exact.save_pretrained(tmp_path / "exact")
    wanted, base, merged = (tensors_of(place) for place in (tmp_path / "exact", folder / "base", tmp_path / "merged"))
    assert wanted.keys() == merged.keys()
    changed = 0
    for name, tensor in merged.items():
        assert tensor.dtype == DTYPES[dtype], name
        changed += not torch.equal(tensor, base[name])
        # The sum itself is taken in float32, whose error is that of the largest of what is added.
        allowed = HALF_ULP[dtype] * wanted[name].abs() + 16 * HALF_ULP["fp32"] * wanted[name].abs().max()
        assert bool(((tensor.double() - wanted[name]).abs() <= allowed).all()), name
    assert changed


@pytest.fixture(scope="module")
def without_us(tmp_path_factory):
    """The Python of an environment that has everything but this package."""
    root = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", root / "env"], check=True)
    python = root / "env" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    (root / "packages").mkdir()
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if "peft_sae" not in entry.name.lower() and entry.suffix != ".pth":
            (root / "packages" / entry.name).symlink_to(entry)
    ask = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    site = subprocess.run([python, "-c", ask], check=True, capture_output=True, text=True).stdout.strip()
    (Path(site) / "packages.pth").write_text(f"{root / 'packages'}\n")
    return python


def ask_worker(python, adapter, cases, target, **environment):
    command = [python, *([] if environment else ["-I"]), Path(__file__).parent / "round_trip_worker.py"]
    done = subprocess.run(
        [*command, adapter, cases, target],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(target.read_text())


def assert_same(found):
    assert set(found["cases"]) == {name_of(case) for case in CASES}
    for (_, dtype, _), case in zip(CASES, map(found["cases"].get, map(name_of, CASES)), strict=True):
        assert case["dtype"] == str(DTYPES[dtype])
        assert case["difference"] <= TOLERANCE[dtype] * case["scale"]
        assert case["effect"] > 4 * TOLERANCE[dtype] * case["scale"]


def test_adapter_to_lora_to_peft_where_we_are_not_installed(cases, without_us, tmp_path):
    found = ask_worker(without_us, "lora", cases, tmp_path / "found.json")

    assert found["installed"] is False
    assert {case["type"] for case in found["cases"].values()} == {"LORA"}
    assert_same(found)
    for case in CASES:
        files = {path.name for path in (cases / name_of(case) / "lora").iterdir()}
        assert {"adapter_config.json", "adapter_model.safetensors", "sae_subspace.json"} <= files
        assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in files)


def test_adapter_folder_to_a_fresh_process_that_imports_us(cases, tmp_path):
    found = ask_worker(sys.executable, "adapter", cases, tmp_path / "found.json", PYTHONPATH=str(ROOT))

    assert {case["type"] for case in found["cases"].values()} == {"SAE_SUBSPACE"}
    assert_same(found)


CONFIGS = {
    "defaults": {},
    "automatic": {"r": "auto", "freeze_basis": True, "fill": "zeros", "layer_map": "exact"},
    "patterns": {"rank_pattern": {"q_proj": 2, "^model.layers.1": 3}, "alpha_pattern": {"v_proj": 7.5}},
    "targets as a pattern": {"target_modules": r".*\.(q|v)_proj"},
    "some layers": {"layers_to_transform": [0, 2], "layers_pattern": "layers"},
    "sides and protection": {"sides": {"q_proj": "none", "o_proj": "write"}, "protect": ["1:40"], "norm_gain": False},
    "variants": {"use_rslora": True, "lora_dropout": 0.1, "bias": "lora_only", "modules_to_save": ["lm_head"]},
}


def plain(config):
    """What a configuration says, sets in an order."""
    data = json.loads(json.dumps(config.to_dict(), default=lambda value: sorted(value)))
    if isinstance(data["target_modules"], list):
        data["target_modules"].sort()
    return data


@pytest.mark.parametrize("fields", CONFIGS.values(), ids=CONFIGS)
def test_configuration_to_json_to_yaml_to_json(fields, tmp_path):
    config = SaeSubspaceConfig(**{"subspace": "outputs/subspace", "target_modules": ["q_proj", "o_proj"], **fields})
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())

    from_yaml = yaml.safe_load(yaml.safe_dump(written))
    assert from_yaml == written
    again = get_peft_config({**from_yaml, "inference_mode": False})

    assert type(again) is SaeSubspaceConfig
    assert plain(again) == plain(config)
    again.save_pretrained(tmp_path / "again")
    second = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    for data in (written, second):
        if isinstance(data["target_modules"], list):
            data["target_modules"].sort()
    assert second == written
    once, twice = SaeSubspaceConfig.from_pretrained(tmp_path), PeftConfig.from_pretrained(str(tmp_path / "again"))
    assert plain(twice) == plain(once)
