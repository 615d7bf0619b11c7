"""Stage 3: which features to build the basis from, and what they are."""

from . import selectors  # registers them
from .contrast import Contrast
from .criteria import Criteria
from .labels import fetch_labels, read_labels
from .registry import register_selector, selector_names
from .select import SelectedFeatures, Selection, select_features
from .table import FeatureRow, FeatureTable, describe_features
from .texts import FeatureExample

__all__ = [
    "Contrast",
    "Criteria",
    "FeatureExample",
    "FeatureRow",
    "FeatureTable",
    "SelectedFeatures",
    "Selection",
    "describe_features",
    "fetch_labels",
    "read_labels",
    "register_selector",
    "select_features",
    "selector_names",
    "selectors",
]
