"""Training an adapter with TRL."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, PeftSaeError
from ..statistics.model import weights_digest
from ..statistics.records import Data
from ..writing import check_target, discard, replace_folder
from .checkpoints import (
    FINAL_FOLDER,
    WEIGHTS,
    check_own,
    check_same_job,
    finish,
    last_checkpoint,
    write_job,
)
from .examples import Learned, to_dataset
from .settings import Method, training_arguments

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

logger = logging.getLogger(__name__)

_PICKLED = "training_args.bin"


def train_adapter(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    config: PeftConfig,
    output: str | Path,
    *,
    method: Method = "sft",
    eval_data: Data | None = None,
    learn: Learned | None = None,
    max_length: int | None = None,
    callbacks: Sequence[type[TrainerCallback]] = (),
    progress: bool = True,
    **arguments: Any,
) -> PeftModel:
    """Put an adapter on a model and train it with TRL's `SFTTrainer` or `DPOTrainer`.

    A training that was stopped goes on from its last complete checkpoint when it is started again; with other settings
    or other data it is refused. Under a launcher (`accelerate launch`) the processes train together, and one writes.

    Args:
        model: the base model, adapted in place.
        tokenizer: its tokenizer.
        data: for `sft`, records with `prompt` and `completion`, or with `messages`, of which the answers are learned,
            or plain text, which is learned whole; see `collect_statistics`. For `dpo`, records with `chosen` and
            `rejected`.
        config: the adapter's configuration, of any PEFT type.
        output: folder that the trained adapter is written to, with the tokenizer; missing or empty. Checkpoints go
            beside it, into a folder whose name ends in `.checkpoints`; they stay if `save_strategy` or `save_steps` is
            given.
        method: `sft` or `dpo` (arXiv 2305.18290).
        eval_data: texts for `eval_strategy`, in the form of `data`.
        learn: tokens that `sft` learns, see `encode_examples`.
        max_length: tokens per example; longer ones are cut. By default the model's context length.
        callbacks: classes of `TrainerCallback`s that are made with the Trainer, such as `SubspaceCallback`.
        progress: show the Trainer's progress bar and its log; False prints nothing.
        **arguments: of `trl.SFTConfig` or `trl.DPOConfig`, and so of `transformers.TrainingArguments`.

    Returns:
        The adapted model, in evaluation mode.

    Raises:
        DataError: the data are empty or malformed.
        ArtifactError: the output cannot be written.
        ConfigError: an argument that the Trainer does not know or cannot use, or checkpoints of another job.
    """
    check_target(output)
    config = copy.deepcopy(config)  # injection writes into it, and it may be used again
    work = Path(f"{Path(output)}.checkpoints")
    started = check_own(work)
    length = max_length or _context_length(model)
    settings = training_arguments(method, arguments, work, max_length=length, progress=progress)
    dataset = to_dataset(method, tokenizer, data, length, learn)
    held_out = None if eval_data is None else to_dataset(method, tokenizer, eval_data, length, learn)
    job = _describe(method, arguments, config, model, dataset, held_out, length)
    checkpoint = last_checkpoint(work)
    if started and any(work.glob("checkpoint-*")):
        check_same_job(work, job)
    if checkpoint is not None:
        logger.warning("The training goes on from '%s'.", checkpoint)
    with _own_forward(model):
        trainer = _make_trainer(
            method, model, settings, tokenizer, config, train_dataset=dataset, eval_dataset=held_out
        )
        _gather_when_saving(trainer.accelerator)
        if not progress:
            from transformers import PrinterCallback

            trainer.remove_callback(PrinterCallback)  # what transformers puts in the place of its progress bar
        for kind in callbacks:
            trainer.add_callback(kind(trainer))
        if settings.should_save:
            write_job(work, job)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        _save(trainer, Path(output), work)
        if settings.should_save:
            finish(work, arguments)
        trainer.accelerator.wait_for_everyone()
        adapted: PeftModel = trainer.accelerator.unwrap_model(trainer.model)
        if settings.gradient_checkpointing:
            _stop_checkpointing(adapted)
    return adapted.eval()


def _make_trainer(
    method: Method, model: Any, settings: Any, tokenizer: Any, config: PeftConfig, **datasets: Any
) -> Any:
    import trl

    kind = trl.DPOTrainer if method == "dpo" else trl.SFTTrainer
    try:
        with warnings.catch_warnings():
            # PEFT and TRL ask transformers for checkpointing under its old name.
            warnings.filterwarnings("ignore", message="`(is_)?gradient_checkpointing", category=FutureWarning)
            return kind(model, args=settings, processing_class=tokenizer, peft_config=config, **datasets)
    except PeftSaeError:
        raise
    except (ValueError, TypeError) as error:
        raise ConfigError(f"trl.{kind.__name__} refuses the job ({error}).") from error


def _save(trainer: Any, output: Path, work: Path) -> None:
    """Write the adapter; sharded weights are gathered by all processes, and one moves what was written."""
    place = work / FINAL_FOLDER
    if trainer.args.should_save:
        discard(place)
    trainer.accelerator.wait_for_everyone()
    trainer.save_model(str(place))
    trainer.accelerator.wait_for_everyone()
    if trainer.args.should_save:
        with replace_folder(output) as folder:
            for path in place.iterdir():
                if path.name != _PICKLED:
                    shutil.move(path, folder / path.name)


def _gather_when_saving(accelerator: Any) -> None:
    """Have FSDP write whole weights, as PEFT's files hold; from shards transformers writes no adapter at all."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None:
        plugin.set_state_dict_type("FULL_STATE_DICT")


@contextmanager
def _own_forward(model: Any) -> Iterator[None]:
    """Take TRL's own forward method off the model again, which computes its loss in tiles."""
    before = model.__dict__.get("forward")
    try:
        yield
    finally:
        if before is not None:
            model.forward = before
        else:
            model.__dict__.pop("forward", None)


def _stop_checkpointing(adapted: Any) -> None:
    base = adapted.get_base_model()
    if hasattr(base, "activation_checkpointing_disable"):  # its name from transformers 5.23 on
        base.activation_checkpointing_disable()
    else:
        base.gradient_checkpointing_disable()
    base.disable_input_require_grads()


def _describe(
    method: Method, arguments: Any, config: PeftConfig, model: Any, dataset: Any, held_out: Any, max_length: int
) -> dict[str, Any]:
    """What must agree between a training and its continuation, as JSON."""
    settings = {key: value for key, value in config.to_dict().items() if key != "subspace"}
    subspace = getattr(config, "subspace", None)
    digest = getattr(subspace, "digest", subspace)
    described = {
        "method": method,
        "arguments": dict(arguments),
        "adapter": settings,
        "subspace": digest,
        "data": _content(dataset),
        "eval_data": None if held_out is None else _content(held_out),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "max_length": max_length,
        "model": model.config.to_dict(),
        WEIGHTS: weights_digest(model),
    }
    return dict(json.loads(json.dumps(described, default=_plain, sort_keys=True)))


def _content(dataset: Any) -> str:
    content = hashlib.sha256()
    for record in dataset:
        content.update(json.dumps(record, sort_keys=True).encode())
    return content.hexdigest()


def _plain(value: Any) -> Any:
    return sorted(value, key=str) if isinstance(value, (set, frozenset)) else str(value)


def _context_length(model: PreTrainedModel) -> int:
    return int(getattr(model.config.get_text_config(), "max_position_embeddings", 0) or 0) or 2**31
