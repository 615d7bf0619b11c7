"""Full fine-tuning, with the data and arguments that adapters are trained with."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from pathlib import Path
from typing import Any

from peft_sae.statistics.records import Data
from peft_sae.training.checkpoints import check_own, check_same_job, finish, write_job
from peft_sae.training.examples import Learned, to_dataset
from peft_sae.training.settings import training_arguments
from peft_sae.writing import check_target, replace_folder

_PICKLED = "training_args.bin"


def train_full(
    model: Any,
    tokenizer: Any,
    data: Data,
    output: str | Path,
    *,
    learn: Learned | None = None,
    max_length: int | None = None,
    progress: bool = True,
    **arguments: Any,
) -> None:
    """Train all weights of a model with TRL's `SFTTrainer`, and write the model.

    A training that was stopped goes on from its last complete checkpoint; with other settings or data it is refused.

    Args:
        model: the model, trained in place.
        tokenizer: its tokenizer.
        data: see `peft_sae.training.train_adapter`.
        output: folder that the model is written to; checkpoints go beside it.
        learn: tokens that are learned.
        max_length: tokens per example; by default the model's context length.
        progress: show the Trainer's progress bar and log.
        **arguments: of `trl.SFTConfig`.

    Raises:
        DataError, ArtifactError, ConfigError: as `train_adapter` does.
    """
    check_target(output)
    work = Path(f"{Path(output)}.checkpoints")
    started = check_own(work)
    length = max_length or int(model.config.get_text_config().max_position_embeddings)
    settings = training_arguments("sft", arguments, work, max_length=length, progress=progress)
    dataset = to_dataset("sft", tokenizer, data, length, learn)
    job = {"arguments": arguments, "data": _content(dataset), "max_length": length, "dtype": str(model.dtype)}
    if started and any(work.glob("checkpoint-*")):
        check_same_job(work, job)
    trainer = _make_trainer(model.requires_grad_(True), tokenizer, settings, dataset)
    write_job(work, job)
    checkpoint = last_complete(work)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    with replace_folder(output) as folder:
        trainer.save_model(str(folder))
        (folder / _PICKLED).unlink(missing_ok=True)
    finish(work, arguments)


def _make_trainer(model: Any, tokenizer: Any, settings: Any, dataset: Any) -> Any:
    import trl
    from transformers import PrinterCallback

    with warnings.catch_warnings():
        # TRL asks transformers for checkpointing under its old name.
        warnings.filterwarnings("ignore", message="`(is_)?gradient_checkpointing", category=FutureWarning)
        trainer = trl.SFTTrainer(model, args=settings, processing_class=tokenizer, train_dataset=dataset)
    if settings.disable_tqdm:
        trainer.remove_callback(PrinterCallback)  # what transformers puts in the place of its progress bar
    return trainer


def last_complete(folder: Path) -> Path | None:
    """Return the latest checkpoint whose state, which is written last, is there."""
    found = {}
    for path in folder.glob("checkpoint-*"):
        number = re.fullmatch(r"checkpoint-(\d+)", path.name)
        try:
            state = json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if number and isinstance(state, dict):
            found[int(number[1])] = path
    return found[max(found)] if found else None


def _content(dataset: Any) -> str:
    content = hashlib.sha256()
    for record in dataset:
        content.update(json.dumps(record, sort_keys=True).encode())
    return content.hexdigest()
