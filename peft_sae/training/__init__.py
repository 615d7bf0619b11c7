"""Fine-tuning of an adapter with TRL."""

from .train import train_adapter

__all__ = ["train_adapter"]
