"""What the benchmarks share: Subspaces of random directions, and what a result records of its circumstances."""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from peft_sae.artifact import package_versions
from peft_sae.sae.identity import SaeIdentity
from peft_sae.sae.placement import find_layout
from peft_sae.subspace import Subspace, SubspaceSite
from peft_sae.subspace.protected import ProtectedSite
from peft_sae.subspace.site import principal_basis

_READ_AT_ONCE = 2**20


def make_subspace(
    model: PreTrainedModel, blocks: Sequence[int], *, rank: int, features: int, seed: int, protected: int = 0
) -> Subspace:
    """Random unit directions in place of features: time does not depend on what they mean."""
    generator = torch.Generator().manual_seed(seed)
    width = model.config.hidden_size
    sites, guards = [], []
    for block in blocks:
        directions = torch.nn.functional.normalize(torch.randn(features, width, generator=generator), dim=1)
        basis, coefficients = principal_basis(directions.double(), 1.0)
        ones = torch.ones(features, dtype=torch.float64)
        digest = f"{block:064d}"
        identity = SaeIdentity(f"sae{block}", f"blocks.{block}.hook_resid_post", width, 16384, None, None, digest)
        sites.append(
            SubspaceSite(
                sae=identity,
                features=torch.arange(features),
                scores=ones,
                q_values=ones,
                aligned_means=ones,
                unaligned_means=ones,
                aligned_rates=ones,
                unaligned_rates=ones,
                directions=directions,
                basis=basis[:rank].float(),
                coefficients=coefficients[:rank].float(),
                tokens=((),) * features,
            )
        )
        if protected:
            kept = torch.nn.functional.normalize(torch.randn(protected, width, generator=generator), dim=1)
            guards.append(ProtectedSite(identity, torch.arange(1000, 1000 + protected), kept, ((),) * protected))
    config = model.config
    description = {
        "name": "",
        "model_type": config.model_type,
        "hidden_size": width,
        "num_hidden_layers": config.num_hidden_layers,
    }
    return Subspace(tuple(sites), find_layout(model), description, {"selector": "random"}, protected=tuple(guards))


def summary(values: Sequence[float], *, draws: int = 2000, seed: int = 0) -> dict[str, float]:
    """Mean of some values and its bootstrap 95 % interval (percentiles of the means of draws with replacement)."""
    found = torch.tensor(values, dtype=torch.float64)
    chosen = torch.randint(len(found), (draws, len(found)), generator=torch.Generator().manual_seed(seed))
    low, high = found[chosen].mean(dim=1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"mean": float(found.mean()), "low": low, "high": high}


def options(about: str | None) -> argparse.ArgumentParser:
    """Return a parser whose help keeps the lines of what it is about, and shows every option's default."""
    return argparse.ArgumentParser(description=about, formatter_class=_Help)


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Both."""


def at_least_one(text: str) -> int:
    """Read a count of one or more, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no count. Give 1 or more.")
    return int(text)


def timing_options(about: str | None, *, blocks: int, repetitions: int, output: Path) -> argparse.Namespace:
    """Read the options of a benchmark that times some blocks of a model, with these defaults."""
    parser = options(about)
    parser.add_argument("--blocks", type=int, default=blocks)
    parser.add_argument("--repetitions", type=int, default=repetitions)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=output, help="folder for the result")
    return parser.parse_args()


@lru_cache
def digest_of(source: str) -> str | None:
    """SHA-256 of a file, or of a folder's files; None of what is not here, as models and data of the Hub are."""
    place, content = Path(source), hashlib.sha256()
    if not place.exists():
        return None
    for path in sorted(place.rglob("*")) if place.is_dir() else [place]:
        if path.is_file():
            content.update(f"{path.relative_to(place)}\0{path.stat().st_size}\0".encode())
            with path.open("rb") as file:
                while chunk := file.read(_READ_AT_ONCE):
                    content.update(chunk)
    return content.hexdigest()


def cut_torn_line(path: Path) -> None:
    """Cut off a last line that a stop has left without its end: what is appended would become part of it."""
    if path.is_file():
        with path.open("rb+") as file:
            file.truncate(file.read().rfind(b"\n") + 1)


def circumstances(seed: int, device: str) -> Mapping[str, Any]:
    """Seed, versions, machine and commit of a run, and whether tracked files differed from the commit."""
    commit = _git("rev-parse", "HEAD")
    return {
        "seed": seed,
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "versions": package_versions(),
        "machine": {
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "load_before": round(os.getloadavg()[0], 2),
        },
        "commit": commit,
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
    }


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=False).stdout.strip()
