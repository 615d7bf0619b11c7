"""Looking inside what was learned."""

from .inspection import inspect_adapter
from .result import Inspection

__all__ = ["Inspection", "inspect_adapter"]
