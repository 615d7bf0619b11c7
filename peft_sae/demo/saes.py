"""Sparse autoencoders on the demo model's residual stream, trained by sae-lens and saved in its format."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sae_lens import SAE, BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.sae import SAEMetadata
from sae_lens.training.sae_trainer import SAETrainer
from tqdm.auto import tqdm
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from .model import CONTEXT_SIZE, tokenise
from .size import SaeSize

# Shares a word with the architecture's name, as hub ids do, so that SAE and checkpoint can be matched.
MODEL_NAME = "demo-llama"

_TEXTS_PER_PASS = 128


@dataclass(frozen=True)
class SaeQuality:
    """How well an SAE rebuilds activations that it was not trained on.

    Attributes:
        explained_variance: 1 minus the share of the variance that is lost.
        active_features: mean number of active features per token.
        silent_features: features that no token activated.
    """

    explained_variance: float
    active_features: float
    silent_features: int


def hook_name(layer: int) -> str:
    """Return sae-lens' name of the residual stream behind a block."""
    return f"blocks.{layer}.hook_resid_post"


@torch.no_grad()
def residual_streams(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], layers: Sequence[int]
) -> dict[int, torch.Tensor]:
    """Return the residual stream behind some blocks for every token of the texts but BOS and padding.

    Returns:
        Per layer, float32 [tokens, hidden].
    """
    found: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}
    hooks = [
        model.model.layers[layer].register_forward_hook(
            lambda _module, _inputs, output, sink=found[layer]: sink.append(
                output[0] if isinstance(output, tuple) else output
            )
        )
        for layer in layers
    ]
    try:
        for start in range(0, len(texts), _TEXTS_PER_PASS):
            ids = tokenise(tokenizer, texts[start : start + _TEXTS_PER_PASS])
            model(input_ids=ids)
            kept = (ids != tokenizer.bos_token_id) & (ids != tokenizer.pad_token_id)
            for rows in found.values():
                rows[-1] = rows[-1][kept]
    finally:
        for hook in hooks:
            hook.remove()
    return {layer: torch.cat(rows) for layer, rows in found.items()}


def train_sae(
    activations: torch.Tensor, layer: int, size: SaeSize, seed: int, *, progress: bool
) -> BatchTopKTrainingSAE:
    """Train one SAE with sae-lens' trainer.

    Args:
        activations: float32 [tokens, hidden], the residual stream behind `layer`.
        layer: the block, for the SAE's metadata.
        size: shape and length of training.
        seed: decides initial weights and the order of tokens.
        progress: show a progress bar.

    Returns:
        The SAE for activations as the model has them: the scale used in training is folded into its weights.
    """
    scale = activations.shape[1] ** 0.5 / activations.norm(dim=1).mean().item()
    sae = _initial_sae(activations.shape[1], layer, size, seed)
    order = torch.Generator().manual_seed(seed)
    trainer = SAETrainer(_trainer_config(size), sae, _shuffled_batches(activations * scale, size.batch, order))
    # Not `trainer.fit()`, which shows a bar that cannot be turned off; these calls are what it does inside.
    for _ in tqdm(range(size.steps), desc=f"SAE {hook_name(layer)}", disable=not progress):
        trainer.step(next(trainer.data_provider))
        trainer.n_training_steps += 1
    trainer.set_final_sae_metadata()
    sae.fold_activation_norm_scaling_factor(scale)
    return sae


def _initial_sae(hidden: int, layer: int, size: SaeSize, seed: int) -> BatchTopKTrainingSAE:
    metadata = SAEMetadata(
        model_name=MODEL_NAME,
        model_class_name="AutoModelForCausalLM",
        hook_name=hook_name(layer),
        prepend_bos=True,
        context_size=CONTEXT_SIZE,
    )
    # sae-lens draws initial weights from torch's global generator.
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return BatchTopKTrainingSAE(
            BatchTopKTrainingSAEConfig(d_in=hidden, d_sae=size.width, k=size.active, metadata=metadata)
        )


def _trainer_config(size: SaeSize) -> SAETrainerConfig:
    return SAETrainerConfig(
        total_training_samples=size.steps * size.batch,
        train_batch_size_samples=size.batch,
        lr=size.learning_rate,
        lr_end=size.learning_rate / 10,
        lr_warm_up_steps=size.steps // 20,
        lr_decay_steps=size.steps // 4,
        dead_feature_window=max(1, size.steps // 8),
        logger=LoggingConfig(log_to_wandb=False),
    )


def _shuffled_batches(activations: torch.Tensor, batch: int, order: torch.Generator) -> Iterator[torch.Tensor]:
    while True:
        rows = torch.randperm(len(activations), generator=order)
        for start in range(0, max(1, len(rows) - batch + 1), batch):
            yield activations[rows[start : start + batch]]


@torch.no_grad()
def measure(sae: SAE[Any], activations: torch.Tensor) -> SaeQuality:
    """Measure an SAE that was saved and loaded again on held-out activations, float32 [tokens, hidden]."""
    features = sae.encode(activations)
    lost = (sae.decode(features) - activations).square().sum()
    variance = (activations - activations.mean(dim=0)).square().sum()
    active = features > 0
    return SaeQuality(
        explained_variance=round(1 - (lost / variance).item(), 4),
        active_features=round(active.sum(dim=1).float().mean().item(), 2),
        silent_features=int((~active.any(dim=0)).sum().item()),
    )
