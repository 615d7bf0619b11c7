"""Stage 3: which features to build the basis from."""

from .registry import register_selector, selector_names
from .select import SelectedFeatures, Selection, select_features

__all__ = ["SelectedFeatures", "Selection", "register_selector", "select_features", "selector_names"]
