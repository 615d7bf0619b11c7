"""Last stage: leaving this package behind, as a merged checkpoint or as a plain LoRA adapter."""

from .lora import export_lora
from .merge import merge_checkpoint
from .verify import MergeCheck, verify_merge

__all__ = ["MergeCheck", "export_lora", "merge_checkpoint", "verify_merge"]
