"""How big the demo's world is. The defaults are the world that the demo shows; tests build smaller ones."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class ModelSize:
    """Shape and training of the base model.

    Attributes:
        layers: decoder blocks.
        hidden: width of the residual stream.
        heads: attention heads per block.
        steps: optimiser steps.
        batch: texts per step; every batch is drawn afresh.
        learning_rate: highest learning rate of a one-cycle schedule.
    """

    layers: int = 4
    hidden: int = 96
    heads: int = 4
    steps: int = 1600
    batch: int = 16
    learning_rate: float = 6e-3


@dataclass(frozen=True)
class SaeSize:
    """Shape and training of the sparse autoencoders.

    Attributes:
        layers: blocks whose output gets an SAE. The last block's output is read by no other block.
        width: features per SAE.
        active: features active per token, on average over a batch.
        steps: optimiser steps per SAE.
        batch: tokens per step.
        learning_rate: highest learning rate.
        texts: texts whose activations the SAEs are trained on.
        held_out_texts: texts for the recorded quality.
    """

    layers: tuple[int, ...] = (0, 1, 2)
    width: int = 384
    active: int = 8
    steps: int = 700
    batch: int = 512
    learning_rate: float = 3e-3
    texts: int = 4000
    held_out_texts: int = 500


@dataclass(frozen=True)
class WorldSize:
    """Size of the whole world.

    Attributes:
        topics: topics that the base model knows, half of them dangerous.
        fine_tuning_topics: how many of them the fine-tuning sets use, half of them dangerous.
        model: the base model.
        saes: its sparse autoencoders.
    """

    topics: int = 160
    fine_tuning_topics: int = 64
    model: ModelSize = field(default_factory=ModelSize)
    saes: SaeSize = field(default_factory=SaeSize)
