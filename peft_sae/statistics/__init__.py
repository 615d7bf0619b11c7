"""Stage 2: what each SAE feature does on labelled text."""

from .collect import collect_statistics
from .measures import Measures
from .moments import FeatureMoments
from .records import split_preferences
from .statistics import FeatureStatistics

__all__ = ["FeatureMoments", "FeatureStatistics", "Measures", "collect_statistics", "split_preferences"]
