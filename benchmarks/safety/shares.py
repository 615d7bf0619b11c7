"""Shares of the parameters that the shipped configurations train, on the shapes of the published models.

    python -m benchmarks.safety.shares

The tiny models of the safety benchmark have wide adapters for their size; what a configuration trains of a model of
billions of parameters is counted by a dry run of it, which needs no weights. Each is counted as it is and with the
other choice of `freeze_basis`.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.common import circumstances
from peft_sae.jobs import read_job
from peft_sae.jobs.dry_run import plan_job

CONFIGS = Path(__file__).parents[2] / "configs"


def shares(path: Path) -> dict[str, Any]:
    """Trained and all parameters of a configuration, trainable and frozen."""
    job = read_job(path)
    found: dict[str, Any] = {"frozen as shipped": bool(job.adapter.get("freeze_basis"))}
    for name, frozen in (("trainable", False), ("frozen", True)):
        fields = {**job.adapter, "freeze_basis": frozen, **({"fill": "zeros"} if frozen else {})}
        plan = plan_job(replace(job, adapter=fields))
        found[name] = {"trained": plan.trained, "share": plan.share}
    return found


def main() -> None:
    """Count and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="folder for the result")
    arguments = parser.parse_args()
    result: dict[str, Any] = {"benchmark": "trained shares on published shapes", **circumstances(0, "cpu")}
    result["configurations"] = {path.stem: shares(path) for path in sorted(CONFIGS.glob("*.yaml"))}
    (arguments.output / "result-shares.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result["configurations"], indent=2))


if __name__ == "__main__":
    main()
