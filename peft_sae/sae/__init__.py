"""Stage 1: sparse autoencoders, loaded by sae-lens and placed on a plain Hugging Face model."""

from .identity import SaeIdentity
from .load import SaeHandle, load_saes

__all__ = ["SaeHandle", "SaeIdentity", "load_saes"]
