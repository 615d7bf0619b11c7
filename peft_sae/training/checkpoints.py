"""The folder of a training's checkpoints: which one to go on from, and whether it is of the same job."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..artifact import read_json, write_json
from ..errors import ArtifactError, ConfigError
from ..writing import discard, replace_file

logger = logging.getLogger(__name__)

FINAL_FOLDER = "final"  # where all processes save to, before one of them moves it
JOB_FILE = "job.json"
WEIGHTS = "weights"  # a digest of the base's, which not every process has
_CARD = "README.md"  # TRL writes one beside its checkpoints
_SCHEMA, _SCHEMA_VERSION = "peft_sae.training", 1
_STATE_FILE = "trainer_state.json"  # what transformers writes last
_WEIGHTS_FILE = "adapter_model.safetensors"
# Arguments that may change between a training and its continuation, since the result does not depend on them.
FREE_ARGUMENTS = frozenset(
    {"logging_steps", "logging_strategy", "report_to", "run_name", "save_total_limit", "dataloader_num_workers"}
)


def check_own(folder: str | Path) -> bool:
    """Check that what a training would write or remove beside its output is its own.

    Args:
        folder: the Trainer's `output_dir`.

    Returns:
        Whether an earlier start has left something there.

    Raises:
        ConfigError: there are files of somebody else.
    """
    folder = Path(folder)
    if (folder / JOB_FILE).is_file():
        return True
    found = [*folder.glob("checkpoint-*"), *(folder / name for name in (FINAL_FOLDER, _CARD))]
    foreign = sorted(path.name for path in found if os.path.lexists(path))
    if foreign:
        raise ConfigError(
            f"'{folder}' holds {foreign[:3]}, and no {JOB_FILE} that says of which job, so this job would write over "
            "them or remove them. Move them away, or give another output."
        )
    return False


def last_checkpoint(folder: str | Path) -> Path | None:
    """Return the latest checkpoint that was written to its end, or None.

    Args:
        folder: the Trainer's `output_dir`.
    """
    folder = Path(folder)
    found, torn = {}, []
    for path in folder.glob("checkpoint-*") if folder.is_dir() else ():
        number = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if number and _is_complete(path):
            found[int(number[1])] = path
        elif number:
            torn.append(path.name)
    if torn and not found:
        logger.warning("No checkpoint in '%s' is complete (%s), so the training begins anew.", folder, sorted(torn))
    return found[max(found)] if found else None


def _is_complete(checkpoint: Path) -> bool:
    try:
        state = json.loads((checkpoint / _STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(state, dict) and (checkpoint / _WEIGHTS_FILE).is_file()


def check_same_job(folder: str | Path, job: Mapping[str, Any]) -> None:
    """Check that the checkpoints in a folder are of a job.

    Args:
        folder: the Trainer's `output_dir`, with checkpoints.
        job: JSON-serialisable description, as `write_job` got it.

    Raises:
        ConfigError: they are of another one.
    """
    try:
        found = read_json(Path(folder) / JOB_FILE, schema=_SCHEMA, newest=_SCHEMA_VERSION).get("job")
        known = found if isinstance(found, dict) else {}
    except ArtifactError as error:
        raise ConfigError(
            f"'{folder}' has checkpoints, and nothing says of which job ({error}). Remove the folder to begin anew, or "
            "give another output."
        ) from error
    before, now = _flat(known), _flat(json.loads(json.dumps(job)))
    different = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    different = [key for key in different if key.removeprefix("arguments.") not in FREE_ARGUMENTS]
    different = [key for key in different if key != WEIGHTS or None not in (before.get(key), now.get(key))]
    if different:
        key = different[0]
        raise ConfigError(
            f"The checkpoints in '{folder}' are of a job with {key}={before.get(key)!r}, and this one has "
            f"{now.get(key)!r}{f' (and {len(different) - 1} more differ)' if len(different) > 1 else ''}, so going on "
            "from them would give neither. Restore the job, remove the folder to begin anew, or give another output."
        )


def write_job(folder: str | Path, job: Mapping[str, Any]) -> None:
    """Write down of which job the checkpoints in a folder will be.

    Raises:
        ArtifactError: it cannot be written.
    """
    with replace_file(Path(folder) / JOB_FILE) as scratch:
        write_json(scratch, {"schema": _SCHEMA, "schema_version": _SCHEMA_VERSION, "job": job})


def finish(folder: str | Path, arguments: Collection[str]) -> None:
    """Tidy up behind a job that is done: checkpoints that nobody asked for were there to go on from, and go.

    Args:
        folder: the Trainer's `output_dir`. What is not the job's own stays in it.
        arguments: names of the training arguments that the job gives.
    """
    folder = Path(folder)
    if not (folder / JOB_FILE).is_file():
        return
    discard(folder / FINAL_FOLDER)
    checkpoints = list(folder.glob("checkpoint-*"))
    if checkpoints and not {"save_strategy", "save_steps"}.isdisjoint(arguments):
        return
    for place in [*checkpoints, folder / _CARD, folder / JOB_FILE]:  # till the end it is known whose the folder is
        discard(place)
    with suppress(OSError):  # it may hold more than this
        folder.rmdir()


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in data.items():
        found.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return found
