"""Stage 3: which features to build the basis from."""

from . import selectors  # registers them
from .contrast import Contrast
from .criteria import Criteria
from .registry import register_selector, selector_names
from .select import SelectedFeatures, Selection, select_features

__all__ = [
    "Contrast",
    "Criteria",
    "SelectedFeatures",
    "Selection",
    "register_selector",
    "select_features",
    "selector_names",
    "selectors",
]
