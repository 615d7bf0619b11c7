"""Supervised fine-tuning of an adapter with `transformers.Trainer`."""

from .job import TrainingJob, read_job, run_job
from .train import train_adapter

__all__ = ["TrainingJob", "read_job", "run_job", "train_adapter"]
