"""The command line `peft-sae`."""

from .app import main, main_of_module

__all__ = ["main", "main_of_module"]
