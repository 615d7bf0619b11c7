"""Loads adapters in a process of its own and compares their logits; run by test_round_trips.py.

It imports nothing of this project unless it is told to, as it also runs where this project is not installed.
"""

import importlib.util
import json
import sys
from pathlib import Path

import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file


def compare(case, adapter):
    config = json.loads((case / "base" / "config.json").read_text())
    base = getattr(transformers, config["architectures"][0]).from_pretrained(case / "base", dtype="auto")
    expected = load_file(case / "expected.safetensors")
    with torch.no_grad():
        plain = base.eval()(expected["ids"]).logits
        model = PeftModel.from_pretrained(base, case / adapter).eval()
        found = model(expected["ids"]).logits
    return {
        "type": str(model.peft_config["default"].peft_type.value),
        "difference": float((found - expected["logits"]).abs().max()),
        "scale": float(expected["logits"].abs().max()),
        "effect": float((found - plain).abs().max()),
        "dtype": str(found.dtype),
    }


def main(adapter, root, target):
    if adapter == "adapter":
        import peft_sae  # noqa: F401
    cases = sorted(path for path in root.iterdir() if (path / adapter).is_dir())
    found = {
        "installed": importlib.util.find_spec("peft_sae") is not None,
        "cases": {case.name: compare(case, adapter) for case in cases},
    }
    target.write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
