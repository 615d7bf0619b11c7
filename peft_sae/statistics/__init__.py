"""Stage 2: what each SAE feature does on labelled text."""

from .collect import collect_statistics
from .moments import FeatureMoments
from .parts import Measures
from .records import split_preferences
from .statistics import FeatureStatistics

__all__ = ["FeatureMoments", "FeatureStatistics", "Measures", "collect_statistics", "split_preferences"]
