"""The command line `peft-sae`."""

from .app import main

__all__ = ["main"]
