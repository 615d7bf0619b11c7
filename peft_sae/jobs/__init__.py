"""Jobs described by YAML files: they chain the stages, from texts to adapter, report and merged checkpoint."""

from .training import TrainingJob, read_job
from .training_run import run_job

__all__ = ["TrainingJob", "read_job", "run_job"]
