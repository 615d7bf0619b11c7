"""Changing what was learned, by the features that it uses."""

from ..adapter import EDIT_FILE, read_edits
from .edit import edit_adapter

__all__ = ["EDIT_FILE", "edit_adapter", "read_edits"]
