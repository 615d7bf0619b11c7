"""The arguments of TRL's trainers: which are known, and which are decided elsewhere."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

from ..errors import ConfigError, suggest

Method = Literal["sft", "dpo"]

# Arguments that would have no effect, or a second one, and what takes their place.
_ELSEWHERE = {
    "output_dir": "The adapter goes to `output`, and checkpoints beside it.",
    "resume_from_checkpoint": "A job that was stopped goes on by itself when it is started again.",
    "max_length": "Give max_length beside `data`: the data are cut there as they are read.",
    "model_init_kwargs": "The model is loaded before: see dtype, attn_implementation, load_in_4bit and load_in_8bit.",
    "save_only_model": "A checkpoint without the optimiser's state is none that a training could go on from.",
    "push_to_hub": "Push the finished folder: a checkpoint in the midst of training has no Subspace beside it.",
}
_OF_READING = (
    "assistant_only_loss",
    "chat_template_path",
    "completion_only_loss",
    "dataset_kwargs",
    "dataset_text_field",
    "eos_token",
    "truncation_mode",
)


def config_class(method: Method) -> Any:
    """Return TRL's class of a method's arguments, which is a dataclass."""
    import trl

    return trl.DPOConfig if method == "dpo" else trl.SFTConfig


def wrong_arguments(method: Method, arguments: Mapping[str, Any]) -> list[str]:
    """Say of every argument that cannot be used why not; an empty list if all can.

    Args:
        method: `sft` or `dpo`.
        arguments: of TRL's `SFTConfig` or `DPOConfig`, and so of `transformers.TrainingArguments`.
    """
    kind = config_class(method)
    known = {entry.name for entry in fields(kind)}
    problems = []
    for name in map(str, arguments):
        if name in _ELSEWHERE:
            problems.append(f"training.{name} is decided elsewhere. {_ELSEWHERE[name]}")
        elif method == "sft" and name in _OF_READING:
            problems.append(
                f"training.{name} would have no effect, as texts are read in the way of the selection. `learn` says "
                "which tokens are learned."
            )
        elif name not in known:
            hint = suggest(name, known) or " See their documentation for the names."
            problems.append(f"training.{name}: trl.{kind.__name__} has no argument {name!r}.{hint}")
    return problems


def training_arguments(
    method: Method, arguments: Mapping[str, Any], folder: str | Path, *, max_length: int | None, progress: bool
) -> Any:
    """Return a `trl.SFTConfig` or `trl.DPOConfig`.

    TRL's defaults hold, except that nothing is reported to trackers, and that mixed precision is used where a GPU has
    bfloat16 only.

    Args:
        method: `sft` or `dpo`.
        arguments: what is asked for.
        folder: where checkpoints go.
        max_length: tokens per example.
        progress: show the progress bar.

    Raises:
        ConfigError: an argument is unknown or has an impossible value.
    """
    import torch

    problems = wrong_arguments(method, arguments)
    if problems:
        raise ConfigError(" ".join(problems))
    half = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    defaults = {
        "report_to": "none",
        "disable_tqdm": not progress,
        "bf16": half and not arguments.get("fp16"),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "use_cpu": not torch.accelerator.is_available(),
    }
    try:
        with warnings.catch_warnings():
            # TRL gives transformers the old name of this argument even where nobody asks for it.
            warnings.filterwarnings("ignore", message="`gradient_checkpointing", category=FutureWarning)
            return config_class(method)(output_dir=str(folder), max_length=max_length, **{**defaults, **arguments})
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"trl.{config_class(method).__name__} refuses {dict(arguments)} ({error}). See its documentation for the "
            "values."
        ) from error
