"""Changing what was learned, by the features that it uses."""

from .edit import edit_adapter
from .record import EDIT_FILE, read_edits

__all__ = ["EDIT_FILE", "edit_adapter", "read_edits"]
