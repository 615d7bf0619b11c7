"""Stage 2: what each SAE feature does on labelled text."""

from .collect import collect_statistics
from .statistics import FeatureMoments, FeatureStatistics

__all__ = ["FeatureMoments", "FeatureStatistics", "collect_statistics"]
