"""Watching an adapter while a `Trainer` trains it."""

from __future__ import annotations

import logging
from typing import Any

from peft import PeftModel
from transformers import Trainer, TrainerCallback

from ..errors import ConfigError
from ..inspect.monitor import Snapshot, SubspaceMonitor

logger = logging.getLogger(__name__)


class SubspaceCallback(TrainerCallback):  # type: ignore[misc]
    """Logs how far an SAE_SUBSPACE adapter has moved, to whatever the Trainer logs to.

    Every `every` steps (and at the first and the last one) there is an entry with `subspace/drift`, the share of the
    update's energy outside the bases it started from; `subspace/in_basis`, the rest; `subspace/norm`; and
    `subspace/read/<feature>` or `subspace/write/<feature>`, the shares of the features whose shares have changed most
    since the entry before, and from then on in every entry, so that they make curves. They are in the Trainer's log
    history too. For adapters of the type SAE_SUBSPACE.

        trainer = SFTTrainer(model, ...)
        trainer.add_callback(SubspaceCallback(trainer))

    Args:
        trainer: the Trainer, of transformers or derived from it (TRL).
        every: steps between two entries.
        top: features that an entry may add.
        adapter_name: which adapter of the model; by default the active one.

    Raises:
        ConfigError: an argument is out of range.
    """

    def __init__(self, trainer: Trainer, *, every: int = 50, top: int = 5, adapter_name: str | None = None) -> None:
        if every < 1 or top < 0:
            raise ConfigError(f"every={every} must be 1 or more, and top={top} 0 or more.")
        self._trainer, self._every, self._top, self._name = trainer, every, top, adapter_name
        self._monitor: SubspaceMonitor | None = None
        self._before: Snapshot | None = None
        self._last_step = -1
        self._shown: dict[Any, None] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Find where the adapter's modules are, before any time is spent.

        Raises:
            ConfigError: the Trainer's model has no SAE_SUBSPACE adapter with a Subspace.
        """
        model: Any = self._trainer.model
        if not isinstance(model, PeftModel):
            raise ConfigError(
                f"The Trainer's model is a {type(model).__name__}, and SubspaceCallback watches a PeftModel. Make it "
                "with get_peft_model, or remove the callback."
            )
        self._monitor = SubspaceMonitor(model, self._name)
        self._before, self._last_step = self._monitor.measure(), -1
        logged = {key for entry in state.log_history for key in entry}  # of the run that is resumed
        self._shown = (
            {}
            if self._before is None
            else dict.fromkeys(
                (name, side) for name, side in self._before.shares if f"subspace/{side}/{name}" in logged
            )
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log if it is time."""
        if state.global_step % self._every == 0 or state.global_step == 1:
            self._log(state, control)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log the end, unless that was logged as a step, or the model is that of an earlier one now."""
        if state.global_step != self._last_step and not args.load_best_model_at_end:
            self._log(state, control)

    def _log(self, state: Any, control: Any) -> None:
        if self._monitor is None:
            return
        self._last_step = state.global_step
        found = self._monitor.measure()
        if found is None:
            logger.warning(
                "The adapter's factors are sharded so that no process has their values (FSDP's flat parameters, "
                "ZeRO-3), so SubspaceCallback logs nothing."
            )
            self._monitor = None
            return
        entry = {"subspace/norm": found.norm}
        if found.in_basis is not None and found.drift is not None:
            entry |= {"subspace/drift": found.drift, "subspace/in_basis": found.in_basis}
        self._shown |= dict.fromkeys(self._changed(found))
        entry |= {f"subspace/{side}/{name}": found.shares[name, side] for name, side in self._shown}
        self._before = found
        wanted = control.should_log
        # Not `trainer.log`: TRL's adds what it has gathered for its own next entry, and forgets it.
        Trainer.log(self._trainer, entry)
        control.should_log = wanted  # the handler takes any entry for the one that was due

    def _changed(self, found: Snapshot) -> list[Any]:
        before = {} if self._before is None else self._before.shares
        return sorted(found.shares, key=lambda key: -abs(found.shares[key] - before.get(key, 0.0)))[: self._top]
