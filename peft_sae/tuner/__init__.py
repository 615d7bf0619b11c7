"""Stage 5: the PEFT tuner `SAE_SUBSPACE`. Importing this package registers it."""

from .registration import register_classes, register_name

register_name()

from .config import SaeSubspaceConfig  # noqa: E402  (after the name: an unsupported PEFT is told first)
from .model import SaeSubspaceModel  # noqa: E402
from .patches import apply_patches  # noqa: E402

register_classes(SaeSubspaceConfig, SaeSubspaceModel)
apply_patches()

__all__ = ["SaeSubspaceConfig", "SaeSubspaceModel"]
