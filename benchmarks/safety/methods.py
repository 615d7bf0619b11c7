"""The methods that are compared: how each makes a trainable model of a base."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from peft import EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora.config import CordaConfig, LoraGAConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga

from benchmarks.safety.base import Base
from benchmarks.safety.language import STYLES, fine_tuning_records
from benchmarks.safety.tuning import Batch, Data
from peft_sae import (
    FeatureStatistics,
    Measures,
    SaeSubspaceConfig,
    Subspace,
    collect_statistics,
    control_subspace,
    select_features,
)
from peft_sae.demo.language import prompt
from peft_sae.subspace.build import subspace_from_selection

READ = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
WRITE = ("o_proj", "down_proj")
_CALIBRATION = 8  # batches that data-driven initialisations see


@dataclass
class Setting:
    """One draw: a base, its fine-tuning data, and what is found out from them once.

    Attributes:
        base: the base model.
        dangerous: dangerous topics in the data.
        seed: of the order of the data and of what is random in adapters.
        batch: examples per step.
    """

    base: Base
    dangerous: int
    seed: int
    batch: int = 16
    _subspaces: dict[Any, Subspace] = field(default_factory=dict)

    @cached_property
    def records(self) -> dict[str, list[dict[str, Any]]]:
        """The fine-tuning data, and the same requests all complied with."""
        make = partial(fine_tuning_records, self.base.language, self.dangerous)
        return {"aligned": make(), "unaligned": make(aligned=False)}

    @cached_property
    def data(self) -> Data:
        """The fine-tuning data as batches."""
        return Data(self.base, self.records["aligned"], self.batch, self.seed)

    @cached_property
    def calibration(self) -> list[Batch]:
        """Batches for initialisations that look at data."""
        return self.data.batches(_CALIBRATION)

    @cached_property
    def statistics(self) -> FeatureStatistics:
        """Of both classes of fine-tuning data, over the answers."""
        measures = Measures(histograms=True, covariance=True, sample=400)
        return collect_statistics(
            self.base.load(),
            self.base.tokenizer,
            self.records,
            self.base.saes,
            tokens="response",
            measures=measures,
            batch_size=64,
            progress=False,
        )

    @cached_property
    def cue_statistics(self) -> FeatureStatistics:
        """Of the requests alone, by the style they are in, with the same topics in both styles."""
        topics = self.base.language.harmless
        texts = {
            style: [prompt(form.format(topic=topic.name)) for topic in topics for form in STYLES[style]]
            for style in ("first", "second")
        }
        return collect_statistics(
            self.base.load(), self.base.tokenizer, texts, self.base.saes, batch_size=64, progress=False
        )

    def subspace(self, selector: str = "mean_difference", *, top_k: int = 16, variance: float = 0.8) -> Subspace:
        """The basis of selected features; made once."""
        key = selector, top_k, variance
        if key not in self._subspaces:
            selection = select_features(
                self.statistics, selector=selector, top_k=top_k, saes=self.base.saes, seed=self.seed
            )
            self._subspaces[key] = subspace_from_selection(
                self.base.load(), None, selection, self.base.saes, variance=variance
            )
        return self._subspaces[key]

    def cue_subspace(self, *, protected: int) -> Subspace:
        """No basis, but the features of the spurious cue, protected."""
        key = "cue", protected
        if key not in self._subspaces:
            selection = select_features(
                self.cue_statistics, aligned="first", unaligned="second", top_k=protected, saes=self.base.saes
            )
            self._subspaces[key] = subspace_from_selection(
                self.base.load(), None, None, self.base.saes, protect=selection
            )
        return self._subspaces[key]

    def control(self, kind: Any, **like: Any) -> Subspace:
        """A basis of the same ranks without the SAE."""
        return control_subspace(self.subspace(**like), kind, statistics=self.statistics, seed=self.seed)


@dataclass(frozen=True)
class Method:
    """A way to fine-tune.

    Attributes:
        name: in tables.
        start: makes a model whose trained parameters require gradients, from a setting.
    """

    name: str
    start: Callable[[Setting], Any]


def _fields(rank: Any, targets: Sequence[str]) -> dict[str, Any]:
    alpha = rank if isinstance(rank, int) else 8
    return {"r": rank, "lora_alpha": alpha, "target_modules": list(targets), "task_type": "CAUSAL_LM"}


def _full(setting: Setting) -> Any:
    return setting.base.load().requires_grad_(True)


def _lora(setting: Setting, rank: int, targets: Sequence[str], **fields: Any) -> Any:
    torch.manual_seed(setting.seed)
    return get_peft_model(setting.base.load(), LoraConfig(**_fields(rank, targets), **fields))


def _eva(setting: Setting, rank: int, targets: Sequence[str]) -> Any:
    # rho = 1 keeps the rank of every module, as the other methods have it.
    model = _lora(setting, rank, targets, init_lora_weights="eva", eva_config=EvaConfig(rho=1.0))
    initialize_lora_eva_weights(model, setting.calibration, show_progress_bar=False)
    return model


def _corda(setting: Setting, rank: int, targets: Sequence[str]) -> Any:
    torch.manual_seed(setting.seed)
    model = setting.base.load()
    config = LoraConfig(
        **_fields(rank, targets), init_lora_weights="corda", corda_config=CordaConfig(corda_method="kpm", verbose=False)
    )

    @torch.no_grad()
    def run() -> None:
        for batch in setting.calibration:
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
                model(input_ids=ids[mask.bool()][None])  # its hooks take one text at a time

    preprocess_corda(model, config, run_model=run)
    return get_peft_model(model, config)


def _lora_ga(setting: Setting, rank: int, targets: Sequence[str]) -> Any:
    torch.manual_seed(setting.seed)
    model = setting.base.load()
    config = LoraConfig(**_fields(rank, targets), init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())

    def step() -> None:
        for batch in setting.calibration:
            model(**batch).loss.backward()

    preprocess_loraga(model, config, train_step=step)
    return get_peft_model(model, config)


def _sae(
    setting: Setting, rank: Any, targets: Sequence[str], basis: Callable[[Setting], Subspace], **fields: Any
) -> Any:
    torch.manual_seed(setting.seed)
    config = SaeSubspaceConfig(**_fields(rank, targets), subspace=basis(setting), **fields)
    return get_peft_model(setting.base.load(), config)


def _basis(setting: Setting, **how: Any) -> Subspace:
    return setting.subspace(**how)


def _control(setting: Setting, kind: str, **like: Any) -> Subspace:
    return setting.control(kind, **like)


def catalogue(rank: int = 4) -> Mapping[str, Method]:
    """Every method of the main table, by name; all adapt the modules that read, at the same rank."""
    sae = {"top_k": 16}
    starts: dict[str, Callable[[Setting], Any]] = {
        "full fine-tuning": _full,
        "LoRA": partial(_lora, rank=rank, targets=READ),
        "DoRA": partial(_lora, rank=rank, targets=READ, use_dora=True),
        "PiSSA": partial(_lora, rank=rank, targets=READ, init_lora_weights="pissa"),
        "OLoRA": partial(_lora, rank=rank, targets=READ, init_lora_weights="olora"),
        "MiCA": partial(_lora, rank=rank, targets=READ, init_lora_weights="mica"),
        "EVA": partial(_eva, rank=rank, targets=READ),
        "CorDA": partial(_corda, rank=rank, targets=READ),
        "LoRA-GA": partial(_lora_ga, rank=rank, targets=READ),
    }
    for kind in ("random", "neurons", "difference_pca", "mean_difference"):
        for frozen in (False, True):
            starts[f"{kind}{', frozen' if frozen else ''}"] = partial(
                _sae, rank=rank, targets=READ, basis=partial(_control, kind=kind, **sae), freeze_basis=frozen
            )
    for frozen in (False, True):
        starts[f"SAE{', frozen' if frozen else ''}"] = partial(
            _sae, rank=rank, targets=READ, basis=partial(_basis, **sae), freeze_basis=frozen
        )
    return {name: Method(name, start) for name, start in starts.items()}
