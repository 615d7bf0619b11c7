"""Fine-tuning with PEFT in a basis of sparse-autoencoder features.

Importing the package registers the tuner type `SAE_SUBSPACE` with PEFT and does nothing else.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import MissingSubspaceWarning, PeftSaeError
from .subspace import Subspace
from .tuner import SaeSubspaceConfig, SaeSubspaceModel

if TYPE_CHECKING:
    from .edit import edit_adapter
    from .export import export_lora, merge_checkpoint
    from .inspect import Inspection, inspect_adapter
    from .sae import load_saes
    from .selection import Contrast, Criteria, describe_features, register_selector, select_features
    from .statistics import FeatureStatistics, Measures, collect_statistics
    from .subspace.build import build_subspace
    from .subspace.controls import control_subspace
    from .training.callback import SubspaceCallback

__version__ = "0.1.0"

__all__ = [
    "Contrast",
    "Criteria",
    "FeatureStatistics",
    "Inspection",
    "Measures",
    "MissingSubspaceWarning",
    "PeftSaeError",
    "SaeSubspaceConfig",
    "SaeSubspaceModel",
    "Subspace",
    "SubspaceCallback",
    "build_subspace",
    "collect_statistics",
    "control_subspace",
    "describe_features",
    "edit_adapter",
    "export_lora",
    "inspect_adapter",
    "load_saes",
    "merge_checkpoint",
    "register_selector",
    "select_features",
]

# Loading and running an adapter must not pay for the stages that made it.
_LAZY = {
    "Contrast": ".selection",
    "Criteria": ".selection",
    "FeatureStatistics": ".statistics",
    "Inspection": ".inspect",
    "Measures": ".statistics",
    "SubspaceCallback": ".training.callback",
    "build_subspace": ".subspace.build",
    "collect_statistics": ".statistics",
    "control_subspace": ".subspace.controls",
    "describe_features": ".selection",
    "edit_adapter": ".edit",
    "export_lora": ".export",
    "inspect_adapter": ".inspect",
    "load_saes": ".sae",
    "merge_checkpoint": ".export",
    "register_selector": ".selection",
    "select_features": ".selection",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name], __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
