"""How each way of fine-tuning makes a trainable model of a base."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from peft import EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora.config import CordaConfig, LoraGAConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga

from benchmarks.safety.setting import Basis, Setting
from benchmarks.safety.tuning import Batch
from peft_sae import SaeSubspaceConfig

READ = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
WRITE = ("o_proj", "down_proj")
_ALPHA = 4  # where ranks differ from layer to layer


def _fields(rank: Any, targets: Sequence[str]) -> dict[str, Any]:
    alpha = rank if isinstance(rank, int) else _ALPHA
    return {"r": rank, "lora_alpha": alpha, "target_modules": list(targets), "task_type": "CAUSAL_LM"}


def full(setting: Setting) -> Any:
    """The base itself, all of it trained."""
    return setting.base.load().requires_grad_(True)


def lora(setting: Setting, rank: int, targets: Sequence[str] = READ, **fields: Any) -> Any:
    """LoRA with whatever PEFT's config says."""
    torch.manual_seed(setting.seed)
    return get_peft_model(setting.base.load(), LoraConfig(**_fields(rank, targets), **fields))


def eva(setting: Setting, rank: int, targets: Sequence[str] = READ, *, neutral: bool = False) -> Any:
    """EVA: bases from the activations' principal components; `neutral` see `Setting.calibration`."""
    # rho = 1 keeps the rank of every module, as the other methods have it.
    model = lora(setting, rank, targets, init_lora_weights="eva", eva_config=EvaConfig(rho=1.0))
    initialize_lora_eva_weights(model, setting.calibration(neutral=neutral), show_progress_bar=False)
    return model


def corda(
    setting: Setting,
    rank: int,
    targets: Sequence[str] = READ,
    *,
    neutral: bool = False,
    method: Literal["kpm", "ipm"] = "kpm",
) -> Any:
    """CorDA: from the weights, seen through the covariance of their inputs.

    Args:
        setting: gives base and data.
        rank: of the adapters.
        targets: modules.
        neutral: see `Setting.calibration`.
        method: adapt what matters least for these inputs (`kpm`, to keep knowledge) or most (`ipm`).
    """
    torch.manual_seed(setting.seed)
    model = setting.base.load()
    how = CordaConfig(corda_method=method, verbose=False)
    config = LoraConfig(**_fields(rank, targets), init_lora_weights="corda", corda_config=how)

    @torch.no_grad()
    def run() -> None:
        for batch in setting.calibration(neutral=neutral):
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
                model(input_ids=ids[mask.bool()][None])  # its hooks take one text at a time

    preprocess_corda(model, config, run_model=run)
    return get_peft_model(model, config)


def lora_ga(setting: Setting, rank: int, targets: Sequence[str] = READ, *, neutral: bool = False) -> Any:
    """LoRA-GA: from the gradient of the loss; `neutral` see `Setting.calibration`."""
    torch.manual_seed(setting.seed)
    model = setting.base.load()
    config = LoraConfig(**_fields(rank, targets), init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())

    def step() -> None:
        for batch in setting.calibration(neutral=neutral):
            model(**batch).loss.backward()

    preprocess_loraga(model, config, train_step=step)
    return get_peft_model(model, config)


def sae(
    setting: Setting,
    rank: Any,
    targets: Sequence[str] = READ,
    *,
    basis: Basis,
    by_spread: bool = False,
    **fields: Any,
) -> Any:
    """SAE_SUBSPACE, or a control of it, with whatever its config says; `by_spread` see `scale_by_spread`."""
    torch.manual_seed(setting.seed)
    config = SaeSubspaceConfig(**_fields(rank, targets), subspace=setting.subspace(basis), **fields)
    model = get_peft_model(setting.base.load(), config)
    if by_spread:
        scale_by_spread(model, setting.calibration())
    return model


@torch.no_grad()
def scale_by_spread(model: Any, batches: Sequence[Batch]) -> None:
    """Scale the rows of each reading module's basis so that the data spread equally along them; their span stays.

    The mean square of the projections on a module's rows is as before. A row of zeros stays one.

    Args:
        model: with adapters whose basis is in `lora_A`.
        batches: that the spread is measured on.
    """
    sums: dict[torch.nn.Module, torch.Tensor] = {}

    def note(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
        found = output[mask].square().sum(0)
        sums[module] = sums[module] + found if module in sums else found

    factors = [module for name, module in model.named_modules() if name.endswith("lora_A.default")]
    hooks = [factor.register_forward_hook(note) for factor in factors]
    for batch in batches:
        mask = batch["attention_mask"].bool()
        model(**batch)
    for hook in hooks:
        hook.remove()
    for factor in factors:
        squares = sums[factor]
        live = squares > 0
        scale = torch.where(live, squares[live].mean() / squares.where(live, 1.0), 1.0).sqrt()
        factor.weight.mul_(scale[:, None])
